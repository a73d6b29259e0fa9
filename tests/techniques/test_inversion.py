"""Inversion's steps against DDIM written out as it is published, and its schedules against their numbers at 50
steps.
"""

import math

import pytest
import torch
from strata.techniques import inversion, losses
from strata.techniques.diffusion import add_noise, ddim_step, noise_levels

LEVELS = noise_levels()
SIGMAS = ((1 - LEVELS) / LEVELS).sqrt()


def latent(seed, *shape):
    return torch.randn(*(shape or (2, 4, 5, 3)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noise_of(z, time):
    """A stand-in for the network: it depends on the latent in the network's scale and on the timestep."""
    return torch.sin(0.5 * z + time / 1000) + 0.1


def test_ode_step_is_a_ddim_step():
    z, time, after = latent(1), 600, 550
    noise, sigma, below = noise_of(z, time), SIGMAS[time], SIGMAS[after]
    x = z * (1 + sigma**2).sqrt()
    found = inversion.ode_step(x, x, x - sigma * noise, sigma, sigma, below) / (1 + below**2).sqrt()
    assert torch.allclose(found, ddim_step(z, noise, LEVELS[time], LEVELS[after]), rtol=0, atol=1e-12)


def test_an_inversion_step_is_the_released_next_step():
    """null_text_w_ptp: noise of z at the timestep that it goes to, then next_step."""
    z, time, above = latent(1), 550, 600
    noise = noise_of(z, above)
    clean = (z - (1 - LEVELS[time]) ** 0.5 * noise) / LEVELS[time] ** 0.5
    expected = LEVELS[above] ** 0.5 * clean + (1 - LEVELS[above]) ** 0.5 * noise
    sigma, at = SIGMAS[time], SIGMAS[above]
    x = z * (1 + sigma**2).sqrt()
    evaluated = x * inversion.scale_between(sigma, at)
    assert torch.allclose(evaluated / (1 + at**2).sqrt(), z, rtol=0, atol=1e-12)
    found = inversion.ode_step(x, evaluated, evaluated - at * noise, at, sigma, at)
    assert torch.allclose(found / (1 + at**2).sqrt(), expected, rtol=0, atol=1e-12)


def test_flow_steps_follow_the_velocity_in_both_directions():
    x, sigma, other = latent(2), torch.tensor(0.7, dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64)
    velocity = torch.cos(x)
    down = inversion.ode_step(x, x, x - sigma * velocity, sigma, sigma, other)
    assert torch.allclose(down, x - 0.1 * velocity, rtol=0, atol=1e-12)
    assert inversion.scale_between(other, sigma, flow=True) == 1
    up = inversion.ode_step(down, down, down - sigma * velocity, sigma, other, sigma)
    assert torch.allclose(up, x, rtol=0, atol=1e-12)


def test_finer_inversions_come_back_nearer():
    errors = []
    for steps in (10, 20, 40):
        times = list(range(1, 1000, 1000 // steps))
        sigmas = torch.cat([torch.zeros(1, dtype=torch.float64), SIGMAS[times]])
        x = start = latent(3)
        for step, time in enumerate(times):
            evaluated = x * inversion.scale_between(sigmas[step], sigmas[step + 1])
            noise = noise_of(evaluated / (1 + sigmas[step + 1] ** 2).sqrt(), time)
            x = inversion.ode_step(
                x, evaluated, evaluated - sigmas[step + 1] * noise, sigmas[step + 1], sigmas[step], sigmas[step + 1]
            )
        for step, time in reversed(list(enumerate(times))):
            sigma = sigmas[step + 1]
            x = inversion.ode_step(
                x, x, x - sigma * noise_of(x / (1 + sigma**2).sqrt(), time), sigma, sigma, sigmas[step]
            )
        errors.append((x - start).abs().mean().item())
    assert errors[0] > 1.5 * errors[1] > 2.25 * errors[2]


def test_the_trajectory_is_exact_at_its_levels_straight_between_and_ends_where_it_ends():
    sigmas = torch.tensor([9.0, 5.0, 1.0, 0.0])
    latents = latent(4, 4, 2, 4, 3, 3)
    assert all(
        torch.equal(inversion.trajectory_at(latents, sigmas, float(sigma)), one)
        for sigma, one in zip(sigmas, latents, strict=True)
    )
    assert torch.allclose(
        inversion.trajectory_at(latents, sigmas, 4.0), 0.75 * latents[1] + 0.25 * latents[2], rtol=0, atol=1e-12
    )
    noisier = inversion.trajectory_at(latents, sigmas, 18.0)
    assert torch.allclose(noisier - latents[3], 2 * (latents[0] - latents[3]), rtol=0, atol=1e-6)
    flow = inversion.trajectory_at(latents, sigmas / 18, 1.0)  # from half noise to all of it
    assert torch.allclose(latents[0], 0.5 * latents[3] + 0.5 * flow, rtol=0, atol=1e-6)
    assert torch.equal(inversion.trajectory_at(latents[3:], sigmas[3:], 5.0), latents[3])
    assert torch.equal(inversion.trajectory_at(latents[:3], sigmas[:3], 0.5), latents[2])


def test_noised_trajectories_have_the_statistics_of_their_levels():
    clean, noise = latent(5), latent(6)
    found = inversion.noised_trajectory(clean, noise, SIGMAS[[900, 300]])
    for x, time in zip(found, (900, 300), strict=True):
        level = LEVELS[[time] * 2]
        assert torch.allclose(x * LEVELS[time].sqrt(), add_noise(clean, noise, level), rtol=0, atol=1e-12)
    flow = inversion.noised_trajectory(clean, noise, torch.tensor([1.0, 0.25, 0.0], dtype=torch.float64), flow=True)
    assert (
        torch.equal(flow[0], noise)
        and torch.equal(flow[2], clean)
        and torch.allclose(flow[1], 0.75 * clean + 0.25 * noise, rtol=0, atol=1e-12)
    )


@pytest.mark.parametrize("steps", [50, 20, 200])
def test_the_null_text_schedules_are_the_published_ones_at_50_steps_and_span_the_same_range_at_others(steps):
    rates = [inversion.null_text_learning_rate(step, steps) for step in range(steps)]
    limits = [inversion.null_text_tolerance(step, steps) for step in range(steps)]
    if steps == 50:
        assert rates == pytest.approx([1e-2 * (1 - i / 100) for i in range(50)])
        assert limits == pytest.approx([1e-5 + i * 2e-5 for i in range(50)])
    assert rates[0] == 1e-2 and 0.005 <= rates[-1] <= 0.0055 and limits[0] == 1e-5 and 0.9e-3 < limits[-1] <= 1.01e-3


def test_the_null_text_loss_is_measured_in_the_networks_scale():
    x, target, sigma = latent(7), latent(8), torch.tensor(3.0, dtype=torch.float64)
    found = inversion.null_text_loss(x, target, sigma)
    expected = [((x[i] - target[i]) / math.sqrt(10)).square().mean() for i in range(2)]
    assert torch.allclose(found, torch.stack(expected), rtol=0, atol=1e-12)
    assert torch.allclose(inversion.null_text_loss(x, target, sigma, flow=True), found * 10, rtol=0, atol=1e-12)


def test_psnr_equals_scikit_images():
    from skimage.metrics import peak_signal_noise_ratio

    one, other = torch.rand(2, 8, 9, 3, dtype=torch.float64), torch.rand(2, 8, 9, 3, dtype=torch.float64)
    expected = [peak_signal_noise_ratio(b.numpy(), a.numpy(), data_range=1.0) for a, b in zip(one, other, strict=True)]
    assert losses.psnr(one, other, 1.0).tolist() == pytest.approx(expected)
    expected = [
        peak_signal_noise_ratio(b.numpy(), a.numpy(), data_range=float(b.max() - b.min()))
        for a, b in zip(one, other, strict=True)
    ]
    assert losses.psnr(one, other, None).tolist() == pytest.approx(expected)
