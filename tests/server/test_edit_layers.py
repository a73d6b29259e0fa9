"""Edit layers without a browser: the API's own way, and what the editor is given."""

import io
import json

import numpy as np
import pytest
import run
from PIL import Image

SCENE = {"kind": "random", "objects": "house, dog", "count": 2, "width": 160, "height": 120, "seed": 5, "shadows": True}
FLAT = {"blending": "sRGB", "background": "transparent"}
KEEP = {"fields": "", "x": 0, "y": 0, "w": 0, "h": 0, "rotation": 0.0, "flip_h": False, "flip_v": False, "name": ""}
LOOK = {"opacity": 1.0, "blend_mode": "normal", "visible": True}


def outputs(comfy, *nodes: tuple[str, dict], image: str = "") -> dict:
    """Run a scene (node 1) and these nodes, numbered from 2; what they show, and the picture of node `image`."""
    prompt = {"1": {"class_type": "Strata_RenderScene", "inputs": SCENE}}
    prompt |= {str(number): {"class_type": kind, "inputs": inputs} for number, (kind, inputs) in enumerate(nodes, 2)}
    if image:
        prompt["save"] = {"class_type": "SaveImage", "inputs": {"images": [image, 0], "filename_prefix": "edit"}}
    found = comfy.run(prompt)["outputs"]
    return found | ({"picture": pixels(comfy, found["save"]["images"][0])} if image else {})


def pixels(comfy, file: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(comfy.download(file))))


def edit(text, layers=("1", 2)) -> tuple[str, dict]:
    return "Strata_EditLayers", {"layers": list(layers), "edits": text if isinstance(text, str) else json.dumps(text)}


def flatten(node: str, slot: int = 0) -> tuple[str, dict]:
    return "Strata_FlattenLayers", {"layers": [node, slot], **FLAT}


def test_edits_are_what_the_other_nodes_do(comfy):
    text = {
        "layers": [
            {"layer": "dog", "x": -30, "y": 4, "w": 120, "h": 130, "rotation": 20, "flip_h": True},
            {"layer": 2, "opacity": 0.5, "blend_mode": "multiply"},
        ],
        "order": ["background", "dog", "house"],
    }
    ours = outputs(comfy, edit(text), flatten("2"), image="3")["picture"]
    move = {**KEEP, **LOOK, "x": -30, "y": 4, "w": 120, "h": 130, "rotation": 20.0, "flip_h": True, "layer": "dog"}
    shade = {**KEEP, **LOOK, "opacity": 0.5, "blend_mode": "multiply", "layer": "house"}
    theirs = outputs(
        comfy,
        ("Strata_SetLayer", {"layers": ["1", 2], "action": "change", **move}),
        ("Strata_SetLayer", {"layers": ["2", 0], "action": "change", **shade}),
        ("Strata_OrderLayers", {"layers": ["3", 0], "action": "reorder", "select": "1, 3, 2", "names": ""}),
        flatten("4"),
        image="5",
    )["picture"]
    assert np.array_equal(ours, theirs)
    plain = outputs(comfy, flatten("1", 2), image="2")["picture"]
    assert np.abs(ours.astype(int) - plain).mean() > 3


def test_without_edits_nothing_changes(comfy):
    plain = outputs(comfy, flatten("1", 2), image="2")["picture"]
    assert np.array_equal(outputs(comfy, edit(" "), flatten("2"), image="3")["picture"], plain)
    without = ("Strata_EditLayers", {"layers": ["1", 2]})
    assert np.array_equal(outputs(comfy, without, flatten("2"), image="3")["picture"], plain)


def test_the_editor_is_given_the_layers_as_they_come_in(comfy):
    found = outputs(comfy, edit({"layers": [{"layer": "dog", "x": 9, "name": "Hund"}]}))["2"]["strata_layers"][0]
    assert found["canvas"] == [160, 120]
    assert [layer["name"] for layer in found["layers"]] == ["background", "house", "dog"]
    dog = found["layers"][2]
    assert (dog["x"], dog["w"], dog["h"], dog["rotation"], dog["visible"]) == (0, 160, 120, 0, True)
    # The PNG in its place is the layer
    box = [round(part * side) for part, side in zip(dog["box"], (160, 120) * 2, strict=True)]
    batch = outputs(comfy, ("Strata_LayersToBatch", {"layers": ["1", 2], "at_canvas_size": True}), image="2")["save"]
    whole = pixels(comfy, batch["images"][2])
    shown = pixels(comfy, dog["image"]).astype(int) - whole[box[1] : box[3], box[0] : box[2]]
    assert np.abs(shown).max() <= 1  # Save Image rounds down
    left = whole[..., 3].copy()
    left[box[1] : box[3], box[0] : box[2]] = 0
    assert not left.any() and (box[2] - box[0]) * (box[3] - box[1]) < 160 * 120 / 2


def test_a_layer_that_is_not_there_is_told(comfy):
    text = {"layers": [{"layer": "cat", "x": 9}]}
    found = outputs(comfy, edit(text), flatten("2"), image="3")
    assert found["2"]["text"] == ["edits: there is no layer 'cat' here, so its edits are left out."]
    assert np.array_equal(found["picture"], outputs(comfy, flatten("1", 2), image="2")["picture"])


@pytest.mark.parametrize("text", ['{"layers": [{"layer": "dog", "x": "left"}]}', "x: 3", '{"order": ["dog", 3]}'])
def test_what_cannot_be_read_is_refused_in_one_sentence(comfy, text):
    with pytest.raises(run.RunError) as error:
        outputs(comfy, edit(text))
    assert "edits: " in str(error.value) and "\n" not in str(error.value) and "Traceback" not in str(error.value)


def test_edits_go_to_every_document_of_a_list(comfy):
    """Slice by depth gives one for each image."""
    cut = {"thresholds": "0.5", "points": "", "near_is": "black", "missing_depth": "auto", "soft_edge": 0.0}
    cut |= {"refine_edges": "off", "refine_width": 16, "fill_holes": "none"}
    names = comfy.object_info()["Strata_SliceByDepth"]["input"]["required"]
    assert names.keys() - {"image", "depth"} <= cut.keys()
    found = outputs(
        comfy,
        ("RepeatImageBatch", {"image": ["1", 0], "amount": 2}),
        ("RepeatImageBatch", {"image": ["1", 3], "amount": 2}),
        ("Strata_SliceByDepth", {"image": ["2", 0], "depth": ["3", 0], **cut}),
        edit({"layers": [{"layer": 2, "visible": False}]}, ("4", 0)),
        flatten("5"),
        image="6",
    )
    assert len(found["5"]["strata_layers"]) == 2 and len(found["save"]["images"]) == 2
    first, second = (pixels(comfy, file) for file in found["save"]["images"])
    assert np.array_equal(first, second) and (first[..., 3] == 0).any()
