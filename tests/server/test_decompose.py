"""An image taken apart on the server, by the shipped decomposer and through the nodes as a graph has them; and what is
wrong with a graph in one sentence on the node.
"""

import io
from pathlib import Path

import numpy as np
import pytest
import run
from PIL import Image
from strata.scenes import renderer

FILE = "strata_mini_layeringdiff.safetensors"
PACK = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (PACK / "models" / "layer_model" / FILE).exists(), reason="not trained: make mini")


FLAT = {"blending": "sRGB", "background": "transparent"}


def graph(**changes) -> dict:
    """A scene's object taken out of it. changes: inputs of Decompose image."""
    return {
        "scene": {
            "class_type": "Strata_RenderScene",
            "inputs": {"kind": "beach", "objects": "teddy bear", "count": 1, "width": 128, "height": 128, "seed": 6},
        },
        "masks": {"class_type": "MaskToImage", "inputs": {"mask": ["scene", 4]}},
        "first": {"class_type": "ImageFromBatch", "inputs": {"image": ["masks", 0], "batch_index": 1, "length": 1}},
        "mask": {"class_type": "ImageToMask", "inputs": {"image": ["first", 0], "channel": "red"}},
        "checkpoint": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "strata_mini_sd.safetensors"}},
        "model": {
            "class_type": "UNETLoader",
            "inputs": {"unet_name": "strata_mini_inpaint.safetensors", "weight_dtype": "default"},
        },
        "file": {"class_type": "Strata_LoadDecomposer", "inputs": {"file": FILE}},
        "apart": {
            "class_type": "Strata_DecomposeImage",
            "inputs": {
                "image": ["scene", 0],
                "mask": ["mask", 0],
                "vae": ["checkpoint", 2],
                "decomposer": ["file", 0],
                "model": ["model", 0],
                "align_details": True,
                "exact": True,
                "start": "noise",
                "seed": 1,
                "steps": 4,
                "sampler_name": "ddim",
                "scheduler": "ddim_uniform",
                **changes,
            },
        },
        "layers": {"class_type": "Strata_FlattenLayers", "inputs": {"layers": ["apart", 0], **FLAT}},
        "flat": {"class_type": "SaveImage", "inputs": {"images": ["layers", 0], "filename_prefix": "flat"}},
        "front": {"class_type": "SaveImage", "inputs": {"images": ["apart", 1], "filename_prefix": "front"}},
        "behind": {"class_type": "SaveImage", "inputs": {"images": ["apart", 2], "filename_prefix": "behind"}},
    }


def images(comfy, prompt) -> dict[str, np.ndarray]:
    entry = comfy.run(prompt)
    return {
        Path(file["filename"]).name.split("_")[0]: np.asarray(Image.open(io.BytesIO(comfy.download(file)))) / 255
        for file in comfy.files(entry)
    }


def test_the_layers_add_up_to_the_image_and_the_object_is_gone(comfy):
    made = images(comfy, graph())
    scene = renderer.render(renderer.Request("beach", ("teddy bear",), 1), 128, 128, 6)
    assert np.abs(made["flat"][..., :3] - scene.composite).max() < 1.6 / 255
    alpha = scene.masks[1]
    assert made["front"].shape[-1] == 4 and np.abs(made["front"][..., 3] - alpha).max() < 1 / 255 + 1e-6
    whole = alpha > 0.98
    assert np.abs(made["front"][..., :3] - scene.composite)[whole].max() < 1.6 / 255
    assert np.abs(made["behind"] - scene.composite)[alpha == 0].max() < 1.6 / 255
    gone = np.abs(made["behind"] - scene.composite)[whole].mean()
    assert gone > 0.05


def test_the_same_run_again_is_the_same(comfy):
    first, again = (images(comfy, graph(steps=2, seed=seed, start="image")) for seed in (5, 5))
    assert np.array_equal(first["behind"], again["behind"])
    assert not np.array_equal(first["behind"], images(comfy, graph(steps=2, seed=6, start="image"))["behind"])


def test_what_is_wrong_is_one_sentence_on_the_node(comfy):
    without = graph()
    del without["apart"]["inputs"]["model"]
    with pytest.raises(run.RunError, match="model: nothing is connected and strata_mini_layeringdiff.saf"):
        comfy.run(without)
    with pytest.raises(run.RunError, match="model: .* is a decomposer for Strata mini .*, and this is another model"):
        comfy.run(graph(model=["checkpoint", 0]))
    other = graph()
    other["file"]["inputs"]["file"] = "strata_mini_dreamlayer.safetensors"
    with pytest.raises(
        run.RunError, match="file: strata_mini_dreamlayer.safetensors is .*, and this node takes Layering"
    ):
        comfy.run(other)
    gone = graph()
    gone["file"]["inputs"]["background_file"] = "nothing.safetensors"
    with pytest.raises(run.RunError, match="background_file: nothing.safetensors is not there; put it into"):
        comfy.run(gone)
    small = graph()
    small["half"] = {
        "class_type": "ImageScaleBy",
        "inputs": {"image": ["scene", 0], "upscale_method": "area", "scale_by": 0.5},
    }
    small["apart"]["inputs"]["image"] = ["half", 0]
    with pytest.raises(run.RunError, match="mask: it has 128×128 pixels and the image 64×64; connect a mask of the im"):
        comfy.run(small)
    several = graph()
    several["two"] = {"class_type": "RepeatImageBatch", "inputs": {"image": ["scene", 0], "amount": 2}}
    several["six"] = {"class_type": "RepeatImageBatch", "inputs": {"image": ["masks", 0], "amount": 3}}
    several["mask"]["inputs"]["image"], several["apart"]["inputs"]["image"] = ["six", 0], ["two", 0]
    with pytest.raises(run.RunError, match="mask: there are 6 masks and 2 images; connect one mask, or one for each"):
        comfy.run(several)


def solid(value: float, **changes) -> dict:
    """With a mask that is the same everywhere."""
    mask = {"class_type": "SolidMask", "inputs": {"value": value, "width": 128, "height": 128}}
    return {**graph(steps=2, **changes), "mask": mask}


def test_an_empty_mask_leaves_the_image(comfy):
    made = images(comfy, solid(0.0))
    scene = renderer.render(renderer.Request("beach", ("teddy bear",), 1), 128, 128, 6)
    assert np.abs(made["behind"] - scene.composite).max() < 1.6 / 255 and made["front"][..., 3].max() == 0


@pytest.mark.parametrize("value, note", [(0.0, "Mask 1 is empty"), (1.0, "Mask 1 covers the whole image")])
def test_a_mask_of_nothing_or_all_is_told(comfy, value, note):
    assert comfy.run(solid(value, seed=9))["outputs"]["apart"]["text"][0].startswith(note)
    assert "text" not in comfy.run(graph(steps=2, seed=9))["outputs"].get("apart", {})
