"""BFS's formulas against loops over pixels."""

import numpy as np
import pytest
import torch
from strata.techniques import layering
from strata.techniques.back_to_front import box_of, colour_with_shadow, opacity_with_shadow


def test_a_box_spans_what_is_marked():
    masks = torch.from_numpy(np.random.default_rng(0).random((6, 9, 7)) ** 8)
    masks[4] = 0
    masks[5, 3:5, 2] = 1
    for mask, found in zip(masks, box_of(masks), strict=True):
        places = np.argwhere(mask.numpy() > 0.5)
        expected = np.zeros(mask.shape)
        if len(places):
            (top, left), (bottom, right) = places.min(0), places.max(0) + 1
            expected[top:bottom, left:right] = 1
        assert np.array_equal(found.numpy(), expected)
    assert box_of(torch.full((1, 2, 2), 0.5)).sum() == 0


def test_a_known_object_with_a_known_black_shadow_comes_back():
    """Both laid over white and black by Eq. 1, layer by layer, in float64."""
    rng = np.random.default_rng(0)
    colour, alpha, cast = rng.random((2, 3, 5, 7)), rng.random((2, 1, 5, 7)), rng.random((2, 1, 5, 7))
    alpha[0, :, :2], alpha[0, :, 2], cast[0, :, 0] = 0, 1, 0  # neither, a shadow alone, and an object that hides it
    shadowed = alpha * colour + (1 - alpha) * (1 - cast)
    both = 1 - (1 - alpha) * (1 - cast)
    background = rng.random((2, 3, 5, 7))
    composite = alpha * colour + (1 - alpha) * (1 - cast) * background
    known, given, own = (torch.from_numpy(part) for part in (alpha * colour, shadowed, alpha))
    opacity = opacity_with_shadow(known, given, own)
    assert torch.allclose(opacity, torch.from_numpy(both), rtol=0, atol=1e-12)
    found = colour_with_shadow(given, opacity)
    # black has no part in the colour but the object has
    premultiplied = torch.from_numpy(alpha * colour)
    assert torch.allclose(opacity * found, premultiplied, rtol=0, atol=2e-6)
    again = layering.composite(found, torch.from_numpy(background), opacity)
    assert torch.allclose(again, torch.from_numpy(composite), rtol=0, atol=2e-6)
    assert not found[0, :, 0].any(), "black where there is neither"


def test_opacity_is_never_less_than_the_object_s_nor_more_than_one():
    black, alpha = torch.full((1, 3, 1, 2), 0.2), torch.tensor([[[[0.6, 0.6]]]])
    shadowed = torch.stack([torch.full((3, 1), 1.0), torch.full((3, 1), -0.5)], -1)[None]  # brighter, and too dark
    found = opacity_with_shadow(black, shadowed, alpha)
    assert torch.allclose(found, torch.tensor([[[[0.6, 1.0]]]]))
    uneven = torch.tensor([0.9, 0.6, 0.3]).view(1, 3, 1, 1)
    assert torch.allclose(opacity_with_shadow(0 * uneven, uneven, 0 * uneven[:, :1]), torch.tensor(0.4))
    assert colour_with_shadow(uneven - 0.5, torch.tensor(0.5).view(1, 1, 1, 1)).tolist() == [
        [[[pytest.approx(0.0)]], [[0.0]], [[0.0]]]
    ]
