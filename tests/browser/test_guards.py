"""What helps on the canvas: the flip button, what new nodes start with, uploads of several files, and notes."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from host import PACK
from PIL import Image

CHECKPOINT = PACK / "models" / "checkpoints" / "strata_mini_sd.safetensors"
SLICE, HARMONIZE = "Strata_SliceByDepth", "Strata_HarmonizeLayers"


def make(editor, kind: str) -> None:
    """A new node, as the search box makes one."""
    editor.page.evaluate("(kind) => { app.graph.add(LiteGraph.createNode(kind)); }", kind)


def graph(editor) -> dict:
    """As it is saved: what is undefined is left out."""
    return json.loads(editor.page.evaluate("() => JSON.stringify(app.graph.serialize())"))


@pytest.mark.parametrize("kind", [SLICE, "Strata_ComposeByDepth"])
def test_one_click_turns_near_and_far_round(editor, kind):
    make(editor, kind)
    click = """(kind) => app.graph.nodes.find((n) => n.type === kind)
        .widgets.find((w) => w.name === 'flip near and far').callback()"""
    for expected in ("black", "white"):
        editor.page.evaluate(click, kind)
        assert editor.widget(kind, "near_is") == expected
    saved = graph(editor)
    assert "flip near and far" not in editor.prompt()[str(saved["nodes"][0]["id"])]["inputs"]
    editor.load(saved)
    assert editor.widget(kind, "near_is") == "white" and editor.errors == []


def test_new_nodes_start_with_the_new_values_and_saved_ones_keep_the_old(editor):
    make(editor, HARMONIZE)
    assert editor.widget(HARMONIZE, "reach") == 0.3 and editor.widget(HARMONIZE, "detail") == 8
    saved = graph(editor)
    editor.set_widget(HARMONIZE, "reach", 0.7)
    editor.load(graph(editor))
    assert editor.widget(HARMONIZE, "reach") == 0.7
    saved["nodes"][0]["widgets_values"] = saved["nodes"][0]["widgets_values"][:-4]  # reach and what came later
    editor.load(saved)
    assert editor.widget(HARMONIZE, "reach") == 0
    editor.load(json.loads((PACK / "tests" / "old_graphs" / "harmonize_layers_mini.json").read_text(encoding="utf-8")))
    assert editor.widget(HARMONIZE, "reach") == 0 and editor.widget(HARMONIZE, "detail") == 10
    assert editor.errors == []


def test_a_link_from_depth_to_the_canvas_offers_where_depth_comes_from(editor):
    make(editor, SLICE)
    make(editor, "PreviewImage")
    found = editor.page.evaluate("() => LiteGraph.slot_types_default_in['IMAGE,MASK']")
    assert found[:2] == ["Strata_EstimateDepth", "Strata_LoadDepth"]
    # As a choice in the menu makes it
    editor.page.evaluate("""() => {
        const node = app.graph.nodes.find((n) => n.type === 'Strata_SliceByDepth');
        app.canvas.createDefaultNodeForSlot({ nodeTo: node, slotTo: node.findInputSlot('depth'), position: [10, 10],
            nodeType: 'Strata_LoadDepth', posAdd: [0, 0], posSizeFix: [0, 0] });
    }""")
    assert (
        editor.page.evaluate("""() => {
        const node = app.graph.nodes.find((n) => n.type === 'Strata_SliceByDepth');
        return node.getInputNode(node.findInputSlot('depth'))?.type;
    }""")
        == "Strata_LoadDepth"
    )
    assert editor.errors == []


def test_several_images_are_uploaded_at_once_and_become_layers(editor, comfy, tmp_path):
    paths = []
    for number, colour in enumerate(((200, 60, 50, 255), (60, 90, 200, 128), (60, 180, 90, 255))):
        pixels = np.zeros((60, 80, 4), np.uint8)
        pixels[10 * number :, 20 * number :] = colour
        paths.append(tmp_path / f"upload_{editor.mode}_{number}.png")
        Image.fromarray(pixels).save(paths[-1])
    editor.load_api(
        {
            "1": {"class_type": "Strata_LoadLayerImage", "inputs": {}},
            "2": {"class_type": "Strata_PreviewLayers", "inputs": {"layers": ["1", 0]}},
        }
    )
    with editor.page.expect_file_chooser() as chooser:
        editor.page.evaluate("""() => app.graph.nodes.find((n) => n.type === 'Strata_LoadLayerImage')
            .widgets.find((w) => w.type === 'button').callback()""")
    assert chooser.value.is_multiple()
    chooser.value.set_files(paths)
    editor.page.wait_for_function(
        """(names) => app.graph.nodes.find((n) => n.type === 'Strata_LoadLayerImage')
        .widgets.find((w) => w.name === 'files').value === names""",
        arg="\n".join(path.name for path in paths),
    )
    editor.queue()
    output = editor.page.evaluate(
        "() => app.nodeOutputs[app.graph.nodes.find((n) => n.type === 'Strata_PreviewLayers').id]"
    )
    assert len(output["images"]) == 1 and len(output["strata_pictures"]) == 4
    flat = np.asarray(Image.open(io.BytesIO(comfy.download(output["strata_pictures"][0]))))
    assert flat[50, 60].tolist() == [60, 180, 90]
    spread(editor)
    editor.picture(f"load_layer_image_{editor.mode}")
    saved = graph(editor)
    editor.load(saved)
    assert editor.widget("Strata_LoadLayerImage", "files").split("\n") == [path.name for path in paths]
    assert editor.errors == []


def spread(editor) -> None:
    """All nodes beside each other and in view, without the notices of the frontend."""
    for close in editor.page.locator(".p-toast-close-button, .p-toast-message button").all():
        close.click()
    editor.page.evaluate("""() => {
        let left = 0;
        for (const node of app.graph.nodes) { node.pos = [left, 0]; left += node.size[0] + 60; }
        app.canvas.deselectAllNodes?.();
        app.canvas.setDirty(true, true);
    }""")
    editor.page.wait_for_timeout(300)
    editor.fit()
    editor.page.wait_for_timeout(600)


def test_notes_are_seen_on_the_node(editor):
    editor.load_api(
        {
            "1": {"class_type": "Strata_RenderScene", "inputs": {"kind": "beach", "count": 2, "seed": 3}},
            "2": {
                "class_type": SLICE,
                "inputs": {"image": ["1", 0], "depth": ["1", 3], "thresholds": "0.6, 0.3", "near_is": "auto"},
            },
            "3": {"class_type": "Strata_PreviewLayers", "inputs": {"layers": ["2", 0]}},
        }
    )
    editor.queue()
    editor.page.wait_for_function(
        "() => app.nodeOutputs[app.graph.nodes.find((n) => n.type === 'Strata_SliceByDepth').id]"
    )
    spread(editor)
    editor.picture(f"notes_{editor.mode}")
    note = editor.page.locator(".strata-notes")
    assert note.inner_text().startswith("depth: auto takes black as near, since it gets darker towards the lower edge;")
    assert note.is_visible()
    editor.set_widget(SLICE, "near_is", "black")
    editor.queue()
    note.wait_for(state="detached")
    assert editor.errors == []


@pytest.mark.skipif(not CHECKPOINT.exists(), reason="no trained weights: make mini")
def test_the_mini_family_tells_on_comfyuis_own_nodes(editor):
    unknown = {"canvas": "samurai", "nodes2": "zeppelin"}[
        editor.mode
    ]  # the second run would find the first one's results
    editor.load_api(
        {
            "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": CHECKPOINT.name}},
            "2": {"class_type": "CLIPTextEncode", "inputs": {"text": f"a {unknown} on a beach", "clip": ["1", 1]}},
            "3": {"class_type": "EmptyLatentImage", "inputs": {"width": 256, "height": 128, "batch_size": 1}},
            "4": {
                "class_type": "KSampler",
                "inputs": {
                    "model": ["1", 0],
                    "positive": ["2", 0],
                    "negative": ["2", 0],
                    "latent_image": ["3", 0],
                    "seed": 1,
                    "steps": 1,
                    "cfg": 1.0,
                    "sampler_name": "euler",
                    "scheduler": "normal",
                    "denoise": 1.0,
                },
            },
            "5": {"class_type": "VAEDecode", "inputs": {"samples": ["4", 0], "vae": ["1", 2]}},
            "6": {"class_type": "PreviewImage", "inputs": {"images": ["5", 0]}},
        }
    )
    editor.queue()
    spread(editor)
    editor.picture(f"mini_notes_{editor.mode}")
    first, second = editor.page.locator(".strata-notes").all_inner_texts()
    assert first.startswith(f"The mini family does not know {unknown};"), first
    assert second.startswith("The mini family was trained at 128×128 pixels and does not know 256×128;"), second
    assert editor.errors == []
