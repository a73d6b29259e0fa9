"""Flattening 8 layers of 3840×2160 against a plain NumPy loop over whole pictures."""
from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import conftest  # noqa: E402, F401  makes the pack importable as strata
from strata.techniques.compositing import flatten_image  # noqa: E402
from strata.techniques.layers import Layer, LayerStack  # noqa: E402


def plain_flatten(pictures: list[np.ndarray]) -> np.ndarray:
    colour, alpha = np.zeros((*pictures[0].shape[:2], 3), np.float32), np.zeros((*pictures[0].shape[:2], 1), np.float32)
    for picture in pictures:
        over = picture[..., 3:]
        colour = picture[..., :3] * over + colour * (1 - over)
        alpha = over + alpha * (1 - over)
    return np.concatenate([colour / np.maximum(alpha, 1e-6), alpha], axis=-1)


def seconds(work, *values) -> float:
    def once():
        start = time.perf_counter()
        work(*values)
        return time.perf_counter() - start
    return min(once() for _ in range(3))


def rows():
    """(what, seconds of ours, seconds of the plain way, ratio)."""
    pictures = torch.rand((8, 2160, 3840, 4), generator=torch.Generator().manual_seed(1))
    plain = seconds(plain_flatten, [picture.numpy() for picture in pictures])
    for name, fields, linear in (("8 layers", {}, False), ("8 layers, opaque background", {}, False), ("8 layers, linear light", {}, True),
                                 ("8 layers, soft-light", {"blend_mode": "soft-light"}, False), ("8 layers, turned by 10°", {"rotation": 0.17}, False)):
        stack = LayerStack((3840, 2160), tuple(Layer(picture, **fields) for picture in pictures))
        ours = seconds(flatten_image, stack, (1, 1, 1, 1 if "opaque" in name else 0), linear)
        yield name, ours, plain, ours / plain


if __name__ == "__main__":
    for row in rows():
        print("{}: {:.2f} s, plain {:.2f} s, ratio {:.2f}".format(*row))
