"""SD1.5 and SDXL as bases for trainers, small and with random weights: what is read of a single file against diffusers'
own pipelines, and LayerDiffuse's adapter trained on it and on a folder of images.
"""

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from strata.techniques import diffusion as formulas
from strata.techniques.transparency import extend_colours
from strata.training import adapter, command, diffusion, settings, text_base, transparent_images
from strata.training import base as bases

from . import random_bases

FAMILIES = sorted(random_bases.SMALL)
pytestmark = pytest.mark.usefixtures("small_bases")
CAPTIONS = ["a red disk", "", "two blue disks, lying one on the other on a table that is much too small for them " * 8]
RUN = {"side": 64, "held_out": 2, "rank": 4, "batch": 2, "steps": 3, "warmup": 1, "sampling_steps": 2}
RUN |= {"learning_rate": 1e-2, "optimizer": "adam"}


def config_of(base_files, family, **changes) -> dict:
    config = command.read_config(command.FOR_BASES / "adapter.json", []) | RUN
    config |= {"base": str(base_files[family]), "transparent_encoder": str(base_files["encoder"])}
    return config | {"foregrounds": str(base_files["images"])} | changes


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@torch.no_grad()
def test_words_are_those_of_diffusers_pipelines(base_files, family, tmp_path):
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from transformers import CLIPTokenizer

    base = text_base.load(config_of(base_files, family))
    words = base.words(CAPTIONS, tmp_path)
    states, pooled, ends = words(CAPTIONS)
    state = load_file(base_files[family])
    encoders = []
    for shape in base.text["encoders"]:
        own = {key: value.float() for key, value in state.items() if key.startswith(shape["prefix"])}
        plain = {key: value for key, value in shape.items() if key != "prefix"}
        encoders.append(bases.text_encoder(base_files[family], own, plain, shape["prefix"]))
    tokenizer = partial(CLIPTokenizer.from_pretrained, str(settings.clip_tokenizer()), model_max_length=77)
    parts = {"vae": None, "unet": None, "scheduler": None, "text_encoder": encoders[0], "tokenizer": tokenizer()}
    if family == "SD1.5":
        pipeline = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None)
        wanted = (pipeline.encode_prompt(CAPTIONS, "cpu", 1, False)[0],)
    else:
        more = {"text_encoder_2": encoders[1], "tokenizer_2": tokenizer(pad_token="!")}
        pipeline = StableDiffusionXLPipeline(**parts, **more)
        wanted = pipeline.encode_prompt(CAPTIONS, device="cpu", do_classifier_free_guidance=False)[::2]
    for own, one in zip((states, pooled), wanted, strict=False):
        assert own.shape == one.shape and one.std() > 0.1 and torch.allclose(own, one, rtol=1e-3, atol=4e-3)
    assert ends[:, 0].tolist() == [4, 1, 76]
    times = [path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())]
    again = base.words(CAPTIONS[::-1], tmp_path)(CAPTIONS)
    assert times == [path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())]
    assert all(torch.equal(one, other) for one, other in zip((states, pooled, ends), again, strict=True))


@torch.no_grad()
def test_latents_have_their_transparency_hidden_as_encode_transparency_does_it(base_files, family):
    base = text_base.load(config_of(base_files, family))
    encoder = transparent_images.load_encoder(config_of(base_files, family))
    rgba = torch.rand(1, 4, 32, 40)
    found, plain = (transparent_images.hidden(rgba, base, one) for one in (encoder, None))
    posterior = base.autoencoder.encode((2 * rgba[:, :3] - 1) * rgba[:, 3:]).latent_dist
    assert torch.allclose(plain, base.scale * posterior.mean, rtol=0, atol=1e-5)
    assert base.scale == (0.18215 if family == "SD1.5" else 0.13025)
    offset = encoder(torch.cat([rgba[:, 3:], extend_colours(rgba[:, :3], rgba[:, 3:])], 1))
    assert torch.allclose(found, base.scale * (posterior.mean + 300 * posterior.std * offset), rtol=0, atol=1e-4)
    assert (found - plain).abs().max() > 0.01
    assert torch.allclose(base.decode(plain), base.autoencoder.decode(posterior.mean).sample / 2 + 0.5, atol=1e-5)


def test_images_come_whole_in_squares_with_their_words(base_files, tmp_path):
    base = text_base.load(config_of(base_files, "SD1.5"))
    pool = transparent_images.TransparentImages(tmp_path, base, None, base_files["images"], 64)
    assert pool.captions[:2] == ["a round disk 0", "disk number 1"]
    image = pool.rgba(0)
    assert image.shape == (4, 64, 64) and (image[3, :16] == 0).all() and (image[3, 48:] == 0).all()
    opaque = np.asarray(Image.open(pool.paths[0]))[..., 3].sum() / 255
    assert image[3].sum().item() == pytest.approx(opaque * (64 / 96) ** 2, rel=0.02)
    batch = pool.batch(np.array([0, 1]), 0)
    assert torch.allclose(batch.latent[:1], transparent_images.hidden(image[None], base, None), rtol=0, atol=5e-3)


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request, base_files, tmp_path_factory):
    """A run that was stopped after its second step and went on."""
    folder, config = tmp_path_factory.mktemp(request.param) / "run", config_of(base_files, request.param)
    adapter.train(config, folder, 0, 1e9)
    assert (folder / "last").exists()
    adapter.train(config, folder, None, 1e9)
    return request.param, folder


@torch.no_grad()
def test_the_adapters_file_is_what_was_learnt_under_the_hosts_names(base_files, trained):
    family, folder = trained
    state, base = load_file(folder / adapter.FILE), text_base.load(config_of(base_files, family))
    entry = random_bases.entry_of(family)
    import comfy.utils

    names = comfy.utils.unet_to_diffusers(random_bases.host_shape(entry))
    wanted = {
        f"diffusion_model.{names[key]}::lora::{part}"
        for key in base.unet.state_dict()
        if ".attn" in key and key.endswith(".weight")
        for part in (0, 1)
    }
    assert set(state) == wanted and all(state[key].abs().max() > 0 for key in state)
    with safe_open(folder / adapter.FILE, "pt") as file:
        about = file.metadata()
    assert about["base"] == family and about["licence"] == entry["licence"] and about["steps"] == "3"
    assert about["command"] == "python -m training adapter" and about["data"] == "RGBA images of images"
    # checkpoints hold nothing of the base
    for path in (folder / "model.safetensors", next((folder / "last").glob("*.safetensors"))):
        assert all(".lora_" in key for key in load_file(path))
    # added to the base's weights it is the trained model
    model = text_base.Denoiser(text_base.load(config_of(base_files, family)), 4, False)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    places = {host: key for key, host in base.names.items()}
    for key in (key for key in state if key.endswith("::lora::1")):
        module = base.unet.get_submodule(places[key.removesuffix(".weight::lora::1")])
        term = state[key.replace("::lora::1", "::lora::0")].float() @ state[key].float()
        module.weight = torch.nn.Parameter(module.weight.float() + term)
    words = base.words(CAPTIONS, folder.parent)(CAPTIONS)[:2]
    given = torch.randn(3, 4, 8, 8), torch.tensor([10, 500, 900])
    merged = text_base.diffusers_unet.predict(base.unet, *given, *words)
    assert torch.allclose(model(*given, *words), merged, rtol=0, atol=2e-3)
    plain = text_base.diffusers_unet.predict(text_base.load(config_of(base_files, family)).unet, *given, *words)
    assert (plain - merged).abs().max() > 0.05


def test_the_loss_is_that_of_the_mini_family_and_falls(base_files, family, tmp_path):
    """One batch that is learnt by heart."""
    base = text_base.load(config_of(base_files, family))
    pool = transparent_images.TransparentImages(tmp_path, base, None, base_files["images"], 64)
    words, batch = base.words(pool.captions, tmp_path), pool.batch(np.arange(4), 0)
    torch.manual_seed(0)
    model = text_base.Denoiser(base, 8, True)
    optimizer = torch.optim.Adam([value for value in model.parameters() if value.requires_grad], 1e-2)
    found = []
    for _ in range(12):
        terms = diffusion.loss_of(
            model,
            batch,
            RUN | {"empty_prompt": 0, "snr_gamma": 5.0},
            formulas.noise_levels(),
            np.random.default_rng(0),
            lambda prompts: words(prompts)[:2],
        )
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        found.append(terms["loss"].item())
    assert found[-1] < 0.9 * found[0], found


def test_what_is_missing_or_wrong_is_one_sentence(base_files, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    wrong = {
        "not there": ({"base": str(tmp_path / "none.safetensors")}, "--base: .*none.safetensors is not there"),
        "an inpainting model": ({"base": str(inpainting(base_files, tmp_path))}, "is no text-to-image model .*9 input"),
        "v prediction": ({"base": str(v_prediction(base_files, tmp_path))}, "does not predict noise"),
        "no encoder": ({"transparent_encoder": None}, "--transparent-encoder is needed"),
        "another file": ({"transparent_encoder": str(base_files["SD1.5"])}, "is not LayerDiffuse's encoder"),
        "no images": ({"foregrounds": str(base_files["encoder"].parent / "none")}, "is not there"),
        "empty": ({"foregrounds": str(empty)}, "has no PNG, WebP or JPEG files"),
        "opaque": ({"foregrounds": str(folder(tmp_path / "opaque", "a disk.png", "RGB"))}, "has no alpha"),
        "numbers": ({"foregrounds": str(folder(tmp_path / "numbers", "001.png", "RGBA"))}, "001.png has no caption"),
        "few": ({"held_out": 6}, "there are 6 images and 6 of them are kept"),
    }
    for changes, words in wrong.values():
        with pytest.raises(settings.TrainingError, match=words):
            adapter.train(config_of(base_files, "SD1.5", **changes), tmp_path / "run", None, 1e9)
    with pytest.raises(SystemExit, match="--foregrounds goes with a model of your own"):
        command.main(["adapter", "--foregrounds", str(base_files["images"]), "--folder", str(tmp_path / "run")])


def inpainting(base_files, root: Path) -> Path:
    state = load_file(base_files["SD1.5"])
    key = "model.diffusion_model.input_blocks.0.0.weight"
    state[key] = torch.zeros(32, 9, 3, 3)
    save_file(state, root / "inpainting.safetensors")
    return root / "inpainting.safetensors"


def v_prediction(base_files, root: Path) -> Path:
    shutil.copy(base_files["SDXL"], root / "v.safetensors")
    save_file(load_file(root / "v.safetensors") | {"v_pred": torch.zeros(0)}, root / "v.safetensors")
    return root / "v.safetensors"


def folder(path: Path, name: str, mode: str) -> Path:
    path.mkdir()
    Image.new(mode, (8, 8)).save(path / name)
    return path
