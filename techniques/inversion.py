"""Turning a picture's latent back into the noise that a sampler would make it from: steps, schedules and the trajectory
between.

Latents are ComfyUI's: clean + sigma * noise for noise and v prediction, (1 - sigma) * clean + sigma * noise for flow
matching.
"""

from __future__ import annotations

import torch
from torch import Tensor

RELEASED_STEPS = 50  # the number of steps that the published schedules of null-text inversion are made for


def scale_between(sigma: Tensor, next_sigma: Tensor, flow: bool = False) -> Tensor:
    """Factor for a latent at sigma which the network is to see as if it were at next_sigma, scalars >= 0; 1 for flow
    matching.

    The network's input is latent / sqrt(1 + sigma²), and that is what stays as it is.
    Source: nulltext, Sec. 3.1 (DDIM inversion takes the noise of z_t at the timestep that it goes to)
    """
    return torch.ones_like(sigma) if flow else ((1 + next_sigma**2) / (1 + sigma**2)).sqrt()


def ode_step(
    latent: Tensor, evaluated: Tensor, denoised: Tensor, at: Tensor, sigma: Tensor, next_sigma: Tensor
) -> Tensor:
    """The latent [B,C,H,W] at next_sigma from the one at sigma, with the prediction denoised [B,C,H,W] of the latent
    `evaluated` at noise level `at`.

    Sampling has evaluated = latent and at = sigma; inversion evaluates the latent of sigma at next_sigma, above sigma.
    (evaluated - denoised) / at is the noise of a diffusion model and the velocity of a flow matching one, so the same
    line is DDIM, its inversion, and Euler's method for both.
    Source: ddim, Eq. 13 (the ODE that DDIM integrates by Euler's method, in x / sqrt(alpha) and sigma), in either
    direction
    """
    return latent + (next_sigma - sigma) * (evaluated - denoised) / at


def trajectory_at(latents: Tensor, sigmas: Tensor, sigma: float) -> Tensor:
    """The latent [B,C,H,W] at noise level sigma, 0 or more, from a trajectory [N,B,C,H,W] at descending sigmas [N].

    Exact on the path of Euler steps, which is straight between two of them. Above the first noise level the noise that
    the trajectory's first latent has beside its last one grows to sigma; below the last one nothing is left to take
    away, and that latent is given.
    Source: ours, any schedule of the sampler can follow one inversion
    """
    if sigma > sigmas[0]:
        return _noisier(latents[0], latents[-1], float(sigmas[0]), sigma)
    if sigma == sigmas[0]:
        return latents[0]
    below = int((sigmas > sigma).sum())
    if below == len(sigmas):
        return latents[-1]
    share = (sigmas[below - 1] - sigma) / (sigmas[below - 1] - sigmas[below])
    return latents[below] if share == 1 else torch.lerp(latents[below - 1], latents[below], float(share))


def _noisier(latent: Tensor, clean: Tensor, at: float, sigma: float) -> Tensor:
    """clean with the noise that `latent` has at noise level `at`, at level sigma; a latent without any noise stays as
    it is.

    One line for both kinds of model: flow matching takes as much of `clean` away as it puts noise there, and both go
    on straight.
    """
    return latent if at == 0 else clean + (latent - clean) / at * sigma


def noised_trajectory(clean: Tensor, noise: Tensor, sigmas: Tensor, flow: bool = False) -> Tensor:
    """[N,B,C,H,W]: one noise added to a clean latent [B,C,H,W] at each of sigmas [N]. No inversion: denoising it does
    not give the picture back.

    Source: ddpm, Eq. 4, in ComfyUI's scale; the same noise at every step
    """
    sigmas = sigmas.view(-1, *[1] * clean.ndim)
    return clean * (1 - sigmas) + noise * sigmas if flow else clean + noise * sigmas


def null_text_learning_rate(step: int, steps: int) -> float:
    """Adam's learning rate for the unconditional embedding of a step, 0 = the noisiest of `steps`.

    1e-2 (1 - i/100) at 50 steps; with another number the step counts as the one at the same place of 50.
    Source: nulltext, released code
    """
    return 1e-2 * (1 - step * RELEASED_STEPS / steps / 100)


def null_text_tolerance(step: int, steps: int) -> float:
    """The squared error at which the optimisation of a step stops early: 1e-5 + 2e-5 i at 50 steps.

    Source: nulltext, released code
    """
    return 1e-5 + step * RELEASED_STEPS / steps * 2e-5


def null_text_loss(latent: Tensor, target: Tensor, sigma: Tensor, flow: bool = False) -> Tensor:
    """[B]: mean squared error between a denoising step's result [B,C,H,W] at sigma and the inversion's latent there, in
    the network's scale.

    Source: nulltext, Eq. 3
    """
    scale = 1.0 if flow else 1 / (1 + sigma**2)
    return (latent - target).square().flatten(1).mean(1) * scale
