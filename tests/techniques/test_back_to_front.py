"""BFS's formulas against loops over pixels."""

import numpy as np
import torch
from strata.techniques.back_to_front import box_of


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
