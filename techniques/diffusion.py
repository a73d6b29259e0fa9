"""The noise processes of Stable Diffusion and of flow matching, and their deterministic samplers, as pure functions."""

from __future__ import annotations

import math

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
    """The latent [B,...] at next_level from the one at level and its predicted noise [B,...]; levels are scalars in
    0..1, next_level 1 gives the clean picture.

    Source: ddim, Eq. 12 with sigma 0.
    """
    clean = (latent - (1 - level).sqrt() * noise) / level.sqrt()
    return next_level.sqrt() * clean + (1 - next_level).sqrt() * noise


def flow_noise(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """[B,...] latents on the straight line to noise of the same shape; sigma: [B], 0 = clean, 1 = noise.

    Source: bfs, Sec. 3 (flow matching); its t is 1 - sigma.
    """
    sigma = sigma.reshape(-1, *[1] * (clean.ndim - 1)).to(clean)
    return (1 - sigma) * clean + sigma * noise


def sigma_of_noise(share: float, flow: bool, deviation: float = 1.0) -> float:
    """The sigma, as ComfyUI counts it, at which noise makes up this share, 0..1, of a noised image; infinite for a
    diffusion model's share of 1. Equal shares are equal signal-to-noise ratios, (1 / share - 1)², whatever the model
    and its schedule.

    flow: noised images are (1 - sigma) clean + sigma noise, and sigma is the share. Otherwise they are clean + sigma
    noise, with clean latents of this standard deviation, and the share is sigma / (deviation + sigma).
    Source: ours, the signal-to-noise ratio of minsnr's Sec. 3.4 set equal for DDPM's Eq. 4 and flow matching
    """
    if flow:
        return share
    return deviation * share / (1 - share) if share < 1 else math.inf


def flow_velocity(clean: Tensor, noise: Tensor) -> Tensor:
    """What a flow matching model predicts, as Flux does: noise - clean, [B,...] each.

    Source: bfs, Eq. 5; the paper's velocity points the other way.
    """
    return noise - clean


def shifted_sigmas(steps: int, mu: float) -> Tensor:
    """[steps + 1] float64 levels from 1 to 0, closer together near 1 for a larger mu; mu 0 is even.

    Source: flux, its sampling code's time shift exp(mu) / (exp(mu) + 1 / t - 1)
    """
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    factor = torch.tensor(mu, dtype=torch.float64).exp()
    return factor * even / (1 + (factor - 1) * even)


def euler_step(latent: Tensor, velocity: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """The latent [B,...] at next_sigma from the one at sigma and its velocity [B,...]; sigmas are scalars in 0..1.

    Source: bfs, inference (the flow-matching Euler sampler)
    """
    return latent + (next_sigma - sigma) * velocity


def v_target(clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    """The target of v prediction, of the shape of the latents [B,...]; level: [B], the share of variance left, 0..1.

    Source: layeringdiff, Sec. 3.4 (v-prediction loss)
    """
    level = level.reshape(-1, *[1] * (clean.ndim - 1)).to(clean)
    return level.sqrt() * noise - (1 - level).sqrt() * clean


def noise_of_v(noisy: Tensor, v: Tensor, level: Tensor) -> Tensor:
    """The noise [B,...] in noisy latents [B,...] by their predicted v [B,...]; level: a scalar in 0..1.

    Source: layeringdiff, Sec. 3.4 (v-prediction)
    """
    return level.sqrt().to(v) * v + (1 - level).sqrt().to(v) * noisy
