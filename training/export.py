"""Finished weights: one safetensors file, fp16 or smaller, that says how it came to be."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import torch
from torch import Tensor

from . import settings

SCENES = "scenes/: rendered scenes of 55 objects (the classifier: of 60) in 10 places, without the held-out pairs"
LICENCE = "GPL-3.0, as the pack; trained on pictures of Microsoft's Fluent Emoji (MIT, scenes/objects/LICENSE)"


def save(path: Path, state: dict[str, Tensor], metadata: dict[str, str], fp8: str | None = None) -> None:
    """Write a state, floating-point tensors as fp16; the file is complete or not there. metadata: describe(), and what
    loading needs.

    fp8: matrices and kernels whose keys start with it are stored as float8 e4m3, which halves a file that they fill.
    ComfyUI's loaders cast them as they cast any other fp8 model.
    A file that says the same already stays as it is, byte for byte: the format does not fix the metadata's order.
    """
    from safetensors.torch import save_file

    state = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    for key, value in half.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise settings.TrainingError(
                f"{key} is too large for the fp16 of {path.name}; train again with a lower learning_rate in a new "
                "--folder."
            )
        if fp8 is not None and key.startswith(fp8) and value.ndim > 1:
            half[key] = value.to(torch.float8_e4m3fn)
    metadata = {"format": "pt", **metadata}
    if path.exists() and _holds(path, half, metadata):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(half, partial, metadata)
    partial.chmod(0o644)
    partial.replace(path)


def _holds(path: Path, state: dict[str, Tensor], metadata: dict[str, str]) -> bool:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        if file.metadata() != metadata or set(file.keys()) != set(state):
            return False
        stored = {key: file.get_tensor(key) for key in state}  # fp8 has no comparison of its own
    return all(
        stored[key].dtype == value.dtype and torch.equal(stored[key].float(), value.float())
        for key, value in state.items()
    )


def without_folders(config: dict) -> dict:
    """The config with paths shortened to the names of their files and folders."""
    return {key: Path(value).name if isinstance(value, str) else value for key, value in config.items()}


def describe(what: str, folder: Path, config: dict, data: str) -> dict[str, str]:
    """Metadata of a run in that folder: command, config, data, steps, the last row of its metrics, licence. Files and
    folders are named without their place: nobody else has it, and it may tell whose machine it was.
    """
    with open(folder / "metrics.csv", newline="") as file:
        metrics = list(csv.DictReader(file))[-1]
    return {
        "command": f"python -m training {what}",
        "config": json.dumps(without_folders(config)),
        "data": data,
        "steps": metrics.pop("step"),
        "metrics": json.dumps({key: round(float(value), 5) for key, value in metrics.items()}),
        "licence": LICENCE,
    }
