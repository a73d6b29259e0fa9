"""Layers chosen by number or name, put in another order, renamed, merged, and made from or into image batches."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .compositing import TRANSPARENT, flatten_image
from .geometry import fit, fitted_along, place, rasterise, transform
from .layers import MAX_LAYERS, Layer, LayerStack, bound_to

SAME = 1 / 510  # half a step of 8 bits: a mask that differs from an alpha by no more is that alpha
ACTIONS = ("pick", "drop", "reorder", "bring to front", "send to back", "reverse", "rename", "merge")
_PART = re.compile(r'\s*(?:"([^"]*)"|([^",]*))\s*(?:,|$)')


def select(stack: LayerStack, text: str, socket: str = "select") -> list[int]:
    """Indices of the layers that a text such as `1, 3-5, Sky` names, in its order; all of them for an empty text.

    Numbers count from 1 at the back; a range may run backwards. Anything else is a name (capitals do not matter), and
    stands for every layer of that name; in double quotes it is always a name, so that it may be a number or hold a
    comma.
    Raises ValueError for a layer that is not there or is named twice.
    Source: ours, page ranges of a print dialog.
    """
    if not text.strip():
        return list(range(len(stack.layers)))
    chosen: list[int] = []
    for quoted, plain in _parts(text, socket):
        matches = _named(stack, quoted) if quoted else _numbered(stack, plain, socket) or _named(stack, plain)
        if not matches:
            names = ", ".join(f"{number} {layer.name!r}" for number, layer in enumerate(stack.layers, 1))
            raise ValueError(f"{socket}: there is no layer {quoted or plain!r}; the layers are {names}.")
        chosen += matches
    if not chosen:
        raise ValueError(
            f"{socket}: {text[:60]!r} names no layer; write numbers, ranges and names, or leave it empty for all."
        )
    twice = next((index for index in chosen if chosen.count(index) > 1), None)
    if twice is not None:
        raise ValueError(
            f"{socket}: {text!r} names layer {twice + 1} ({stack.layers[twice].name!r}) twice; name every layer once."
        )
    return chosen


def arrange(stack: LayerStack, action: str, text: str, names: str = "") -> LayerStack:
    """The stack after one action on the selected layers (see `select`).

    pick: only these, in the order written. drop: all but these. reorder: all layers, in the order written, back to
    front. bring to front, send to back: these, in the order written. reverse: these swap places, front to back. rename:
    one line of `names` for each. merge: neighbouring layers become one, named by `names` or after the nearest.
    Effects go with the object that they are bound to (see `with_effects`), but for rename and reverse.
    Raises ValueError naming the input.
    Source: ours, what layer panels of image editors do.
    """
    if action not in ACTIONS:
        raise ValueError(f"action: {action!r} is not known; use one of {', '.join(ACTIONS)}.")
    indices = select(stack, text)
    if action not in ("rename", "reverse"):
        indices = with_effects(stack, indices)
    chosen = [stack.layers[index] for index in indices]
    others = [layer for index, layer in enumerate(stack.layers) if index not in indices]
    if action == "merge":
        return merge(stack, indices, names.strip())
    if action == "rename":
        return rename(stack, indices, names)
    if action == "reverse":
        return stack.with_layers(
            _put(stack.layers, sorted(indices), [stack.layers[index] for index in sorted(indices, reverse=True)])
        )
    if action == "drop" and not others:
        raise ValueError("select: this drops every layer, and a LAYERS document needs at least one; select fewer.")
    if action == "reorder" and others:
        missing = ", ".join(repr(layer.name) for layer in others)
        raise ValueError(
            f"select: the new order leaves out {missing}; name every layer once, back to front, or use another action."
        )
    return stack.with_layers(
        {"drop": others, "bring to front": others + chosen, "send to back": chosen + others}.get(action, chosen)
    )


def with_effects(stack: LayerStack, indices: Sequence[int]) -> list[int]:
    """These layers in this order, each together with the effects that are bound to it, in stack order. An effect that
    is itself among the indices stays where it is named.

    Source: ours, shadows and light go where their object goes
    """
    ordered: list[int] = []
    for index in indices:
        bound = [number for number in bound_to(stack, index) if number not in indices]
        ordered += sorted([index, *bound])
    return ordered


def rename(stack: LayerStack, indices: Sequence[int], names: str) -> LayerStack:
    """These layers with new names, one per line. Raises ValueError when there are more or fewer names than layers.

    Source: ours, one name per line.
    """
    lines = [line for line in _lines(names) if line]
    if len(lines) != len(indices):
        raise ValueError(
            f"names: the number of names is {len(lines)} and that of selected layers {len(indices)}; write one name a "
            "line for each layer."
        )
    named = [replace(stack.layers[index], name=name) for index, name in zip(indices, lines, strict=True)]
    return stack.with_layers(_put(stack.layers, indices, named))


def name_lines(names: str, most: int, what: str = "layers") -> list[str]:
    """The lines of a text of names. Empty lines are kept, since line N names item N. Raises ValueError for more than
    `most` lines.

    Source: ours, one name per line.
    """
    lines = _lines(names)
    if len(lines) > most:
        raise ValueError(
            f"names: there are {len(lines)} names for {most} {what}; write one name per line, at most one for each."
        )
    return lines


def merge(stack: LayerStack, indices: Sequence[int], name: str = "") -> LayerStack:
    """Neighbouring layers flattened (sRGB) into one normal layer that covers their boxes on the canvas; hidden ones are
    left out.

    The flattened picture stays the same when the merged layers are normal, and always when the range begins at the
    back: a blend mode further up mixes only with what is merged. Raises ValueError for a gap or when nothing of them is
    visible.
    Source: w3c, section 5.5 (a merged range is an isolated group).
    """
    indices = sorted(indices)
    if indices != list(range(indices[0], indices[-1] + 1)):
        raise ValueError("select: only neighbouring layers can be merged; bring them together with reorder first.")
    group = stack.with_layers(stack.layers[index] for index in indices)
    boxes = [box for layer in group.layers if layer.visible and (box := place(layer, stack.canvas))]
    if not boxes:
        raise ValueError(
            "select: none of the selected layers is visible on the canvas, so there is nothing to merge; drop them or "
            "show one."
        )
    left, top = min(box.left for box in boxes), min(box.top for box in boxes)
    right, bottom = max(box.right for box in boxes), max(box.bottom for box in boxes)
    window = LayerStack(
        (right - left, bottom - top), tuple(replace(layer, x=layer.x - left, y=layer.y - top) for layer in group.layers)
    )
    merged = Layer(flatten_image(window, TRANSPARENT)[0], name or group.layers[-1].name, x=left, y=top)
    return stack.with_layers((*stack.layers[: indices[0]], merged, *stack.layers[indices[-1] + 1 :]))


def from_images(
    images: Tensor,
    masks: Tensor | None = None,
    names: str = "",
    below: LayerStack | None = None,
    sockets: tuple[str, str] = ("images", "masks"),
) -> LayerStack:
    """One layer per image [B,H,W,3|4], the first at the back, on top of `below` when given; otherwise the canvas is the
    image's size.

    masks: [B,H,W] or one for all, 1 = transparent; they multiply with the images' own alpha, unless they are that alpha
    over again. names: one per line, "Layer N" for an empty or missing one. sockets: what errors call the first two.
    Raises ValueError naming the input.
    Source: ours, ComfyUI's layer document.
    """
    _check_mask(images, masks, *sockets)
    before = below.layers if below else ()
    if len(before) + len(images) > MAX_LAYERS:
        raise ValueError(
            f"{sockets[0]}: this makes {len(before) + len(images)} layers and a LAYERS document holds at most "
            f"{MAX_LAYERS}; pass fewer."
        )
    lines = name_lines(names, len(images), "images")
    lines += [""] * (len(images) - len(lines))
    lines = [line or f"Layer {number}" for number, line in enumerate(lines, len(before) + 1)]
    mask = [None] * len(images) if masks is None else masks.expand(len(images), -1, -1)
    layers = tuple(
        Layer(image, name, beside_alpha(image, one)) for image, name, one in zip(images, lines, mask, strict=True)
    )
    return LayerStack(below.canvas if below else (images.shape[2], images.shape[1]), before + layers)


def insert(
    stack: LayerStack | None, images: Tensor, masks: Tensor | None, below: str | None, fields: dict[str, Any]
) -> LayerStack:
    """The images [B,H,W,3|4] as new layers with these fields, on top, or just behind the layer that `below` names;
    without a stack they begin a new one. masks: [B,H,W] or one for all, 1 = transparent.

    Raises ValueError naming the input.
    Source: ours, ComfyUI's "Add Layer".
    """
    grown = from_images(images, masks, below=stack, sockets=("image", "mask"))
    before = len(grown.layers) - len(images)
    new = [replace(layer, **fields) for layer in grown.layers[before:]]
    if "name" in fields and len(new) > 1:
        new = [replace(layer, name=f"{layer.name} {number}") for number, layer in enumerate(new, 1)]
    position = before
    if below is not None and stack:
        targets = select(stack, below, "layer")
        if len(targets) != 1:
            raise ValueError(
                f"layer: {below!r} stands for {len(targets)} layers; name the one layer that the new one goes behind."
            )
        position = targets[0]
    return grown.with_layers((*grown.layers[:position], *new, *grown.layers[position:before]))


def change(
    stack: LayerStack, text: str, images: Tensor | None, masks: Tensor | None, fields: dict[str, Any]
) -> LayerStack:
    """The stack with these fields, and the image [1,H,W,3|4] and mask [1,H,W] when given, set on the selected layers.

    Raises ValueError naming the input.
    Source: ours, ComfyUI's layer document.
    """
    for tensor, socket in ((images, "image"), (masks, "mask")):
        if tensor is not None and len(tensor) != 1:
            raise ValueError(
                f"{socket}: there are {len(tensor)} frames and a layer has one; pass a single one to change a layer."
            )
    indices = select(stack, text, "layer")
    changed = []
    for layer in (stack.layers[index] for index in indices):
        image = layer.image[None] if images is None else images
        mask = masks if masks is not None or layer.mask is None else layer.mask[None]
        _check_mask(image, mask, "image" if images is not None else f"layer {layer.name!r}", "mask")
        own = layer.mask if masks is None else beside_alpha(image[0], masks[0])
        changed.append(replace(layer, image=image[0], mask=own, **fields))
    return stack.with_layers(_put(stack.layers, indices, changed))


def transform_layers(stack: LayerStack, text: str, how: str = "none", **changes: Any) -> LayerStack:
    """The stack with the selected layers fitted (see `fit`) and then transformed with these arguments of `transform`.
    Effects that are bound to them come along.

    Raises ValueError naming the input.
    Source: ours, similarity transform of ComfyUI's layer fields.
    """
    indices = select(stack, text)
    changed = {}
    for index in indices:
        layer = stack.layers[index]
        fitted = fit(layer, stack.canvas, how)
        changed[index] = transform(fitted, **changes)
        about = changes.get("pivot") or (fitted.x + fitted.size[0] / 2, fitted.y + fitted.size[1] / 2)
        for number in bound_to(stack, index):
            if number not in indices:
                along = fitted_along(stack.layers[number], layer, fitted)
                changed[number] = transform(along, **{**changes, "pivot": about})
    return stack.with_layers(changed.get(number, layer) for number, layer in enumerate(stack.layers))


def chosen_fields(values: dict[str, Any], text: str) -> dict[str, Any]:
    """The fields to set: those that the text lists (`x, y, opacity`), or for an empty text those that are not a new
    layer's.

    Raises ValueError for a field that is not in `values`.
    Source: ours, unchanged fields stay.
    """
    names = [name for part in text.split(",") if (name := part.strip())]
    unknown = [name for name in names if name not in values]
    if unknown:
        raise ValueError(f"fields: {unknown[0]!r} is not a field of a layer; use {', '.join(values)}.")
    plain = {"name": ""}
    return {
        name: value
        for name, value in values.items()
        if (name in names if names else value != plain.get(name, getattr(Layer, name)))
    }


def to_batch(stack: LayerStack, at_canvas_size: bool = True) -> Tensor:
    """[layers,H,W,4], straight alpha with mask and opacity in it, back to front: as placed on the canvas, or every
    layer's own pixels.

    Raises ValueError when the layers' own sizes differ.
    Source: ours, see `rasterise`.
    """
    if at_canvas_size:
        return torch.stack([rasterise(layer, stack.canvas) for layer in stack.layers])
    sizes = {tuple(layer.image.shape[:2]) for layer in stack.layers}
    if len(sizes) > 1:
        listed = ", ".join(f"{width}×{height}" for height, width in sorted(sizes))
        raise ValueError(
            f"at_canvas_size: the layers have different sizes ({listed}) and a batch has one; turn at_canvas_size on."
        )
    return torch.stack([layer.rgba() * layer.image.new_tensor((1, 1, 1, layer.opacity)) for layer in stack.layers])


def covering(stack: LayerStack) -> list[str]:
    """The names of the visible layers, other than the one at the back, that hide everything behind them: mostly
    pictures that have lost their alpha.

    Source: ours, ComfyUI's layer document.
    """

    def opaque(layer: Layer) -> bool:
        plain = layer.visible and layer.opacity == 1 and layer.blend_mode == "normal"
        return plain and bool((layer.rgba()[..., 3] >= 1).all())

    return [
        layer.name
        for layer in stack.layers[1:]
        if opaque(layer) and (rasterise(layer, stack.canvas)[..., 3] >= 1).all()
    ]


def beside_alpha(image: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask [H,W], or None where it only repeats the alpha of the image [H,W,3|4], as with nodes that give both, so
    that transparency does not count twice.

    Source: ours, ComfyUI's masks, which are 1 where an image is transparent.
    """
    repeats_alpha = mask is not None and image.shape[-1] == 4 and ((1 - image[..., 3]) - mask).abs().max() <= SAME
    return None if repeats_alpha else mask


def _check_mask(images: Tensor, masks: Tensor | None, image_socket: str, mask_socket: str) -> None:
    """Raises ValueError when masks [B,H,W] do not fit images [B,H,W,C]: one mask for all, or one for each, of the same
    size.
    """
    if masks is None:
        return
    height, width = images.shape[1:3]
    if tuple(masks.shape[1:]) != (height, width):
        raise ValueError(
            f"{mask_socket}: it is {masks.shape[2]}×{masks.shape[1]} and {image_socket} is {width}×{height}; make "
            "them the same size."
        )
    if len(masks) not in (1, len(images)):
        raise ValueError(
            f"{mask_socket}: there are {len(masks)} masks for {len(images)} {image_socket}; pass one for all or one "
            "for each."
        )


def _parts(text: str, socket: str) -> list[tuple[str, str]]:
    parts, position = [], 0
    while position < len(text):
        match = _PART.match(text, position)
        if not match:
            raise ValueError(
                f"{socket}: {text!r} cannot be read; write numbers, ranges and names with commas between, as in: 1, "
                '3-5, "Sky, left".'
            )
        if match[1] or (match[2] and match[2].strip()):
            parts.append((match[1] or "", (match[2] or "").strip()))
        position = match.end()
    return parts


def _numbered(stack: LayerStack, part: str, socket: str) -> list[int]:
    match = re.fullmatch(r"(\d+)(?:\s*-\s*(\d+))?", part)
    if not match:
        return []
    first, last = int(match[1]), int(match[2] or match[1])
    for number in (first, last):
        if not 1 <= number <= len(stack.layers):
            raise ValueError(
                f"{socket}: there is no layer {number}; numbers run from 1 at the back to {len(stack.layers)} "
                "(put a name that is a number in double quotes)."
            )
    return list(range(first - 1, last)) if first <= last else list(range(first - 1, last - 2, -1))


def _named(stack: LayerStack, name: str) -> list[int]:
    return [index for index, layer in enumerate(stack.layers) if layer.name.casefold() == name.casefold()]


def _put(layers: Sequence[Layer], indices: Sequence[int], new: Sequence[Layer]) -> list[Layer]:
    result = list(layers)
    for index, layer in zip(indices, new, strict=True):
        result[index] = layer
    return result


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.rstrip().splitlines()]
