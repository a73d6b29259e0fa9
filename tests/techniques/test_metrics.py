"""Measures against another way of computing them, and against what they should mean on rendered scenes."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import torch
from strata.scenes import renderer
from strata.scenes.renderer import Request
from strata.techniques import metrics

from .draws import random


def picture(array):
    return torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1)[None].double()


def solid_scene(seed, count=1):
    """A scene of solid objects, no smoke or glass, by daylight."""
    names = [name for name, entry in renderer.catalogue().items() if entry.material == "solid" and entry.hover == 0]
    rng = np.random.default_rng(seed)
    return renderer.render(
        Request(
            kind=str(rng.choice(["meadow", "beach", "tiles"])), objects=tuple(rng.choice(names, count, replace=False))
        ),
        128,
        128,
        seed,
    )


def test_a_placement_is_the_box_around_the_object_and_what_it_covers():
    for seed in range(6):
        scene = renderer.render(Request(count=1), 96, 160, seed)
        alpha = picture(scene.objects[0].rgba)[:, 3:]
        rows, columns = np.nonzero(alpha[0, 0].numpy() > 0.5)
        (top, bottom), (left, right) = ((values.min(), values.max() + 1) for values in (rows, columns))
        expected = len(rows) / (96 * 160), max((bottom - top) / 96, (right - left) / 160)
        expected += (top + bottom) / 2 / 96, (left + right) / 2 / 160
        assert metrics.placement(alpha)[0].tolist() == pytest.approx(expected)
    assert metrics.placement(torch.zeros(2, 1, 4, 4)).isnan().all()
    assert metrics.placement(torch.ones(1, 1, 4, 4)).tolist() == [[1, 1, 0.5, 0.5]]


def test_ssim_is_the_formula_of_its_paper():
    a, b = random(2, 3, 14, 15), random(2, 3, 14, 15, seed=1)
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    for got, one, two in zip(metrics.ssim(a, b), a.numpy(), b.numpy(), strict=True):
        values = []
        for x, y in zip(one, two, strict=True):
            for row in range(5, 9):
                for column in range(5, 10):
                    p, q = (z[row - 5 : row + 6, column - 5 : column + 6] for z in (x, y))
                    mp, mq = (window * p).sum(), (window * q).sum()
                    vp, vq, cov = (
                        (window * p * p).sum() - mp**2,
                        (window * q * q).sum() - mq**2,
                        (window * p * q).sum() - mp * mq,
                    )
                    values.append((2 * mp * mq + 1e-4) * (2 * cov + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
        assert got.item() == pytest.approx(np.mean(values), rel=1e-6)
    assert metrics.ssim(a, a).tolist() == pytest.approx([1, 1])
    with pytest.raises(ValueError):
        metrics.ssim(a, a[:1])


def test_alpha_measures_are_their_sums_over_pixels():
    a, b = random(3, 1, 6, 5), random(3, 1, 6, 5, seed=1)
    for index in range(3):
        pairs = list(zip(a[index].reshape(-1).tolist(), b[index].reshape(-1).tolist(), strict=True))
        assert metrics.alpha_sad(a, b)[index].item() == pytest.approx(sum(abs(p - q) for p, q in pairs))
        assert metrics.alpha_mse(a, b)[index].item() == pytest.approx(sum((p - q) ** 2 for p, q in pairs) / 30)
        assert metrics.alpha_iou(a, b)[index].item() == pytest.approx(sum(map(min, pairs)) / sum(map(max, pairs)))
    hard, other = (a > 0.5).double(), (b > 0.5).double()
    expected = [
        np.logical_and(p, q).sum() / np.logical_or(p, q).sum() for p, q in zip(hard.numpy(), other.numpy(), strict=True)
    ]
    assert metrics.alpha_iou(hard, other).tolist() == pytest.approx(expected)
    assert metrics.alpha_iou(hard * 0, hard * 0).tolist() == [1, 1, 1]


def test_layer_rgb_l1_is_weighted_by_the_true_alpha_alone():
    a, b = random(2, 4, 6, 5), random(2, 4, 6, 5, seed=1)
    expected = [
        np.average(np.abs(p[:3] - q[:3]).mean(0), weights=q[3]) for p, q in zip(a.numpy(), b.numpy(), strict=True)
    ]
    assert metrics.layer_rgb_l1(a, b).tolist() == pytest.approx(expected)
    a[:, 3] = 0
    assert metrics.layer_rgb_l1(a, b).tolist() == pytest.approx(expected)


def test_a_layer_whose_colours_under_zero_alpha_differ_is_no_worse():
    item = solid_scene(3).objects[0].rgba
    changed = item.copy()
    changed[item[..., 3] == 0, :3] = 0.7
    assert metrics.layer_rgb_l1(picture(changed), picture(item)).item() == 0
    changed[..., :3] = np.clip(item[..., :3] + 0.1, 0, None)
    assert metrics.layer_rgb_l1(picture(changed), picture(item)).item() == pytest.approx(0.1, rel=1e-4)


def test_mask_error_is_the_weighted_mean_and_nan_without_a_mask():
    a, b, mask = random(2, 3, 6, 5), random(2, 3, 6, 5, seed=1), random(2, 1, 6, 5, seed=2)
    expected = [
        np.average(np.abs(p - q).mean(0), weights=m[0])
        for p, q, m in zip(a.numpy(), b.numpy(), mask.numpy(), strict=True)
    ]
    assert metrics.mask_error(a, b, mask).tolist() == pytest.approx(expected)
    assert metrics.mask_error(a, b, mask * 0).isnan().all()


def test_shadow_band_is_the_grown_shadow_outside_objects():
    scene = solid_scene(1, 3)
    shadow, alpha = (
        np.stack([layer[..., 3] for layer in layers])
        for layers in ([o.shadow for o in scene.objects], [o.rgba for o in scene.objects])
    )
    band = metrics.shadow_band(torch.from_numpy(shadow)[None], torch.from_numpy(alpha)[None], 3)
    expected = scipy.ndimage.binary_dilation(shadow.max(0) > 0.05, np.ones((7, 7))) & (alpha.max(0) < 0.05)
    assert np.array_equal(band[0, 0].numpy() > 0, expected)


@pytest.mark.parametrize("seed", range(6))
def test_shadow_error_grows_without_the_shadow_and_with_a_wrong_one(seed):
    scene = solid_scene(seed)
    item = scene.objects[0]
    band = metrics.shadow_band(
        torch.from_numpy(item.shadow[None, None, ..., 3]), torch.from_numpy(item.rgba[None, None, ..., 3]), 4
    )
    truth = picture(scene.composite)

    def error(shadow):
        return metrics.mask_error(
            picture(renderer.over(item.rgba, renderer.over(shadow, scene.background))), truth, band
        ).item()

    none, half = item.shadow * [1, 1, 1, 0], item.shadow * [1, 1, 1, 0.5]
    assert error(item.shadow) < 1e-6 < error(half) < error(none)
    assert error(item.shadow[:, ::-1]) > error(item.shadow)
    assert error(none) > 0.02


def test_beyond_shadow_is_the_least_difference_to_a_shadowed_background_and_its_median():
    shown, empty = random(2, 3, 9, 8), random(2, 3, 9, 8, seed=1)
    shades = [0.5 + step / 64 for step in range(33)]
    least, medians = np.zeros((2, 9, 8)), np.zeros((2, 9, 8))
    for at in np.ndindex(least.shape):
        one, other = (values[at[0], :, *at[1:]].numpy() for values in (shown, empty))
        least[at] = min(np.abs(one - share * other).max() for share in shades)
    for image, y, x in np.ndindex(least.shape):
        medians[image, y, x] = np.median(np.pad(least[image], 1, mode="edge")[y : y + 3, x : x + 3])
    for window, expected in ((1, least), (3, medians)):
        found = metrics.beyond_shadow(shown, empty, window=window)[:, 0].numpy()
        assert np.allclose(found, expected, rtol=0, atol=1e-6)
    assert (
        metrics.beyond_shadow(empty * 0.6, empty).max() < 1 / 64
        and metrics.beyond_shadow(empty * 0.3, empty).max() > 0.05
    )


@pytest.mark.parametrize("seed", range(6))
def test_beyond_shadow_finds_the_object_and_not_its_shadow(seed):
    scene = solid_scene(seed)
    alpha = (torch.from_numpy(scene.objects[0].rgba[None, None, ..., 3]) > 0.5).float()
    composite, empty = picture(scene.composite), picture(scene.background)
    plain = (composite - empty).abs().amax(1, keepdim=True)
    found, with_shadow = (
        metrics.alpha_iou(alpha, (values > 0.06).float()).item()
        for values in (metrics.beyond_shadow(composite, empty), plain)
    )
    assert found > 0.8 and found > with_shadow + 0.05, (found, with_shadow)
    lines = composite.clone()
    lines[..., 4::8, :] = 1 - lines[..., 4::8, :]  # as thin as outlines that moved
    assert metrics.beyond_shadow(lines, composite).max() < 0.06


def test_colour_ratio_and_lighting_error_are_ratios_of_mean_colours():
    a, b, mask = random(2, 3, 6, 5), random(2, 3, 6, 5, seed=1), random(2, 1, 6, 5, seed=2)
    means = [[np.average(channel, weights=m[0]) for channel in p] for p, m in zip(a.numpy(), mask.numpy(), strict=True)]
    true = [[np.average(channel, weights=m[0]) for channel in p] for p, m in zip(b.numpy(), mask.numpy(), strict=True)]
    assert np.allclose(metrics.colour_ratio(a, b, mask).numpy(), np.array(means) / true, rtol=5e-3)
    expected = np.abs(np.log((np.array(means) + 1e-3) / (np.array(true) + 1e-3))).mean(1)
    assert metrics.lighting_error(a, b, mask).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(4))
def test_an_object_half_as_bright_has_a_lighting_error_of_ln_2(seed):
    scene = solid_scene(seed)
    item = scene.objects[0]
    mask = picture(item.rgba[..., 3:] > 0.99)
    darker = picture(renderer.over(item.rgba * np.float32([0.5, 0.5, 0.5, 1]), scene.composite))
    truth = picture(scene.composite)
    assert metrics.lighting_error(darker, truth, mask).item() == pytest.approx(math.log(2), rel=0.02)
    assert metrics.lighting_error(truth, darker, mask).item() == pytest.approx(math.log(2), rel=0.02)
    redder = truth * torch.tensor([1.2, 1.0, 1.0]).double()[:, None, None]
    assert metrics.colour_ratio(redder, truth, mask)[0].tolist() == pytest.approx([1.2, 1, 1], rel=0.01)


def test_seam_error_is_the_mean_over_neighbour_steps_at_the_border():
    a, b = random(1, 3, 12, 10), random(1, 3, 12, 10, seed=1)
    mask = np.zeros((12, 10), bool)
    mask[4:9, 3:8] = True
    band = scipy.ndimage.binary_dilation(mask, np.ones((3, 3))) & ~scipy.ndimage.binary_erosion(mask, np.ones((3, 3)))
    one, two, values = a[0].numpy(), b[0].numpy(), []
    for row in range(12):
        for column in range(10):
            for down, right in ((1, 0), (0, 1)):
                if row + down < 12 and column + right < 10 and band[row, column] and band[row + down, column + right]:
                    steps = [p[:, row + down, column + right] - p[:, row, column] for p in (one, two)]
                    values.append(np.abs(steps[0] - steps[1]).mean())
    assert metrics.seam_error(a, b, torch.from_numpy(mask)[None, None].double(), 1).item() == pytest.approx(
        np.mean(values)
    )


@pytest.mark.parametrize("seed", range(6))
def test_a_shifted_or_badly_cut_paste_has_a_seam(seed):
    scene = solid_scene(seed)
    item, truth = scene.objects[0], picture(scene.composite)
    mask = picture(item.mask[..., None])

    def error(rgba):
        return metrics.seam_error(
            picture(renderer.over(rgba, renderer.over(item.shadow, scene.background))), truth, mask
        ).item()

    shifted = [np.roll(item.rgba, pixels, 1) for pixels in (1, 3)]
    fringe = np.where(item.rgba[..., 3:] > 0, np.float32([0, 0, 0, 1]), item.rgba)
    fringe[item.rgba[..., 3] > 0.99] = item.rgba[item.rgba[..., 3] > 0.99]
    assert error(item.rgba) < 1e-6
    assert 0.01 < error(shifted[0]) < error(shifted[1])
    assert error(fringe) > 0.01
    brighter = truth * (1 - mask) + (truth + 0.1) * mask
    assert 0 < metrics.seam_error(brighter, truth, mask).item() < 0.1


def test_frechet_distance_is_that_of_scipys_matrix_root():
    a, b = random(40, 7), random(60, 7, seed=1) ** 2 + 0.2
    one, two = np.cov(a.numpy().T), np.cov(b.numpy().T)
    root = scipy.linalg.sqrtm(one @ two).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum().item() + np.trace(one + two - 2 * root)
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert metrics.frechet_distance(a, a + 0.5) == pytest.approx(7 * 0.25, rel=1e-9)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    few = random(5, 7, seed=2)  # fewer pictures than features: the covariance has no full rank
    assert metrics.frechet_distance(few, few.flip(0)) == pytest.approx(0, abs=1e-6)


def test_kernel_distance_is_its_double_sum():
    a, b = random(6, 4), random(5, 4, seed=1) + 0.3

    def mean(x, y, same):
        values = [
            (np.dot(p, q) / 4 + 1) ** 3
            for i, p in enumerate(x.numpy())
            for j, q in enumerate(y.numpy())
            if not (same and i == j)
        ]
        return np.mean(values)

    expected = mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False)
    assert metrics.kernel_distance(a, b) == pytest.approx(expected, rel=1e-9)
    halves = random(400, 4, seed=2).split(200)
    assert abs(metrics.kernel_distance(*halves)) < 0.05 * metrics.kernel_distance(halves[0], halves[1] + 0.3)
