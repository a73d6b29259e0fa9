"""Every bundled workflow in the real frontend: opens whole, means the same to the frontend and to our runner,
and runs.
"""

import itertools
import json
from pathlib import Path

import pytest

PACK = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))
MODELS = (".safetensors", ".ckpt")
MODES = ("canvas", "nodes2")
NOTICES = ("layers_from_text_sdxl", "photo_to_psd_depth_anything")
SHOWN_TEXT = ("PreviewAny", "preview")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_model_files_are_named_with_their_place_for_people_and_for_the_frontend(path):
    nodes = json.loads(path.read_text())["nodes"]
    notes = " ".join(node["widgets_values"][0] for node in nodes if node["type"] == "MarkdownNote")
    known = {
        file["name"]: file["url"]
        for file in json.loads((PACK / "models_config" / "transparency.json").read_text())["files"]
    }
    for node in nodes:
        hints = node["properties"].get("models", [])
        files = [
            value
            for value in node.get("widgets_values", [])
            if str(value).endswith(MODELS) and not value.startswith("strata_")
        ]
        if node["type"] in ("Strata_LoadDecomposer", "Strata_BackToFront"):  # what users train themselves
            assert all(name in notes for name in files) and (not files or "docs/training.md" in notes)
            continue
        for name in (value for value in node.get("widgets_values", []) if str(value).endswith(".pth")):
            # The frontend downloads no pickles.
            assert f"[{name}]({known[name]}) → `models/layer_model`" in notes
        if node["type"] == "Strata_LoadRGBAVAE":  # a folder of its own, with what lies beside the file
            assert all(f"`models/vae/{name}`" in notes for name in files)
            continue
        assert [hint["name"] for hint in hints] == files
        for hint in hints:
            assert (
                hint["directory"]
                == {
                    "CheckpointLoaderSimple": "checkpoints",
                    "ControlNetLoader": "controlnet",
                    "UNETLoader": "diffusion_models",
                    "CLIPLoader": "text_encoders",
                    "DualCLIPLoader": "text_encoders",
                    "VAELoader": "vae",
                    "CLIPVisionLoader": "clip_vision",
                    "StyleModelLoader": "style_models",
                    "Strata_LoadTransparency": "layer_model",
                }[node["type"]]
            )
            assert hint["url"] == known.get(hint["name"], hint["url"])
            assert "/resolve/main/" in hint["url"] and hint["url"].endswith("/" + hint["name"])
            assert f"[{hint['name']}]({hint['url']}) → `models/{hint['directory']}`" in notes


def without_file(prompt: dict, comfy) -> set[str]:
    """Types of the nodes that name a model which this ComfyUI does not have."""
    there = {
        name
        for folder in ("checkpoints", "diffusion_models", "layer_model", "vae")
        for name in comfy.get(f"/models/{folder}").json()
    }
    return {
        node["class_type"]
        for node in prompt.values()
        if node["class_type"] == "Strata_EstimateDepth"  # a folder, which no test has
        or any(str(value).endswith(MODELS) and value not in there for value in node["inputs"].values())
    }


def plain(prompt: dict) -> dict:
    """By node: its type and inputs, but for the text that Preview Any shows, which only the page adds."""
    return {
        node_id: (
            node["class_type"],
            {name: value for name, value in node["inputs"].items() if (node["class_type"], name) != SHOWN_TEXT},
        )
        for node_id, node in prompt.items()
    }


def needs_files(path: Path) -> bool:
    """Whether a workflow needs models that do not come with the pack."""
    nodes = json.loads(path.read_text())["nodes"]
    values = [str(value) for node in nodes for value in node.get("widgets_values", [])]
    return any(node["type"] == "Strata_EstimateDepth" for node in nodes) or any(
        value.endswith(MODELS) and not value.startswith("strata_") for value in values
    )


# What cannot run is opened once; two of these in both modes, for the frontend's notice
CASES = [
    pytest.param(path, mode, id=f"{path.stem}-{mode}")
    for path in WORKFLOWS
    for mode in (MODES if path.stem in NOTICES or not needs_files(path) else MODES[:1])
]


SHOWN = """() => app.graph.nodes.map((node) => {
    const scale = app.canvas.ds.scale;
    const shown = document.querySelector(`[data-node-id="${node.id}"]`)?.getBoundingClientRect();
    if (shown) return [shown.left / scale, shown.top / scale, shown.right / scale, shown.bottom / scale, node.id];
    return [...node.getBounding().slice(0, 2), node.pos[0] + node.size[0], node.pos[1] + node.size[1], node.id];
})"""


def assert_apart(page) -> None:
    """No node as it is shown, with what its run has added to it, covers another.

    Not for Nodes 2.0: frontend 1.32.9 draws graphs that are opened one after another over each other there.
    """
    for left, right in itertools.combinations(page.evaluate(SHOWN), 2):
        apart = left[2] <= right[0] or right[2] <= left[0] or left[3] <= right[1] or right[3] <= left[1]
        assert apart, f"nodes {left[4]} and {right[4]} overlap"


@pytest.mark.parametrize(("workflow", "editor"), CASES, indirect=["editor"])
def test_opens_and_runs(workflow, editor, comfy):
    if comfy.lacks(workflow.stem):
        pytest.skip("it needs a newer ComfyUI")
    page, saved = editor.page, json.loads(workflow.read_text())
    editor.load(saved, workflow.stem)
    prompt = comfy.to_api(saved)
    lacking = without_file(prompt, comfy)
    assert needs_files(workflow) or not lacking  # a ComfyUI of one's own may have what does not ship
    unknown = "() => app.graph.nodes.filter((n) => !LiteGraph.registered_node_types[n.type]).map((n) => n.type)"
    assert page.evaluate(unknown) == []
    marked = page.evaluate("() => app.graph.nodes.filter((n) => n.has_errors).map((n) => n.type)")
    assert set(marked) <= lacking  # newer frontends mark them, older ones none
    assert len(page.evaluate("() => app.graph.nodes.map((n) => n.id)")) == len(saved["nodes"])
    assert plain(editor.prompt()) == plain(prompt)
    if lacking:
        if any("models" in node["properties"] for node in saved["nodes"]):  # the frontend says so: dialog or notice
            told = page.locator(".p-dialog, [data-testid=error-overlay]")
            told.wait_for()
            if notice := page.locator("[data-testid=error-overlay-dismiss]").all():
                notice[0].click()
            else:
                page.keyboard.press("Escape")
            told.wait_for(state="hidden")
        editor.fit()
        page.wait_for_function("() => app.canvas.ds.scale < 1")
        editor.picture(f"{workflow.stem}_{editor.mode}")
        if editor.mode == "canvas":
            assert_apart(page)
        assert editor.errors == []
        return
    editor.queue()
    editor.fit()  # the classic canvas fetches a node's images when it draws the node
    kinds = ("Strata_PreviewLayers", "Strata_SaveLayers", "SaveImage")
    page.wait_for_function(
        """(kinds) => app.graph.nodes.filter((n) => kinds.includes(n.type))
        .every((n) => n.imgs?.length && n.imgs.every((i) => i.naturalWidth))
        || [...document.querySelectorAll('[data-node-id] img')].length
            >= app.graph.nodes.filter((n) => kinds.includes(n.type)).length""",
        arg=kinds,
        timeout=60_000,
    )
    page.wait_for_function("() => app.canvas.ds.scale < 1")
    editor.picture(f"{workflow.stem}_{editor.mode}")
    if editor.mode == "canvas":
        assert_apart(page)
    assert editor.errors == []


def test_the_slicing_workflow_from_start_to_layers(editor, comfy):
    """What a person does: open, run, drag a line, run, look."""
    path = next(path for path in WORKFLOWS if path.stem == "depth_slice_to_psd")
    editor.load(json.loads(path.read_text()), path.stem)
    editor.queue()
    editor.show("Strata_SliceByDepth")
    top = editor.page.locator(".strata-depth-picker .top")
    top.wait_for()
    box = top.bounding_box()
    x, y = box["x"] + box["width"] / 3, box["y"] + box["height"]
    editor.page.mouse.move(x, y - 0.35 * box["height"])
    editor.page.mouse.down()
    editor.page.mouse.move(x, y - 0.5 * box["height"], steps=3)
    editor.page.mouse.up()
    editor.queue()
    low, middle, high = (float(part) for part in editor.widget("Strata_SliceByDepth", "thresholds").split(","))
    assert (low, high) == (0.15, 0.7)
    assert middle == pytest.approx(0.5, abs=0.01)
    entry = max(comfy.get("/history").json().values(), key=lambda entry: entry["prompt"][0])
    shown = next(output for output in entry["outputs"].values() if "strata_pictures" in output)
    assert len(shown["strata_pictures"]) == 1 + 4, "the flattened picture and four layers"
    editor.page.wait_for_function(
        """(name) => [...document.images, ...app.graph.nodes.flatMap((n) => n.imgs ?? [])]
        .some((image) => image.src.includes(name) && image.naturalWidth)""",
        arg=shown["images"][0]["filename"],
    )
    editor.picture(f"slicing_{editor.mode}")
    assert any(file["filename"].endswith(".psd") for file in comfy.files(entry))
    assert editor.errors == []


@pytest.mark.parametrize("name", ["layers_roundtrip", "depth_slice_to_psd"])
def test_graphs_of_the_first_version_open_with_the_new_inputs_at_their_defaults(editor, name):
    """Of nodes that add widgets of their own, whose values stood where new inputs are now."""
    old = PACK / "tests" / "old_graphs"
    editor.load(json.loads((old / f"{name}.json").read_text(encoding="utf-8")), name)
    prompt, saved = editor.prompt(), json.loads((old / "api" / f"{name}.json").read_text(encoding="utf-8"))
    for node_id, node in saved.items():
        assert {key: prompt[node_id]["inputs"][key] for key in node["inputs"]} == node["inputs"]
    new = {
        key: value
        for node_id, node in prompt.items()
        for key, value in node["inputs"].items()
        if key not in saved[node_id]["inputs"]
    }
    saving = {"bits": "8", "trim": False, "alpha_as_mask": False}
    assert new == saving | (
        {"groups": "leaves"}
        if name == "layers_roundtrip"
        else {"range": "each image", "range_low": 0, "range_high": 1, "names": ""}
    )
