"""Trains the denoiser and the text encoder together: noise prediction on latents of rendered scenes, Stable Diffusion
1.x's schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..networks.text_to_image import TextToImage
from ..scenes import renderer
from ..techniques import diffusion
from . import latents, loop, sampling, settings, text

Words = Callable[[list[str]], tuple[Tensor, ...]]  # prompts to what a model takes for them, one row each
CHECK = 64  # the last scenes of the pool are kept for validation


def build(config: dict) -> TextToImage:
    torch.manual_seed(config["seed"])
    return TextToImage(settings.family(), config["in_channels"], len(text.token_ids()))


def loss_of(
    model: nn.Module,
    batch: latents.Batch,
    config: dict,
    levels: Tensor,
    rng: np.random.Generator,
    words: Words | None = None,
) -> dict[str, Tensor]:
    """Weighted squared error of the predicted noise; the share `empty_prompt` of the prompts is left out, for
    classifier-free guidance.

    levels: [timesteps], the share of variance left at each. words: what the model takes for prompts; the mini family's
    rows of tokens when there are none. Scalars: what is minimised, and the plain error.
    Source: ddpm, Eq. 14, weighted by minsnr
    Source: cfg, Alg. 1 (training with prompts left out)
    """
    device, size = next(model.parameters()).device, len(batch.prompts)
    timesteps = torch.from_numpy(rng.integers(0, len(levels), size))
    noise = torch.from_numpy(rng.standard_normal(batch.latent.shape, np.float32))
    kept = rng.random(size) >= config["empty_prompt"]
    prompts = [prompt if keep else "" for prompt, keep in zip(batch.prompts, kept, strict=True)]
    text_inputs = words(prompts) if words else (text.with_unknown(text.rows(prompts), config["unknown_words"], rng),)
    level = levels[timesteps]
    given = diffusion.add_noise(batch.latent, noise, level)
    if batch.condition is not None:
        given = torch.cat([given, batch.condition], 1)
    predicted = model(given.to(device), timesteps.to(device), *(part.to(device) for part in text_inputs))
    error = (predicted - noise.to(device)).square().mean((1, 2, 3))
    weight = diffusion.noise_loss_weight(level, config["snr_gamma"]).float().to(device)
    return {"loss": (weight * error).mean(), "error": error.mean().detach()}


@torch.no_grad()
def sample(
    model: nn.Module,
    prompts: list[str],
    side: int,
    condition: Tensor | None = None,
    steps: int = 20,
    guidance: float = 4.0,
    seed: int = 0,
    words: Words | None = None,
) -> Tensor:
    """[B,4,side/8,side/8] of B prompts. condition: [B,5,side/8,side/8] of a model that inpaints. words: as for
    loss_of.
    """
    device = next(model.parameters()).device
    latent = torch.randn(
        len(prompts), 4, side // latents.FACTOR, side // latents.FACTOR, generator=torch.Generator().manual_seed(seed)
    ).to(device)
    both = prompts + [""] * len(prompts)
    text_inputs = [part.to(device) for part in (words(both) if words else (text.rows(both),))]

    def noise(latent, timestep):
        given = latent if condition is None else torch.cat([latent, condition.to(device)], 1)
        return model(torch.cat([given] * 2), torch.full((len(both),), timestep, device=device), *text_inputs).chunk(2)

    return sampling.ddim(noise, latent, steps, guidance)


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
        return loss_of(
            model, pool.batch(rng.integers(0, config["scenes"] - CHECK, config["batch"]), step), config, levels, rng
        )

    @torch.no_grad()
    def validate(model, step):
        batch = pool.batch(last, 0)
        error = loss_of(
            model, batch, {**config, "empty_prompt": 0, "unknown_words": 0}, levels, np.random.default_rng(0)
        )
        condition = None if batch.condition is None else batch.condition[:32]
        prompts = grid_prompts() if condition is None else batch.prompts[:32]
        decoded = autoencoder.decode(sample(model, prompts, config["side"], condition).cpu()).clamp(0, 1)
        loop.save_grid(folder / "grid.png", decoded, 8)
        return {key: value.item() for key, value in error.items()}

    model = build(config)
    if config["start"] and not (folder / "last").exists():
        loop.start_from(model, folder.parent / config["start"] / "model.safetensors")
    return loop.fit(model, loss, validate, config, folder, minutes, save_every)
