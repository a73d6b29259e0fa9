"""Run a ComfyUI's main.py: `python cpu_host.py COMFYUI_ROOT [its arguments]`.

A CPU-only torch has no torchvision build with native operators to match, and importing torchvision then fails on
`torchvision::nms`. ComfyUI uses only its Python parts, so declaring the two operators is enough.
"""
import contextlib
import runpy
import sys

import torch

with contextlib.suppress(ModuleNotFoundError):
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

root = sys.argv.pop(1)
sys.argv[0] = f"{root}/main.py"
sys.path[0] = root
runpy.run_path(sys.argv[0], run_name="__main__")
