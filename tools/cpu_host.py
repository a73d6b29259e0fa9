"""Run a ComfyUI's main.py: `python cpu_host.py COMFYUI_ROOT [its arguments]`."""
import contextlib
import runpy
import sys

import torch


def declare_operators() -> None:
    """Make torchvision importable on a CPU-only torch.

    There is no build of torchvision with native operators to match it, and the import then fails on `torchvision::nms`. ComfyUI
    and transformers use only its Python parts, so declaring the two operators is enough.
    """
    with contextlib.suppress(ModuleNotFoundError):
        try:
            import torchvision  # noqa: F401
        except RuntimeError:
            for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[name]
            for name in ("nms", "qnms"):
                torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


if __name__ == "__main__":
    declare_operators()
    root = sys.argv.pop(1)
    sys.argv[0] = f"{root}/main.py"
    sys.path[0] = root
    runpy.run_path(sys.argv[0], run_name="__main__")
