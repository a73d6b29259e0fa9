"""ComfyUI's LAYERS document, read and written in one place.

A document comes from any node of any pack, so everything in it is checked here and nowhere else. The rest of the pack
works with `LayerStack` and `Layer`: one frame per layer, every field present, back to front.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

MAX_LAYERS = 50
MAX_SIDE = 16384
MAX_GROUPS = 64  # in each other
BLEND_MODES = (
    "normal",
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
    "exclusion",
    "linear-dodge",
    "linear-burn",
    "vivid-light",
    "pin-light",
    "linear-light",
    "hard-mix",
    "subtract",
    "divide",
    "grain-extract",
    "grain-merge",
    "hue",
    "saturation",
    "color",
    "luminosity",
)
EFFECTS = ("shadow", "glow", "shade", "light")  # of an object: what darkens and brightens the ground, and itself
_FIELDS = {
    "type",
    "image",
    "mask",
    "name",
    "x",
    "y",
    "w",
    "h",
    "rotation",
    "flip_h",
    "flip_v",
    "z_index",
    "opacity",
    "blend_mode",
    "visible",
}


@dataclass(frozen=True)
class Layer:
    """One raster layer on the canvas.

    image: [H,W,3|4] sRGB in 0..1, straight alpha. mask: [H,W], 1 = transparent, or None. x, y: top left corner of the
    unrotated layer on the canvas, pixels. w, h: display size in pixels, 0 = native. rotation: radians, clockwise, about
    the centre.
    extra: keys that are not ComfyUI's, carried through unchanged; ours are under extra["strata"].
    """

    image: Tensor
    name: str = "Layer"
    mask: Tensor | None = None
    x: int = 0
    y: int = 0
    w: int = 0
    h: int = 0
    rotation: float = 0.0
    flip_h: bool = False
    flip_v: bool = False
    opacity: float = 1.0
    blend_mode: str = "normal"
    visible: bool = True
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int]:
        """Displayed (width, height) in pixels before rotation; ComfyUI reads an absent or non-positive side as the
        native one.
        """
        height, width = self.image.shape[:2]
        return (self.w if self.w > 0 else width), (self.h if self.h > 0 else height)

    def rgba(self) -> Tensor:
        """[H,W,4] at native size: the image with the mask multiplied into its alpha."""
        alpha = self.image[..., 3] if self.image.shape[-1] == 4 else torch.ones_like(self.image[..., 0])
        if self.mask is not None:
            alpha = alpha * (1 - self.mask)
        return torch.cat([self.image[..., :3], alpha[..., None]], dim=-1)

    def with_pixels(self, image: Tensor, x: int = 0, y: int = 0) -> Layer:
        """The layer with other pixels [H,W,3|4] at native size, upright, without a mask; all else stays."""
        return replace(self, image=image, mask=None, x=x, y=y, w=0, h=0, rotation=0.0, flip_h=False, flip_v=False)


@dataclass(frozen=True)
class LayerStack:
    """canvas: (width, height) in pixels. layers: back to front."""

    canvas: tuple[int, int]
    layers: tuple[Layer, ...]

    def with_layers(self, layers) -> LayerStack:
        return replace(self, layers=tuple(layers))


def read_layers(document: Any, socket: str = "layers") -> LayerStack:
    """Check a LAYERS document and return it back to front, one frame per layer.

    Raises ValueError with one sentence that names the socket, the layer and the field.
    Source: ours, ComfyUI's layer document, version 1.
    """
    if not isinstance(document, dict) or "layers" not in document:
        raise ValueError(
            f"{socket}: this is not a LAYERS document (got {type(document).__name__}); connect the output of a node "
            "that makes layers."
        )
    if document.get("version") != 1:
        raise ValueError(
            f"{socket}: the LAYERS document has version {document.get('version')!r} and only version 1 is known; "
            "update ComfyUI-Strata or the node that made it."
        )
    entries = document["layers"]
    if not isinstance(entries, (list, tuple)) or not entries:
        raise ValueError(f"{socket}: the LAYERS document has no layers; add at least one.")
    numbered = []
    for position, entry in enumerate(entries):
        for layer in _read_entry(entry, position, socket):
            numbered.append((_integer(entry, "z_index", 0, f"{socket}: layer {layer.name!r}"), layer))
    numbered.sort(key=lambda item: item[0])
    layers = tuple(layer for _, layer in numbered)
    _check_count(len(layers), socket)
    return LayerStack(_read_canvas(document.get("canvas"), layers, socket), layers)


def write_layers(stack: LayerStack) -> dict[str, Any]:
    """The LAYERS document of a stack; z_index counts up from 0 at the back.

    Raises ValueError for zero layers or more than ComfyUI takes.
    Source: ours, ComfyUI's layer document, version 1.
    """
    _check_count(len(stack.layers), "layers")
    entries = []
    for index, layer in enumerate(stack.layers):
        entry = {
            **layer.extra,
            "type": "raster",
            "image": layer.image[None],
            "name": layer.name,
            "x": layer.x,
            "y": layer.y,
            "w": layer.w,
            "h": layer.h,
            "rotation": layer.rotation,
            "flip_h": layer.flip_h,
            "flip_v": layer.flip_v,
            "z_index": index,
            "opacity": layer.opacity,
            "blend_mode": layer.blend_mode,
            "visible": layer.visible,
        }
        if layer.mask is not None:
            entry["mask"] = layer.mask[None]
        entries.append(entry)
    return {"version": 1, "canvas": tuple(stack.canvas), "layers": entries}


def parent_of(layer: Layer) -> tuple[str, ...]:
    """Names of the groups that a layer lies in, the outermost first; () for a layer in none.

    The document has them as a list `parent` under "strata". Layers of one group stand side by side in the stack. A
    group only holds layers together: it has no opacity, mask or blend mode, and what is shown does not depend on it.
    Source: ours, groups of layer files in ComfyUI's layer document.
    """
    ours = layer.extra.get("strata")
    return tuple(ours.get("parent") or ()) if isinstance(ours, dict) else ()


def in_group(layer: Layer, name: str) -> Layer:
    """The layer in one more group, around those that it lies in; of more than MAX_GROUPS the innermost stay.

    Source: ours, groups of layer files in ComfyUI's layer document.
    """
    return in_groups(layer, [name, *parent_of(layer)])


def in_groups(layer: Layer, parent: Sequence[str]) -> Layer:
    """The layer in these groups alone, the outermost first; of more than MAX_GROUPS the innermost stay.

    Source: ours, groups of layer files in ComfyUI's layer document.
    """
    return _with_ours(layer, parent=list(parent)[-MAX_GROUPS:])


def effect_of(layer: Layer) -> str | None:
    """What a layer does to the object of its group, one of EFFECTS; None for a layer that is no effect.

    Source: ours, a mark `effect` under "strata" in ComfyUI's layer document
    """
    ours = layer.extra.get("strata")
    kind = ours.get("effect") if isinstance(ours, dict) else None
    return kind if isinstance(kind, str) and kind in EFFECTS else None


def as_effect(layer: Layer, kind: str | None) -> Layer:
    """The layer marked as an effect of that kind; as it is for a kind that is none of EFFECTS, as a file may have it.

    Source: ours, a mark `effect` under "strata" in ComfyUI's layer document
    """
    return _with_ours(layer, effect=kind) if kind in EFFECTS else layer


def _with_ours(layer: Layer, **values: Any) -> Layer:
    ours = layer.extra.get("strata")
    return replace(layer, extra=layer.extra | {"strata": (ours if isinstance(ours, dict) else {}) | values})


def bound_to(stack: LayerStack, index: int) -> list[int]:
    """Indices of the effects that go where an object goes: those of its own group; none for an effect itself.

    Source: ours, effects and the object they belong to share a group
    """
    layer = stack.layers[index]
    parent = parent_of(layer)
    if not parent or effect_of(layer):
        return []
    return [number for number, other in enumerate(stack.layers) if effect_of(other) and parent_of(other) == parent]


def _check_count(count: int, socket: str) -> None:
    if not 1 <= count <= MAX_LAYERS:
        raise ValueError(
            f"{socket}: there are {count} layers and a LAYERS document holds 1 to {MAX_LAYERS}; drop or merge some."
        )


def _read_entry(entry: Any, position: int, socket: str) -> list[Layer]:
    if not isinstance(entry, dict):
        raise ValueError(f"{socket}: layer {position} is a {type(entry).__name__}, not a layer of a LAYERS document.")
    name = entry.get("name") or f"Layer {position + 1}"
    if not isinstance(name, str):
        raise ValueError(f"{socket}: the name of layer {position} is {name!r}; it must be text.")
    where = f"{socket}: layer {name!r}"
    if entry.get("type", "raster") != "raster":
        raise ValueError(f"{where} has type {entry['type']!r}; only 'raster' layers are supported.")
    image = _read_tensor(entry.get("image"), (4,), where, "image", "[frames, height, width, 3 or 4]")
    if image.shape[-1] not in (3, 4):
        raise ValueError(f"{where} has an image of {image.shape[-1]} channels; it must have 3 (RGB) or 4 (RGBA).")
    mask = entry.get("mask")
    if mask is not None:
        mask = _read_tensor(mask, (2, 3), where, "mask", "[frames, height, width]")
        mask = mask[None] if mask.ndim == 2 else mask
        if mask.shape[1:] != image.shape[1:3] or mask.shape[0] not in (1, image.shape[0]):
            raise ValueError(
                f"{where} has a mask of {_size(mask)} and an image of {_size(image[..., 0])}; make them the same size."
            )
        mask = mask.expand(image.shape[0], -1, -1)
    blend_mode = entry.get("blend_mode", "normal")
    if blend_mode not in BLEND_MODES:
        raise ValueError(f"{where} has the unknown blend mode {blend_mode!r}; use one of {', '.join(BLEND_MODES)}.")
    opacity = _number(entry, "opacity", 1.0, where)
    if not 0 <= opacity <= 1:
        raise ValueError(f"{where} has opacity {opacity}; it must be from 0 to 1.")
    x, y, w, h = (_integer(entry, key, 0, where) for key in ("x", "y", "w", "h"))
    if max(w, h) > MAX_SIDE:
        raise ValueError(f"{where} is shown at {w}×{h}; sides must be at most {MAX_SIDE} pixels.")
    flags = {
        key: bool(entry.get(key, default)) for key, default in (("flip_h", False), ("flip_v", False), ("visible", True))
    }
    _check_parent(entry.get("strata"), where)
    frames = image.shape[0]
    return [
        Layer(
            image[i],
            name if frames == 1 else f"{name} {i + 1}",
            None if mask is None else mask[i],
            x,
            y,
            w,
            h,
            rotation=_number(entry, "rotation", 0.0, where),
            **flags,
            opacity=opacity,
            blend_mode=blend_mode,
            extra={key: value for key, value in entry.items() if key not in _FIELDS},
        )
        for i in range(frames)
    ]


def _check_parent(ours: Any, where: str) -> None:
    parent = ours.get("parent") if isinstance(ours, dict) else None
    if parent is None:
        return
    if not isinstance(parent, list | tuple) or not all(isinstance(name, str) for name in parent):
        raise ValueError(f"{where} has {parent!r:.80} as its parent; it must be a list of group names.")
    if len(parent) > MAX_GROUPS:
        raise ValueError(f"{where} lies in {len(parent)} groups; at most {MAX_GROUPS} may lie in each other.")


def _read_tensor(value: Any, ndims: tuple[int, ...], where: str, key: str, shape: str) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim not in ndims or 0 in value.shape:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{where} has {got} as its {key}; it must be a tensor {shape}.")
    if max(value.shape[1:3]) > MAX_SIDE:
        raise ValueError(
            f"{where} has a {key} of {value.shape[2]}×{value.shape[1]}; sides must be at most {MAX_SIDE} pixels."
        )
    if not torch.isfinite(value).all():
        raise ValueError(f"{where} has NaN or infinite values in its {key}; look at the node that made it.")
    return value.float()


def _number(entry: dict, key: str, default: float, where: str) -> float:
    value = entry.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{where} has {value!r} as its {key}; it must be a number.")
    return float(value)


def _integer(entry: dict, key: str, default: int, where: str) -> int:
    return round(_number(entry, key, default, where))


def _read_canvas(canvas: Any, layers: tuple[Layer, ...], socket: str) -> tuple[int, int]:
    """The canvas as given, or (it is optional in core) the smallest one from the origin that holds every unrotated
    layer.
    """
    if canvas is None:
        sides = [(layer.x + layer.size[0], layer.y + layer.size[1]) for layer in layers]
        return max(1, max(x for x, _ in sides)), max(1, max(y for _, y in sides))
    if (
        not isinstance(canvas, (list, tuple))
        or len(canvas) != 2
        or not all(isinstance(side, int) and 1 <= side <= MAX_SIDE for side in canvas)
    ):
        raise ValueError(
            f"{socket}: the canvas is {canvas!r}; it must be (width, height) with sides from 1 to {MAX_SIDE}."
        )
    return int(canvas[0]), int(canvas[1])


def _size(tensor: Tensor) -> str:
    return f"{tensor.shape[-1]}×{tensor.shape[-2]} ({tensor.shape[0]} frames)"
