"""Losses and measures against NumPy and scikit-image."""

import numpy as np
import pytest
import torch
from strata.techniques.losses import expected_composite_error, gradient_loss, psnr


def test_gradient_loss_is_the_mean_difference_of_neighbour_steps():
    a, b = torch.rand(2, 3, 5, 7, dtype=torch.float64), torch.rand(2, 3, 5, 7, dtype=torch.float64)
    expected = sum(np.abs(np.diff(a.numpy(), axis=axis) - np.diff(b.numpy(), axis=axis)).mean() for axis in (2, 3))
    assert gradient_loss(a, b).item() == pytest.approx(expected, rel=1e-12)
    assert gradient_loss(a + 0.3, a).item() == pytest.approx(0, abs=1e-12)


def test_psnr_is_that_of_scikit_image():
    from skimage.metrics import peak_signal_noise_ratio

    a, b = torch.rand(3, 3, 8, 8, dtype=torch.float64), torch.rand(3, 3, 8, 8, dtype=torch.float64)
    expected = [peak_signal_noise_ratio(x.numpy(), y.numpy(), data_range=1) for x, y in zip(a, b, strict=True)]
    assert psnr(a, b).tolist() == pytest.approx(expected, rel=1e-12)


def test_the_expected_error_is_the_mean_over_many_random_backgrounds():
    rng = np.random.default_rng(0)
    one, other = rng.random((2, 1, 4, 5, 6))
    errors = []
    for _ in range(20000):
        below = rng.random((1, 3, 5, 6))
        shown = [rgba[:, :3] * rgba[:, 3:] + below * (1 - rgba[:, 3:]) for rgba in (one, other)]
        errors.append(np.square(shown[0] - shown[1]).mean())
    found = expected_composite_error(torch.from_numpy(one), torch.from_numpy(other)).item()
    assert found == pytest.approx(np.mean(errors), abs=4 * np.std(errors) / 20000**0.5)
    # a fixed background is one of no variance
    shown = [rgba[:, :3] * rgba[:, 3:] + 0.2 * (1 - rgba[:, 3:]) for rgba in (one, other)]
    fixed = expected_composite_error(torch.from_numpy(one), torch.from_numpy(other), 0.2, 0.0).item()
    assert fixed == pytest.approx(np.square(shown[0] - shown[1]).mean(), rel=1e-12)
