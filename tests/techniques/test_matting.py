"""Matting of cuts: closer to the true alpha than the cut itself, sum one, and nothing of the picture is lost."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import binary_dilation
from strata.techniques import matting
from strata.techniques.depth import over_alphas
from strata.techniques.matting import matte, refine_slices, separate_colours

PHOTOGRAPHS = ("GT01", "GT04", "GT13", "GT21", "GT24", "GT27")


def load(folder, name, mode):
    picture = Image.open(folder / f"{name}.png").convert(mode)
    return (
        torch.from_numpy(np.array(picture.resize((picture.width // 2, picture.height // 2), Image.BOX))).float() / 255
    )


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_matte_is_closer_to_the_true_alpha_than_the_cut(shared, name):
    folder = shared / "data" / "matting"
    image, alpha = load(folder, name + "i", "RGB"), load(folder, name + "a", "L")
    cut = (alpha > 0.5).float()
    refined = matte(image, cut, 8)
    sad, mse = (
        [float(f(mask - alpha)) for mask in (cut, refined)]
        for f in (lambda e: e.abs().sum() / 1000, lambda e: (e**2).mean())
    )
    print(f"{name}: SAD {sad[0]:.2f} -> {sad[1]:.2f} (thousands), MSE {mse[0]:.5f} -> {mse[1]:.5f}")
    assert sad[1] < 0.8 * sad[0] and mse[1] < 0.6 * mse[0]


def scene():
    """A red disc with a soft rim over a blue-green gradient: (image, true alpha)."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 80), indexing="ij")
    alpha = ((0.6 - (x**2 + y**2).sqrt()) * 12 + 0.5).clamp(0, 1)
    front = torch.tensor([0.9, 0.15, 0.1]).expand(64, 80, 3)
    back = torch.stack([0.1 + 0 * x, 0.5 + 0.3 * y, 0.8 + 0.1 * x], -1)
    return alpha[..., None] * front + (1 - alpha[..., None]) * back, alpha, front, back


def test_separate_colours_recompose_exactly_and_lose_the_fringe():
    image, alpha, front, back = scene()
    estimated_front, estimated_back = separate_colours(image, alpha)
    share = alpha[..., None]
    assert (share * estimated_front + (1 - share) * estimated_back - image).abs().max() < 1 / 255
    rim = (alpha > 0.3) & (alpha < 0.9)
    assert (estimated_front - front)[rim].abs().mean() < 0.3 * (image - front)[rim].abs().mean()
    assert estimated_front.min() >= 0 and estimated_front.max() <= 1


def test_refine_slices_sums_to_one_and_gives_the_image_back():
    image, alpha, _, _ = scene()
    near = torch.zeros_like(alpha)
    near[40:, :40] = 1
    middle = (alpha > 0.5).float() * (1 - near)
    masks = torch.stack([1 - near - middle, middle, near])
    steps = []
    weights, colours = refine_slices(image, masks, 8, lambda: steps.append(1))
    assert len(steps) == 2 and weights.min() >= 0
    assert (weights.sum(0) - 1).abs().max() < 1e-6
    result = torch.zeros_like(image)
    for colour, share in zip(colours, over_alphas(weights[None])[0][..., None], strict=True):
        result = share * colour + (1 - share) * result
    assert (result - image).abs().max() < 1 / 255
    assert (weights[1] - alpha * (1 - near)).abs().sum() < (masks[1] - alpha * (1 - near)).abs().sum()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.sampled_from([0.0, 0.2, 0.5, 0.97, 1.0]))
def test_separate_colours_holds_the_compositing_equation_for_any_picture_and_alpha(seed, spread):
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(9, 11, 3, generator=generator).round(decimals=seed % 3)
    alpha = torch.lerp(torch.rand(9, 11, generator=generator).round(), torch.rand(9, 11, generator=generator), spread)
    front, back = separate_colours(image, alpha)
    for colours in (front, back):
        assert colours.min() >= 0 and colours.max() <= 1
    share = alpha[..., None].double()
    assert (share * front + (1 - share) * back - image).abs().max() < 1e-5


def test_a_layer_takes_nothing_from_what_nearer_ones_hide():
    """There the farthest layer has the colours that it has without the layer in the middle."""
    image, alpha, _, _ = scene()
    near = torch.zeros_like(alpha)
    near[30:, :50] = 1
    middle = (alpha > 0.5).float() * (1 - near)
    (_, hides), (expected, _) = refine_slices(image, torch.stack([1 - near, near]), 8)
    _, (found, _, _) = refine_slices(image, torch.stack([1 - near - middle, middle, near]), 8)
    assert (hides == 1).sum() > 1000 and (found - expected)[hides == 1].abs().max() < 1e-6


def test_two_cuts_at_one_edge_leave_nothing_in_the_layer_between():
    """A near disc before a far wall, and in the depth a ring of mixed values one pixel wide between them: it is no
    layer.
    """
    image, alpha, _, _ = scene()
    near = (alpha > 0.5).float()
    ring = torch.nn.functional.max_pool2d(near[None], 3, 1, 1)[0] - near
    far_object = torch.zeros_like(near)
    far_object[:12, :12] = 1  # a real one, away from the disc
    middle = torch.maximum(ring, far_object)
    weights, _ = refine_slices(image, torch.stack([1 - near - middle, middle, near]), 8)
    assert weights[1][20:, 20:].max() < 1e-6 and weights[1][:8, :8].min() > 0.9
    assert (weights.sum(0) - 1).abs().max() < 1e-6


def by_pillow(values, size, resample=Image.Resampling.BILINEAR):
    """[H,W] or [H,W,C] at a size (height, width), one channel at a time."""
    planes = np.atleast_3d(np.asarray(values, np.float32))
    found = [np.asarray(Image.fromarray(plane).resize(size[::-1], resample)) for plane in np.moveaxis(planes, 2, 0)]
    return np.stack(found, -1).squeeze().astype(np.float64)


@pytest.mark.parametrize("most", [300, 10**6])
def test_matte_is_the_solution_of_its_system_at_the_size_that_it_may_have(monkeypatch, most):
    """The whole system solved at once, resized by Pillow, in the box around what is open to change."""
    import pymatting

    monkeypatch.setattr(matting, "MAX_SOLVED", most)
    y, x = np.mgrid[0:36, 0:44]
    distance = np.hypot(y - 16.5, x - 20.5)
    alpha = ((8.5 - distance) / 5 + 0.5).clip(0, 1)[..., None]
    image = alpha * [0.9, 0.15, 0.1] + (1 - alpha) * np.dstack([0.1 + 0 * x, 0.3 + y / 90, 0.8 - x / 200])
    image = (image + np.random.default_rng(0).normal(0, 0.03, image.shape)).clip(0, 1)
    mask = (distance < 9).astype(np.float64)
    found = matte(torch.from_numpy(image), torch.from_numpy(mask), 8).numpy()

    reach = 4
    unknown = np.zeros(mask.shape, bool)
    for row in range(36):
        for column in range(44):
            near = mask[max(row - reach, 0) : row + reach + 1, max(column - reach, 0) : column + reach + 1]
            unknown[row, column] = near.min() != near.max()
    rows, columns = np.flatnonzero(unknown.any(1)), np.flatnonzero(unknown.any(0))
    box = tuple(slice(max(places[0] - 2 * reach, 0), places[-1] + 2 * reach + 1) for places in (rows, columns))
    sides = unknown[box].shape
    scale = min(1, (most / (sides[0] * sides[1])) ** 0.5)
    size = tuple(round(side * scale) for side in sides)
    assert (size != sides) == (most == 300)
    known = by_pillow(~unknown[box], size, Image.Resampling.NEAREST).astype(bool).ravel()
    trust = np.where(known, 100, 0.05)
    laplacian = pymatting.cf_laplacian(by_pillow(image[box], size), is_known=known).toarray()
    solved = np.linalg.solve(laplacian + np.diag(trust), trust * by_pillow(mask[box], size).ravel())
    solved = by_pillow(solved.reshape(size), sides).clip(0, 1)
    undecided = (abs(solved - 0.03) < 0.003) | (abs(solved - 0.97) < 0.003)
    solved[solved < 0.03], solved[solved > 0.97] = 0, 1
    expected = mask.copy()
    expected[box] = np.where(unknown[box], solved, mask[box])
    wrong = abs(found - expected)
    wrong[box][undecided] = 0
    assert wrong.max() < 0.002
    for level in (0, 1):
        assert (unknown & (expected == level)).sum() > 10, "some of it is taken for wholly in or out"


@pytest.mark.parametrize(("width", "reach"), [(1, 1), (2, 1), (4, 2), (8, 4)])
def test_an_edge_changes_as_far_as_half_the_width_to_either_side(width, reach):
    mask = (scene()[1] > 0.5).float()
    image = torch.rand(*mask.shape, 3, generator=torch.Generator().manual_seed(0))  # noise: nothing in it is certain
    changed = (matte(image, mask, width) != mask).numpy()

    def near(mask, shape):
        return binary_dilation(mask, shape) & binary_dilation(~mask, shape)

    wide = near(mask.bool().numpy(), np.ones((2 * reach + 1,) * 2))
    narrow = near(mask.bool().numpy(), np.ones((2 * reach - 1,) * 2))
    assert changed.any() and not (changed & ~wide).any() and (changed & ~narrow).any()


def test_a_mask_without_an_edge_stays():
    image, _, _, _ = scene()
    for value in (0.0, 1.0):
        mask = torch.full(image.shape[:2], value)
        assert torch.equal(matte(image, mask, 8), mask)


def test_matting_leaves_the_number_of_threads_as_it_was():
    """numba sets it to the number of cores, for the whole server from then on."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        mask = torch.zeros(24, 24)
        mask[6:18, 6:18] = 1
        refine_slices(
            torch.rand(24, 24, 3, generator=torch.Generator().manual_seed(0)), torch.stack([1 - mask, mask]), 4
        )
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (2, 2), (1, 40), (3, 3), (40, 2)])
def test_pictures_of_a_few_pixels_are_sliced_too(size):
    image, near = torch.rand(*size, 3, generator=torch.Generator().manual_seed(1)), torch.zeros(size)
    near[: (size[0] + 1) // 2, : (size[1] + 1) // 2] = 1
    weights, colours = matting.refine_slices(image, torch.stack([1 - near, near]), 8)
    assert torch.allclose(weights.sum(0), torch.ones(size), rtol=0, atol=1e-6) and colours.isfinite().all()
    assert ((weights[..., None] * colours).sum(0) - image).abs().max() < 1 / 200


def test_the_factor_of_the_matting_system_fits_into_what_is_reserved(monkeypatch):
    """A picture of noise fills it most. pymatting raises when it does not fit."""
    import pymatting

    calls = []
    original = pymatting.ichol
    monkeypatch.setattr(
        pymatting,
        "ichol",
        lambda system, **options: (
            calls.append((system.nnz, options["max_nnz"], original(system, **options))) or calls[-1][2]
        ),
    )
    image = torch.rand(90, 120, 3, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(90, 120)
    mask[:, 60:] = 1
    matting.matte(image, mask, 40)
    ((nnz, reserved, factor),) = calls
    assert reserved == matting.FILL * nnz and factor.L.nnz < reserved / 2
