"""A text-to-image model to fine-tune, read from a user's single file into diffusers' and transformers' classes: Stable
Diffusion 1.5 and SDXL, with their text encoders.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..networks import diffusers_unet
from . import base as bases
from . import captions, loop, settings, text

CONFIG = settings.PACK / "models_config" / "text_bases.json"
CROSS = "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"  # the first that both families have
PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]


@dataclass(frozen=True)
class Base:
    """unet: diffusers' UNet2DConditionModel, frozen. names: of its modules, and what ComfyUI calls these
    ("diffusion_model.…"). autoencoder: diffusers' AutoencoderKL, on the card where there is one.
    """

    family: str
    path: Path
    unet: nn.Module
    names: dict[str, str]
    autoencoder: nn.Module
    text: dict
    licence: str

    @property
    def scale(self) -> float:
        """Latents as the UNet sees them are those of the autoencoder times this."""
        return self.autoencoder.config.scaling_factor

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation [B,4,H/8,W/8] of the autoencoder's own latents, of images [B,3,H,W] in 0..1."""
        found = self.autoencoder.encode(images.to(self.autoencoder.device) * 2 - 1).latent_dist
        return found.mean, found.std

    def decode(self, latents: Tensor) -> Tensor:
        """[B,3,H,W] of latents as the UNet sees them."""
        return self.autoencoder.decode(latents.to(self.autoencoder.device) / self.scale).sample / 2 + 0.5

    def words(self, prompts: list[str], folder: Path) -> captions.Captions:
        """Of each prompt the states [77,D], the pooled vector [P], which for Stable Diffusion 1.5 is a single unused
        value, and where the prompt ends, [1].
        """
        shapes = self.text["encoders"]
        width = sum(shape["hidden_size"] for shape in shapes)
        kinds = {
            "states": (bases.LENGTH, width),
            "pooled": (sum(shape.get("projection_dim", 0) for shape in shapes) or 1,),
            "ends": (1,),
        }
        known = [str(self.path), self.path.stat().st_size, self.text]
        return captions.Captions(folder, prompts, kinds, known, partial(_encode, self.path, self.text))


def load(config: dict) -> Base:
    """Raises TrainingError with one sentence for a file that is not there, damaged, or another kind of model."""
    path = settings.given(config, "base")
    state = bases.read(path)
    family, entry = _family(path, state)
    unet, names = _unet(path, state, entry["unet"])
    autoencoder = bases.autoencoder_of(
        path,
        {key: value.float() for key, value in state.items() if key.startswith("first_stage_model.")},
        scaling_factor=entry["scaling_factor"],
    )
    encoders = [shape | {"num_hidden_layers": _layers(state, shape)} for shape in entry["text"]]
    words = {"encoders": encoders, "penultimate": entry["penultimate"]}
    settings.clip_tokenizer()  # for its sentence before anything is computed
    return Base(family, path, unet, names, autoencoder.to(bases.device()), words, entry["licence"])


def _family(path: Path, state: dict[str, Tensor]) -> tuple[str, dict]:
    """The entry of models_config whose width, text and input the weights have."""
    found = state.keys() & {"v_pred", "edm_mean", "edm_vpred.sigma_max"}
    if found:
        raise settings.TrainingError(
            f"base: {path} does not predict noise ({found.pop()}); give a model that does, as SD1.5 and SDXL do."
        )
    first, cross = state[f"{bases.UNET}{bases.FIRST}"], state.get(f"{bases.UNET}{CROSS}")
    known = json.loads(CONFIG.read_text())
    for family, entry in known.items():
        shape = entry["unet"]
        wanted = shape["block_out_channels"][0], shape["in_channels"], shape["cross_attention_dim"]
        if cross is not None and (*first.shape[:2], cross.shape[1]) == wanted:
            return family, entry
    raise settings.TrainingError(
        f"base: {path} is no text-to-image model of {' or '.join(known)} ({first.shape[1]} input channels, "
        f"{cross.shape[1] if cross is not None else 'no'} text channels); give a checkpoint of one of them."
    )


def _unet(path: Path, state: dict[str, Tensor], shape: dict) -> tuple[nn.Module, dict[str, str]]:
    """The UNet, as deep as the file's, and the host's names of its modules, by what diffusers' converter makes of the
    keys.
    """
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    if "transformer_layers_per_block" in shape:
        places = (f"{bases.UNET}input_blocks.{1 + 3 * level}.1.transformer_blocks" for level in range(3))
        shape = shape | {"transformer_layers_per_block": [max(1, _count(state, place)) for place in places]}
    with torch.device("meta"):
        unet = UNet2DConditionModel(**shape)
    found = convert_ldm_unet_checkpoint(dict(state), unet.config)
    if unet.state_dict().keys() - found.keys():
        raise settings.TrainingError(
            f"base: {path} lacks the UNet's weights, such as {min(unet.state_dict().keys() - found.keys())}; give the "
            "whole checkpoint."
        )
    places = {id(value): key for key, value in state.items()}
    names = {
        key.removesuffix(".weight"): places[id(value)].removeprefix("model.").removesuffix(".weight")
        for key, value in found.items()
        if key.endswith(".weight")
    }
    # ComfyUI's smallest numbers have 16 bits too.
    found = {key: value.bfloat16() if value.dtype.itemsize < 2 else value for key, value in found.items()}
    return bases.fill_as_stored(unet, found), names


def _count(state: dict[str, Tensor], before: str) -> int:
    """How many numbers follow that beginning of a key."""
    found = (re.match(rf"{re.escape(before)}\.(\d+)\.", key) for key in state)
    return len({match[1] for match in found if match})


def _layers(state: dict[str, Tensor], shape: dict) -> int:
    """A text encoder's depth in the file, which some have cut."""
    names = "transformer.text_model.encoder.layers", "model.transformer.resblocks"
    return max(_count(state, shape["prefix"] + name) for name in names) or shape["num_hidden_layers"]


def _encode(path: Path, entry: dict, prompts: list[str], arrays: dict[str, np.ndarray]) -> None:
    """As ComfyUI encodes them: the last states of Stable Diffusion 1.5's encoder, normalised; of SDXL's two the ones
    before the last, side by side, and the second one's pooled vector. Words beyond 75 tokens are left out.
    """
    state, ids = bases.read(path), text.clip_ids(prompts)
    ends = (ids == bases.END).int().argmax(1)
    arrays["ends"][:] = ends[:, None].numpy()

    def take(encoder: nn.Module, ids: Tensor) -> list[Tensor]:
        found = encoder(ids, output_hidden_states=True)
        states = found.hidden_states[-2] if entry["penultimate"] else found.last_hidden_state
        return [states, found.text_embeds] if hasattr(found, "text_embeds") else [states]

    first = 0
    for shape in entry["encoders"]:
        shape = dict(shape)
        prefix = shape.pop("prefix")
        encoder = bases.text_encoder(path, _floats(state, prefix), shape, prefix)
        own = ids.masked_fill(torch.arange(ids.shape[1]) > ends[:, None], encoder.config.pad_token_id)
        states = arrays["states"][..., first : first + shape["hidden_size"]]
        wanted = [states, arrays["pooled"]] if "projection_dim" in shape else [states]
        captions.fill(wanted, encoder, own, bases.device(), take)
        first += shape["hidden_size"]


def _floats(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key: value.float() for key, value in state.items() if key.startswith(prefix)}


class Denoiser(nn.Module):
    """A base with low-rank terms on the projections of every attention, which are all that learns, and all of the state
    that is saved.
    """

    def __init__(self, base: Base, rank: int, checkpointing: bool):
        from peft import LoraConfig, inject_adapter_in_model

        super().__init__()
        self.unet = base.unet
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=PROJECTIONS), self.unet)
        for name, value in self.unet.named_parameters():
            value.requires_grad_(".lora_" in name)
            if ".lora_" in name:
                value.data = value.data.float()  # peft gives them the base's precision, too coarse to learn in
        if checkpointing:
            self.unet.enable_gradient_checkpointing()
        loop.save_what_learns(self)

    def forward(self, latent: Tensor, timesteps: Tensor, states: Tensor, pooled: Tensor) -> Tensor:
        """Noise, like latent [B,4,h,w]; timesteps: [B]; states: [B,77,D]; pooled: [B,P]."""
        return diffusers_unet.predict(self.unet, latent, timesteps, states, pooled)


def host_key(key: str, names: dict[str, str]) -> str:
    """The key of a low-rank term of Denoiser with ComfyUI's name of its module."""
    module, end = key.removeprefix("unet.").split(".lora_")
    return f"{names[module]}.lora_{end}"
