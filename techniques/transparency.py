"""Colours of transparent pictures, as LayerDiffuse prepares them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FACTOR = 1.2
PASSES = {
    8: [(flip, turns) for flip in (False, True) for turns in range(4)],
    4: [(False, 0), (False, 2), (True, 1), (True, 3)],
    2: [(False, 0), (True, 2)],
    1: [(False, 0)],
}


def extend_colours(colour: Tensor, alpha: Tensor) -> Tensor:
    """Colours [B,3,H,W] that run on smoothly where alpha [B,1,H,W] is below one, so that no edge shows where opacity
    ends; 0..1.

    Opaque pixels keep their colour; a picture that is transparent everywhere becomes black.
    Source: layerdiffuse, Sec. 3.1 (padded RGB: an alpha pyramid, each level 1.2 times smaller).
    """
    levels: list[tuple[Tensor, ...]] = [(colour * alpha, alpha)]
    while min(levels[-1][1].shape[-2:]) > 1:
        size = [max(1, int(side / FACTOR)) for side in levels[-1][1].shape[-2:]]
        levels.append(tuple(_area_mean(_area_mean(part, size[0], 2), size[1], 3) for part in levels[-1]))
    premultiplied, opacity = levels[-1]
    filled = premultiplied.sum((2, 3), keepdim=True) / opacity.sum((2, 3), keepdim=True).clamp_min(1e-6)
    for premultiplied, opacity in reversed(levels):
        filled = F.interpolate(filled, size=opacity.shape[-2:], mode="bilinear") * (1 - opacity) + premultiplied
    return filled


def _area_mean(values: Tensor, size: int, dim: int) -> Tensor:
    """Means over `size` equal parts of an axis, pixels at their borders counted by the share that lies inside:
    differences of the integral.
    """
    old = values.shape[dim]
    edges = torch.arange(size + 1, dtype=torch.float64, device=values.device) * old / size
    cells = edges.floor().long().clamp_max(old - 1)
    shape = [-1 if axis == dim else 1 for axis in range(values.ndim)]
    before = (values.double().cumsum(dim) - values).index_select(dim, cells)
    integral = before + values.index_select(dim, cells) * (edges - cells).view(shape)
    return (integral.diff(dim=dim) * (size / old)).to(values)


def over_gray(colour: Tensor, alpha: Tensor) -> Tensor:
    """[B,3,H,W]: straight colours in 0..1 laid over mid gray, which is what the autoencoder is shown.

    Source: layerdiffuse, Sec. 3.1, (2 rgb - 1) alpha in the autoencoder's range of -1..1.
    """
    return 0.5 + (colour - 0.5) * alpha


def turned(values: Tensor, flip: bool, quarters: int = 0) -> Tensor:
    """Pictures [...,H,W] mirrored left to right, or not, and then turned by so many quarters, counterclockwise.

    Source: layerdiffuse, as published: the views that its decoder's passes see
    """
    return torch.rot90(values.flip(-1) if flip else values, quarters, (-2, -1))


def median_of_passes(
    decode: Callable[[Tensor, Tensor], Tensor], image: Tensor, latent: Tensor, passes: int = 8
) -> Tensor:
    """[B,4,H,W] in 0..1: what decode(image [B,3,H,W], latent [B,C,H/8,W/8]) finds in mirrored and turned copies, turned
    back, their median.

    Source: layerdiffuse, as published: two flips times four quarter turns, of eight values the lower middle one.
    Differs: two and four passes take the mean of the middle two, since the lower one of few is too transparent.
    """
    results = []
    for flip, turns in PASSES[passes]:
        out = turned(decode(*(turned(part, flip, turns) for part in (image, latent))).clamp(0, 1), False, -turns)
        results.append(turned(out, flip))
    ordered = torch.stack(results).sort(0).values
    return ordered[3] if passes == 8 else ordered[(passes - 1) // 2 : passes // 2 + 1].mean(0)


def clean_alpha(alpha: Tensor, veil: float = 10 / 255, speck: float = 0.02) -> Tensor:
    """Alpha [B,1,H,W] in 0..1 without what a decoder leaves beside the object: a faint veil, and specks apart from it.

    A part is what holds together above `veil`; parts with less than the share `speck` of the largest one's sum go. What
    stays keeps its own values and one pixel of its fading edge. A picture that is nowhere above the veil stays as it
    is.
    Source: ours, what a small decoder is unsure of is no part of the object.
    """
    from scipy import ndimage

    cleaned = []
    for one in alpha[:, 0]:
        values = one.cpu().double().numpy()
        labels, count = ndimage.label(values > veil, structure=[[1] * 3] * 3)
        if count:
            sums = ndimage.sum(values, labels, range(1, count + 1))
            numbers = 1 + (sums >= speck * sums.max()).nonzero()[0]
            kept = torch.from_numpy(ndimage.binary_dilation(np.isin(labels, numbers), [[1] * 3] * 3))
            one = one * kept.to(one)
        cleaned.append(one)
    return torch.stack(cleaned)[:, None]


def clean_colours(colour: Tensor, alpha: Tensor) -> Tensor:
    """[B,3,H,W]: colours in 0..1 as they are where alpha [B,1,H,W] is above zero, continued from there where it is
    zero.

    Source: ours, a resized or blurred cut-out then has no fringe of colours that were never seen.
    """
    return torch.where(alpha > 0, colour, extend_colours(colour, alpha))
