"""One picture per file, PNG or lossless WebP, with the workflow where ComfyUI's own save nodes put it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

_MODEL, _MAKE = 0x0110, 0x010F  # EXIF tags: ComfyUI puts the prompt into the first, the rest from the second downwards
FIELDS = "strata"  # the name of the metadata about the layer


def write_png(file: BinaryIO, pixels: np.ndarray, metadata: dict[str, Any], compress_level: int = 4) -> None:
    """pixels: [H,W,3|4] uint8. metadata: JSON values, each a tEXt chunk as SaveImage writes it."""
    text = PngInfo()
    for key, value in metadata.items():
        text.add_text(key, json.dumps(value))
    Image.fromarray(pixels).save(file, "PNG", pnginfo=text, compress_level=compress_level)


def write_webp(file: BinaryIO, pixels: np.ndarray, metadata: dict[str, Any]) -> None:
    """pixels: [H,W,3|4] uint8; lossless, hidden colours included. Raises ValueError over WebP's side limit."""
    if max(pixels.shape[:2]) > 16383:
        raise ValueError(
            f"layers: WebP holds sides up to 16383 pixels and the canvas is {pixels.shape[1]}×{pixels.shape[0]}; save "
            "as PNG layers."
        )
    image = Image.fromarray(pixels)
    exif, tag = image.getexif(), _MAKE
    for key, value in metadata.items():
        exif[_MODEL if key == "prompt" else tag] = f"{key}:{json.dumps(value)}"
        tag -= key != "prompt"
    # Lossless at method 0 and quality 0: the fastest; slower settings save little.
    image.save(file, "WEBP", lossless=True, exact=True, quality=0, method=0, exif=exif)


def read_metadata(path: Path | BinaryIO) -> dict[str, Any]:
    """The JSON values that write_png or write_webp put into a file, by their names."""
    with Image.open(path) as image:
        return {key: json.loads(value) for key, value in _texts(image).items()}


def saved_fields(image: Image.Image) -> dict[str, Any]:
    """What Save layers wrote about the layer that an opened image is; {} for an image from elsewhere."""
    try:
        fields = json.loads(_texts(image)[FIELDS])
    except (KeyError, ValueError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _texts(image: Image.Image) -> dict[str, str]:
    if isinstance(image, PngImageFile):
        return {key: str(value) for key, value in image.text.items()}
    values = [value for tag, value in image.getexif().items() if tag <= _MODEL and isinstance(value, str)]
    return dict(value.split(":", 1) for value in values if ":" in value)
