"""Every bundled workflow in the real frontend: opens whole, means the same to the frontend and to our runner, and runs."""
import itertools
import json
from pathlib import Path

import pytest

WORKFLOWS = sorted((Path(__file__).resolve().parents[2] / "workflows").glob("*.json"))
TITLE = 30  # height of a node's title, which is above its position


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_nodes_do_not_overlap(path):
    boxes = [(node["pos"][0], node["pos"][1] - TITLE, *(a + b for a, b in zip(node["pos"], node["size"], strict=True)), node["id"])
             for node in json.loads(path.read_text())["nodes"]]
    for left, right in itertools.combinations(boxes, 2):
        apart = left[2] <= right[0] or right[2] <= left[0] or left[3] <= right[1] or right[3] <= left[1]
        assert apart, f"nodes {left[4]} and {right[4]} overlap"


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.stem)
def workflow(request, editor) -> Path:
    editor.load(json.loads(request.param.read_text()), request.param.stem)
    return request.param


def plain(prompt: dict) -> dict:
    return {node_id: (node["class_type"], node["inputs"]) for node_id, node in prompt.items()}


def missing_files(prompt: dict, object_info: dict) -> set[str]:
    """Choices that this ComfyUI does not have: weights of real models, which no test downloads, and those of the mini family before its training."""
    found = set()
    for node in prompt.values():
        info = object_info[node["class_type"]]["input"]
        for name, spec in {**info.get("required", {}), **info.get("optional", {})}.items():
            choices = spec[0] if isinstance(spec[0], list) else spec[1].get("options") if spec[0] == "COMBO" else None
            if choices is not None and isinstance(node["inputs"].get(name), str) and node["inputs"][name] not in choices:
                found.add(node["inputs"][name])
    return found


def test_only_weights_are_missing(comfy):
    for path in WORKFLOWS:
        saved = json.loads(path.read_text())
        missing = missing_files(comfy.to_api(saved), comfy.object_info())
        known = {model["name"] for node in saved["nodes"] for model in node["properties"].get("models", [])}
        assert all(name in known or name.startswith("strata_mini_") for name in missing), (path.name, missing)


def test_opens_and_runs(editor, workflow, comfy):
    page, saved = editor.page, json.loads(workflow.read_text())
    if missing := missing_files(comfy.to_api(saved), comfy.object_info()):
        pytest.skip(f"not here: {', '.join(sorted(missing))}")
    assert page.evaluate("() => app.graph.nodes.filter((n) => !LiteGraph.registered_node_types[n.type] || n.has_errors).map((n) => n.type)") == []
    assert len(page.evaluate("() => app.graph.nodes.map((n) => n.id)")) == len(saved["nodes"])
    assert plain(editor.prompt()) == plain(comfy.to_api(saved))
    editor.queue()
    kinds = ("Strata_PreviewLayers", "Strata_SaveLayers", "SaveImage")
    page.wait_for_function("""(kinds) => app.graph.nodes.filter((n) => kinds.includes(n.type))
        .every((n) => n.imgs?.length && n.imgs.every((i) => i.naturalWidth))
        || [...document.querySelectorAll('[data-node-id] img')].length >= app.graph.nodes.filter((n) => kinds.includes(n.type)).length""", arg=kinds)
    editor.fit()
    page.wait_for_function("() => app.canvas.ds.scale < 1")
    editor.picture(f"{workflow.stem}_{editor.mode}")
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
    layers = next(output["images"] for output in entry["outputs"].values() if len(output.get("images", [])) > 1)
    assert len(layers) == 1 + 4, "the flattened picture and four layers"
    # Nodes 2.0 of the floor frontend shows a batch one picture at a time
    editor.page.wait_for_function("""(name) => [...document.images, ...app.graph.nodes.flatMap((n) => n.imgs ?? [])]
        .some((image) => image.src.includes(name) && image.naturalWidth)""", arg=layers[0]["filename"])
    editor.picture(f"slicing_{editor.mode}")
    assert any(file["filename"].endswith(".psd") for file in comfy.files(entry))
    assert editor.errors == []
