"""Groups of a layer file: taken apart into their layers where that shows the same, and otherwise made one layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import combinations, groupby

import numpy as np
import torch

from ..techniques.layers import Layer, LayerStack, in_group, parent_of
from .raster import check_sides, modes_note, picture

GROUPS = ("leaves", "one layer each")  # what a reader may be asked for


def grouped(
    own: list[Layer],
    name: str,
    mode: str,
    opacity: float,
    visible: bool,
    mask: Callable[[Layer], np.ndarray | None],
    has_mask: bool,
    merge: bool,
    notes: list[str],
) -> list[Layer]:
    """The layers of a group, back to front, with its opacity, mask, blend mode and name; or one layer that shows the
    same, with a note why.

    mode: "pass-through" when the group's layers mix with what is behind it, else that of the isolated group.
    mask(layer): the group's mask over the layer's own pixels [H,W], 1 = opaque. merge: one layer whatever it is.
    """
    shown = [layer for layer in own if layer.visible]
    if not visible or not shown:
        hidden = [replace(masked(layer, mask(layer)), opacity=layer.opacity * opacity, visible=False) for layer in own]
        return [in_group(layer, name) for layer in hidden]
    reason = None
    if merge:
        reason = "as asked for"
    elif mode not in ("pass-through", "normal") and (len(shown) > 1 or shown[0].blend_mode != "normal"):
        reason = f"because its blend mode {mode} acts on all its layers together"
    elif mode == "normal" and any(layer.blend_mode != "normal" for layer in shown):
        reason = "because the blend modes of its layers act inside of it alone"
    elif (opacity < 1 or has_mask) and _overlap(shown):
        reason = "because its opacity or mask acts on all its layers together"
    if reason is None:
        own = [in_group(replace(masked(layer, mask(layer)), opacity=layer.opacity * opacity), name) for layer in own]
        return own if mode in ("pass-through", "normal") else [replace(layer, blend_mode=mode) for layer in own]
    if mode == "pass-through" and any(layer.blend_mode != "normal" for layer in shown):
        reason += "; the blend modes in it do not reach what is behind it any more"
    if len(shown) < len(own):
        reason += "; its hidden layers are left out"
    notes.append(f"Group {name!r} is one layer now, {reason}.")
    layer = replace(
        flattened(shown, name, notes), opacity=opacity, blend_mode="normal" if mode == "pass-through" else mode
    )
    return [masked(layer, mask(layer))]


def in_sequence(layers: Iterable[Layer], depth: int = 0) -> Iterator[Layer | str | None]:
    """Layers back to front with their groups: None where one begins, and its name where it ends, as PSD has it.

    depth: how many groups are open already. A group whose layers stand apart in the stack comes once for each part.
    """
    for name, members in groupby(layers, lambda layer: parent_of(layer)[depth : depth + 1]):
        if not name:
            yield from members
        else:
            yield None
            yield from in_sequence(members, depth + 1)
            yield name[0]


def box_of(layer: Layer) -> tuple[int, int, int, int]:
    """left, top, right, bottom of a layer at its own size."""
    height, width = layer.image.shape[:2]
    return layer.x, layer.y, layer.x + width, layer.y + height


def masked(layer: Layer, factor: np.ndarray | None) -> Layer:
    """factor: [H,W], 1 = opaque, of the layer's own pixels."""
    if factor is None:
        return layer
    opaque = torch.from_numpy(np.ascontiguousarray(factor, np.float32))
    return replace(layer, mask=1 - (opaque if layer.mask is None else opaque * (1 - layer.mask)))


def _overlap(layers: list[Layer]) -> bool:
    """Whether two of them draw into one pixel. Only what two boxes share is looked at: layers far apart cost
    nothing.
    """
    drawn = [(layer.rgba()[..., 3] > 0).numpy() for layer in layers]
    for (one, first), (other, second) in combinations(zip(layers, drawn, strict=True), 2):
        left, top = max(one.x, other.x), max(one.y, other.y)
        right, bottom = (min(ends) for ends in zip(box_of(one)[2:], box_of(other)[2:], strict=True))
        if left < right and top < bottom:
            shared = [
                alpha[top - layer.y : bottom - layer.y, left - layer.x : right - layer.x]
                for layer, alpha in ((one, first), (other, second))
            ]
            if (shared[0] & shared[1]).any():
                return True
    return False


def flattened(layers: list[Layer], name: str, notes: list[str]) -> Layer:
    """One layer of several, isolated from what is behind them; with a note where a blend mode of theirs has no
    formula.
    """
    notes += modes_note(layers, f"The merged layer {name!r}", ", because there is no formula for it")
    left, top = min(layer.x for layer in layers), min(layer.y for layer in layers)
    size = max(box_of(layer)[2] for layer in layers) - left, max(box_of(layer)[3] for layer in layers) - top
    check_sides(f"group {name!r}", *size)
    moved = tuple(replace(layer, x=layer.x - left, y=layer.y - top) for layer in layers)
    return Layer(picture(LayerStack(size, moved)), name, None, left, top)
