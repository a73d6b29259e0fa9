"""Which file tools/host.py starts ComfyUI by: only ComfyUI may import torch first on a graphics card, or its allocator cannot be chosen any more."""
import sys
from pathlib import Path

import host
import pytest


@pytest.mark.parametrize(("device", "python", "starts"), [
    ("as ComfyUI chooses", Path(sys.base_prefix) / "bin" / "python", "main.py"),  # a user's own Python
    ("cpu", Path(sys.base_prefix) / "bin" / "python", "cpu_host.py"),
    ("as ComfyUI chooses", host.cache_dir() / "python-0" / "bin" / "python", "cpu_host.py"),  # built by us, without CUDA
])
def test_started_by(device, python, starts, tmp_path, monkeypatch):
    monkeypatch.delenv("STRATA_DEVICE", raising=False)
    command = host.Server(host.Host(tmp_path, python, ours=True), tmp_path, device=device).command()
    assert Path(command[1]).name == starts
    assert ("--cpu" in command) == (device == "cpu")
