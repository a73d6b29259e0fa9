"""What every layer file shares: layers as 8-bit pixels in place, names that a file can hold, and how large a file may
be.
"""

from __future__ import annotations

import io
import math
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch
from PIL import Image, ImageCms
from torch import Tensor

from ..techniques.compositing import W3C_MODES, flatten
from ..techniques.geometry import place
from ..techniques.layers import MAX_LAYERS, MAX_SIDE, Layer, LayerStack

MAX_DRAWN = 2**26  # pixels of one layer that are drawn though they lie outside the canvas: 1 GB
MAX_PIXELS = 2**29  # of all layers of a file together: 8 GB as ComfyUI holds them


class Refused(ValueError):
    """A file that is not damaged and cannot be taken all the same."""


def to_bytes(image: Tensor) -> np.ndarray:
    """0..1 floats of any shape as rounded 8-bit values of the same shape."""
    return (image.detach().cpu() * 255).round_().clamp_(0, 255).to(torch.uint8).numpy()


def quantised(image: Tensor, bits: int) -> np.ndarray:
    """0..1 floats of any shape as rounded values of 8 or 16 bits, of the same shape."""
    if bits == 8:
        return to_bytes(image)
    return (image.detach().cpu() * 65535).round_().clamp_(0, 65535).numpy().astype(np.uint16)


def from_bytes(pixels: np.ndarray) -> Tensor:
    """8-bit values of any shape as 0..1 floats of the same shape."""
    return torch.from_numpy(pixels.astype(np.float32)).div_(255)


def eight_bits(image: Image.Image) -> np.ndarray:
    """[H,W,3 or 4] 8-bit pixels of a Pillow picture of any mode; modes of more than 8 bits are scaled, where Pillow's
    own conversion clips.
    """
    if image.mode.startswith("I"):
        image = Image.fromarray((np.array(image, np.int64).clip(0, 65535) / 257).round().astype(np.uint8))
    elif image.mode == "F":
        image = Image.fromarray((np.array(image).clip(0, 1) * 255).round().astype(np.uint8))
    direct = image.mode in ("RGB", "RGBA") and "transparency" not in image.info
    return np.array(image if direct else image.convert("RGBA"))


def in_srgb(image: Image.Image, label: str, notes: list[str]) -> np.ndarray:
    """`eight_bits` of a Pillow picture with its colour profile applied; one that cannot be used is left alone, with a
    note.
    """
    profile, pixels = image.info.get("icc_profile"), eight_bits(image)
    if not profile:
        return pixels
    gray = image.mode in ("1", "L", "LA", "F") or image.mode.startswith("I")
    try:
        own, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
        source = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if gray else pixels[..., :3]))
        colour = np.array(ImageCms.profileToProfile(source, own, srgb, outputMode="RGB"))
    except (ImageCms.PyCMSError, OSError):
        notes.append(f"The colour profile of layer {label!r} cannot be used; its colours are taken as sRGB.")
        return pixels
    # sRGB's own profile rounds some values to their neighbours. Its name tells nothing: linear light is called sRGB
    # too.
    same = np.abs(colour.astype(int) - pixels[..., :3]).max() <= 1
    return pixels if same else np.concatenate([colour, pixels[..., 3:]], -1)


def srgb_profile() -> bytes:
    """An ICC profile of sRGB."""
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def is_srgb(profile: bytes) -> bool:
    """Whether colours are the same with an ICC profile and in sRGB, told by converting some."""
    values = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    try:
        own, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
        converted = np.array(ImageCms.profileToProfile(Image.fromarray(values), own, srgb, outputMode="RGB"))
    except (ImageCms.PyCMSError, OSError):
        return False
    return bool(np.abs(converted.astype(int) - values).max() <= 1)


def over(box: tuple[int, int, int, int], pixels: np.ndarray | None, x: int, y: int, outside: float) -> np.ndarray:
    """The part of pixels [H,W], whose top left corner is at x, y, that a box of the canvas shows; `outside` where they
    do not reach.
    """
    left, top, right, bottom = box
    shown = np.full((bottom - top, right - left), outside, np.float32)
    if pixels is not None:
        first, last = (max(left, x), max(top, y)), (min(right, x + pixels.shape[1]), min(bottom, y + pixels.shape[0]))
        if first[0] < last[0] and first[1] < last[1]:
            shown[first[1] - top : last[1] - top, first[0] - left : last[0] - left] = pixels[
                first[1] - y : last[1] - y, first[0] - x : last[0] - x
            ]
    return shown


def in_place(layer: Layer, canvas: tuple[int, int]) -> Layer:
    """The layer with its flips, display size and rotation drawn into its pixels, what lies outside the canvas included.

    Of a layer that is shown larger than any that a file may have, only the canvas's part is drawn.
    """
    height, width = layer.image.shape[:2]
    if layer.size == (width, height) and not (layer.rotation or layer.flip_h or layer.flip_v):
        return layer
    # On a canvas with enough room on every side nothing of the turned layer is cut off.
    room = math.ceil(math.hypot(*layer.size))
    if room**2 > MAX_DRAWN:
        placed, x, y = place(layer, canvas), 0, 0
    else:
        placed = place(replace(layer, x=room, y=room), (layer.size[0] + 2 * room, layer.size[1] + 2 * room))
        x, y = layer.x - room, layer.y - room
    if placed:
        colour, alpha = placed.rows(placed.top, placed.bottom)
        image, x, y = torch.cat([colour, alpha[None]]).permute(1, 2, 0), x + placed.left, y + placed.top
    else:
        image, x, y = layer.image.new_zeros(1, 1, 4), layer.x, layer.y
    return Layer(
        image,
        layer.name,
        None,
        x,
        y,
        opacity=layer.opacity,
        blend_mode=layer.blend_mode,
        visible=layer.visible,
        extra=layer.extra,
    )


def trimmed(layer: Layer, canvas: tuple[int, int], bits: int = 8) -> Layer:
    """The layer in place, cut to the box of the pixels that are not wholly transparent in a file of these bits; one
    pixel is left where there are none.
    """
    layer = in_place(layer, canvas)
    drawn = layer.rgba()[..., 3] * (2**bits - 1) > 0.5
    (top, bottom), (left, right) = _ends(drawn.any(1)), _ends(drawn.any(0))
    image = layer.image[top:bottom, left:right]
    mask = None if layer.mask is None else layer.mask[top:bottom, left:right]
    return replace(layer, image=image, mask=mask, x=layer.x + left, y=layer.y + top, w=0, h=0)


def _ends(drawn: Tensor) -> tuple[int, int]:
    """The first index that is true, and the one behind the last."""
    indices = drawn.nonzero()
    return (int(indices[0]), int(indices[-1]) + 1) if len(indices) else (0, 1)


def alpha_to_mask(layer: Layer, canvas: tuple[int, int]) -> Layer:
    """The layer in place, opaque, with what its alpha and its mask let through as its mask."""
    layer = in_place(layer, canvas)
    if layer.image.shape[-1] == 3:
        return layer
    return replace(layer, image=layer.image[..., :3], mask=1 - layer.rgba()[..., 3])


def picture(stack: LayerStack) -> Tensor:
    """[H,W,4] flattened, for programs that read no layers; a blend mode that cannot be flattened is taken as normal
    there.
    """
    colour, alpha = flatten(with_formulas(stack))
    return torch.cat([colour, alpha[..., None]], dim=-1)


def with_formulas(stack: LayerStack) -> LayerStack:
    """The stack with blend mode normal in place of those that cannot be flattened; `modes_note` says which."""
    return stack.with_layers(
        layer if layer.blend_mode in W3C_MODES else replace(layer, blend_mode="normal") for layer in stack.layers
    )


def modes_note(
    layers: Sequence[Layer], what: str = "The flattened image", rest: str = "; the layers themselves keep their modes"
) -> list[str]:
    """A sentence for the layers whose blend mode `picture` cannot show; none when there are none."""
    odd = [
        f"{layer.name!r} ({layer.blend_mode})"
        for layer in layers
        if layer.visible and layer.blend_mode not in W3C_MODES
    ]
    return [f"{what} shows {', '.join(odd)} in blend mode normal{rest}."] if odd else []


def on_canvas(layer: Layer, canvas: tuple[int, int]) -> np.ndarray:
    """[H,W,4] 8-bit pixels of the canvas with the layer in its place, opacity and blend mode left out; what is outside
    is cut off.
    """
    layer = in_place(layer, canvas)
    width, height = canvas
    pixels = np.zeros((height, width, 4), np.uint8)
    source = to_bytes(layer.rgba())
    left, top = max(layer.x, 0), max(layer.y, 0)
    right, bottom = min(layer.x + source.shape[1], width), min(layer.y + source.shape[0], height)
    if left < right and top < bottom:
        pixels[top:bottom, left:right] = source[top - layer.y : bottom - layer.y, left - layer.x : right - layer.x]
    return pixels


def in_parallel(function: Callable, items: Sequence) -> Iterator:
    """The results in order. Pillow encodes outside Python's lock; four at a time, so that memory does not hold every
    layer twice.
    """
    with ThreadPoolExecutor(4) as pool:
        for start in range(0, len(items), 4):
            yield from pool.map(function, items[start : start + 4])


def plain_name(name: str) -> str:
    """The name with a space for every character that XML or PSD cannot hold: controls, lone surrogates,
    non-characters.
    """
    return "".join(" " if unicodedata.category(c) in ("Cc", "Cs") or ord(c) & 0xFFFE == 0xFFFE else c for c in name)


def check_sides(what: str, width: int, height: int) -> None:
    """Raises Refused when a side is out of range."""
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
        raise Refused(
            f"{what} is {width}×{height}; sides must be from 1 to {MAX_SIDE} pixels, so save it in such a size."
        )


def check_total(what: str, sizes: list[tuple[int, int]]) -> None:
    """Raises Refused when these layers are together too large; called before any pixel is decoded."""
    pixels = sum(width * height for width, height in sizes)
    if pixels > MAX_PIXELS:
        raise Refused(
            f"{what} has {pixels / 1e6:.0f} million pixels in its layers and {MAX_PIXELS / 1e6:.0f} million can be "
            "loaded; scale it down or split it."
        )


def check_count(what: str, layers: Sequence[Layer]) -> None:
    """Raises Refused when a file has no layers or too many, after its groups were merged."""
    if not 1 <= len(layers) <= MAX_LAYERS:
        raise Refused(
            f"{what} has {len(layers)} layers with pixels and 1 to {MAX_LAYERS} can be loaded; merge or add some in "
            "your paint program, or load it with groups: one layer each."
        )
