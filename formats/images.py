"""Image files as layers, with their alpha, and as Save layers wrote them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from torch import Tensor

from ..techniques.layers import MAX_LAYERS, Layer, LayerStack, read_layers, write_layers
from .png import saved_fields
from .raster import check_sides, check_total, from_bytes, in_srgb


def load_images(paths: Sequence[Path], notes: list[str]) -> LayerStack:
    """One layer per file, the first at the back, named after it and centred on a canvas as large as the largest sides.
    Files of Save layers have their name, opacity, blend mode, visibility and groups, and are effects, as saved.

    Turned as their EXIF data say, colour profiles applied; what cannot be kept of a file is added to notes. Raises
    ValueError with one sentence naming the file, or for too many of them.
    """
    if len(paths) > MAX_LAYERS:
        raise ValueError(
            f"files: {len(paths)} files are chosen and a LAYERS document holds {MAX_LAYERS} layers; choose fewer."
        )
    check_total("files: the choice", [_size(path) for path in paths])
    read = [_pixels(path, notes) for path in paths]
    images = [image for image, _ in read]
    width, height = max(image.shape[1] for image in images), max(image.shape[0] for image in images)
    layers = [
        Layer(image, path.stem, x=(width - image.shape[1]) // 2, y=(height - image.shape[0]) // 2)
        for image, path in zip(images, paths, strict=True)
    ]
    document = write_layers(LayerStack((width, height), tuple(layers)))
    for entry, (_, fields) in zip(document["layers"], read, strict=True):
        entry |= {key: fields[key] for key in ("name", "opacity", "blend_mode", "visible") if key in fields}
        entry["strata"] = {key: fields[key] for key in ("parent", "effect") if key in fields}
    return read_layers(document, "files")  # checked there, for anybody may have written them


def _size(path: Path) -> tuple[int, int]:
    with _opened(path) as image:
        check_sides(f"files: {path.name}", *image.size)
        return image.size


def _pixels(path: Path, notes: list[str]) -> tuple[Tensor, dict[str, Any]]:
    """The image, and what Save layers wrote about it."""
    with _opened(path) as image:
        frames = getattr(image, "n_frames", 1)
        if frames > 1:
            notes.append(f"{path.name} has {frames} frames, and the first one is taken.")
        try:
            return from_bytes(in_srgb(ImageOps.exif_transpose(image), path.stem, notes)), saved_fields(image)
        except Exception as error:  # damaged files make Pillow's readers raise nearly anything
            raise _unreadable(path, error) from error


def _opened(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"files: {path.name} cannot be read ({error}); save it again as PNG, WebP or JPEG.")
