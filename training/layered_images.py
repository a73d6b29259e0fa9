"""What BFS learns from, as latents: rendered scenes, or the images of a user's folders."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from ..techniques import layering
from ..techniques.transparency import extend_colours
from . import data, fill_base, image_folders, latents, settings
from .layered_scenes import POOR, TRUE, Batch, LayeredScenes, Layers
from .rgba_autoencoder import SHADOW

AT_ONCE = 2  # large images, beside a transformer on the same card
LAYERED, REAL = "poor", "true"  # samples with a foreground whose shadow is made, and those with the true shadow


@dataclass(frozen=True)
class Samples:
    """batch: of numbers and of a draw, which chooses among prompts that fit. known: how many numbers a step draws from.
    held_out: the numbers kept for validation. foregrounds: whether a batch has them. captions: all that a batch may
    bring; none for rendered scenes.
    """

    batch: Callable[[np.ndarray, int], Batch]
    known: Callable[[int], int]
    held_out: np.ndarray
    foregrounds: bool
    captions: list[str]


def samples(config: dict, folder: Path, base: fill_base.Base, check: int) -> dict[str, Samples]:
    """Samples of both kinds, or of those that the config names folders for. check: how many rendered scenes are kept
    for validation. Raises TrainingError with one sentence for folders that do not hold what is needed.
    """
    if base.family == fill_base.MINI:
        pool = LayeredScenes(folder, base.autoencoder, base.rgba, config["scenes"], config["side"])
        count = config["scenes"] - check
        known = partial(data.known_at, count=count, per_step=config["scenes_per_step"])
        last = np.arange(count, config["scenes"])
        shadows = {REAL: TRUE, LAYERED: POOR}
        return {kind: Samples(partial(pool.batch, shadow=one), known, last, True, []) for kind, one in shadows.items()}
    if "pairs" in config:
        items = {
            LAYERED: any_pairs(*(_images(config, name) for name in ("foregrounds", "backgrounds")), config["pairs"])
        }
    else:
        fronts = {LAYERED: "foregrounds"} | ({REAL: "composites"} if "composites" in config else {})
        items = {kind: same_names(config, name) for kind, name in fronts.items()}
    return {kind: _of_items(config, folder, base, own) for kind, own in items.items()}


def _of_items(config: dict, folder: Path, base: fill_base.Base, items: list[Item]) -> Samples:
    count = image_folders.learnt(len(items), config["held_out"])
    pool = LayeredImages(folder, base, items, config["side"])
    captions = [item.caption for item in items]
    return Samples(pool.batch, lambda step: count, np.arange(count, len(items)), items[0].layer, captions)


@dataclass(frozen=True)
class Item:
    """front: an RGBA layer over the background, or a composite of the background and more, whose object stands where
    the mask is white, or, without one, where the two differ.
    """

    background: Path
    front: Path
    layer: bool
    mask: Path | None = None
    caption: str = ""


def _images(config: dict, name: str) -> dict[str, Path]:
    """Raises TrainingError."""
    if not config[name]:
        raise settings.TrainingError(f"--base needs --{name} too; docs/training.md says what that is.")
    return image_folders.images(Path(config[name]), name)


def any_pairs(fronts: dict[str, Path], backgrounds: dict[str, Path], count: int) -> list[Item]:
    """`count` random pairs of an RGBA image and a background. Raises TrainingError."""
    rng = np.random.default_rng(0)
    (*front,), (*behind,) = fronts.values(), backgrounds.values()
    check_alpha(front)
    draws = zip(rng.integers(0, len(behind), count), rng.integers(0, len(front), count), strict=True)
    return [Item(behind[one], front[other], layer=True) for one, other in draws]


def same_names(config: dict, option: str) -> list[Item]:
    """The images of a folder with backgrounds, captions and, where there are any, masks of the same names. Raises
    TrainingError.
    """
    fronts, backgrounds, layer = _images(config, option), _images(config, "backgrounds"), option == "foregrounds"
    masks = _images(config, "masks") if not layer and config.get("masks") else {}
    _all_have(
        fronts, {name for name in fronts if name in backgrounds}, f"background in {config['backgrounds']}", option
    )
    texts = {name: path.with_suffix(".txt") for name, path in fronts.items()}
    captions = {name: path.read_text(encoding="utf-8").strip() for name, path in texts.items() if path.exists()}
    _all_have(
        fronts, {name for name, caption in captions.items() if caption}, "caption in a .txt file beside it", option
    )
    if layer:
        check_alpha(fronts.values())
    items = [Item(backgrounds[name], path, layer, masks.get(name), captions[name]) for name, path in fronts.items()]
    for item in items:
        image_folders.check_sizes((path for path in (item.front, item.background, item.mask) if path), option)
    return items


def _all_have(wanted: dict[str, Path], having: set[str], what: str, option: str) -> None:
    lacking = [path for name, path in wanted.items() if name not in having]
    if lacking:
        raise settings.TrainingError(
            f"--{option}: {len(lacking)} of {len(wanted)} images have no {what} of the same name, such as "
            f"{lacking[0]}; add what is missing, or take the images away."
        )


def check_alpha(paths) -> None:
    """Raises TrainingError for images of --foregrounds that have none."""
    for path in paths:
        image = image_folders.header(path)
        if "A" not in image.getbands() and "transparency" not in image.info:
            raise settings.TrainingError(f"--foregrounds: {path} has no alpha; give PNG or WebP files that have.")


class LayeredImages(data.ScenePool):
    """Images scaled and cut to squares around their box, encoded when first asked for and kept on disk; changed files
    and other encoders start anew.
    """

    PARTS = 3  # composite, background, and the foreground or what the box holds of the composite

    def __init__(self, folder: Path, base: fill_base.Base, items: list[Item], side: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.base, self.items, self.side = base, items, side
        size, channels = side // latents.FACTOR, base.autoencoder.network.config.latent_channels
        known = latents.digest(base.autoencoder.network.encoder, base.rgba.network.encoder)
        paths = (path for item in items for path in (item.background, item.front, item.mask) if path)
        files = [(str(path), path.stat().st_mtime_ns) for path in paths]
        digest = hashlib.sha256(f"{known} {files}".encode()).hexdigest()[:10]
        path = folder / f"images-{side}-{len(items)}-{digest}"
        self.values = self._open(path, (len(items), self.PARTS, channels, size, size), np.float16)
        self.boxes = self._open(path.with_name(path.name + "-boxes"), (len(items), 4), np.int16)

    def layers(self, index: int) -> Layers:
        """For a composite the foreground is what the box holds of it, opaque."""
        item = self.items[index]
        behind, front = image_folders.read(item.background, "RGB"), image_folders.read(item.front, "RGBA")
        if item.layer:
            where = np.asarray(front)[..., 3] > 255 * SHADOW
        elif item.mask:
            where = np.asarray(image_folders.read(item.mask, "L")) > 127
        else:
            where = difference(np.asarray(front)[..., :3], np.asarray(behind))
        if not where.any():
            raise settings.TrainingError(f"{item.mask or item.front} shows no object; take it away.")
        box = bounds(where)
        cut = square(front.size, box)
        cut_behind = cut if behind.size == front.size else square(behind.size, (0, 0, *behind.size))
        background, image = (
            np.asarray(one.resize((self.side,) * 2, Image.Resampling.BICUBIC, edges), np.float32) / 255
            for one, edges in ((behind, cut_behind), (front, cut))
        )
        box = _scaled(box, cut, self.side)
        if item.layer:
            alpha, foreground = image[..., 3:], image
            composite = alpha * image[..., :3] + (1 - alpha) * background
        else:
            left, top, right, bottom = box
            composite, foreground = image[..., :3], image.copy()
            foreground[..., 3] = 0
            foreground[top:bottom, left:right, 3] = 1
        return Layers(background, composite, foreground, box, item.caption)

    def batch(self, indices: np.ndarray, draw: int) -> Batch:
        missing = [int(i) for i in np.unique(indices) if not self.boxes[i].any()]
        for start in range(0, len(missing), AT_ONCE):
            self._encode(missing[start : start + AT_ONCE])
        composite, background, front = torch.from_numpy(self.values[indices]).float().unbind(1)
        mask = torch.zeros(len(indices), 1, self.side, self.side)
        for row, i in zip(mask, indices, strict=True):
            left, top, right, bottom = self.boxes[i]
            row[:, top:bottom, left:right] = 1
        prompts = [self.items[i].caption for i in indices]
        return Batch(composite, background, front, front, layering.alpha_cells(mask), prompts)

    @torch.no_grad()
    def _encode(self, indices: list[int]) -> None:
        items = [self.layers(index) for index in indices]
        rgba = _tensor([one.foreground for one in items])
        rgba = torch.cat([extend_colours(rgba[:, :3], rgba[:, 3:]), rgba[:, 3:]], 1)
        parts = [self.base.autoencoder.encode(_tensor([one.composite for one in items]))]
        parts += [self.base.autoencoder.encode(_tensor([one.background for one in items])), self.base.rgba.encode(rgba)]
        self.values[indices] = torch.stack(parts, 1).numpy()
        self.boxes[indices] = [one.box for one in items]


def difference(composite: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Where two images [H,W,3] of bytes differ, [H,W]: in cells of 8×8 pixels, since JPEG's noise does not count."""
    apart = np.abs(composite.astype(np.int16) - background).max(-1).astype(np.float32)
    cells = F.avg_pool2d(torch.from_numpy(apart)[None], latents.FACTOR, ceil_mode=True) > 255 * SHADOW
    pixels = cells[0].numpy().repeat(latents.FACTOR, 0).repeat(latents.FACTOR, 1)
    return pixels[: apart.shape[0], : apart.shape[1]]


def bounds(where: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of what is true in [H,W], right and bottom exclusive."""
    rows, columns = (np.nonzero(where.any(axis))[0] for axis in (1, 0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def square(size: tuple[int, int], box: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """The largest square in an image of this size (width, height), with the box as near its middle as can be."""
    edge = min(size)
    left, top = (min(max((box[axis] + box[axis + 2] - edge) // 2, 0), side - edge) for axis, side in enumerate(size))
    return left, top, left + edge, top + edge


def _scaled(box: tuple[int, int, int, int], square: tuple[int, int, int, int], side: int) -> tuple[int, int, int, int]:
    """The box on the square that is scaled to this side, in whole pixels that hold it."""
    low, high = ((np.array(part) - square[:2]) * side / (square[2] - square[0]) for part in (box[:2], box[2:]))
    low, high = np.floor(low).clip(0, side).astype(int), np.ceil(high).clip(0, side).astype(int)
    return int(low[0]), int(low[1]), int(high[0]), int(high[1])


def _tensor(images: list[np.ndarray]) -> Tensor:
    return rearrange(torch.from_numpy(np.stack(images)), "b h w c -> b c h w")
