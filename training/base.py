"""An inpainting model to fine-tune, read from its single file into diffusers' classes: Stable Diffusion 1.5 and 2, and
the mini family's own. Also what text_base.py needs to read such files.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from . import published, settings, text

CONFIG = settings.PACK / "models_config" / "inpainting_bases.json"
UNET = "model.diffusion_model."
FIRST, CROSS = "input_blocks.0.0.weight", "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
MINI = "Strata mini"
AUTOENCODER = {  # Stable Diffusion's, for diffusers
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}
LENGTH, BEGIN, END = 77, 49406, 49407  # CLIP's tokens


@dataclass(frozen=True)
class Base:
    """unet: diffusers' UNet2DConditionModel with nine input channels. encode: [B,3,H,W] in 0..1 to latents as the UNet
    sees them, on the card where there is one; decode: the way back. null: [1,77,D], the empty prompt's states.
    """

    family: str
    unet: nn.Module
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    null: Tensor
    licence: str


def load(path: Path | None) -> Base:
    """The mini family's inpainting model for None. Raises TrainingError with one sentence for a file that is not there,
    damaged, or no inpainting checkpoint.
    """
    if path is None:
        return _mini()
    state = {key: value.float() for key, value in read(path).items()}
    family, entry = _family(path, state)
    card = device()
    autoencoder = autoencoder_of(path, state).to(card)
    scale = autoencoder.config.scaling_factor

    def encode(images: Tensor) -> Tensor:
        return autoencoder.encode(images.to(card) * 2 - 1).latent_dist.mean * scale

    def decode(latents: Tensor) -> Tensor:
        return autoencoder.decode(latents.to(card) / scale).sample / 2 + 0.5

    return Base(
        family, _unet(state, entry["unet"]), encode, decode, _null(path, state, entry["text"]), entry["licence"]
    )


def read(path: Path) -> dict[str, Tensor]:
    """A checkpoint's numbers as precise as they are stored. Raises TrainingError for a file that is not there, damaged,
    or holds no UNet.
    """
    try:
        state = {key: value for key, value in _stored(path).items() if value.is_floating_point()}
    except (OSError, SafetensorError, RuntimeError, pickle.UnpicklingError, AttributeError) as error:
        reason = str(error).split("\n")[0][:160]
        raise settings.TrainingError(
            f"base: {path} cannot be read ({reason}); give a .safetensors or .ckpt checkpoint."
        ) from error
    if f"{UNET}{FIRST}" not in state:
        raise settings.TrainingError(
            f"base: {path} holds no UNet under {UNET}*; give the whole checkpoint, with its autoencoder and text "
            "encoder."
        )
    return state


def _stored(path: Path) -> dict[str, Tensor]:
    """The tensors of a file. Code in a pickled checkpoint is not run."""
    if path.suffix not in (".ckpt", ".pt", ".pth"):
        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    return {key: value for key, value in state.get("state_dict", state).items() if isinstance(value, Tensor)}


def _mini() -> Base:
    encoder, autoencoder = published.checkpoint()
    state, _ = published.read(settings.MODELS / published.INPAINT)
    entry = json.loads(CONFIG.read_text())[MINI]
    with torch.no_grad():
        null = encoder.encode(text.rows([""]))
    unet = _unet({f"{UNET}{key}": value for key, value in state.items()}, entry["unet"])
    card = device()
    autoencoder = autoencoder.to(card)

    def encode(images: Tensor) -> Tensor:
        return autoencoder.encode(images.to(card))

    def decode(latents: Tensor) -> Tensor:
        return autoencoder.decode(latents.to(card))

    return Base(MINI, unet, encode, decode, null, entry["licence"])


def device() -> torch.device:
    """This process' own card, where there are several."""
    from accelerate import PartialState

    return PartialState().device


def _family(path: Path, state: dict[str, Tensor]) -> tuple[str, dict]:
    """The entry of models_config whose width, channels and text the weights have."""
    channels, width = state[f"{UNET}{FIRST}"].shape[1], state[f"{UNET}{FIRST}"].shape[0]
    context = state[f"{UNET}{CROSS}"].shape[1] if f"{UNET}{CROSS}" in state else None
    bases = json.loads(CONFIG.read_text())
    for family, entry in bases.items():
        shape = entry["unet"]
        if (width, context) == (shape["block_out_channels"][0], shape["cross_attention_dim"]):
            if channels != shape["in_channels"]:
                raise settings.TrainingError(
                    f"base: {path} has {channels} input channels and an inpainting model has {shape['in_channels']}; "
                    f"give the inpainting checkpoint of {family}."
                )
            return family, entry
    raise settings.TrainingError(
        f"base: {path} is none of {', '.join(bases)}; give an inpainting model of one of them."
    )


def _unet(state: dict[str, Tensor], shape: dict) -> nn.Module:
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    unet = UNet2DConditionModel(**shape)
    unet.load_state_dict(convert_ldm_unet_checkpoint(dict(state), unet.config))
    return unet.eval().requires_grad_(False)


def autoencoder_of(path: Path, state: dict[str, Tensor], **options) -> nn.Module:
    """Stable Diffusion's autoencoder in diffusers' class, from a checkpoint's weights. Raises TrainingError."""
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    autoencoder = AutoencoderKL(**AUTOENCODER, **options)
    _fill(autoencoder, convert_ldm_vae_checkpoint(state, autoencoder.config), path, "autoencoder")
    return autoencoder.eval().requires_grad_(False)


@torch.no_grad()
def _null(path: Path, state: dict[str, Tensor], shape: dict) -> Tensor:
    """[1,77,D]: the empty prompt's states, from the checkpoint's own text encoder."""
    encoder = text_encoder(path, state, shape)
    tokens = torch.full((1, LENGTH), encoder.config.pad_token_id)
    tokens[0, :2] = torch.tensor([BEGIN, END])
    return encoder(tokens).last_hidden_state


def text_encoder(path: Path, state: dict[str, Tensor], shape: dict, prefix: str = "cond_stage_model.") -> nn.Module:
    """CLIP's text encoder in transformers' class, from a checkpoint's weights under OpenAI's or OpenCLIP's names.

    shape: values of transformers' config; with a projection_dim it gives pooled vectors too. Raises TrainingError.
    """
    from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_open_clip_checkpoint
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kind = CLIPTextModelWithProjection if "projection_dim" in shape else CLIPTextModel
    padding = {"pad_token_id": END} | shape  # Stable Diffusion 2 and OpenCLIP fill up with "!"
    encoder = kind(CLIPTextConfig(**padding, bos_token_id=BEGIN, eos_token_id=END))
    own = {key: value for key, value in state.items() if key.startswith(prefix)}
    if any(key.startswith(f"{prefix}model.") for key in own):
        found = convert_open_clip_checkpoint(encoder, own, f"{prefix}model.")
    else:
        found = convert_ldm_clip_checkpoint(own)
    known = encoder.state_dict()  # transformers 5 has dropped the prefix
    found = {key if key in known else key.removeprefix("text_model."): value for key, value in found.items()}
    _fill(encoder, {key: value for key, value in found.items() if key in known}, path, "text encoder")
    return encoder.eval().requires_grad_(False)


def _fill(network: nn.Module, state: dict[str, Tensor], path: Path, what: str) -> None:
    missing, _ = network.load_state_dict(state, strict=False)
    missing = [key for key in missing if not key.endswith("position_ids")]
    if missing:
        raise settings.TrainingError(
            f"base: {path} lacks the {what}'s weights, such as {missing[0]}; give the whole checkpoint."
        )


class Stored(nn.Linear):
    """Weights of any precision, fp8 too, taken in the precision that is computed in."""

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return F.linear(x.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))


def fill_as_stored(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Fill a model on the meta device with these weights, frozen: linear layers as precise as they come, all else in
    float32.
    """
    state = dict(state)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.__class__ = Stored
        else:
            keys = (f"{name}.{part}" for part in ("weight", "bias"))
            state |= {key: state[key].float() for key in keys if key in state}
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)
