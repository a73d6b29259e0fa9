"""Small bases of the families that trainers take, and what goes with them."""

import json

import pytest
import torch
from safetensors.torch import save_file
from strata.networks.transparency import OffsetEncoder
from strata.training import base as bases
from strata.training import text_base

from . import random_bases


@pytest.fixture(scope="module")
def small_bases(tmp_path_factory):
    entries = {family: random_bases.entry_of(family, changes) for family, changes in random_bases.SMALL.items()}
    path = tmp_path_factory.mktemp("config") / "bases.json"
    path.write_text(json.dumps(entries))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_base, "CONFIG", path)
        patch.setitem(bases.AUTOENCODER, "block_out_channels", (32, 32, 64, 64))
        yield


@pytest.fixture(scope="module")
def base_files(tmp_path_factory, small_bases):
    """A checkpoint of each family, LayerDiffuse's encoder, and a folder of images."""
    root = tmp_path_factory.mktemp("bases")
    found = {family: root / f"{family}.safetensors" for family in random_bases.SMALL}
    for family, path in found.items():
        random_bases.write(path, random_bases.entry_of(family))
    found["encoder"] = root / "encoder.safetensors"
    torch.manual_seed(1)
    encoder = OffsetEncoder()
    torch.nn.init.normal_(encoder.blocks[-1].weight, std=1e-3)
    save_file({key: value.half() for key, value in encoder.state_dict().items()}, found["encoder"])
    found["images"] = random_bases.draw(root / "images")
    return found
