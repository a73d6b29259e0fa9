"""The family's published files, for trainers that build on them and for the judge: what users have is what is
learnt on.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ..networks import flux
from ..networks.autoencoder import Autoencoder
from ..networks.text_to_image import TextToImage
from . import settings, text

CHECKPOINT = "checkpoints/strata_mini_sd.safetensors"
INPAINT = "diffusion_models/strata_mini_inpaint.safetensors"
RGBA = "vae/strata_mini_rgba.safetensors"
FLUX_FILL = "diffusion_models/strata_mini_flux_fill.safetensors"
BACK_TO_FRONT = "layer_model/strata_mini_back_to_front.safetensors"
FLUX_ADAPTER = "layer_model/strata_mini_flux_transparent.safetensors"
LAYERINGDIFF = "layer_model/strata_mini_layeringdiff.safetensors"


def checkpoint(models: Path = settings.MODELS) -> tuple[TextToImage, Autoencoder]:
    """Denoiser with text encoder, and autoencoder, of the checkpoint that users load. Raises TrainingError when there
    is none.
    """
    state, metadata = read(models / CHECKPOINT)
    model = TextToImage(settings.family(), json.loads(metadata["config"])["in_channels"], len(text.token_ids()))
    autoencoder = Autoencoder()
    model.load_state_dict({key: state[key] for key in model.state_dict()})
    autoencoder.load_state_dict({key: state[f"first_stage_model.{key}"] for key in autoencoder.state_dict()})
    return model.eval().requires_grad_(False), autoencoder.eval().requires_grad_(False)


def flux_fill() -> nn.Module:
    """The Flux-Fill in diffusers' class, frozen. Raises TrainingError when there is none."""
    model = flux.build(settings.family()["flux"])
    model.load_state_dict(flux.diffusers_form(read(settings.MODELS / FLUX_FILL)[0]))
    return model.requires_grad_(False)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights in float32, and metadata. Raises TrainingError when the file is not there."""
    if not path.exists():
        raise settings.TrainingError(f"{path} is missing; write it first: python -m training publish.")
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    return {key: value.float() for key, value in load_file(path).items()}, metadata
