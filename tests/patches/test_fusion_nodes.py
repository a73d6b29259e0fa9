"""LayerFusion's nodes in a running ComfyUI, on a checkpoint with random weights."""

import io

import numpy as np
import pytest
import run
from PIL import Image
from safetensors.torch import load_file

from . import random_transparency
from .server_helpers import SIDE, latents, node


def graph(sampling=None, **blend):
    settings = {
        "seed": 1,
        "steps": 2,
        "cfg": 3.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "denoise": 1.0,
        "noise": "same for the three",
        **(sampling or {}),
    }
    blend = {
        "strength": 1.0,
        "boundary": 10.0,
        "start_percent": 0.0,
        "end_percent": 1.0,
        "blocks": "all",
        "structure": "prior pass at each step",
        "blended_text": "background prompt",
        **blend,
    }
    return {
        "load": node("CheckpointLoaderSimple", ckpt_name="random_sd.safetensors"),
        "positive": node(
            "Strata_EncodeLayerPrompts",
            clip=["load", 1],
            foreground="a red apple",
            background="a beach in snow",
            blended="",
        ),
        "negative": node("CLIPTextEncode", text="", clip=["load", 1]),
        "latent": node("EmptyLatentImage", width=SIDE, height=SIDE, batch_size=1),
        "blend": node("Strata_AttentionBlend", model=["load", 0], **blend),
        "sample": node(
            "Strata_LayerFusionSampler",
            model=["blend", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["latent", 0],
            **settings,
        ),
    }


BRANCHES = [("sample", 0), ("sample", 1), ("sample", 2)]


def stock(prompt, latent):
    """The same batch through ComfyUI's own KSampler."""
    settings = {key: value for key, value in prompt["sample"]["inputs"].items() if key != "noise"}
    return {**prompt, "sample": node("KSampler", **{**settings, "latent_image": latent})}


def test_three_pictures_come_out_and_the_masks_of_each_step(server):
    prompt = graph()
    prompt["vae"] = node("VAEDecode", samples=["sample", 2], vae=["load", 2])
    prompt["blended"] = node("PreviewImage", images=["vae", 0])
    prompt["priors"] = node("PreviewImage", images=["sample", 3])
    outputs = server.run(prompt)["outputs"]
    pictures = {
        name: [np.asarray(Image.open(io.BytesIO(server.download(ref)))) for ref in outputs[name]["images"]]
        for name in ("blended", "priors")
    }
    assert [picture.shape for picture in pictures["blended"]] == [(SIDE, SIDE, 3)]
    assert [picture.shape for picture in pictures["priors"]] == [
        (32, 128, 3)
    ] * 2  # 8×8 tokens, four maps side by side, four pixels a token
    assert pictures["priors"][0].std() > 20 and (pictures["priors"][0] != pictures["priors"][1]).any()


def test_off_is_bit_equal_to_the_stock_sampler_and_on_is_not(server):
    prompt = graph(sampling={"noise": "one each"}, strength=0.0)
    off = latents(server, prompt, *BRANCHES)
    plain = stock(prompt, ["three", 0])
    plain["three"] = node("RepeatLatentBatch", samples=["latent", 0], amount=3)
    (batch,) = latents(server, plain, ("sample", 0))
    assert all((branch == batch[i : i + 1]).all() for i, branch in enumerate(off))
    on = latents(server, graph(sampling={"noise": "one each"}), *BRANCHES)
    assert all((one - other).abs().mean() > 0.05 for one, other in zip(on, off, strict=True))
    plain["blend"] = graph()["blend"]
    (again,) = latents(server, plain, ("sample", 0))
    assert all((branch == again[i : i + 1]).all() for i, branch in enumerate(on)), (
        "a stock sampler with the blended model gives the same"
    )


def test_a_batch_and_the_same_noise(server):
    prompt = graph(strength=0.0)
    prompt["latent"]["inputs"]["batch_size"] = 2
    prompt["positive"]["inputs"] |= {"foreground": "a dog", "background": "a dog", "blended": "a dog"}
    branches = latents(server, prompt, *BRANCHES)
    assert all(branch.shape == (2, 4, SIDE // 8, SIDE // 8) for branch in branches)
    assert (branches[0] - branches[1]).abs().max() < 1e-5 and (branches[0][0] - branches[0][1]).abs().mean() > 0.1


@pytest.mark.parametrize("checkpoint", ["sd", "inpaint"])
def test_a_picture_and_its_mask_go_to_all_three(server, checkpoint):
    prompt = graph({"denoise": 0.6})
    prompt["load"]["inputs"]["ckpt_name"] = f"random_{checkpoint}.safetensors"
    prompt["image"] = node("EmptyImage", width=SIDE, height=SIDE, batch_size=2, color=0x3060C0)
    prompt["mask"] = node("LoadImageMask", image="fusion_mask.png", channel="red")
    prompt["encode"] = node("VAEEncode", pixels=["image", 0], vae=["load", 2])
    prompt["masked"] = node("SetLatentNoiseMask", samples=["encode", 0], mask=["mask", 0])
    prompt["sample"]["inputs"]["latent_image"] = ["masked", 0]
    if checkpoint == "inpaint":
        prompt["condition"] = node(
            "InpaintModelConditioning",
            positive=["positive", 0],
            negative=["negative", 0],
            vae=["load", 2],
            pixels=["image", 0],
            mask=["mask", 0],
            noise_mask=True,
        )
        prompt["sample"]["inputs"] |= {
            "positive": ["condition", 0],
            "negative": ["condition", 1],
            "latent_image": ["condition", 2],
        }
    before, *branches = latents(server, prompt, ("encode", 0), *BRANCHES)
    inside = np.zeros((SIDE // 8, SIDE // 8), bool)
    inside[2:5, 3:7] = True
    for branch in branches:
        moved = (branch - before).abs().numpy()
        assert branch.shape == before.shape and moved[..., inside].mean() > 0.05 and moved[..., ~inside].max() < 1e-5


@pytest.mark.parametrize("change", [{"background": "a dog in snow"}, {"foreground": "a cat"}])
def test_every_prompt_reaches_every_branch(server, change):
    one, other = graph(), graph()
    other["positive"]["inputs"] |= change
    for found, changed in zip(latents(server, one, *BRANCHES), latents(server, other, *BRANCHES), strict=True):
        assert (found - changed).abs().mean() > 1e-3


def test_the_prompts_end_is_asked_for(server):
    prompt = graph()
    prompt["positive"] = node("CLIPTextEncode", text="a red apple", clip=["load", 1])
    prompt["show"] = node("SaveLatent", samples=["sample", 0], filename_prefix="fusion")
    with pytest.raises(run.RunError, match="make it with Encode layer prompts"):
        server.run(prompt)


def test_a_batch_that_is_no_multiple_of_three_is_refused(server):
    prompt = stock(graph(), ["latent", 0])
    prompt["show"] = node("SaveLatent", samples=["sample", 0], filename_prefix="fusion")
    with pytest.raises(run.RunError, match="a batch of 1 cannot be split"):
        server.run(prompt)


def test_other_samplers_and_the_saving_option(server):
    for sampler in ("heun", "dpmpp_2m_sde"):
        found = latents(
            server,
            graph(
                {"sampler_name": sampler, "scheduler": "karras"},
                structure="reuse previous step",
                blended_text="own prompt",
                blocks="middle and up",
            ),
            *BRANCHES,
        )
        assert all(branch.isfinite().all() and branch.std() > 0.1 for branch in found)


def test_an_adapter_changes_the_foreground_as_a_merged_model_does_and_nothing_else(server):
    """Blending from the last moment on leaves three separate pictures, so that each can be compared with a
    stock run.
    """
    checkpoint = load_file(server.server.base / "models" / "checkpoints" / "random_sd.safetensors")
    shapes = {
        key.removeprefix("model."): value.shape
        for key, value in checkpoint.items()
        if key.startswith("model.diffusion_model")
    }
    folder = server.server.base / "models" / "layer_model"
    folder.mkdir(parents=True, exist_ok=True)
    random_transparency.write(folder / "foreground_adapter.safetensors", random_transparency.adapter(shapes))
    prompt = graph(start_percent=1.0)
    plain = latents(server, prompt, *[("sample", i) for i in range(3)])
    prompt["weights"] = node("Strata_LoadTransparency", file="foreground_adapter.safetensors")
    prompt["blend"]["inputs"]["transparency"] = ["weights", 0]
    found = latents(server, prompt, *[("sample", i) for i in range(3)])
    prompt["merged"] = node("Strata_ApplyTransparency", model=["load", 0], transparency=["weights", 0], strength=1.0)
    prompt["sample"]["inputs"]["model"] = ["merged", 0]
    merged = latents(server, prompt, ("sample", 0))[0]
    assert (found[0] - merged).abs().max() < 1e-2 * merged.abs().max() and (
        plain[0] - merged
    ).abs().max() > 0.05 * merged.abs().max()
    assert all(
        (one - other).abs().max() < 1e-3 * other.abs().max() for one, other in zip(found[1:], plain[1:], strict=True)
    )


@pytest.mark.parametrize(
    ("blend", "wired", "told"),
    [
        ({}, "blend", {}),
        (
            {"start_percent": 0.6, "end_percent": 0.6},
            "blend",
            {"blend": "end_percent: 0.6 is not above start_percent, 0.6, so nothing is blended; raise it."},
        ),
        (
            {},
            "load",
            {
                "sample": "model: no Attention blend acts on it, so the three images know nothing of each other; put "
                "Attention blend in front."
            },
        ),
    ],
)
def test_what_has_no_effect_is_told(server, blend, wired, told):
    prompt = graph({"seed": 77}, **blend)
    prompt["sample"]["inputs"]["model"] = [wired, 0]
    prompt["save"] = node("SaveLatent", samples=["sample", 0], filename_prefix="latents/told")
    outputs = server.run(prompt)["outputs"]
    found = {name: output["text"][0] for name, output in outputs.items() if "text" in output}
    assert found == told
