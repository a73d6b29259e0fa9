"""Information Retained Harmonization as a sampler: in a range of noise levels the layers are put back at every step,
after it the model is free.
"""

from __future__ import annotations

from collections.abc import Callable

import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..techniques.feature_guidance import masks_at_level
from ..techniques.harmonization import fuse_latents
from ..techniques.inversion import ode_step


class HarmonizingSampler(comfy.samplers.Sampler):
    """Fuses while the noise is at least `until`, with Euler's steps; a stock sampler does the rest.

    foregrounds: [K,C,...,h,w] as an autoencoder makes them. alphas: [K,1,h,w], back to front. retained: [1+K,C,h,w] at
    a noise level, background
    first, in the model's scale, instead of noise on the layers.
    """

    def __init__(
        self,
        rest: comfy.samplers.Sampler,
        foregrounds: Tensor,
        alphas: Tensor,
        until: float,
        retained: Callable[[float], Tensor] | None = None,
    ):
        self.rest, self.foregrounds, self.alphas, self.until, self.retained = rest, foregrounds, alphas, until, retained

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        model, steps = model_wrap.inner_model, len(sigmas) - 1
        fused = int((sigmas[:-1] >= self.until).sum())
        if fused == 0:
            return self.rest.sample(
                model_wrap, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar
            )
        foregrounds = model.process_latent_in(self.foregrounds.to(latent_image))
        alphas = self.alphas.to(latent_image)
        pinned = comfy.samplers.KSamplerX0Inpaint(model_wrap, sigmas)
        pinned.latent_image, pinned.noise = latent_image, noise
        extra_args["denoise_mask"] = denoise_mask
        full = self.max_denoise(model_wrap, sigmas)

        def layers(step: int) -> Tensor:
            """[1+K,1,C,...,h,w]"""
            if self.retained is not None:
                return self.retained(float(sigmas[step]))[:, None].to(latent_image)
            clean = [latent_image, *(layer[None] for layer in foregrounds)]
            return torch.stack(
                [
                    model.model_sampling.noise_scaling(sigmas[step], noise.clone(), layer, full and step == 0)
                    for layer in clean
                ]
            )

        x = None
        for step in range(fused):
            background, *kept = layers(step)
            x = fuse_latents(background if x is None else x, torch.stack(kept), alphas)
            clean = pinned(x, sigmas[step] * x.new_ones(len(x)), **extra_args)
            if callback is not None:
                callback(step, clean, x, steps)
            x = ode_step(x, x, clean, sigmas[step], sigmas[step], sigmas[step + 1])
        if fused == steps:
            return model.model_sampling.inverse_noise_scaling(sigmas[-1], x)
        go_on = None if callback is None else lambda i, clean, x, total: callback(fused + i, clean, x, steps)
        left = model.model_sampling.inverse_noise_scaling(sigmas[fused], x)
        return self.rest.sample(
            model_wrap, sigmas[fused:], extra_args, go_on, torch.zeros_like(noise), left, denoise_mask, disable_pbar
        )


def remaining_sigmas(
    model: ModelPatcher,
    steps: int,
    sampler_name: str,
    scheduler: str,
    start_percent: float,
    socket: str = "start_percent",
) -> Tensor:
    """The noise levels of a whole denoising that come after start_percent. Raises ValueError, naming the socket, when
    no step is left.
    """
    start = float(model.get_model_object("model_sampling").percent_to_sigma(start_percent))
    sigmas = comfy.samplers.KSampler(
        model, steps, model.load_device, sampler_name, scheduler, 1.0, model_options=model.model_options
    ).sigmas
    sigmas = sigmas[int((sigmas[:-1] > start * (1 + 1e-4)).sum()) :]
    if len(sigmas) < 2:
        raise ValueError(
            f"{socket}: no step of {steps} is left after {start_percent}; start earlier or take more steps."
        )
    return sigmas


def harmonize(
    model: ModelPatcher,
    positive,
    negative,
    background: Tensor,
    foregrounds: Tensor,
    alphas: Tensor,
    seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    start_percent: float,
    end_percent: float,
    callback,
    retained: Callable[[float], Tensor] | None = None,
) -> Tensor:
    """The harmonised latent [1,C,...,h,w].

    background: [1,C,...,h,w]. foregrounds: [K,C,...,h,w]. alphas: [K,1,H,W] in pixels. The noise added is that of
    start_percent
    of the sampling, and the layers are put back until end_percent. retained: see HarmonizingSampler.
    """
    background = comfy.sample.fix_empty_latent_channels(model, background)
    sigmas = remaining_sigmas(model, steps, sampler_name, scheduler, start_percent)
    until = float(model.get_model_object("model_sampling").percent_to_sigma(end_percent))
    alphas = masks_at_level(alphas[:, 0], background.shape[-2:])[:, None]
    sampler = HarmonizingSampler(comfy.samplers.sampler_object(sampler_name), foregrounds, alphas, until, retained)
    return comfy.sample.sample_custom(
        model,
        comfy.sample.prepare_noise(background, seed),
        cfg,
        sampler,
        sigmas,
        positive,
        negative,
        background,
        callback=callback(len(sigmas) - 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
