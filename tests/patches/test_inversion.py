"""Inversion through ComfyUI's sampling, on small random models of every kind of prediction."""

import copy
import types

import comfy.model_management
import comfy.model_sampling
import comfy.samplers
import folder_paths
import pytest
import torch
from strata.patches import inversion_cache
from strata.patches.inversion import invert
from strata.techniques.losses import psnr

from . import fusion_reference
from .sampling_helpers import calm, conditioning, picture, sigmas_of


@pytest.fixture(scope="module")
def models():
    made = {}
    return lambda kind: made.setdefault(kind, calm(fusion_reference.patcher(kind)))


def with_sampling(model, base, kind):
    """The model as if it had been trained for another kind of prediction, as ComfyUI's ModelSampling nodes do it."""
    sampling = types.new_class("Sampling", (base, kind))(model.model.model_config)
    if base is comfy.model_sampling.ModelSamplingDiscreteFlow:
        sampling.set_parameters(shift=3.0)
    model = model.clone()
    model.add_object_patch("model_sampling", sampling)
    return model


def kinds(model):
    discrete = comfy.model_sampling.ModelSamplingDiscrete
    return {
        "eps": (model, "ddim_uniform"),
        "v": (with_sampling(model, discrete, comfy.model_sampling.V_PREDICTION), "ddim_uniform"),
        "flow": (
            with_sampling(model, comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST),
            "simple",
        ),
    }


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
def test_sampling_from_the_found_noise_gives_the_picture_back(models, kind):
    model, scheduler = kinds(models("mini"))[kind]
    latent, positive, found = picture(), conditioning(model, 1, rows=1), {}
    for steps in (8, 32):
        sigmas = sigmas_of(model, steps, scheduler)
        found[steps] = invert(model, latent, positive, None, sigmas)
        assert found[steps].latents.shape == (len(sigmas), 1, 4, 8, 8) and torch.equal(found[steps].sigmas, sigmas)
        assert torch.equal(found[steps].latents[-1], model.model.process_latent_in(latent))
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, positive)
        start = found[steps].latents[0] / sigmas[0]
        if kind != "flow" and comfy.samplers.Sampler().max_denoise(
            types.SimpleNamespace(inner_model=model.model), sigmas
        ):
            start = found[steps].latents[0] / (1 + sigmas[0] ** 2).sqrt()
        stock = guider.sample(
            start, torch.zeros_like(latent), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True
        )
        assert torch.allclose(stock, found[steps].reconstruction, rtol=1e-5, atol=2e-3)
    quality = [psnr(found[steps].reconstruction, latent, None).item() for steps in (8, 32)]
    assert quality[1] > quality[0] + 2 and quality[1] > 25


def test_null_text_comes_back_at_full_guidance_and_plain_ddim_does_not(models):
    model = models("mini")
    latent, positive, negative = picture(batch=2), conditioning(model, 1, rows=1), conditioning(model, 2, rows=1)
    sigmas = sigmas_of(model)
    found = invert(model, latent, positive, negative, sigmas, "null-text", cfg=7.5, inner_steps=10)
    assert found.null.shape == (len(sigmas) - 1, 2, 7, 128)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(7.5)
    plain = guider.sample(
        found.latents[0] / sigmas[0],
        torch.zeros_like(latent),
        comfy.samplers.sampler_object("euler"),
        sigmas,
        disable_pbar=True,
    )
    assert (psnr(found.reconstruction, latent, None) > psnr(plain, latent, None) + 3).all()
    plain_trajectory = invert(model, latent, positive, None, sigmas)
    assert torch.equal(plain_trajectory.latents, found.latents)


def test_the_first_null_embedding_follows_the_gradient_of_finite_differences(models):
    """Adam's first step is the learning rate against the sign of the gradient."""
    model = models("mini")
    latent, positive, negative, sigmas = (
        picture(),
        conditioning(model, 1, rows=1),
        conditioning(model, 2, rows=1),
        sigmas_of(models("mini"), 4),
    )
    found = invert(model, latent, positive, negative, sigmas, "null-text", cfg=7.5, inner_steps=1)
    walk_target, x, sigma, below = found.latents[1], found.latents[0], sigmas[0], sigmas[1]

    def denoised(embedding):
        timestep = model.model.model_sampling.timestep(sigma[None]).float()
        with torch.no_grad():
            noise = double((x / (1 + sigma**2).sqrt()).double(), timestep, context=embedding)
        return x.double() - noise * sigma

    double = copy.deepcopy(model.model.diffusion_model).double()
    double.dtype = torch.float64
    start = negative[0][0].double()
    conditional = denoised(positive[0][0].double())

    def loss(embedding):
        unconditional = denoised(embedding)
        mixed = unconditional + (conditional - unconditional) * 7.5
        after = x + (below - sigma) * (x - mixed) / sigma
        return ((after - walk_target).square().mean() / (1 + below**2)).item()

    moved = found.null[0].double() - start
    assert ((moved.abs() - 1e-2).abs() < 1e-4).double().mean() > 0.95  # the others have next to no gradient
    gradient_signs = -moved.sign()
    for place in [(0, 0, 0), (0, 3, 17), (0, 6, 127), (0, 1, 64)]:
        step = torch.zeros_like(start)
        step[place] = 1e-3
        slope = (loss(start + step) - loss(start - step)) / 2e-3
        assert slope * gradient_signs[place] > 0


def test_noise_only_is_the_picture_with_one_noise(models):
    model, latent = models("mini"), picture()
    sigmas = sigmas_of(model)
    found, again = (
        invert(model, latent, conditioning(model, 1, rows=1), None, sigmas, "noise only", seed=4) for _ in range(2)
    )
    assert torch.equal(found.latents, again.latents) and found.reconstruction is None
    noises = [(x - found.latents[-1]) / sigma for x, sigma in zip(found.latents[:-1], sigmas[:-1], strict=True)]
    assert all(torch.allclose(noise, noises[0], rtol=1e-5, atol=1e-4) for noise in noises)


def test_sampling_with_each_steps_null_embedding_gives_the_reconstruction(models):
    model = models("mini")
    sigmas = sigmas_of(model, 4)
    positive, negative = (conditioning(model, seed, rows=1) for seed in (1, 2))
    found = invert(model, picture(), positive, negative, sigmas, "null-text", cfg=3.0, inner_steps=3)
    x, euler = found.latents[0], comfy.samplers.sampler_object("euler")
    for number in range(4):
        assert torch.equal(found.null_at(float(sigmas[number])), found.null[number])
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, [[found.null[number], {}]])
        guider.set_cfg(3.0)
        x = guider.sample(
            x / sigmas[number], torch.zeros_like(x), euler, sigmas[number : number + 2], disable_pbar=True
        )
    assert torch.allclose(found.reconstruction, model.model.process_latent_out(x), rtol=1e-5, atol=1e-4)
    assert torch.equal(found.null_at(1e9), found.null[0]) and torch.equal(found.null_at(0.0), found.null[-1])


@pytest.mark.parametrize("method", ["ddim", "null-text"])
def test_inside_the_executors_inference_mode_with_inference_weights(method):
    """As in ComfyUI's executor: weights loaded in inference mode. The same numbers as outside of it, and the model is
    left as it was.
    """
    outside = calm(fusion_reference.patcher("mini"))
    arguments = (
        picture(),
        conditioning(outside, 1, rows=1),
        conditioning(outside, 2, rows=1),
        sigmas_of(outside, 3),
        method,
    )
    expected = invert(outside, *arguments)
    with torch.inference_mode():
        model = calm(fusion_reference.patcher("mini"))
        held = {name: value for name, value in model.model.named_parameters()}
        before = {name: value.clone() for name, value in held.items()}
        found = invert(model, *arguments)
        assert torch.allclose(found.latents, expected.latents, rtol=1e-5, atol=1e-5)
        assert torch.allclose(found.reconstruction, expected.reconstruction, rtol=1e-5, atol=1e-4)
        after = dict(model.model.named_parameters())
        assert all(after[name] is value and torch.equal(value, before[name]) for name, value in held.items())


def test_an_interruption_leaves_the_model_as_it_was(models):
    model = models("mini")
    held = [id(value) for value in model.model.parameters()]

    def stop(step, denoised, x, total):
        if step == 4:  # the second step downwards, after one optimisation
            comfy.model_management.interrupt_current_processing()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        invert(
            model,
            picture(),
            conditioning(model, 1, rows=1),
            conditioning(model, 2, rows=1),
            sigmas_of(model, 3),
            "null-text",
            callback=stop,
        )
    assert [id(value) for value in model.model.parameters()] == held


def test_what_cannot_be_inverted_says_so(models):
    model = models("mini")
    latent, positive, sigmas = picture(), conditioning(model, 1, rows=1), sigmas_of(model)
    with pytest.raises(ValueError, match="negative: null-text starts from one plain conditioning"):
        invert(model, latent, positive, None, sigmas, "null-text")
    with pytest.raises(ValueError, match="cfg: at 1"):
        invert(model, latent, positive, positive, sigmas, "null-text", cfg=1.0)
    with pytest.raises(ValueError, match="steps: the noise levels must fall to 0"):
        invert(model, latent, positive, None, sigmas[:-1])
    cosmos = with_sampling(model, comfy.model_sampling.ModelSamplingCosmosRFlow, comfy.model_sampling.COSMOS_RFLOW)
    with pytest.raises(ValueError, match="model: its kind of prediction cannot be inverted"):
        invert(cosmos, latent, positive, None, sigmas)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    return tmp_path / "strata_inversions"


def test_the_disk_cache_knows_content_and_nothing_else(models, cache):
    model, positive = models("mini"), conditioning(models("mini"), 1, rows=1)
    name = inversion_cache.key(model, picture(), positive, 7.5)
    assert name == inversion_cache.key(
        calm(fusion_reference.patcher("mini")), picture(), conditioning(model, 1, rows=1), 7.5
    )
    others = [
        inversion_cache.key(model, picture(4), positive, 7.5),
        inversion_cache.key(model, picture(), conditioning(model, 2, rows=1), 7.5),
        inversion_cache.key(model, picture(), positive, 7.0),
        inversion_cache.key(fusion_reference.patcher("SD1.5"), picture(), positive, 7.5),
        inversion_cache.key(kinds(model)["v"][0], picture(), positive, 7.5),
    ]
    patched = model.clone()
    weight = "diffusion_model.middle_block.0.in_layers.2.weight"
    patched.add_patches({weight: ("diff", (torch.ones_like(model.model.state_dict()[weight]),))}, 0.5)
    others.append(inversion_cache.key(patched, picture(), positive, 7.5))
    assert len({name, *others}) == len(others) + 1
    foreign = model.clone()
    foreign.set_model_attn2_patch(lambda q, k, v, options: (q, k, v))
    assert inversion_cache.key(foreign, picture(), positive, 7.5) is None


def test_the_disk_cache_holds_no_more_than_its_limit_and_survives_a_broken_file(cache, monkeypatch):
    monkeypatch.setattr(inversion_cache, "LIMIT", 5000)
    for number in range(4):
        inversion_cache.store(f"n{number}", {"latents": torch.full((512,), float(number))})
    assert sorted(path.stem for path in cache.iterdir()) == ["n2", "n3"]
    assert (
        torch.equal(inversion_cache.load("n3")["latents"], torch.full((512,), 3.0))
        and inversion_cache.load("n0") is None
    )
    (cache / "n3.safetensors").write_bytes(b"no")
    assert inversion_cache.load("n3") is None
