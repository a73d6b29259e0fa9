"""Photoshop documents: layers with name, place, opacity, blend mode, visibility and mask, the flattened picture, and the workflow as XMP."""
from __future__ import annotations

import io
import json
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO
from xml.sax.saxutils import escape

import numpy as np
import torch
from torch import Tensor

from ..techniques.layers import BLEND_MODES, Layer, LayerStack
from .raster import check_sides, check_total, from_bytes, in_place, log, plain_name, to_bytes
from .xml import parse_xml

MISSING_MODES = ("grain-extract", "grain-merge")  # GIMP's; Photoshop has no such modes
MAX_BYTES = 2**31 - 1  # what Photoshop opens as PSD
XMP = 1060
NAMESPACE = "https://github.com/ComfyUI-Strata/ComfyUI-Strata"


def write(file: BinaryIO, stack: LayerStack, merged: Tensor, metadata: dict[str, Any], progress: Callable[[int], None] = lambda done: None) -> None:
    """Write an 8-bit RGB PSD; merged: [H,W,3|4] flattened picture, for programs that do not read layers.

    Lossless in 8 bits, colours under alpha 0 included. Display size, rotation and flips are drawn into the pixels, opacity becomes a
    255th. metadata: JSON values, put into XMP. progress is called with the number of layers done.
    Raises ValueError for a blend mode that PSD lacks and for a document over Photoshop's 2 GB.
    """
    from psd_tools.constants import ColorMode, Resource
    from psd_tools.psd import PSD
    from psd_tools.psd.header import FileHeader
    from psd_tools.psd.image_data import ImageData
    from psd_tools.psd.image_resources import ImageResource, ImageResources
    from psd_tools.psd.layer_and_mask import ChannelImageData, LayerAndMaskInformation, LayerInfo, LayerRecords

    _check_modes(stack)
    width, height = stack.canvas
    pixels = _over_white(to_bytes(merged))
    header = FileHeader(channels=pixels.shape[-1], width=width, height=height, color_mode=ColorMode.RGB)
    records, channels, size = LayerRecords(), ChannelImageData(), 0
    for done, layer in enumerate(stack.layers, 1):
        record, planes = _record(layer, stack.canvas)
        records.append(record)
        channels.append(planes)
        size += sum(len(plane.data) for plane in planes)
        if size > MAX_BYTES - 2 * pixels.size:
            raise ValueError("layers: they need more than the 2 GB of a PSD file; save as OpenRaster, or scale them down.")
        progress(done)
    compressed = _compressed(pixels.transpose(2, 0, 1).reshape(-1, width))
    # A negative count says that the merged picture's fourth channel is its transparency.
    info = LayerInfo(-len(records) if pixels.shape[-1] == 4 else len(records), records, channels)
    resources = ImageResources.new()
    resources[XMP] = ImageResource(key=Resource.XMP_METADATA.value, data=_xmp(metadata))
    PSD(header=header, image_resources=resources, layer_and_mask_information=LayerAndMaskInformation(layer_info=info),
        image_data=ImageData(compressed.compression, compressed.data)).write(file)


def read(path: Path) -> LayerStack:
    """Layers of a PSD or PSB, back to front, as [H,W,3|4].

    Groups become their leaves, with the groups' opacity, visibility and mask; clipped layers are cut to their base. What has no pixels
    (adjustments, fills) and layer effects are left out with a warning in the log. Grayscale, CMYK and other documents, and those with a
    colour profile, are converted to 8-bit sRGB. Raises ValueError with one sentence naming the file.
    """
    psd = _open(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return _read(psd, path.name)
    except _Refused as error:
        raise ValueError(str(error)) from error
    except Exception as error:  # a parser of strangers' files: whatever it stumbles over means the same to the user
        raise ValueError(f"{path.name} has damaged layers ({error}); save it again in your paint program.") from error


def read_metadata(path: Path) -> dict[str, Any]:
    """What `write` put into the file, for example {"prompt": …, "workflow": …}; empty for other programs' files."""
    data = _open(path)._record.image_resources.get_data(XMP)
    found = parse_xml(data, f"{path.name}: the XMP block").find(f".//{{{NAMESPACE}}}metadata") if data else None
    return {} if found is None else json.loads(found.text)


class _Refused(ValueError):
    """A document that is not damaged and cannot be taken all the same."""


def _check_modes(stack: LayerStack) -> None:
    for layer in stack.layers:
        if layer.blend_mode in MISSING_MODES:
            raise ValueError(f"layers: layer {layer.name!r} has the blend mode {layer.blend_mode}, which PSD does not have; "
                             "give it another blend mode, merge it with the layers below, or save as PNG layers.")


def _psd_mode(mode: str):
    from psd_tools.constants import BlendMode
    return BlendMode[mode.replace("-", "_").upper()]


def _record(layer: Layer, canvas: tuple[int, int]):
    """A layer's record and its compressed channels."""
    from psd_tools.constants import Tag
    from psd_tools.psd.layer_and_mask import ChannelDataList, ChannelInfo, LayerFlags, LayerRecord, MaskData

    layer = in_place(layer, canvas)
    planes = dict(zip((0, 1, 2, -1), to_bytes(layer.image.movedim(-1, 0)), strict=False))
    height, width = layer.image.shape[:2]
    box = {"top": layer.y, "left": layer.x, "bottom": layer.y + height, "right": layer.x + width}
    if layer.mask is not None:
        planes[-2] = 255 - to_bytes(layer.mask)
    data = ChannelDataList([_compressed(plane) for plane in planes.values()])
    name = plain_name(layer.name)
    record = LayerRecord(
        **box, channel_info=[ChannelInfo(channel) for channel in planes], blend_mode=_psd_mode(layer.blend_mode), opacity=round(layer.opacity * 255),
        flags=LayerFlags(visible=layer.visible), mask_data=None if layer.mask is None else MaskData(**box),
        name=name.encode("macroman", "replace")[:255].decode("macroman"))
    record.tagged_blocks.set_data(Tag.UNICODE_LAYER_NAME, name)
    return record, data


def _compressed(plane: np.ndarray):
    """One channel; run lengths when they are shorter, which every reader knows (not all know PSD's zip)."""
    from psd_tools.compression import compress
    from psd_tools.constants import Compression
    from psd_tools.psd.layer_and_mask import ChannelData

    height, width = plane.shape
    raw = plane.tobytes()
    packed = compress(raw, Compression.RLE, width, height, 8)
    return ChannelData(Compression.RLE, packed) if len(packed) < len(raw) else ChannelData(Compression.RAW, raw)


def _over_white(pixels: np.ndarray) -> np.ndarray:
    """Photoshop's form of a merged picture: colours already over white beside the alpha, which is left out where all is opaque."""
    if pixels.shape[-1] == 3 or pixels[..., 3].min() == 255:
        return pixels[..., :3]
    alpha = pixels[..., 3:].astype(np.uint16)
    colour = (pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255
    return np.concatenate([colour.astype(np.uint8), pixels[..., 3:]], axis=-1)


def _xmp(metadata: dict[str, Any]) -> bytes:
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description rdf:about="" xmlns:strata="{NAMESPACE}"><strata:metadata>{escape(json.dumps(metadata))}</strata:metadata>'
        '</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    ).encode()


def _open(path: Path):
    from psd_tools import PSDImage

    with open(path, "rb") as file:
        head = file.read(26)
    if len(head) < 26 or head[:4] != b"8BPS":
        raise ValueError(f"{path.name} is not a PSD file.")
    height, width = struct.unpack(">II", head[14:22])
    check_sides(path.name, width, height)
    try:
        return PSDImage.open(io.BytesIO(path.read_bytes()))
    except Exception as error:  # as in read
        raise ValueError(f"{path.name} is damaged or cut short ({error}); save or upload it again.") from error


def _read(psd, name: str) -> LayerStack:
    leaves = list(_leaves(psd, 1.0, True, ())) if len(psd) else []
    try:
        for leaf, *_ in leaves:
            check_sides(f"{name}: layer {leaf.name!r}", leaf.width, leaf.height)
        check_total(name, [(leaf.width, leaf.height) for leaf, *_ in leaves] or [psd.size])
    except ValueError as error:
        raise _Refused(str(error)) from error
    layers = [_layer(*leaf, name) for leaf in leaves] or [Layer(from_bytes(np.array(psd.topil().convert("RGBA"))), "Background")]
    return LayerStack(psd.size, tuple(layers))


def _leaves(group, opacity: float, visible: bool, masks: tuple):
    """(leaf, opacity, visible, groups with masks) of everything with pixels, back to front."""
    for item in group:
        own = opacity * (item.opacity / 255) * (item.fill_opacity / 255)
        shown = visible and item.visible
        if item.is_group():
            if item.blend_mode.name not in ("PASS_THROUGH", "NORMAL"):
                log.warning("The blend mode of group %r is not read; its layers keep their own.", item.name)
            yield from _leaves(item, own, shown, (*masks, item))
        elif item.has_pixels() and item.width and item.height:
            yield item, own, shown, masks
        else:
            log.warning("Layer %r (%s) has no pixels of its own and is left out.", item.name, item.kind)


def _layer(leaf, opacity: float, visible: bool, groups: tuple, name: str) -> Layer:
    if leaf.has_effects():
        log.warning("%s: the effects of layer %r are not read.", name, leaf.name)
    factors = [factor for factor in (*(_mask(item, leaf.bbox) for item in (leaf, *groups)), _base(leaf)) if factor is not None]
    mask = None if not factors else torch.from_numpy(1 - np.prod(factors, axis=0, dtype=np.float32))
    return Layer(_image(leaf), leaf.name or "Layer", mask, leaf.left, leaf.top, opacity=_readable(opacity), blend_mode=_document_mode(leaf, name),
                 visible=visible)


def _image(leaf) -> Tensor:
    """[H,W,3|4]; RGB as it is stored, anything else through Pillow's conversion, which also applies a colour profile."""
    from psd_tools.constants import ColorMode, Resource

    psd = leaf._psd
    if psd.color_mode == ColorMode.RGB and psd.depth in (8, 16) and Resource.ICC_PROFILE not in psd.image_resources:
        return torch.from_numpy(np.ascontiguousarray(leaf.numpy(), dtype=np.float32))
    colour = from_bytes(np.array(leaf.topil().convert("RGB")))
    shape = leaf.numpy("shape")
    return colour if shape is None else torch.cat([colour, torch.from_numpy(np.ascontiguousarray(shape, dtype=np.float32))], dim=-1)


def _mask(item, box: tuple[int, int, int, int]) -> np.ndarray | None:
    """[H,W], 1 = opaque, of a layer's or group's own mask over a box (left, top, right, bottom) of the canvas."""
    if not item.has_mask() or item.mask.disabled:
        return None
    pixels = item.numpy("mask")
    return _over(box, None if pixels is None else pixels[..., 0], item.mask.left, item.mask.top, item.mask.background_color / 255)


def _base(leaf) -> np.ndarray | None:
    """[H,W], 1 = opaque: the base that a clipped layer is cut to, over the layer's box."""
    siblings = list(leaf.parent)
    below = [item for item in siblings[:siblings.index(leaf)] if not item.clipping]
    if not leaf.clipping or not below:
        return None
    base = below[-1]
    if base.is_group() or not base.has_pixels():
        log.warning("Layer %r is clipped to %r, which has no pixels of its own; the clipping is not read.", leaf.name, base.name)
        return None
    shape = base.numpy("shape")
    shape = np.ones((base.height, base.width), np.float32) if shape is None else shape[..., 0]
    covered = _over(leaf.bbox, shape, base.left, base.top, 0)
    masked = _mask(base, leaf.bbox)
    return covered if masked is None else covered * masked


def _over(box: tuple[int, int, int, int], pixels: np.ndarray | None, x: int, y: int, outside: float) -> np.ndarray:
    """The part of pixels, whose top left corner is at x, y, that a box of the canvas shows; `outside` where they do not reach."""
    left, top, right, bottom = box
    shown = np.full((bottom - top, right - left), outside, np.float32)
    if pixels is not None:
        first, last = (max(left, x), max(top, y)), (min(right, x + pixels.shape[1]), min(bottom, y + pixels.shape[0]))
        if first[0] < last[0] and first[1] < last[1]:
            shown[first[1] - top:last[1] - top, first[0] - left:last[0] - left] = pixels[first[1] - y:last[1] - y, first[0] - x:last[0] - x]
    return shown


def _document_mode(leaf, name: str) -> str:
    mode = leaf.blend_mode.name.lower().replace("_", "-")
    if mode not in BLEND_MODES:
        log.warning("%s: layer %r has the blend mode %s, which ComfyUI's layers do not have; it is read as normal.", name, leaf.name, mode)
        return "normal"
    return mode


def _readable(opacity: float) -> float:
    """The hundredth that is stored as this 255th, as Photoshop shows it, or the opacity itself."""
    hundredth = round(opacity, 2)
    return hundredth if round(hundredth * 255) == opacity * 255 else opacity
