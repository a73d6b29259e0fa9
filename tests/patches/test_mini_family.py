"""The mini family in ComfyUI's loaders: told from every other model, and each part equal to the same weights run
another way.
"""

import importlib.util
import sys

import comfy.model_detection
import comfy.sample
import comfy.sd
import comfy.supported_models
import comfy.utils
import folder_paths
import pytest
import torch
from comfy.ldm.flux.model import Flux, FluxParams
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from safetensors.torch import load_file, save_file
from strata.networks.autoencoder import Autoencoder
from strata.patches import mini_family

from . import random_family

PREFIX = "model.diffusion_model."
SD1 = {
    "model_channels": 320,
    "channel_mult": [1, 2, 4, 4],
    "num_res_blocks": [2, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "context_dim": 768,
    "num_heads": 8,
}
SD2 = {**SD1, "context_dim": 1024, "use_linear_in_transformer": True}
SDXL = {
    "model_channels": 320,
    "channel_mult": [1, 2, 4],
    "num_res_blocks": [2, 2, 2],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
    "context_dim": 2048,
    "num_heads": 8,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
}
# ComfyUI after 0.3.75.
FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 19,
    "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": True,
    **({"txt_ids_dims": []} if "txt_ids_dims" in FluxParams.__dataclass_fields__ else {}),
}
OTHERS = {
    "SD1.5": (UNetModel, SD1, 4, "SD15"),
    "SD1.5 inpaint": (UNetModel, SD1, 9, "SD15"),
    "SD1.5 instruct": (UNetModel, SD1, 8, "SD15_instructpix2pix"),
    "SD2": (UNetModel, SD2, 4, "SD20"),
    "SD2 inpaint": (UNetModel, SD2, 9, "SD20"),
    "SD2 depth": (UNetModel, SD2, 5, "SD20"),
    "SDXL": (UNetModel, SDXL, 4, "SDXL"),
    "SDXL inpaint": (UNetModel, SDXL, 9, "SDXL"),
    "Flux dev": (Flux, FLUX, 16, "Flux"),
    "Flux schnell": (Flux, {**FLUX, "guidance_embed": False}, 16, "FluxSchnell"),
    "Flux Fill": (Flux, FLUX, 96, "FluxInpaint"),
}


@pytest.fixture
def registered(monkeypatch):
    """ComfyUI's lists of models and folders with the family in them; what the first was without it, whatever other
    tests have registered.
    """
    before = [model for model in comfy.supported_models.models if not model.__name__.startswith("StrataMini")]
    monkeypatch.setattr(comfy.supported_models, "models", [*before])
    monkeypatch.setattr(
        folder_paths,
        "folder_names_and_paths",
        {
            kind: ([path for path in paths if path != str(mini_family.PACK / "models" / kind)], ends)
            for kind, (paths, ends) in folder_paths.folder_names_and_paths.items()
        },
    )
    mini_family.register()
    return before


def keys(kind, config, channels):
    """A model's weights without their contents."""
    extra = (
        {"image_size": 32, "out_channels": 4, "use_spatial_transformer": True, "legacy": False}
        if kind is UNetModel
        else {}
    )
    model = kind(
        **{**extra, **config, "in_channels": channels}, dtype=torch.float32, device="meta", operations=random_family.OPS
    )
    return {PREFIX + key: value for key, value in model.state_dict().items()}


def detect(weights):
    return comfy.model_detection.model_config_from_unet(dict(weights), PREFIX)


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_are_still_detected_as_themselves(registered, monkeypatch, name):
    kind, config, channels, expected = OTHERS[name]
    weights = keys(kind, config, channels)
    with_ours = detect(weights)
    monkeypatch.setattr(comfy.supported_models, "models", registered)
    without = detect(weights)
    assert type(with_ours) is type(without) and type(without).__name__ == expected
    assert with_ours.unet_config == without.unet_config


@pytest.mark.parametrize(("channels", "expected"), [(4, mini_family.StrataMini), (9, mini_family.StrataMiniInpaint)])
def test_the_family_is_detected_with_its_geometry(registered, channels, expected):
    found = detect(keys(UNetModel, mini_family.UNET, channels))
    assert type(found) is expected
    assert found.unet_config == {
        **found.unet_config,
        **mini_family.UNET,
        "in_channels": channels,
        "num_head_channels": -1,
    }


@pytest.mark.parametrize(
    ("altered", "channels"),
    [
        ({"model_channels": 96}, 4),
        ({"context_dim": 64}, 4),
        ({"channel_mult": [1, 2, 2]}, 4),
        ({"transformer_depth_middle": 0}, 4),
        (
            {
                "num_res_blocks": [2, 1, 1],
                "transformer_depth": [1, 1, 1, 0],
                "transformer_depth_output": [1, 1, 1, 1, 1, 0, 0],
            },
            4,
        ),
        ({"use_linear_in_transformer": True}, 4),
        ({"out_channels": 8}, 4),
        ({"adm_in_channels": 64, "num_classes": "sequential"}, 4),
        ({}, 8),
        ({}, 5),
    ],
)
def test_a_model_that_differs_in_one_number_is_not_ours(registered, altered, channels):
    assert type(detect(keys(UNetModel, {**mini_family.UNET, **altered}, channels))).__name__ not in (
        "StrataMini",
        "StrataMiniInpaint",
    )


def test_a_second_copy_of_the_pack_registers_nothing_twice(registered):
    path = mini_family.__file__
    spec = importlib.util.spec_from_file_location("strata.patches.another_copy", path)
    copy = importlib.util.module_from_spec(spec)
    sys.modules["strata.patches.another_copy"] = copy
    try:
        spec.loader.exec_module(copy)
        copy.register()
        mini_family.register()
    finally:
        del sys.modules["strata.patches.another_copy"]
    names = [model.__name__ for model in comfy.supported_models.models]
    assert names[:3] == ["StrataMini", "StrataMiniInpaint", "StrataMiniFlux"]
    assert len(names) == len(set(names)) == len(registered) + 3
    assert comfy.supported_models.models[3:] == registered
    for kind in mini_family.KINDS:
        paths = folder_paths.get_folder_paths(kind)
        assert len(paths) == len(set(paths)) and paths[-1] == str(mini_family.PACK / "models" / kind)


def test_model_files_of_the_pack_are_listed_behind_the_users_own(registered, monkeypatch, tmp_path):
    # As extra_model_paths.yaml or another pack has it.
    folder_paths.add_model_folder_path("layer_model", str(tmp_path / "extra"))
    folder_paths.folder_names_and_paths["strata"] = ([], folder_paths.supported_pt_extensions)
    monkeypatch.setattr(mini_family, "PACK", tmp_path / "pack")
    for kind in mini_family.KINDS:
        folder = tmp_path / "pack" / "models" / kind
        folder.mkdir(parents=True)
        (folder / f"{kind}_file.safetensors").touch()
        (folder / "README.md").touch()
    mini_family.register()
    for kind in mini_family.KINDS:
        assert f"{kind}_file.safetensors" in folder_paths.get_filename_list(
            kind
        ) and "README.md" not in folder_paths.get_filename_list(kind)
        assert folder_paths.get_folder_paths(kind)[0].startswith(folder_paths.models_dir)
    assert folder_paths.get_full_path("strata", "strata_file.safetensors") == str(
        tmp_path / "pack/models/strata/strata_file.safetensors"
    )


@pytest.fixture
def loaded(registered, family):
    def load(name):
        return comfy.sd.load_checkpoint_guess_config(str(family[name]), output_vae=True, output_clip=True)[:3]

    return load


@pytest.mark.parametrize(("name", "channels"), [("sd", 4), ("inpaint", 9)])
@torch.no_grad()
def test_the_unet_is_comfyuis_on_sd15s_schedule(loaded, family, name, channels):
    model = loaded(name)[0].model
    plain = random_family.unet(channels)
    plain.load_state_dict(
        {
            key.removeprefix(PREFIX): value.float()
            for key, value in load_file(family[name]).items()
            if key.startswith(PREFIX)
        }
    )
    torch.manual_seed(0)
    noisy, context = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 128)
    concat = torch.randn(2, 5, 8, 8) if channels == 9 else None
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha = (1 - betas).cumprod(0)[[900, 300]]
    sigma = ((1 - alpha) / alpha).sqrt().float()
    got = model.apply_model(noisy, sigma, c_concat=concat, c_crossattn=context)
    scaled = noisy * alpha.sqrt().float().view(-1, 1, 1, 1)
    noise = plain(
        scaled if concat is None else torch.cat([scaled, concat], 1), torch.tensor([900.0, 300.0]), context=context
    )
    assert torch.allclose(got, noisy - noise * sigma.view(-1, 1, 1, 1), rtol=1e-5, atol=2e-4) and noise.std() > 0.1


@torch.no_grad()
def test_the_inpainting_unet_alone_is_the_same_model(loaded, family, tmp_path):
    """As published: the keys without their prefix, through UNETLoader's function."""
    weights = {
        key.removeprefix(PREFIX): value for key, value in load_file(family["inpaint"]).items() if key.startswith(PREFIX)
    }
    save_file(weights, tmp_path / "unet.safetensors")
    alone, full = comfy.sd.load_diffusion_model(str(tmp_path / "unet.safetensors")).model, loaded("inpaint")[0].model
    assert type(alone.model_config) is mini_family.StrataMiniInpaint
    torch.manual_seed(0)
    noisy, context, concat = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 128), torch.randn(1, 5, 8, 8)
    one, other = (
        model.apply_model(noisy, torch.tensor([3.0]), c_concat=concat, c_crossattn=context) for model in (alone, full)
    )
    assert torch.equal(one, other) and not torch.equal(one, noisy)


def table(family):
    """CLIP's whole table, row by row."""
    weights = load_file(family["sd"])
    ids, rows = weights[mini_family.TOKEN_IDS].tolist(), weights[mini_family.TOKEN_ROWS]
    unknown = torch.stack([row.double() for row, token in zip(rows, ids, strict=True) if token < 49406]).sum(0) / (
        len(ids) - 2
    )
    return torch.stack(
        [rows[ids.index(token)].float() if token in ids else unknown.half().float() for token in range(49408)]
    )


@torch.no_grad()
def test_the_text_encoder_is_transformers_clip_on_the_expanded_table(loaded, family):
    from transformers import CLIPTextConfig, CLIPTextModel

    clip = loaded("sd")[1]
    texts = ["a dog on the beach", "a red zeppelin", "", "a picture of a cat in snow " * 3]
    prefix = "cond_stage_model.transformer."
    weights = {
        key.removeprefix(prefix): value.float()
        for key, value in load_file(family["sd"]).items()
        if key.startswith(prefix)
    }
    weights[mini_family.TOKEN_ROWS.removeprefix(prefix)] = table(family)
    model = CLIPTextModel(CLIPTextConfig(**mini_family.TEXT)).eval()
    named = model.state_dict()  # transformers 5 has dropped the prefix
    model.load_state_dict(
        {key if key in named else key.removeprefix("text_model."): value for key, value in weights.items()}
    )
    tokens = clip.tokenizer.clip_l.tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt")[
        "input_ids"
    ]
    # Padded with the end token, as ComfyUI does for SD1.
    tokens = torch.where((tokens == 49407).cumsum(1) > 0, 49407, tokens)
    expected = model(tokens)
    for index, text in enumerate(texts):
        context, pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)
        assert torch.allclose(context[0], expected.last_hidden_state[index], rtol=1e-5, atol=1e-4)
        assert torch.allclose(pooled[0], expected.pooler_output[index], rtol=1e-5, atol=1e-4)


def test_unknown_words_are_all_the_same_word(loaded):
    clip = loaded("sd")[1]
    one, other, known = (
        clip.encode_from_tokens(clip.tokenize(f"a {word} on the beach")) for word in ("hat", "chair", "dog")
    )
    assert torch.equal(one, other) and one.isfinite().all() and not torch.allclose(one, known, rtol=1e-5, atol=1e-2)


def test_a_trained_row_for_unknown_words_is_used():
    rows, ids = torch.arange(8.0).view(4, 2), torch.tensor([5, -1, 49407, 7], dtype=torch.int32)
    full = mini_family.all_token_rows(rows, ids)
    assert full.shape == (49408, 2)
    assert full[[5, 49407, 7]].tolist() == [[0, 1], [4, 5], [6, 7]]
    assert (full[[0, 6, 49406, 49405]] == torch.tensor([2.0, 3.0])).all()


@torch.no_grad()
def test_the_autoencoder_is_ours(loaded, family):
    vae = loaded("sd")[2]
    prefix = "first_stage_model."
    weights = {
        key.removeprefix(prefix): value.float()
        for key, value in load_file(family["sd"]).items()
        if key.startswith(prefix)
    }
    assert (weights.pop("vae_scale"), weights.pop("vae_shift")) == (1, 0)
    ours = Autoencoder()
    ours.load_state_dict(weights)
    torch.manual_seed(0)
    image = torch.rand(2, 32, 48, 3)
    latent = ours.encode(image.movedim(-1, 1))
    assert torch.allclose(vae.encode(image), latent, rtol=1e-5, atol=1e-4)
    assert torch.allclose(vae.decode(latent), ours.decode(latent).clamp(0, 1).movedim(1, -1), rtol=1e-5, atol=1e-4)


def test_the_unet_sees_latents_as_the_autoencoder_makes_them(loaded):
    model = loaded("sd")[0].model
    latent = torch.randn(1, 4, 8, 8)
    assert torch.equal(model.process_latent_in(latent), latent) and torch.equal(
        model.process_latent_out(latent), latent
    )


def test_an_inpainting_model_without_a_picture_gets_the_familys_gray(loaded, monkeypatch):
    monkeypatch.setitem(mini_family.LATENT, "gray", [0.5, -1.0, 0.25, 2.0])
    model = loaded("inpaint")[0].model
    noise = torch.randn(2, 4, 8, 8)
    concat = model.concat_cond(noise=noise, latent_image=torch.zeros_like(noise), device=noise.device)
    assert (concat[:, 0] == 1).all() and concat[:, 1:].amax((0, 2, 3)).tolist() == concat[:, 1:].amin(
        (0, 2, 3)
    ).tolist() == [0.5, -1.0, 0.25, 2.0]


def test_a_checkpoint_saved_by_comfyui_loads_again(loaded, tmp_path):
    model, clip, vae = loaded("sd")
    path = tmp_path / "saved.safetensors"
    comfy.sd.save_checkpoint(str(path), model, clip, vae)
    again = comfy.sd.load_checkpoint_guess_config(str(path), output_vae=True, output_clip=True)
    assert type(again[0].model.model_config) is mini_family.StrataMini
    words = ("a dog on the beach", "a zeppelin")
    assert all(
        torch.equal(clip.encode_from_tokens(clip.tokenize(w)), again[1].encode_from_tokens(again[1].tokenize(w)))
        for w in words
    )
    mine, theirs = model.model.diffusion_model.state_dict(), again[0].model.diffusion_model.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.fixture
def told(monkeypatch):
    sentences = []
    monkeypatch.setattr(mini_family, "tell", sentences.append)
    return sentences


def test_words_that_the_family_does_not_know_are_told_and_encoded_as_before(registered, told):
    shipped = mini_family.PACK / "models" / "checkpoints" / "strata_mini_sd.safetensors"
    clip = comfy.sd.load_checkpoint_guess_config(str(shipped))[1]
    for known in ("", "a red apple on a beach", "(a house:1.2), a street"):
        clip.tokenize(known)
    assert told == []
    tokens = clip.tokenize("a samurai, a samurai and a zeppelin on a beach")
    assert told == [
        "The mini family does not know samurai, zeppelin; use objects that Render a layered scene lists, and places "
        "such as a beach or a street."
    ]
    assert tokens == super(type(clip.tokenizer), clip.tokenizer).tokenize_with_weights(
        "a samurai, a samurai and a zeppelin on a beach"
    )


@pytest.mark.parametrize(("side", "count"), [(16, 0), (32, 1)])
def test_a_size_that_the_family_was_not_trained_at_is_told(loaded, told, side, count):
    noise, text = torch.zeros(1, 4, side, side), torch.zeros(1, 77, 128)
    conds = loaded("sd")[0].model.extra_conds(noise=noise, cross_attn=text, device="cpu")
    assert "c_crossattn" in conds and len(told) == count
    assert all("trained at 128×128 pixels and does not know 256×256" in sentence for sentence in told)


@pytest.mark.parametrize(("sides", "count"), [((16, 16), 0), ((32, 32), 0), ((32, 16), 1), ((64, 64), 1)])
def test_the_flux_fill_knows_two_sizes(told, sides, count):
    mini_family.tell_size(torch.zeros(1, 4, *sides), mini_family.CONFIG["flux_sides"])
    assert len(told) == count
    assert all("trained at 128×128 and 256×256 pixels and does not know" in sentence for sentence in told)
