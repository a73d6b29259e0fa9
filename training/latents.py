"""Rendered scenes as latents with their prompts, drawn by number and kept on disk, for the trainers of denoisers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat
from safetensors.torch import load_file
from torch import Tensor, nn

from ..networks.autoencoder import Autoencoder
from ..scenes import renderer
from . import data, settings, text

SPECIAL_EVERY = 8  # of so many scenes one is shown without its objects, and one is an object on plain gray
FACTOR = 8  # pixels per latent pixel
AT_ONCE = 16


@dataclass(frozen=True)
class Batch:
    """latent: [B,4,h,w]. condition: [B,5,h,w], the mask (1 = to paint) and the latent of the picture with that part
    gray; None without inpainting.
    """

    latent: Tensor
    condition: Tensor | None
    prompts: list[str]


def load_autoencoder(root: Path) -> Autoencoder:
    """The trained autoencoder, with its better decoder once that was trained too. Raises TrainingError when there is
    none.
    """
    paths = [root / what / "model.safetensors" for what in ("decoder", "autoencoder")]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        raise settings.TrainingError(
            f"{paths[1]} is missing; train the autoencoder first: python -m training autoencoder."
        )
    state = load_file(path)
    channels, latent_channels = state["taesd_decoder.1.weight"].shape[:2]
    model = Autoencoder(channels, latent_channels)
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def digest(*networks: nn.Module) -> str:
    """Ten characters that change with the weights."""
    found = hashlib.sha256()
    for network in networks:
        for value in network.state_dict().values():
            found.update(value.cpu().numpy().tobytes())
    return found.hexdigest()[:10]


class LatentPool(data.ScenePool):
    """Scene i of a side, encoded when first asked for. The file carries a digest of the encoder's weights: another
    encoder starts anew.
    """

    def __init__(self, folder: Path, autoencoder: Autoencoder, count: int, side: int, inpaint: bool = False):
        folder.mkdir(parents=True, exist_ok=True)
        self.autoencoder, self.count, self.side, self.inpaint = autoencoder, count, side, inpaint
        kind = f"{side}-{count}-{'inpaint-' if inpaint else ''}{digest(autoencoder.taesd_encoder)}"
        path = folder / f"latents-{data.RENDERER}-{kind}"
        self.values = self._open(path, (count, 9 if inpaint else 4, side // FACTOR, side // FACTOR), np.float16)
        self.holes = self._open(path.with_name(path.name + "-holes"), (count,), np.int16) if inpaint else None

    def request(self, index: int) -> renderer.Request:
        empty = not self.inpaint and index % SPECIAL_EVERY == 0
        return renderer.Request(train=True, count=0 if empty else 1 if self.is_plain(index) else None)

    def is_plain(self, index: int) -> bool:
        return not self.inpaint and index % SPECIAL_EVERY == 1

    def render(self, index: int) -> np.ndarray:
        if not self.is_plain(index):
            return super().render(index)
        shown = renderer.render(self.request(index), self.side, self.side, index).objects[0]
        return renderer.over(shown.rgba, np.full(3, 0.5, np.float32))

    def batch(self, indices: np.ndarray, draw: int) -> Batch:
        """The scenes of these numbers; `draw` chooses among the prompts that fit."""
        missing = [int(i) for i in np.unique(indices) if not self.values[i].any()]
        for start in range(0, len(missing), AT_ONCE):
            self._encode(missing[start : start + AT_ONCE])
        values = torch.from_numpy(self.values[indices]).float()
        prompts = [self.words(int(i), draw) for i in indices]
        return Batch(values[:, :4], values[:, 4:] if self.inpaint else None, prompts)

    def words(self, index: int, draw: int) -> str:
        """The prompt of a scene, or, in half of the draws, of nothing but the object that is to be painted."""
        rng = np.random.default_rng((index, draw))
        if self.is_plain(index):
            return text.PLAIN.format(what=rng.choice(renderer.catalogue()[self.content(index)[1][0]].prompts))
        chosen = self.holes[index] if self.inpaint and rng.random() < 0.5 else -1
        if chosen < 0:
            return self.prompt(index, draw)
        return str(rng.choice(list(renderer.catalogue().values())[chosen].prompts))

    @torch.no_grad()
    def _encode(self, indices: list[int]) -> None:
        device = next(self.autoencoder.parameters()).device

        def encode(pictures) -> np.ndarray:
            images = rearrange(torch.from_numpy(np.stack(pictures)), "b h w c -> b c h w")
            return self.autoencoder.encode(images.to(device)).cpu().numpy()

        pictures = [self.render(index) for index in indices]
        values = encode(pictures)
        if self.inpaint:
            self.holes[indices], masks = zip(*(self.hole(index) for index in indices), strict=True)
            masks = np.stack(masks)
            large = repeat(masks, "b h w -> b (h down) (w across) 1", down=FACTOR, across=FACTOR)
            gray = encode([picture * (1 - mask) + 0.5 * mask for picture, mask in zip(pictures, large, strict=True)])
            values = np.concatenate([values, masks[:, None], gray], 1)
        self.values[indices] = values

    def hole(self, index: int) -> tuple[int, np.ndarray]:
        """What is to be painted: around an object (its place in the catalogue), any box, or everything (-1); mask [h,w]
        of latent pixels, 1 = to paint.
        """
        rng, kind = np.random.default_rng((index, 2)), -1
        size = self.side // FACTOR
        mask, share = np.zeros((size, size), np.float32), rng.random()
        if share < 0.7:
            objects = renderer.render(self.request(index), self.side, self.side, index).objects
            chosen = objects[rng.integers(len(objects))]
            kind, (left, top, right, bottom) = list(renderer.catalogue()).index(chosen.name), chosen.box
            grow = rng.uniform(0.05, 0.35, 4) * (right - left + bottom - top) / 2
            box = np.array([left - grow[0], top - grow[1], right + grow[2], bottom + grow[3]]) / FACTOR
        elif share < 0.9:
            (left, right), (top, bottom) = (sorted(rng.uniform(0, size, 2)) for _ in range(2))
            box = np.array([left, top, right, bottom])
        else:
            box = np.array([0, 0, size, size])
        left, top = np.clip(np.floor(box[:2]), 0, size - 1).astype(int)
        right, bottom = np.maximum(np.ceil(box[2:]), (left + 1, top + 1)).astype(int)
        mask[top:bottom, left:right] = 1
        return kind, mask
