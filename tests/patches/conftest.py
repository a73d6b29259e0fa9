"""ComfyUI in the test's own process, on the CPU: tests below may import comfy, folder_paths and the pack's patches."""

import sys
import tempfile

import host
import pytest

sys.pycache_prefix = str(host.cache_dir() / "pycache")  # nothing is written into the host
sys.path.insert(0, str(host.find_or_install().root))

from comfy.cli_args import args  # noqa: E402

args.cpu = True
BASE = tempfile.TemporaryDirectory(prefix="strata-tests-")
args.base_directory = BASE.name

from . import random_family  # noqa: E402


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """Random checkpoints in the form of the shipped ones: {"sd": path, "inpaint": path}."""
    folder = tmp_path_factory.mktemp("family")
    return {
        name: random_family.write(folder / f"random_{name}.safetensors", channels)
        for name, channels in (("sd", 4), ("inpaint", 9))
    }
