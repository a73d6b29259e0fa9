"""One layer drawn anew in its place, by BFS on a Flux-Fill or by LayerDiffuse's attention sharing."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from einops import rearrange
from torch import Tensor

from ..techniques import effects
from ..techniques.compositing import flatten
from ..techniques.fitting import rastered
from ..techniques.geometry import content_box, rasterise
from ..techniques.layers import Layer, LayerStack, as_effect
from . import autoencoder, back_to_front, rgba_vae, transparency_model, transparent_latents
from .attention_sharing import together
from .layer_rows import sample_rows

SIDE, MULTIPLE = 512, 64  # what Stable Diffusion 1.5 draws: about SIDE × SIDE pixels, sides multiples of MULTIPLE


@dataclass(frozen=True)
class Place:
    """behind: [1,H,W,3], all that lies behind the layer. box: left, top, right, bottom of where it is drawn."""

    behind: Tensor
    box: tuple[int, int, int, int]

    @property
    def mask(self) -> Tensor:
        """[1,H,W], 1 in the box."""
        left, top, right, bottom = self.box
        mask = torch.zeros_like(self.behind[..., 0])
        mask[:, top:bottom, left:right] = 1
        return mask


def place_of(stack: LayerStack, number: int, room: float) -> Place:
    """Around the layer of that number, with room on each side as a share of its larger side. Raises ValueError for a
    layer that is not seen, and where nothing or not all is behind it.
    """
    layer = stack.layers[number]
    alpha = rasterise(layer, stack.canvas)[..., 3]
    if not layer.visible or not (alpha > 0.5).any():
        raise ValueError(
            f"layer: {layer.name!r} is not seen on the canvas; choose a layer that is visible, for its place is kept."
        )
    behind, opaque = flatten(stack.with_layers(stack.layers[:number])) if number else (None, None)
    if behind is None or (opaque < 1).any():
        raise ValueError(
            f"layers: behind {layer.name!r} there are transparent pixels; put an opaque background at the back, or "
            "fill its holes with Complete layers."
        )
    left, top, right, bottom = content_box((alpha > 0.5).to(alpha))
    grow = round(room * max(right - left, bottom - top))
    width, height = stack.canvas
    box = max(0, left - grow), max(0, top - grow), min(width, right + grow), min(height, bottom + grow)
    return Place(behind[None], box)


def by_back_to_front(
    place: Place, model: ModelPatcher, positive: list, negative: list, vae, alpha_vae, noise: str, **sampling
) -> Tensor:
    """[H,W,4] of the box: the new layer with its shadow. Raises ValueError while something that BFS needs is missing.

    Source: bfs, Sec. 3
    """
    if not back_to_front.is_on(model):
        raise ValueError(
            "model: there is no Back to front on it; connect its output, or, for an SD1.5 model, attention sharing "
            "(layer_sd15_bg2fg) and a decoder."
        )
    if alpha_vae is None or not autoencoder.has_alpha(alpha_vae):
        raise ValueError("rgba_vae: BFS needs a VAE with alpha; connect one from Load RGBA VAE.")
    prepared = back_to_front.fill_background(positive, negative, vae, place.behind, place.mask)
    _, latent = back_to_front.sample(model, *prepared, noise, denoise=1.0, **sampling)
    left, top, right, bottom = place.box
    return rgba_vae.decode(alpha_vae, latent["samples"], like=place.behind)[0, top:bottom, left:right]


def around_layer(
    place: Place, model: ModelPatcher, positive: list, negative: list, vae, sharing, decoder, **sampling
) -> Tensor:
    """[H,W,4] of the box: the new layer, drawn for what is behind it there, at the size that the model knows. Raises
    ValueError while something is missing.

    Source: layerdiffuse, released code (bg2fg of SD1.5)
    """
    if decoder is None:
        raise ValueError("decoder: nothing is connected; connect layer_sd15_vae_transparent_decoder.")
    left, top, right, bottom = place.box
    behind = rearrange(place.behind[:, top:bottom, left:right], "b h w c -> b c h w")
    size = drawn_size(behind.shape[-2], behind.shape[-1])
    image = F.interpolate(behind, size, mode="bicubic", antialias=True).clamp(0, 1)
    shared = transparency_model.share(model, sharing, 2, picture=image * 2 - 1)
    latent = {"samples": torch.zeros(1, 4, *(side // 8 for side in size))}
    prompts = together([("positive", positive), ("positive", positive)])
    drawn, _ = sample_rows(shared, prompts, 2, negative, latent, denoise=1.0, **sampling)
    colours = rearrange(autoencoder.decode(vae, drawn["samples"])[..., :3], "b h w c -> b c h w")
    colour, alpha = transparent_latents.decode(decoder, colours, drawn["samples"])
    pixels = rearrange(torch.cat([colour, alpha], 1), "1 c h w -> h w c").to(place.behind)
    box = behind.shape[-1], behind.shape[-2]
    return rastered(Layer(pixels, w=box[0], h=box[1]), box).image


def drawn_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) of about 512 × 512 pixels in these proportions."""
    scale = SIDE / (height * width) ** 0.5
    return tuple(max(MULTIPLE, round(side * scale / MULTIPLE) * MULTIPLE) for side in (height, width))


def put(stack: LayerStack, number: int, place: Place, pixels: Tensor, shadow: Tensor | None = None) -> LayerStack:
    """The stack with new pixels [H,W,4] of the box for the layer of that number, cut to what is seen of them. Its name,
    opacity, blend mode and group stay, and all other layers are the same objects. shadow: [H,W,4] of the box, which
    becomes an effect layer of the new one.
    """
    new = cut(stack.layers[number], place, pixels)
    others = [*stack.layers[:number], *stack.layers[number + 1 :]]
    below = []
    if shadow is not None:
        dark = replace(cut(stack.layers[number], place, shadow), name=f"{new.name} {effects.SHADOW}")
        below = [as_effect(dark, effects.SHADOW)]
    return stack.with_layers([*others[:number], *effects.bound(below, new, [], others), *others[number:]])


def cut(layer: Layer, place: Place, pixels: Tensor) -> Layer:
    """The layer with pixels [H,W,4] of the box in place of its own, cut to what is seen of them."""
    left, top, right, bottom = content_box(pixels[..., 3])
    return layer.with_pixels(pixels[top:bottom, left:right].clone(), place.box[0] + left, place.box[1] + top)
