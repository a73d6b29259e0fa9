"""Transparency read out of latents and written into them, in ComfyUI's devices, memory and number formats."""

from __future__ import annotations

import comfy.model_management
import comfy.utils
import torch
import torch.nn.functional as F
from comfy.ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from comfy.model_patcher import ModelPatcher
from einops import rearrange
from torch import Tensor

from ..techniques.transparency import clean_alpha, clean_colours, extend_colours, median_of_passes, over_gray
from . import autoencoder
from .transparency import Transparency

DECODER = "a decoder such as vae_transparent_decoder.safetensors"
MINI = "Strata mini"
CLEAN = ("auto", "on", "off")
STRIDE = 8  # pixels per latent pixel
OVERLAP = 8  # latent pixels over which tiles fade into each other


def decode(
    transparency: Transparency, image: Tensor, latent: Tensor, passes: int = 8, tile: int = 0, clean: str = CLEAN[0]
) -> tuple[Tensor, Tensor]:
    """image: [B,3,8h,8w] in 0..1; latent: [B,C,h,w] in the autoencoder's own space, as LATENT has it -> straight
    colours [B,3,·,·], alpha [B,1,·,·].

    tile: sides in pixels of the parts that are decoded alone, 0 for the whole picture.
    clean: whether veil and specks go (techniques.transparency.clean_alpha); auto is on for the mini family, whose small
    decoder leaves some.
    """
    patcher = transparency.part("decoder", DECODER)
    device, dtype = _load(patcher, min(image[0, 0].numel(), tile**2 or image[0, 0].numel()), 800)
    multiple = patcher.model.multiple
    height, width = latent.shape[-2:]
    side = max(tile // STRIDE, 2 * OVERLAP) if tile else max(height, width)
    progress = comfy.utils.ProgressBar(
        len(latent) * passes * comfy.utils.get_tiled_scale_steps(width, height, side, side, OVERLAP)
    )

    def once(image: Tensor, latent: Tensor) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        out = patcher.model(image, latent)
        progress.update(1)
        return out

    def part(joined: Tensor) -> Tensor:
        """Both at the latent's size in one tensor, so that the host's tiling cuts them alike."""
        latent = joined[:, : -3 * STRIDE**2].to(device, dtype)
        image = F.pixel_shuffle(joined[:, -3 * STRIDE**2 :], STRIDE).to(device, dtype)
        size = image.shape[-2:]
        image = F.pad(image, _padding(size, multiple), mode="replicate")
        latent = F.pad(latent, _padding(latent.shape[-2:], multiple // STRIDE), mode="replicate")
        return median_of_passes(once, image, latent, passes)[..., : size[0], : size[1]].float()

    joined = torch.cat([latent.float(), F.pixel_unshuffle(image, STRIDE).to(latent.device)], 1)
    out = comfy.utils.tiled_scale(
        joined, part, side, side, OVERLAP, STRIDE, 4, comfy.model_management.intermediate_device()
    )
    alpha, colour = (out[:, :1], out[:, 1:]) if transparency.latent["alpha_first"] else (out[:, 3:], out[:, :3])
    if clean == "on" or clean == "auto" and transparency.families == (MINI,):
        alpha = clean_alpha(alpha)
    return torch.cat([clean_colours(*one) for one in zip(colour.split(1), alpha.split(1), strict=True)]), alpha


def check_latent(samples: dict, transparency: Transparency) -> Tensor:
    """The tensor [B,C,h,w] of a LATENT that goes with a decoder. Raises ValueError."""
    latent, settings = samples["samples"], transparency.latent
    if settings is not None and (latent.ndim != 4 or latent.shape[1] != settings["channels"]):
        raise ValueError(
            f"samples: the latent has {latent.shape[1]} channels{' and a frame axis' * (latent.ndim == 5)} and "
            f"{transparency.name} is {transparency.describe()}, which has {settings['channels']}; load the decoder of "
            "the model's family, or leave it out where the VAE has alpha."
        )
    return latent


def encode(transparency: Transparency, vae, colour: Tensor, alpha: Tensor) -> Tensor:
    """colour: [B,3,H,W] in 0..1, alpha: [B,1,H,W] -> [B,C,⌈H/8⌉,⌈W/8⌉] in the autoencoder's own space; sides are filled
    up with transparency.
    """
    patcher, settings = (
        transparency.part("encoder", "an encoder such as vae_transparent_encoder.safetensors"),
        transparency.latent,
    )
    padding = _padding(colour.shape[-2:], STRIDE)
    colour, alpha = F.pad(colour, padding), F.pad(alpha, padding)
    mean, deviation = posterior(vae, over_gray(colour, alpha))
    if mean.shape[1] != settings["channels"]:
        raise ValueError(
            f"vae: it makes latents of {mean.shape[1]} channels and {transparency.name} is {transparency.describe()}; "
            "load the VAE of its family."
        )
    if settings["offset_in_deviations"]:
        if deviation is None:
            raise ValueError(
                f"vae: it gives no deviation, which {transparency.name} scales by; load the full VAE of "
                f"{transparency.family}."
            )
        scale = settings["offset"] * deviation
    else:
        scale = torch.full_like(mean, settings["offset"])
    device, dtype = _load(patcher, colour[0, 0].numel(), 200)
    progress = comfy.utils.ProgressBar(len(colour))
    latents = []
    for index in range(len(colour)):
        comfy.model_management.throw_exception_if_processing_interrupted()
        own, opacity = colour[index : index + 1], alpha[index : index + 1]
        parts = [opacity, extend_colours(own, opacity)]
        offset = patcher.model(torch.cat(parts if settings["alpha_first"] else parts[::-1], 1).to(device, dtype)).to(
            mean
        )
        latents.append(mean[index : index + 1] + scale[index : index + 1] * offset)
        progress.update(1)
    return torch.cat(latents)


def posterior(vae, pictures: Tensor) -> tuple[Tensor, Tensor | None]:
    """pictures: [B,3,H,W] in 0..1 -> mean and deviation of their latents; None as the deviation where the autoencoder
    has none.
    """
    network = vae.first_stage_model
    if not hasattr(network, "regularization"):
        return autoencoder.encode(vae, rearrange(pictures, "b c h w -> b h w c")), None
    comfy.model_management.load_models_gpu(
        [vae.patcher], memory_required=vae.memory_used_encode(pictures[:1].shape, vae.vae_dtype)
    )
    posteriors = []
    for picture in pictures.split(1):
        moments = network.encoder(vae.process_input(picture).to(vae.device, vae.vae_dtype))
        if hasattr(network, "quant_conv"):
            moments = network.quant_conv(moments)
        one = DiagonalGaussianDistribution(moments.float())
        posteriors.append((one.mean.to(vae.output_device), one.std.to(vae.output_device)))
    return tuple(torch.cat(part) for part in zip(*posteriors, strict=True))


def _load(patcher: ModelPatcher, pixels: int, values: int) -> tuple[torch.device, torch.dtype]:
    """Bring a network to its device, with room for that many values per pixel beside it."""
    dtype = next(patcher.model.parameters()).dtype
    comfy.model_management.load_models_gpu([patcher], memory_required=pixels * values * dtype.itemsize)
    return patcher.load_device, dtype


def _padding(size: tuple[int, int], multiple: int) -> tuple[int, int, int, int]:
    height, width = size
    return 0, -width % max(multiple, 1), 0, -height % max(multiple, 1)
