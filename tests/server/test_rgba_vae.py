"""The shipped RGBA autoencoder in a graph of stock nodes: an object goes in with its alpha and comes out as a PNG with
it, and a missing file is one sentence on the node.
"""

import io

import numpy as np
import pytest
import run
from PIL import Image
from strata.scenes import renderer


def graph(file="strata_mini_rgba.safetensors"):
    return {
        "scene": {
            "class_type": "Strata_RenderScene",
            "inputs": {"kind": "meadow", "objects": "car", "count": 1, "width": 128, "height": 128, "seed": 4},
        },
        # The first of the scene's masks is the background's: 1 where nothing of the object is.
        "masks": {"class_type": "MaskToImage", "inputs": {"mask": ["scene", 4]}},
        "first": {"class_type": "ImageFromBatch", "inputs": {"image": ["masks", 0], "batch_index": 0, "length": 1}},
        "mask": {"class_type": "ImageToMask", "inputs": {"image": ["first", 0], "channel": "red"}},
        "vae": {"class_type": "Strata_LoadRGBAVAE", "inputs": {"file": file}},
        "latent": {
            "class_type": "Strata_EncodeTransparency",
            "inputs": {"image": ["scene", 0], "mask": ["mask", 0], "vae": ["vae", 0]},
        },
        "image": {"class_type": "VAEDecode", "inputs": {"samples": ["latent", 0], "vae": ["vae", 0]}},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["image", 0], "filename_prefix": "rgba"}},
    }


def test_an_object_keeps_its_alpha_through_stock_nodes(comfy):
    entry = comfy.run(graph())
    image = Image.open(io.BytesIO(comfy.download(comfy.files(entry)[-1])))
    assert image.mode == "RGBA" and image.size == (128, 128)
    alpha = np.asarray(image)[..., 3] / 255
    truth = renderer.render(renderer.Request("meadow", ("car",), 1), 128, 128, 4).masks[1]
    # The file is still learning; opaque everywhere would be 0.1.
    assert np.minimum(alpha, truth).sum() / np.maximum(alpha, truth).sum() > 0.8


def test_a_missing_file_is_named_on_the_node(comfy):
    with pytest.raises(run.RunError, match="file - nothing.safetensors is not there; put it into"):
        comfy.run(graph("nothing.safetensors"))
