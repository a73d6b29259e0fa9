"""Rendered scenes as latents with their prompts, drawn by number and kept on disk, for the trainers of denoisers."""
from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..networks.autoencoder import Autoencoder
from . import data, scenes

EMPTY_EVERY = 8  # one scene in so many is shown without its objects
FACTOR = 8  # pixels per latent pixel
AT_ONCE = 16


@dataclass(frozen=True)
class Batch:
    """latent: [B,4,h,w]. condition: [B,5,h,w], the mask (1 = to paint) and the latent of the picture with that part gray; None without inpainting."""
    latent: Tensor
    condition: Tensor | None
    prompts: list[str]


def load_autoencoder(folder: Path) -> Autoencoder:
    """The trained autoencoder of a training folder. Raises SystemExit when it is not there."""
    path = folder / "model.safetensors"
    if not path.exists():
        raise SystemExit(f"error: {path} is missing; train the autoencoder first (python -m training autoencoder) or name its folder with --set.")
    state = load_file(path)
    channels, latent_channels = state["taesd_decoder.1.weight"].shape[:2]
    model = Autoencoder(channels, latent_channels)
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


class LatentPool:
    """Scene i of a side, encoded when first asked for. The files carry a digest of the encoder's weights: another encoder starts anew."""

    def __init__(self, folder: Path, autoencoder: Autoencoder, count: int, side: int, inpaint: bool = False):
        folder.mkdir(parents=True, exist_ok=True)
        self.autoencoder, self.count, self.side, self.inpaint = autoencoder, count, side, inpaint
        digest = hashlib.sha256()
        for value in autoencoder.taesd_encoder.state_dict().values():
            digest.update(value.cpu().numpy().tobytes())
        name = f"latents-{data.RENDERER}-{side}-{count}-{'inpaint-' if inpaint else ''}{digest.hexdigest()[:10]}"
        channels = 9 if inpaint else 4
        self.values = data.open_array(folder / f"{name}.values", (count, channels, side // FACTOR, side // FACTOR), np.float16)
        self.texts = data.open_array(folder / f"{name}.texts", (count, 160), np.uint8)

    def batch(self, indices: np.ndarray) -> Batch:
        missing = [int(i) for i in np.unique(indices) if not self.texts[i, 0]]
        for start in range(0, len(missing), AT_ONCE):
            self._encode(missing[start:start + AT_ONCE])
        values = torch.from_numpy(np.stack([self.values[i] for i in indices])).float()
        prompts = [bytes(self.texts[i]).rstrip(b"\0").decode() for i in indices]
        return Batch(values[:, :4], values[:, 4:] if self.inpaint else None, prompts)

    @torch.no_grad()
    def _encode(self, indices: list[int]) -> None:
        examples = [(example if self.inpaint else whole)(index, self.side) for index in indices]
        device = next(self.autoencoder.parameters()).device

        def encode(pictures) -> np.ndarray:
            return self.autoencoder.encode(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).to(device)).cpu().numpy()

        values = encode([picture for picture, _, _ in examples])
        if self.inpaint:
            masks = np.stack([mask for _, _, mask in examples])[:, None]
            small = masks.reshape(len(examples), 1, self.side // FACTOR, FACTOR, self.side // FACTOR, FACTOR)[:, :, :, 0, :, 0]
            gray = encode([picture * (1 - mask[..., None]) + 0.5 * mask[..., None] for picture, _, mask in examples])
            values = np.concatenate([values, small, gray], 1)
        for index, value, (_, prompt, _) in zip(indices, values, examples, strict=True):
            text = prompt.encode()
            if len(text) > self.texts.shape[1]:
                raise ValueError(f"scene {index}: its prompt has {len(text)} bytes and {self.texts.shape[1]} are kept: {prompt}")
            self.values[index] = value
            self.texts[index, 1:] = 0
            self.texts[index, :len(text)] = np.frombuffer(text, np.uint8)


def whole(index: int, side: int) -> tuple[np.ndarray, str, None]:
    """Picture [side,side,3] and prompt of training scene `index`, one in eight without its objects."""
    scene = scenes.render(scenes.Request(train=True), side, side, index)
    if index % EMPTY_EVERY == 0:
        return scene.background, scene.background_prompt, None
    return scene.composite, scene.prompt, None


def example(index: int, side: int) -> tuple[np.ndarray, str, np.ndarray]:
    """Picture, prompt and mask [side,side], 1 = to paint, of a training scene: around an object, any box, or everything.

    The mask is drawn in steps of a latent pixel, as the sampler sees it.
    """
    scene = scenes.render(scenes.Request(train=True), side, side, index)
    rng = np.random.default_rng((index, 1))
    mask, kind = np.zeros((side, side), np.float32), rng.random()
    prompt = scene.prompt
    if kind < 0.7:
        chosen = scene.objects[rng.integers(len(scene.objects))]
        left, top, right, bottom = chosen.box
        grow = rng.uniform(0.05, 0.35, 4) * (right - left + bottom - top) / 2
        left, top, right, bottom = left - grow[0], top - grow[1], right + grow[2], bottom + grow[3]
        prompt = chosen.prompt if rng.random() < 0.5 else prompt
    elif kind < 0.9:
        (left, right), (top, bottom) = (sorted(rng.uniform(0, side, 2)) for _ in range(2))
    else:
        left, top, right, bottom = 0, 0, side, side
    left, top = (int(np.clip(value // FACTOR, 0, side // FACTOR - 1)) * FACTOR for value in (left, top))
    right, bottom = (int(-(-value // FACTOR)) * FACTOR for value in (right, bottom))
    mask[top:max(bottom, top + FACTOR), left:max(right, left + FACTOR)] = 1
    return scene.composite, prompt, mask
