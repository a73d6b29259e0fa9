"""Flattening 8 layers of 3840×2160 against plain NumPy and Pillow loops over whole pictures."""

from __future__ import annotations

import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from turns import compared

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import conftest  # noqa: E402, F401  makes the pack importable as strata
from strata.techniques.compositing import flatten_image  # noqa: E402
from strata.techniques.layers import Layer, LayerStack  # noqa: E402


def plain_flatten(pictures: list[np.ndarray], linear: bool = False) -> np.ndarray:
    colour, alpha = np.zeros((*pictures[0].shape[:2], 3), np.float32), np.zeros((*pictures[0].shape[:2], 1), np.float32)
    for picture in pictures:
        source, over = picture[..., :3], picture[..., 3:]
        if linear:
            source = np.where(source <= 0.04045, source / 12.92, ((source + 0.055) / 1.055) ** 2.4)
        colour = source * over + colour * (1 - over)
        alpha = over + alpha * (1 - over)
    colour = colour / np.maximum(alpha, 1e-6)
    if linear:
        colour = np.where(colour <= 0.0031308, colour * 12.92, 1.055 * np.maximum(colour, 1e-6) ** (1 / 2.4) - 0.055)
    return np.concatenate([colour, alpha], axis=-1)


def plain_turned(pictures: list[np.ndarray], degrees: float) -> Image.Image:
    result = Image.new("RGBA", (pictures[0].shape[1], pictures[0].shape[0]))
    for picture in pictures:
        premultiplied = Image.fromarray((picture * 255).astype(np.uint8)).convert("RGBa")
        result.alpha_composite(premultiplied.rotate(-degrees, Image.Resampling.BICUBIC).convert("RGBA"))
    return result


def rows():
    """As tools/turns.py gives them."""
    pictures = torch.rand((8, 2160, 3840, 4), generator=torch.Generator().manual_seed(1))
    arrays = [picture.numpy() for picture in pictures]
    for name, fields, linear, plain in (
        ("8 layers of 4K, NumPy", {}, False, lambda: plain_flatten(arrays)),
        ("8 layers of 4K in linear light, NumPy", {}, True, lambda: plain_flatten(arrays, True)),
        (
            "8 layers of 4K turned by 10°, Pillow in 8 bits",
            {"rotation": math.radians(10)},
            False,
            lambda: plain_turned(arrays, 10),
        ),
    ):
        stack = LayerStack((3840, 2160), tuple(Layer(picture, **fields) for picture in pictures))
        yield from compared(name, partial(flatten_image, stack, (0, 0, 0, 0), linear), plain)


if __name__ == "__main__":
    for row in rows():
        print(*row)
