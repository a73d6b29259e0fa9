"""Layers as other nodes and files may bring them, through every node that takes some: a sentence, or layers and images
without NaN.
"""

import re

import comfy.sd
import pytest
import torch
from bad_values import SIDE, Good, sound
from mini_models import CHECKPOINT, MODELS
from strata import nodes
from strata.nodes import layers_io
from strata.patches import back_to_front, decomposer, layer_files, mini_family, rgba_vae
from strata.techniques.layers import read_layers

pytestmark = pytest.mark.skipif(not CHECKPOINT.exists(), reason="no trained weights: make mini")


def takes_layers(node) -> bool:
    return any(str(one.get_io_type()) == "LAYERS" for one in node.define_schema().inputs)


NODES = {node.define_schema().node_id: node for module in nodes.MODULES for node in module.NODES if takes_layers(node)}


@pytest.fixture(scope="module")
def good():
    found = Good()
    mini_family.register(decomposer.UNETS)
    fill = comfy.sd.load_diffusion_model(str(MODELS / "diffusion_models" / "strata_mini_flux_fill.safetensors"))
    file = layer_files.load(layer_files.BACK_TO_FRONT, layer_files.BackToFront)
    plain = {"sharing": None, "decoder": None, "room": 0.2, "rgba_vae": rgba_vae.load(rgba_vae.SHIPPED)}
    found.own |= {
        "Strata_SaveLayers": {"filename_prefix": "hostile", "format": "PSD"},
        "Strata_CompleteLayers": {"decomposer": None, "select": "1"},
        "Strata_RedrawLayer": {"model": back_to_front.apply(fill, file), **plain},
    }
    return found


@pytest.fixture(scope="module")
def documents(good):
    """By what is wrong with them, of the size of the other values."""
    ground, thing = good.values["LAYERS"]["layers"]
    colour, alpha = thing["image"][..., :3], thing["image"][..., 3:]
    nothing = {**thing, "image": torch.cat([colour, 0 * alpha], -1)}
    odd = [
        {**ground, "image": colour[:, :50], "x": -5, "y": 3},
        {**thing, "image": thing["image"][:, :5, :7], "w": 90, "h": 33, "rotation": 0.4, "x": -20},
        {**thing, "name": "outside", "x": 500},
    ]
    stacks = {
        "NaN": [ground, {**thing, "image": thing["image"] * torch.nan}],
        "one layer": [ground],
        "one layer with holes": [thing],
        "fifty layers": [ground, *({**thing, "name": f"thing {x}", "x": x} for x in range(49))],
        "RGB alone": [ground, {**thing, "image": colour}, {**thing, "image": colour, "name": "another"}],
        "inverted mask": [ground, {**thing, "image": colour, "mask": alpha[..., 0]}],
        "a mask of another size": [ground, {**thing, "mask": torch.zeros(1, 9, 9)}],
        "all blank": [{**nothing, "name": "ground"}, nothing],
        "all hidden": [{**ground, "visible": False}, {**thing, "visible": False}],
        "other sizes": odd,
        "of one name": [ground, {**thing, "name": "ground"}, thing],
        "values beyond 0 to 1": [{**ground, "image": 3 * colour - 1}, {**thing, "image": 3 * thing["image"] - 1}],
    }
    found = {what: {"version": 1, "canvas": (SIDE, SIDE), "layers": layers} for what, layers in stacks.items()}
    return found | {"a single pixel": {**good.values["LAYERS"], "canvas": (1, 1)}}


@torch.inference_mode()
@pytest.mark.parametrize("name", NODES)
def test_hostile_layers_give_a_sentence_or_a_sound_result(good, documents, name, monkeypatch):
    monkeypatch.setattr(layers_io.args, "disable_metadata", True)  # which ComfyUI gives to a node in a prompt
    node, faults, taken = NODES[name], [], 0
    sockets = [one.id for one in node.define_schema().inputs if str(one.get_io_type()) == "LAYERS"]
    values = good.of(node)
    values |= {"sampler_name": "euler"} if "sampler_name" in values else {}
    for what, document in documents.items():
        try:
            found = node.execute(**values | dict.fromkeys(sockets, document)).args
        except ValueError as error:
            if not re.fullmatch(r"[\w, ]+: [^\n]+[.)]", str(error)):
                faults.append(f"{what}: {error}")
        except Exception as error:  # noqa: BLE001  whatever it is, it is what is looked for
            faults.append(f"{what}: {type(error).__name__}: {str(error)[:200]}")
        else:
            taken += 1
            if not sound(found):
                faults.append(f"{what}: NaN comes out")
            for one in found:
                if isinstance(one, dict) and "layers" in one:
                    read_layers(one)
    assert not faults, "\n".join(faults)
    assert taken > 3, "most of these are layers that can be worked with"
