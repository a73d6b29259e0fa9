"""LayeringDiff's formulas against float64 NumPy, matrices written out, and cases whose answer is known."""

import numpy as np
import pytest
import torch
from strata.techniques import layering
from strata.techniques.diffusion import add_noise, noise_levels, v_target


def draw(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).random(shape))


@pytest.fixture
def scene():
    """Image, alpha with 0, 1 and everything between, and layers that do not add up to it."""
    foreground, background, alpha = draw(2, 3, 9, 7), draw(2, 3, 9, 7, seed=1), draw(2, 1, 9, 7, seed=2)
    alpha[..., :2], alpha[..., 5:] = 0, 1
    image = layering.composite(foreground, background, alpha)
    noise = 0.3 * (draw(2, 2, 3, 9, 7, seed=3) - 0.5)
    return image, alpha, foreground + noise[0], background + noise[1]


def test_a_composite_is_the_sum_of_its_parts(scene):
    f, b, a = (draw(2, n, 3, 4, seed=n + 5).numpy() for n in (3, 3, 1))
    found = layering.composite(*(torch.from_numpy(part) for part in (f, b, a)))
    assert np.allclose(found, a * f + (1 - a) * b, rtol=1e-14, atol=0)


def test_alpha_cells_are_row_by_row():
    alpha = draw(2, 1, 16, 24)
    cells = layering.alpha_cells(alpha)
    assert cells.shape == (2, 64, 2, 3)
    for channel, y, x in ((0, 0, 0), (9, 1, 2), (63, 1, 0), (8, 0, 1)):
        assert torch.equal(cells[:, channel, y, x], alpha[:, 0, 8 * y + channel // 8, 8 * x + channel % 8])


def test_what_is_seen_whole_is_copied_and_nothing_else(scene):
    image, alpha, foreground, background = scene
    front, behind = layering.copy_visible(*scene)
    assert torch.equal(front[..., 5:], image[..., 5:]) and torch.equal(front[..., :5], foreground[..., :5])
    assert torch.equal(behind[..., :2], image[..., :2]) and torch.equal(behind[..., 2:], background[..., 2:])
    almost = torch.full_like(alpha, 1 - 1 / 600)  # what an 8-bit mask cannot tell from 1
    assert torch.equal(layering.copy_visible(image, almost, foreground, background)[0], image)
    for value, copied in ((layering.OPAQUE, image), (1 - 1.5 / 510, foreground)):  # half a step of 8 bits, and more
        assert torch.equal(layering.copy_visible(image, alpha * 0 + value, foreground, background)[0], copied)


def test_exact_layers_add_up_within_their_range(scene):
    image, alpha, *given = scene
    front, behind = layering.exact_layers(image, alpha, *given)
    assert all(part.min() >= 0 and part.max() <= 1 for part in (front, behind))
    assert (layering.composite(front.double(), behind.double(), alpha) - image).abs().max() < 1e-6
    hidden = alpha.expand_as(image) == 1
    assert torch.allclose(behind.double()[hidden], given[1].clamp(0, 1)[hidden], rtol=0, atol=1e-6)


def test_the_change_is_the_smallest_where_nothing_is_clamped():
    """Against least squares with the sum as its constraint, solved pixel by pixel."""
    image, alpha = 0.4 + 0.2 * draw(1, 3, 4, 5), 0.2 + 0.6 * draw(1, 1, 4, 5, seed=1)
    near = [image + 0.05 * (draw(1, 3, 4, 5, seed=seed) - 0.5) for seed in (2, 3)]
    found = [part.double().numpy() for part in layering.exact_layers(image, alpha, *near)]
    for place in np.ndindex(1, 3, 4, 5):
        a = alpha[place[0], 0, place[2], place[3]].item()
        row = np.array([[a, 1 - a]])
        missing = image[place].item() - row @ np.array([part[place].item() for part in near])
        change = np.linalg.lstsq(row, missing, rcond=None)[0]  # of least norm
        for part, other, own in zip(found, near, change, strict=True):
            assert part[place] == pytest.approx(other[place].item() + own, abs=1e-6)


def test_one_step_of_the_spreading_is_a_weighted_mean_of_the_least_changes(scene, monkeypatch):
    """Against sums over all pixels, in float64; the borders are repeated as far as the Gaussian reaches."""
    sigma, reach = 1.5, 4
    monkeypatch.setattr(layering, "SPREAD", (sigma,))
    image, alpha, *layers = scene
    found = layering.spread_residual(image, alpha, *layers)
    padding = [(0, 0), (0, 0), (reach, reach), (reach, reach)]
    distance = np.arange(-reach, reach + 1)
    gauss = np.exp(-0.5 * (distance[:, None] ** 2 + distance**2) / sigma**2)
    gauss = gauss / gauss.sum()
    image, alpha, front, behind = (np.pad(part.numpy(), padding, "edge") for part in (image, alpha, *layers))
    missing = image - alpha * front - (1 - alpha) * behind
    for layer, share, result in ((front, alpha, found[0]), (behind, 1 - alpha, found[1])):
        change = share * missing / (alpha**2 + (1 - alpha) ** 2)
        for place in np.ndindex(result.shape):
            n, channel, y, x = place
            area = (slice(y, y + 2 * reach + 1), slice(x, x + 2 * reach + 1))
            weight = gauss * share[n, 0][area] ** 4
            expected = layer[n, channel, y + reach, x + reach] + (weight * change[n, channel][area]).sum() / (
                weight.sum() + 0.01
            )
            assert result[place].item() == pytest.approx(expected, abs=1e-12)


def test_an_error_that_changes_slowly_is_found_where_little_is_seen():
    """A tint of each layer, known where it is all that is seen; a few pixels on it is gone too."""
    alpha = torch.linspace(-1, 2, 64, dtype=torch.float64).clamp(0, 1).expand(1, 1, 8, 64)
    colours = [torch.full((1, 3, 8, 64), value, dtype=torch.float64) for value in (0.7, 0.3)]
    image = layering.composite(*colours, alpha)
    off = colours[0] + 0.1, colours[1] - 0.05
    found = layering.spread_residual(image, alpha, *off)
    for given, true, made, share in zip(off, colours, found, (alpha, 1 - alpha), strict=True):
        seen = (share > 0.5).expand_as(true)
        assert (made - true)[seen].abs().max() < 0.4 * (given - true)[seen].abs().max()
        assert (made - true).abs().max() <= 1.1 * (given - true).abs().max()
    again = layering.spread_residual(image, alpha, *colours)
    assert all(torch.allclose(one, other, rtol=0, atol=1e-12) for one, other in zip(again, colours, strict=True))


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-4, 1 - 1e-4])
def test_exact_layers_are_finite_at_the_ends_of_alpha(value):
    image, layers = draw(1, 3, 5, 4), [draw(1, 3, 5, 4, seed=seed) for seed in (1, 2)]
    alpha = torch.full((1, 1, 5, 4), value, dtype=torch.float64)
    front, behind = layering.exact_layers(image, alpha, *layers)
    assert front.isfinite().all() and behind.isfinite().all()
    assert (layering.composite(front.double(), behind.double(), alpha) - image).abs().max() < 1e-6


def transform(size):
    """The orthonormal Haar matrix of one step: halves of sums, then of differences."""
    low, high = np.zeros((2, size // 2, size))
    for i in range(size // 2):
        low[i, 2 * i : 2 * i + 2] = 0.5**0.5
        high[i, 2 * i : 2 * i + 2] = 0.5**0.5, -(0.5**0.5)
    return low, high


def test_haar_bands_are_those_of_the_orthonormal_matrices():
    image = draw(2, 3, 16, 24)
    rest = image.numpy()
    for bands in layering.haar_bands(image, 3):
        (low_y, high_y), (low_x, high_x) = transform(rest.shape[2]), transform(rest.shape[3])
        expected = [high_y @ rest @ low_x.T, low_y @ rest @ high_x.T, high_y @ rest @ high_x.T]
        assert np.allclose(bands, np.stack(expected, 2), rtol=0, atol=1e-12)
        rest = low_y @ rest @ low_x.T
    # Orthonormal: all bands and the rest hold the image's energy.
    total = sum(bands.square().sum() for bands in layering.haar_bands(image, 3)).item() + np.square(rest).sum()
    assert total == pytest.approx(image.square().sum().item(), rel=1e-12)


def test_a_flat_image_has_no_detail_at_any_size():
    assert all(bands.abs().max() < 1e-12 for bands in layering.haar_bands(torch.full((1, 3, 13, 9), 0.7).double(), 3))


def test_the_losses_are_their_definitions():
    prediction, truth, decoded = (draw(2, 3, 16, 8, seed=seed) for seed in range(3))
    alpha = draw(2, 1, 16, 8, seed=4).round()
    details = 0
    for one, other in zip(layering.haar_bands(prediction, 3), layering.haar_bands(decoded, 3), strict=True):
        for k in range(3):
            details += np.square(one[:, :, k].numpy() - other[:, :, k].numpy()).mean()
    assert layering.high_frequency_loss(prediction, decoded).item() == pytest.approx(details, rel=1e-12)
    mse = np.square((prediction - truth).numpy()).mean()
    assert layering.background_loss(prediction, truth, decoded).item() == pytest.approx(mse + 0.2 * details, rel=1e-12)
    weight = np.where(alpha.numpy() > 0, 1, 0.1)
    expected = (np.square((prediction - truth).numpy()) * weight).mean()
    assert layering.foreground_loss(prediction, truth, alpha).item() == pytest.approx(expected, rel=1e-12)


def test_a_perfect_v_leads_back_to_the_image():
    clean, noise, levels = draw(3, 4, 2, 2), draw(3, 4, 2, 2, seed=1), noise_levels()[[0, 500, 999]]
    noisy, v = add_noise(clean, noise, levels), v_target(clean, noise, levels)
    for i, level in enumerate(levels):
        back = level.sqrt() * noisy[i] - (1 - level).sqrt() * v[i]
        assert torch.allclose(back, clean[i], rtol=0, atol=1e-12)


def test_shares_of_what_is_seen_become_alphas_and_whole_masks_stay():
    own = torch.tensor([0.0, 0.5, 1.0, 0.25], dtype=torch.float64)
    behind = torch.tensor([0.75, 1.0, 0.5, 0.8], dtype=torch.float64)
    seen = (1 - own) * behind
    assert torch.allclose(layering.visible_to_own(torch.stack([own, seen]))[0], own, rtol=0, atol=1e-12)
    found = layering.visible_to_own(torch.stack([own, seen]))[1]
    assert torch.allclose(found[[0, 1, 3]], behind[[0, 1, 3]], rtol=0, atol=1e-12) and found[2] == 0
    left = torch.tensor([4e-7, 1.2e-6], dtype=torch.float64)  # less than a millionth is noise, and counts as one
    shares = torch.stack([1 - left, left / 2])
    assert torch.allclose(layering.visible_to_own(shares)[1], torch.tensor([0.2, 0.5]).double(), rtol=1e-6, atol=0)
    whole = torch.tensor([[1.0, 0.6], [0.9, 0.9]], dtype=torch.float64)  # the second goes on behind the first
    assert torch.equal(layering.visible_to_own(whole), whole)
    assert torch.equal(layering.visible_to_own(whole[:1]), whole[:1])
