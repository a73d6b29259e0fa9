"""The files below models/layer_model, told apart by what is in them, whichever loader asks."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import comfy.ops
import comfy.utils
import folder_paths
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..networks import back_to_front
from ..networks.back_to_front import BackToFront
from . import decomposer, layer_modules, transparency
from .decomposer import Decomposer
from .layer_modules import LayerModules
from .transparency import Transparency

KIND = transparency.CONFIG["folder"]
PUBLISHED = {file["name"]: file["url"] for file in transparency.CONFIG["files"]}
SHIPPED = "strata_mini_dreamlayer.safetensors"
DECOMPOSER = "strata_mini_layeringdiff.safetensors"
BACK_TO_FRONT = "strata_mini_back_to_front.safetensors"
WANTED = {
    Transparency: "weights of LayerDiffuse; choose one of the files that the help page names",
    LayerModules: f"layer modules of DreamLayer; choose {SHIPPED} or a file that python -m training dreamlayer made",
    BackToFront: f"BFS's weights; choose {BACK_TO_FRONT}, trained_weights.pt of the released form or the same as "
    "safetensors",
    Decomposer: f"LayeringDiff's weights; choose {DECOMPOSER} or a file that python -m training layeringdiff made",
}


def choices(kind: type) -> list[str]:
    """The files of the folder that are of this kind by what is in them, or may be. Where there is none, the names of
    those that can be had, so that running one says where.
    """
    shipped = {Decomposer: DECOMPOSER, LayerModules: SHIPPED, BackToFront: BACK_TO_FRONT}
    known = [shipped[kind]] if kind in shipped else [*PUBLISHED]
    return fitting(KIND, lambda shapes: kind_of(shapes) is kind) or known


def fitting(folder: str, fits: Callable[[dict[str, Tensor]], bool]) -> list[str]:
    """The files of ComfyUI's folder whose weights fit by names and shapes, and those that do not tell without being
    loaded: all but safetensors.
    """
    matching = []
    for name in folder_paths.get_filename_list(folder):
        path = folder_paths.get_full_path(folder, name)
        shapes = path and _shapes(path, state(name, folder))
        if shapes is None or shapes and fits(shapes):
            matching.append(name)
    return matching


@lru_cache(maxsize=256)
def _shapes(path: str, state: str) -> dict[str, Tensor] | None:
    """A safetensors file's weights without their numbers, none of a damaged one; None for another kind of file. state:
    forgets what is remembered of a file that has changed.
    """
    if not path.endswith((".safetensors", ".sft")):
        return None
    try:
        with safe_open(path, "pt") as file:
            return {key: torch.empty(file.get_slice(key).get_shape(), device="meta") for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return {}


def state(name: str, kind: str = KIND) -> str:
    """What changes when the file does. kind: ComfyUI's name of its folder."""
    path = folder_paths.get_full_path(kind, name)
    return f"{path} {Path(path).stat().st_mtime_ns}" if path else ""


def missing(name: str, kind: str = KIND) -> str | None:
    """One sentence that says where to get a file that is not there."""
    if folder_paths.get_full_path(kind, name) is not None:
        return None
    do = f"download it from {PUBLISHED[name]} into" if name in PUBLISHED else "put it into"
    return f"file: {name} is not there; {do} {folder_paths.get_folder_paths(kind)[0]}."


def load(name: str, kind: type, layer: str = "foreground") -> Transparency | LayerModules | Decomposer | BackToFront:
    """The file's content. layer: what a decomposer's file with one nameless UNet is taken for. Raises ValueError with
    one sentence for a missing, damaged, unknown or other kind of file.
    """
    weights = read(name)
    loaded = recognise(name, weights, metadata(Path(folder_paths.get_full_path(KIND, name))), layer)
    if not isinstance(loaded, kind):
        raise ValueError(f"file: {name} is {loaded.describe()}, and this node takes {WANTED[kind]}.")
    return loaded


def recognise(
    name: str, weights: dict[str, Tensor], metadata: dict[str, str], layer: str = "foreground"
) -> Transparency | LayerModules | Decomposer | BackToFront:
    """A file's content from its weights. Raises ValueError for weights that are none of the pack's kinds."""
    kind = kind_of(weights)
    if kind is LayerModules:
        return layer_modules.recognise(name, weights)
    if kind is Decomposer:
        return decomposer.recognise(name, weights, metadata, layer)
    if kind is BackToFront:
        return back_to_front.recognise(name, weights, metadata, comfy.ops.manual_cast)
    # The pack's own trainers put their command into a file: a pair for the mini family can have the published widths.
    own = metadata.get("command", "").startswith("python -m training ")
    return transparency.recognise(name, weights, own)


def kind_of(weights: dict[str, Tensor]) -> type | None:
    """Which of the pack's kinds weights are of by their names and shapes, None for none of them."""
    if layer_modules.EMBEDDING in weights:
        return LayerModules
    if decomposer.is_decomposer(weights):
        return Decomposer
    if back_to_front.is_back_to_front(weights):
        return BackToFront
    return Transparency if transparency.is_transparency(weights) else None


def read(name: str, kind: str = KIND) -> dict[str, Tensor]:
    """The weights in a file of the folder. Raises ValueError with one sentence for a missing or damaged one."""
    if absent := missing(name, kind):
        raise ValueError(absent)
    try:
        weights = comfy.utils.load_torch_file(folder_paths.get_full_path(kind, name), safe_load=True)
    except Exception as error:
        reason = re.split(r"[.:]\s|\n", str(error).strip())[0].rstrip(".")[:120]
        raise ValueError(
            f"file: {name} cannot be read ({reason}); it is damaged or not a file of weights, so download it again."
        ) from error
    return {key: value for key, value in weights.items() if isinstance(value, Tensor)}


def metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself."""
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, "pt") as file:
        return file.metadata() or {}
