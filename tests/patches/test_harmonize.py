"""Harmonising in ComfyUI's sampling, against the same steps taken one by one with stock samplers and the formula
between them.
"""

import comfy.sample
import comfy.samplers
import pytest
import torch
from strata.patches.harmonize import harmonize
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
