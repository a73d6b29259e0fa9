"""Random checkpoints of the mini family through ComfyUI's own nodes, as a user's graph has them."""

import io
import shutil

import host
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from strata.networks.autoencoder import Autoencoder
from strata.patches.mini_family import KINDS

from .server_helpers import latents, node

SIDE = 64
DOWN = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
LAYER = "text_model.encoder.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def server(comfy, family):
    for name, path in family.items():
        folder = comfy.server.base / "models" / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / f"random_{name}.safetensors")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (SIDE, SIDE, 4), np.uint8)).save(comfy.server.base / "input" / "noise.png")
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[16:40, 24:56] = 255
    Image.fromarray(mask).save(comfy.server.base / "input" / "mask.png")
    return comfy


def graph(checkpoint="sd", **sampling):
    settings = {
        "seed": 1,
        "steps": 2,
        "cfg": 4.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "denoise": 1.0,
        **sampling,
    }
    return {
        "load": node("CheckpointLoaderSimple", ckpt_name=f"random_{checkpoint}.safetensors"),
        "positive": node("CLIPTextEncode", text="a dog on the beach", clip=["load", 1]),
        "negative": node("CLIPTextEncode", text="", clip=["load", 1]),
        "latent": node("EmptyLatentImage", width=SIDE, height=SIDE, batch_size=1),
        "sample": node(
            "KSampler",
            model=["load", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["latent", 0],
            **settings,
        ),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["load", 2]),
        "image": node("LoadImage", image="noise.png"),
        "mask": node("LoadImageMask", image="mask.png", channel="red"),
    }


def picture(server, prompt, link=("decode", 0)):
    entry = server.run({**prompt, "show": node("PreviewImage", images=list(link))})
    with Image.open(io.BytesIO(server.download(entry["outputs"]["show"]["images"][0]))) as image:
        return np.asarray(image).astype(int)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "ddim"])
def test_text_to_image(server, sampler):
    found = picture(server, graph(sampler_name=sampler, steps=3))
    assert found.shape == (SIDE, SIDE, 3) and found.std() > 5
    other = graph(sampler_name=sampler, steps=3)
    other["positive"]["inputs"]["text"] = "a red apple in snow"
    assert np.abs(picture(server, other) - found).mean() > 1


def test_encode_and_decode_are_the_autoencoder(server, family):
    prompt = graph()
    prompt["encode"] = node("VAEEncode", pixels=["image", 0], vae=["load", 2])
    prompt["decode"]["inputs"]["samples"] = ["encode", 0]
    weights = {
        key.split(".", 1)[1]: value.float()
        for key, value in load_file(family["sd"]).items()
        if key.startswith("first_stage_model.taesd")
    }
    model = Autoencoder()
    model.load_state_dict(weights)
    with Image.open(server.server.base / "input" / "noise.png") as image, torch.no_grad():
        latent = model.encode(torch.from_numpy(np.array(image.convert("RGB"))).movedim(-1, 0)[None] / 255)
        expected = model.decode(latent).clamp(0, 1)[0].movedim(0, -1).numpy() * 255
    assert np.abs(picture(server, prompt) - expected).max() <= 1.01
    assert torch.allclose(*latents(server, prompt, ("encode", 0)), latent, rtol=1e-5, atol=1e-4)


def test_image_to_image_depends_on_the_image(server):
    prompt = graph(denoise=0.5)
    prompt["latent"] = node("VAEEncode", pixels=["image", 0], vae=["load", 2])
    one = picture(server, prompt)
    prompt["image"] = node("EmptyImage", width=SIDE, height=SIDE, batch_size=1, color=0x3060C0)
    assert one.shape == (SIDE, SIDE, 3) and np.abs(picture(server, prompt) - one).mean() > 1


@pytest.fixture(scope="module")
def loras(server):
    """The same low-rank term on a layer of the UNet and one of the text encoder, as kohya's, diffusers' and peft's
    files name them.
    """
    generator = torch.Generator().manual_seed(3)
    pairs = [
        [torch.randn(*shape, generator=generator) / 4 for shape in ((4, width), (width, 4))] for width in (64, 128)
    ]
    folder = server.server.base / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    names = {
        "kohya": (
            f"lora_unet_{DOWN.replace('.', '_')}",
            f"lora_te_{LAYER.replace('.', '_')}",
            ".lora_down.weight",
            ".lora_up.weight",
        ),
        "diffusers": (
            f"unet.{DOWN.replace('.to_', '.processor.to_')}",
            f"text_encoder.{LAYER}",
            "_lora.down.weight",
            "_lora.up.weight",
        ),
        "peft": (
            "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q",
            f"text_encoder.{LAYER}",
            ".lora_A.weight",
            ".lora_B.weight",
        ),
    }
    for form, (*targets, down, up) in names.items():
        weights = {}
        for target, (first, second) in zip(targets, pairs, strict=True):
            weights |= {target + down: first, target + up: second}
        if form == "kohya":
            weights |= {f"{target}.alpha": torch.tensor(4.0) for target in targets}
        save_file(weights, folder / f"random_{form}.safetensors")


def with_lora(form, strength_model, strength_clip):
    prompt = graph()
    prompt["lora"] = node(
        "LoraLoader",
        model=["load", 0],
        clip=["load", 1],
        lora_name=f"random_{form}.safetensors",
        strength_model=strength_model,
        strength_clip=strength_clip,
    )
    prompt["sample"]["inputs"]["model"] = ["lora", 0]
    prompt["positive"]["inputs"]["clip"] = ["lora", 1]
    return prompt


def test_a_lora_changes_what_it_should(server, loras):
    plain = picture(server, graph())
    kohya = picture(server, with_lora("kohya", 1.0, 1.0))
    for form in ("diffusers", "peft"):
        assert np.abs(picture(server, with_lora(form, 1.0, 1.0)) - kohya).max() <= 1, form
    changed = [kohya, picture(server, with_lora("kohya", 1.0, 0.0)), picture(server, with_lora("kohya", 0.0, 1.0))]
    assert all(np.abs(one - plain).mean() > 0.5 for one in changed)
    assert np.abs(changed[1] - changed[2]).mean() > 0.5
    assert (picture(server, with_lora("kohya", 0.0, 0.0)) == plain).all()
    assert (picture(server, graph()) == plain).all(), "nothing of the LoRA stays in the model"


@pytest.mark.parametrize("keep", [True, False])
def test_inpainting_with_its_conditioning(server, keep):
    prompt = graph("inpaint")
    prompt["condition"] = node(
        "InpaintModelConditioning",
        positive=["positive", 0],
        negative=["negative", 0],
        vae=["load", 2],
        pixels=["image", 0],
        mask=["mask", 0],
        noise_mask=keep,
    )
    prompt["encode"] = node("VAEEncode", pixels=["image", 0], vae=["load", 2])
    prompt["sample"]["inputs"] |= {
        "positive": ["condition", 0],
        "negative": ["condition", 1],
        "latent_image": ["condition", 2],
    }
    found, before = latents(server, prompt, ("sample", 0), ("encode", 0))
    inside = torch.zeros(1, 4, SIDE // 8, SIDE // 8, dtype=bool)
    inside[:, :, 2:5, 3:7] = True
    moved = (found - before).abs()
    assert moved[inside].mean() > 0.1
    assert torch.allclose(found[~inside], before[~inside], rtol=1e-5, atol=1e-5) == keep
    assert picture(server, prompt).shape == (SIDE, SIDE, 3)


def test_inpainting_with_encode_for_inpaint_and_without_a_picture(server):
    prompt = graph("inpaint")
    without = picture(server, prompt)
    prompt["latent"] = node(
        "VAEEncodeForInpaint", pixels=["image", 0], vae=["load", 2], mask=["mask", 0], grow_mask_by=0
    )
    found = picture(server, prompt)
    assert found.shape == without.shape == (SIDE, SIDE, 3) and np.abs(found - without).mean() > 1


def test_the_pack_s_model_folder_is_searched(server):
    searched = server.get("/internal/folder_paths").json()
    folder = server.server.base / "custom_nodes" / host.PACK_NAME / "models"
    for kind in KINDS:
        assert searched[kind][-1] == str(folder / kind) and len(searched[kind]) > 1
    server._object_info = None
    listed = server.object_info()["CheckpointLoaderSimple"]["input"]["required"]["ckpt_name"]
    listed = listed[0] if isinstance(listed[0], list) else listed[1]["options"]
    shipped = {path.name for path in (host.PACK / "models" / "checkpoints").glob("*.safetensors")}
    assert shipped | {"random_sd.safetensors", "random_inpaint.safetensors"} <= set(listed)


def test_nothing_is_missing_or_left_over_in_the_log(server):
    complaints = ("unet missing", "unet unexpected", "clip missing", "Missing VAE", "lora key not", "NOT LOADED")
    assert not [
        line for line in server.server.log.read_text().splitlines() if any(words in line for words in complaints)
    ]
