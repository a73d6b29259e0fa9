"""Where a layer lies on the canvas, and its pixels there, a few rows at a time.

A pixel is a unit square: pixel i covers [i, i + 1). Layers are [H,W,C] as in the document; pixels come out planar,
[C,rows,W], which is what makes compositing fast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .layers import MAX_SIDE, Layer

FITS = ("none", "contain", "cover", "stretch", "centre")


@dataclass(frozen=True)
class Placement:
    """The visible box of one layer: left, top, right, bottom on the canvas, right and bottom exclusive.

    Either a copy (image and mask are views of the layer's pixels, already turned and cropped to the box), or a
    resampling, when image [1,3|4,h,w] is the (premultiplied) picture and `inverse` (a, b, c, d, e, f) takes a canvas
    point to the layer's own display coordinates: u = a·x + b·y + c, v = d·x + e·y + f, inside the layer where
    0 ≤ u ≤ size[0] and 0 ≤ v ≤ size[1].
    """

    left: int
    top: int
    right: int
    bottom: int
    image: Tensor
    mask: Tensor | None = None
    inverse: tuple[float, ...] = ()
    size: tuple[int, int] = (0, 0)

    def rows(self, top: int, bottom: int) -> tuple[Tensor, Tensor]:
        """(colour [3,bottom-top,width] straight, alpha [bottom-top,width], 1 = opaque) of these canvas rows of
        the box.
        """
        return self._resampled(top, bottom) if self.inverse else self._copied(top - self.top, bottom - self.top)

    def _copied(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        pixels = rearrange(self.image[first:last], "h w c -> c h w").contiguous()
        alpha = pixels[3] if len(pixels) == 4 else torch.ones_like(pixels[0])
        if self.mask is not None:
            alpha = alpha * (1 - self.mask[first:last])
        return pixels[:3], alpha.clamp(0, 1)

    def _resampled(self, top: int, bottom: int) -> tuple[Tensor, Tensor]:
        a, b, c, d, e, f = self.inverse
        width, height = self.size
        y = torch.arange(top, bottom, device=self.image.device, dtype=self.image.dtype)[:, None] + 0.5
        x = torch.arange(self.left, self.right, device=self.image.device, dtype=self.image.dtype)[None] + 0.5
        u, v = a * x + b * y + c, d * x + e * y + f
        grid = torch.stack([u * (2 / width) - 1, v * (2 / height) - 1], dim=-1)[None]
        pixels = F.grid_sample(self.image, grid, mode="bicubic", padding_mode="border", align_corners=False)[0]
        border = _coverage(u, width) * _coverage(v, height)
        if len(pixels) == 3:
            return pixels.clamp(0, 1), border
        alpha = pixels[3].clamp(0, 1)
        # Bicubic overshoots: a premultiplied colour above its alpha would come out brighter than white.
        return torch.minimum(pixels[:3].clamp(min=0), alpha) / alpha.clamp(min=1e-6), alpha * border


def place(layer: Layer, canvas: tuple[int, int]) -> Placement | None:
    """Where a layer shows on the canvas (width, height), ready to be read row by row; None when it lies wholly outside.

    At native size, and turned by quarter turns only, pixels are copied bit by bit (a quarter turn of a layer with one
    odd and one even side would end between pixels and moves by half a pixel to the left or up). Everything else is
    resampled with premultiplied alpha, so that the colour of transparent pixels never shows at an edge: a bicubic
    antialiased reduction first where the layer is shown smaller, then a bicubic lookup, with the layer's border
    antialiased by its coverage of each pixel.
    Source: ours, inverse mapping of ComfyUI's layer fields: flips, then scaling to w × h, then rotation about the
    centre.
    """
    width, height = layer.size
    turns = layer.rotation / (math.pi / 2)
    if abs(turns - round(turns)) < 1e-9:
        quarter = round(turns) % 4
        shown = (height, width) if quarter % 2 else (width, height)
        left, top = layer.x + (width - shown[0]) // 2, layer.y + (height - shown[1]) // 2
        box = _visible((left, top, left + shown[0], top + shown[1]), canvas)
        if box and (height, width) == tuple(layer.image.shape[:2]):
            return _copy(layer, box, left, top, quarter)
    else:
        box = _visible(_rotated_box(layer), canvas)
    return box and _resampling(layer, box)


def rasterise(layer: Layer, canvas: tuple[int, int]) -> Tensor:
    """[H,W,4] straight alpha, the whole canvas with this layer alone on it, opacity applied, hidden colour kept where
    it is a copy.

    Source: ours, the layer as `place` reads it.
    """
    pixels = layer.image.new_zeros((canvas[1], canvas[0], 4))
    placed = place(layer, canvas)
    if placed:
        colour, alpha = placed.rows(placed.top, placed.bottom)
        box = pixels[placed.top : placed.bottom, placed.left : placed.right]
        box[..., :3] = rearrange(colour, "c h w -> h w c")
        box[..., 3] = alpha if layer.opacity == 1 else alpha * layer.opacity
    return pixels


def fit(layer: Layer, canvas: tuple[int, int], how: str) -> Layer:
    """The layer sized and centred on the canvas, as it is before rotation.

    how: contain (wholly visible), cover (no gap), stretch (exactly the canvas), centre (keeps its size) or none.
    Raises ValueError for another word.
    Source: ours, CSS object-fit's words.
    """
    if how not in FITS:
        raise ValueError(f"fit: {how!r} is not known; use one of {', '.join(FITS)}.")
    if how == "none":
        return layer
    width, height = layer.size
    if how == "stretch":
        width, height = canvas
    elif how != "centre":
        ratio = (min if how == "contain" else max)(canvas[0] / width, canvas[1] / height)
        width, height = _side(width * ratio), _side(height * ratio)
    return replace(layer, w=width, h=height, x=(canvas[0] - width) // 2, y=(canvas[1] - height) // 2)


def fitted_along(layer: Layer, lead: Layer, fitted: Layer) -> Layer:
    """A layer that is moved and scaled as `lead` was when it became `fitted`, before rotation.

    Source: ours, one box carried into another
    """
    if (lead.x, lead.y, *lead.size) == (fitted.x, fitted.y, *fitted.size):
        return layer
    across, down = (new / old for new, old in zip(fitted.size, lead.size, strict=True))
    x, y = fitted.x + (layer.x - lead.x) * across, fitted.y + (layer.y - lead.y) * down
    return replace(layer, x=round(x), y=round(y), w=_side(layer.size[0] * across), h=_side(layer.size[1] * down))


def transform(
    layer: Layer,
    pivot: tuple[float, float] | None = None,
    move: tuple[float, float] = (0, 0),
    scale: float = 1.0,
    rotation: float = 0.0,
    flip_h: bool = False,
    flip_v: bool = False,
) -> Layer:
    """The layer flipped as it is seen, scaled and turned (radians, clockwise) about the pivot, then moved; canvas
    pixels throughout.

    pivot: a point of the canvas, or None for the layer's own centre. Positions and sizes are whole pixels in the
    document; their fractions go along under extra["strata"]["exact"], so that a chain of transforms is off by less than
    one pixel altogether. Raises ValueError when scale is not positive.
    Source: ours, similarity transform of ComfyUI's layer fields.
    """
    if scale <= 0:
        raise ValueError(
            f"scale: {scale} is not a size; use a number above 0 (1 keeps the size, flip_h and flip_v mirror)."
        )
    x, y, width, height = _exact(layer)
    pivot = pivot or (x, y)
    dx, dy = (x - pivot[0]) * scale, (y - pivot[1]) * scale
    dx, dy = (-dx if flip_h else dx), (-dy if flip_v else dy)
    cos, sin = math.cos(rotation), math.sin(rotation)
    exact = (
        pivot[0] + dx * cos - dy * sin + move[0],
        pivot[1] + dx * sin + dy * cos + move[1],
        width * scale,
        height * scale,
    )
    x, y, width, height = _rounded(exact)
    angle = -layer.rotation if flip_h != flip_v else layer.rotation
    sides = (layer.w, layer.h) if scale == 1 else (width, height)
    moved = replace(
        layer,
        x=x,
        y=y,
        w=sides[0],
        h=sides[1],
        rotation=angle + rotation,
        flip_h=layer.flip_h != flip_h,
        flip_v=layer.flip_v != flip_v,
    )
    return _with_exact(moved, None if exact == (x + width / 2, y + height / 2, width, height) else exact)


def _exact(layer: Layer) -> tuple[float, float, float, float]:
    """Centre and size with their fractions, as long as they are those of the layer's whole numbers: another node may
    have moved it.
    """
    rounded = layer.x, layer.y, *layer.size
    ours = layer.extra.get("strata")
    exact = ours.get("exact") if isinstance(ours, dict) else None
    if (
        isinstance(exact, list | tuple)
        and len(exact) == 4
        and all(isinstance(value, int | float) and math.isfinite(value) for value in exact)
        and _rounded(exact) == rounded
    ):
        return tuple(exact)
    return layer.x + layer.size[0] / 2, layer.y + layer.size[1] / 2, *layer.size


def _rounded(exact) -> tuple[int, int, int, int]:
    """x, y, w, h of the document."""
    width, height = _side(exact[2]), _side(exact[3])
    return math.floor(exact[0] - width / 2 + 0.5), math.floor(exact[1] - height / 2 + 0.5), width, height


def _with_exact(layer: Layer, exact: tuple[float, ...] | None) -> Layer:
    ours = layer.extra.get("strata")
    if exact is None and not (isinstance(ours, dict) and "exact" in ours):
        return layer
    ours = {key: value for key, value in ours.items() if key != "exact"} if isinstance(ours, dict) else {}
    ours |= {} if exact is None else {"exact": list(exact)}
    extra = {key: value for key, value in layer.extra.items() if key != "strata"}
    return replace(layer, extra=extra | ({"strata": ours} if ours else {}))


def pivot(about: str, canvas: tuple[int, int]) -> tuple[float, float] | None:
    """The point of `transform` for "layer centre" (None), "canvas centre" or "canvas top left".

    Source: ours, anchors of image editors.
    """
    return {"layer centre": None, "canvas centre": (canvas[0] / 2, canvas[1] / 2), "canvas top left": (0.0, 0.0)}[about]


def in_pixels(distance: tuple[float, float], unit: str, canvas: tuple[int, int]) -> tuple[float, float]:
    """A (right, down) distance in "pixels" or in "fractions" of the canvas, to pixels.

    Source: ours, fractions of width and height.
    """
    return distance if unit == "pixels" else (distance[0] * canvas[0], distance[1] * canvas[1])


def _side(length: float) -> int:
    return min(max(1, round(length)), MAX_SIDE)


def _visible(box: tuple[int, int, int, int], canvas: tuple[int, int]) -> tuple[int, int, int, int] | None:
    left, top, right, bottom = max(box[0], 0), max(box[1], 0), min(box[2], canvas[0]), min(box[3], canvas[1])
    return (left, top, right, bottom) if left < right and top < bottom else None


def _rotated_box(layer: Layer) -> tuple[int, int, int, int]:
    width, height = layer.size
    cos, sin = abs(math.cos(layer.rotation)), abs(math.sin(layer.rotation))
    # Half a pixel more on every side: that is how far the antialiased border reaches.
    half_width, half_height = (width * cos + height * sin + 1) / 2, (width * sin + height * cos + 1) / 2
    x, y = layer.x + width / 2, layer.y + height / 2
    return (
        math.floor(x - half_width),
        math.floor(y - half_height),
        math.ceil(x + half_width),
        math.ceil(y + half_height),
    )


def _copy(layer: Layer, box: tuple[int, int, int, int], left: int, top: int, quarter: int) -> Placement:
    def turned(pixels: Tensor) -> Tensor:
        flips = [axis for axis, flipped in ((0, layer.flip_v), (1, layer.flip_h)) if flipped]
        pixels = torch.flip(pixels, flips) if flips else pixels
        pixels = torch.rot90(pixels, -quarter, (0, 1)) if quarter else pixels
        return pixels[box[1] - top : box[3] - top, box[0] - left : box[2] - left]

    return Placement(*box, image=turned(layer.image), mask=None if layer.mask is None else turned(layer.mask))


def _resampling(layer: Layer, box: tuple[int, int, int, int]) -> Placement:
    width, height = layer.size
    opaque = layer.mask is None and layer.image.shape[-1] == 3
    source = rearrange(layer.image if opaque else layer.rgba(), "h w c -> 1 c h w")
    source = source if opaque else torch.cat([source[:, :3] * source[:, 3:], source[:, 3:]], dim=1)
    reduced = min(height, source.shape[2]), min(width, source.shape[3])
    if reduced != tuple(source.shape[2:]):
        source = F.interpolate(source, size=reduced, mode="bicubic", antialias=True, align_corners=False)
    cos, sin = math.cos(layer.rotation), math.sin(layer.rotation)
    x, y = layer.x + width / 2, layer.y + height / 2
    horizontal, vertical = (-1 if layer.flip_h else 1), (-1 if layer.flip_v else 1)
    across = (horizontal * cos, horizontal * sin, width / 2 - horizontal * (x * cos + y * sin))
    down = (-vertical * sin, vertical * cos, height / 2 - vertical * (y * cos - x * sin))
    return Placement(*box, image=source, inverse=(*across, *down), size=(width, height))


def _coverage(position: Tensor, length: int) -> Tensor:
    """How much of the unit interval around each position lies in [0, length], length being at least 1."""
    return (torch.minimum(position, length - position) + 0.5).clamp(0, 1)


def filled_up(image: Tensor, multiple: int) -> Tensor:
    """[B,C,H,W] with sides that are multiples of `multiple`, continued at the right and below by mirroring.

    Source: ours, what networks see of images of any size
    """
    height, width = image.shape[-2:]
    down, across = -height % multiple, -width % multiple
    # An image that is smaller than what is added cannot be mirrored so far.
    mode = "reflect" if down < height and across < width else "replicate"
    return F.pad(image, (0, across, 0, down), mode=mode)


def content_box(alpha: Tensor) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of what can be seen of alpha [H,W] in 0..1 in 8 bits, right and bottom exclusive; all of
    it when nothing can.

    Source: ours, bounding box of what is opaque.
    """
    seen = alpha * 255 > 0.5  # a half is rounded to 0, as in every file of 8 bits
    rows, columns = seen.any(1).nonzero(), seen.any(0).nonzero()
    if not len(rows):
        return 0, 0, alpha.shape[1], alpha.shape[0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
