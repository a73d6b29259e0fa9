"""A bundled workflow brings the images that it loads to a ComfyUI that lacks them, and leaves the user's own alone."""

import json
from pathlib import Path

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
IMAGE, DEPTH = "strata_scene.png", "strata_scene_depth.png"


def open_slicing(editor) -> None:
    editor.load(json.loads((WORKFLOWS / "depth_slice_to_psd.json").read_text()), "depth_slice_to_psd")


def test_missing_inputs_are_there_on_the_first_click(editor, comfy):
    folder = comfy.server.base / "input"
    for name in (IMAGE, DEPTH):
        (folder / name).unlink()
    editor.page.evaluate("() => app.refreshComboInNodes()")  # as on a ComfyUI that never had them
    open_slicing(editor)
    for name in (IMAGE, DEPTH):
        assert (folder / name).read_bytes() == (WORKFLOWS / "input" / name).read_bytes()
    assert editor.widget("LoadImage", "image") == IMAGE
    offered = "() => app.graph.nodes.find((n) => n.type === 'LoadImage').widgets[0].options.values"
    assert IMAGE in editor.page.evaluate(offered)
    editor.queue()
    assert editor.errors == []


def test_a_list_of_files_is_copied_too(editor, comfy):
    folder, shipped = comfy.server.base / "input", sorted((WORKFLOWS / "input").glob("strata_layerd*"))
    for source in shipped:
        (folder / source.name).unlink()
    editor.load(json.loads((WORKFLOWS / "finish_layerd.json").read_text()), "finish_layerd")
    assert len(shipped) == 4 and all((folder / one.name).read_bytes() == one.read_bytes() for one in shipped)
    assert editor.errors == []


def test_a_file_of_the_user_is_not_replaced(editor, comfy):
    path = comfy.server.base / "input" / IMAGE
    own = (WORKFLOWS / "input" / "strata_beach.png").read_bytes()
    before = set(path.parent.iterdir())
    path.write_bytes(own)
    try:
        open_slicing(editor)
        assert path.read_bytes() == own and set(path.parent.iterdir()) == before
    finally:
        path.write_bytes((WORKFLOWS / "input" / IMAGE).read_bytes())


def test_names_that_only_look_like_ours_are_left_to_comfyui(editor, comfy):
    graph = json.loads((WORKFLOWS / "depth_slice_to_psd.json").read_text())
    next(node for node in graph["nodes"] if node["type"] == "LoadImage")["widgets_values"][0] = "strata_mine.png"
    editor.load(graph)
    assert not (comfy.server.base / "input" / "strata_mine.png").exists()
    assert editor.widget("LoadImage", "image") == "strata_mine.png"
