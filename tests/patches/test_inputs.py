"""What every node does with what arrives: one check for each type of socket, one sentence for each fault, before any
work.
"""

import re
import subprocess
import sys

import comfy.model_management
import host
import pytest
import torch
from comfy_api.latest import io
from strata import nodes
from strata.nodes import inputs
from strata.nodes.sockets import Node
from strata.patches.inversion import Inversion

NODES = [node for module in nodes.MODULES for node in module.NODES]
NAN, INFINITE = float("nan"), float("inf")
PICTURE = torch.rand(1, 8, 8, 3, generator=torch.Generator().manual_seed(0))
LATENT = torch.zeros(1, 4, 8, 8)
WRONG = {  # values that no input of the type can take
    "INT": [NAN, INFINITE, 1.5, "7", None, [1], 10**400],
    "FLOAT": [NAN, -INFINITE, "0.5", None, [0.5], torch.tensor(1.0)],
    "BOOLEAN": ["true", None, [True]],
    "STRING": [7, None, ["a"]],
    "COMBO": [7, None, "no such choice", ["a"]],
    "IMAGE": [
        None,
        1,
        PICTURE[0],
        PICTURE[..., :2],
        PICTURE[:0],
        (PICTURE * 255).byte(),
        PICTURE * 255,
        PICTURE * NAN,
        {"samples": LATENT},
    ],
    "MASK": [
        None,
        1,
        PICTURE,
        torch.zeros(0, 8, 8),
        torch.full((1, 8, 8), 255, dtype=torch.uint8),
        torch.full((1, 8, 8), 2.0),
        torch.full((8, 8), NAN),
    ],
    "LATENT": [
        None,
        {},
        {"samples": None},
        {"samples": LATENT[0]},
        {"samples": LATENT[:0]},
        {"samples": LATENT * NAN},
        LATENT,
        {"samples": LATENT, "noise_mask": torch.full((1, 64, 64), NAN)},
        {"samples": LATENT, "batch_index": [0, 1]},
    ],
    "INVERSION": [
        None,
        LATENT,
        Inversion(LATENT[None] * NAN, torch.zeros(1), [], "ddim"),
        Inversion(LATENT[None], torch.zeros(3), [], "ddim"),
    ],
    "STRATA_PLANES": [None, [], 3],
    "CONDITIONING": [None, [], [[PICTURE]], [["text", {}]], [[torch.full((1, 7, 8), NAN), {}]], "a dog"],
    "MODEL": [None, 3, LATENT],
    "CLIP": [None, 3],
    "VAE": [None, 3],
    "STRATA_TRANSPARENCY": [None, 3],
    "STRATA_LAYER_MODULES": [None, 3],
    "STRATA_DECOMPOSER": [None, 3],
}


def declared() -> list:
    found = []
    for node in NODES:
        for one in node.define_schema().inputs:
            found.append(pytest.param(node, one, id=f"{node.define_schema().display_name}: {one.id}"))
    return found


def test_every_node_checks_what_arrives():
    assert all(issubclass(node, Node) and hasattr(node.execute.__func__, "__wrapped__") for node in NODES)
    known = {str(one.get_io_type()) for node in NODES for one in node.define_schema().inputs}
    assert known - WRONG.keys() == {"IMAGE,MASK", "LAYERS"}, "those check themselves: read_depth and read_layers"


@pytest.mark.parametrize(("node", "one"), declared())
def test_wrong_values_are_one_sentence_that_names_the_input(node, one):
    """Through execute itself: nothing else may be looked at first."""
    kind = str(one.get_io_type())
    for value in [*WRONG.get(kind, ()), *(limit for limit in (beyond(one) if kind in ("INT", "FLOAT") else ()))]:
        if value is None and one.optional:
            continue
        with pytest.raises(ValueError) as caught:
            inputs.check(one, value, files=False)
        assert re.fullmatch(rf"{one.id}: [^\n]+[.)]", str(caught.value)), str(caught.value)


def beyond(one):
    return [limit + sign * max(1, abs(limit)) for limit, sign in ((one.min, -1), (one.max, 1)) if limit is not None]


def test_the_first_wrong_input_stops_a_node_before_its_work():
    from strata.nodes.depth import SliceByDepth

    values = {
        "image": PICTURE,
        "depth": PICTURE,
        "thresholds": "0.5",
        "points": "",
        "near_is": "white",
        "missing_depth": "auto",
        "soft_edge": 1e9,
        "refine_edges": "off",
        "refine_width": 16,
        "fill_holes": "none",
    }
    with pytest.raises(ValueError, match="^soft_edge: 1e\\+09 is outside of 0 to 256; connect a number between them.$"):
        SliceByDepth.execute(**values)
    with pytest.raises(ValueError, match="^range_low: nan is no number"):
        SliceByDepth.execute(**{**values, "soft_edge": 0.0, "range_low": NAN})


def test_good_values_come_through():
    number = io.Int.Input("steps", min=1, max=9)
    assert inputs.check(number, 3.0) == 3 and isinstance(inputs.check(number, 3.0), int)
    assert (
        inputs.check(io.Boolean.Input("on"), 1) is True and inputs.check(io.Float.Input("a", min=0.0, max=1.0), 1) == 1
    )
    assert torch.equal(inputs.check(io.Image.Input("i"), PICTURE), PICTURE) and inputs.check(
        io.Mask.Input("m"), PICTURE[0, ..., 0]
    ).shape == (1, 8, 8)
    assert inputs.check(io.Mask.Input("m"), PICTURE[..., 0] > 0.5).dtype == torch.float32
    frames = PICTURE[:, None].expand(-1, 3, -1, -1, -1)  # as an autoencoder of video gives them
    assert torch.equal(inputs.check(io.Image.Input("i"), frames), PICTURE.expand(3, -1, -1, -1))
    latent = {"samples": LATENT, "batch_index": [4], "noise_mask": torch.ones(1, 64, 64)}
    assert inputs.check(io.Latent.Input("l"), latent) is latent


def test_pictures_masks_and_layers_lie_where_comfyui_keeps_pictures(monkeypatch):
    """With --gpu-only that is the card; here it stands for it that any other device does."""
    monkeypatch.setattr(comfy.model_management, "intermediate_device", lambda: torch.device("meta"))
    document = {"version": 1, "canvas": (8, 8), "layers": [{"image": PICTURE, "mask": PICTURE[..., 0], "name": "a"}]}
    found = inputs.check(io.Custom("LAYERS").Input("layers"), document)["layers"][0]
    arrived = [
        inputs.check(io.Image.Input("i"), PICTURE),
        inputs.check(io.Mask.Input("m"), PICTURE[..., 0]),
        found["image"],
        found["mask"],
    ]
    assert all(value.device.type == "meta" for value in arrived) and document["layers"][0]["image"].device.type == "cpu"


def test_bad_values_of_one_node_through_its_whole_execute():
    """The rest is `make test-full`: some 6,000 calls over all nodes."""
    tool = host.PACK / "tools" / "bad_values.py"
    done = subprocess.run([sys.executable, tool, "Set layer"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert int(done.stdout.split(" refused")[0].split()[-1]) > 200


@pytest.mark.parametrize(
    ("front", "back", "fills"),
    [
        ((1, 64), (64, 64), False),
        ((64, 1), (64, 64), False),
        ((64, 64), (1, 64), False),
        ((64, 64), (64, 1), False),
        ((9, 64), (64, 64), True),
        ((1, 1), (1, 1), True),
    ],
)
def test_backgrounds_of_another_shape_fill_the_frame_or_are_named(front, back, fills):
    from strata.nodes.depth import ComposeByDepth

    near, far = (torch.rand(1, *size, 3) for size in (front, back))
    if fills:
        assert ComposeByDepth.execute(near, near, far, far, 0.5, "white", "auto", 2.0).args[0].shape == near.shape
        return
    with pytest.raises(
        ValueError, match=r"^foreground, background: nothing is left of the background's \d+×\d+ pixels"
    ):
        ComposeByDepth.execute(near, near, far, far, 0.5, "white", "auto", 2.0)
