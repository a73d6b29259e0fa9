"""BFS on a Flux.1-Fill of full width with random weights and the real key names: the command as a user types it, in an
installed copy of the pack, and the node's model on its file beside diffusers' own forward.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from strata.networks import flux
from strata.training import back_to_front, fill_base, latent_composition

from .installed import train

PACK = Path(__file__).resolve().parents[2]
KL_WIDTHS = (32, 32, 64, 64)
SHAPE = json.loads(fill_base.CONFIG.read_text())[fill_base.FLUX]["transformer"]


def host_weights(double: int, single: int) -> dict[str, torch.Tensor]:
    """Flux.1-Fill's in the host's own class, without contents, by the names of the released file."""
    sys.path.insert(0, os.environ["STRATA_HOST"])
    from comfy.cli_args import args

    args.cpu = True
    import comfy.ops
    from comfy.ldm.flux.model import Flux, FluxParams

    shape = {**SHAPE, "depth": double, "depth_single_blocks": single}
    shape |= {"mlp_ratio": 4.0, "theta": 10000, "patch_size": 2, "qkv_bias": True}
    if "txt_ids_dims" in FluxParams.__dataclass_fields__:
        shape["txt_ids_dims"] = []
    model = Flux(**shape, device="meta", dtype=torch.bfloat16, operations=comfy.ops.disable_weight_init)
    norm = ("query_norm.weight", "key_norm.weight")  # in newer hosts
    return {
        key.replace("weight", "scale") if key.endswith(norm) else key: value
        for key, value in model.state_dict().items()
    }


def test_every_weight_of_the_released_file_has_its_place_in_diffusers():
    host = host_weights(19, 38)
    assert len(host) == 780 and host["single_blocks.37.linear1.weight"].shape == (21504, 3072)
    with torch.device("meta"):
        own = flux.build(SHAPE | {"depth": 19, "depth_single_blocks": 38}).state_dict()
    found = flux.diffusers_form(host)
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in own.items()}
    assert sum(value.numel() for value in found.values()) == sum(value.numel() for value in host.values())
    again = flux.host_form(own)
    assert {key: value.shape for key, value in again.items()} == {key: value.shape for key, value in host.items()}


def write_base(path: Path) -> None:
    pattern, state = torch.randn(1_000_003).bfloat16(), {}  # a prime, so that no two rows are the same
    for number, (key, value) in enumerate(host_weights(1, 1).items()):
        size = value.shape[1] ** -0.5 if value.ndim > 1 else 0.1
        drawn = pattern.roll(7919 * number).repeat(value.numel() // len(pattern) + 1)[: value.numel()]
        state[key] = (size * drawn + key.endswith("scale")).view(value.shape)
    save_file(state, path)


def write_autoencoders(vae: Path, rgba: Path) -> None:
    """Flux's under the host's names, AlphaVAE's under diffusers'."""
    import comfy.diffusers_convert
    from diffusers import AutoencoderKL

    shape = {"latent_channels": 16, "block_out_channels": KL_WIDTHS, "layers_per_block": 2}
    shape |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    shape |= {"use_quant_conv": False, "use_post_quant_conv": False}
    colours = AutoencoderKL(**shape, in_channels=3, out_channels=3).state_dict()
    converted = comfy.diffusers_convert.convert_vae_state_dict(colours)
    save_file({key: value.contiguous() for key, value in converted.items()}, vae)
    save_file(AutoencoderKL(**shape, in_channels=4, out_channels=4).state_dict(), rgba)


def write_encoders(folder: Path) -> None:
    """Of Flux's widths and vocabularies, with one small layer each."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    text = {"hidden_size": SHAPE["vec_in_dim"], "intermediate_size": 32, "num_hidden_layers": 1}
    CLIPTextModel(CLIPTextConfig(**text, num_attention_heads=12)).half().save_pretrained(folder / "text_encoder")
    with torch.device("meta"):
        t5 = T5EncoderModel(T5Config(d_model=SHAPE["context_in_dim"], d_ff=32, d_kv=8, num_layers=1, num_heads=2))
    t5.to_empty(device="cpu").half()
    pattern = torch.randn(1 << 20).half()
    with torch.no_grad():
        for value in t5.parameters():
            value.copy_(pattern.repeat(value.numel() // len(pattern) + 1)[: value.numel()].view(value.shape))
    t5.save_pretrained(folder / "text_encoder_2")
    host = Path(os.environ["STRATA_HOST"]) / "comfy"
    shutil.copytree(host / "sd1_tokenizer", folder / "tokenizer")
    shutil.copytree(host / "text_encoders" / "t5_tokenizer", folder / "tokenizer_2")


def write_images(folder: Path, count: int) -> None:
    """Disks in their places, over noise, larger than what is learnt."""
    rng = np.random.default_rng(0)
    for name in ("foregrounds", "backgrounds"):
        (folder / name).mkdir(parents=True)
    rows, columns = np.mgrid[:72, :96]
    for number in range(count):
        middle = rng.integers(24, 48), rng.integers(24, 72)
        alpha = 255 * ((rows - middle[0]) ** 2 + (columns - middle[1]) ** 2 < 200)
        front = np.dstack([np.broadcast_to(rng.integers(0, 256, 3), (72, 96, 3)), alpha]).astype(np.uint8)
        Image.fromarray(front).save(folder / "foregrounds" / f"{number}.png")
        Image.fromarray(rng.integers(0, 256, (72, 96, 3), np.uint8)).save(folder / "backgrounds" / f"{number}.jpg")
        (folder / "foregrounds" / f"{number}.txt").write_text(f"a coloured disk, number {number}")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of two steps, by the command in a copy of the pack without tools and tests."""
    root = tmp_path_factory.mktemp("full")
    write_base(root / "base.safetensors")
    write_autoencoders(root / "ae.safetensors", root / "rgba.safetensors")
    write_encoders(root / "encoders")
    write_images(root / "images", 3)
    folder = root / "runs" / "latent_composition"
    folder.mkdir(parents=True)
    config = {"base": "base.safetensors", "widths": [32, 32], "channels": 16}
    save_file(latent_composition.build(config).state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    run = root / "runs" / "back_to_front"
    given = ["--base", root / "base.safetensors", "--vae", root / "ae.safetensors", "--rgba-vae"]
    given += [root / "rgba.safetensors", "--foregrounds", root / "images" / "foregrounds"]
    given += ["--backgrounds", root / "images" / "backgrounds"]
    given += ["--text-encoders", root / "encoders", "--folder", run]
    small = ["side=32", "batch=1", "steps=2", "warmup=1", "held_out=1", "rank=4", "shared_rank=4", "text_tokens=4"]
    words = [word for value in (*small, "learning_rate=0.01") for word in ("--set", value)]
    train(root, "back_to_front", *given, *words)
    yield run
    shutil.rmtree(root)


LOAD = """
import sys, torch
sys.path[:0] = [sys.argv[1], sys.argv[2]]
sys.argv = sys.argv[:1] + sys.argv[3:]
import conftest, host
sys.path.insert(0, str(host.find_or_install().root))
from comfy.cli_args import args
args.cpu = True
import comfy.sd
from strata.patches import back_to_front, layer_files
import folder_paths
base, run, out = sys.argv[1:]
folder_paths.add_model_folder_path("layer_model", run)
model = comfy.sd.load_diffusion_model(base, model_options={"dtype": torch.float32})
file = layer_files.load("back_to_front.safetensors", layer_files.BackToFront)
given = torch.load(out + "/given.pt")
found = []
for strength in (1.0, 0.0):
    clone = back_to_front.apply(model, file, strength)
    clone.pre_run()
    with torch.no_grad():
        clean = clone.model.apply_model(
            given["noisy"], given["sigma"], c_concat=given["condition"], c_crossattn=given["text"], y=given["pooled"],
            guidance=torch.full((len(given["noisy"]),), 2.0),
            transformer_options={**clone.model_options["transformer_options"], "wrappers": clone.wrappers},
        )
    found.append((given["noisy"] - clean) / given["sigma"].view(-1, 1, 1, 1))
torch.save(found, out + "/found.pt")
print(type(model.model).__name__, file.describe())
"""


@pytest.mark.slow
@torch.no_grad()
def test_the_file_gives_in_the_node_what_it_gives_in_diffusers(trained, tmp_path):
    config = json.loads((trained / "config.json").read_text())
    draw = torch.Generator().manual_seed(1)
    shapes = {"noisy": (2, 16, 4, 4), "condition": (2, 80, 4, 4), "text": (2, 8, 4096), "pooled": (2, 768)}
    given = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    given["sigma"] = torch.tensor([0.6, 0.6])
    torch.save(given, tmp_path / "given.pt")
    command = ["-c", LOAD, PACK / "tests", PACK / "tools", config["base"], trained, tmp_path]
    done = subprocess.run([sys.executable, *map(str, command)], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    assert "BFS for a Flux-Fill of width 3072: information is shared in 0 double and 1 single blocks" in done.stdout
    found, plain = torch.load(tmp_path / "found.pt")
    model = back_to_front.build(config | {"guidance": 2.0}, fill_base.load(config)).eval()
    state = load_file(trained / "model.safetensors")
    model.load_state_dict({key: value.half().float() for key, value in state.items()})  # as the file has them
    expected = model(*(given[name] for name in ("noisy", "condition", "sigma", "text", "pooled")))
    largest = expected.abs().max()
    assert (found - expected).abs().max() < 1e-3 * largest < 1e-2 * (plain - expected).abs().max()
    published = load_file(trained / back_to_front.FILE)
    own = back_to_front.published_form(state)
    assert published.keys() == own.keys() and all(torch.equal(published[key], own[key].half()) for key in own)
