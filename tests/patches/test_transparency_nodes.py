"""The transparency nodes in a running ComfyUI, on random weights of the mini family."""

import io
import shutil

import host
import numpy as np
import pytest
import run
import torch
from PIL import Image
from psd_tools import PSDImage
from strata.networks.transparency import OffsetEncoder, TransparentDecoder
from strata.patches import transparency

from . import random_transparency as random_files
from .server_helpers import node


def sharing(frames, control=0):
    """Beside the mini family's attentions, the middle block's last."""
    shapes = {
        key.removesuffix("to_k.weight"): shape
        for key, shape in transparency.structure("Strata mini").items()
        if key.endswith("to_k.weight")
    }
    ordered = sorted(shapes, key=lambda key: "middle" in key)
    assert len(ordered) == 14
    weights = random_files.sharing(
        [(shapes[key][0], shapes[key][1], shapes[key][0]) for key in ordered], frames, control=control
    )
    return {key: value * (4 if "control_convs" in key else 1) for key, value in weights.items()}


@pytest.fixture(scope="module")
def server(comfy, family):
    torch.manual_seed(0)
    models = comfy.server.base / "models"
    for folder in ("checkpoints", "layer_model"):
        (models / folder).mkdir(parents=True, exist_ok=True)
    shutil.copy(family["sd"], models / "checkpoints" / "random_sd.safetensors")
    decoder = random_files.network(TransparentDecoder((16, 16, 32, 64, 96), 2))
    decoder["conv_out.weight"] *= 0.3
    encoder = random_files.network(OffsetEncoder((16, 32, 64, 96)))
    files = {
        "adapter": random_files.adapter(transparency.structure("Strata mini"), scale=0.2),
        "decoder": decoder,
        "encoder": encoder,
        "joint": sharing(3),
        "alone": sharing(1),
        "given": sharing(2, control=16),
        "xl": random_files.adapter(transparency.structure("SDXL"), rank=1),
    }
    for name, weights in files.items():
        random_files.write(
            models / "layer_model" / f"{name}.safetensors", {key: value.half() for key, value in weights.items()}
        )
    (models / "layer_model" / "cut.safetensors").write_bytes(
        (models / "layer_model" / "adapter.safetensors").read_bytes()[:-100]
    )
    rgba = np.random.default_rng(0).integers(0, 255, (44, 60, 4), np.uint8)
    Image.fromarray(rgba).save(comfy.server.base / "input" / "rgba.png")
    return comfy


def graph(adapter="adapter", strength=1.0, width=72, height=40, batch=1, **decoding):
    return {
        "load": node("CheckpointLoaderSimple", ckpt_name="random_sd.safetensors"),
        "adapter": node("Strata_LoadTransparency", file=f"{adapter}.safetensors"),
        "decoder": node("Strata_LoadTransparency", file="decoder.safetensors"),
        "apply": node("Strata_ApplyTransparency", model=["load", 0], transparency=["adapter", 0], strength=strength),
        "text": node("CLIPTextEncode", text="a dog", clip=["load", 1]),
        "latent": node("EmptyLatentImage", width=width, height=height, batch_size=batch),
        "sample": node(
            "KSampler",
            model=["apply", 0],
            positive=["text", 0],
            negative=["text", 0],
            latent_image=["latent", 0],
            seed=1,
            steps=2,
            cfg=2.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        ),
        "decode": node(
            "Strata_DecodeTransparency",
            **{
                "transparency": ["decoder", 0],
                "samples": ["sample", 0],
                "vae": ["load", 2],
                "passes": "8",
                "tile_size": 0,
                **decoding,
            },
        ),
    }


def pictures(server, prompt, link=("decode", 0), mask=False):
    if mask:
        prompt = {**prompt, "as_image": node("MaskToImage", mask=list(link))}
        link = ("as_image", 0)
    entry = server.run({**prompt, "show": node("PreviewImage", images=list(link))})
    return [
        np.asarray(Image.open(io.BytesIO(server.download(one)))).astype(int)
        for one in entry["outputs"]["show"]["images"]
    ]


def error(server, prompt, link=("decode", 0)):
    with pytest.raises(run.RunError) as raised:
        pictures(server, prompt, link)
    return str(raised.value)


def test_a_picture_with_alpha_its_mask_and_its_layer(server):
    found = pictures(server, graph(batch=2))
    assert [one.shape for one in found] == [(40, 72, 4)] * 2
    masks = pictures(server, graph(batch=2), ("decode", 1), mask=True)
    assert all(np.abs(255 - one[..., 3] - mask[..., 0]).max() <= 1 for one, mask in zip(found, masks, strict=True))
    prompt = {
        **graph(batch=2),
        "flat": node("Strata_FlattenLayers", layers=["decode", 2], blending="sRGB", background="transparent"),
    }
    flat = pictures(server, prompt, ("flat", 0))[0]
    assert np.abs(flat - found[0])[found[0][..., 3] > 0].max() <= 1
    prompt["behind"] = node("EmptyImage", width=72, height=40, batch_size=1, color=0x2060C0)
    prompt["decode"]["inputs"]["background"] = ["behind", 0]
    over = found[0][..., 3:] / 255 * found[0][..., :3] + (1 - found[0][..., 3:] / 255) * [0x20, 0x60, 0xC0]
    assert np.abs(pictures(server, prompt, ("flat", 0))[0][..., :3] - over).max() <= 1.5
    prompt["behind"]["inputs"]["width"] = 64
    assert (
        "background: 1 background of 64×40 and 2 images of 72×40 do not go together; connect one background of that "
        "size" in error(server, prompt)
    )
    prompt = {**graph(batch=2), "plain": node("VAEDecode", samples=["sample", 0], vae=["load", 2])}
    prompt["decode"]["inputs"] |= {"image": ["plain", 0]}
    assert all(np.array_equal(one, other) for one, other in zip(pictures(server, prompt), found, strict=True))


def test_strength_passes_and_tiles_are_used_and_zero_is_the_plain_model(server):
    found, fewer, tiled = (
        pictures(server, graph(width=160, **changes))[0]
        for changes in ({}, {"passes": "1"}, {"passes": "1", "tile_size": 128})
    )
    assert np.abs(found - fewer).max() > 1 and np.abs(fewer - tiled).max() > 1
    plain = graph(width=160)
    plain["sample"]["inputs"]["model"] = ["load", 0]
    plain = pictures(server, plain)[0]
    assert (
        np.array_equal(pictures(server, graph(width=160, strength=0.0))[0], plain) and np.abs(found - plain).mean() > 1
    )


def test_encoding_fills_up_to_eight_and_transparency_changes_the_latent(server):
    prompt = graph()
    prompt["encoder"] = node("Strata_LoadTransparency", file="encoder.safetensors")
    prompt["image"] = node("LoadImage", image="rgba.png")
    prompt["encode"] = node(
        "Strata_EncodeTransparency", transparency=["encoder", 0], image=["image", 0], vae=["load", 2], mask=["image", 1]
    )
    prompt["decode"]["inputs"]["samples"] = ["encode", 0]
    found = pictures(server, prompt)[0]
    assert found.shape == (48, 64, 4)
    del prompt["encode"]["inputs"]["mask"]
    assert np.abs(pictures(server, prompt)[0] - found).mean() > 1
    # An image with its alpha counts it once, with the mask that is the same alpha and without
    prompt["image"] = node("Strata_LoadLayerImage", files="rgba.png")
    prompt["encode"]["inputs"]["image"] = ["image", 1]
    own = pictures(server, prompt)[0]
    prompt["encode"]["inputs"]["mask"] = ["image", 2]
    assert np.array_equal(pictures(server, prompt)[0], own) and np.abs(own - found).mean() < 1


def joint(kind="Strata_SampleJointLayers", file="joint", batch=1, **inputs):
    prompt = graph(file, batch=batch)
    del prompt["apply"], prompt["decode"]
    for name, text in (
        ("foreground", "a dog"),
        ("background", "a beach"),
        ("blended", "a dog on the beach in the evening " * 12),
    ):
        prompt[name] = node("CLIPTextEncode", text=text, clip=["load", 1])
    prompt["image"] = node("LoadImage", image="rgba.png")
    sampling = {**prompt["sample"]["inputs"], "model": ["load", 0]}
    del sampling["positive"]
    prompt["sample"] = node(kind, transparency=["adapter", 0], blended=["blended", 0], **sampling, **inputs)
    for index in range(3 if file == "joint" else 2):
        prompt[f"decode{index}"] = node("VAEDecode", samples=["sample", index], vae=["load", 2])
    return prompt


def test_joint_layers_come_out_apart(server):
    prompt = joint(foreground=["foreground", 0], background=["background", 0], batch=2)
    found = [pictures(server, prompt, (f"decode{index}", 0)) for index in range(3)]
    assert [one.shape for three in found for one in three] == [(40, 72, 3)] * 6
    assert min(np.abs(found[i][0] - found[j][0]).mean() for i, j in ((0, 1), (1, 2), (0, 2))) > 1
    prompt["background"]["inputs"]["text"] = "snow"
    assert np.abs(pictures(server, prompt, ("decode1", 0))[0] - found[1][0]).mean() > 0.5
    wrong = {
        **joint(foreground=["foreground", 0], background=["background", 0]),
        "adapter": node("Strata_LoadTransparency", file="given.safetensors"),
    }
    assert "attention sharing of 2 images for Strata mini; this node needs one such as layer_sd15_joint" in error(
        server, wrong, ("decode0", 0)
    )


def test_a_given_layer_acts(server):
    prompt = joint("Strata_SampleAroundLayer", "given", image=["image", 0], layer=["background", 0])
    found = pictures(server, prompt, ("decode1", 0))[0]
    prompt["sample"]["inputs"]["image"] = ["inverted", 0]
    prompt["inverted"] = node("ImageInvert", image=["image", 0])
    assert np.abs(pictures(server, prompt, ("decode1", 0))[0] - found).mean() > 0.5


@pytest.mark.parametrize(
    ("workflow", "sampler", "adapter", "found"),
    [
        (
            "layerfusion_mini",
            "Strata_LayerFusionSampler",
            ("Adapter for the foreground", "adapter"),
            {".png": 3, ".psd": 2},
        ),
        (
            "layerfusion_sdxl",
            "Strata_LayerFusionSampler",
            ("Adapter for the foreground", "adapter"),
            {".png": 3, ".psd": 2},
        ),
        (
            "layerfusion_sd15",
            "Strata_LayerFusionSampler",
            ("Adapter for the foreground", "alone"),
            {".png": 3, ".psd": 2},
        ),
        ("layerdiffuse_foreground_sdxl", "KSampler", ("Adapter for the model", "adapter"), {".png": 4}),
        ("mini_transparent_object", "KSampler", ("Adapter for the model", "adapter"), {".png": 4}),
        (
            "layerdiffuse_joint_sd15",
            "Strata_SampleJointLayers",
            ("Attention sharing of three", "joint"),
            {".png": 3, ".psd": 2},
        ),
    ],
)
def test_the_bundled_workflows_run_on_the_mini_familys_files(server, tmp_path, workflow, sampler, adapter, found):
    """found: channels of the PNG files, layers of the PSD."""
    title, file = adapter
    settings = [
        "CheckpointLoaderSimple.ckpt_name=random_sd.safetensors",
        "Decoder of the transparency.file=decoder.safetensors",
        f"{title}.file={file}.safetensors",
        "EmptyLatentImage.width=64",
        "EmptyLatentImage.height=64",
        f"{sampler}.steps=2",
    ]
    larger = {"mini_transparent_object": "Four times larger", "layerfusion_mini": "Four times larger: Blended image"}
    if enlarged := larger.get(workflow):
        settings += [f"{enlarged}.upscale_method=nearest-exact", f"{enlarged}.scale_by=1"]
    made = run.run_file(server, host.PACK / "workflows" / f"{workflow}.json", settings, tmp_path, False)
    assert {path.suffix for path in made} == found.keys()
    for path in made:
        if path.suffix == ".psd":
            layers = list(PSDImage.open(path))
            assert [layer.name for layer in layers] == ["background", "foreground"] and len(layers) == found[".psd"]
            assert min(np.asarray(layer.composite().convert("RGB"), float).std() for layer in layers) > 1
        else:
            picture = np.asarray(Image.open(path))
            assert picture.shape == (64, 64, found[".png"]) and picture[..., :3].std() > 1


def test_errors_are_one_sentence(server):
    assert "xl.safetensors is for SDXL and the model is Strata mini" in error(server, graph("xl"))
    assert "damaged" in error(server, graph("cut"))
    assert "decoder.safetensors is a decoder for Strata mini" in error(server, graph("decoder"))
    assert "download it from https://huggingface.co/" in error(server, graph("layer_xl_transparent_attn"))
    missing = graph()
    del missing["decode"]["inputs"]["vae"]
    assert "connect the decoded image" in error(server, missing)
    other = graph()
    other["decode"]["inputs"] |= {"image": ["picture", 0]}
    other["picture"] = node("LoadImage", image="rgba.png")
    assert "60×44" in error(server, other) and "72×40" in error(server, other)
    masked = graph()
    masked["adapter"]["inputs"]["file"] = "encoder.safetensors"
    masked["image"] = node("LoadImage", image="rgba.png")
    masked["mask"] = node("SolidMask", value=0.0, width=64, height=64)
    masked["encode"] = node(
        "Strata_EncodeTransparency", transparency=["adapter", 0], image=["image", 0], vae=["load", 2], mask=["mask", 0]
    )
    masked["decode"]["inputs"]["samples"] = ["encode", 0]
    assert "mask: 1 mask of 64×64 and 1 image of 60×44 do not go together; make them the same size" in error(
        server, masked
    )
    for file, words in (
        ("xl", "xl.safetensors is for SDXL and the model is Strata mini"),
        ("joint", "joint.safetensors is attention sharing of 3 images"),
        ("decoder", "decoder.safetensors is a decoder for Strata mini; this node needs an adapter"),
    ):
        layered = graph(file)
        layered["apply"] = node(
            "Strata_AttentionBlend",
            model=["load", 0],
            strength=1.0,
            boundary=10.0,
            start_percent=0.0,
            end_percent=1.0,
            blocks="all",
            structure="prior pass at each step",
            blended_text="background prompt",
            transparency=["adapter", 0],
        )
        assert words in error(server, layered)
    flux = graph()
    flux["sample"] = node("EmptySD3LatentImage", width=64, height=64, batch_size=1)
    assert "the latent has 16 channels" in error(server, flux)
