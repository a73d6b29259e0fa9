"""ComfyUI in the test's own process, on the CPU unless STRATA_TEST_DEVICE says cuda (tools/gpu.py): tests below may
import comfy, folder_paths and the pack's patches.
"""

import os
import shutil
import sys
import tempfile

import host
import numpy as np
import pytest
from PIL import Image

HOST = host.find_or_install()
sys.dont_write_bytecode |= not HOST.ours  # nothing is written into a user's ComfyUI
sys.path.insert(0, str(HOST.root))

from comfy.cli_args import args  # noqa: E402

args.cpu = os.environ.get("STRATA_TEST_DEVICE") != "cuda"
BASE = tempfile.TemporaryDirectory(prefix="strata-tests-")
args.base_directory = BASE.name

from . import fusion_reference, random_family  # noqa: E402
from .server_helpers import SIDE  # noqa: E402


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """Random checkpoints in the form of the shipped ones: {"sd": path, "inpaint": path}."""
    folder = tmp_path_factory.mktemp("family")
    return {
        name: random_family.write(folder / f"random_{name}.safetensors", channels)
        for name, channels in (("sd", 4), ("inpaint", 9))
    }


@pytest.fixture(scope="module")
def server(comfy, family):
    """A running ComfyUI with the random checkpoints; some files have one with more in it."""
    folder = comfy.server.base / "models" / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in family.items():
        shutil.copy(path, folder / f"random_{name}.safetensors")
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[16:40, 24:56] = 255
    Image.fromarray(mask).save(comfy.server.base / "input" / "fusion_mask.png")
    return comfy


@pytest.fixture(scope="module")
def models():
    """Random models of every structure by its name, each made once for a file of tests."""
    made = {}
    return lambda kind: made.setdefault(kind, fusion_reference.patcher(kind))
