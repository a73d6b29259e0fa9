"""Smoothing of images, for what has to fade or to be carried from pixel to pixel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def gaussian_blur(image: Tensor, sigma: float, reach: float) -> Tensor:
    """[B,C,H,W] after a Gaussian of sigma pixels, cut off at reach pixels; edges repeated.

    Source: ours, used by harmonising and by LayeringDiff's exact layers
    """
    reach = max(1, round(reach))
    distance = torch.arange(-reach, reach + 1, device=image.device, dtype=image.dtype)
    weights = torch.exp(-0.5 * (distance / sigma) ** 2)
    weights = weights / weights.sum()
    padded = rearrange(F.pad(image, [reach] * 4, mode="replicate"), "b c h w -> (b c) 1 h w")
    blurred = F.conv2d(F.conv2d(padded, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))
    return rearrange(blurred, "(b c) 1 h w -> b c h w", c=image.shape[1])
