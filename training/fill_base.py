"""A Flux-Fill to fine-tune, with what BFS needs beside it: the mini family's published files, or Flux.1-Fill and its
autoencoders and text encoders, read from a user's own files into diffusers' and transformers' classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ..networks import flux
from . import base as bases
from . import flux_fill, published, rgba_autoencoder, settings
from .captions import Captions, fill

CONFIG = settings.PACK / "models_config" / "fill_bases.json"
MINI, FLUX = "Strata mini", "FLUX.1-Fill [dev]"
OPTIONS = ("base", "vae", "rgba_vae", "text_encoders", "foregrounds", "backgrounds", "composites", "masks")
ENCODERS = ("text_encoder", "text_encoder_2")  # CLIP's and T5's, in a diffusers folder
TOKENIZERS = ("tokenizer", "tokenizer_2")
CLIP_TOKENS = 77
KERNELS = ("encoder.down_blocks.{}.resnets.0.conv1.weight", "encoder.down.{}.block.0.conv1.weight")

Words = Callable[[list[str]], tuple[Tensor, Tensor]]  # captions to states [B,T,D] and pooled [B,P]


@dataclass(frozen=True)
class Base:
    """autoencoder, rgba: modules that encode images [B,3,H,W] and [B,4,H,W] in 0..1 to latents [B,C,H/8,W/8] as the
    transformer sees them, and decode these. words: makes Words for these captions, and keeps what they need in a
    folder. transformer: reads diffusers' FluxTransformer2DModel, which is large.
    """

    family: str
    autoencoder: Any
    rgba: Any
    words: Callable[[list[str], Path], Words]
    transformer: Callable[[], nn.Module]
    licence: str


def load(config: dict) -> Base:
    """The mini family's for a config without a base. Raises TrainingError with one sentence for what is not there,
    damaged, or something else.
    """
    if not any(name in config for name in OPTIONS):
        return _mini()
    paths = {name: settings.given(config, name) for name in OPTIONS[: 4 if "stage" in config else 3]}
    entry = json.loads(CONFIG.read_text())[FLUX]
    shape = entry["transformer"] | _depths(paths["base"], entry["transformer"])
    encoders = paths.get("text_encoders")
    for name in (*ENCODERS, *TOKENIZERS) if encoders else ():
        if not (encoders / name).is_dir():
            raise settings.TrainingError(
                f"--text-encoders: {encoders} has no folder {name}; give the folder of FLUX.1-Fill-dev in diffusers' "
                f"form, with {', '.join((*ENCODERS, *TOKENIZERS))}."
            )
    return Base(
        FLUX,
        KL(paths["vae"], "vae", 3, entry["latent"]),
        KL(paths["rgba_vae"], "rgba-vae", 4, entry["latent"]),
        lambda captions, folder: encode(encoders, captions, folder, config["text_tokens"]),
        lambda: _transformer(paths["base"], shape),
        entry["licence"],
    )


def _mini() -> Base:
    encoder, autoencoder = published.checkpoint()
    rgba = rgba_autoencoder.build("published").eval().requires_grad_(False)
    words = flux_fill.Words(encoder, settings.family()["flux_tokens"])
    return Base(MINI, autoencoder, rgba, lambda captions, folder: words, published.flux_fill, "GPL-3.0, as the pack")


def _plain(key: str) -> str:
    """A transformer's key without the prefix that it has inside a whole checkpoint."""
    return key.removeprefix("model.").removeprefix("diffusion_model.")


def _depths(path: Path, shape: dict) -> dict[str, int]:
    """How many blocks of each kind the file has. Raises TrainingError for a file that is no Flux.1-Fill."""
    try:
        with safe_open(path, "pt") as file:
            names = {_plain(key): key for key in file.keys()}  # noqa: SIM118
            first = file.get_slice(names["img_in.weight"]).get_shape() if "img_in.weight" in names else None
    except (OSError, SafetensorError) as error:
        raise settings.TrainingError(
            f"--base: {path} cannot be read ({error}); give flux1-fill-dev.safetensors."
        ) from error
    wanted = [shape["hidden_size"], shape["in_channels"] * flux.PATCH**2]
    if first != wanted or "guidance_in.in_layer.weight" not in names:
        found = f"its first layer is {first} and Flux.1-Fill's {wanted}" if first else "it has no img_in.weight"
        raise settings.TrainingError(
            f"--base: {path} is no Flux.1-Fill in the released form ({found}); give flux1-fill-dev.safetensors."
        )
    if any(key.endswith(("scale_weight", "weight_scale", "scaled_fp8")) for key in names):
        raise settings.TrainingError(
            f"--base: {path} has weights in scaled fp8; give flux1-fill-dev.safetensors in bf16, and --set fp8=true to "
            "keep it small."
        )
    kinds = {"depth": "double_blocks", "depth_single_blocks": "single_blocks"}
    return {
        key: len({name.split(".")[1] for name in names if name.startswith(f"{kind}.")}) for key, kind in kinds.items()
    }


def to_fp8(model: nn.Module) -> None:
    """Store the frozen matrices of the blocks in fp8. Low-rank terms have to be there before, since they take their
    first values in the base's precision.
    """
    for name, module in model.named_modules():
        if isinstance(module, bases.Stored) and "transformer_blocks." in name:
            module.weight.data = module.weight.data.to(torch.float8_e4m3fn)


def _transformer(path: Path, shape: dict) -> nn.Module:
    """The transformer, frozen, its matrices as in the file, or in bf16 where that has fp8. Raises TrainingError."""
    with torch.device("meta"):
        model = flux.build(shape)
    found = {_plain(key): value for key, value in load_file(path).items()}
    found = {key: value.bfloat16() if value.dtype.itemsize < 2 else value for key, value in found.items()}
    state = flux.diffusers_form(found)
    missing = sorted(model.state_dict().keys() - state.keys())
    if missing:
        raise settings.TrainingError(f"--base: {path} lacks {missing[0]}; it is damaged, so get it again.")
    return bases.fill_as_stored(model, state)


class KL(nn.Module):
    """Flux's autoencoder, or one with alpha in AlphaVAE's form, from a file under the host's or diffusers' names. What
    comes out is on the device of what came in.
    """

    def __init__(self, path: Path, option: str, channels: int, latent: dict):
        """Raises TrainingError."""
        from diffusers import AutoencoderKL
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

        super().__init__()
        try:
            state = {key.removeprefix("first_stage_model."): value.float() for key, value in load_file(path).items()}
        except (OSError, SafetensorError) as error:
            raise settings.TrainingError(f"--{option}: {path} cannot be read ({error}); give another file.") from error
        names = next((name for name in KERNELS if name.format(0) in state), "")
        widths = [len(state[names.format(level)]) for level in range(4) if names.format(level) in state]
        ends = [state[key].shape[1] for key in ("encoder.conv_in.weight", "decoder.conv_in.weight") if key in state]
        if len(widths) != 4 or ends != [channels, latent["channels"]]:
            raise settings.TrainingError(
                f"--{option}: {path} is no autoencoder in the form of Flux's with {channels} image channels and "
                f"{latent['channels']} latent ones; docs/training.md names the files that are."
            )
        self.network = AutoencoderKL(
            in_channels=channels,
            out_channels=channels,
            latent_channels=latent["channels"],
            block_out_channels=tuple(widths),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        if names == KERNELS[1]:
            state = convert_ldm_vae_checkpoint(state, self.network.config)
        lacking = self.network.load_state_dict(state, strict=False).missing_keys
        if lacking:
            raise settings.TrainingError(f"--{option}: {path} lacks {lacking[0]}; it is damaged, so get it again.")
        self.scale, self.shift = latent["scale"], latent["shift"]
        self.to(bases.device()).eval().requires_grad_(False)

    def encode(self, images: Tensor) -> Tensor:
        mean = self.network.encode(images.to(self.network.device) * 2 - 1).latent_dist.mean
        return ((mean - self.shift) * self.scale).to(images.device)

    def decode(self, latents: Tensor) -> Tensor:
        images = self.network.decode(latents.to(self.network.device) / self.scale + self.shift).sample
        return (images / 2 + 0.5).to(latents.device)


def encode(encoders: Path, captions: list[str], folder: Path, tokens: int) -> Captions:
    """Captions as T5's states and CLIP's pooled vector. No token is masked, as in Flux itself."""
    pooled, states = (json.loads((encoders / name / "config.json").read_text()) for name in ENCODERS)
    weights = [(str(path), path.stat().st_size) for name in ENCODERS for path in sorted((encoders / name).iterdir())]
    shapes = {"states": (tokens, states["d_model"]), "pooled": (pooled["hidden_size"],)}
    return Captions(folder, captions, shapes, [tokens, weights], partial(_encode, encoders, tokens))


def _encode(encoders: Path, tokens: int, captions: list[str], arrays: dict[str, np.ndarray]) -> None:
    from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

    for kind, network, name, tokenizer, length, output in (
        ("pooled", CLIPTextModel, ENCODERS[0], TOKENIZERS[0], CLIP_TOKENS, "pooler_output"),
        ("states", T5EncoderModel, ENCODERS[1], TOKENIZERS[1], tokens, "last_hidden_state"),
    ):
        split = AutoTokenizer.from_pretrained(encoders / tokenizer, local_files_only=True)
        ids = split(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
        encoder = network.from_pretrained(encoders / name, local_files_only=True)
        fill([arrays[kind]], encoder, ids, bases.device(), lambda encoder, ids: [encoder(ids)[output]])  # noqa: B023
