"""The files below models/layer_model, told apart by what is in them, whichever loader asks."""

from __future__ import annotations

import re
from pathlib import Path

import comfy.utils
import folder_paths
from safetensors import safe_open
from torch import Tensor

from . import layer_modules, transparency
from .layer_modules import LayerModules
from .transparency import Transparency

KIND = transparency.CONFIG["folder"]
PUBLISHED = {file["name"]: file["url"] for file in transparency.CONFIG["files"]}
SHIPPED = "strata_mini_dreamlayer.safetensors"
WANTED = {
    Transparency: "weights of LayerDiffuse; choose one of the files that the help page names",
    LayerModules: f"layer modules of DreamLayer; choose {SHIPPED} or a file that python -m training dreamlayer made",
}


def choices(kind: type) -> list[str]:
    """The files of the folder, and the names of those that can be had: published ones, or the shipped one."""
    known = PUBLISHED if kind is Transparency else [SHIPPED]
    return list(dict.fromkeys([*folder_paths.get_filename_list(KIND), *known]))


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


def load(name: str, kind: type) -> Transparency | LayerModules:
    """The file's content. Raises ValueError with one sentence for a missing, damaged, unknown or other kind of file."""
    found = recognise(name, read(name), of_this_pack(Path(folder_paths.get_full_path(KIND, name))))
    if not isinstance(found, kind):
        raise ValueError(f"file: {name} is {found.describe()}, and this node takes {WANTED[kind]}.")
    return found


def recognise(name: str, weights: dict[str, Tensor], own: bool = False) -> Transparency | LayerModules:
    """own: written by this pack's trainers. Raises ValueError for weights that are none of the pack's kinds."""
    if layer_modules.EMBEDDING in weights:
        return layer_modules.recognise(name, weights)
    return transparency.recognise(name, weights, own)


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


def of_this_pack(path: Path) -> bool:
    """Whether the pack's own trainers wrote the file, which put their command into it: a pair for the mini family can
    have the published widths.
    """
    if path.suffix != ".safetensors":
        return False
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get("command", "").startswith("python -m training ")
