"""Rendered pictures for the trainers, drawn by number, so that step N sees the same batch in every run."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import scenes

RENDERER = 1  # raise when the renderer's pictures change: kept pictures of another number are not used


class ScenePool:
    """Scene i of a side, rendered when first asked for and kept on disk as bytes. 49 KB each at 128 pixels."""

    def __init__(self, folder: Path, count: int, side: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.count, self.side = count, side
        name = f"scenes-{RENDERER}-{side}-{count}"
        self.pixels = self._open(folder / f"{name}.pixels", (count, side, side, 3))
        self.ready = self._open(folder / f"{name}.ready", (count,))

    @staticmethod
    def _open(path: Path, shape):
        return np.memmap(path, np.uint8, "r+" if path.exists() else "w+", shape=shape)

    def __getitem__(self, index: int) -> np.ndarray:
        """[side,side,3] bytes of a training scene."""
        if not self.ready[index]:
            scene = scenes.render(scenes.Request(train=True), self.side, self.side, int(index))
            self.pixels[index] = np.round(scene.composite * 255)
            self.ready[index] = 1
        return self.pixels[index]

    def batch(self, size: int, crop: int, seed: int, step: int, rank: int = 0) -> Tensor:
        """[size,3,crop,crop] in 0..1, cut and mirrored at random; a function of these numbers alone."""
        rng = np.random.default_rng((seed, step, rank))
        corners = rng.integers(0, self.side - crop + 1, (size, 2))
        picked = np.stack([self[i][y:y + crop, x:x + crop] for i, (y, x) in zip(rng.integers(0, self.count, size), corners, strict=True)])
        flip = rng.random(size) < 0.5
        picked[flip] = picked[flip][:, :, ::-1]
        return torch.from_numpy(picked).permute(0, 3, 1, 2).float() / 255


def held_out(count: int, side: int, first: int = 10**9) -> Tensor:
    """[count,3,side,side]: scenes of object-and-place pairs that training never sees."""
    pictures = [scenes.render(scenes.Request(held_out=True), side, side, first + i).composite for i in range(count)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
