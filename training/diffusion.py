"""Trains the denoiser and the text encoder together: noise prediction on latents of rendered scenes, Stable Diffusion 1.x's schedule."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..networks.text_encoder import TextEncoder
from ..networks.unet import UNet
from ..scenes import renderer
from ..techniques import diffusion
from . import latents, loop, text
from .command import CONFIGS

CHECK = 64  # the last scenes of the pool are kept for validation


class TextToImage(nn.Module):
    """Keys as in the checkpoint: model.diffusion_model.* and cond_stage_model.transformer.text_model.*"""

    def __init__(self, family: dict, in_channels: int):
        super().__init__()
        shape, words = family["unet"], family["text"]
        unet = UNet(in_channels, shape["out_channels"], shape["model_channels"], shape["channel_mult"], shape["num_res_blocks"][0],
                    shape["transformer_depth"], shape["context_dim"], shape["num_heads"])
        encoder = TextEncoder(len(text.token_ids()), words["hidden_size"], words["num_hidden_layers"], words["num_attention_heads"],
                              words["intermediate_size"])
        self.model = nn.ModuleDict({"diffusion_model": unet})
        self.cond_stage_model = nn.ModuleDict({"transformer": nn.ModuleDict({"text_model": encoder})})

    def forward(self, latent: Tensor, timesteps: Tensor, rows: Tensor) -> Tensor:
        unique, place = rows.unique(dim=0, return_inverse=True)
        context = self.cond_stage_model["transformer"]["text_model"](unique)[place]
        return self.model["diffusion_model"](latent, timesteps, context)


def build(config: dict) -> TextToImage:
    """A fresh model whose residual branches start at zero."""
    torch.manual_seed(config["seed"])
    model = TextToImage(json.loads((CONFIGS / "sd.json").read_text()), config["in_channels"])
    unet = model.model["diffusion_model"]
    with torch.no_grad():
        for name, module in unet.named_modules():
            if name.endswith(("out_layers.3", "proj_out")) or name == "out.2":
                module.weight.zero_()
                module.bias.zero_()
    return model


def loss_of(model: nn.Module, batch: latents.Batch, config: dict, levels: Tensor, rng: np.random.Generator) -> dict[str, Tensor]:
    """Weighted squared error of the predicted noise; one prompt in `1 / empty_prompt` is left out, for classifier-free guidance."""
    device, size = next(model.parameters()).device, len(batch.prompts)
    timesteps = torch.from_numpy(rng.integers(0, len(levels), size))
    noise = torch.from_numpy(rng.standard_normal(batch.latent.shape, np.float32))
    kept = rng.random(size) >= config["empty_prompt"]
    rows = text.rows([prompt if keep else "" for prompt, keep in zip(batch.prompts, kept, strict=True)])
    rows = text.with_unknown(rows, config["unknown_words"], rng)
    level = levels[timesteps]
    given = diffusion.add_noise(batch.latent, noise, level)
    if batch.condition is not None:
        given = torch.cat([given, batch.condition], 1)
    predicted = model(given.to(device), timesteps.to(device), rows.to(device))
    error = (predicted - noise.to(device)).square().mean((1, 2, 3))
    weight = diffusion.noise_loss_weight(level, config["snr_gamma"]).float().to(device)
    return {"loss": (weight * error).mean(), "error": error.mean().detach()}


@torch.no_grad()
def sample(model: nn.Module, prompts: list[str], side: int, condition: Tensor | None = None, steps: int = 20, guidance: float = 4.0,
           seed: int = 0) -> Tensor:
    """[B,4,side/8,side/8]: deterministic sampling with classifier-free guidance."""
    device, levels = next(model.parameters()).device, diffusion.noise_levels()
    latent = torch.randn(len(prompts), 4, side // latents.FACTOR, side // latents.FACTOR, generator=torch.Generator().manual_seed(seed)).to(device)
    rows = text.rows(prompts + [""] * len(prompts)).to(device)
    times = np.linspace(len(levels) - 1, 0, steps + 1).round().astype(int)
    for now, after in zip(times[:-1], times[1:], strict=True):
        given = latent if condition is None else torch.cat([latent, condition.to(device)], 1)
        wanted, free = model(torch.cat([given] * 2), torch.full((2 * len(prompts),), int(now), device=device), rows).chunk(2)
        latent = diffusion.ddim_step(latent, free + guidance * (wanted - free), levels[now], levels[after])
    return latent


def grid_prompts() -> list[str]:
    """32 prompts, fixed: every place, single objects and pairs of objects."""
    names = [entry for entry in renderer.catalogue().values() if not entry.held_out]
    rng = np.random.default_rng(0)
    prompts = []
    for index in range(32):
        picked = rng.choice(len(names), 1 + (index % 4 == 3), replace=False)
        place = renderer.PLACE_WORDS[renderer.KINDS[index % len(renderer.KINDS)]][0]
        prompts.append(" and ".join(names[i].prompts[0] for i in picked) + " " + place)
    return prompts


def train(config: dict, folder: Path, minutes: float | None, save_every: float) -> nn.Module:
    autoencoder = latents.load_autoencoder(folder.parent)
    inpaint = config["in_channels"] == 9
    pool = latents.LatentPool(folder.parent / "scenes", autoencoder, config["scenes"], config["side"], inpaint)
    levels = diffusion.noise_levels()
    last = np.arange(config["scenes"] - CHECK, config["scenes"])

    def loss(model, step, rank):
        rng = np.random.default_rng((config["seed"], step, rank))
        return loss_of(model, pool.batch(rng.integers(0, config["scenes"] - CHECK, config["batch"]), step), config, levels, rng)

    @torch.no_grad()
    def validate(model, step):
        batch = pool.batch(last, 0)
        error = loss_of(model, batch, {**config, "empty_prompt": 0, "unknown_words": 0}, levels, np.random.default_rng(0))
        condition = None if batch.condition is None else batch.condition[:32]
        prompts = grid_prompts() if condition is None else batch.prompts[:32]
        decoded = autoencoder.decode(sample(model, prompts, config["side"], condition).cpu()).clamp(0, 1)
        loop.save_grid(folder / "grid.png", decoded, 8)
        return {key: value.item() for key, value in error.items()}

    model = build(config)
    if config["start"] and not (folder / "last").exists():
        loop.start_from(model, folder.parent / config["start"] / "model.safetensors")
    return loop.fit(model, loss, validate, config, folder, minutes, save_every)
