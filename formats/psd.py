"""Photoshop documents: layers with name, place, opacity, blend mode, visibility and mask, the flattened picture, and
the workflow as XMP.
"""

from __future__ import annotations

import io
import json
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO
from xml.sax.saxutils import escape

import numpy as np
import torch
from PIL import Image, ImageCms
from torch import Tensor

from ..techniques.layers import BLEND_MODES, Layer, LayerStack, as_effect, effect_of
from .groups import GROUPS, box_of, flattened, grouped, in_sequence, masked
from .raster import (
    Refused,
    check_count,
    check_sides,
    check_total,
    eight_bits,
    from_bytes,
    in_place,
    is_srgb,
    modes_note,
    over,
    picture,
    plain_name,
    quantised,
    srgb_profile,
)
from .xml import NAMESPACE, parse_xml

MISSING_MODES = ("grain-extract", "grain-merge")  # GIMP's; Photoshop has no such modes
MAX_BYTES = 2**31 - 1  # what Photoshop opens as PSD
XMP, ICC = 1060, 1039
EFFECT = b"strE"  # of a layer's metadata, see _set_effect


def write(
    file: BinaryIO,
    stack: LayerStack,
    merged: Tensor,
    metadata: dict[str, Any],
    progress: Callable[[int], None] = lambda done: None,
    bits: int = 8,
) -> None:
    """Write an RGB PSD; merged: [H,W,3|4] flattened picture, for programs that do not read layers.

    Lossless in its bits, 8 or 16 a channel, colours under alpha 0 included. Display size, rotation and flips are drawn
    into the pixels, opacity becomes a 255th. Groups pass through. metadata: JSON values, put into XMP. progress is
    called with the number of layers done. Raises ValueError for a blend mode that PSD lacks and for a document over
    Photoshop's 2 GB.
    """
    from psd_tools.constants import ColorMode, Resource, Tag
    from psd_tools.psd import PSD
    from psd_tools.psd.header import FileHeader
    from psd_tools.psd.image_data import ImageData
    from psd_tools.psd.image_resources import ImageResource, ImageResources
    from psd_tools.psd.layer_and_mask import (
        ChannelImageData,
        GlobalLayerMaskInfo,
        LayerAndMaskInformation,
        LayerInfo,
        LayerRecords,
    )
    from psd_tools.psd.tagged_blocks import TaggedBlocks

    _check_modes(stack)
    width, height = stack.canvas
    pixels = _over_white(quantised(merged, bits))
    header = FileHeader(channels=pixels.shape[-1], width=width, height=height, depth=bits, color_mode=ColorMode.RGB)
    records, channels, size, done = LayerRecords(), ChannelImageData(), 0, 0
    for part in in_sequence(stack.layers):
        record, planes = _record(part, stack.canvas, bits) if isinstance(part, Layer) else _divider(part)
        records.append(record)
        channels.append(planes)
        size += sum(len(plane.data) for plane in planes)
        if size > MAX_BYTES - 2 * pixels.nbytes:
            raise ValueError(
                "layers: they need more than the 2 GB of a PSD file; save as OpenRaster, or scale them down."
            )
        if isinstance(part, Layer):
            progress(done := done + 1)
    compressed = _compressed(pixels.transpose(2, 0, 1).reshape(-1, width))
    # A negative count says that the merged picture's fourth channel is its transparency.
    info = -len(records) if pixels.shape[-1] == 4 else len(records), records, channels
    layers = LayerAndMaskInformation(LayerInfo(*info))
    if bits == 16:  # Photoshop has these in a block of their own
        blocks = TaggedBlocks()
        blocks.set_data(Tag.LAYER_16, *info)
        layers = LayerAndMaskInformation(LayerInfo(), GlobalLayerMaskInfo(), blocks)
    resources = ImageResources.new()
    resources[XMP] = ImageResource(key=Resource.XMP_METADATA.value, data=_xmp(metadata))
    if bits == 16:  # Krita takes colours of 16 bits without a profile for linear light
        resources[ICC] = ImageResource(key=ICC, data=srgb_profile())
    PSD(
        header=header,
        image_resources=resources,
        layer_and_mask_information=layers,
        image_data=ImageData(compressed.compression, compressed.data),
    ).write(file)


def read(path: Path, groups: str = GROUPS[0], notes: list[str] | None = None) -> LayerStack:
    """Layers of a PSD or PSB, back to front, as [H,W,3|4].

    groups: leaves gives a group's layers where they show the same without it, with its opacity, visibility and mask,
    and otherwise the group as one layer; "one layer each" gives every outermost group as one. Clipped layers are cut to
    their base, or one with it.
    notes: gets a sentence for everything that is left out or changed (adjustments, fills, effects, modes). Grayscale,
    CMYK and other documents, and those with a colour profile, are converted to 8-bit sRGB. Raises ValueError with one
    sentence naming the file.
    """
    psd = _open(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return _read(psd, path.name, groups, [] if notes is None else notes)
    except Refused:
        raise
    except Exception as error:  # a parser of strangers' files: whatever it stumbles over means the same to the user
        raise ValueError(f"{path.name} has damaged layers ({error}); save it again in your paint program.") from error


def read_metadata(path: Path) -> dict[str, Any]:
    """What `write` put into the file, for example {"prompt": …, "workflow": …}; empty for other programs' files."""
    data = _open(path)._record.image_resources.get_data(XMP)
    text = parse_xml(data, f"{path.name}: the XMP block").findtext(f".//{{{NAMESPACE}}}metadata") if data else None
    return json.loads(text) if text else {}


def _check_modes(stack: LayerStack) -> None:
    for layer in stack.layers:
        if layer.blend_mode in MISSING_MODES:
            raise ValueError(
                f"layers: layer {layer.name!r} has the blend mode {layer.blend_mode}, which PSD does not have; "
                "give it another blend mode, merge it with the layers below, or save as PNG layers."
            )


def _psd_mode(mode: str):
    from psd_tools.constants import BlendMode

    return BlendMode[mode.replace("-", "_").upper()]


def _record(layer: Layer, canvas: tuple[int, int], bits: int):
    """A layer's record and its compressed channels."""
    from psd_tools.psd.layer_and_mask import ChannelDataList, ChannelInfo, LayerFlags, LayerRecord, MaskData

    layer = in_place(layer, canvas)
    planes = dict(zip((0, 1, 2, -1), quantised(layer.image.movedim(-1, 0), bits), strict=False))
    height, width = layer.image.shape[:2]
    box = layer.y, layer.x, layer.y + height, layer.x + width  # top, left, bottom, right
    if layer.mask is not None:
        planes[-2] = 2**bits - 1 - quantised(layer.mask, bits)
    data = ChannelDataList([_compressed(plane) for plane in planes.values()])
    record = LayerRecord(
        *box,
        channel_info=[ChannelInfo(channel) for channel in planes],
        blend_mode=_psd_mode(layer.blend_mode),
        opacity=round(layer.opacity * 255),
        flags=LayerFlags(visible=layer.visible),
        mask_data=None if layer.mask is None else MaskData(*box),
    )
    _set_name(record, layer.name)
    if kind := effect_of(layer):
        _set_effect(record, kind)
    return record, data


def _divider(name: str | None):
    """The record that ends a group, which passes through, or with None the one that begins it; and its empty
    channels.
    """
    from psd_tools.constants import BlendMode, Compression, SectionDivider, Tag
    from psd_tools.psd.layer_and_mask import ChannelData, ChannelDataList, ChannelInfo, LayerRecord

    record = LayerRecord(channel_info=[ChannelInfo(channel, 2) for channel in (-1, 0, 1, 2)])
    if name is None:
        record.tagged_blocks.set_data(Tag.SECTION_DIVIDER_SETTING, SectionDivider.BOUNDING_SECTION_DIVIDER)
    else:
        kind = {"kind": SectionDivider.OPEN_FOLDER, "signature": b"8BIM", "blend_mode": BlendMode.PASS_THROUGH}
        record.tagged_blocks.set_data(Tag.SECTION_DIVIDER_SETTING, **kind)
        record.blend_mode = BlendMode.PASS_THROUGH
    _set_name(record, "</Layer group>" if name is None else name)
    channels = ChannelDataList()
    channels.extend(ChannelData(Compression.RAW, b"") for _ in record.channel_info)
    return record, channels


def _set_name(record, name: str) -> None:
    from psd_tools.constants import Tag

    name = plain_name(name)
    record.name = name.encode("macroman", "replace")[:255].decode("macroman")
    record.tagged_blocks.set_data(Tag.UNICODE_LAYER_NAME, name)


def _set_effect(record, kind: str) -> None:
    """What an effect is goes into the block that Photoshop has for other programs' notes of a layer, which are copied
    with it.
    """
    from psd_tools.constants import Tag
    from psd_tools.psd.tagged_blocks import MetadataSetting, MetadataSettings

    data = kind.encode().ljust(-len(kind) % 4 + len(kind), b"\0")
    setting = MetadataSetting(key=EFFECT, copy_on_sheet=True, data=data)
    settings = MetadataSettings([setting])  # type: ignore[list-item]  # psd-tools does not say what its list holds
    record.tagged_blocks.set_data(Tag.METADATA_SETTING, settings)


def _effect(item) -> str | None:
    from psd_tools.constants import Tag

    settings = item.tagged_blocks.get_data(Tag.METADATA_SETTING) or ()
    data = next((setting.data for setting in settings if setting.key == EFFECT), b"")
    return data.rstrip(b"\0").decode("ascii", "replace") if isinstance(data, bytes) else None


def _compressed(plane: np.ndarray):
    """One channel [H,W] of 8 or 16 bits; run lengths when they are shorter, which every reader knows (not all know
    PSD's zip).
    """
    from psd_tools.compression import compress
    from psd_tools.constants import Compression
    from psd_tools.psd.layer_and_mask import ChannelData

    height, width = plane.shape
    raw = plane.astype(plane.dtype.newbyteorder(">")).tobytes()
    packed = compress(raw, Compression.RLE, width, height, 8 * plane.itemsize)
    return ChannelData(Compression.RLE, packed) if len(packed) < len(raw) else ChannelData(Compression.RAW, raw)


def _over_white(pixels: np.ndarray) -> np.ndarray:
    """Photoshop's form of a merged picture: colours already over white beside the alpha, which is left out where all is
    opaque.
    """
    top = np.iinfo(pixels.dtype).max
    if pixels.shape[-1] == 3 or pixels[..., 3].min() == top:
        return pixels[..., :3]
    alpha = pixels[..., 3:].astype(np.uint32)  # a product of two 16-bit values and half of one still fits
    colour = (pixels[..., :3] * alpha + top * (top - alpha) + top // 2) // top
    return np.concatenate([colour.astype(pixels.dtype), pixels[..., 3:]], axis=-1)


def _xmp(metadata: dict[str, Any]) -> bytes:
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" '
        f'xmlns:strata="{NAMESPACE}"><strata:metadata>{escape(json.dumps(metadata))}</strata:metadata>'
        '</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    ).encode()


def _open(path: Path):
    from psd_tools import PSDImage

    with open(path, "rb") as file:
        head = file.read(26)
    if len(head) < 26 or head[:4] != b"8BPS":
        raise ValueError(f"{path.name} is not a PSD file; save it again as PSD, or choose another.")
    height, width = struct.unpack(">II", head[14:22])
    check_sides(path.name, width, height)
    try:
        return PSDImage.open(io.BytesIO(path.read_bytes()))
    except Exception as error:  # as in read
        raise ValueError(f"{path.name} is damaged or cut short ({error}); save or upload it again.") from error


def _read(psd, name: str, groups: str, notes: list[str]) -> LayerStack:
    leaves = [item for item in psd.descendants() if not item.is_group() and _drawn(item)]
    for leaf in leaves:
        check_sides(f"{name}: layer {leaf.name!r}", leaf.width, leaf.height)
    check_total(name, [(leaf.width, leaf.height) for leaf in leaves] or [psd.size])
    layers = [
        replace(layer, opacity=_readable(layer.opacity)) for layer in _Layers(notes, groups == GROUPS[1]).of(psd)
    ] or [_flat(psd, notes)]
    check_count(name, layers)
    return LayerStack(psd.size, tuple(layers))


def _drawn(item) -> bool:
    return bool(item.has_pixels() and item.width and item.height)


@dataclass
class _Layers:
    """A document's items as layers. notes: what is lost; merged: whether groups become one layer each."""

    notes: list[str]
    merged: bool = False

    def of(self, items) -> list[Layer]:
        """Back to front; clipped items go with the item below them that is not."""
        layers, siblings = [], list(items)
        while siblings:
            item = siblings.pop(0)
            clipped = []
            while siblings and siblings[0].clipping:
                clipped += self.pieces(siblings.pop(0))
            own = self.pieces(item, isolated=bool(clipped))
            layers += self.clipped(own, clipped, item.name) if clipped and own else own or self.uncovered(item, clipped)
        return layers

    def pieces(self, item, isolated: bool = False) -> list[Layer]:
        """An item as layers. isolated: a pass-through group is read as normal, since layers are clipped to it."""
        if item.is_group() or _drawn(item):
            self.notes += [
                f"The {what} of {'group' if item.is_group() else 'layer'} {_name(item)!r} {verb} not read."
                for what, verb in _unread(item)
            ]
        if item.is_group():
            return self.group(item, isolated)
        if _drawn(item):
            return [self.leaf(item)]
        self.notes.append(f"Layer {_name(item)!r} ({item.kind}) has no pixels of its own and is left out.")
        return []

    def uncovered(self, base, tops: list[Layer]) -> list[Layer]:
        """Layers clipped to something without pixels: to a fill, which is there wherever its mask lets it, or to what
        draws nothing at all.
        """
        opacity = base.opacity / 255 * (base.fill_opacity / 255) if base.kind.endswith("fill") else 0
        shown = base.visible and opacity > 0
        return [
            replace(
                masked(top, self.mask(base, box_of(top))),
                opacity=top.opacity * (opacity or 1),
                visible=top.visible and shown,
            )
            for top in tops
        ]

    def leaf(self, item) -> Layer:
        opacity = item.opacity / 255 * (item.fill_opacity / 255)
        layer = Layer(
            _image(item, self.notes),
            _name(item),
            None,
            item.left,
            item.top,
            opacity=opacity,
            blend_mode=self.mode(item),
            visible=item.visible,
        )
        return masked(as_effect(layer, _effect(item)), self.mask(item, item.bbox))

    def mode(self, item) -> str:
        mode = item.blend_mode.name.lower().replace("_", "-")
        if mode in BLEND_MODES or mode == "pass-through":
            return mode
        self.notes.append(
            f"Layer {_name(item)!r} has the blend mode {mode}, which ComfyUI's layers do not have; it is read as "
            "normal."
        )
        return "normal"

    def mask(self, item, box: tuple[int, int, int, int]) -> np.ndarray | None:
        """[H,W], 1 = opaque, of a layer's or group's own mask over a box (left, top, right, bottom) of the canvas."""
        if not item.has_mask() or item.mask.disabled:
            return None
        pixels, more = item.numpy("mask"), item.mask._data.parameters
        values = over(
            box,
            None if pixels is None else pixels[..., 0],
            item.mask.left,
            item.mask.top,
            item.mask.background_color / 255,
        )
        density = (
            next((value for value in (more.user_mask_density, more.vector_mask_density) if value is not None), 255)
            if more
            else 255
        )
        if more and (more.user_mask_feather or more.vector_mask_feather):
            self.notes.append(f"The feather of the mask of {_name(item)!r} is not read.")
        return 1 - density / 255 * (1 - values)

    def group(self, item, isolated: bool) -> list[Layer]:
        outermost, self.merged = self.merged, False
        own = self.of(item)
        self.merged = outermost
        mode = self.mode(item)
        mode = "normal" if isolated and mode == "pass-through" else mode
        return grouped(
            own,
            _name(item),
            mode,
            item.opacity / 255 * (item.fill_opacity / 255),
            item.visible,
            lambda layer: self.mask(item, box_of(layer)),
            item.has_mask() and not item.mask.disabled,
            outermost,
            self.notes,
        )

    def clipped(self, base: list[Layer], tops: list[Layer], name: str) -> list[Layer]:
        """Layers cut to a base: what they all make has the base's alpha, opacity and blend mode."""
        visible, shown = [layer for layer in base if layer.visible], [top for top in tops if top.visible]
        if not visible:
            return base + [replace(top, visible=False) for top in tops]
        ground = base[0] if len(base) == 1 else flattened(visible, name, self.notes if shown else [])
        alpha = ground.rgba()[..., 3].numpy()
        if not shown:
            return base + [masked(top, over(box_of(top), alpha, ground.x, ground.y, 0)) for top in tops]
        if len(base) > 1:
            hidden = "; its hidden layers are left out" if len(visible) < len(base) else ""
            self.notes.append(f"Group {name!r} is one layer now, because other layers are clipped to it{hidden}.")
        if ground.opacity < 1 or ground.blend_mode != "normal":
            hidden = "; the hidden ones of them are left out" if len(shown) < len(tops) else ""
            self.notes.append(
                f"The layers that are clipped to {ground.name!r} are one with it now, because its opacity or blend "
                f"mode acts on them too{hidden}."
            )
            self.notes += modes_note(shown, f"The merged layer {ground.name!r}", ", because there is no formula for it")
            under = replace(ground, image=ground.image[..., :3], mask=None, opacity=1.0, blend_mode="normal")
            colour = _over_base(under, shown)
            return [replace(ground, image=torch.cat([colour, torch.from_numpy(alpha)[..., None]], -1), mask=None)]
        # Where the base is half transparent, over leaves more of it behind a clipped layer than clipping does: shares
        # are taken off from the front.
        free, cut = np.ones_like(alpha), []
        for top in reversed(tops):
            share, apart = alpha, top.visible and top.blend_mode == "normal"
            if apart:
                share = alpha * free / np.maximum(1 - alpha * (1 - free), 1e-6)
                own = (top.rgba()[..., 3] * top.opacity).numpy()
                free = free * (1 - over(box_of(ground), own, top.x, top.y, 0))
            elif top.visible and ((alpha > 0) & (alpha < 1)).any():
                self.notes.append(
                    f"Layer {top.name!r} mixes by {top.blend_mode} with what is behind its base too, at the base's "
                    "soft edges."
                )
            cut.append(masked(top, over(box_of(top), share, ground.x, ground.y, 0)))
        kept = np.where(alpha < 1, free / np.maximum(1 - alpha * (1 - free), 1e-6), 1).astype(np.float32)
        return [masked(ground, None if (kept == 1).all() else kept), *reversed(cut)]


def _name(item) -> str:
    return plain_name(item.name.rstrip("\0")) or "Layer"


def _unread(item) -> list[tuple[str, str]]:
    """What else Photoshop draws a layer by, with the verb of its sentence."""
    from psd_tools.constants import Tag

    ranges = item._record.blending_ranges
    limits = [
        tuple(limit) for channel in (ranges.composite_ranges, *(ranges.channel_ranges or ())) for limit in channel or ()
    ]
    drawn_by = {
        ("effects", "are"): item.has_effects(),
        ("vector mask", "is"): item.kind == "pixel"
        and item.has_vector_mask()
        and not item.has_mask()
        and not item.vector_mask.disabled,
        ("Blend If ranges", "are"): any(limit not in ((0, 65535), (0, 0)) for limit in limits),
        ("knockout", "is"): int(item.tagged_blocks.get_data(Tag.KNOCKOUT_SETTING, 0)) > 0,
        ("setting 'Blend Clipped Layers as Group'", "is"): not int(
            item.tagged_blocks.get_data(Tag.BLEND_CLIPPING_ELEMENTS, 1)
        ),
    }
    return [words for words, present in drawn_by.items() if present]


def _over_base(base: Layer, tops: list[Layer]) -> Tensor:
    """[H,W,3] of layers over an opaque base, within its box."""
    height, width = base.image.shape[:2]
    return picture(
        LayerStack(
            (width, height), tuple(replace(layer, x=layer.x - base.x, y=layer.y - base.y) for layer in (base, *tops))
        )
    )[..., :3]


def _flat(psd, notes: list[str]) -> Layer:
    """The picture of a document without layers. Its further channels are saved selections, unless the file says that
    the first is transparency: by a negative number of layers, a block of merged transparency or the identifier 0.
    """
    from psd_tools.constants import Resource, Tag
    from psd_tools.psd.image_resources import AlphaIdentifiers, ImageResource

    info, identifiers = (
        psd._record.layer_and_mask_information.layer_info,
        psd.image_resources.get_data(Resource.ALPHA_IDENTIFIERS),
    )
    blocks = (Tag.SAVING_MERGED_TRANSPARENCY, Tag.SAVING_MERGED_TRANSPARENCY16, Tag.SAVING_MERGED_TRANSPARENCY32)
    transparent = (
        info is not None
        and info.layer_count < 0
        or 0 in (identifiers or ())
        or any(key in (psd.tagged_blocks or ()) for key in blocks)
    )
    if not transparent:  # or psd-tools would take the selection for transparency, and white out of the colours by it
        # psd-tools' annotations know bytes alone here, and not what a list of its own is made of.
        psd.image_resources[Resource.ALPHA_IDENTIFIERS] = ImageResource(
            key=Resource.ALPHA_IDENTIFIERS.value,
            data=AlphaIdentifiers([1]),  # type: ignore[arg-type, list-item]
        )
    pixels = _srgb(_pillow(psd, notes))
    return Layer(from_bytes(pixels if transparent else pixels[..., :3]), "Background")


def _pillow(item, notes: list[str]) -> Image.Image:
    """A layer's or document's picture as Pillow takes it: of 8 bits, its colour profile applied."""
    if getattr(item, "_psd", item).depth > 8:
        _once(
            notes,
            "The file's colours of more than 8 bits are converted to 8, because of its colour profile or colour mode.",
        )
    try:
        return item.topil()
    except (ImageCms.PyCMSError, OSError):
        _once(notes, "The colour profile cannot be read; the colours are taken as sRGB.")
        return item.topil(apply_icc=False)


def _once(notes: list[str], note: str) -> None:
    """Of the whole file, though every layer meets it."""
    if note not in notes:
        notes.append(note)


def _srgb(image: Image.Image) -> np.ndarray:
    """[H,W,3|4] 8 bits of a Pillow picture of any mode."""
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.buildTransform(lab, srgb, "LAB", "RGB").apply(image)
    return eight_bits(image)


def _image(leaf, notes: list[str]) -> Tensor:
    """[H,W,3|4]; RGB as it is stored, anything else through Pillow's conversion, which also applies a colour
    profile.
    """
    from psd_tools.constants import ColorMode, Resource

    psd = leaf._psd
    profile = psd.image_resources.get_data(Resource.ICC_PROFILE)
    stored = profile is None or psd.depth == 16 and is_srgb(profile)
    if psd.color_mode == ColorMode.RGB and psd.depth in (8, 16) and stored:
        return torch.from_numpy(np.ascontiguousarray(leaf.numpy(), dtype=np.float32))
    colour = from_bytes(_srgb(_pillow(leaf, notes))[..., :3])
    shape = leaf.numpy("shape")
    return (
        colour
        if shape is None
        else torch.cat([colour, torch.from_numpy(np.ascontiguousarray(shape, dtype=np.float32))], dim=-1)
    )


def _readable(opacity: float) -> float:
    """The hundredth that is stored as this 255th, as Photoshop shows it, or the opacity itself."""
    hundredth = round(opacity, 2)
    return hundredth if round(hundredth * 255) == opacity * 255 else opacity
