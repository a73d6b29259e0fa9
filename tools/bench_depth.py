"""Slicing a 3840×2160 picture into 8 layers, against plain NumPy doing the same."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from turns import compared

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import conftest  # noqa: E402, F401  makes the pack importable as strata
from strata.techniques import depth as deglad  # noqa: E402

HEIGHT, WIDTH = 2160, 3840
THRESHOLDS = [k / 8 for k in range(1, 8)]


def scene(missing: bool) -> tuple[np.ndarray, np.ndarray]:
    """A noise picture and a depth of slopes and steps, in millimetres; one pixel in 50 not measured when asked."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    depth = 500 + 3000 * y / HEIGHT + 800 * ((x // 400 + y // 300) % 3)
    if missing:
        depth[rng.random(depth.shape) < 0.02] = 0
    return rng.random((HEIGHT, WIDTH, 3), np.float32), depth


def ours(image: np.ndarray, depth: np.ndarray, soft_edge: float) -> list[np.ndarray]:
    picture = torch.from_numpy(image)
    normal = deglad.normalise_depth(torch.from_numpy(depth)[None], False, True)
    weights = deglad.soften(deglad.slice_masks(normal, THRESHOLDS), soft_edge)
    stack = deglad.cut_layers(picture.expand(1, 8, -1, -1, -1), weights, THRESHOLDS, False)
    return [layer.image.numpy() for layer in stack.layers]


def plain(image: np.ndarray, depth: np.ndarray, soft_edge: float) -> list[np.ndarray]:
    """The same layers the straightforward way; missing depth by SciPy's nearest valid pixel."""
    from scipy import ndimage

    valid = depth != 0
    if not valid.all():
        nearest = ndimage.distance_transform_edt(~valid, return_distances=False, return_indices=True)
        depth = depth[tuple(nearest)]
    normal = (depth - depth.min()) / (depth.max() - depth.min())
    edges = [-np.inf, *THRESHOLDS, np.inf]
    masks = [
        ((normal >= near) & (normal < far)).astype(np.float32) for near, far in zip(edges[:-1], edges[1:], strict=True)
    ][::-1]
    if soft_edge:
        masks = [ndimage.gaussian_filter(mask, soft_edge / 2, mode="nearest", truncate=2) for mask in masks]
    layers, behind = [], np.zeros_like(normal)
    for mask in masks:
        behind = behind + mask
        alpha = np.where(behind > 1e-4, mask / np.maximum(behind, 1e-4), 0).astype(np.float32)
        layers.append(np.concatenate([image, alpha[..., None]], -1))
    return layers


def rows():
    cases = (
        ("hard edges", False, 0.0),
        ("hard edges, 2 % of the depth missing", True, 0.0),
        ("soft edges of 4 pixels", False, 4.0),
    )
    for name, missing, soft_edge in cases:
        image, depth = scene(missing)
        yield from compared(name, partial(ours, image, depth, soft_edge), partial(plain, image, depth, soft_edge))


if __name__ == "__main__":
    for row in rows():
        print(*row)
