"""SD1.5 at full size and SDXL at full width, as shallow as its smallest relative, with random weights and the real key
names: the trainers' commands as a user types them, in an installed copy of the pack, and the nodes' models on their
files, in another process, beside diffusers' own forward.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from strata.networks import diffusers_unet, layered_denoiser, layered_unet
from strata.networks.transparency import OffsetEncoder
from strata.techniques.shared_layers import global_embedding
from strata.training import adapter, dreamlayer, text_base

from . import random_bases, test_dreamlayer_base
from .installed import PACK, train

pytestmark = pytest.mark.slow
# Segmind-Vega's depths: ComfyUI knows it, and all of its names are SDXL's
SHALLOW = {
    "unet": {"transformer_layers_per_block": [1, 1, 2]},
    "text": [{"num_hidden_layers": 3}, {"num_hidden_layers": 3}],
}
CHANGES = {"SD1.5": None, "SDXL": SHALLOW}


@pytest.fixture(scope="module", params=sorted(CHANGES))
def given(request, tmp_path_factory):
    """The family, and a folder with a checkpoint, an encoder, images, and ComfyUI's vocabulary where it has it."""
    root = tmp_path_factory.mktemp("full")
    random_bases.write(root / "base.safetensors", random_bases.entry_of(request.param, CHANGES[request.param]))
    state = random_bases.filled(OffsetEncoder)
    save_file({key: value.half() for key, value in state.items()}, root / "encoder.safetensors")
    random_bases.draw(root / "images")
    shutil.copytree(Path(os.environ["STRATA_HOST"]) / "comfy" / "sd1_tokenizer", root / "comfy" / "sd1_tokenizer")
    yield request.param, root
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def trained_adapter(given):
    """The folder of two steps of the adapter."""
    family, root = given
    run = root / "runs" / "adapter"
    small = ["side=64", "held_out=2", "batch=1", "steps=2", "warmup=1", "sampling_steps=1", "rank=4"]
    changes = [word for value in (*small, "learning_rate=0.01") for word in ("--set", value)]
    encoder = ["--transparent-encoder", root / "encoder.safetensors"]
    data = ["--foregrounds", root / "images", "--folder", run]
    train(root, "adapter", "--base", root / "base.safetensors", *encoder, *data, *changes)
    return run


@pytest.fixture(scope="module")
def trained_layers(given, trained_adapter):
    """The folder of two steps of the layer modules, with the adapter on the objects."""
    _, root = given
    for number in range(3):
        test_dreamlayer_base.save(root / "scenes", f"{number}", test_dreamlayer_base.stack(3 - number, number))
    run = root / "runs" / "dreamlayer"
    small = ["side=64", "held_out=1", "rows=3", "steps=2", "warmup=1", "sampling_steps=1", 'optimizer="adam"']
    changes = [word for value in (*small, "learning_rate=0.01") for word in ("--set", value)]
    files = ["--transparent-encoder", root / "encoder.safetensors", "--adapter", trained_adapter / adapter.FILE]
    data = ["--scenes", root / "scenes", "--folder", run]
    train(root, "dreamlayer", "--base", root / "base.safetensors", *files, *data, *changes)
    return run


HOST = """
import sys, torch
sys.path[:0] = [sys.argv[1], sys.argv[2]]
sys.argv = sys.argv[:1] + sys.argv[3:]
import conftest, host
sys.path.insert(0, str(host.find_or_install().root))
from comfy.cli_args import args
args.cpu = True
import comfy.model_management, comfy.sd
import folder_paths
from strata.patches import layer_files
base, run, out = sys.argv[1:]
folder_paths.add_model_folder_path("layer_model", run)
model = comfy.sd.load_checkpoint_guess_config(base, output_vae=False, output_clip=False)[0]
given = torch.load(out + "/given.pt")
sigma = model.model.model_sampling.sigma(given["times"].float())
x = given["noisy"] * (1 + sigma.view(-1, 1, 1, 1) ** 2).sqrt()
adm = {}
if model.model.adm_channels:
    pooled = given["pooled"]
    adm["y"] = model.model.encode_adm(pooled_output=pooled, device=torch.device("cpu"), height=64, width=64)
"""
APPLIED = """
from strata.patches import transparency_model
loaded = layer_files.load("transparent_adapter.safetensors", layer_files.Transparency)
clone = transparency_model.apply(model, loaded, 1.0)
comfy.model_management.load_models_gpu([clone])
with torch.no_grad():
    found = clone.model.apply_model(x, sigma, c_crossattn=given["states"], **adm)
torch.save((x - found) / sigma.view(-1, 1, 1, 1), out + "/found.pt")
print(loaded.describe())
"""


LAYERED = """
from patches.sampling_helpers import estimates
from strata.patches import foreground, layer_modules
from strata.patches.layer_prompts import LAYERS
from strata.patches.shared_layers import Maps, Sharing, map_context, object_rows, share_layers
loaded = layer_files.load("dreamlayer.safetensors", layer_modules.LayerModules)
adapter = {key: tuple(parts) for key, parts in given["adapter"].items()}
model = foreground.apply_to_foreground(model, adapter, rows=object_rows(4))
model = map_context(share_layers(model, Sharing(1.0), loaded), Maps(1.0), loaded)
positive = [[given["states"], {"pooled_output": given["pooled"], LAYERS: given["words"]}]]
negative = [[given["states"][:1], {"pooled_output": given["pooled"][:1]}]]
found = estimates(model, positive, negative, given["noisy"], float(sigma[0]))
torch.save((found["input"], (found["input"] - found["cond"]) / sigma[0], sigma[0]), out + "/found.pt")
print(loaded.describe())
"""


def in_comfyui(script: str, base: Path, run: Path, out: Path, **given) -> tuple[torch.Tensor, str]:
    """What a script saves, and what it prints, in a process of its own."""
    torch.save(given, out / "given.pt")
    command = ["-c", HOST + script, PACK / "tests", PACK / "tools", base, run, out]
    done = subprocess.run([sys.executable, *map(str, command)], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out / "found.pt"), done.stdout


@torch.no_grad()
def test_the_adapters_file_gives_in_the_node_what_it_gives_in_diffusers(given, trained_adapter, tmp_path):
    family, root = given
    base = text_base.load({"base": str(root / "base.safetensors")})
    times = torch.tensor([100, 700])
    noisy, states = torch.randn(2, 4, 8, 8), torch.randn(2, 77, base.unet.config.cross_attention_dim)
    pooled = torch.randn(2, 1280)
    found, said = in_comfyui(
        APPLIED,
        root / "base.safetensors",
        trained_adapter,
        tmp_path,
        noisy=noisy,
        times=times,
        states=states,
        pooled=pooled,
    )
    assert f"an adapter for {family}" in said
    plain = diffusers_unet.predict(base.unet, noisy, times, states, pooled)
    model = text_base.Denoiser(base, 4, False)
    state = load_file(trained_adapter / adapter.FILE)
    for key, value in model.state_dict().items():
        host, end = text_base.host_key(key, base.names).split(".lora_")
        value.copy_(state[f"{host}.weight::lora::{'AB'.index(end[0]) ^ 1}"])
    wanted = model(noisy, times, states, pooled)
    assert wanted.std() > 0.1 and (found - wanted).abs().max() < 1e-3
    assert (plain - wanted).abs().max() > 0.02


@torch.no_grad()
def test_the_layer_modules_give_in_the_nodes_what_they_give_in_diffusers(
    given, trained_adapter, trained_layers, tmp_path
):
    """Before T_G, where maps are mixed in."""
    family, root = given
    base = text_base.load({"base": str(root / "base.safetensors")})
    config = {"adapter": str(trained_adapter / adapter.FILE)}
    model = layered_unet.LayeredUNet(base.unet, dreamlayer.own_adapter(config, base), 3, 1).eval()
    state = load_file(trained_layers / dreamlayer.FILE)
    for key, value in layered_denoiser.published_form(model.state_dict(), "unet.", base.names.__getitem__).items():
        value.copy_(state.pop(key))
    assert not state
    ends = [5, 4, 7]
    states, pooled = torch.randn(3, 77, base.unet.config.cross_attention_dim), torch.randn(4, 1280)
    joined, places = global_embedding(list(states), [[end] for end in ends])
    parts = load_file(trained_adapter / adapter.FILE)
    terms = {
        key.removesuffix("::lora::1"): [parts[key.replace("::lora::1", "::lora::0")].float(), down.float()]
        for key, down in parts.items()
        if key.endswith("::lora::1")
    }
    (x, found, sigma), said = in_comfyui(
        LAYERED,
        root / "base.safetensors",
        trained_layers,
        tmp_path,
        noisy=torch.randn(4, 4, 8, 8),
        times=torch.tensor([900]),
        states=torch.cat([states, joined[None]]),
        pooled=pooled,
        words=list(zip(["a wall", "a disk", "another"], places, strict=True)),
        adapter=terms,
    )
    assert f"layer modules for {family}, trained with up to 3 objects, 1 context-aware layer" in said
    noisy = (x / (1 + sigma**2).sqrt())[None]
    words = states[None], torch.tensor([ends]), pooled[None]
    wanted = model(noisy, torch.tensor([900]), words, torch.ones(1))[0][0]
    plain = diffusers_unet.predict(
        text_base.load({"base": str(root / "base.safetensors")}).unet,
        noisy[0],
        torch.tensor([900]).expand(4),
        torch.cat([states, joined[None]]),
        pooled,
    )
    assert wanted.std() > 0.1 and (found - wanted).abs().max() < 1e-3
    assert ((plain - wanted).abs().flatten(1).amax(1) > 0.02).all()
