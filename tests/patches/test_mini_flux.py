"""The mini Flux-Fill in ComfyUI's loaders and in diffusers' class: one model, told from every other Flux."""

import copy

import comfy.model_detection
import comfy.sd
import comfy.supported_models
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from safetensors.torch import save_file
from strata.networks import flux
from strata.patches import mini_family, transparency, transparency_model
from strata.techniques import layering
from strata.training import flux_adapter

from .random_flux import SHAPE, randomised_flux
from .test_mini_family import FLUX, detect, keys


@pytest.fixture
def registered(monkeypatch):
    before = [model for model in comfy.supported_models.models if not model.__name__.startswith("StrataMini")]
    monkeypatch.setattr(comfy.supported_models, "models", [*before])
    mini_family.register()


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    return randomised_flux()


@pytest.fixture
def loaded(registered, trained, tmp_path):
    save_file(flux.host_form(trained.state_dict()), tmp_path / "flux.safetensors")
    return comfy.sd.load_diffusion_model(str(tmp_path / "flux.safetensors"))


def test_a_fresh_model_predicts_nothing_and_learns_everywhere():
    model = flux.build(SHAPE)
    found = flux.predict(
        model,
        torch.randn(1, 4, 4, 4),
        torch.randn(1, 68, 4, 4),
        torch.ones(1),
        torch.randn(1, 3, 128),
        torch.randn(1, 128),
    )
    assert found.shape == (1, 4, 4, 4) and not found.any()


def test_packing_is_diffusers_own():
    from diffusers import FluxPipeline

    latent = torch.randn(2, 5, 6, 8)
    tokens = flux.pack(latent)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latent, 2, 5, 6, 8))
    assert torch.equal(flux.unpack(tokens, 3), latent)


def test_names_go_to_the_host_and_back(trained):
    import comfy.utils

    state = trained.state_dict()
    host = flux.host_form(state)
    known = comfy.utils.flux_to_diffusers(
        {
            "depth": SHAPE["depth"],
            "depth_single_blocks": SHAPE["depth_single_blocks"],
            "hidden_size": SHAPE["hidden_size"],
        }
    )
    for theirs, place in known.items():
        if theirs not in state:
            continue
        name, rows = (place, None) if isinstance(place, str) else place[:2]
        value = host[name] if rows is None else host[name].narrow(*rows)
        if isinstance(place, tuple) and len(place) == 3:
            value = place[2](value)
        assert torch.equal(state[theirs], value), theirs
    assert state.keys() <= known.keys()
    again = flux.diffusers_form(host)
    assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)


def test_it_is_detected_with_its_geometry(loaded):
    assert type(loaded.model.model_config) is mini_family.StrataMiniFlux
    network = loaded.model.diffusion_model
    assert network.params.axes_dim == SHAPE["axes_dim"] and network.num_heads == SHAPE["num_heads"]
    # A token is two by two latent pixels of four channels.
    assert network.out_channels == 16 and loaded.model.latent_format.latent_channels == 4


@pytest.mark.parametrize(
    "altered",
    [{"hidden_size": 192, "axes_dim": [16, 16, 16]}, {"depth": 3}, {"vec_in_dim": 64}, {"guidance_embed": True}],
)
def test_a_flux_that_differs_in_one_number_is_not_ours(registered, altered):
    from comfy.ldm.flux.model import Flux

    found = detect(keys(Flux, {**FLUX, "guidance_embed": False, **SHAPE, **altered}, SHAPE["in_channels"]))
    assert not type(found).__name__.startswith("StrataMini")


@pytest.mark.parametrize("size", [(8, 8), (4, 10)])
@torch.no_grad()
def test_diffusers_and_the_host_predict_the_same(loaded, trained, size):
    torch.manual_seed(1)
    noisy, image = torch.randn(2, 2, 4, *size)
    mask = torch.rand(2, 1, 8 * size[0], 8 * size[1]).round()
    sigma, text, pooled = torch.tensor([0.9, 0.2]), torch.randn(2, 77, 128), torch.randn(2, 128)
    concat = loaded.model.concat_cond(noise=noisy, concat_latent_image=image, concat_mask=mask, device=noisy.device)
    conds = loaded.model.extra_conds(
        noise=noisy,
        device=noisy.device,
        cross_attn=text,
        pooled_output=pooled,
        concat_latent_image=image,
        concat_mask=mask,
    )
    assert conds["c_crossattn"].cond.shape[1] == mini_family.CONFIG["flux_tokens"]
    given = torch.cat([image, layering.alpha_cells(mask)], 1)
    assert torch.equal(given, concat)
    found = loaded.model.apply_model(noisy, sigma, c_concat=concat, c_crossattn=conds["c_crossattn"].cond, y=pooled)
    tokens = text[:, : mini_family.CONFIG["flux_tokens"]]
    velocity = flux.predict(trained, noisy, given, sigma, tokens, pooled)
    # What the host returns is the clean latent.
    expected = noisy - velocity * sigma.view(-1, 1, 1, 1)
    assert velocity.std() > 0.05 and torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_adapter_says_the_same_in_diffusers_class_on_the_whole_model_and_on_one_row(loaded, trained):
    """By its trainer's names, as Load transparency reads them: merged into the weights, and on the foreground alone."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(2)
    adapted = copy.deepcopy(trained)
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules=flux.linear_layers(adapted)), adapted)
    terms = {key: torch.randn_like(value) / 5 for key, value in adapted.state_dict().items() if ".lora_" in key}
    adapted.load_state_dict(terms, strict=False)
    file = transparency.recognise("an_adapter.safetensors", flux_adapter.published_form(terms))
    assert file.families == ("Flux",) and set(file.parts) == {"flux"}

    noisy, sigma = torch.randn(3, 4, 4, 4), torch.tensor([0.9, 0.5, 0.2])
    text, pooled = torch.randn(3, mini_family.CONFIG["flux_tokens"], 128), torch.randn(3, 128)
    given = torch.cat([torch.zeros(3, 4, 4, 4), torch.ones(3, 64, 4, 4)], 1)
    expected, plain = (
        noisy - flux.predict(model, noisy, given, sigma, text, pooled) * sigma.view(-1, 1, 1, 1)
        for model in (adapted, trained)
    )
    assert (expected - plain).abs().max() > 0.05

    def predicted(model):
        options = model.model_options["transformer_options"]
        wrappers = [one for own in model.wrappers.get(WrappersMP.DIFFUSION_MODEL, {}).values() for one in own]
        options = {**options, "wrappers": {WrappersMP.DIFFUSION_MODEL: {"adapter": wrappers}}}
        model.patch_model()
        try:
            call = {"c_concat": given, "c_crossattn": text, "y": pooled, "transformer_options": options}
            return model.model.apply_model(noisy, sigma, **call)
        finally:
            model.unpatch_model()

    whole = predicted(transparency_model.apply(loaded, file, 1.0))
    assert torch.allclose(whole, expected, rtol=1e-3, atol=1e-4)
    first = predicted(transparency_model.apply_to_foreground(loaded, file))
    assert torch.allclose(first[:1], expected[:1], rtol=1e-3, atol=1e-4)
    assert torch.allclose(first[1:], plain[1:], rtol=1e-3, atol=1e-4)
