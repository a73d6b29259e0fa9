"""Changes of a stack written as JSON: what the editor of Edit layers writes, and what a script may write by hand."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .layers import BLEND_MODES, MAX_SIDE, Layer, LayerStack

VERSION = 1
# The least and the largest value that a number may have, as it is written: degrees, not radians.
RANGES = {
    "x": (-MAX_SIDE, MAX_SIDE),
    "y": (-MAX_SIDE, MAX_SIDE),
    "w": (1, MAX_SIDE),
    "h": (1, MAX_SIDE),
    "rotation": (-360, 360),
    "opacity": (0, 1),
}
FLAGS = ("flip_h", "flip_v", "visible")
FIELDS = (*RANGES, *FLAGS, "blend_mode", "name")


@dataclass(frozen=True)
class Reference:
    """A layer that edits speak of. name: as it comes in, capitals do not matter; None where only the number is given.
    number: from 1 at the back; with a name it says which of several layers of that name.
    """

    name: str | None
    number: int | None

    def __str__(self) -> str:
        return f"{self.number}" if self.name is None else repr(self.name)

    def find(self, layers: Sequence[Layer]) -> int | None:
        """Index of the layer. None when no layer has the name, or several have it and the number is none of theirs."""
        same = self.same(layers)
        if len(same) == 1:
            return same[0]
        return self.number - 1 if self.number and self.number - 1 in same else None

    def same(self, layers: Sequence[Layer]) -> list[int]:
        """Indices of the layers that it may mean."""
        if self.name is None:
            return [self.number - 1] if self.number and self.number <= len(layers) else []
        return [index for index, layer in enumerate(layers) if layer.name.casefold() == self.name.casefold()]


@dataclass(frozen=True)
class Edits:
    """fields: what to set on which layer, as fields of Layer. order: layers back to front; empty keeps the order."""

    fields: tuple[tuple[Reference, dict[str, Any]], ...] = ()
    order: tuple[Reference, ...] = ()


def read_edits(text: str, socket: str = "edits") -> Edits:
    """The edits that a text holds; none for an empty one.

    {"version": 1, "layers": [{"layer": "Dog", "number": 2, "x": 40, "rotation": 15}, …], "order": ["Sky", "Dog", …]}:
    `layer` is the name of a layer as it comes in, or its number; the other keys are optional. Positions and sizes are
    canvas pixels and rounded, rotation is in degrees clockwise. Raises ValueError with one sentence.
    Source: ours, ComfyUI's layer fields as JSON.
    """
    if not text.strip():
        return Edits()
    try:
        written = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{socket}: this is not JSON ({error}); let the editor write it, or leave it empty.") from None
    written = _members(written, ("version", "layers", "order"), f"{socket}: the text")
    if written.get("version", VERSION) != VERSION:
        raise ValueError(
            f"{socket}: these edits have version {_short(written['version'])} and only version {VERSION} is known; "
            "update ComfyUI-Strata."
        )
    return Edits(
        tuple(_entry(one, f"{socket}: entry {i} of layers") for i, one in _numbered(written, "layers", socket)),
        tuple(_order(one, f"{socket}: entry {i} of order") for i, one in _numbered(written, "order", socket)),
    )


def apply_edits(stack: LayerStack, edits: Edits, socket: str = "edits") -> tuple[LayerStack, list[str]]:
    """The stack with the edits, and one sentence for what could not be done because a layer is not there.

    No pixel is touched: what is changed are the layers' fields. Layers that the order leaves out keep their places, and
    the others share the remaining ones. Raises ValueError for a layer that is named twice.
    Source: ours, what layer panels of image editors do.
    """
    layers = list(stack.layers)
    missing: list[Reference] = []
    targets = _resolved([reference for reference, _ in edits.fields], layers, f"{socket}: layers", missing)
    for index, (_, fields) in zip(targets, edits.fields, strict=True):
        if index is not None:
            layers[index] = replace(layers[index], **fields)
    order = _resolved(edits.order, stack.layers, f"{socket}: order", missing)
    wanted = [index for index in order if index is not None]
    moved = [layers[index] for index in wanted]
    for place, layer in zip(sorted(wanted), moved, strict=True):
        layers[place] = layer
    return stack.with_layers(layers), _notes(missing, stack.layers, socket)


def _resolved(
    references: Sequence[Reference], layers: Sequence[Layer], where: str, missing: list[Reference]
) -> list[int | None]:
    """Index of each; None for those that are not there, which are added to `missing`."""
    indices: list[int | None] = []
    for reference in references:
        index = reference.find(layers)
        if index is None:
            missing.append(reference)
        elif index in indices:
            raise ValueError(f"{where} has layer {index + 1} ({layers[index].name!r}) twice; name each layer once.")
        indices.append(index)
    return indices


def _notes(missing: list[Reference], layers: Sequence[Layer], socket: str) -> list[str]:
    """One sentence for all that name the same layer."""
    notes = []
    for reference in dict.fromkeys(missing):
        several = reference.same(layers)
        why = f"several layers are called {reference}" if several else f"there is no layer {reference} here"
        notes.append(f"{socket}: {why}, so its edits are left out.")
    return notes


def _entry(entry: Any, where: str) -> tuple[Reference, dict[str, Any]]:
    _members(entry, ("layer", "number", *FIELDS), where)
    values = {key: value for key, value in entry.items() if key in FIELDS}
    return _reference(entry, where), {field: _value(field, value, where) for field, value in values.items()}


def _order(entry: Any, where: str) -> Reference:
    return _reference(
        _members(entry, ("layer", "number"), where) if isinstance(entry, dict) else {"layer": entry}, where
    )


def _reference(entry: dict[str, Any], where: str) -> Reference:
    layer = entry.get("layer")
    if isinstance(layer, str):
        return Reference(layer, _number(entry["number"], where) if "number" in entry else None)
    if layer is None:
        raise ValueError(f'{where} does not say which layer; give its name or number as "layer".')
    return Reference(None, _number(layer, where))


def _number(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{where} has {_short(value)} for a layer; give a name, or a number from 1 at the back.")
    return value


def _value(field: str, value: Any, where: str) -> Any:
    """A value as Layer has it."""
    check, wanted = _KINDS[field]
    if not check(value):
        raise ValueError(f"{where} has {_short(value)} as its {field}; write {wanted}.")
    if field == "rotation":
        return math.radians(value)
    return math.floor(value + 0.5) if field in ("x", "y", "w", "h") else value


def _between(low: float, high: float) -> tuple[Callable[[Any], bool], str]:
    def check(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high

    return check, f"a number from {low} to {high}"


def _named(value: Any) -> bool:
    # Control characters and half of a character (a lone surrogate) can be written in JSON and stand in no file.
    return isinstance(value, str) and bool(value.strip()) and not {"Cc", "Cs"} & set(map(unicodedata.category, value))


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **{field: _between(*RANGES[field]) for field in RANGES},
    **{field: (lambda value: isinstance(value, bool), "true or false") for field in FLAGS},
    "blend_mode": (lambda value: value in BLEND_MODES, f"one of {', '.join(BLEND_MODES)}"),
    "name": (_named, "a text in one line"),
}


def _members(value: Any, known: Sequence[str], where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f'{where} is {_short(value)}; write an object, as in: {{"layers": [{{"layer": 1, "x": 0}}]}}.')
    unknown = next((key for key in value if key not in known), None)
    if unknown is not None:
        raise ValueError(f"{where} has {_short(unknown)}, which is not known; use {', '.join(known)}.")
    return value


def _numbered(written: dict[str, Any], key: str, socket: str) -> list[tuple[int, Any]]:
    values = written.get(key, [])
    if not isinstance(values, list):
        raise ValueError(f"{socket}: {key} is {_short(values)}; write a list in square brackets.")
    return list(enumerate(values, 1))


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else f"{text[:60]}…"
