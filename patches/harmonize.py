"""Information Retained Harmonization: layers encoded, sampled together and decoded. In a range of noise levels the
layers are put back at every step, after it the model is free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from einops import rearrange
from torch import Tensor

from ..techniques.diffusion import sigma_of_noise
from ..techniques.feature_guidance import masks_at_level
from ..techniques.geometry import rasterise
from ..techniques.harmonization import (
    band,
    colours_and_alphas,
    fuse_latents,
    harmonised_layers,
    harmonised_picture,
    keep_detail,
    on_canvas,
    visible_shares,
)
from ..techniques.inversion import ode_step
from ..techniques.layers import LayerStack
from . import autoencoder
from .inversion import Inversion, noise_levels


class HarmonizingSampler(comfy.samplers.Sampler):
    """Fuses while the noise is at least `until`, with Euler's steps; a stock sampler does the rest.

    foregrounds: [K,C,...,h,w] as an autoencoder makes them. alphas: [K,1,h,w], back to front. retained: [1+K,C,h,w] at
    a noise level, background first, in the model's scale, instead of noise on the layers.
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


def level(model: ModelPatcher, percent: float, noise: float) -> float:
    """The sigma of a model at a percent of its sampling, or, with noise above 0, at that share of noise."""
    sampling = model.get_model_object("model_sampling")
    if noise == 0:
        return float(sampling.percent_to_sigma(percent))
    flow = isinstance(sampling, comfy.model_sampling.CONST)
    return min(sigma_of_noise(noise, flow, getattr(sampling, "sigma_data", 1.0)), float(sampling.sigma_max))


def remaining_sigmas(
    model: ModelPatcher,
    steps: int,
    sampler_name: str,
    scheduler: str,
    start_percent: float,
    start_noise: float = 0.0,
    socket: str = "start_percent",
) -> Tensor:
    """The noise levels of a whole denoising that come after start_percent, or, with start_noise above 0, that level and
    those below it. Raises ValueError, naming the socket, when no step is left.
    """
    start = level(model, start_percent, start_noise)
    sigmas = noise_levels(model, steps, scheduler, sampler_name)
    if start_noise:  # a schedule's own next level may be far below
        return torch.cat([sigmas.new_tensor([start]), sigmas[sigmas < start * (1 - 1e-4)]])
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
    start_noise: float = 0.0,
    end_noise: float = 0.0,
) -> Tensor:
    """The harmonised latent [1,C,...,h,w].

    background: [1,C,...,h,w]. foregrounds: [K,C,...,h,w]. alphas: [K,1,H,W] in pixels. The noise added is that of
    start_percent of the sampling, and the layers are put back until end_percent; start_noise and end_noise above 0 take
    their places, see `level`. retained: see HarmonizingSampler.
    """
    background, foregrounds = (
        comfy.sample.fix_empty_latent_channels(model, latents) for latents in (background, foregrounds)
    )
    sigmas = remaining_sigmas(model, steps, sampler_name, scheduler, start_percent, start_noise)
    until = level(model, end_percent, end_noise)
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


@dataclass(frozen=True)
class Harmonised:
    """The visible layers of a stack, their colours [N,3,H,W] and alphas [N,1,H,W] on the canvas, what was drawn of them
    [1,3,H,W], and its latent. relight, feather: see techniques.harmonization.
    """

    stack: LayerStack
    colours: Tensor
    alphas: Tensor
    drawn: Tensor
    latent: Tensor

    def picture(self, relight: bool = False, feather: float = 2.0) -> Tensor:
        """[1,H,W,3|4]"""
        return harmonised_picture(self.colours, self.alphas, self.drawn, relight, feather)

    def layers(self, relight: bool = False) -> LayerStack:
        return harmonised_layers(self.stack, self.colours, self.alphas, self.drawn, relight)


def harmonize_layers(
    model: ModelPatcher,
    positive,
    negative,
    vae,
    stack: LayerStack,
    seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    start_percent: float,
    end_percent: float,
    detail: float = 0.0,
    retained: Inversion | None = None,
    reach: float = 0.0,
    start_noise: float = 0.0,
    end_noise: float = 0.0,
) -> Harmonised:
    """The visible layers of a stack encoded, harmonised and decoded.

    detail: keep_detail's radius, 0 for none. reach: of the band around the things that the background may change in, as
    a share of the canvas's longer side, 0 for all of it. retained: the trajectory of all layers, hidden ones too.
    start_noise, end_noise: see harmonize.
    Raises ValueError naming layers, retained or start_percent.
    """
    side = vae.spacial_compression_encode()
    trajectory = None if retained is None else _retained(retained, stack, side)
    stack = _shown(stack)
    colours, alphas = colours_and_alphas(stack)
    pixels = rearrange(_padded(colours, side), "n c h w -> n h w c")
    latents = [autoencoder.encode(vae, image) for image in pixels.split(1)]
    latent = harmonize(
        model,
        positive,
        negative,
        latents[0],
        torch.cat(latents[1:]),
        _padded(alphas[1:], side),
        seed,
        steps,
        cfg,
        sampler_name,
        scheduler,
        start_percent,
        end_percent,
        lambda count: latent_preview.prepare_callback(model, count),
        trajectory,
        start_noise,
        end_noise,
    )
    drawn = _decoded(vae, latent, stack.canvas)
    free = visible_shares(alphas[1:])[0]
    if detail:
        same = _decoded(vae, latents[0], stack.canvas)
        drawn = torch.lerp(drawn, keep_detail(colours[:1], drawn, same, free[None], detail), free)
    if reach:
        drawn = torch.lerp(colours[:1], drawn, band(1 - free, reach * max(stack.canvas)))
    return Harmonised(stack, colours, alphas, drawn, latent)


def _shown(stack: LayerStack) -> LayerStack:
    """The visible layers. Raises ValueError for fewer than two, for blend modes, and for layers without transparency in
    front.
    """
    stack = stack.with_layers(layer for layer in stack.layers if layer.visible)
    if len(stack.layers) < 2:
        raise ValueError(
            f"layers: there are {len(stack.layers)} visible layers; harmonising needs a background and at least one "
            "thing in front of it."
        )
    for layer in stack.layers[1:]:
        if layer.blend_mode != "normal":
            raise ValueError(
                f"layers: layer {layer.name!r} has the blend mode {layer.blend_mode!r}, and latents can only be laid "
                "over each other; merge it with the layer behind it (Order layers), or set it to normal."
            )
        if (rasterise(layer, stack.canvas)[..., 3] >= 1).all():
            raise ValueError(
                f"layers: layer {layer.name!r} covers the whole canvas and has no transparent pixel, so nothing behind "
                "it would be seen; give it an alpha or a mask."
            )
    return stack


def _retained(trajectory: Inversion, stack: LayerStack, side: int) -> Callable[[float], Tensor]:
    """[1+K,C,h,w] of the visible layers at a noise level, where they lie on the canvas. Raises ValueError for a
    trajectory of other layers.
    """
    count, (height, width) = trajectory.latents.shape[1], trajectory.latents.shape[-2:]
    if count != len(stack.layers):
        raise ValueError(
            f"retained: it is the way of {count} latents and layers has {len(stack.layers)}; connect layers and path "
            "of the same run."
        )
    for layer in stack.layers:
        own = layer.image.shape[:2]
        if tuple(-(-length // side) for length in own) != (height, width):
            raise ValueError(
                f"retained: its latents are of {width * side}×{height * side} pixels and layer {layer.name!r} is "
                f"{own[1]}×{own[0]}; connect layers and path of the same run."
            )
    rows = rearrange(trajectory.latents, "level row ... h w -> row (level ...) h w")
    inner = trajectory.latents[:, 0, ..., 0, 0].shape  # level, channel, and the frame axis of some families
    placed = [
        on_canvas(latents, layer, stack.canvas, side).unflatten(0, inner)
        for latents, layer in zip(rows, stack.layers, strict=True)
        if layer.visible
    ]
    return replace(trajectory, latents=torch.stack(placed, 1)).at


def _padded(pixels: Tensor, side: int) -> Tensor:
    """Edges repeated to the right and below, up to whole latent pixels."""
    height, width = pixels.shape[-2:]
    return F.pad(pixels, (0, -width % side, 0, -height % side), mode="replicate")


def _decoded(vae, latent: Tensor, canvas: tuple[int, int]) -> Tensor:
    """[1,3,H,W] of the first frame, cut to the canvas: a stack is harmonised as one opaque image."""
    pixels = autoencoder.decode(vae, latent)[:1, : canvas[1], : canvas[0], :3]
    return rearrange(pixels, "b h w c -> b c h w")
