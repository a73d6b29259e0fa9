"""BFS's trainers on a small Flux-Fill in Flux.1's form, with images of one's own: what is read of the files against
diffusers' own classes and pipeline, runs that are stopped and go on, and what is told when something is missing.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from strata.networks import back_to_front as networks
from strata.networks import flux
from strata.training import back_to_front, command, fill_base, latent_composition, layered_images, settings

SHAPE = {"in_channels": 96, "out_channels": 16, "hidden_size": 32, "num_heads": 2, "axes_dim": [4, 6, 6]}
SHAPE |= {"context_in_dim": 40, "vec_in_dim": 24, "guidance_embed": True}
LATENT = {"channels": 16, "scale": 0.3611, "shift": 0.1159}
KL = {"latent_channels": 16, "block_out_channels": (32,) * 4, "layers_per_block": 2, "use_quant_conv": False}
KL |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
KL |= {"use_post_quant_conv": False}
SIDE, COUNT = 32, 5
SMALL = {"side": SIDE, "batch": 2, "held_out": 2, "warmup": 1, "optimizer": "adam_8bit", "learning_rate": 1e-2}
OWN = SMALL | {"rank": 2, "shared_rank": 2, "text_tokens": 6}


@pytest.fixture(scope="module", autouse=True)
def small_flux(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "bases.json"
    path.write_text(json.dumps({fill_base.FLUX: {"transformer": SHAPE, "latent": LATENT, "licence": "theirs"}}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fill_base, "CONFIG", path)
        yield


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    model = flux.build(SHAPE | {"depth": 1, "depth_single_blocks": 2}).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1 or not weight.any():
                weight.normal_(std=0.1)
            weight.copy_(weight.bfloat16())
    return model


@pytest.fixture(scope="module")
def autoencoders():
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return [AutoencoderKL(**KL, in_channels=channels, out_channels=channels).eval() for channels in (3, 4)]


@pytest.fixture(scope="module")
def files(tmp_path_factory, transformer, autoencoders):
    """Paths by the names of the options."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    root = tmp_path_factory.mktemp("files")
    found = {name: root / f"{name}.safetensors" for name in ("base", "vae", "rgba_vae")}
    state = {f"model.diffusion_model.{key}": value for key, value in flux.host_form(transformer.state_dict()).items()}
    save_file({key: value.bfloat16() for key, value in state.items()}, found["base"])
    for name, model in zip(("vae", "rgba_vae"), autoencoders, strict=True):
        save_file(model.state_dict(), found[name])
    found["text_encoders"] = folder = root / "encoders"
    clip = {"hidden_size": SHAPE["vec_in_dim"], "intermediate_size": 32, "num_hidden_layers": 1}
    CLIPTextModel(CLIPTextConfig(**clip, num_attention_heads=2)).save_pretrained(folder / "text_encoder")
    t5 = T5Config(d_model=SHAPE["context_in_dim"], d_ff=32, d_kv=8, num_layers=1, num_heads=2)
    T5EncoderModel(t5).save_pretrained(folder / "text_encoder_2")
    host = Path(os.environ["STRATA_HOST"]) / "comfy"
    shutil.copytree(host / "sd1_tokenizer", folder / "tokenizer")
    shutil.copytree(host / "text_encoders" / "t5_tokenizer", folder / "tokenizer_2")
    for name, path in draw(root / "images", SIDE, SIDE).items():
        found[name] = path
    return found


def draw(root, width, height):
    """Disks in their places, alone, over noise, and what is behind; masks of every second one."""
    folders = {name: root / name for name in ("foregrounds", "backgrounds", "composites", "masks")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:height, :width]
    for number in range(COUNT):
        middle = (rng.integers(low, high) for low, high in ((8, height - 8), (8, width - 8)))
        inside = sum((axis - at) ** 2 for axis, at in zip((rows, columns), middle, strict=True)) < 36
        front = np.dstack([np.broadcast_to(rng.integers(0, 256, 3), (height, width, 3)), 200 * inside])
        behind = rng.integers(0, 256, (height, width, 3))
        mixed = np.where(inside[..., None], 255 - behind, behind)
        images = {"foregrounds": front, "backgrounds": behind, "composites": mixed, "masks": 255 * inside}
        for name, image in images.items():
            if name != "masks" or number % 2:
                Image.fromarray(image.astype(np.uint8)).save(folders[name] / f"{number}.png")
        for name in ("foregrounds", "composites"):
            (folders[name] / f"{number}.txt").write_text(f"disk number {number}\n")
    return folders


def config_of(what, files, **changes):
    config = command.read_config(command.FOR_BASES / f"{what}.json", [])
    return config | {name: str(path) for name, path in files.items() if name in config} | changes


@torch.no_grad()
def test_autoencoders_are_diffusers_own_from_files_of_either_form(files, autoencoders, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(os.environ["STRATA_HOST"])
    import comfy.diffusers_convert

    host = comfy.diffusers_convert.convert_vae_state_dict(autoencoders[0].state_dict())
    save_file({key: value.contiguous() for key, value in host.items()}, tmp_path / "ae.safetensors")
    images = torch.rand(2, 4, 32, 40)
    for path, option, model in (
        (tmp_path / "ae.safetensors", "vae", autoencoders[0]),
        (files["vae"], "vae", autoencoders[0]),
        (files["rgba_vae"], "rgba-vae", autoencoders[1]),
    ):
        channels = model.config.in_channels
        found = fill_base.KL(path, option, channels, LATENT)
        mean = model.encode(images[:, :channels] * 2 - 1).latent_dist.mean
        latent = found.encode(images[:, :channels])
        assert torch.allclose(latent, (mean - 0.1159) * 0.3611, rtol=0, atol=1e-5)
        decoded = (model.decode(mean).sample + 1) / 2
        assert torch.allclose(found.decode(latent), decoded, rtol=0, atol=1e-4) and decoded.std() > 1e-3


@torch.no_grad()
def test_captions_are_what_fluxs_pipeline_makes_of_them(files, tmp_path):
    from diffusers import FluxPipeline
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

    folder = files["text_encoders"]
    pipeline = FluxPipeline(
        scheduler=None,
        vae=None,
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer", model_max_length=77),
        text_encoder_2=T5EncoderModel.from_pretrained(folder / "text_encoder_2"),
        tokenizer_2=T5TokenizerFast.from_pretrained(folder / "tokenizer_2"),
        transformer=None,
    )
    captions = ["a red apple", "two pears, lying on a table that is much too small for them"]
    words = fill_base.encode(folder, captions, tmp_path, 8)
    prompts = [*captions, ""]
    states, pooled, _ = pipeline.encode_prompt(prompts, None, max_sequence_length=8)
    found = words(prompts)
    for own, wanted in zip(found, (states, pooled), strict=True):
        assert own.shape == wanted.shape and torch.allclose(own, wanted, rtol=1e-3, atol=2e-3) and wanted.std() > 0.1
    times = [path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())]
    again = fill_base.encode(folder, captions[::-1], tmp_path, 8)(prompts)
    assert times == [path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())] and len(times) == 2
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


@torch.no_grad()
def test_the_transformer_predicts_as_the_file_says_and_nearly_so_in_fp8(files, transformer):
    given = [torch.randn(shape) for shape in ((2, 16, 4, 4), (2, 80, 4, 4), (2,), (2, 6, 40), (2, 24))]
    wanted = flux.predict(transformer, *given, guidance=2.0)
    base = fill_base.load(config_of("back_to_front", files))
    assert torch.allclose(flux.predict(base.transformer(), *given, guidance=2.0), wanted, rtol=0, atol=1e-5)
    model = back_to_front.build(config_of("back_to_front", files, **OWN, fp8=True, guidance=2.0), base).eval()
    layer = model.transformer.single_transformer_blocks[1].proj_out
    first = layer.lora_A["x_lora"].weight
    assert layer.base_layer.weight.dtype == torch.float8_e4m3fn and first.dtype == torch.float32
    assert (first != first.to(torch.float8_e4m3fn).float()).float().mean() > 0.9
    assert 0 < (model(*given) - wanted).square().mean().sqrt() < 0.1 * wanted.std()
    assert not torch.allclose(flux.predict(transformer, *given, guidance=1.0), wanted, rtol=0, atol=1e-3)


def items(files, name="composites", **changes):
    config = config_of("back_to_front_real", files, **changes)
    return layered_images.same_names(config, name)


def pool(files, found, tmp_path, side=SIDE):
    base = fill_base.load(config_of("back_to_front_real", files))
    return layered_images.LayeredImages(tmp_path, base, found, side)


def test_images_of_the_right_size_are_taken_as_they_are(files, tmp_path):
    pixels = {
        name: [np.asarray(Image.open(path)) / 255 for path in sorted(files[name].glob("*.png"))]
        for name in ("foregrounds", "backgrounds", "composites")
    }
    for name in ("foregrounds", "composites"):
        images = pool(files, items(files, name), tmp_path)
        for index in range(COUNT):
            found = images.layers(index)
            assert np.allclose(found.background, pixels["backgrounds"][index], rtol=0, atol=1e-6)
            alpha = pixels["foregrounds"][index][..., 3:]
            rows, columns = np.nonzero(alpha[..., 0])
            own = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            if name == "foregrounds":
                front = pixels[name][index]
                wanted = alpha * front[..., :3] + (1 - alpha) * found.background
                assert np.allclose(found.foreground, front, rtol=0, atol=1e-6) and found.box == own
            else:
                wanted = pixels[name][index]
                inside = np.zeros((SIDE, SIDE))
                inside[found.box[1] : found.box[3], found.box[0] : found.box[2]] = 1
                assert np.array_equal(found.foreground[..., 3], inside)
                # every second one has a mask; for the others, cells of eight pixels in which something differs
                near = 0 if index % 2 else 8
                assert all(
                    0 <= side * (edge - there) <= near
                    for side, edge, there in zip((-1, -1, 1, 1), found.box, own, strict=True)
                )
            assert np.allclose(found.composite, wanted, rtol=0, atol=1e-6) and found.name == f"disk number {index}"


def test_larger_images_are_cut_around_their_box_and_encoded_with_it(files, tmp_path):
    wide = files | draw(tmp_path / "wide", 192, 2 * SIDE)
    images = pool(wide, items(wide, "foregrounds"), tmp_path / "scenes")
    for index in range(COUNT):
        found = images.layers(index)
        alpha = np.asarray(Image.open(wide["foregrounds"] / f"{index}.png"))[..., 3]
        assert found.composite.shape == (SIDE, SIDE, 3)
        assert found.foreground[..., 3].sum() == pytest.approx((alpha / 255).sum() / 4, rel=0.05)
        left, top, right, bottom = found.box
        assert 6 <= right - left <= 7 and 6 <= bottom - top <= 7
        rest = found.foreground[..., 3].copy()
        rest[top:bottom, left:right] = 0
        assert rest.max() < 0.1
    numbers = np.array([3, 1])
    batch = images.batch(numbers, 0)
    layers = [images.layers(number) for number in numbers]
    image = torch.from_numpy(np.stack([one.composite for one in layers])).movedim(-1, 1)
    with torch.no_grad():
        assert torch.allclose(batch.composite, images.base.autoencoder.encode(image), rtol=0, atol=1e-3)
    cells = torch.nn.functional.pixel_shuffle(batch.cells, 8)
    assert [row.sum().item() for row in cells] == [
        (one.box[2] - one.box[0]) * (one.box[3] - one.box[1]) for one in layers
    ]
    assert batch.prompts == ["disk number 3", "disk number 1"]


def same(one, other):
    one, other = (load_file(run / "model.safetensors") for run in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_both_stages_write_the_nodes_file_and_go_on_where_they_were_stopped(files, tmp_path, monkeypatch):
    root = tmp_path / "runs"
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")  # or this process would keep all memory that it frees
    words = [f"--{name.replace('_', '-')}={files[name]}" for name in command.FILL]
    changes = [f"--set={key}={json.dumps(value)}" for key, value in SMALL.items()]
    changes += ["--set=steps=2", "--set=pairs=6", "--set=widths=[32,32]"]
    command.main(["latent_composition", *words, f"--folder={root / 'latent_composition'}", *changes])
    first = config_of("back_to_front", files, **OWN, steps=3, fused=False)
    back_to_front.train(first, root / "back_to_front", None, 1e9)
    second = config_of("back_to_front_real", files, **OWN, steps=4, fused=False)
    whole, parts = root / "whole", root / "parts"
    back_to_front.train(second, whole, None, 1e9)
    for _ in range(4):
        back_to_front.train(second, parts, 0, 0)  # a step, and a checkpoint
    assert same(whole, parts)
    often = root / "often"
    back_to_front.train(second, often, None, 0)
    assert same(whole, often), "a checkpoint leaves what is trained as it is"
    assert not same(whole, root / "back_to_front")
    assert all(back_to_front.learns(key) for key in load_file(whole / "last" / "model.safetensors"))
    for run, config in ((root / "back_to_front", first), (whole, second)):
        state, path = load_file(run / "model.safetensors"), run / back_to_front.FILE
        assert all(value.dtype == torch.float32 for value in state.values()), "what learns is no bf16 like the base"
        with safe_open(path, "pt") as file:
            about = file.metadata()
        found = networks.recognise(path.name, load_file(path), about)
        assert not found.unknown and found.pairing == "paper" and len(found.sharing) == 2 and found.width == 32
        assert {len(own) for own in found.content.values()} == {8 + 2 * 2}
        own = back_to_front.published_form(state)
        assert all(torch.equal(value, own[key].half()) for key, value in load_file(path).items())
        assert (
            about["base"] == fill_base.FLUX and about["licence"] == "theirs" and about["steps"] == str(config["steps"])
        )
        assert str(tmp_path) not in json.dumps(about) and "foregrounds" in about["data"]
    for start, told in (("published", "is the mini family's"), ("nowhere", "is missing; train stage 1 there first")):
        with pytest.raises(settings.TrainingError, match=told):
            back_to_front.train({**second, "start": start}, root / "fresh", None, 1e9)
    with pytest.raises(settings.TrainingError, match="was trained on another base's latents"):
        latent_composition.load(root / "latent_composition", fill_base.MINI)


def without(files, name, tmp_path):
    """A copy of that folder, to be spoilt."""
    shutil.copytree(files[name], tmp_path / name)
    return files | {name: tmp_path / name}, tmp_path / name


def test_wrong_folders_are_told_before_work_starts(files, tmp_path):
    def told(files, expected, name="foregrounds"):
        with pytest.raises(settings.TrainingError, match=expected) as error:
            items(files, name)
        assert "\n" not in str(error.value)

    told(files | {"backgrounds": tmp_path}, "^--backgrounds: .* has no PNG, WebP or JPEG files; give another folder")
    told({**files, "backgrounds": ""}, "^--base needs --backgrounds too")
    spoilt, folder = without(files, "backgrounds", tmp_path)
    (folder / "2.png").unlink()
    told(spoilt, "^--foregrounds: 1 of 5 images have no background in .* of the same name, such as .*2.png; add")
    Image.new("RGB", (40, 32)).save(folder / "2.png")
    told(
        spoilt,
        "^--composites: images of one name need one size, and .*2.png has 32×32, .*2.png has 40×32",
        "composites",
    )
    spoilt, folder = without(files, "foregrounds", tmp_path)
    (folder / "1.txt").write_text(" ")
    told(
        spoilt,
        "^--foregrounds: 1 of 5 images have no caption in a .txt file beside it of the same name, such as .*1.png",
    )
    (folder / "1.txt").write_text("a disk")
    Image.new("RGB", (32, 32)).save(folder / "1.png")
    told(spoilt, "^--foregrounds: .*1.png has no alpha; give PNG or WebP files that have")
    config = config_of("back_to_front", files, held_out=5)
    with pytest.raises(settings.TrainingError, match="there are 5 images and 5 of them are kept for validation"):
        layered_images.samples(config, tmp_path, fill_base.load(config), 0)
    blank = [layered_images.Item(files["backgrounds"] / "0.png", files["backgrounds"] / "0.png", layer=False)]
    with pytest.raises(settings.TrainingError, match=r"0.png shows no object; take it away"):
        pool(files, blank, tmp_path).layers(0)


def test_wrong_files_are_told_before_work_starts(files, transformer, autoencoders, tmp_path):
    def told(expected, **changes):
        with pytest.raises(settings.TrainingError, match=expected) as error:
            fill_base.load(config_of("back_to_front", files) | {key: str(path) for key, path in changes.items()})
        assert "\n" not in str(error.value)

    def spoilt(state):
        save_file(state, tmp_path / "spoilt.safetensors")
        return tmp_path / "spoilt.safetensors"

    host = flux.host_form(transformer.state_dict())
    told("^--vae is needed for a base of your own", vae="")
    told("^--rgba-vae: .*nothing is not there; give another path", rgba_vae=tmp_path / "nothing")
    told("^--rgba-vae: .* is no autoencoder in the form of Flux's with 4 image channels", rgba_vae=files["vae"])
    told("^--vae: .* is no autoencoder in the form of Flux's with 3 image channels and 16", vae=files["base"])
    told("^--base: .* is no Flux.1-Fill in the released form .it has no img_in.weight", base=files["vae"])
    text_only = host | {"img_in.weight": host["img_in.weight"][:, :64].contiguous()}
    told(r"its first layer is \[32, 64\] and Flux.1-Fill's \[32, 384\]", base=spoilt(text_only))
    told("has weights in scaled fp8; give flux1", base=spoilt(host | {"img_in.scale_weight": torch.ones(1)}))
    told("^--text-encoders: .* has no folder text_encoder; give", text_encoders=tmp_path)
    (tmp_path / "text").write_text("no weights")
    told("^--base: .*text cannot be read", base=tmp_path / "text")
    del host["single_blocks.1.linear2.bias"]
    base = fill_base.load(config_of("back_to_front", files, base=str(spoilt(host))))
    with pytest.raises(settings.TrainingError, match="lacks single_transformer_blocks.1.proj_out.bias; it is damaged"):
        base.transformer()
    mini = command.read_config(settings.CONFIGS / "back_to_front.json", [])
    with pytest.raises(settings.TrainingError, match="^--base is needed for a base of your own"):
        fill_base.load(mini | {"vae": str(files["vae"])})
