"""Harmonising in ComfyUI's sampling, against the same steps taken one by one with stock samplers and the formula
between them.
"""

import types

import comfy.model_base
import comfy.sample
import comfy.samplers
import comfy.supported_models
import pytest
import torch
from strata.patches.harmonize import harmonize, level, remaining_sigmas
from strata.patches.inversion import is_flow
from strata.techniques.feature_guidance import masks_at_level
from strata.techniques.harmonization import fuse_latents
from strata.techniques.inversion import noised_trajectory, trajectory_at

from . import fusion_reference
from .sampling_helpers import conditioning
from .small_models import small_flux

STEPS, CFG, SEED = 10, 2.0, 3


@pytest.fixture(scope="module", params=["SD1.5", "SDXL", "Flux"])
def case(request):
    """(model, positive, negative, background, foregrounds, alphas in pixels)"""
    generator = torch.Generator().manual_seed(1)
    if request.param == "Flux":
        model, channels = small_flux(), 16
        positive, negative = (
            [[torch.randn(1, 5, 16, generator=generator), {"pooled_output": torch.randn(1, 8, generator=generator)}]]
            for _ in "pn"
        )
    else:
        model, channels = fusion_reference.patcher(request.param), 4
        positive, negative = conditioning(model, 1, rows=1), conditioning(model, 2, rows=1)
    latents = torch.randn(3, channels, 16, 16, generator=generator)
    alphas = torch.zeros(2, 1, 128, 128)
    alphas[0, :, 16:80, 24:70] = 1
    alphas[1, :, 60:110, 50:90] = 0.6
    return model, positive, negative, latents[:1], latents[1:], alphas


def run(
    case,
    start=0.4,
    end=0.6,
    sampler="euler",
    scheduler="normal",
    callback=lambda count: None,
    alphas=None,
    retained=None,
    **noise,
):
    model, positive, negative, background, foregrounds, given = case
    return harmonize(
        model,
        positive,
        negative,
        background,
        foregrounds,
        given if alphas is None else alphas,
        SEED,
        STEPS,
        CFG,
        sampler,
        scheduler,
        start,
        end,
        callback,
        retained,
        **noise,
    )


def schedule(model, start, sampler="euler"):
    sigmas = comfy.samplers.KSampler(model, STEPS, model.load_device, sampler, "normal", 1.0).sigmas
    return sigmas[int((sigmas[:-1] > float(model.model.model_sampling.percent_to_sigma(start)) * (1 + 1e-4)).sum()) :]


def stock(case, x, sigmas, noise, sampler="euler"):
    """x is handed over and comes back as ComfyUI's graph does it, without noise added."""
    model, positive, negative = case[:3]
    return comfy.sample.sample_custom(
        model,
        noise,
        CFG,
        comfy.samplers.sampler_object(sampler),
        sigmas,
        positive,
        negative,
        x,
        disable_pbar=True,
        seed=SEED,
    )


@pytest.mark.parametrize(("start", "end"), [(0.4, 0.6), (0.2, 0.9)])
def test_each_step_is_fused_and_the_rest_is_free(case, start, end):
    model, _, _, background, foregrounds, alphas = case
    sampling, latent_format = model.model.model_sampling, model.model.latent_format
    noise, sigmas = comfy.sample.prepare_noise(background, SEED), schedule(model, start)
    until, small = float(sampling.percent_to_sigma(end)), masks_at_level(alphas[:, 0], (16, 16))[:, None]

    def noised(latent, sigma):
        return sampling.noise_scaling(sigma, noise.clone(), latent_format.process_in(latent))

    x = noised(background, sigmas[0])
    fused = int((sigmas[:-1] >= until).sum())
    assert 1 < fused < len(sigmas) - 1
    for now, after in zip(sigmas[:fused], sigmas[1 : fused + 1], strict=True):
        x = fuse_latents(x, torch.stack([noised(layer[None], now) for layer in foregrounds]), small)
        given = latent_format.process_out(sampling.inverse_noise_scaling(now, x))
        x = latent_format.process_in(stock(case, given, torch.stack([now, after]), torch.zeros_like(x)))
        x = x * (1 - after) if "Flux" in type(model.model).__name__ else x  # what inverse_noise_scaling undid
    left = latent_format.process_out(sampling.inverse_noise_scaling(sigmas[fused], x))
    expected = stock(case, left, sigmas[fused:], torch.zeros_like(x))
    found = run(case, start, end)
    assert torch.allclose(found, expected, rtol=1e-5, atol=2e-4 * float(expected.abs().max())) and not torch.allclose(
        found, background, rtol=1e-5, atol=0.1
    )


def test_without_a_range_it_is_the_stock_sampler_to_the_bit(case):
    noise, sigmas = comfy.sample.prepare_noise(case[3], SEED), schedule(case[0], 0.5)
    assert torch.equal(run(case, 0.5, 0.3), stock(case, case[3], sigmas, noise))


def test_what_is_opaque_to_the_end_stays(case):
    """With alpha one everywhere and fusing to the last step, only the last Euler step is the model's."""
    full = torch.ones_like(case[5])
    other = run((*case[:3], torch.zeros_like(case[3]), *case[4:]), 0.3, 1.0, alphas=full)
    assert torch.allclose(run(case, 0.3, 1.0, alphas=full), other, rtol=1e-5, atol=1e-5)


def test_steps_are_reported_in_order_and_other_samplers_go_on(case):
    calls = []
    run(
        case,
        callback=lambda count: lambda step, clean, x, total: calls.append((step, total, count)),
        sampler="dpmpp_2m",
        scheduler="karras",
    )
    assert calls == [(step, len(calls), len(calls)) for step in range(len(calls))]
    assert 4 < len(calls) < STEPS


@pytest.mark.parametrize("sampler", ["uni_pc", "dpmpp_2m", "dpmpp_2m_sde", "heun", "lcm"])
def test_another_sampler_does_the_rest_and_the_fused_steps_are_eulers(case, sampler):
    """From where fusing ends, the stock sampler of that name goes on."""
    model = case[0]
    sigmas, until = schedule(model, 0.4, sampler), float(model.model.model_sampling.percent_to_sigma(0.6))
    fused = int((sigmas[:-1] >= until).sum())
    kept = []
    found = run(case, sampler=sampler, callback=lambda count: lambda _step, clean, x, _total: kept.append((x, clean)))
    x, clean = kept[fused - 1]
    now, after = sigmas[fused - 1], sigmas[fused]
    x = x + (x - clean) / now * (after - now)
    left = model.model.latent_format.process_out(model.model.model_sampling.inverse_noise_scaling(after, x))
    expected = stock(case, left, sigmas[fused:], torch.zeros_like(x), sampler)
    assert torch.allclose(found, expected, rtol=1e-5, atol=2e-4 * float(expected.detach().abs().max()))
    assert not torch.allclose(found, run(case), rtol=1e-5, atol=1e-3)


def test_retained_latents_take_the_place_of_noise(case):
    """The same noise on the layers by the inversion's formula is what is done without them; other latents are another
    picture.
    """
    model, _, _, background, foregrounds, _ = case
    noise, sigmas = comfy.sample.prepare_noise(background, SEED), schedule(model, 0.0)
    clean = model.model.latent_format.process_in(torch.cat([background, foregrounds]))
    for seed, same in ((SEED, True), (SEED + 1, False)):
        noise = comfy.sample.prepare_noise(background, seed)
        trajectory = noised_trajectory(clean, noise.expand_as(clean), sigmas, is_flow(model))
        found, expected = run(case, retained=lambda sigma, own=trajectory: trajectory_at(own, sigmas, sigma)), run(case)
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-4 * float(expected.abs().max())) == same


def test_nothing_left_to_do_is_said(case):
    with pytest.raises(ValueError, match="start_percent: no step of 10 is left after 1.0"):
        run(case, 1.0, 1.0)


FAMILIES = {  # as ComfyUI makes each family's noise, shifts included
    "SD1.5": (comfy.supported_models.SD15, comfy.model_base.ModelType.EPS),
    "SD2 v": (comfy.supported_models.SD20, comfy.model_base.ModelType.V_PREDICTION),
    "SDXL": (comfy.supported_models.SDXL, comfy.model_base.ModelType.EPS),
    "Playground 2.5": (comfy.supported_models.SDXL, comfy.model_base.ModelType.EDM),
    "SD3": (comfy.supported_models.SD3, comfy.model_base.ModelType.FLOW),
    "Flux": (comfy.supported_models.Flux, comfy.model_base.ModelType.FLUX),
    "Flux schnell": (comfy.supported_models.FluxSchnell, comfy.model_base.ModelType.FLOW),
    "Qwen-Image": (comfy.supported_models.QwenImage, comfy.model_base.ModelType.FLUX),
    "Z-Image": (comfy.supported_models.ZImage, comfy.model_base.ModelType.FLOW),
}


class Noise:
    """Of a model what its noise levels are made of."""

    def __init__(self, name: str):
        config, kind = FAMILIES[name]
        values = dict(config.sampling_settings)
        if name == "Playground 2.5":
            values |= {"sigma_data": 0.5, "sigma_max": 80.0, "sigma_min": 0.002}
        self.sampling = comfy.model_base.model_sampling(types.SimpleNamespace(sampling_settings=values), kind)
        self.model_options, self.load_device = {}, torch.device("cpu")
        self.model = types.SimpleNamespace(model_sampling=self.sampling)

    def get_model_object(self, name: str):
        assert name == "model_sampling"
        return self.sampling


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_share_of_noise_means_the_same_in_every_family(family, share):
    noise = Noise(family)
    sigma = torch.tensor(level(noise, 0.0, share))
    zero, one = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    of_image = float(noise.sampling.noise_scaling(sigma, zero.clone(), one))
    of_noise = float(noise.sampling.noise_scaling(sigma, one.clone(), zero))
    spread = getattr(noise.sampling, "sigma_data", 1.0)
    assert of_noise / (of_noise + spread * of_image) == pytest.approx(share, rel=1e-5)
    sigmas = remaining_sigmas(noise, STEPS, "euler", "simple", 0.0, share)
    assert float(sigmas[0]) == pytest.approx(float(sigma), rel=1e-6) and (sigmas.diff() < 0).all() and sigmas[-1] == 0
    whole = comfy.samplers.calculate_sigmas(noise.sampling, "simple", STEPS)
    assert torch.equal(sigmas[1:], whole[whole < sigma])


def test_percents_mean_other_noise_in_each_family():
    """What the share is for: DreamLayer's 0.4 of the sampling."""
    shares = {}
    for name in ("SD1.5", "Flux", "Z-Image"):
        noise = Noise(name)
        sigma = float(noise.sampling.percent_to_sigma(0.4))
        shares[name] = sigma if name != "SD1.5" else sigma / (1 + sigma)
    assert shares["SD1.5"] == pytest.approx(0.695, abs=1e-3)
    assert shares["Flux"] == pytest.approx(0.826, abs=1e-3) and shares["Z-Image"] == pytest.approx(0.818, abs=1e-3)


def test_all_noise_is_where_the_sampling_begins():
    for name in ("SD1.5", "Flux"):
        noise = Noise(name)
        assert level(noise, 0.0, 1.0) == pytest.approx(float(noise.sampling.sigma_max))


def test_noise_takes_the_place_of_percents(case):
    """At the levels of the percents the share gives the same run, but for the first step, which starts at that very
    level.
    """
    sampling, flow = case[0].model.model_sampling, is_flow(case[0])
    levels = schedule(case[0], 0.4)
    at = [float(levels[0]), float(levels[2]) * 0.999]
    start, end = at if flow else [sigma / (1 + sigma) for sigma in at]
    expected = run(case, 0.4, percent_of(sampling, at[1]))
    found = run(case, 0.0, 0.0, start_noise=start, end_noise=end)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-3 * float(expected.abs().max()))
    assert not torch.allclose(found, run(case, 0.0, 0.0, start_noise=start, end_noise=start), rtol=1e-4, atol=1e-2)


def percent_of(sampling, sigma: float) -> float:
    """The first percent, in thousandths, whose level is below sigma."""
    return next(number / 1000 for number in range(1, 1000) if float(sampling.percent_to_sigma(number / 1000)) < sigma)
