"""The noise process of Stable Diffusion and its deterministic sampler, as pure functions."""

from __future__ import annotations

import torch
from torch import Tensor


def noise_levels(steps: int = 1000, start: float = 0.00085, end: float = 0.012) -> Tensor:
    """[steps] float64: the share of the picture's variance that is left at each timestep, falling from about 1 to about
    0.

    Source: ddpm, Eq. 4 (alpha bar), with the squared linear schedule of Stable Diffusion 1.x.
    """
    betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64).square()
    return (1 - betas).cumprod(0)


def add_noise(clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    """[B,...] latents with noise of the same shape; level: [B], the share of variance left, 0..1.

    Source: ddpm, Eq. 4.
    """
    level = level.reshape(-1, *[1] * (clean.ndim - 1)).to(clean)
    return clean * level.sqrt() + noise * (1 - level).sqrt()


def noise_loss_weight(level: Tensor, gamma: float) -> Tensor:
    """[B] weights of the squared error of predicted noise: min(SNR, gamma) / SNR; level: [B], 0..1 without the ends.

    Source: minsnr, Sec. 3.4.
    """
    signal_to_noise = level / (1 - level)
    return signal_to_noise.clamp(max=gamma) / signal_to_noise


def ddim_step(latent: Tensor, noise: Tensor, level: Tensor, next_level: Tensor) -> Tensor:
    """The latent at next_level from the noise predicted at level; both are scalars in 0..1, next_level 1 gives the
    clean picture.

    Source: ddim, Eq. 12 with sigma 0.
    """
    clean = (latent - (1 - level).sqrt() * noise) / level.sqrt()
    return next_level.sqrt() * clean + (1 - next_level).sqrt() * noise
