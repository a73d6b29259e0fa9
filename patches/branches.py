"""Several pictures of every latent, sampled as one batch in which they stand next to each other."""

from __future__ import annotations

import math
from collections.abc import Iterable

import comfy.sample
import comfy.utils
import latent_preview
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..techniques.shared_layers import share_noise
from .kept import LEVEL


def sample_branches(
    model: ModelPatcher,
    positive: list,
    count: int,
    negative: list,
    latent_image: dict,
    seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    denoise: float,
    own_noise: float = 1.0,
    seen: dict[float, Tensor] | None = None,
) -> list[dict]:
    """One LATENT per branch. positive: with a row per branch, which the host repeats over the batch. own_noise: how
    much of the noise's
    variance is a branch's own, 0..1; at 0 the branches of a latent have the same.

    seen: gets, for each noise level that the model is called at, the batch [B·count,C,h,w] of the last such call, in
    the model's scale, on the CPU.
    """
    latents = comfy.sample.fix_empty_latent_channels(model, latent_image["samples"])
    mask = latent_image.get("noise_mask")
    if mask is not None:
        mask = comfy.utils.repeat_to_batch_size(mask, len(latents)).repeat_interleave(count, 0)
    start, callback = latents.repeat_interleave(count, 0), latent_preview.prepare_callback(model, steps)
    noise = _noise(start, seed, latent_image.get("batch_index"), count, own_noise)

    if seen is not None:
        model = watched(model, seen)
    samples = comfy.sample.sample(
        model,
        noise,
        steps,
        cfg,
        sampler_name,
        scheduler,
        positive,
        negative,
        start,
        denoise=denoise,
        noise_mask=mask,
        callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    return [{**latent_image, "samples": samples[branch::count]} for branch in range(count)]


def watched(model: ModelPatcher, seen: dict[float, Tensor]) -> ModelPatcher:
    """A clone that keeps what its sampler asks it for. What samplers hand to their callback is not always the latent of
    that step (DEIS).
    """

    def watch(executor, x: Tensor, timestep: Tensor, *args, **kwargs):
        sigma = float(timestep.flatten()[0])
        for level in [level for level in seen if math.isclose(level, sigma, rel_tol=LEVEL)]:
            # Heun's first call at a level is a guess, and its second one the step's latent; DPM-Solver++(2S)'s is a
            # rounding beside it.
            del seen[level]
        seen[sigma] = x.detach().float().cpu().clone()
        return executor(x, timestep, *args, **kwargs)

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "strata_watched", watch)
    return clone


def _noise(start: Tensor, seed: int, numbers: list[int] | None, count: int, own: float) -> Tensor:
    """Noise for `start`, [B·count,C,h,w]. The host draws equal noise for equal numbers, which are the latents' places
    in the batch unless given.
    """
    if own == 1 and numbers is None:
        return comfy.sample.prepare_noise(start, seed)
    numbers = range(len(start) // count) if numbers is None else numbers

    def drawn(a_latent: int, places: Iterable[int]) -> Tensor:
        return comfy.sample.prepare_noise(
            start, seed, [number * a_latent + place for number in numbers for place in places]
        )

    if own in (0, 1):
        return drawn(count, range(count)) if own else drawn(1, [0] * count)
    return share_noise(drawn(count + 1, [0] * count), drawn(count + 1, range(1, count + 1)), own)
