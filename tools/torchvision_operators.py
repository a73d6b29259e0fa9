"""Makes torchvision importable beside a torch without CUDA; host.py puts this file into the Python that it builds.

No build of torchvision has native operators for that torch, and its import then fails on `torchvision::nms`. ComfyUI
and transformers use only its Python parts, so it is enough to declare the two operators that it asks for.
"""

import sys


class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(Finder)
            import torch

            for operator in ("nms", "qnms"):
                torch.library.define(
                    f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )


sys.meta_path.insert(0, Finder)
