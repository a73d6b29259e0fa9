"""Inversions on disk, found by what they were made from: the picture's latent, the texts, the noise levels, the
settings and the model.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import folder_paths
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .inversion import Inversion, invert

LIMIT = 2**30  # bytes; the files used longest ago go first
SAMPLES = 64  # values looked at in each weight: two models that agree in all of them are the same


class _NotComparable(Exception):
    pass


def invert_once(
    model: ModelPatcher,
    latent: Tensor,
    positive: list,
    negative: list | None,
    sigmas: Tensor,
    method: str,
    cfg: float,
    inner_steps: int,
    seed: int,
    checkpointing: bool,
    on_disk: bool,
) -> Inversion:
    """What patches.inversion.invert gives, from the disk where it was made before; noise only is not kept there."""
    settings = {"ddim": (), "null-text": (negative, cfg, inner_steps), "noise only": (seed,)}[method]
    kept = on_disk and method != "noise only"
    name = key(model, latent, positive, sigmas, method, *settings) if kept else None
    tensors = load(name) if name else None
    if tensors is not None:
        return Inversion(positive=positive, method=method, **{**tensors, "flow": bool(tensors["flow"])})
    callback = latent_preview.prepare_callback(model, 2 * (len(sigmas) - 1))
    made = invert(model, latent, positive, negative, sigmas, method, cfg, inner_steps, seed, callback, checkpointing)
    if name:
        tensors = {key: value for key, value in vars(made).items() if isinstance(value, Tensor)}
        store(name, tensors | {"flow": torch.tensor(made.flow)})
    return made


def folder() -> Path:
    return Path(folder_paths.get_user_directory()) / "strata_inversions"


def key(model: ModelPatcher, *parts) -> str | None:
    """A name for the result of these; None when something takes part that has no content to compare, such as another
    pack's patch of the model.
    """
    digest = hashlib.sha256(b"1")
    try:
        for part in (*_model(model), *parts):
            _add(digest, part)
    except _NotComparable as reason:
        logging.info("Strata: this inversion is not kept on disk, because %s takes part in it.", reason)
        return None
    return digest.hexdigest()


def load(name: str) -> dict[str, Tensor] | None:
    path = folder() / f"{name}.safetensors"
    try:
        tensors = load_file(path)
        os.utime(path)
        return tensors
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        logging.warning("Strata: %s could not be read (%s) and is made again.", path, error)
        return None


def store(name: str, tensors: dict[str, Tensor]) -> None:
    """A disk that is full or read-only costs the cache, not the run."""
    path = folder() / f"{name}.safetensors"
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in tensors.items()}, part)
        os.replace(part, path)
        files = sorted(
            ((file.stat().st_mtime_ns, file.stat().st_size, file) for file in path.parent.glob("*.safetensors")),
            reverse=True,
        )
        total = 0
        for _time, size, file in files:
            total += size
            if total > LIMIT:
                file.unlink()
    except OSError as error:
        part.unlink(missing_ok=True)
        logging.warning("Strata: the inversion could not be kept in %s: %s", path.parent, error)


def _model(model: ModelPatcher):
    for name, weight in model.model.diffusion_model.state_dict().items():
        backup = model.backup.get(f"diffusion_model.{name}")  # what a LoRA that is loaded now has covered
        flat = (weight if backup is None else backup.weight).reshape(-1)
        yield name, list(weight.shape), flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES]
    yield model.patches
    yield model.object_patches
    yield model.model_options
    for other in (model.wrappers, model.injections, model.additional_models, model.hook_patches):
        yield {name: value for name, value in other.items() if value}


def _add(digest, value) -> None:
    digest.update(type(value).__name__.encode() + b":")
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif value is None or isinstance(value, str | int | float | bool | torch.dtype):
        digest.update(repr(value).encode())
    elif isinstance(value, dict):
        for name in sorted(value, key=str):
            _add(digest, str(name))
            _add(digest, value[name])
    elif isinstance(value, list | tuple):
        digest.update(str(len(value)).encode())
        for item in value:
            _add(digest, item)
    elif isinstance(value, nn.Module):
        _add(digest, [kind.__name__ for kind in type(value).__mro__])
        _add(digest, dict(value.state_dict()))
    elif hasattr(value, "weights") and hasattr(value, "loaded_keys"):  # a LoRA as ComfyUI holds it
        _add(digest, value.weights)
    else:
        raise _NotComparable(f"{type(value).__module__}.{type(value).__name__}")
