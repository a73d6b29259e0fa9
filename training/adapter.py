"""Trains the low-rank adapter that makes the denoiser draw one object with hidden transparency, in LayerDiffuse's
attention form.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..networks.autoencoder import Autoencoder
from ..networks.transparency import OffsetEncoder
from ..scenes import renderer
from ..techniques import diffusion as formulas
from . import data, diffusion, latents, loop, text
from .cutouts import CutOuts, checkerboard, hidden, load_pair

LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]


class CutOutLatents:
    """Latents of cut-outs with their transparency in them, encoded once. Prompts name the object, now and then with a
    plain background.
    """

    def __init__(self, pool: CutOuts, autoencoder: Autoencoder, encoder: OffsetEncoder):
        self.pool, self.autoencoder, self.encoder = pool, autoencoder, encoder
        self.kept: dict[int, Tensor] = {}

    @torch.no_grad()
    def batch(self, indices: np.ndarray, draw: int) -> latents.Batch:
        missing = [int(i) for i in np.unique(indices) if int(i) not in self.kept]
        for start in range(0, len(missing), latents.AT_ONCE):
            part = missing[start : start + latents.AT_ONCE]
            rgba = data.to_tensor(np.stack([self.pool[i] for i in part]))
            self.kept.update(zip(part, sum(hidden(rgba, self.autoencoder, self.encoder)), strict=True))
        return latents.Batch(
            torch.stack([self.kept[int(i)] for i in indices]), None, [self.words(int(i), draw) for i in indices]
        )

    def words(self, index: int, draw: int) -> str:
        rng = np.random.default_rng((index, draw))
        what = str(rng.choice(renderer.catalogue()[self.pool.content(index)[1][0]].prompts))
        return text.PLAIN.format(what=what) if rng.random() < 0.3 else what


def build(config: dict, folder: Path) -> nn.Module:
    """The trained denoiser, frozen, with low-rank terms on every attention's projections, which are all that learns."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(config["seed"])
    model = diffusion.build({**config, "in_channels": 4})
    loop.start_from(model, folder / "diffusion" / "model.safetensors")
    model.requires_grad_(False)
    inject_adapter_in_model(
        LoraConfig(r=config["rank"], lora_alpha=config["rank"], target_modules=LAYERS), model.model["diffusion_model"]
    )
    return model


def train(config: dict, folder: Path, minutes: float | None, save_every: float) -> nn.Module:
    root = folder.parent
    autoencoder = latents.load_autoencoder(root)
    encoder, decoder = load_pair(root / "transparency")
    pool = CutOutLatents(
        CutOuts(root / "scenes", config["cutouts"], config["side"], config["longer_side"]), autoencoder, encoder
    )
    levels = formulas.noise_levels()

    def loss(model, step, rank):
        rng = np.random.default_rng((config["seed"], step, rank))
        return diffusion.loss_of(
            model, pool.batch(rng.integers(0, config["cutouts"], config["batch"]), step), config, levels, rng
        )

    @torch.no_grad()
    def validate(model, step):
        batch = pool.batch(np.arange(64), 0)
        error = diffusion.loss_of(
            model, batch, {**config, "empty_prompt": 0, "unknown_words": 0}, levels, np.random.default_rng(0)
        )
        names = [entry.prompts[0] for entry in renderer.catalogue().values() if not entry.held_out]
        latent = diffusion.sample(model, names[::2][:24], config["side"]).cpu()
        found = decoder(autoencoder.decode(latent).clamp(0, 1), latent).clamp(0, 1)
        board = checkerboard(config["side"])
        loop.save_grid(folder / "grid.png", found[:, 1:] * found[:, :1] + board * (1 - found[:, :1]), 8)
        return {key: value.item() for key, value in error.items()}

    return loop.fit(build(config, root), loss, validate, config, folder, minutes, save_every)
