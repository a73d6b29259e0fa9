"""Several pictures of every latent, sampled as one batch in which they stand next to each other."""
from __future__ import annotations

import comfy.sample
import comfy.utils
import latent_preview
from comfy.model_patcher import ModelPatcher


def sample_branches(model: ModelPatcher, positive: list, count: int, negative: list, latent_image: dict, seed: int, steps: int, cfg: float,
                    sampler_name: str, scheduler: str, denoise: float, same_noise: bool = False) -> list[dict]:
    """One LATENT per branch. positive: with a row per branch, which the host repeats over the batch. same_noise: the branches of a latent share theirs."""
    latents = comfy.sample.fix_empty_latent_channels(model, latent_image["samples"])
    numbers, mask = latent_image.get("batch_index"), latent_image.get("noise_mask")
    if same_noise:  # the host draws equal noise for equal numbers
        numbers = [number for number in numbers or range(len(latents)) for _ in range(count)]
    elif numbers is not None:
        numbers = [number * count + branch for number in numbers for branch in range(count)]
    if mask is not None:
        mask = comfy.utils.repeat_to_batch_size(mask, len(latents)).repeat_interleave(count, 0)
    start = latents.repeat_interleave(count, 0)
    samples = comfy.sample.sample(
        model, comfy.sample.prepare_noise(start, seed, numbers), steps, cfg, sampler_name, scheduler, positive, negative, start, denoise=denoise,
        noise_mask=mask, callback=latent_preview.prepare_callback(model, steps), disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED, seed=seed)
    return [{**latent_image, "samples": samples[branch::count]} for branch in range(count)]
