"""Transparent latents' mathematics against what is published of it, and alphas cleaned of what no object has."""

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.transform import resize_local_mean
from strata.techniques.transparency import (
    FACTOR,
    PASSES,
    clean_alpha,
    extend_colours,
    median_of_passes,
    over_gray,
    turned,
)


def disc(side: int = 48) -> torch.Tensor:
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    return torch.from_numpy(np.clip(side / 4 + 0.5 - np.hypot(x, y), 0, 1)).float()[None, None]


def test_pictures_are_mirrored_and_then_turned_as_pillow_does_it():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7), np.uint8)
    for flip in (False, True):
        for quarters in (-1, 0, 1, 2, 3):
            picture = Image.fromarray(pixels)
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else picture
            expected = np.asarray(picture.rotate(90 * quarters, expand=True))
            assert np.array_equal(turned(torch.from_numpy(pixels)[None], flip, quarters)[0].numpy(), expected)


def test_extend_colours_keeps_opaque_pixels_and_continues_a_flat_colour_everywhere():
    alpha = disc()
    colour = torch.tensor([0.9, 0.2, 0.4]).view(1, 3, 1, 1) * torch.ones(1, 3, 48, 48)
    noise = torch.rand(1, 3, 48, 48)
    filled = extend_colours(torch.where(alpha > 0, colour, noise), alpha)
    assert torch.allclose(filled, colour, rtol=0, atol=1e-5)
    picture = torch.rand(1, 3, 48, 48)
    assert torch.allclose(
        (extend_colours(picture, alpha) - picture).abs() * (alpha == 1), torch.zeros(1), rtol=0, atol=1e-6
    )


def test_extend_colours_mixes_only_what_is_visible_and_leaves_no_step_at_the_edge():
    alpha = disc(64)
    ramp = torch.linspace(0.3, 0.7, 64).view(1, 1, 1, 64).expand(1, 3, 64, 64)
    filled = extend_colours(ramp * (alpha > 0), alpha)
    visible = ramp[(alpha > 0).expand_as(ramp)]
    assert filled.min() >= visible.min() - 1e-5 and filled.max() <= visible.max() + 1e-5
    plain = ramp * alpha
    across = torch.maximum(filled.diff(dim=-1).abs(), torch.zeros(1)).max()
    assert across < 0.05 < plain.diff(dim=-1).abs().max()


def test_extend_colours_takes_each_sides_own_colour():
    alpha = torch.zeros(1, 1, 40, 80)
    alpha[..., 10:30, 10:30] = alpha[..., 10:30, 50:70] = 1
    colour = torch.zeros(1, 3, 40, 80)
    colour[:, 0, :, :40], colour[:, 2, :, 40:] = 1, 1
    filled = extend_colours(colour, alpha)
    assert filled[0, 0, 20, 5] > 0.8 and filled[0, 2, 20, 75] > 0.8
    assert torch.equal(extend_colours(colour, torch.zeros_like(alpha)), torch.zeros_like(colour))


def test_over_gray_is_what_layerdiffuse_shows_its_autoencoder():
    colour, alpha = torch.rand(2, 3, 5, 5, dtype=torch.float64), torch.rand(2, 1, 5, 5, dtype=torch.float64)
    assert torch.allclose(over_gray(colour, alpha) * 2 - 1, (2 * colour - 1) * alpha, rtol=0, atol=1e-12)


def test_extend_colours_is_the_published_padding():
    """Its pyramid of exact areas by scikit-image, in float64, and back up by bilinear interpolation."""
    generator = torch.Generator().manual_seed(0)
    colour, alpha = torch.rand(3, 45, 70, generator=generator, dtype=torch.float64), disc(70)[0, 0, 10:55].double()
    levels = [torch.cat([colour * alpha, alpha[None]]).permute(1, 2, 0).numpy()]
    while min(levels[-1].shape[:2]) > 1:
        levels.append(
            resize_local_mean(
                levels[-1], tuple(max(1, int(side / FACTOR)) for side in levels[-1].shape[:2]), channel_axis=-1
            )
        )
    filled = (levels[-1][..., :3].sum((0, 1)) / levels[-1][..., 3].sum())[None, None]
    for level in reversed(levels):
        up = torch.nn.functional.interpolate(
            torch.from_numpy(filled).permute(2, 0, 1)[None], level.shape[:2], mode="bilinear"
        )
        filled = up[0].permute(1, 2, 0).numpy() * (1 - level[..., 3:]) + level[..., :3]
    found = extend_colours(colour[None], alpha[None, None])[0].permute(1, 2, 0)
    assert np.abs(found.numpy() - filled).max() < 1e-9


def test_pictures_of_a_batch_are_extended_each_by_itself():
    colour, alpha = torch.rand(3, 3, 20, 31), torch.rand(3, 1, 20, 31).sub(0.5).clamp_min(0)
    alpha[1] *= 0.1
    for one, found in enumerate(extend_colours(colour, alpha)):
        assert torch.allclose(found, extend_colours(colour[[one]], alpha[[one]])[0], rtol=0, atol=1e-6)


def decode_by_place(image, latent):
    """Depends on where things lie."""
    rows = torch.linspace(0, 0.3, 16)[:, None]
    return torch.cat([image, image[:, :1]], 1) * latent[..., :1, :1].mean(1, keepdim=True) + rows


def view(image, latent, flip, turns):
    """One pass by NumPy."""
    parts = [part.numpy()[..., ::-1] if flip else part.numpy() for part in (image, latent)]
    parts = [torch.from_numpy(np.rot90(part, turns, (2, 3)).copy()) for part in parts]
    out = np.rot90(decode_by_place(*parts).clamp(0, 1).numpy(), -turns, (2, 3))
    return out[..., ::-1] if flip else out


def test_eight_passes_are_the_lower_middle_of_every_mirrored_and_turned_view():
    image, latent = torch.rand(1, 3, 16, 16), torch.rand(1, 4, 2, 2)
    expected = np.sort(np.stack([view(image, latent, flip, turns) for flip in (False, True) for turns in range(4)]), 0)
    for passes in ((), (8,)):
        found = median_of_passes(decode_by_place, image, latent, *passes)
        assert np.abs(found.numpy() - expected[3]).max() < 1e-6


@pytest.mark.parametrize("passes", [1, 2, 4])
def test_fewer_passes_are_the_median_of_their_views_for_each_picture_of_a_batch(passes):
    generator = torch.Generator().manual_seed(3)
    image, latent = torch.rand(3, 3, 16, 16, generator=generator), torch.rand(3, 4, 2, 2, generator=generator)
    expected = np.median([view(image, latent, flip, turns) for flip, turns in PASSES[passes]], 0)
    found = median_of_passes(decode_by_place, image, latent, passes)
    assert found.shape == expected.shape and np.abs(found.numpy() - expected).max() < 1e-6


def test_veil_and_specks_begin_at_ten_of_255_and_at_a_fiftieth_of_the_largest_part():
    alpha = torch.zeros(1, 1, 60, 60)
    alpha[0, 0, :10, :5] = 1  # the object, 50 in all
    alpha[0, 0, 20, 20] = 1  # exactly a fiftieth of it
    alpha[0, 0, 40:50, :40] = 10.5 / 255  # above the veil, and 16 in all
    expected = alpha.clone()
    alpha[0, 0, 20, 30] = 0.99  # less than a fiftieth
    alpha[0, 0, :30, 40:] = 9.98 / 255  # a veil, and 23 in all
    assert torch.equal(clean_alpha(alpha), expected)


def test_veil_and_specks_go_and_the_object_with_its_edge_stays():
    alpha = torch.zeros(3, 1, 40, 60)
    ramp = torch.linspace(0, 1, 12)
    alpha[0, 0, 10:30, 10:22] = ramp  # an object with a soft left edge, 20 × 12
    alpha[0, 0, 5:9, 40:44] = 0.9  # another part, 13 % of it: a second object
    expected = alpha.clone()
    alpha[0, 0, 35, 55] = 1.0  # a speck
    alpha[0] = torch.where(alpha[0] == 0, 8 / 255, alpha[0])  # a veil over all
    alpha[1] = 9 / 255  # nothing but a veil: smoke, perhaps
    alpha[2, 0, 3:6, 3:6] = 0.5
    expected[1:] = alpha[1:]
    found = clean_alpha(alpha)
    assert torch.equal(found[1:], expected[1:])
    away = torch.nn.functional.max_pool2d((expected[:1] > 0).float(), 5, 1, 2) == 0
    assert found[0, 0][away[0, 0]].max() == 0, "veil and speck are gone"
    assert torch.equal(found[0][expected[0] > 10 / 255], expected[0][expected[0] > 10 / 255])
    ring = torch.nn.functional.max_pool2d((expected[:1] > 10 / 255).float(), 3, 1, 1).bool() & (
        expected[:1] <= 10 / 255
    )
    assert torch.equal(found[:1][ring], alpha[:1][ring]), "one pixel of the edge stays"
