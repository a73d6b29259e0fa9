"""Information Retained Harmonization: layers fused while they are denoised, so that the model draws shadows and light
that belong together.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import rasterise
from .layers import Layer


def visible_shares(alphas: Tensor) -> tuple[Tensor, Tensor]:
    """What of each layer is seen: background [1,H,W] and foregrounds [K,1,H,W], which sum to one; alphas: [K,1,H,W],
    back to front, 1 = opaque.

    Source: dreamlayer, Eq. 1 and 12, the weights of the sum.
    """
    clear = torch.cat([1 - alphas, torch.ones_like(alphas[:1])])
    behind = clear.flip(0).cumprod(0).flip(0)  # behind[i]: the product over the layers from i to the front
    return behind[0], alphas * behind[1:]


def fuse_latents(background: Tensor, foregrounds: Tensor, alphas: Tensor) -> Tensor:
    """[...,h,w]: the background's latent [...,h,w] with the foregrounds' [K,...,h,w] over it, all at one noise level;
    alphas: [K,1,h,w], back to front.

    Source: dreamlayer, Eq. 12.
    """
    free, shares = visible_shares(alphas)
    shares = shares.reshape(-1, *[1] * (background.ndim - 2), *shares.shape[-2:])
    return background * free + (foregrounds * shares).sum(0)


def on_canvas(latent: Tensor, layer: Layer, canvas: tuple[int, int], side: int) -> Tensor:
    """[C,⌈H/side⌉,⌈W/side⌉]: a latent [C,h,w] of the layer's own pixels, side × side of them in each, where the layer
    lies on the canvas (W, H).

    Each takes the one that lies nearest, since a mean of several would have less noise than its noise level says. Where
    the layer is not, anything.
    Source: dreamlayer, Eq. 13, op(·) of a latent: moved, resized, flipped, turned
    """
    height, width = layer.image.shape[:2]
    y, x = torch.meshgrid(*((torch.arange(length) + 0.5) / length for length in (height, width)), indexing="ij")
    origins = rasterise(replace(layer, image=torch.stack([x, y, x], -1), mask=None, opacity=1.0), canvas).permute(
        2, 0, 1
    )
    origins = F.pad(origins, (0, -canvas[0] % side, 0, -canvas[1] % side), mode="replicate")
    origins = F.avg_pool2d(torch.cat([origins[:2] * origins[3:], origins[3:]]), side)
    share = torch.tensor([width / latent.shape[2], height / latent.shape[1]]) / side
    grid = (origins[:2] / origins[2:].clamp_min(1e-6)).permute(1, 2, 0) * share * 2 - 1
    return F.grid_sample(latent[None].float(), grid[None], mode="nearest", padding_mode="border", align_corners=False)[
        0
    ].to(latent)


def feathered(alpha: Tensor, radius: float) -> Tensor:
    """[K,1,H,W]: alpha [K,1,H,W] that fades in from where it begins to itself `radius` pixels further in; 0 leaves it
    as it is.

    Source: ours, for putting pixels back without a seam: alpha times 2·blurred − 1 of where it is above zero.
    """
    if radius <= 0:
        return alpha
    return alpha * (2 * _blurred((alpha > 0).to(alpha), radius / 2, 1.5 * radius) - 1).clamp(0, 1)


def keep_detail(before: Tensor, drawn: Tensor, same: Tensor, seen: Tensor, radius: float) -> Tensor:
    """[1,3,H,W]: the background `before` with what is smoother than `radius` pixels of the way from `same` to `drawn`:
    light and shadow, no texture.

    same: `before` as the autoencoder gives it back; drawn: the harmonised picture; all [1,3,H,W]. seen: [1,1,H,W], 1
    where the background is seen. A rim of
    a third of the radius around things does not count, since models draw them wider than they are and their colours
    would run.
    Source: ours, an autoencoder and a few steps of denoising blur every texture that they touch.
    """
    rim = round(radius / 3)
    seen = 1 - F.max_pool2d(1 - seen, 2 * rim + 1, 1, rim)
    weight = _blurred(seen, radius / 2, 1.5 * radius)
    return before + _blurred((drawn - same) * seen, radius / 2, 1.5 * radius) / weight.clamp_min(1e-4)


def _blurred(image: Tensor, sigma: float, reach: float) -> Tensor:
    """[N,C,H,W] after a Gaussian; edges repeated."""
    reach = max(1, round(reach))
    distance = torch.arange(-reach, reach + 1, device=image.device, dtype=image.dtype)
    weights = torch.exp(-0.5 * (distance / sigma) ** 2)
    weights = weights / weights.sum()
    padded = F.pad(image, [reach] * 4, mode="replicate").flatten(0, 1)[:, None]
    return F.conv2d(F.conv2d(padded, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))[:, 0].unflatten(
        0, image.shape[:2]
    )
