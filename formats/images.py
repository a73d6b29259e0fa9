"""Image files as layers, with their alpha."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps

from ..techniques.layers import MAX_LAYERS, Layer, LayerStack
from .raster import check_sides, check_total, from_bytes, in_srgb


def load_images(paths: Sequence[Path], notes: list[str]) -> LayerStack:
    """One layer per file, the first at the back, named after it and centred on a canvas as large as the largest sides.

    Turned as their EXIF data say, colour profiles applied; what cannot be kept of a file is added to notes. Raises
    ValueError with one sentence naming the file, or for too many of them.
    """
    if len(paths) > MAX_LAYERS:
        raise ValueError(
            f"files: {len(paths)} files are chosen and a LAYERS document holds {MAX_LAYERS} layers; choose fewer."
        )
    check_total("files: the choice", [_size(path) for path in paths])
    images = [from_bytes(_pixels(path, notes)) for path in paths]
    width, height = max(image.shape[1] for image in images), max(image.shape[0] for image in images)
    layers = [
        Layer(image, path.stem, x=(width - image.shape[1]) // 2, y=(height - image.shape[0]) // 2)
        for image, path in zip(images, paths, strict=True)
    ]
    return LayerStack((width, height), tuple(layers))


def _size(path: Path) -> tuple[int, int]:
    with _opened(path) as image:
        check_sides(f"files: {path.name}", *image.size)
        return image.size


def _pixels(path: Path, notes: list[str]):
    with _opened(path) as image:
        frames = getattr(image, "n_frames", 1)
        if frames > 1:
            notes.append(f"{path.name} has {frames} frames, and the first one is taken.")
        try:
            return in_srgb(ImageOps.exif_transpose(image), path.stem, notes)
        except Exception as error:  # damaged files make Pillow's readers raise nearly anything
            raise _unreadable(path, error) from error


def _opened(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"files: {path.name} cannot be read ({error}); save it again as PNG, WebP or JPEG.")
