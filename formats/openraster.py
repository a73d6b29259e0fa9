"""OpenRaster (.ora), which Krita, GIMP, MyPaint and others open: a zip of stack.xml, a PNG per layer and the flattened picture."""
from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from torch import Tensor

from ..techniques.layers import Layer, LayerStack
from .png import read_metadata as read_png_metadata
from .png import write_png
from .raster import check_sides, check_total, eight_bits, from_bytes, in_parallel, in_place, log, plain_name, to_bytes
from .xml import parse_xml

MODES = {
    "normal": "svg:src-over", "linear-dodge": "svg:plus",
    **{mode: f"svg:{mode}" for mode in ("multiply", "screen", "overlay", "darken", "lighten", "color-dodge", "color-burn", "hard-light", "soft-light",
                                        "difference", "color", "luminosity", "hue", "saturation")},
}
DOCUMENT_MODES = {operator: mode for mode, operator in MODES.items()}
MIMETYPE = b"image/openraster"
_XML_BYTES = 2**22
_PNG_OVERHEAD = 2**26  # what a layer's PNG may hold beside its pixels


def write(file: BinaryIO, stack: LayerStack, merged: Tensor, metadata: dict[str, Any], progress: Callable[[int], None] = lambda done: None) -> None:
    """Write an OpenRaster file; merged: [H,W,3|4] flattened picture.

    Lossless in 8 bits, colours under alpha 0 included. A mask is multiplied into the alpha, which OpenRaster has instead; display size,
    rotation and flips are drawn into the pixels. metadata: JSON values, in mergedimage.png as SaveImage writes them.
    Raises ValueError for a blend mode that OpenRaster lacks.
    """
    root, names = _stack_xml(stack), [f"data/layer{index:03}.png" for index in range(len(stack.layers))]
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("mimetype", MIMETYPE)
        places = []
        for name, (encoded, x, y) in zip(names, in_parallel(partial(_encoded, stack.canvas), stack.layers), strict=True):
            archive.writestr(name, encoded)
            places.append((x, y))
            progress(len(places))
        for element, name, (x, y) in zip(root.iter("layer"), reversed(names), reversed(places), strict=True):
            element.attrib |= {"src": name, "x": str(x), "y": str(y)}
        archive.writestr("stack.xml", ElementTree.tostring(root, "UTF-8", xml_declaration=True))
        pixels = to_bytes(merged)
        archive.writestr("mergedimage.png", _png(pixels, metadata))
        thumbnail = Image.fromarray(pixels)
        thumbnail.thumbnail((256, 256))
        archive.writestr("Thumbnails/thumbnail.png", _png(np.array(thumbnail), {}))


def read(path: Path) -> LayerStack:
    """Layers of an OpenRaster file, back to front, as [H,W,4]; groups become their leaves, with the groups' opacity and visibility.

    Sizes are checked before anything is unpacked. Raises ValueError with one sentence naming the file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(archive, path.name)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, OSError) as error:
        raise ValueError(f"{path.name} is not an OpenRaster file, or is damaged ({error}); save or upload it again.") from error


def read_metadata(path: Path) -> dict[str, Any]:
    """What `write` put into the file, for example {"prompt": …, "workflow": …}."""
    with zipfile.ZipFile(path) as archive:
        return read_png_metadata(io.BytesIO(archive.read("mergedimage.png")))


def _stack_xml(stack: LayerStack) -> ElementTree.Element:
    """OpenRaster lists the topmost layer first."""
    root = ElementTree.Element("image", version="0.0.3", w=str(stack.canvas[0]), h=str(stack.canvas[1]))
    group = ElementTree.SubElement(root, "stack")
    for layer in reversed(stack.layers):
        if layer.blend_mode not in MODES:
            raise ValueError(f"layers: layer {layer.name!r} has the blend mode {layer.blend_mode}, which OpenRaster does not have; "
                             f"save as PSD or PNG layers, or use one of {', '.join(MODES)}.")
        ElementTree.SubElement(group, "layer", {
            "name": plain_name(layer.name), "opacity": repr(layer.opacity), "visibility": "visible" if layer.visible else "hidden",
            "composite-op": MODES[layer.blend_mode]})
    return root


def _encoded(canvas: tuple[int, int], layer: Layer) -> tuple[bytes, int, int]:
    layer = in_place(layer, canvas)
    return _png(to_bytes(layer.image if layer.mask is None else layer.rgba()), {}), layer.x, layer.y


def _png(pixels: np.ndarray, metadata: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    write_png(file, pixels, metadata, compress_level=1)
    return file.getvalue()


def _read(archive: zipfile.ZipFile, name: str) -> LayerStack:
    sizes = {info.filename: info.file_size for info in archive.infolist()}
    if "stack.xml" not in sizes:
        raise ValueError(f"{name} has no stack.xml, so it is not an OpenRaster file.")
    if sizes["stack.xml"] > _XML_BYTES:
        raise ValueError(f"{name}: its stack.xml would unpack to {sizes['stack.xml'] / 1e6:.0f} MB, which no real one has; the file is not loaded.")
    root = parse_xml(archive.read("stack.xml"), f"{name}: stack.xml")
    canvas = int(_number(root, "w", 0, name)), int(_number(root, "h", 0, name))
    check_sides(f"{name}: the canvas", *canvas)
    leaves = [leaf for top in root.findall("stack") for leaf in _leaves(top, 1.0, True, name)]
    check_total(name, [_png_size(archive, sizes, element, name) for element, *_ in leaves])
    layers = [_layer(archive, *leaf, name) for leaf in reversed(leaves)]
    return LayerStack(canvas, tuple(layers))


def _leaves(stack: ElementTree.Element, opacity: float, visible: bool, name: str) -> Iterator[tuple[ElementTree.Element, float, bool]]:
    """(layer element, opacity, visible), topmost first."""
    for element in stack:
        label = element.get("name", "")
        own, shown = opacity * _opacity(element, name), visible and element.get("visibility", "visible") != "hidden"
        if element.tag == "stack":
            if element.get("composite-op", "svg:src-over") != "svg:src-over":
                log.warning("%s: the blend mode of group %r is not read; its layers keep their own.", name, label)
            yield from _leaves(element, own, shown, name)
        elif element.tag == "layer" and element.get("src", "").lower().endswith(".png"):
            yield element, own, shown
        else:
            log.warning("%s: %s %r has no PNG pixels and is left out.", name, element.tag, label)


def _png_size(archive: zipfile.ZipFile, sizes: dict[str, int], element: ElementTree.Element, name: str) -> tuple[int, int]:
    """The size that a layer's PNG declares, with its unpacked bytes checked against it; nothing but its head is unpacked here."""
    source, label = _source(element), f"{name}: layer {element.get('name', '')!r}"
    if PurePosixPath(source).is_absolute() or ".." in PurePosixPath(source).parts:
        raise ValueError(f"{label} points outside the file, to {source!r}; the file is not loaded.")
    if source not in sizes:
        raise ValueError(f"{label} names {source!r}, which is not in the file; save it again in your paint program.")
    with archive.open(source) as entry:
        head = entry.read(24)
    if head[:8] != b"\x89PNG\r\n\x1a\n" or head[12:16] != b"IHDR":
        raise ValueError(f"{label} is not a PNG picture; save the file again in your paint program.")
    width, height = struct.unpack(">II", head[16:])
    check_sides(label, width, height)
    if sizes[source] > width * height * 8 + _PNG_OVERHEAD:
        raise ValueError(f"{label} would unpack to {sizes[source] / 1e6:.0f} MB for {width}×{height} pixels; the file is not loaded.")
    return width, height


def _source(element: ElementTree.Element) -> str:
    """The name in the archive: some programs write ./data/a.png, or data\\a.png."""
    return str(PurePosixPath(element.get("src").replace("\\", "/")))


def _layer(archive: zipfile.ZipFile, element: ElementTree.Element, opacity: float, visible: bool, name: str) -> Layer:
    label = element.get("name") or "Layer"
    try:
        with Image.open(io.BytesIO(archive.read(_source(element))), formats=["PNG"]) as image:
            pixels = eight_bits(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: the PNG of layer {label!r} cannot be read ({error}); save the file again in your paint program.") from error
    operator = element.get("composite-op", "svg:src-over")
    if operator not in DOCUMENT_MODES:
        log.warning("%s: layer %r has the blend mode %s, which ComfyUI's layers do not have; it is read as normal.", name, label, operator)
    return Layer(from_bytes(pixels), label, None, round(_number(element, "x", 0, name)), round(_number(element, "y", 0, name)), opacity=opacity,
                 blend_mode=DOCUMENT_MODES.get(operator, "normal"), visible=visible)


def _opacity(element: ElementTree.Element, name: str) -> float:
    return min(max(_number(element, "opacity", 1, name), 0.0), 1.0)


def _number(element: ElementTree.Element, key: str, default: float, name: str) -> float:
    text = element.get(key, str(default))
    try:
        value = float(text)
        if abs(value) < 2**31:  # false for NaN too
            return value
    except ValueError:
        pass
    raise ValueError(f"{name}: stack.xml has {text!r} as the {key} of {element.get('name', element.tag)!r}, which is not a usable number.")
