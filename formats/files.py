"""Layer files by their kind: which format a stack is saved in, and which one an opened file is."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from ..techniques.layers import LayerStack, effect_of, parent_of
from . import openraster, png, psd
from .groups import GROUPS
from .raster import Refused, alpha_to_mask, in_parallel, on_canvas, plain_name, to_bytes, trimmed

FORMATS = ("PSD", "OpenRaster", "PNG layers", "WebP layers")
SUFFIXES = (".psd", ".psb", ".ora")  # what can be loaded


def save(
    folder: Path,
    stem: str,
    stack: LayerStack,
    merged: Tensor,
    format: str,
    metadata: dict[str, Any],
    progress: Callable[[int], None] = lambda done: None,
    bits: int = 8,
    trim: bool = False,
    alpha_as_mask: bool = False,
) -> list[Path]:
    """Save a stack in one of FORMATS as files whose names begin with stem; returns them, the flattened picture last for
    PNG and WebP.

    PNG and WebP layers are canvas-sized, so that they lie on each other, with opacity, blend mode and so on as metadata
    "strata".
    Either every file is there at the end or none. metadata: JSON values, embedded in every file. merged: [H,W,3|4].
    bits, trim, alpha_as_mask: as `unused` says, for formats that have them. Raises ValueError for what a format cannot
    hold.
    """
    if format in ("PSD", "OpenRaster"):
        bits = bits if format == "PSD" else 8
        if trim:
            stack = stack.with_layers(trimmed(layer, stack.canvas, bits) for layer in stack.layers)
        if format == "OpenRaster":
            with _new_files([folder / f"{stem}.ora"]) as (paths, opened):
                openraster.write(opened[0], stack, merged, metadata, progress)
            return paths
        if alpha_as_mask:
            stack = stack.with_layers(alpha_to_mask(layer, stack.canvas) for layer in stack.layers)
        with _new_files([folder / f"{stem}.psd"]) as (paths, opened):
            psd.write(opened[0], stack, merged, metadata, progress, bits)
        return paths
    write, suffix = (png.write_png, ".png") if format == "PNG layers" else (png.write_webp, ".webp")
    names = [f"{stem}{index:02}_{file_name(layer.name)}" for index, layer in enumerate(stack.layers, 1)]
    with _new_files([folder / f"{name}{suffix}" for name in (*names, f"{stem}flattened")]) as (paths, opened):

        def write_layer(index: int) -> None:
            layer = stack.layers[index]
            fields = {
                "name": layer.name,
                "opacity": layer.opacity,
                "blend_mode": layer.blend_mode,
                "visible": layer.visible,
                "z_index": index,
            }
            if parent := parent_of(layer):
                fields["parent"] = parent
            if kind := effect_of(layer):
                fields["effect"] = kind
            write(opened[index], on_canvas(layer, stack.canvas), {**metadata, png.FIELDS: fields})

        for done, _ in enumerate(in_parallel(write_layer, range(len(stack.layers))), 1):
            progress(done)
        write(opened[-1], to_bytes(merged), metadata)
    return paths


def unused(format: str, bits: int = 8, trim: bool = False, alpha_as_mask: bool = False) -> list[str]:
    """A sentence for each choice that a format does not have: bits a channel, layers cut to what is drawn, alpha as
    layer mask.
    """
    asked = {
        f"bits: {format} is written in 8 bits; save as PSD for 16.": bits != 8 and format != "PSD",
        f"trim: {format} are as large as the canvas; save as PSD or OpenRaster to have them trimmed.": trim
        and format.endswith("layers"),
        f"alpha_as_mask: {format} has no layer masks here; save as PSD.": alpha_as_mask and format != "PSD",
    }
    return [note for note, wanted in asked.items() if wanted]


def load(path: Path, groups: str = GROUPS[0], notes: list[str] | None = None) -> LayerStack:
    """Read a PSD, PSB or OpenRaster file, told apart by its first bytes. Raises ValueError with one sentence naming the
    file.

    groups: one of formats.groups.GROUPS. notes: gets a sentence for everything that the layers cannot hold.
    """
    notes = [] if notes is None else notes
    with open(path, "rb") as file:
        head = file.read(4)
    if not head:
        raise ValueError(f"{path.name} is empty; save or upload it again.")
    if head == b"8BPS" or head[:2] == b"PK":
        try:
            stack = psd.read(path, groups, notes) if head == b"8BPS" else openraster.read(path, groups, notes)
        except Refused as error:
            raise error if str(error).startswith(path.name) else Refused(f"{path.name}: {error}") from error
        notes[:] = dict.fromkeys(notes)  # a base's own come up once for each layer clipped to it
        # Krita's end in NUL.
        return stack.with_layers(
            replace(layer, name=plain_name(layer.name.rstrip("\0")) or "Layer") for layer in stack.layers
        )
    raise ValueError(
        f"{path.name} is neither a PSD nor an OpenRaster file; save it as one of these in your paint program."
    )


def file_name(name: str) -> str:
    """A layer's name as part of a file's name on every system: separators and reserved characters become -, at most 60
    characters.
    """
    safe = re.sub(r'[\s\\/:*?"<>|%]+', "-", plain_name(name)).strip("-. ")
    return safe.encode()[:60].decode(errors="ignore") or "layer"


@contextmanager
def _new_files(paths: list[Path]) -> Iterator[tuple[list[Path], list[BinaryIO]]]:
    """Open files that appear under their names together when the block ends, and not at all when it raises or one is
    there already.
    """
    for path in paths:
        if path.exists():
            raise ValueError(f"{path.name} is there already and is not overwritten; use another name.")
    parts = [path.with_name(f".{uuid.uuid4().hex}.part") for path in paths]
    with ExitStack() as leftovers:
        for part in parts:
            leftovers.callback(part.unlink, missing_ok=True)
        with ExitStack() as opened:
            yield paths, [opened.enter_context(open(part, "xb")) for part in parts]
        for part, path in zip(parts, paths, strict=True):
            part.replace(path)
            leftovers.callback(path.unlink)
        leftovers.pop_all()
