"""Checkpoints of Stable Diffusion's families with random weights, under the names of the released files."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from strata.training import base as bases
from strata.training import text_base

SMALL = {
    "SD1.5": {
        "unet": {"block_out_channels": [32, 64, 64, 64], "cross_attention_dim": 24, "attention_head_dim": 2},
        "text": [{"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}],
    },
    "SDXL": {
        "unet": {
            "block_out_channels": [32, 64, 64],
            "transformer_layers_per_block": [1, 1, 2],
            "cross_attention_dim": 40,
            "attention_head_dim": [1, 2, 2],
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 16 + 6 * 8,
        },
        "text": [
            {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2},
            {
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "projection_dim": 16,
            },
        ],
    },
}


def entry_of(family: str, changes: dict | None = None) -> dict:
    """Of models_config/text_bases.json, with changes of its `unet` and of each of its `text`."""
    entry, changes = json.loads(text_base.CONFIG.read_text())[family], changes or {"unet": {}, "text": [{}, {}]}
    text = [shape | other for shape, other in zip(entry["text"], changes["text"], strict=False)]
    return entry | {"unet": entry["unet"] | changes["unet"], "text": text}


def host_shape(entry: dict) -> dict:
    """ComfyUI's words for a UNet of diffusers'."""
    shape = entry["unet"]
    levels = len(shape["block_out_channels"])
    if "down_block_types" in shape:
        depths = [
            depth * kind.startswith("CrossAttn")
            for kind, depth in zip(shape["down_block_types"], shape["transformer_layers_per_block"], strict=True)
        ]
        middle = shape["transformer_layers_per_block"][-1]
    else:
        depths, middle = [1] * (levels - 1) + [0], 1
    return {
        "num_res_blocks": [2] * levels,
        "channel_mult": [width // shape["block_out_channels"][0] for width in shape["block_out_channels"]],
        "transformer_depth": [depth for depth in depths for _ in range(2)],
        "transformer_depth_output": [depth for depth in depths for _ in range(3)],
        "transformer_depth_middle": middle,
    }


def filled(kind, *given, **options) -> dict[str, torch.Tensor]:
    """The weights of a network, one long random row over and over again, which is much faster than to draw them all."""
    with torch.device("meta"):
        network = kind(*given, **options)
    row, state = (
        torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)),
        {},
    )  # a prime: no two rows are equal
    for number, (key, value) in enumerate(network.state_dict().items()):
        drawn = row.roll(7919 * number).repeat(value.numel() // len(row) + 1)[: value.numel()].view(value.shape)
        scale = value[0].numel() ** -0.5 if value.ndim > 1 else 0.1
        state[key] = scale * drawn + ("norm" in key and key.endswith("weight"))
    return state


def write(path: Path, entry: dict) -> None:
    """Every weight of UNet, autoencoder and text encoders in fp16, named by ComfyUI's own conversions."""
    sys.path.insert(0, os.environ["STRATA_HOST"])
    import comfy.diffusers_convert as convert
    import comfy.utils
    from diffusers import AutoencoderKL, UNet2DConditionModel

    names = comfy.utils.unet_to_diffusers(host_shape(entry))
    unet = filled(UNet2DConditionModel, **entry["unet"])
    state = {f"model.diffusion_model.{names[key]}": value.half() for key, value in unet.items()}
    del unet
    autoencoder = convert.convert_vae_state_dict(filled(AutoencoderKL, **bases.AUTOENCODER))
    state |= {f"first_stage_model.{key}": value for key, value in autoencoder.items()}
    for shape in entry["text"]:
        state |= text_weights(shape)
    save_file({key: value.half().contiguous() for key, value in state.items()}, path)


def text_weights(shape: dict) -> dict[str, torch.Tensor]:
    """A text encoder's, by OpenAI's names, or by OpenCLIP's where it has a projection."""
    import comfy.diffusers_convert as convert
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    shape = dict(shape)
    prefix, projected = shape.pop("prefix"), "projection_dim" in shape
    text = filled(CLIPTextModelWithProjection if projected else CLIPTextModel, CLIPTextConfig(**shape))
    text = {key if key.startswith("text_") else f"text_model.{key}": value for key, value in text.items()}
    if not projected:
        return {f"{prefix}transformer.{key}": value for key, value in text.items()}
    text = convert.convert_text_enc_state_dict_v20({f"transformer.{key}": value for key, value in text.items()})
    return {f"{prefix}model.{key}": value for key, value in text.items()}


def draw(folder: Path, count: int = 6) -> Path:
    """Disks with a soft edge, wider than high; every second one's words are in a file."""
    folder.mkdir()
    rng, (rows, columns) = np.random.default_rng(0), np.mgrid[:48, :96]
    for number in range(count):
        middle = rng.integers(16, 32), rng.integers(16, 80)
        away = ((rows - middle[0]) ** 2 + (columns - middle[1]) ** 2) ** 0.5
        alpha = 255 * (13 - away).clip(0, 1)
        colour = np.broadcast_to(rng.integers(0, 256, 3), (48, 96, 3))
        Image.fromarray(np.dstack([colour, alpha]).astype(np.uint8)).save(folder / f"a_round-disk_{number}.png")
        if number % 2:
            (folder / f"a_round-disk_{number}.txt").write_text(f"disk number {number}\n")
    return folder
