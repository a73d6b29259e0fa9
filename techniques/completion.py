"""Layers continued behind nearer ones: which part of each is missing, and how what was drawn there is put in."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .depth import push_pull

SEEN = 0.5 / 255  # less cover than this shows in no file of 8 bits
WHOLE = 0.98  # where a layer's alpha and the cover sum to this, only the cover hides the layer, which may go on there


def missing_behind(alpha: Tensor, cover: Tensor, backmost: bool) -> Tensor:
    """[H,W], 0..1: the alpha that a layer is to get where nearer layers hide it; 0 where it stays as it is.

    alpha: [H,W] of the layer. cover: [H,W] of all nearer layers together. Both 0..1, 1 = opaque.
    The backmost layer is to be opaque wherever something covers it. Any other is taken for convex: it is continued
    within the convex hull of its visible part, where nearer layers cover all that it lacks of a pixel.
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
    """One half of the hull of sorted points, without its last point, which begins the other half."""
    hull: list[tuple[int, int]] = []
    for x, y in points:
        while len(hull) > 1 and (hull[-1][0] - hull[-2][0]) * (y - hull[-2][1]) <= (hull[-1][1] - hull[-2][1]) * (
            x - hull[-2][0]
        ):
            hull.pop()
        hull.append((x, y))
    return hull[:-1]


def grown(region: Tensor, pixels: int) -> Tensor:
    """[H,W], 0 or 1: where the region [H,W] is above 0, and this many pixels around it.

    Source: ours, dilation by a square
    """
    return F.max_pool2d((region > 0).to(region)[None, None], 2 * pixels + 1, 1, pixels)[0, 0]


def matched(drawn: Tensor, image: Tensor, region: Tensor) -> Tensor:
    """[H,W,3]: what was drawn [H,W,3], shifted by the median difference of its colours from the image [H,W,3] outside
    the region [H,W]. The median, since shadows and rims of what stood there are not to count.

    Source: ours, the colour drift of an autoencoder
    """
    known = region <= 0
    if not known.any():
        return drawn
    return (drawn + (image - drawn)[known].median(0).values).clamp(0, 1)


def filled_in(pixels: Tensor, drawn: Tensor, added: Tensor) -> Tensor:
    """[H,W,4]: a layer [H,W,4], straight alpha, raised to the alpha `added` [H,W] where that is above its own; the
    difference takes the drawn colours [H,W,3]. All other pixels stay as they are.

    Source: ours, the layer's own share over what was drawn
    """
    alpha = pixels[..., 3]
    own = (alpha / added.clamp(min=1e-6)).clamp(0, 1)[..., None]
    filled = torch.cat([own * pixels[..., :3] + (1 - own) * drawn, added[..., None]], -1)
    return torch.where((added > alpha)[..., None], filled, pixels)


def continued(image: Tensor, region: Tensor) -> Tensor:
    """[H,W,3]: an image [H,W,3] whose colours go on smoothly into the region [H,W].

    Source: ours, push-pull interpolation (Gortler et al. 1996, The Lumigraph, Sec. 3.4).
    """
    known = rearrange((region <= 0).to(image), "h w -> 1 1 h w")
    return push_pull(image[None, None], known)[0, 0]
