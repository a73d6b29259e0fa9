"""Layers that go on behind nearer ones: what is missing of each, and how what was drawn there is put in."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .depth import push_pull

SEEN = 0.5 / 255  # less cover than this shows in no file of 8 bits
WHOLE = 0.98  # of a pixel: what a layer has and what covers it are all of it, so that the layer goes on there


def missing_behind(alpha: Tensor, cover: Tensor, backmost: bool) -> Tensor:
    """[H,W], 0..1: the alpha that a layer of alpha [H,W] is to get where nearer layers cover it [H,W]; 0 where it stays
    as it is.

    The backmost layer is to be opaque wherever something covers it. Any other is taken for convex: it goes on where
    nearer layers hide all that it lacks of a pixel, as far as the convex hull of what is seen of it reaches.
    Source: ours, the convex hull as the simplest guess of an outline that is hidden
    """
    hidden = cover > SEEN
    wanted = hidden.to(alpha) if backmost else convex_hull(alpha) * (hidden & (alpha + cover >= WHOLE))
    return torch.where(wanted > alpha, wanted, 0)


def convex_hull(alpha: Tensor) -> Tensor:
    """[H,W], 0..1, its edge antialiased: the convex hull of where alpha [H,W] is over 1/2; empty when it is nowhere.

    Source: ours, Andrew's monotone chain over the corners of pixels, then the half-planes that its edges bound
    """
    inside = (alpha > 0.5).cpu()
    rows = inside.any(1).nonzero()[:, 0]
    if not len(rows):
        return torch.zeros_like(alpha)
    width = alpha.shape[1]
    first = inside.int().argmax(1)[rows].tolist()
    last = (width - inside.flip(1).int().argmax(1))[rows].tolist()  # exclusive
    ends = zip(rows.tolist(), first, last, strict=True)
    corners = sorted({(x, y) for row, *both in ends for x in both for y in (row, row + 1)})
    outline = _chain(corners) + _chain(corners[::-1])
    across = torch.arange(width, device=alpha.device, dtype=alpha.dtype) + 0.5
    down = torch.arange(len(alpha), device=alpha.device, dtype=alpha.dtype)[:, None] + 0.5
    hull = torch.ones_like(alpha)
    for (x, y), (further, lower) in zip(outline, outline[1:] + outline[:1], strict=True):
        right, below = further - x, lower - y
        distance = (right * (down - y) - below * (across - x)) / math.hypot(right, below)
        hull = torch.minimum(hull, distance + 0.5)
    return hull.clamp(0, 1)


def _chain(points: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """One half of the hull of points in order, without its last point, which begins the other half."""
    found: list[tuple[int, int]] = []
    for x, y in points:
        while len(found) > 1 and (found[-1][0] - found[-2][0]) * (y - found[-2][1]) <= (found[-1][1] - found[-2][1]) * (
            x - found[-2][0]
        ):
            found.pop()
        found.append((x, y))
    return found[:-1]


def grown(region: Tensor, pixels: int) -> Tensor:
    """[H,W], 0 or 1: where region [H,W] is above 0, and so many pixels around it.

    Source: ours, dilation by a square
    """
    return F.max_pool2d((region > 0).to(region)[None, None], 2 * pixels + 1, 1, pixels)[0, 0]


def matched(drawn: Tensor, image: Tensor, region: Tensor) -> Tensor:
    """[H,W,3]: what was drawn [H,W,3], shifted by what its colours are off from the image [H,W,3] outside of the region
    [H,W]. The median counts, since shadows and rims of what stood there are not to spread.

    Source: ours, the colour drift of an autoencoder
    """
    known = region <= 0
    if not known.any():
        return drawn
    return (drawn + (image - drawn)[known].median(0).values).clamp(0, 1)


def filled_in(pixels: Tensor, drawn: Tensor, added: Tensor) -> Tensor:
    """[H,W,4]: a layer [H,W,4], straight alpha, that has alpha `added` [H,W] where that is above 0, what it lacks of it
    in the colours that were drawn [H,W,3]. All other pixels, and those that are opaque, stay as they are.

    Source: ours, the layer's own share over what was drawn
    """
    alpha = pixels[..., 3]
    own = (alpha / added.clamp(min=1e-6)).clamp(0, 1)[..., None]
    whole = torch.cat([own * pixels[..., :3] + (1 - own) * drawn, added[..., None]], -1)
    return torch.where((added > alpha)[..., None], whole, pixels)


def continued(image: Tensor, region: Tensor) -> Tensor:
    """[H,W,3]: an image [H,W,3] whose colours go on smoothly into the region [H,W].

    Source: ours, push-pull interpolation (Gortler et al. 1996, The Lumigraph, Sec. 3.4).
    """
    known = rearrange((region <= 0).to(image), "h w -> 1 1 h w")
    return push_pull(image[None, None], known)[0, 0]
