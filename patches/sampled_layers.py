"""What a run of layers takes and gives: the trajectory that it follows, one latent of all rows, each picture's own
trajectory, and the decoded layers.
"""

from __future__ import annotations

from collections.abc import Callable

import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from einops import rearrange
from torch import Tensor

from ..techniques.layers import Layer, LayerStack
from ..techniques.shared_layers import map_alphas
from . import autoencoder, transparent_latents
from .inversion import Inversion
from .kept import Record
from .shared_layers import TRAJECTORY, layer_count


def sample_along(
    layered: ModelPatcher,
    trajectory: Inversion,
    count: int,
    positive: list,
    negative: list,
    cfg: float,
    sigmas: Tensor,
    callback: Callable,
) -> Tensor:
    """[count,C,...,h,w]: layers from the noise of a picture's trajectory down to none, with DDIM, while the whole
    picture follows the trajectory. layered: a clone, which gets it.
    """
    layered.model_options["transformer_options"][TRAJECTORY] = trajectory.at
    start = trajectory.latents[0].repeat_interleave(count, 0)
    nothing = torch.zeros_like(start)
    # ComfyUI scales noise at the highest level by sqrt(1 + sigma²), 1.0023 times as loud as the trajectory; a
    # latent it leaves alone
    to_vae_scale = layered.model.process_latent_out
    noise, latent = (start / sigmas[0], nothing) if trajectory.flow else (nothing, to_vae_scale(start))
    return comfy.sample.sample_custom(
        layered,
        noise,
        cfg,
        comfy.samplers.sampler_object("euler"),
        sigmas,
        positive,
        negative,
        latent,
        callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
    )


def all_rows(branches: list[dict]) -> dict:
    """One LATENT of every branch of the first latent, then of the next. Numbers of the batch would name rows that are
    not there any more.
    """
    latent = {key: value for key, value in branches[0].items() if key != "batch_index"}
    if "noise_mask" in latent:
        mask = comfy.utils.repeat_to_batch_size(latent["noise_mask"], len(branches[0]["samples"]))
        latent["noise_mask"] = mask.repeat_interleave(len(branches), 0)
    return {**latent, "samples": rearrange([branch["samples"] for branch in branches], "row b ... -> (b row) ...")}


def trajectories(
    model: ModelPatcher, positive: list, recorded: dict[float, Tensor], samples: Tensor, names: list[str]
) -> list[Inversion | None]:
    """The trajectory of each picture's background and objects, from what the model was called with; None when it was
    not called.
    """
    sigmas = sorted((sigma for sigma in recorded if sigma > 0), reverse=True)
    rows, flow = layer_count(names), isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.CONST)
    if not sigmas:
        return [None] * (len(samples) // rows)
    last = model.model.process_latent_in(samples).float().cpu()
    steps = [*(recorded[sigma] for sigma in sigmas), last]
    latents = rearrange(steps, "level (b row) ... -> level b row ...", row=rows)
    levels = torch.tensor([*sigmas, 0.0])
    return [Inversion(own[:, : len(names)], levels, positive, "run", flow) for own in latents.unbind(1)]


def decode_layers(vae, names: list[str], latents: list[Tensor], decoder, record: Record) -> list[LayerStack]:
    """One stack per picture from the latents [N,C,...,h,w] of background and objects; what follows them is left alone.

    An object's alpha is the decoder's, without one the autoencoder's, and where that has none the last map. The
    background is opaque.
    """
    background, *objects = (autoencoder.decode(vae, latent) for latent in latents[: len(names)])
    background = background[..., :3]
    if decoder is not None or not autoencoder.has_alpha(vae):
        objects = [_with_alpha(pixels, latents, decoder, record, number) for number, pixels in enumerate(objects)]
    canvas = background.shape[2], background.shape[1]
    return [
        LayerStack(canvas, tuple(Layer(pixels, name or "background") for name, pixels in zip(names, own, strict=True)))
        for own in zip(background, *objects, strict=True)
    ]


def _with_alpha(pixels: Tensor, latents: list[Tensor], decoder, record: Record, number: int) -> Tensor:
    """[N,H,W,4] of the object of this number, counted from the farthest one."""
    colour = pixels[..., :3]
    if decoder is None:
        alpha = map_alphas(record.steps[-1], colour.shape[1:3])[:, number, ..., None].to(colour)
        return torch.cat([colour, alpha], -1)
    latent = transparent_latents.check_latent({"samples": latents[1 + number]}, decoder)
    decoded = transparent_latents.decode(decoder, rearrange(colour, "b h w c -> b c h w"), latent)
    return rearrange(torch.cat(decoded, 1), "b c h w -> b h w c")
