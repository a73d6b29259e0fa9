"""LayeringDiff on a full-size inpainting checkpoint with random weights and the real key names: the command as a user
types it, in an installed copy of the pack, and the node's model on its file beside diffusers' own forward.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from strata.networks import decomposer as networks
from strata.training import base as bases
from strata.training import layeringdiff

from .installed import train

pytestmark = pytest.mark.slow
PACK = Path(__file__).resolve().parents[2]
SHAPE = {  # ComfyUI's words for both UNets
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
}


def checkpoint(path: Path, family: str) -> None:
    """Every weight of UNet, autoencoder and text encoder by the names of the released files, by ComfyUI's own
    conversions.
    """
    sys.path.insert(0, os.environ["STRATA_HOST"])
    import comfy.diffusers_convert as convert
    import comfy.utils
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    entry = json.loads(bases.CONFIG.read_text())[family]
    names = comfy.utils.unet_to_diffusers(SHAPE)
    unet = UNet2DConditionModel(**entry["unet"]).state_dict()
    state = {f"model.diffusion_model.{names[key]}": value.half() for key, value in unet.items()}
    del unet
    autoencoder = AutoencoderKL(**bases.AUTOENCODER)
    state |= {
        f"first_stage_model.{key}": value
        for key, value in convert.convert_vae_state_dict(autoencoder.state_dict()).items()
    }
    shape = {key: value for key, value in entry["text"].items() if key != "pad_token_id"}
    shape["num_hidden_layers"] = 24 if family == "SD2" else 12
    text = CLIPTextModel(CLIPTextConfig(**shape)).state_dict()
    text = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in text.items()}
    if family == "SD2":  # OpenCLIP's names
        text = convert.convert_text_enc_state_dict_v20(text)
        for old, new in (
            ("resblocks.", "transformer.resblocks."),
            ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
            ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
            ("text_model.final_layer_norm.", "ln_final."),
        ):
            text = {key.replace(old, new): value for key, value in text.items()}
        state |= {f"cond_stage_model.model.{key}": value for key, value in text.items()}
    else:
        state |= {f"cond_stage_model.transformer.{key}": value for key, value in text.items()}
    save_file({key: value.half().contiguous() for key, value in state.items()}, path)


@pytest.fixture(scope="module", params=["SD2", "SD1.5"])
def trained(request, tmp_path_factory):
    """The checkpoint, and the file that two steps of each part have made of it, by the command in a copy of the pack
    without tools and tests, below a ComfyUI.
    """
    root = tmp_path_factory.mktemp("full")
    base = root / "base.safetensors"
    checkpoint(base, request.param)
    small = ["side=64", "pairs=40", "batch=1", "steps=2", "warmup=1", "sampling_steps=1", "rank=4"]
    small += ["alignment_pairs=2", "alignment_crop=32", "alignment_batch=1", "alignment_steps=2"]
    changes = [word for value in small for word in ("--set", value)]
    train(root, "layeringdiff", "--base", base, "--folder", root / "run", *changes)
    yield request.param, base, root / "run"
    shutil.rmtree(root)


LOAD = """
import sys, torch
sys.path[:0] = [sys.argv[1], sys.argv[2]]
sys.argv = sys.argv[:1] + sys.argv[3:]
import conftest, host
sys.path.insert(0, str(host.find_or_install().root))
from comfy.cli_args import args
args.cpu = True
import comfy.model_management, comfy.sd
from strata.patches import decomposer, layer_files, mini_family
import folder_paths
base, run, out = sys.argv[1:]
folder_paths.add_model_folder_path("layer_model", run)
mini_family.register(decomposer.UNETS)
model = comfy.sd.load_checkpoint_guess_config(base, output_vae=False, output_clip=False)[0]
loaded = layer_files.load("layeringdiff.safetensors", layer_files.Decomposer)
given = torch.load(out + "/given.pt")
found = {}
for layer in ("foreground", "background"):
    with torch.no_grad():
        clone = decomposer.denoiser(model, loaded, layer, given["image"], given["cells"])
        comfy.model_management.load_models_gpu([clone])
        sampling = clone.get_model_object("model_sampling")
        sigma = sampling.sigma(torch.tensor([500.0]))
        latent = model.model.process_latent_in(given["image"])
        condition = decomposer.networks.condition(latent, given["cells"], layer)
        x = given["noisy"] * (1 + sigma**2).sqrt()
        found[layer] = clone.model.apply_model(x, sigma, c_concat=condition, c_crossattn=loaded.null)
found["sigma"], found["null"] = sigma, loaded.null
torch.save(found, out + "/found.pt")
print(loaded.describe())
"""


@torch.no_grad()
def test_a_file_of_a_large_base_gives_in_the_node_what_it_gives_in_diffusers(trained, tmp_path):
    family, path, run = trained
    given = {
        "image": torch.randn(1, 4, 8, 8),  # as the autoencoder gives it, before the scale
        "noisy": torch.randn(1, 4, 8, 8),
        "cells": torch.rand(1, 64, 8, 8),
    }
    torch.save(given, tmp_path / "given.pt")
    command = ["-c", LOAD, PACK / "tests", PACK / "tools", path, run, tmp_path]
    done = subprocess.run([sys.executable, *map(str, command)], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"a decomposer for {family} (foreground, background, alignment)" in done.stdout
    found = torch.load(tmp_path / "found.pt")
    base = bases.load(path)
    assert torch.allclose(found["null"], base.null, rtol=0, atol=2e-2)  # kept in fp16
    state = load_file(run / "layeringdiff.safetensors")
    level = (1 / (1 + found["sigma"] ** 2)).view(-1, 1, 1, 1)
    for layer in networks.LAYERS:
        model = layeringdiff.Denoiser(base, layer, 4).eval()
        own = {key.removeprefix(f"{layer}."): value for key, value in state.items() if key.startswith(f"{layer}.")}
        renamed = {
            "unet."
            + key.replace(".lora_A.weight", ".lora_A.default.weight").replace(
                ".lora_B.weight", ".lora_B.default.weight"
            ): value.float()
            for key, value in own.items()
        }
        lacking = model.load_state_dict(renamed, strict=False)
        assert not lacking.unexpected_keys and any(value.abs().max() > 0 for value in own.values())
        model.null.copy_(found["null"])
        alpha = torch.nn.functional.pixel_shuffle(given["cells"], 8)
        v = model(given["noisy"], torch.tensor([500]), 0.18215 * given["image"], alpha)
        expected = level.sqrt() * given["noisy"] - (1 - level).sqrt() * v
        assert torch.allclose(found[layer], expected, rtol=0, atol=1e-3) and expected.std() > 0.1
