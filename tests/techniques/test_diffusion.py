"""The noise process against the scheduler of diffusers, and the loss weight against its definition."""

import math

import pytest
import torch
from strata.techniques.diffusion import (
    add_noise,
    ddim_step,
    euler_step,
    flow_noise,
    flow_velocity,
    noise_levels,
    noise_loss_weight,
    noise_of_v,
    shifted_sigmas,
    sigma_of_noise,
    v_target,
)


@pytest.fixture(scope="module")
def scheduler():
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=True
    )


def test_noise_levels_are_stable_diffusions(scheduler):
    levels = noise_levels()
    assert levels.dtype == torch.float64 and (levels.diff() < 0).all()
    assert torch.allclose(levels, scheduler.alphas_cumprod.double(), rtol=0, atol=1e-6)


def test_add_noise_equals_the_scheduler(scheduler):
    clean, noise, times = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 400, 999])
    assert torch.allclose(
        add_noise(clean, noise, noise_levels()[times]), scheduler.add_noise(clean, noise, times), rtol=1e-6, atol=1e-6
    )


def test_ddim_steps_equal_the_scheduler(scheduler):
    scheduler.set_timesteps(10)
    levels, latent = noise_levels(), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    expected = latent
    for time in scheduler.timesteps:
        noise = torch.sin(3 * expected) + 0.1
        previous = int(time) - 100
        after = levels[previous] if previous >= 0 else torch.tensor(1.0, dtype=torch.float64)
        latent = ddim_step(latent, torch.sin(3 * latent) + 0.1, levels[time], after)
        expected = scheduler.step(noise, time, expected).prev_sample
        assert torch.allclose(latent, expected, rtol=0, atol=1e-4)


def test_perfect_noise_leads_back_to_the_picture_in_one_step():
    clean, noise, level = (
        torch.rand(1, 4, 4, 4, dtype=torch.float64),
        torch.randn(1, 4, 4, 4, dtype=torch.float64),
        noise_levels()[700],
    )
    found = ddim_step(add_noise(clean, noise, level[None]), noise, level, torch.tensor(1.0))
    assert torch.allclose(found, clean, rtol=0, atol=1e-12)


def test_v_targets_are_the_schedulers_and_mean_its_noise():
    from diffusers import DDPMScheduler

    torch.manual_seed(0)
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction"
    )
    clean, noise, times = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 400, 999])
    levels = noise_levels()[times]
    v = v_target(clean, noise, levels)
    assert torch.allclose(v, scheduler.get_velocity(clean, noise, times), rtol=0, atol=1e-5)
    noisy = scheduler.add_noise(clean, noise, times)
    for one, predicted, level, drawn in zip(noisy, v, levels, noise, strict=True):
        assert torch.allclose(noise_of_v(one, predicted, level), drawn, rtol=0, atol=1e-5)


def test_noise_loss_weight_is_one_where_noise_prevails_and_falls_with_the_signal():
    levels = noise_levels()
    weight = noise_loss_weight(levels, 5.0)
    for level, value in zip(levels[::97].tolist(), weight[::97].tolist(), strict=True):
        ratio = level / (1 - level)
        assert value == pytest.approx(min(ratio, 5.0) / ratio, rel=1e-12)
    assert weight[-1] == 1 and weight[0] < 0.01


@pytest.fixture(scope="module")
def flow():
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


@pytest.mark.parametrize("mu", [0.0, 0.5, 1.15])
def test_flow_matching_is_diffusers_euler_scheduler(flow, mu):
    torch.manual_seed(0)
    steps, sigmas = 8, shifted_sigmas(8, mu)
    flow.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).numpy(), mu=mu)
    assert torch.allclose(sigmas, flow.sigmas.double(), rtol=0, atol=1e-6)
    latent = expected = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    for i, time in enumerate(flow.timesteps):
        latent = euler_step(latent, torch.sin(3 * latent) + 0.1, sigmas[i], sigmas[i + 1])
        expected = flow.step(torch.sin(3 * expected) + 0.1, time, expected).prev_sample
        assert torch.allclose(latent, expected, rtol=0, atol=1e-5)


def test_noise_of_a_flow_is_the_schedulers_and_its_velocity_leads_back(flow):
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64)
    flow.set_timesteps(sigmas=torch.linspace(1, 1 / 10, 10).numpy(), mu=0.5)
    places = [0, 4, 9]
    sigma = flow.sigmas[places].double()
    noisy = flow_noise(clean, noise, sigma)
    assert torch.allclose(noisy, flow.scale_noise(clean, flow.timesteps[places], noise).double(), rtol=0, atol=1e-6)
    for one, at, true, drawn in zip(noisy, sigma, clean, noise, strict=True):
        back = euler_step(one, flow_velocity(true, drawn), at, torch.tensor(0.0))
        assert torch.allclose(back, true, rtol=0, atol=1e-12)


@pytest.mark.parametrize("share", [0.1, 0.37, 0.5, 0.7, 0.95])
def test_equal_shares_of_noise_are_equal_ratios_of_signal_to_noise(share):
    """Measured on noised data: how much of the clean image and of the noise is in it."""
    draw = torch.Generator().manual_seed(4)
    clean, noise = (torch.randn(1000, generator=draw, dtype=torch.float64) for _ in "cn")
    clean, noise = clean / clean.std(), noise / noise.std()
    noised = {
        "diffusion": (clean, clean + sigma_of_noise(share, False) * noise),
        "narrow data": (clean / 2, clean / 2 + sigma_of_noise(share, False, 0.5) * noise),
        "flow": (clean, flow_noise(clean[None], noise[None], torch.tensor([sigma_of_noise(share, True)]))[0]),
    }
    for name, (data, found) in noised.items():
        of_image, of_noise = torch.linalg.lstsq(torch.stack([data, noise], 1), found[:, None]).solution.flatten()
        assert float(of_noise / (of_image * data.std())) == pytest.approx(share / (1 - share), rel=1e-6), name


def test_an_image_without_noise_and_noise_without_an_image():
    assert sigma_of_noise(0.0, False) == sigma_of_noise(0.0, True) == 0
    assert sigma_of_noise(1.0, True) == 1 and sigma_of_noise(1.0, False) == math.inf
    level = noise_levels()[600]  # what DDPM leaves of the image's variance
    share = (1 - level).sqrt() / (level.sqrt() + (1 - level).sqrt())
    assert sigma_of_noise(float(share), False) == pytest.approx(float(((1 - level) / level).sqrt()))
