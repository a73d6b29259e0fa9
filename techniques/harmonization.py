"""Information Retained Harmonization: layers fused while they are denoised, so that the model draws shadows and light
that belong together.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .compositing import left_clear
from .depth import push_pull
from .geometry import rasterise
from .layers import Layer, LayerStack
from .smoothing import gaussian_blur
from .transparency import clean_colours

RIM = 8  # pixels around foregrounds, one latent pixel, in which light_behind does not believe the drawn background


def visible_shares(alphas: Tensor) -> tuple[Tensor, Tensor]:
    """How much of each layer is seen: of the background [1,H,W] and of the foregrounds [K,1,H,W], which sum to one.
    alphas: [K,1,H,W] of the foregrounds, back to front, 1 = opaque; alphas [K,...] likewise give [...] and [K,...].

    Source: dreamlayer, Eq. 1 and 12, the weights of the sum.
    """
    clear = left_clear(alphas)
    return clear[0], alphas * clear[1:]


def fuse_latents(background: Tensor, foregrounds: Tensor, alphas: Tensor) -> Tensor:
    """[...,h,w]: the background's latent [...,h,w] with the foregrounds' [K,...,h,w] over it, all at one noise level;
    alphas: [K,1,h,w], back to front.

    Source: dreamlayer, Eq. 12.
    """
    free, shares = visible_shares(alphas)
    shares = shares.reshape(-1, *[1] * (background.ndim - 2), *shares.shape[-2:])
    return background * free + (foregrounds * shares).sum(0)


def on_canvas(latent: Tensor, layer: Layer, canvas: tuple[int, int], side: int) -> Tensor:
    """[C,⌈H/side⌉,⌈W/side⌉]: a latent [C,h,w] of the layer's own pixels, moved to where the layer lies on the canvas
    (W, H). side: pixels per latent pixel, in each direction.

    Each latent pixel of the canvas takes the nearest one of the layer, since a mean of several would have less noise
    than its noise level says. Beside the layer the values mean nothing.
    Source: dreamlayer, Eq. 13, op(·) of a latent: moved, resized, flipped, turned
    """
    height, width = layer.image.shape[:2]
    y, x = torch.meshgrid(*((torch.arange(length) + 0.5) / length for length in (height, width)), indexing="ij")
    origins = rasterise(replace(layer, image=torch.stack([x, y, x], -1), mask=None, opacity=1.0), canvas)
    origins = F.pad(
        rearrange(origins, "h w c -> c h w"), (0, -canvas[0] % side, 0, -canvas[1] % side), mode="replicate"
    )
    origins = F.avg_pool2d(torch.cat([origins[:2] * origins[3:], origins[3:]]), side)
    share = torch.tensor([width / latent.shape[2], height / latent.shape[1]]) / side
    grid = rearrange(origins[:2] / origins[2:].clamp_min(1e-6), "c h w -> h w c") * share * 2 - 1
    return F.grid_sample(latent[None].float(), grid[None], mode="nearest", padding_mode="border", align_corners=False)[
        0
    ].to(latent)


def feathered(alpha: Tensor, radius: float) -> Tensor:
    """[K,1,H,W]: alpha [K,1,H,W] that fades in from its outline and is itself again `radius` pixels further in; radius
    0 leaves it as it is.

    Source: ours, for putting pixels back without a seam: alpha times 2·blurred − 1 of where it is above zero.
    """
    if radius <= 0:
        return alpha
    return alpha * (2 * gaussian_blur((alpha > 0).to(alpha), radius / 2, 1.5 * radius) - 1).clamp(0, 1)


def keep_detail(before: Tensor, drawn: Tensor, same: Tensor, visible: Tensor, radius: float) -> Tensor:
    """[1,3,H,W]: the background `before` plus that part of the change from `same` to `drawn` which is smoother than
    `radius` pixels: light and shadow, no texture.

    same: `before` as the autoencoder gives it back; drawn: the harmonised picture; all [1,3,H,W]. visible: [1,1,H,W],
    1 where the background is seen. A rim of a third of the radius around things does not count, since models draw them
    wider than they are and their colours would run.
    Source: ours, an autoencoder and a few steps of denoising blur every texture that they touch.
    """
    rim = round(radius / 3)
    visible = 1 - F.max_pool2d(1 - visible, 2 * rim + 1, 1, rim)
    weight = gaussian_blur(visible, radius / 2, 1.5 * radius)
    return before + gaussian_blur((drawn - same) * visible, radius / 2, 1.5 * radius) / weight.clamp_min(1e-4)


def band(things: Tensor, reach: float) -> Tensor:
    """[1,H,W]: 1 on the things [1,H,W] (how much of a pixel is theirs, 0..1) and up to half of `reach` pixels away from
    them, then falling to 0 at `reach`.

    Distances are those between the cells of a grid of at most 64 on a side.
    Source: ours, shadows and reflected light are near what throws them, and a model redraws the rest for nothing.
    """
    size = things.shape[-2:]
    step = max(1, math.ceil(max(size) / 64))
    cells = F.max_pool2d(things[None], step, ceil_mode=True)[0, 0] > 0.01
    places = torch.stack(torch.meshgrid(*(torch.arange(n) * step for n in cells.shape), indexing="ij"), -1)
    places = places.flatten(0, 1).to(things)
    apart = torch.cdist(places, places[cells.flatten()])
    apart = apart.amin(1) if apart.shape[1] else places.new_full((len(places),), math.inf)
    near = (2 - 2 * apart / reach).clamp(0, 1).view(1, 1, *cells.shape)
    full = [length * step for length in cells.shape]
    near = F.interpolate(near, full, mode="bilinear", align_corners=False)[0, :, : size[0], : size[1]]
    return torch.maximum(near, things)


def colours_and_alphas(stack: LayerStack) -> tuple[Tensor, Tensor]:
    """Colours [N,3,H,W] and alphas [N,1,H,W] of the layers where they lie on the canvas; colours run on where nothing
    is seen.

    Source: dreamlayer, Eq. 13, op(·) of a picture: moved, resized, flipped, turned
    """
    pictures = [rearrange(rasterise(layer, stack.canvas), "h w c -> 1 c h w") for layer in stack.layers]
    colours = [clean_colours(pixels[:, :3], pixels[:, 3:]) for pixels in pictures]
    return torch.cat(colours), torch.cat([pixels[:, 3:] for pixels in pictures])


def light_behind(before: Tensor, drawn: Tensor, free: Tensor, soft: bool = True) -> Tensor:
    """[H,W,3]: the harmonised background where it is seen, and behind the foregrounds what was there before, in the
    light that goes on from around them. So no silhouette shows when a foreground is moved away.

    before, drawn: [1,3,H,W], the background before and after harmonising. free: [1,H,W], how much of it is seen. soft:
    whether the drawn one fades out on its way to the foregrounds, or reaches as far as it is seen.
    Source: ours, a model draws the foregrounds into the background, a rim of them a little beside their place.
    """
    clear = 1 - F.max_pool2d(1 - free, 2 * RIM + 1, 1, RIM)
    visible = feathered(clear[None], RIM)[0] if soft else free
    before, drawn = (rearrange(image, "b c h w -> b h w c") for image in (before, drawn))
    light = push_pull((drawn - before)[:, None], clear.clamp(0, 1)[None])[:, 0]
    return torch.lerp(before + light, drawn, visible[..., None]).clamp(0, 1)[0]


def harmonised_picture(colours: Tensor, alphas: Tensor, drawn: Tensor, relight: bool, feather: float) -> Tensor:
    """The picture [1,H,W,3|4] that comes of a harmonised one, `drawn` [1,3,H,W], of layers.

    colours, alphas: of the layers on the canvas, as colours_and_alphas gives them. relight: whether the foregrounds
    have the drawn colours; otherwise they keep their own, which fade into the drawn ones over `feather` pixels inside
    of their edge. A background that is transparent in places stays so.
    Source: ours, what a model draws again loses its detail, so that all that can keeps its own pixels.
    """
    own, opacity, shapes = colours[1:], alphas[:1], alphas[1:]
    picture = drawn
    if not relight:
        behind, shares = visible_shares(feathered(shapes, feather))
        picture = drawn * behind + sum(colour * share for colour, share in zip(own, shares, strict=True))
    if (opacity < 1).any():  # nothing was asked for behind a transparent canvas
        picture = torch.cat([picture, 1 - (1 - opacity) * visible_shares(shapes)[0]], 1)
    return rearrange(picture, "b c h w -> b h w c").clamp(0, 1)


def harmonised_layers(stack: LayerStack, colours: Tensor, alphas: Tensor, drawn: Tensor, relight: bool) -> LayerStack:
    """The layers that come of a harmonised picture `drawn` [1,3,H,W] of a stack: the background in its light, the
    foregrounds as they were, or with `relight` in the drawn colours where they are seen.

    colours, alphas: of the layers on the canvas, as colours_and_alphas gives them. A background that is transparent in
    places stays so.
    Source: ours, layers that can be moved apart again after harmonising.
    """
    (back, *objects), (ground, *own), (opacity, shapes) = stack.layers, colours, (alphas[:1], alphas[1:])
    free, shares = visible_shares(shapes)
    image = light_behind(ground[None], drawn, free, soft=not relight)
    image = image if (opacity == 1).all() else torch.cat([image, rearrange(opacity, "1 1 h w -> h w 1")], -1)
    layers = [Layer(image, back.name, extra=back.extra), *objects]
    if relight:
        for number, (layer, colour, share, alpha) in enumerate(zip(objects, own, shares, shapes, strict=True), 1):
            pixels = torch.cat([torch.lerp(colour, drawn[0], share).clamp(0, 1), alpha])
            layers[number] = Layer(rearrange(pixels, "c h w -> h w c"), layer.name, extra=layer.extra)
    return stack.with_layers(layers)
