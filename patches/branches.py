"""Several pictures of every latent, sampled as one batch in which they stand next to each other."""
from __future__ import annotations

from collections.abc import Callable

import comfy.sample
import comfy.utils
import latent_preview
from comfy.model_patcher import ModelPatcher
from torch import Tensor


def sample_branches(model: ModelPatcher, positive: list, count: int, negative: list, latent_image: dict, seed: int, steps: int, cfg: float,
                    sampler_name: str, scheduler: str, denoise: float, same_noise: bool = False,
                    visit: Callable[[int, Tensor], None] = lambda step, x: None) -> list[dict]:
    """One LATENT per branch. positive: with a row per branch, which the host repeats over the batch. same_noise: the branches of a latent share theirs.

    visit: is shown each step's batch, [B·count,C,h,w] in the model's scale, before the step changes it.
    """
    latents = comfy.sample.fix_empty_latent_channels(model, latent_image["samples"])
    numbers, mask = latent_image.get("batch_index"), latent_image.get("noise_mask")
    if same_noise:  # the host draws equal noise for equal numbers
        numbers = [number for number in numbers or range(len(latents)) for _ in range(count)]
    elif numbers is not None:
        numbers = [number * count + branch for number in numbers for branch in range(count)]
    if mask is not None:
        mask = comfy.utils.repeat_to_batch_size(mask, len(latents)).repeat_interleave(count, 0)
    start, preview = latents.repeat_interleave(count, 0), latent_preview.prepare_callback(model, steps)

    def callback(step: int, denoised: Tensor, x: Tensor, total: int) -> None:
        visit(step, x)
        preview(step, denoised, x, total)

    samples = comfy.sample.sample(
        model, comfy.sample.prepare_noise(start, seed, numbers), steps, cfg, sampler_name, scheduler, positive, negative, start, denoise=denoise,
        noise_mask=mask, callback=callback, disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED, seed=seed)
    return [{**latent_image, "samples": samples[branch::count]} for branch in range(count)]
