"""Layered files of a user's folder, PSD and OpenRaster, as scenes: the lowest layer is the background, those over it
are objects, and the layers' names are prompts.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from ..formats import files
from ..formats.raster import on_canvas
from ..networks.transparency import OffsetEncoder
from ..techniques.layering import composite
from ..techniques.layers import Layer
from ..techniques.shared_layers import resize_maps
from . import data, latents, layered_images, settings, text_base, transparent_images

UNNAMED = re.compile(r"(layer)?[\W\d_]*", re.IGNORECASE)
SEEN = 1 / 255  # least alpha that counts as something


@dataclass(frozen=True)
class Scene:
    """background: [3,S,S]; objects: [N,4,S,S], straight, back to front, in 0..1."""

    background: Tensor
    objects: Tensor

    def composites(self) -> Tensor:
        """[N,3,S,S]: with the first object, with the first two, and so on."""
        composites, behind = [], self.background
        for rgba in self.objects:
            behind = composite(rgba[:3], behind, rgba[3:])
            composites.append(behind)
        return torch.stack(composites)


def names_of(path: Path, most: int) -> list[str]:
    """The names of the background and of up to `most` objects. Raises TrainingError with one sentence."""
    return [" ".join(layer.name.split()) for layer in _shown(path, most)[1]]


def _shown(path: Path, most: int) -> tuple[tuple[int, int], list[Layer]]:
    """The canvas, and what is seen of the lowest layers. Raises TrainingError."""
    try:
        stack = files.load(path)
    except (ValueError, OSError) as error:
        raise settings.TrainingError(f"--scenes: {error}") from error
    shown = [layer for layer in stack.layers if layer.visible and layer.opacity > 0][: 1 + most]
    if len(shown) < 2:
        raise settings.TrainingError(
            f"--scenes: {path} needs two visible layers or more, a background and an object, and has {len(shown)}; add "
            "some or take the file away."
        )
    for number, layer in enumerate(shown, 1):
        if UNNAMED.fullmatch(layer.name):
            raise settings.TrainingError(
                f"--scenes: layer {number} from below of {path} is named {layer.name!r}; name it after what it shows, "
                "since names are the prompts."
            )
        if layer.blend_mode != "normal":
            raise settings.TrainingError(
                f"--scenes: layer {layer.name!r} of {path} is blended by {layer.blend_mode}; set it to normal, or "
                "merge it with what it lies on."
            )
    return stack.canvas, shown


def read(path: Path, most: int, side: int) -> Scene:
    """The largest square of the canvas, as near to the objects as can be, scaled. Raises TrainingError."""
    canvas, shown = _shown(path, most)
    pixels = [on_canvas(layer, canvas) for layer in shown]
    alphas = [layer[..., 3] * source.opacity for layer, source in zip(pixels, shown, strict=True)]
    if alphas[0].min() < 254:
        raise settings.TrainingError(
            f"--scenes: the lowest layer of {path}, {shown[0].name!r}, is transparent in places; it is the background "
            "and has to fill the canvas."
        )
    drawn = np.max(alphas[1:], 0) > 255 * SEEN
    cut = layered_images.square(canvas, layered_images.bounds(drawn) if drawn.any() else (0, 0, *canvas))
    scaled = []
    for layer, alpha in zip(pixels, alphas, strict=True):
        rgba = Image.fromarray(np.dstack([layer[..., :3], alpha.round().astype(np.uint8)]))
        scaled.append(np.asarray(rgba.resize((side,) * 2, Image.Resampling.BICUBIC, cut), np.float32) / 255)
    images = rearrange(torch.from_numpy(np.stack(scaled)), "layer h w c -> layer c h w")
    return Scene(images[0, :3], images[1:])


class LayeredFiles(data.ScenePool):
    """A file of N objects is N scenes: with the lowest object, with the lowest two, and so on. Encoded when first asked
    for and kept on disk; changed files and other encoders start anew.
    """

    def __init__(
        self, folder: Path, base: text_base.Base, encoder: OffsetEncoder | None, scenes: Path, side: int, most: int
    ):
        """Raises TrainingError."""
        self.base, self.encoder, self.side, self.most = base, encoder, side, most
        self.paths = sorted(path for path in scenes.rglob("*") if path.suffix.lower() in files.SUFFIXES)
        if not self.paths:
            raise settings.TrainingError(f"--scenes: {scenes} has no PSD or OpenRaster files; give another folder.")
        folder.mkdir(parents=True, exist_ok=True)
        listed = str([(str(path), path.stat().st_mtime_ns) for path in self.paths])
        names = folder / f"names-{most}-{hashlib.sha256(listed.encode()).hexdigest()[:10]}.json"
        if not names.exists():
            names.write_text(json.dumps([names_of(path, most) for path in self.paths]))
        self.names: list[list[str]] = json.loads(names.read_text())
        known = latents.digest(base.autoencoder.encoder, *filter(None, [encoder])) + listed
        path = folder / f"layered-files-{side}-{most}-{hashlib.sha256(known.encode()).hexdigest()[:10]}"
        size = side // latents.FACTOR
        self.values = self._open(path, (len(self.paths), 1 + 2 * most, 4, size, size), np.float16)
        self.alphas = self._open(path.with_name(path.name + "-alphas"), (len(self.paths), most, size, size), np.float16)
        self.ready = self._open(path.with_name(path.name + "-ready"), (len(self.paths),))

    def of(self, count: int) -> np.ndarray:
        """The numbers of the files with so many objects or more."""
        return np.array([number for number, names in enumerate(self.names) if len(names) > count], int)

    def layers(self, count: int, numbers: np.ndarray) -> tuple[Tensor, Tensor]:
        """Latents [B,count+2,4,h,w] of background, objects and whole picture, and the objects' alphas [B,count,h,w]."""
        for number in np.unique(numbers):
            if not self.ready[number]:
                self._encode(int(number))
        values = torch.from_numpy(self.values[numbers]).float()
        found = torch.cat([values[:, : 1 + count], values[:, [self.most + count]]], 1)
        return found, torch.from_numpy(self.alphas[numbers, :count]).float()

    @torch.no_grad()
    def _encode(self, number: int) -> None:
        scene = read(self.paths[number], self.most, self.side)
        opaque = torch.cat([scene.background[None], scene.composites()])
        plain = torch.cat([self.base.posterior(image[None])[0].cpu() * self.base.scale for image in opaque])
        objects = [transparent_images.hidden(rgba[None], self.base, self.encoder) for rgba in scene.objects]
        count = len(objects)
        self.values[number, : 1 + count] = torch.cat([plain[:1], *objects]).numpy()
        self.values[number, 1 + self.most : 1 + self.most + count] = plain[1:].numpy()
        size = self.values.shape[-2:]
        self.alphas[number, :count] = resize_maps(scene.objects[:, 3:], size)[:, 0].numpy()
        self.ready[number] = 1
