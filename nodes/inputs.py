"""What arrives on sockets, one check for each type and one sentence for each fault, and the files of ComfyUI's input
and temp folders.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from contextlib import contextmanager
from pathlib import Path

import comfy.model_management
import folder_paths
import numpy as np
import torch
from PIL import Image


def check(declared, value, files: bool = False):
    """A value for an input of a schema as the node is to have it. Raises ValueError with one sentence that names the
    input.

    files: the node looks itself whether a chosen file is there; the list of the schema is of an earlier time.
    """
    name, kind = declared.id, declared.get_io_type()
    if value is None:
        if declared.optional:
            return None
        raise ValueError(f"{name}: {MISSING.get(kind, 'what is connected gave nothing; connect another output')}.")
    if kind in ("INT", "FLOAT"):
        return _number(declared, value, kind)
    if kind == "BOOLEAN":
        return _typed(name, value, (bool, int), "true or false") != 0
    if kind == "STRING":
        try:
            _typed(name, value, str, "a text").encode()
            return value
        except UnicodeEncodeError:
            raise ValueError(
                f"{name}: there is half of a character in it (a lone surrogate), which no encoder and no file can "
                "hold; type it again."
            ) from None
    if kind == "COMBO":
        _typed(name, value, str, "one of the choices")
        if not files and value not in declared.options:
            raise ValueError(f"{name}: {value[:80]!r} is no choice; take one of {', '.join(declared.options)[:400]}.")
        return value
    return CHECKS[kind](value, name) if kind in CHECKS else value


def check_together(values: dict, kinds: dict[str, str]) -> None:
    """Conditionings and latents of a UNet must be of its kind: torch's own words for it name no input. Raises
    ValueError.

    kinds: {input: type}, as values.
    """
    model = next(
        (values[name] for name, kind in kinds.items() if kind == "MODEL" and values.get(name) is not None), None
    )
    if model is None:
        return
    width = model.model.model_config.unet_config.get("context_dim") if hasattr(model.model, "model_config") else None
    form = model.get_model_object("latent_format")
    for name, kind in kinds.items():
        if kind == "CONDITIONING" and width and values.get(name):
            for text, _ in values[name]:
                if text.shape[-1] != width:
                    raise ValueError(
                        f"{name}: its embeddings have {text.shape[-1]} numbers a token and the model takes {width}; "
                        "encode the text with the text encoder of this model."
                    )
        if kind == "LATENT" and values.get(name) is not None:
            samples = values[name]["samples"]
            if (
                form.latent_dimensions == 2
                and samples.ndim != 4
                or samples.shape[1] != form.latent_channels
                and samples.any()
            ):
                raise ValueError(
                    f"{name}: its latents are of shape {list(samples.shape)} and the model takes "
                    f"{form.latent_channels} channels{' of single images' * (samples.ndim != 4)}; encode the image "
                    "with the VAE of this model."
                )


def _number(declared, value, kind: str):
    name, low, high = declared.id, declared.min, declared.max
    _typed(name, value, (int, float), "a number")
    if isinstance(value, float) and (not math.isfinite(value) or kind == "INT" and value != int(value)):
        raise ValueError(
            f"{name}: {value} is no {'whole ' * (kind == 'INT')}number; connect one from {_shown(low)} to "
            f"{_shown(high)}."
        )
    if low is not None and value < low or high is not None and value > high:
        raise ValueError(
            f"{name}: {_shown(value)} is outside of {_shown(low)} to {_shown(high)}; connect a number between them."
        )
    return int(value) if kind == "INT" else value


def _shown(number) -> str:
    return (
        f"{number:g}"
        if isinstance(number, float)
        else str(number)
        if abs(number) < 10**20
        else "a number of more than twenty digits"
    )


def _typed(name: str, value, kinds, wanted: str):
    if not isinstance(value, kinds):
        raise ValueError(f"{name}: {_what(value)} is not {wanted}; connect another output.")
    return value


def check_image(image: torch.Tensor, socket: str) -> torch.Tensor:
    """[B,H,W,3|4], finite, about 0..1; returned as float32. Frames of videos, [B,T,H,W,C] as autoencoders of video give
    them, become images. Raises ValueError.
    """
    if isinstance(image, torch.Tensor) and image.ndim == 5:
        image = image.flatten(0, 1)
    if not isinstance(image, torch.Tensor) or image.ndim != 4 or image.shape[-1] not in (3, 4) or 0 in image.shape:
        raise ValueError(f"{socket}: {_what(image)} is not an image of 3 or 4 channels; connect an IMAGE output.")
    return _in_range(image, socket, "an image", IMAGE_RANGE)


def check_mask(mask: torch.Tensor, socket: str) -> torch.Tensor:
    """[B,H,W], or [H,W] which becomes [1,H,W]; finite, 0..1; returned as float32. Raises ValueError."""
    if not isinstance(mask, torch.Tensor) or mask.ndim not in (2, 3) or 0 in mask.shape:
        raise ValueError(f"{socket}: {_what(mask)} is not a mask; connect a MASK output.")
    return _in_range(mask if mask.ndim == 3 else mask[None], socket, "a mask", MASK_RANGE).clamp(0, 1)


def check_layers(document, socket: str):
    """A LAYERS document whose tensors lie where ComfyUI keeps pictures; what else is in it is
    techniques.layers.read_layers' business.
    """
    if not isinstance(document, dict) or not isinstance(document.get("layers"), list | tuple):
        return document
    moved = [
        {**entry, **{key: on_device(entry[key]) for key in ("image", "mask") if key in entry}}
        if isinstance(entry, dict)
        else entry
        for entry in document["layers"]
    ]
    return {**document, "layers": moved}


def on_device(value):
    """A tensor where ComfyUI keeps pictures, which with --gpu-only is the card; anything else as it is. This is the one
    place for it: every picture, mask and layer that comes into a node or leaves one passes here.
    """
    return value.to(comfy.model_management.intermediate_device()) if isinstance(value, torch.Tensor) else value


def placed(value, kind: str):
    """What a node gives at an output of this type: pictures are read from files and kept from runs on the processor."""
    if isinstance(value, list):
        return [placed(one, kind) for one in value]
    if kind == "LAYERS":
        return check_layers(value, "layers")
    return on_device(value) if kind in ("IMAGE", "MASK") else value


def _in_range(tensor: torch.Tensor, socket: str, what: str, allowed: tuple[float, float]) -> torch.Tensor:
    if tensor.dtype != torch.bool and not tensor.is_floating_point():
        raise ValueError(
            f"{socket}: it has whole numbers ({str(tensor.dtype).removeprefix('torch.')}) and {what} has values of 0 "
            "to 1; divide it by 255."
        )
    tensor = _finite(tensor, socket)
    low, high = tensor.aminmax()
    if low < allowed[0] or high > allowed[1]:
        raise ValueError(
            f"{socket}: its values go from {low:g} to {high:g} and {what} has values of 0 to 1; scale it first."
        )
    return on_device(tensor)


def check_latent(latent: dict, socket: str) -> dict:
    """A LATENT whose samples [B,C,H,W] or [B,C,T,H,W] are finite and whose other fields go with them. Raises
    ValueError.
    """
    samples = latent.get("samples") if isinstance(latent, dict) else None
    if (
        samples is None
        or getattr(samples, "is_nested", False)
        or not isinstance(samples, torch.Tensor)
        or samples.ndim not in (4, 5)
        or 0 in samples.shape
    ):
        raise ValueError(
            f"{socket}: {_what(latent if samples is None else samples)} is not the latent of an image; connect a "
            "LATENT output."
        )
    _finite(samples, socket)
    mask, numbers = latent.get("noise_mask"), latent.get("batch_index")
    if mask is not None:
        if not isinstance(mask, torch.Tensor) or mask.ndim not in (2, 3, 4, 5) or 0 in mask.shape:
            raise ValueError(
                f"{socket}: its noise mask, {_what(mask)}, is not a mask; make it with Set Latent Noise Mask."
            )
        _finite(mask, socket)
    if numbers is not None and len(numbers) != len(samples):
        raise ValueError(
            f"{socket}: it has {len(samples)} latents and numbers for {len(numbers)}; make it again, or take its rows "
            "with Latent From Batch."
        )
    return latent


def check_inversion(inversion, socket: str):
    """An INVERSION with a finite trajectory [N,B,C,H,W]. Raises ValueError."""
    from ..patches.inversion import Inversion

    if not isinstance(inversion, Inversion):
        raise ValueError(
            f"{socket}: {_what(inversion)} is not an inversion; connect Invert image, or retained of Layers sampler."
        )
    path = inversion.latents
    if path.ndim < 5 or 0 in path.shape or len(path) != len(inversion.sigmas):
        raise ValueError(
            f"{socket}: its trajectory, {_what(path)}, does not go with {len(inversion.sigmas)} noise levels; invert "
            "the image again."
        )
    _finite(path, socket)
    return inversion


def check_planes(planes, socket: str):
    """PLANES, at least one. Raises ValueError."""
    from ..patches.feature_guidance import Planes

    if not isinstance(planes, Planes) or not planes.planes:
        raise ValueError(f"{socket}: {_what(planes)} has no planes; connect Guidance plane.")
    return planes


def check_conditioning(conditioning: list, socket: str) -> list:
    """CONDITIONING with at least one entry of finite embeddings [B,T,D] and a dictionary. Raises ValueError."""
    entries = conditioning if isinstance(conditioning, list | tuple) else None
    if not entries or any(
        not isinstance(entry, list | tuple) or len(entry) != 2 or not isinstance(entry[1], dict) for entry in entries
    ):
        raise ValueError(f"{socket}: {_what(conditioning)} is not a conditioning; connect a text encoding.")
    for text, _ in entries:
        if not isinstance(text, torch.Tensor) or text.ndim != 3 or 0 in text.shape:
            raise ValueError(f"{socket}: {_what(text)} is not the embedding of a text; connect a text encoding.")
        _finite(text, socket)
    return conditioning


def _of_kind(methods: tuple[str, ...], what: str):
    def check_kind(value, socket: str):
        if not all(hasattr(value, method) for method in methods):
            raise ValueError(f"{socket}: {_what(value)} is not {what}; connect the output of a loader.")
        return value

    return check_kind


MISSING = {
    "CLIP": "the checkpoint has no text encoder in it; connect one from Load CLIP",
    "VAE": "the checkpoint has no VAE in it; connect Load VAE",
    "MODEL": "connect a checkpoint's model",
}
# Sharpening and upscaling overshoot, and pictures of high range go beyond 1.
IMAGE_RANGE, MASK_RANGE = ((-1.0, 4.0), (-0.01, 1.01))
CHECKS = {
    "LAYERS": check_layers,
    "IMAGE": check_image,
    "MASK": check_mask,
    "LATENT": check_latent,
    "INVERSION": check_inversion,
    "STRATA_PLANES": check_planes,
    "CONDITIONING": check_conditioning,
    "MODEL": _of_kind(("model", "clone", "model_options"), "a model"),
    "CLIP": _of_kind(("tokenize", "encode_from_tokens_scheduled"), "a text encoder"),
    "VAE": _of_kind(("encode", "decode", "first_stage_model"), "a VAE"),
    "STRATA_TRANSPARENCY": _of_kind(("part", "families"), "a file of Load transparency"),
    "STRATA_DECOMPOSER": _of_kind(("layers", "alignment"), "a file of Load decomposer"),
    "STRATA_LAYER_MODULES": _of_kind(("describe", "family"), "a file of Load layer modules"),
}


def _finite(tensor: torch.Tensor, socket: str) -> torch.Tensor:
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{socket}: there are NaN or infinite values in it; look at the node that made it.")
    return tensor.float()


def _what(value) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"


def encodable(image: torch.Tensor, vae, socket: str = "image") -> torch.Tensor:
    """The picture [B,H,W,C]. Raises ValueError when it is smaller than one pixel of the latent."""
    side, (height, width) = vae.spacial_compression_encode(), image.shape[1:3]
    if min(height, width) < side:
        raise ValueError(
            f"{socket}: it is {width}×{height} and the VAE takes images of at least {side}×{side} pixels; scale it up."
        )
    return image


@contextmanager
def named(socket: str, instead: str = "transparency"):
    """Sentences of what is called in here, which names its value `instead`, name the socket that the value
    came from.
    """
    try:
        yield
    except ValueError as error:
        if str(error).startswith(f"{instead}:"):
            raise ValueError(socket + str(error).removeprefix(instead)) from error
        raise


def centred(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The middle of pictures or masks [B,H,W,…], where ComfyUI cuts what a VAE cannot encode whole; what is smaller
    stays as it is.
    """
    top, left = (max(0, (have - want) // 2) for have, want in zip(pixels.shape[1:3], (height, width), strict=True))
    return pixels[:, top : top + height, left : left + width]


def crop_to_latent(mask: torch.Tensor, latent: torch.Tensor, side: int = 8) -> torch.Tensor:
    """A mask [B,H,W] of a picture that latents [..., h, w] were encoded from, without the rim that encoding has cut;
    others as they are.
    """
    height, width = latent.shape[-2:]
    of_the_picture = (mask.shape[1] // side, mask.shape[2] // side) == (height, width)
    return centred(mask, height * side, width * side) if of_the_picture else mask


def input_names(suffixes: tuple[str, ...]) -> list[str]:
    """The files of the input folder with these endings: the choices of a load node."""
    entries = os.scandir(folder_paths.get_input_directory())
    return sorted(entry.name for entry in entries if entry.is_file() and entry.name.lower().endswith(suffixes))


def inside(folder: str, path: str) -> bool:
    """Whether a path lies in a folder as it is written, by ComfyUI's own rule: links in the folder may lead
    elsewhere.
    """
    try:
        return os.path.commonpath((os.path.abspath(folder), os.path.abspath(path))) == os.path.abspath(folder)
    except ValueError:  # another drive
        return False


def holds_name(name: str, longest: int = 255) -> bool:
    """Whether a file can have a name of these parts: no NUL, no half of a character, at most so many bytes each."""
    try:
        return "\0" not in name and all(len(part.encode()) <= longest for part in re.split(r"[\\/]", name))
    except UnicodeEncodeError:
        return False


def input_file(name: str) -> Path | None:
    """The file of the input folder (or, with " [output]" behind its name, of that folder); None when it is not
    inside.
    """
    if not holds_name(name):
        return None
    name, folder = folder_paths.annotated_filepath(name)
    root = os.path.abspath(folder or folder_paths.get_input_directory())
    path = os.path.abspath(os.path.join(root, name))
    return Path(path) if inside(root, path) else None


def input_state(name: str) -> str:
    """What changes when the file does, for fingerprint_inputs."""
    state = input_file(name).stat()
    return f"{name} {state.st_mtime_ns} {state.st_size}"


def save_temporary(pixels: np.ndarray) -> dict:
    """A PNG in ComfyUI's temp folder, named by its content, as the reference that /view takes."""
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    name = f"strata_{hashlib.sha256(pixels.tobytes()).hexdigest()[:20]}.png"
    Image.fromarray(pixels).save(folder / name, compress_level=1)
    return {"filename": name, "subfolder": "", "type": "temp"}
