"""What arrives on IMAGE and MASK sockets, checked with one sentence each, and the files of ComfyUI's input folder."""
from __future__ import annotations

import os
from pathlib import Path

import folder_paths
import torch


def check_image(image: torch.Tensor, socket: str) -> torch.Tensor:
    """[B,H,W,3|4], finite; returned as float32. Raises ValueError."""
    if not isinstance(image, torch.Tensor) or image.ndim != 4 or image.shape[-1] not in (3, 4) or 0 in image.shape:
        raise ValueError(f"{socket}: {_what(image)} is not a picture of 3 or 4 channels; connect an IMAGE output.")
    return _finite(image, socket)


def check_mask(mask: torch.Tensor, socket: str) -> torch.Tensor:
    """[B,H,W], or [H,W] which becomes [1,H,W]; finite; returned as float32. Raises ValueError."""
    if not isinstance(mask, torch.Tensor) or mask.ndim not in (2, 3) or 0 in mask.shape:
        raise ValueError(f"{socket}: {_what(mask)} is not a mask; connect a MASK output.")
    return _finite(mask if mask.ndim == 3 else mask[None], socket)


def _finite(tensor: torch.Tensor, socket: str) -> torch.Tensor:
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{socket}: there are NaN or infinite values in it; look at the node that made it.")
    return tensor.float()


def _what(value) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"


def centred(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The middle of pictures or masks [B,H,W,…], where ComfyUI cuts what a VAE cannot encode whole; what is smaller stays as it is."""
    top, left = (max(0, (have - want) // 2) for have, want in zip(pixels.shape[1:3], (height, width), strict=True))
    return pixels[:, top:top + height, left:left + width]


def seen_by_latent(mask: torch.Tensor, latent: torch.Tensor, side: int = 8) -> torch.Tensor:
    """A mask [B,H,W] of a picture that latents [..., h, w] were encoded from, without the rim that encoding has cut; others as they are."""
    height, width = latent.shape[-2:]
    of_the_picture = (mask.shape[1] // side, mask.shape[2] // side) == (height, width)
    return centred(mask, height * side, width * side) if of_the_picture else mask


def input_names(suffixes: tuple[str, ...]) -> list[str]:
    """The files of the input folder with these endings: the choices of a load node."""
    entries = os.scandir(folder_paths.get_input_directory())
    return sorted(entry.name for entry in entries if entry.is_file() and entry.name.lower().endswith(suffixes))


def input_file(name: str) -> Path | None:
    """The file of the input folder (or, with " [output]" behind its name, of that folder); None when it is not inside."""
    name, folder = folder_paths.annotated_filepath(name)
    root = os.path.realpath(folder or folder_paths.get_input_directory())
    path = Path(os.path.realpath(os.path.join(root, name)))
    return path if "\0" not in name and path.is_relative_to(root) else None


def input_state(name: str) -> str:
    """What changes when the file does, for fingerprint_inputs."""
    state = input_file(name).stat()
    return f"{name} {state.st_mtime_ns} {state.st_size}"
