"""Graphs made from nothing: the search dialog finds the nodes by words that people type, and links are drawn."""

from __future__ import annotations

import pytest

CHECKPOINT = "strata_mini_sd.safetensors"
# For each graph: nodes (what is typed, the node that it is to find, where that is put), widgets and links by the nodes'
# places in the list
GRAPHS = {
    "photo_to_psd": (
        [
            ("load image", "LoadImage", (330, 250)),
            ("load depth", "Strata_LoadDepth", (330, 800)),
            ("photo to layers", "Strata_SliceByDepth", (780, 450)),
            ("save psd", "Strata_SaveLayers", (1250, 250)),
        ],
        [(0, "image", "strata_raccoon.jpg"), (1, "file", "strata_raccoon_depth.png")],
        [(0, "IMAGE", 2, "image"), (1, "depth", 2, "depth"), (2, "layers", 3, "layers")],
    ),
    "decompose": (
        [
            ("load image", "LoadImage", (100, 250)),
            ("load checkpoint", "CheckpointLoaderSimple", (100, 700)),
            ("load diffusion model", "UNETLoader", (100, 900)),
            ("load decomposer", "Strata_LoadDecomposer", (100, 1100)),
            ("load image as mask", "LoadImageMask", (480, 250)),
            ("threshold mask", "ThresholdMask", (480, 700)),
            ("decompose", "Strata_DecomposeImage", (860, 250)),
            ("save psd", "Strata_SaveLayers", (1340, 250)),
        ],
        [
            (0, "image", "strata_astronaut.jpg"),
            (1, "ckpt_name", CHECKPOINT),
            (2, "unet_name", "strata_mini_inpaint.safetensors"),
            (3, "file", "strata_mini_layeringdiff.safetensors"),
            (4, "image", "strata_astronaut_depth.png"),
            (4, "channel", "red"),
            (6, "steps", 3),
        ],
        [
            (0, "IMAGE", 6, "image"),
            (4, "MASK", 5, "mask"),
            (5, "MASK", 6, "mask"),
            (1, "VAE", 6, "vae"),
            (3, "decomposer", 6, "decomposer"),
            (2, "MODEL", 6, "model"),
            (6, "layers", 7, "layers"),
        ],
    ),
    "harmonise": (
        [
            ("render scene", "Strata_RenderScene", (100, 250)),
            ("load checkpoint", "CheckpointLoaderSimple", (100, 1100)),
            ("clip text encode", "CLIPTextEncode", (480, 250)),
            ("clip text encode", "CLIPTextEncode", (480, 600)),
            ("harmonize layers", "Strata_HarmonizeLayers", (940, 250)),
            ("save psd", "Strata_SaveLayers", (1340, 250)),
        ],
        [(1, "ckpt_name", CHECKPOINT), (2, "text", "an octopus on a street")],
        [
            (1, "CLIP", 2, "clip"),
            (1, "CLIP", 3, "clip"),
            (1, "MODEL", 4, "model"),
            (2, "CONDITIONING", 4, "positive"),
            (3, "CONDITIONING", 4, "negative"),
            (1, "VAE", 4, "vae"),
            (0, "layers", 4, "layers"),
            (4, "layers", 5, "layers"),
        ],
    ),
}
# What is found by the names alone, as on ComfyUI 0.3.75, which hands on no aliases
FOUND = {
    "depth layers": {"Strata_SliceByDepth"},
    "depth slicer": {"Strata_SliceByDepth"},
    "depth map": {"Strata_EstimateDepth"},
    "depth anything": {"Strata_EstimateDepth"},
    "decompose": {"Strata_DecomposeImage", "Strata_LoadDecomposer"},
    "layer decomposer": {"Strata_DecomposeImage"},
    "foreground": {"Strata_DecomposeImage", "Strata_MatteForeground", "Strata_DetectForeground"},
    "mask to layer": {"Strata_LayersFromImages"},
    "load image with alpha": {"Strata_LoadLayerImage"},
    "move layers": {"Strata_EditLayers", "Strata_TransformLayer"},
    "layer editor": {"Strata_EditLayers"},
    "scale layer": {"Strata_TransformLayer"},
    "merge layers": {"Strata_OrderLayers", "Strata_FlattenLayers"},
    "show layers": {"Strata_PreviewLayers"},
    "opacity": {"Strata_ChangeLayer"},
    "harmonise": {"Strata_HarmonizeLayers"},
    "shadow": {"Strata_HarmonizeLayers", "Strata_EffectLayers"},
    "insert object": {"Strata_InsertAtDepth"},
    "inpaint": {"Strata_RedrawLayer", "Strata_InsertAtDepth"},
}


def test_words_find_their_nodes(editor):
    found = editor.page.evaluate(
        """(words) => {
        const { $pinia } = document.querySelector('#vue-app').__vue_app__.config.globalProperties;
        const { nodeSearchService: service } = $pinia._s.get('nodeDef');
        return words.map((text) => service.searchNode(text, [], { limit: 12 }).map(({ name }) => name));
    }""",
        list(FOUND),
    )
    lacking = {words: FOUND[words] - set(names) for words, names in zip(FOUND, found, strict=True)}
    assert {words: names for words, names in lacking.items() if names} == {}


REACHED = """([x, y]) => {
    const there = document.elementFromPoint(x, y);
    return there === app.canvas.canvas || there?.closest('[data-node-id]');
}"""


def point(page, place: tuple[float, float]) -> None:
    """Move the pointer, when no mask of a page that opens or of a dialog that closes lies over the place any more."""
    page.wait_for_function(REACHED, arg=list(place))
    page.mouse.move(*place)


def add(editor, words: str, kind: str, place: tuple[int, int]) -> int:
    """A double click on the canvas, words, Enter, and where newer frontends hang the node on the pointer, a click."""
    page = editor.page
    before = page.evaluate("() => app.graph.nodes.map((node) => node.id)")
    point(page, place)
    # However long a busy page takes between the two presses, they are one double click; at one moment they are none
    page.evaluate("() => { app.canvas.pointer.constructor.doubleClickTime = 20_000; document.activeElement.blur(); }")
    page.mouse.dblclick(*place, delay=30)
    page.wait_for_function("() => document.activeElement.role === 'combobox'")
    page.evaluate("() => { app.canvas.pointer.constructor.doubleClickTime = 300; }")
    page.keyboard.type(words)
    name = page.evaluate("(kind) => LiteGraph.registered_node_types[kind].title", kind)
    page.get_by_role("option").filter(has_text=name).first.wait_for()
    page.wait_for_timeout(700)  # until the dialog has marked it
    page.keyboard.press("Enter")
    page.wait_for_function("(count) => app.graph.nodes.length > count", arg=len(before))
    point(page, (place[0], place[1] - 10))
    point(page, place)
    page.wait_for_timeout(200)
    page.mouse.click(*place)
    made = "(before) => app.graph.nodes.filter((n) => !before.includes(n.id)).map((n) => [n.id, n.type])"
    [(node, found)] = page.evaluate(made, before)
    assert found == kind, words
    return node


SLOT = """([id, name, side]) => {
    const node = app.graph.getNodeById(id), index = node[side].findIndex((slot) => slot.name === name);
    const way = side === 'inputs' ? 'in' : 'out';
    const shown = document.querySelector(`[data-slot-key="${id}-${way}-${index}"]`)?.getBoundingClientRect();
    if (shown) return [shown.left + shown.width / 2, shown.top + shown.height / 2];
    const [x, y] = side === 'inputs' ? node.getInputPos(index) : node.getOutputPos(index);
    const box = app.canvas.canvas.getBoundingClientRect(), { scale, offset } = app.canvas.ds;
    return [box.left + (x + offset[0]) * scale, box.top + (y + offset[1]) * scale];
}"""


def link(editor, source: int, output: str, target: int, name: str) -> None:
    """Drag from the dot of an output to the dot of an input."""
    mouse, page = editor.page.mouse, editor.page
    point(page, page.evaluate(SLOT, [source, output, "outputs"]))
    mouse.down()
    mouse.move(*page.evaluate(SLOT, [target, name, "inputs"]), steps=5)
    page.wait_for_timeout(50)
    mouse.up()
    page.wait_for_function(
        """([source, target, name]) => {
        const node = app.graph.getNodeById(target);
        return node.getInputNode(node.inputs.findIndex((slot) => slot.name === name))?.id === source;
    }""",
        arg=[source, target, name],
    )


@pytest.mark.parametrize(
    "name", ["photo_to_psd", *(pytest.param(name, marks=pytest.mark.slow) for name in ("decompose", "harmonise"))]
)
def test_a_graph_from_nothing_ends_in_a_psd(editor, comfy, name):
    added, widgets, links = GRAPHS[name]
    editor.page.evaluate("() => app.clean()")  # images of another graph's nodes with the same numbers
    nodes = [add(editor, *node) for node in added]
    for place, widget, value in widgets:
        editor.set_widget(added[place][1], widget, value)
    for source, output, target, socket in links:
        link(editor, nodes[source], output, nodes[target], socket)
    editor.queue()
    editor.picture(f"from_nothing_{name}_{editor.mode}")
    entry = max(comfy.get("/history").json().values(), key=lambda entry: entry["prompt"][0])
    assert any(file["filename"].endswith(".psd") for file in comfy.files(entry))
    # Frontend 1.32.9's search box has an error of its own when it closes
    assert [error for error in editor.errors if "onOptionSelect" not in error] == []
