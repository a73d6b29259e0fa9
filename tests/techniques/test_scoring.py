"""Scores against Pillow, float64 loops, brute force over alignments, and stacks whose score is known."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from strata.techniques import scoring


def draw(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def square(colour, left, right, size=12):
    """A layer of bytes: columns of one colour."""
    layer = np.zeros((size, size, 4), np.uint8)
    layer[:, left:right] = (*colour, 255)
    return layer


RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
BACK = square(WHITE, 0, 12)


def test_bytes_over_each_other_are_pillows():
    below, top = draw(300, 300, 4), draw(300, 300, 4, seed=1)
    below[:40, :, 3], top[:, :40, 3], top[-40:, :, 3], below[:, -40:, 3] = 0, 0, 255, 255
    expected = Image.alpha_composite(Image.fromarray(below), Image.fromarray(top))
    assert np.array_equal(scoring.bytes_over(below, top), np.asarray(expected))


def test_l1_and_iou_by_loops():
    found, true = draw(7, 5, 4), draw(7, 5, 4, seed=1)
    true[:3, :, 3] = 0
    total, count, both, either = 0.0, 0, 0.0, 0.0
    for y, x in np.ndindex(7, 5):
        one, other = found[y, x].astype(float) / 255, true[y, x].astype(float) / 255
        if other[3] > 0:
            total, count = total + np.abs(one[:3] - other[:3]).mean(), count + 1
        both, either = both + min(one[3], other[3]), either + max(one[3], other[3])
    assert scoring.rgb_l1(found, true) == pytest.approx(total / count, abs=1e-8)
    assert scoring.soft_iou(found, true) == pytest.approx(both / either, abs=1e-12)
    empty = np.zeros((7, 5, 4), np.uint8)
    assert scoring.rgb_l1(found, empty) == scoring.soft_iou(empty, empty) == 0


def test_groups_are_layers_that_touch_nothing_of_their_depth():
    left, right, over = square(RED, 0, 5), square(GREEN, 6, 10), square(BLUE, 4, 7)
    assert scoring.depth_groups([BACK, left, right, over]) == [[0], [1, 2], [3]]
    assert scoring.depth_groups([left, right]) == [[0, 1]]
    assert scoring.depth_groups([BACK, over, BACK]) == [[0], [1], [2]]


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (3, 1), (3, 4), (4, 4)])
def test_the_alignment_is_the_cheapest_of_all(size):
    for seed in range(5):
        costs = np.random.default_rng(seed).random(size)

        def every(i, j, costs=costs):
            if (i, j) == (0, 0):
                return [[(0, 0)]]
            before = [(a, b) for a, b in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if a >= 0 and b >= 0]
            return [path + [(i, j)] for one in before for path in every(*one, costs)]

        best = min(sum(costs[pair] for pair in path) for path in every(size[0] - 1, size[1] - 1))
        found = scoring.warped_pairs(costs)
        assert sum(costs[pair] for pair in found) == pytest.approx(best) and found[0] == (0, 0)
        assert found[-1] == (size[0] - 1, size[1] - 1)


def test_a_stack_is_like_itself():
    layers = [BACK, square(RED, 0, 6), square(GREEN, 4, 9)]
    (row,) = scoring.layerd_scores(layers, layers)
    assert row["cost"] == row["rgb_l1"] == 0 and row["alpha_iou"] == 1


def test_a_layer_cut_in_two_is_mended_by_one_merge_of_either_side():
    """The two halves of a frame overlap by a column, so that they are no group."""
    whole = [BACK, square(RED, 2, 10), square(BLUE, 3, 5)]
    halves = [BACK, square(RED, 2, 7), square(RED, 6, 10), square(BLUE, 3, 5)]
    halves[3] = square(BLUE, 3, 8)
    whole[2] = square(BLUE, 3, 8)
    for pair in ((halves, whole), (whole, halves)):
        before, after = scoring.layerd_scores(*pair)
        assert before["alpha_iou"] < 0.95 and after["merges"] == 1
        assert after["cost"] == 0 and after["alpha_iou"] == 1
        assert scoring.layerd_scores(*pair, most=0) == [before]


def test_merging_ends_with_two_layers_and_where_it_helps_no_more():
    rows = scoring.layerd_scores([draw(8, 8, 4, seed=n) for n in range(7)], [draw(8, 8, 4, seed=n) for n in (7, 8)], 9)
    assert [row["merges"] for row in rows] == list(range(len(rows))) and len(rows) <= 6


def test_heat_grows_lighter():
    picture = scoring.heat(torch.linspace(0, 0.2, 41)[None])
    assert picture.shape == (1, 41, 3) and torch.equal(picture[0, 0], torch.zeros(3))
    light = picture[0] @ torch.tensor([0.2126, 0.7152, 0.0722])
    assert (light[:21].diff() > 0).all() and (light[20:] == light[20]).all()


def test_recomposition_counts_pixels_within_a_step():
    image = torch.full((2, 2, 3), 0.5)
    colour, alpha = image.clone(), torch.ones(2, 2)
    colour[0, 0, 1] += 1 / 255
    colour[0, 1, 2] += 2 / 255
    alpha[1, 1] = 0
    error, found = scoring.recomposition(colour, alpha, image)
    assert found["within_1"] == 0.5 and found["worst"] == 0.5
    assert found["recomposition"] == pytest.approx((3 / 255 + 1.5) / 12, abs=1e-7)
    assert torch.allclose(error, torch.tensor([[1 / 765, 2 / 765], [0, 0.5]]), atol=1e-7)


def test_a_seam_of_another_colour_is_a_halo():
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(40.0), indexing="ij")
    alpha = (12 - torch.hypot(y - 20, x - 20)).clamp(0, 1)[..., None]
    red = torch.tensor([1.0, 0, 0]).expand(40, 40, 3)
    for seam, expected in ((red, 0.0), (torch.zeros(40, 40, 3), 1 / 3)):
        total, weight = scoring.halo(torch.cat([torch.where(alpha < 1, seam, red), alpha], -1))
        assert weight > 0 and total / weight == pytest.approx(expected, abs=1e-3)
    assert scoring.halo(torch.ones(5, 5, 4)) == (0, 0)


def test_hidden_parts_are_those_under_nearer_layers():
    back, front = torch.ones(4, 4), torch.zeros(4, 4)
    front[:, 2:] = 1
    back[0, 2:] = 0
    assert scoring.hidden_filled([back, front]) == 0.75
    assert math.isnan(scoring.hidden_filled([back])) and math.isnan(scoring.hidden_filled([back, front * 0.4]))


def test_limits_are_read_and_kept_or_broken():
    figures = {"recomposition": 0.02, "within_1": 0.9, "hidden_filled": math.nan}
    text = "recomposition <= 0.02, within_1 > 9e-1\nhidden_filled >= 0.5,"
    limits = scoring.parse_limits(text, list(figures))
    assert limits == [("recomposition", "<=", 0.02), ("within_1", ">", 0.9), ("hidden_filled", ">=", 0.5)]
    assert scoring.broken_limits(figures, limits) == [
        "within_1 is 0.9 and should be > 0.9",
        "hidden_filled is nan and should be >= 0.5",
    ]
    assert scoring.parse_limits(" ", list(figures)) == []
    for text, words in (
        ("speed < 1", "no figure 'speed'"),
        ("within_1 = 1", "cannot be read"),
        ("within_1 < e", "read"),
    ):
        with pytest.raises(ValueError, match=words):
            scoring.parse_limits(text, list(figures))
