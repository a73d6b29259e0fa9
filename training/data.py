"""Rendered pictures for the trainers, drawn by number, so that step N sees the same batch in every run."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ..scenes import renderer

FIRST = 256  # scenes that the first step of a run draws from, where their number grows
RENDERER = 1  # raise when the renderer's pictures change: kept pictures of another number are not used


class Draw(NamedTuple):
    """Which scenes a batch holds, [size]; the top left corners of the cuts, [size,2] as y, x; which of them are
    mirrored, [size].
    """

    scenes: np.ndarray
    corners: np.ndarray
    flip: np.ndarray


class Labels(NamedTuple):
    """Places as indices into renderer.KINDS, [count]; objects as indices into the catalogue, [count, most objects],
    filled up with -1.
    """

    places: np.ndarray
    objects: np.ndarray


def known_at(step: int, count: int, per_step: float) -> int:
    """How many scenes of a pool a step draws from: more and more, since encoding all of them first would take as long
    as a thousand steps.
    """
    return min(count, FIRST + int(per_step * step))


class ScenePool:
    """Scene i of a side, rendered when first asked for and kept on disk as bytes. 49 KB each at 128 pixels."""

    name = "scenes"
    channels = 3

    def __init__(self, folder: Path, count: int, side: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.count, self.side = count, side
        name = f"{self.name}-{RENDERER}-{side}-{count}"
        self.pixels = self._open(folder / f"{name}.pixels", (count, side, side, self.channels))
        self.ready = self._open(folder / f"{name}.ready", (count,))

    @staticmethod
    def _open(path: Path, shape: tuple[int, ...], dtype=np.uint8) -> np.memmap:
        return np.memmap(path, dtype, "r+" if path.exists() else "w+", shape=shape)

    def request(self, index: int) -> renderer.Request:
        return renderer.Request(train=True)

    def render(self, index: int) -> np.ndarray:
        """[side,side,channels] float32 in 0..1."""
        return renderer.render(self.request(index), self.side, self.side, index).composite

    def content(self, index: int) -> tuple[str, list[str]]:
        """The place and the objects of a scene, farthest first, without rendering it."""
        return renderer.choose(self.request(index), np.random.default_rng(index))

    @cached_property
    def labels(self) -> Labels:
        names = {name: i for i, name in enumerate(renderer.catalogue())}
        places, objects = np.zeros(self.count, np.int64), np.full((self.count, renderer.MOST_OBJECTS), -1)
        for index in range(self.count):
            kind, shown = self.content(index)
            places[index] = renderer.KINDS.index(kind)
            objects[index, : len(shown)] = [names[name] for name in shown]
        return Labels(places, objects)

    def prompt(self, index: int, draw: int = 0) -> str:
        """A sentence for the scene; another `draw` may choose other words for the same things."""
        return renderer.describe(*self.content(index), np.random.default_rng((index, draw)))

    def __getitem__(self, index: int) -> np.ndarray:
        """[side,side,channels] bytes."""
        if not self.ready[index]:
            self.pixels[index] = np.round(self.render(int(index)) * 255)
            self.ready[index] = 1
        return self.pixels[index]

    def draw(self, size: int, crop: int, seed: int, step: int, rank: int = 0) -> Draw:
        """What a batch is made of; a function of these numbers alone."""
        rng = np.random.default_rng((seed, step, rank))
        corners = rng.integers(0, self.side - crop + 1, (size, 2))
        return Draw(rng.integers(0, self.count, size), corners, rng.random(size) < 0.5)

    def batch(self, size: int, crop: int, seed: int, step: int, rank: int = 0) -> Tensor:
        """[size,channels,crop,crop] in 0..1, cut and mirrored at random; a function of these numbers alone."""
        draw = self.draw(size, crop, seed, step, rank)
        picked = np.stack(
            [self[i][y : y + crop, x : x + crop] for i, (y, x) in zip(draw.scenes, draw.corners, strict=True)]
        )
        picked[draw.flip] = picked[draw.flip][:, :, ::-1]
        return to_tensor(picked)


def to_tensor(pixels: np.ndarray) -> Tensor:
    """Bytes [N,H,W,C] as [N,C,H,W] in 0..1."""
    return rearrange(torch.from_numpy(pixels), "b h w c -> b c h w").float() / 255


def held_out(count: int, side: int, first: int = 10**9) -> Tensor:
    """[count,3,side,side]: scenes of object-and-place pairs that training never sees."""
    pictures = [renderer.render(renderer.Request(held_out=True), side, side, first + i).composite for i in range(count)]
    return rearrange(torch.from_numpy(np.stack(pictures)), "b h w c -> b c h w")
