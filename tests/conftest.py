"""The pack as one importable module named `strata`, and a real ComfyUI for the tests that need one."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

PACK = Path(__file__).resolve().parent.parent
SHARED = PACK.parent / "shared"


def _register_pack() -> None:
    # A folder named nodes/ stands beside ours in ComfyUI, so the pack is never put on sys.path: its modules are
    # strata.*
    spec = importlib.util.spec_from_file_location(
        "strata", PACK / "__init__.py", submodule_search_locations=[str(PACK)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["strata"] = module
    spec.loader.exec_module(module)


if "PYTEST_XDIST_WORKER" in os.environ:  # the workers are as many as the processor's cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
_register_pack()
sys.path.insert(0, str(PACK / "tools"))

import host  # noqa: E402
import run  # noqa: E402


def _seed() -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)


@pytest.fixture(autouse=True, scope="module")
def _seeded_module():
    _seed()


@pytest.fixture(autouse=True)
def _seeded_test():
    """Every test draws the same numbers, whichever ran before it."""
    _seed()


def pytest_collection_modifyitems(items):
    """The trainers first: a file is one worker's, and theirs take longest."""
    items.sort(key=lambda item: "training" not in item.path.parts)


@pytest.fixture(scope="session")
def comfy(tmp_path_factory):
    """A running ComfyUI with the pack in it, for the whole test session: run.Client, its process in .server."""
    found = host.find_or_install()
    server = host.Server(found, tmp_path_factory.mktemp("comfyui"))
    host.copy_inputs(found, server.base)
    with server:
        client = run.Client(server.url)
        client.server = server
        yield client


@pytest.fixture(scope="session")
def shared():
    """The project's shared inputs, which are not part of the repository."""
    if not (SHARED / "data").exists():
        pytest.skip(f"no shared inputs at {SHARED}")
    return SHARED
