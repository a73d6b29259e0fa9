"""Run a ComfyUI's main.py: `python cpu_host.py COMFYUI_ROOT [its arguments]`.

A CPU-only torch has no torchvision and torchaudio builds with native operators to match: importing torchvision then fails on
`torchvision::nms`, and torchaudio on its library. ComfyUI needs only their Python parts to start, so the two operators are
declared and the library is marked as absent.
"""
import contextlib
import runpy
import sys

import torch


def forget(package: str) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        del sys.modules[name]


with contextlib.suppress(ModuleNotFoundError):
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        forget("torchvision")
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

with contextlib.suppress(ModuleNotFoundError):
    try:
        import torchaudio  # noqa: F401
    except OSError:
        forget("torchaudio")
        sys.modules["torchaudio.lib._torchaudio"] = None

root = sys.argv.pop(1)
sys.argv[0] = f"{root}/main.py"
sys.path[0] = root
runpy.run_path(sys.argv[0], run_name="__main__")
