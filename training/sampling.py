"""Deterministic sampling with classifier-free guidance, for the pictures that trainers show and judge."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ..techniques import diffusion


@torch.no_grad()
def ddim(
    noise: Callable[[Tensor, int], tuple[Tensor, Tensor]], latent: Tensor, steps: int = 20, guidance: float = 4.0
) -> Tensor:
    """A clean latent from pure noise of the same shape.

    noise: (latent, timestep) -> the estimates with and without the prompt, each of the latent's shape.
    Source: ddim, Eq. 12 with sigma 0
    Source: cfg, Eq. 6
    """
    levels = diffusion.noise_levels()
    timesteps = np.linspace(len(levels) - 1, 0, steps + 1).round().astype(int).tolist()
    for now, after in pairwise(timesteps):
        wanted, free = noise(latent, now)
        latent = diffusion.ddim_step(latent, free + guidance * (wanted - free), levels[now], levels[after])
    return latent


@torch.no_grad()
def euler(
    velocity: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    latent: Tensor,
    steps: int = 20,
    guidance: float = 3.0,
    mu: float = 0.5,
) -> Tensor:
    """A clean latent from pure noise of the same shape, with flow matching.

    velocity: (latent, sigma [B]) -> the estimates with and without the prompt, each of the latent's shape.
    mu: how much of the steps is spent on high noise, see shifted_sigmas.
    Source: cfg, Eq. 6
    """
    levels = diffusion.shifted_sigmas(steps, mu).float().to(latent.device)
    for now, after in pairwise(levels):
        wanted, free = velocity(latent, now.expand(len(latent)))
        latent = diffusion.euler_step(latent, free + guidance * (wanted - free), now, after)
    return latent
