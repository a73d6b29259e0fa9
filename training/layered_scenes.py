"""Scenes as BFS learns them: a background, one object in front of it with its shadow, and both together, as latents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ..networks.autoencoder import Autoencoder
from ..scenes import renderer
from ..techniques import layering
from ..techniques.smoothing import gaussian_blur
from ..techniques.transparency import extend_colours
from . import data, latents
from .flux_fill import object_box
from .rgba_autoencoder import opaque

TRUE, POOR = range(2)  # the object's shadow as the light casts it, or a poorer one
FAINTER, BLUR = 0.6, 3.0  # of the poorer shadow: share of the darkness, and pixels


@dataclass(frozen=True)
class Batch:
    """composite, background, foreground, cut: latents [B,4,h,w]; cut is the composite inside of the box, opaque, and
    nothing outside. cells: [B,64,h,w] of the box. prompts: of the object.
    """

    composite: Tensor
    background: Tensor
    foreground: Tensor
    cut: Tensor
    cells: Tensor
    prompts: list[str]


@dataclass(frozen=True)
class Layers:
    """background, composite: [S,S,3]; foreground: [S,S,4], straight; box: left, top, right, bottom of all of it."""

    background: np.ndarray
    composite: np.ndarray
    foreground: np.ndarray
    box: tuple[int, int, int, int]
    name: str


class LayeredScenes(data.ScenePool):
    """Scene i, encoded when first asked for and kept on disk; other encoders start anew."""

    PARTS = 1 + 3 * 2  # the background, then composite, foreground and cut with either shadow

    def __init__(self, folder: Path, autoencoder: Autoencoder, rgba: Autoencoder, count: int, side: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.autoencoder, self.rgba, self.count, self.side = autoencoder, rgba, count, side
        size = side // latents.FACTOR
        both = latents.digest(autoencoder.taesd_encoder) + latents.digest(rgba.taesd_encoder)
        path = folder / f"layered-bright-{data.RENDERER}-{side}-{count}-{both}"
        self.values = self._open(path, (count, self.PARTS, 4, size, size), np.float16)
        self.boxes = self._open(path.with_name(path.name + "-boxes"), (count, 5), np.int16)

    def request(self, index: int) -> renderer.Request:
        return renderer.Request(train=True, count=1 + index % 3, bright_side=True)

    def layers(self, index: int, shadow: int) -> Layers:
        scene = renderer.render(self.request(index), self.side, self.side, index)
        front, behind = scene.objects[-1], scene.behind_nearest
        cast = front.shadow if shadow == TRUE else poorer(front.shadow)
        box = object_box(front, np.random.default_rng((index, 5)), shadowed=1.0)
        composite = renderer.over(front.rgba, renderer.over(cast, behind))
        return Layers(behind, composite, renderer.stack(front.rgba, cast), box, front.name)

    def batch(self, indices: np.ndarray, draw: int, shadow: int = TRUE) -> Batch:
        """The scenes of these numbers; `draw` chooses among the prompts that fit."""
        missing = [int(i) for i in np.unique(indices) if not self.boxes[i].any()]
        for start in range(0, len(missing), latents.AT_ONCE):
            self._encode(missing[start : start + latents.AT_ONCE])
        values = torch.from_numpy(self.values[indices]).float()
        mask = torch.zeros(len(indices), 1, self.side, self.side)
        for row, i in zip(mask, indices, strict=True):
            left, top, right, bottom = self.boxes[i][:4]
            row[:, top:bottom, left:right] = 1
        composite, foreground, cut = values[:, 1 + 3 * shadow : 4 + 3 * shadow].unbind(1)
        names, rng = list(renderer.catalogue().values()), np.random.default_rng((draw, 6))
        prompts = [str(rng.choice(names[self.boxes[i][4]].prompts)) for i in indices]
        return Batch(composite, values[:, 0], foreground, cut, layering.alpha_cells(mask), prompts)

    @torch.no_grad()
    def _encode(self, indices: list[int]) -> None:
        found = [[self.layers(index, shadow) for shadow in (TRUE, POOR)] for index in indices]
        parts = [self._opaque([pair[0].background for pair in found])]
        for shadow in (TRUE, POOR):
            own = [pair[shadow] for pair in found]
            rgba = _tensor([one.foreground for one in own])
            rgba = torch.cat([extend_colours(rgba[:, :3], rgba[:, 3:]), rgba[:, 3:]], 1)
            boxed = opaque(_tensor([one.composite for one in own]))
            for image, one in zip(boxed, own, strict=True):
                left, top, right, bottom = one.box
                inside = torch.zeros_like(image[3])
                inside[top:bottom, left:right] = 1
                image[3] = inside
            boxed = torch.cat([extend_colours(boxed[:, :3], boxed[:, 3:]), boxed[:, 3:]], 1)
            parts += [self._opaque([one.composite for one in own]), self.rgba.encode(rgba), self.rgba.encode(boxed)]
        names = list(renderer.catalogue())
        self.values[indices] = torch.stack(parts, 1).cpu().numpy()
        self.boxes[indices] = [[*pair[0].box, names.index(pair[0].name)] for pair in found]

    def _opaque(self, images: list[np.ndarray]) -> Tensor:
        return self.autoencoder.encode(_tensor(images))


def poorer(shadow: np.ndarray) -> np.ndarray:
    """[H,W,4]: fainter and blurred."""
    alpha = gaussian_blur(torch.from_numpy(shadow[..., 3].copy())[None, None], BLUR, 3 * BLUR)[0, 0].numpy()
    return np.concatenate([shadow[..., :3], FAINTER * alpha[..., None]], -1)


def _tensor(images: list[np.ndarray]) -> Tensor:
    images = rearrange(torch.from_numpy(np.stack(images)), "b h w c -> b c h w").float()
    return images.contiguous(memory_format=torch.channels_last)  # convolutions of few channels are faster with it
