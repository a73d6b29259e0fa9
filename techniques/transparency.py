"""Colours of transparent pictures, as LayerDiffuse prepares them."""
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

FACTOR = 1.2


def extend_colours(colour: Tensor, alpha: Tensor) -> Tensor:
    """Colours [B,3,H,W] that run on smoothly where alpha [B,1,H,W] is below one, so that no edge shows where opacity ends; 0..1.

    Opaque pixels keep their colour; a picture without any opaque pixel becomes its mean, black.
    Source: layerdiffuse, Sec. 3.1 (padded RGB: an alpha pyramid, each level 1.2 times smaller).
    """
    levels = [(colour * alpha, alpha)]
    while min(levels[-1][1].shape[-2:]) > 1:
        size = [max(1, int(side / FACTOR)) for side in levels[-1][1].shape[-2:]]
        levels.append(tuple(F.interpolate(part, size=size, mode="area") for part in levels[-1]))
    premultiplied, opacity = levels[-1]
    filled = premultiplied.sum((2, 3), keepdim=True) / opacity.sum((2, 3), keepdim=True).clamp_min(1e-6)
    for premultiplied, opacity in reversed(levels):
        filled = F.interpolate(filled, size=opacity.shape[-2:], mode="bilinear") * (1 - opacity) + premultiplied
    return filled


def over_gray(colour: Tensor, alpha: Tensor) -> Tensor:
    """[B,3,H,W]: straight colours in 0..1 laid over mid gray, which is what the autoencoder is shown.

    Source: layerdiffuse, Sec. 3.1, (2 rgb - 1) alpha in the autoencoder's range of -1..1.
    """
    return 0.5 + (colour - 0.5) * alpha
