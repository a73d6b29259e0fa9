"""Layers put over each other: the formulas of W3C Compositing and Blending Level 1, on strips of the canvas."""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from .geometry import Placement, place, rasterise
from .layers import Layer, LayerStack

TRANSPARENT = (0.0, 0.0, 0.0, 0.0)  # a background that is not there
_STRIP_PIXELS = 2**18  # keeps a strip of the canvas, with its temporaries, in the processor's cache


def _hard_light(backdrop: Tensor, source: Tensor) -> Tensor:
    return torch.where(source <= 0.5, backdrop * 2 * source, _screen(backdrop, 2 * source - 1))


def _screen(backdrop: Tensor, source: Tensor) -> Tensor:
    return backdrop + source - backdrop * source


def _color_dodge(backdrop: Tensor, source: Tensor) -> Tensor:
    dodged = torch.where(source >= 1, 1.0, (backdrop / (1 - source)).clamp(max=1))
    return torch.where(backdrop <= 0, 0.0, dodged)


def _color_burn(backdrop: Tensor, source: Tensor) -> Tensor:
    burned = torch.where(source <= 0, 0.0, 1 - ((1 - backdrop) / source).clamp(max=1))
    return torch.where(backdrop >= 1, 1.0, burned)


def _soft_light(backdrop: Tensor, source: Tensor) -> Tensor:
    curve = torch.where(backdrop <= 0.25, ((16 * backdrop - 12) * backdrop + 4) * backdrop, backdrop.sqrt())
    darker = backdrop - (1 - 2 * source) * backdrop * (1 - backdrop)
    return torch.where(source <= 0.5, darker, backdrop + (2 * source - 1) * (curve - backdrop))


def _lum(colour: Tensor) -> Tensor:
    return (0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2])[None]


def _sat(colour: Tensor) -> Tensor:
    return colour.amax(0, keepdim=True) - colour.amin(0, keepdim=True)


def _set_lum(colour: Tensor, lum: Tensor) -> Tensor:
    """SetLum and ClipColor of the recommendation."""
    colour = colour + (lum - _lum(colour))
    lum, low, high = _lum(colour), colour.amin(0, keepdim=True), colour.amax(0, keepdim=True)
    colour = torch.where(low < 0, lum + (colour - lum) * lum / (lum - low).clamp(min=1e-12), colour)
    return torch.where(high > 1, lum + (colour - lum) * (1 - lum) / (high - lum).clamp(min=1e-12), colour)


def _set_sat(colour: Tensor, sat: Tensor) -> Tensor:
    """SetSat of the recommendation: the smallest channel becomes 0, the largest sat, the middle one stays in
    proportion.
    """
    return (colour - colour.amin(0, keepdim=True)) * (sat / _sat(colour).clamp(min=1e-12))


_BLENDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "normal": lambda backdrop, source: source,
    "multiply": lambda backdrop, source: backdrop * source,
    "screen": _screen,
    "overlay": lambda backdrop, source: _hard_light(source, backdrop),
    "darken": torch.minimum,
    "lighten": torch.maximum,
    "color-dodge": _color_dodge,
    "color-burn": _color_burn,
    "hard-light": _hard_light,
    "soft-light": _soft_light,
    "difference": lambda backdrop, source: (backdrop - source).abs(),
    "exclusion": lambda backdrop, source: backdrop + source - 2 * backdrop * source,
    "hue": lambda backdrop, source: _set_lum(_set_sat(source, _sat(backdrop)), _lum(backdrop)),
    "saturation": lambda backdrop, source: _set_lum(_set_sat(backdrop, _sat(source)), _lum(backdrop)),
    "color": lambda backdrop, source: _set_lum(source, _lum(backdrop)),
    "luminosity": lambda backdrop, source: _set_lum(backdrop, _lum(source)),
}
W3C_MODES = tuple(_BLENDS)


def blend(backdrop: Tensor, source: Tensor, mode: str) -> Tensor:
    """B(Cb, Cs): two opaque colours [3,...] in 0..1 mixed by one of the sixteen W3C blend modes.

    Raises ValueError for another mode.
    Source: w3c, section 10 Blending.
    """
    if mode not in _BLENDS:
        raise ValueError(f"blend mode {mode!r} has no W3C formula; use one of {', '.join(W3C_MODES)}.")
    return _BLENDS[mode](backdrop, source)


def to_linear(colour: Tensor) -> Tensor:
    """sRGB values in 0..1 to linear light, any shape.

    Source: ours, sRGB transfer function of IEC 61966-2-1.
    """
    return torch.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)


def to_srgb(colour: Tensor) -> Tensor:
    """Linear light in 0..1 to sRGB values, any shape.

    Source: ours, inverse sRGB transfer function of IEC 61966-2-1.
    """
    return torch.where(colour <= 0.04045 / 12.92, colour * 12.92, 1.055 * colour.clamp(min=1e-6) ** (1 / 2.4) - 0.055)


def left_clear(alphas: Tensor) -> Tensor:
    """[K+1,...] in 0..1, from layers' alphas [K,...], back to front: entry k is the share of each pixel that layers k
    to K - 1 together leave clear; the last entry is 1, in front of all.

    Source: w3c, section 5.1 (source over), what the layers behind are weighted by
    """
    clear = alphas.new_ones(len(alphas) + 1, *alphas.shape[1:])
    for index in range(len(alphas) - 1, -1, -1):
        torch.mul(clear[index + 1], 1 - alphas[index], out=clear[index])
    return clear


def flatten(
    stack: LayerStack,
    background: tuple[float, float, float, float] = TRANSPARENT,
    linear: bool = False,
    socket: str = "layers",
) -> tuple[Tensor, Tensor]:
    """The picture of a stack: colour [H,W,3] straight, sRGB in 0..1, and alpha [H,W], 1 = opaque; colour is 0 where
    alpha is.

    background: sRGB and alpha behind the layers. linear: mix light (as ComfyUI's layer editor does) and not sRGB
    values.
    Invisible layers are skipped. Each layer is first mixed with what is behind it, Cs' = (1 - αb)·Cs + αb·B(Cb, Cs),
    then put over it: co = αs·Cs' + (1 - αs)·αb·Cb, αo = αs + αb·(1 - αs), and Co = co / αo at the end.
    Raises ValueError naming the layer for a blend mode without a W3C formula.
    Source: w3c, section 5.1 and 9.1.4 (source over).
    """
    shown = [layer for layer in stack.layers if layer.visible and layer.opacity > 0]
    _check_modes(shown, socket)
    placed = [(layer, box) for layer in shown if (box := place(layer, stack.canvas))]
    width, height = stack.canvas
    example = stack.layers[0].image
    colour, alpha = example.new_empty((height, width, 3)), example.new_empty((height, width))
    behind = example.new_tensor(background)
    light = torch.cat([to_linear(behind[:3]), behind[3:]]) if linear else behind
    rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        strip = (light[:3] * light[3])[:, None, None].repeat(1, bottom - top, width)
        strip_alpha = light[3].repeat(bottom - top, width)
        for layer, box in placed:
            _put_over(strip, strip_alpha, top, bottom, layer, box, linear)
        if not (strip_alpha == 1).all():
            strip /= torch.where(strip_alpha > 0, strip_alpha, 1)
        strip = strip.clamp_(0, 1)
        colour[top:bottom] = rearrange(to_srgb(strip) if linear else strip, "c h w -> h w c")
        alpha[top:bottom] = strip_alpha
    return colour, alpha


def flatten_image(
    stack: LayerStack, background: tuple[float, float, float, float], linear: bool = False
) -> tuple[Tensor, Tensor]:
    """(image, alpha [H,W]) of a stack; the image is [H,W,3] on an opaque background and otherwise [H,W,4].

    Source: ours, see `flatten`.
    """
    colour, alpha = flatten(stack, background, linear)
    return (colour if background[3] == 1 else torch.cat([colour, alpha[..., None]], dim=-1)), alpha


def preview(stack: LayerStack, longest: int = 512, square: int = 8) -> Tensor:
    """[1 + layers,h,w,3] on a grey checkerboard: the flattened picture, then every layer alone, back to front, hidden
    ones too.

    longest: the longer side of the pictures, which are never enlarged. square: side of the checkerboard's squares.
    Source: ours, what image editors show.
    """
    width, height = stack.canvas
    ratio = min(1, longest / max(width, height))
    size = max(1, round(height * ratio)), max(1, round(width * ratio))
    y, x = torch.meshgrid(
        *(torch.arange(side, device=stack.layers[0].image.device) // square for side in size), indexing="ij"
    )
    board = (0.6 + 0.2 * ((x + y) % 2))[..., None]
    pictures = [_on_board(flatten_image(stack, TRANSPARENT)[0], board)]
    return torch.stack(pictures + [_on_board(rasterise(layer, stack.canvas), board) for layer in stack.layers])


def _on_board(rgba: Tensor, board: Tensor) -> Tensor:
    alpha = rgba[..., 3:]
    planes = rearrange(torch.cat([rgba[..., :3] * alpha, alpha], dim=-1), "h w c -> 1 c h w")
    small = torch.nn.functional.interpolate(planes, size=board.shape[:2], mode="area")
    small = rearrange(small, "1 c h w -> h w c")
    return (small[..., :3] + (1 - small[..., 3:]) * board).clamp(0, 1)


def _check_modes(layers: list[Layer], socket: str) -> None:
    for layer in layers:
        if layer.blend_mode not in _BLENDS:
            raise ValueError(
                f"{socket}: layer {layer.name!r} has the blend mode {layer.blend_mode!r}, which has no W3C formula and "
                f"cannot be flattened; hide the layer or give it one of {', '.join(W3C_MODES)}."
            )


def _put_over(
    strip: Tensor, strip_alpha: Tensor, top: int, bottom: int, layer: Layer, box: Placement, linear: bool
) -> None:
    """One layer over a strip of the canvas, in place; the strip's colour is premultiplied."""
    first, last = max(top, box.top), min(bottom, box.bottom)
    if first >= last:
        return
    source, alpha = box.rows(first, last)
    alpha = alpha * layer.opacity if layer.opacity < 1 else alpha
    inside = slice(first - top, last - top), slice(box.left, box.right)
    backdrop, backdrop_alpha = strip[:, inside[0], inside[1]], strip_alpha[inside]
    source = to_linear(source.clamp(0, 1)) if linear else source
    if layer.blend_mode != "normal":
        behind = (backdrop / torch.where(backdrop_alpha > 0, backdrop_alpha, 1)).clamp(0, 1)
        source = source.clamp(0, 1)
        source = torch.lerp(source, blend(behind, source, layer.blend_mode), backdrop_alpha)
    backdrop.lerp_(source, alpha)
    backdrop_alpha.lerp_(torch.ones_like(alpha), alpha)
