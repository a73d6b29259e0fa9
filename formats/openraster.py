"""OpenRaster (.ora), which Krita, GIMP, MyPaint and others open: a zip of stack.xml, a PNG per layer and the flattened
picture.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..techniques.layers import Layer, LayerStack, as_effect, effect_of
from .groups import GROUPS, box_of, flattened, grouped, in_sequence, masked
from .png import read_metadata as read_png_metadata
from .png import write_png
from .raster import (
    check_count,
    check_sides,
    check_total,
    from_bytes,
    in_parallel,
    in_place,
    in_srgb,
    over,
    plain_name,
    to_bytes,
)
from .xml import NAMESPACE, parse_xml

MODES = {
    "normal": "svg:src-over",
    "linear-dodge": "svg:plus",
    **{
        mode: f"svg:{mode}"
        for mode in (
            "multiply",
            "screen",
            "overlay",
            "darken",
            "lighten",
            "color-dodge",
            "color-burn",
            "hard-light",
            "soft-light",
            "difference",
            "color",
            "luminosity",
            "hue",
            "saturation",
        )
    },
}
DOCUMENT_MODES = {operator: mode for mode, operator in MODES.items()}
# Porter and Duff's shares of a layer and of what is below it, by the alphas s and b of both. src-atop is Krita's
# "inherit alpha".
OPERATORS = {
    "svg:src-atop": lambda s, b: (b, 1 - s),
    "svg:src-in": lambda s, b: (b, 0),
    "svg:src-out": lambda s, b: (1 - b, 0),
    "svg:dst-atop": lambda s, b: (1 - b, s),
    "svg:dst-in": lambda s, b: (0, s),
    "svg:dst-out": lambda s, b: (0, 1 - s),
    "svg:dst-over": lambda s, b: (1 - b, 1),
    "svg:xor": lambda s, b: (1 - b, 1 - s),
    "svg:src": lambda s, b: (1, 0),
    "svg:dst": lambda s, b: (0, 1),
    "svg:clear": lambda s, b: (0, 0),
}
MIMETYPE = b"image/openraster"
EFFECT = f"{{{NAMESPACE}}}effect"  # an attribute of our own, which other programs leave out
_XML_BYTES = 2**22
_PNG_OVERHEAD = 2**26  # what a layer's PNG may hold beside its pixels


def write(
    file: BinaryIO,
    stack: LayerStack,
    merged: Tensor,
    metadata: dict[str, Any],
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Write an OpenRaster file; merged: [H,W,3|4] flattened picture.

    Lossless in 8 bits, colours under alpha 0 included. A mask is multiplied into the alpha, which OpenRaster has
    instead; display size, rotation and flips are drawn into the pixels. metadata: JSON values, in mergedimage.png as
    SaveImage writes them.
    Raises ValueError for a blend mode that OpenRaster lacks.
    """
    root, names = _stack_xml(stack), [f"data/layer{index:03}.png" for index in range(len(stack.layers))]
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("mimetype", MIMETYPE)
        places = []
        for name, (encoded, x, y) in zip(
            names, in_parallel(partial(_encoded, stack.canvas), stack.layers), strict=True
        ):
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


def read(path: Path, groups: str = GROUPS[0], notes: list[str] | None = None) -> LayerStack:
    """Layers of an OpenRaster file, back to front, as [H,W,4].

    groups, notes: as psd.read takes them. The operators of OPERATORS become masks where that is exact, and else one
    layer.
    Sizes are checked before anything is unpacked. Raises ValueError with one sentence naming the file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(archive, path.name, groups, [] if notes is None else notes)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, OSError) as error:
        raise ValueError(
            f"{path.name} is not an OpenRaster file, or is damaged ({error}); save or upload it again."
        ) from error


def read_metadata(path: Path) -> dict[str, Any]:
    """What `write` put into the file, for example {"prompt": …, "workflow": …}."""
    with zipfile.ZipFile(path) as archive:
        return read_png_metadata(io.BytesIO(archive.read("mergedimage.png")))


def _stack_xml(stack: LayerStack) -> ElementTree.Element:
    """OpenRaster lists the topmost layer first."""
    root = ElementTree.Element("image", version="0.0.3", w=str(stack.canvas[0]), h=str(stack.canvas[1]))
    opened = [ElementTree.SubElement(root, "stack")]
    for layer in reversed(list(in_sequence(stack.layers))):
        if layer is None:
            opened.pop()
            continue
        if isinstance(layer, str):  # auto passes through
            opened.append(ElementTree.SubElement(opened[-1], "stack", name=plain_name(layer), isolation="auto"))
            continue
        if layer.blend_mode not in MODES:
            raise ValueError(
                f"layers: layer {layer.name!r} has the blend mode {layer.blend_mode}, which OpenRaster does not have; "
                f"save as PSD or PNG layers, or use one of {', '.join(MODES)}."
            )
        effect = effect_of(layer)
        ElementTree.SubElement(
            opened[-1],
            "layer",
            {
                "name": plain_name(layer.name),
                "opacity": repr(layer.opacity),
                "visibility": "visible" if layer.visible else "hidden",
                "composite-op": MODES[layer.blend_mode],
                **({EFFECT: effect} if effect else {}),
            },
        )
    return root


def _encoded(canvas: tuple[int, int], layer: Layer) -> tuple[bytes, int, int]:
    layer = in_place(layer, canvas)
    return _png(to_bytes(layer.image if layer.mask is None else layer.rgba()), {}), layer.x, layer.y


def _png(pixels: np.ndarray, metadata: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    write_png(file, pixels, metadata, compress_level=1)
    return file.getvalue()


def _read(archive: zipfile.ZipFile, name: str, groups: str, notes: list[str]) -> LayerStack:
    sizes = {info.filename: info.file_size for info in archive.infolist()}
    if "stack.xml" not in sizes:
        raise ValueError(f"{name} has no stack.xml, so it is not an OpenRaster file; choose another.")
    if sizes["stack.xml"] > _XML_BYTES:
        raise ValueError(
            f"{name}: its stack.xml would unpack to {sizes['stack.xml'] / 1e6:.0f} MB, which no real one has; the "
            "file is not loaded."
        )
    root = parse_xml(archive.read("stack.xml"), f"{name}: stack.xml")
    canvas = int(_number(root, "w", 0, name)), int(_number(root, "h", 0, name))
    check_sides(f"{name}: the canvas", *canvas)
    elements = [element for element in root.iter("layer") if _drawn(element)]
    check_total(name, [_png_size(archive, sizes, element, name) for element in elements])
    layers = []
    for top in reversed(root.findall("stack")):
        layers += _moved(_layers(archive, top, name, groups == GROUPS[1], notes), top, name)
    check_count(name, layers)
    return LayerStack(canvas, tuple(layers))


def _drawn(element: ElementTree.Element) -> bool:
    return element.get("src", "").lower().endswith(".png")


def _layers(
    archive: zipfile.ZipFile, stack: ElementTree.Element, name: str, merge: bool, notes: list[str]
) -> list[Layer]:
    """Of a stack, back to front."""
    layers: list[Layer] = []
    for element in reversed(stack):
        label, shown = plain_name(element.get("name", "")) or "Layer", element.get("visibility", "visible") != "hidden"
        operator = element.get("composite-op", "svg:src-over")
        if element.tag == "stack":
            opacity, own = (
                _opacity(element, name, notes),
                _moved(_layers(archive, element, name, False, notes), element, name),
            )
            # These act inside of the group alone.
            cuts = any(child.get("composite-op") in OPERATORS for child in element)
            mixes = (
                opacity == 1 and operator == "svg:src-over" and element.get("isolation", "auto") == "auto" and not cuts
            )
            mode = (
                "pass-through"
                if mixes
                else operator
                if operator in OPERATORS
                else DOCUMENT_MODES.get(operator, "normal")
            )
            new = grouped(own, label, mode, opacity, shown, lambda _: None, False, merge, notes)
        elif element.tag == "layer" and _drawn(element):
            new = [_layer(archive, element, shown, name, notes)]
        else:
            notes.append(f"{element.tag} {label!r} has no PNG pixels and is left out.")
            continue
        for layer in new:
            acts = operator in OPERATORS and layer.visible
            layer = replace(layer, blend_mode="normal") if operator in OPERATORS else layer
            layers = _composited(layers, layer, operator, notes) if acts else [*layers, layer]
        if operator not in DOCUMENT_MODES and (operator not in OPERATORS or not shown):
            notes.append(
                f"{label!r} has the blend mode {operator}, which ComfyUI's layers do not have; it is read as normal."
            )
    return layers


def _moved(layers: list[Layer], stack: ElementTree.Element, name: str) -> list[Layer]:
    """Layers of a stack that has a place of its own, as files from before version 0.0.2 may have it."""
    x, y = (round(_number(stack, key, 0, name)) for key in "xy")
    return [replace(layer, x=layer.x + x, y=layer.y + y) for layer in layers]


def _composited(below: list[Layer], layer: Layer, operator: str, notes: list[str]) -> list[Layer]:
    """A layer that acts by one of OPERATORS on what lies below it in its stack: by masks where these show the same, and
    else one layer of both.
    """
    shown = [one for one in below if one.visible]
    own = (layer.rgba()[..., 3] * layer.opacity).numpy()
    if operator == "svg:src-atop" and shown:
        merged = flattened([replace(one, blend_mode="normal") for one in shown], layer.name, notes)
        alpha = merged.image[..., 3].numpy()
        if _hard(alpha):
            return [*below, masked(layer, over(box_of(layer), alpha, merged.x, merged.y, 0))]
    if operator in ("svg:dst-in", "svg:dst-out") and shown and (_hard(own) or len(shown) == 1):
        inside, outside = (own, 0) if operator == "svg:dst-in" else (1 - own, 1)
        return [
            masked(one, over(box_of(one), inside, layer.x, layer.y, outside)) if one.visible else one for one in below
        ]
    ground = (
        flattened(shown, layer.name, notes) if shown else replace(layer, image=layer.rgba() * 0, mask=None, opacity=1.0)
    )
    left, top, right, bottom = (
        pick(sides)
        for pick, sides in zip((min, min, max, max), zip(box_of(ground), box_of(layer), strict=True), strict=True)
    )
    check_sides(f"layer {layer.name!r} with the layers below it", right - left, bottom - top)
    source, behind = (
        np.stack(
            [over((left, top, right, bottom), plane, one.x, one.y, 0) for plane in one.rgba().movedim(-1, 0).numpy()],
            -1,
        )
        for one in (layer, ground)
    )
    s, b = source[..., 3:] * layer.opacity, behind[..., 3:]
    from_source, from_behind = OPERATORS[operator](s, b)
    parts = s * from_source, b * from_behind
    alpha = sum(parts)
    colour = (source[..., :3] * parts[0] + behind[..., :3] * parts[1]) / np.where(alpha > 0, alpha, 1)
    notes.append(
        f"Layer {layer.name!r} and what is below it in its group are one layer now, because {operator} acts on both "
        "together."
    )
    image = torch.from_numpy(np.concatenate([colour, alpha], -1).astype(np.float32))
    return [*(one for one in below if not one.visible), Layer(image, layer.name, None, left, top)]


def _hard(alpha: np.ndarray) -> bool:
    """Whether every pixel is wholly opaque or wholly transparent."""
    return bool(((alpha == 0) | (alpha == 1)).all())


def _png_size(
    archive: zipfile.ZipFile, sizes: dict[str, int], element: ElementTree.Element, name: str
) -> tuple[int, int]:
    """The size that a layer's PNG declares, with its unpacked bytes checked against it; nothing but its head is
    unpacked here.
    """
    source, label = _source(element), f"{name}: layer {element.get('name', '')!r}"
    if PurePosixPath(source).is_absolute() or ".." in PurePosixPath(source).parts:
        raise ValueError(f"{label} points outside the file, to {source!r}; the file is not loaded.")
    if source not in sizes:
        raise ValueError(f"{label} names {source!r}, which is not in the file; save it again in your paint program.")
    with archive.open(source) as entry:
        head = entry.read(24)
    if head[:8] != b"\x89PNG\r\n\x1a\n" or head[12:16] != b"IHDR":
        raise ValueError(f"{label} is not a PNG image; save the file again in your paint program.")
    width, height = struct.unpack(">II", head[16:])
    check_sides(label, width, height)
    if sizes[source] > width * height * 8 + _PNG_OVERHEAD:
        raise ValueError(
            f"{label} would unpack to {sizes[source] / 1e6:.0f} MB for {width}×{height} pixels; the file is not loaded."
        )
    return width, height


def _source(element: ElementTree.Element) -> str:
    """The name in the archive: some programs write ./data/a.png, or data\\a.png."""
    return str(PurePosixPath(element.get("src", "").replace("\\", "/")))


def _layer(archive: zipfile.ZipFile, element: ElementTree.Element, visible: bool, name: str, notes: list[str]) -> Layer:
    label = element.get("name") or "Layer"
    try:
        with Image.open(io.BytesIO(archive.read(_source(element))), formats=["PNG"]) as image:
            pixels = in_srgb(image, label, notes)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{name}: the PNG of layer {label!r} cannot be read ({error}); save the file again in your paint program."
        ) from error
    x, y = (_number(element, key, 0, name) for key in "xy")
    if (x, y) != (round(x), round(y)):
        notes.append(f"Layer {label!r} lies between pixels and is moved to whole ones.")
    layer = Layer(
        from_bytes(pixels),
        label,
        None,
        round(x),
        round(y),
        opacity=_opacity(element, name, notes),
        blend_mode=DOCUMENT_MODES.get(element.get("composite-op", "svg:src-over"), "normal"),
        visible=visible,
    )
    return as_effect(layer, element.get(EFFECT))


def _opacity(element: ElementTree.Element, name: str, notes: list[str]) -> float:
    value = _number(element, "opacity", 1, name)
    known = min(max(value, 0.0), 1.0)
    if value != known:
        notes.append(f"{element.get('name') or 'Layer'!r} has the opacity {value:g}, which is read as {known:g}.")
    return known


def _number(element: ElementTree.Element, key: str, default: float, name: str) -> float:
    text = element.get(key, str(default))
    try:
        value = float(text)
        if abs(value) < 2**31:  # false for NaN too
            return value
    except ValueError:
        pass
    raise ValueError(
        f"{name}: stack.xml has {text!r} as the {key} of {element.get('name', element.tag)!r}, which is not a usable "
        "number."
    )
