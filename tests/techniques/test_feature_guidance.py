"""FeatGLaC's energy against loops over every value, and its update against calculus done by hand."""

import numpy as np
import pytest
import torch
from strata.techniques import feature_guidance as featglac


def values(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def soft_mask(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loops(features, source, mask, norm):
    """One plane at one level, one number at a time."""
    batch, channels, height, width = features.shape
    out = []
    for b in range(batch):
        total = 0.0
        for y in range(height):
            for x in range(width):
                for c in range(channels):
                    difference = float(mask[y, x]) * (float(source[b, c, y, x]) - float(features[b, c, y, x]))
                    total += difference**2 if norm == "l2" else abs(difference)
        out.append(total / channels / (1 if norm == "l2" else float(mask.sum())))
    return out


@pytest.mark.parametrize("norm", featglac.NORMS)
def test_the_energy_of_one_term(norm):
    features, source, mask = values(1, 2, 3, 4, 5), values(2, 2, 3, 4, 5), soft_mask(3, 4, 5)
    term = {"l2": featglac.feature_energy_l2, "l1": featglac.feature_energy_l1}[norm]
    assert term(features, source, mask).tolist() == pytest.approx(loops(features, source, mask, norm), rel=1e-12)
    assert (term(features, source, torch.zeros(4, 5, dtype=torch.float64)) == 0).all()
    assert (term(source, source, mask) == 0).all()


@pytest.mark.parametrize("norm", featglac.NORMS)
def test_the_energy_is_the_weighted_sum_over_levels_and_planes(norm):
    sizes = {2: (4, 6), 3: (8, 12)}
    features = {level: values(level, 2, 5 - level, *size) for level, size in sizes.items()}
    sources = {level: values(10 + level, 3, 2, 5 - level, *size) for level, size in sizes.items()}
    masks, level_weights, plane_weights = soft_mask(4, 3, 16, 24), {2: 0.2, 3: 8.5}, [1.0, 0.5, 2.0]
    expected = np.zeros(2)
    for level, (height, width) in sizes.items():
        for plane in range(3):
            factor = 16 // height
            mask = masks[plane].view(height, factor, width, factor).mean((1, 3))
            term = np.array(loops(features[level], sources[level][plane], mask, norm))
            expected += level_weights[level] * plane_weights[plane] * term
    found = featglac.composition_energy(features, sources, masks, level_weights, plane_weights, norm)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-12)
    units = {level: values(20 + level, 2, 5 - level, 1, 1).abs() for level in sizes}
    scaled = ({level: value[level] * units[level] for level in sizes} for value in (features, sources))
    found = featglac.composition_energy(*scaled, masks, level_weights, plane_weights, norm, units)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-12)


def test_half_precision_features_are_compared_in_single():
    features, sources = (
        {1: torch.full((1, 1, 2, 2), 300.0, dtype=torch.float16)},
        {1: torch.zeros(1, 1, 1, 2, 2, dtype=torch.float16)},
    )
    assert featglac.composition_energy(features, sources, torch.ones(1, 2, 2), {1: 1.0}, [1.0]).tolist() == [
        4 * 300.0**2
    ]


@pytest.mark.parametrize("flow", [False, True])
def test_with_linear_features_the_updates_go_straight_to_the_composition(flow):
    """Psi = z: each iteration takes the share 2 eta w / C of the way, to one scene where its mask is and to the other
    elsewhere.
    """
    front, back, latent, sigma = (
        values(1, 1, 4, 3, 3),
        values(2, 1, 4, 3, 3),
        values(3, 1, 4, 3, 3),
        torch.tensor(2.0, dtype=torch.float64),
    )
    masks = torch.stack([1 - torch.eye(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)])
    scale = 1 if flow else (1 + sigma**2).sqrt()
    wanted = featglac.composite_latent(front, back, masks[1])
    assert torch.equal(wanted[..., 1, 1], front[..., 1, 1]) and torch.equal(wanted[..., 0, 1], back[..., 0, 1])
    z, energies = latent / scale, []
    for iteration in range(5):
        z = z.detach().requires_grad_()
        energy = featglac.composition_energy({0: z}, {0: torch.stack([back, front])}, masks, {0: 1.5}, [1.0, 1.0])
        (gradient,) = torch.autograd.grad(energy.sum(), z)
        energies.append(energy.item())
        x = featglac.guided_update(z.detach() * scale, gradient, sigma, 0.4, flow)
        assert torch.allclose(
            x / scale - wanted, (z.detach() - wanted) * (1 - 2 * 0.4 * 1.5 / 4), rtol=0, atol=1e-12
        ), iteration
        z = x / scale
    assert all(later < earlier for earlier, later in zip(energies, energies[1:], strict=False))


def test_planes_are_visible_where_no_nearer_one_covers_them():
    near, middle = torch.zeros(4, 4), torch.zeros(4, 4)
    near[:, 3], middle[:, 2:] = 1, 1
    back_visible, middle_visible, near_visible = featglac.visible_masks([None, middle, near], 4, 4)
    assert torch.equal(near_visible, near) and middle_visible[:, 2].all() and not middle_visible[:, [0, 1, 3]].any()
    assert torch.equal(back_visible + middle_visible + near_visible, torch.ones(4, 4))
    slices = [soft_mask(1, 8, 8) < 0.3, None]
    hard = slices[0].float()
    visible = featglac.visible_masks([1 - hard, hard], 8, 8)  # slices that sum to one stay as they are
    assert torch.equal(visible, torch.stack([1 - hard, hard]))
    assert torch.allclose(
        featglac.visible_masks([None, hard], 2, 2)[1], hard.view(2, 4, 2, 4).mean((1, 3)), rtol=0, atol=1e-6
    )


def test_masks_keep_their_area_at_every_level():
    masks = soft_mask(5, 2, 24, 36)
    for size in ((24, 36), (12, 12), (5, 7)):
        found = featglac.masks_at_level(masks, size)
        assert found.shape == (2, *size)
        if 24 % size[0] == 0 and 36 % size[1] == 0:
            assert torch.allclose(found.mean((1, 2)), masks.mean((1, 2)), rtol=0, atol=1e-6)


def test_the_released_factors():
    gain = 30 * 1.5
    assert [featglac.iteration_factor(i, "l1") / gain for i in range(7)] == pytest.approx(
        [3.5, 1.25, 2.5, 2.5, 1.5, 1.5, 1.5]
    )
    assert [featglac.iteration_factor(i, "l2") for i in range(7)] == [1.0] * 7


def test_level_weights_count_from_the_finest():
    assert featglac.parse_level_weights("0.2, 8.5", 4) == {2: 0.2, 3: 8.5}
    assert featglac.parse_level_weights("0.2, 8.5", 3) == {1: 0.2, 2: 8.5}
    assert featglac.parse_level_weights("0, 1, 0", 3) == {1: 1.0}
    assert featglac.parse_level_weights("", 3) == {}
    for text, word in (
        ("a, b", "not a list"),
        ("1,1,1,1", "3 levels"),
        ("-1", "negative"),
        ("nan", "not finite"),
        ("inf", "not finite"),
    ):
        with pytest.raises(ValueError, match=f"level_weights: .*{word}"):
            featglac.parse_level_weights(text, 3)


def test_block_weights_name_blocks_or_count_from_the_last_usual_one():
    blocks, usual = ["double 0", "double 1", "single 0"], ["double 1", "single 0"]
    assert featglac.parse_block_weights("0.2, 8.5", blocks, usual) == {"double 1": 0.2, "single 0": 8.5}
    assert featglac.parse_block_weights(" 3 ", blocks, usual) == {"single 0": 3.0}
    assert featglac.parse_block_weights("", blocks, usual) == {}
    assert featglac.parse_block_weights("Double  0: 2, single 0:0,", blocks, usual) == {"double 0": 2.0}
    for text, word in (
        ("double 2: 1", "'double 2' is no block"),
        ("double 1: 1, 8.5", "'' is no block"),
        ("double 1:", "'double 1' is no block of this model with a weight"),
        ("double 1: -1", "negative"),
        ("double 1: a", "not a list"),
        ("1, 1, 1", "2 levels"),
    ):
        with pytest.raises(ValueError, match=f"level_weights: .*{word}"):
            featglac.parse_block_weights(text, blocks, usual)


def test_a_channels_unit_is_its_deviation_over_the_scenes():
    draw = torch.Generator().manual_seed(3)
    scenes = torch.randn(3, 2, 5, 3, 4, generator=draw) * torch.tensor([1.0, 90.0, 40.0, 7.0, 10.0]).view(5, 1, 1)
    units = featglac.channel_units(scenes.half())
    assert units.shape == (2, 5, 1, 1) and units.dtype == torch.float32
    for batch in range(2):
        deviation = np.std(scenes[:, batch].half().double().numpy(), axis=(0, 2, 3), ddof=1)
        # A channel that shows next to nothing counts by a tenth of the mean deviation.
        wanted = np.maximum(deviation, deviation.mean() / 10)
        assert wanted[0] > deviation[0] and (wanted[1:] == deviation[1:]).all()
        assert units[batch, :, 0, 0].numpy() == pytest.approx(wanted, rel=1e-5)
