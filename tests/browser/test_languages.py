"""Names and tooltips in the language that ComfyUI is set to, with frontends that see to it and without."""

import json

import host

SHOWN = """() => {
    const node = app.graph.nodes.find(({ type }) => type === "Strata_SliceByDepth");
    return { title: node.title, category: node.constructor.category,
        description: node.constructor.nodeData.description,
        inputs: node.inputs.map(({ label, name }) => label ?? name) };
}"""
# Where the middle of the node's first widget is in the window
FIRST_WIDGET = """() => {
    const node = app.graph.nodes.find(({ type }) => type === "Strata_SliceByDepth");
    const [x, y] = app.canvas.convertOffsetToCanvas(
        [node.pos[0] + node.size[0] / 2, node.pos[1] + node.widgets[0].last_y + 10]);
    const { left, top } = app.canvas.canvas.getBoundingClientRect();
    return [left + x, top + y];
}"""


def test_a_graph_in_japanese(japanese):
    locale = host.PACK / "locales" / "ja"
    text = json.loads((locale / "nodeDefs.json").read_text(encoding="utf-8"))["Strata_SliceByDepth"]
    menu = json.loads((locale / "main.json").read_text(encoding="utf-8"))["nodeCategories"]
    japanese.load(json.loads((host.PACK / "workflows" / "photo_to_psd.json").read_text(encoding="utf-8")))
    japanese.show("Strata_SliceByDepth")
    shown = japanese.page.evaluate(SHOWN)
    assert shown["title"] == text["display_name"] and shown["description"] == text["description"]
    assert shown["category"] == f"Strata/{menu['Depth']}"
    assert {"image", "depth", "thresholds"} <= set(shown["inputs"])  # names stay, as errors and help pages have them
    x, y = japanese.page.evaluate(FIRST_WIDGET)
    japanese.page.mouse.move(x - 3, y)
    japanese.page.mouse.move(x, y)
    tooltip = japanese.page.locator(".node-tooltip")
    tooltip.wait_for()
    assert tooltip.inner_text() == text["inputs"]["thresholds"]["tooltip"]
    japanese.picture("japanese")
    assert japanese.errors == []
