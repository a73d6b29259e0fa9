"""LayeringDiff's FBDD: a diffusion UNet whose first convolution sees the noisy latent, the image's latent and the cells
of alpha.
"""

from __future__ import annotations

import torch
from torch import Tensor

LATENT, CELLS = 4, 64
CHANNELS = 2 * LATENT + CELLS
LAYERS = ("foreground", "background")
NULL, ALIGNMENT = "null_prompt", "alignment"  # keys of a published file beside the layers'


def first_weight(weight: Tensor) -> Tensor:
    """[C,72,3,3] of an inpainting model's [C,9,3,3], whose inputs are the noisy latent, the mask and the masked image.

    The image's latent enters as the masked image did, and every cell of alpha as a 64th of the mask, so that a mask
    that is constant in each cell gives what the inpainting model gives.
    Source: layeringdiff, Sec. 3.3 (FBDD's inputs)
    Differs: the paper does not say how the new channels start.
    """
    noisy, mask, masked = weight.split([LATENT, 1, LATENT], 1)
    return torch.cat([noisy, masked, mask.expand(-1, CELLS, -1, -1) / CELLS], 1)


def condition(latent: Tensor, cells: Tensor, layer: str) -> Tensor:
    """[B,68,h,w] that goes in behind the noisy latent: the image's latent, and what is to be filled.

    cells: [B,64,h,w] of alpha. The background is filled where alpha is 1, the foreground where it is 0.
    Source: layeringdiff, Sec. 3.3 (FBDD's inputs)
    Differs: the foreground's network sees 1 - alpha, so that both start as the inpainting model.
    """
    return torch.cat([latent, cells if layer == "background" else 1 - cells], 1)


def published_form(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What one layer's denoiser has learnt, of the weights of training/layeringdiff.py's Denoiser: the first
    convolution and low-rank terms by diffusers' names as PEFT calls them, or all of it where there are none.
    """
    published = {}
    low_rank = any(".lora_" in key for key in state)
    for key, value in state.items():
        name = key.removeprefix("unet.")
        if not low_rank or name.startswith("conv_in.") or ".lora_" in name:
            published[name.replace(".default.", ".")] = value
    return published
