"""BFS's formulas: where a foreground is to stand, its losses, and the layers that it learns from."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-6


def box_of(mask: Tensor) -> Tensor:
    """Masks [B,H,W] -> 1 in the smallest upright box around what is above 1/2, 0 elsewhere. An empty one stays empty.

    Source: bfs, Sec. 3 (bounding box mask)
    """
    inside = mask > 0.5
    rows, columns = (_spanned(inside.any(axis)) for axis in (2, 1))
    return (rows[:, :, None] & columns[:, None, :]).to(mask)


def _spanned(inside: Tensor) -> Tensor:
    """[B,N]: true from the first true place to the last."""
    counted = inside.int()
    return (counted.cumsum(1) > 0) & (torch.flip(torch.flip(counted, [1]).cumsum(1), [1]) > 0)


def clean_estimate(noisy: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """The clean latents [B,C,h,w] that follow from noisy ones at sigma [B], 0..1, and their velocity, noise - latent.

    Source: bfs, Eq. 6 (one-step denoised estimates)
    """
    return noisy - sigma.view(-1, 1, 1, 1) * velocity


def composition_loss(composed: Tensor, composite: Tensor) -> Tensor:
    """Mean absolute difference between foreground and background laid together and the composite, latents [B,C,h,w]; a
    scalar.

    Source: bfs, Eq. 6
    """
    return (composed - composite).abs().mean()


def opacity_with_shadow(black: Tensor, shadowed: Tensor, alpha: Tensor) -> Tensor:
    """Opacity [B,1,H,W] of an object and its shadow together; all values in 0..1.

    black: [B,3,H,W], the object on black. shadowed: [B,3,H,W], the object with its shadow on white. alpha: [B,1,H,W]
    of the object alone.
    Source: bfs, Eq. 10-12
    Differs: the mean over the colours, which the text leaves open, and never less than the object's own alpha.
    """
    opacity = (black + 1 - shadowed).mean(1, keepdim=True)
    return torch.maximum(opacity.clamp(max=1), alpha)


def colour_with_shadow(shadowed: Tensor, alpha: Tensor) -> Tensor:
    """Straight colours [B,3,H,W] of an object and its shadow, from both on white [B,3,H,W] and their opacity
    [B,1,H,W].

    Source: bfs, Eq. 14
    Differs: kept within 0..1, and black where there is neither.
    """
    return ((shadowed - (1 - alpha)) / (alpha + EPSILON)).clamp(0, 1)
