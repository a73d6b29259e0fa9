"""Depth slicing against brute force, pixel by pixel, and the properties that every cut must keep."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from strata.techniques import depth as deglad
from strata.techniques.layers import read_layers, write_layers

from .draws import random

thresholds_strategy = st.lists(st.integers(1, 99), min_size=1, max_size=6, unique=True).map(
    lambda values: [v / 100 for v in sorted(values)]
)
sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))
larger_sizes = st.tuples(st.integers(1, 16), st.integers(1, 16))


def over(stack):
    """Straight 'over' of full-canvas layers in float64, one pixel formula: c = a·F + (1 − a)·c."""
    result = torch.zeros(*stack.layers[0].image.shape[:2], 3, dtype=torch.float64)
    for layer in stack.layers:
        alpha = layer.image[..., 3:].double()
        result = alpha * layer.image[..., :3] + (1 - alpha) * result
    return result


@settings(max_examples=60, deadline=None)
@given(sizes, thresholds_strategy, st.integers(0, 999))
def test_slice_masks_is_equation_2_for_every_pixel(size, thresholds, seed):
    depth = random(2, *size, seed=seed)
    masks = deglad.slice_masks(depth, thresholds)
    for image in range(2):
        for row in range(size[0]):
            for column in range(size[1]):
                # 0 = in front of every threshold.
                nearer = sum(float(depth[image, row, column]) >= d for d in thresholds)
                expected = [1.0 if len(thresholds) - index == nearer else 0.0 for index in range(len(thresholds) + 1)]
                assert masks[image, :, row, column].tolist() == expected


def test_a_pixel_exactly_at_the_threshold_is_background():
    masks = deglad.slice_masks(torch.tensor([[[0.5, math.nextafter(0.5, 0)]]], dtype=torch.float64), [0.5])
    assert masks[0, :, 0].tolist() == [[1, 0], [0, 1]]


@settings(max_examples=60, deadline=None)
@given(sizes, thresholds_strategy, st.floats(0, 12), st.booleans(), st.integers(0, 999))
def test_soften_over_alphas_and_cut_layers_give_the_image_back(size, thresholds, width, fill, seed):
    image, depth = random(*size, 3, seed=seed), random(1, *size, seed=seed + 1)
    weights = deglad.soften(deglad.slice_masks(depth, thresholds), width)
    assert torch.allclose(weights.sum(1), torch.ones(1, *size, dtype=torch.float64), rtol=0, atol=1e-9)
    colours = image.expand(1, len(thresholds) + 1, -1, -1, -1)
    stack = deglad.cut_layers(colours, weights, thresholds, fill)
    assert stack.canvas == (size[1], size[0])
    assert (over(stack) - image).abs().max() < 1 / 255
    assert [layer.extra["strata"]["depth"] for layer in read_layers(write_layers(stack)).layers][0] == (
        thresholds[-1],
        1.0,
    )


def test_soften_is_a_blur_of_unit_mass_with_the_asked_width():
    step = torch.zeros(1, 2, 9, 40, dtype=torch.float64)
    step[:, 0, :, 20:] = 1
    step[:, 1] = 1 - step[:, 0]
    assert torch.equal(deglad.soften(step, 0), step)
    row = deglad.soften(step, 8)[0, 0, 4]
    assert (row.diff() >= 0).all() and 7 <= int(((row > 0) & (row < 1)).sum()) <= 9


def test_over_alphas_are_weights_over_what_lies_behind():
    weights = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).view(1, 3, 1, 1)
    assert deglad.over_alphas(weights).flatten().tolist() == pytest.approx([1.0, 0.6, 0.5])


@settings(max_examples=40, deadline=None)
@given(sizes, thresholds_strategy, st.floats(0, 6), st.booleans(), st.integers(0, 999))
def test_cut_layers_of_a_transparent_picture_have_its_alpha_together(size, thresholds, width, fill, seed):
    image, opacity = random(*size, 3, seed=seed), random(1, *size, seed=seed + 1).mul(3).sub(1).clamp(0, 1)
    weights = deglad.soften(deglad.slice_masks(random(1, *size, seed=seed + 2), thresholds), width)
    stack = deglad.cut_layers(image.expand(1, len(thresholds) + 1, -1, -1, -1), weights, thresholds, fill, opacity)
    colour, through = torch.zeros(*size, 3, dtype=torch.float64), torch.ones(*size, 1, dtype=torch.float64)
    for layer in stack.layers:
        alpha = layer.image[..., 3:]
        colour, through = alpha * layer.image[..., :3] + (1 - alpha) * colour, through * (1 - alpha)
    if not fill:  # what is filled in shows through a transparent front
        assert (1 - through[..., 0] - opacity[0]).abs().max() < 1 / 255
        assert (colour - opacity[0, ..., None] * image).abs().max() < 1 / 255
    assert all(layer.image[..., 3].max() <= 1 for layer in stack.layers)


def test_a_sliced_picture_is_its_cut_layers_and_refined_edges_are_left_as_they_are():
    image, depth = random(6, 7, 3), random(6, 7, seed=1)
    hard = deglad.slice_masks(depth[None], [0.4])
    stack, weights, hidden = deglad.slice_picture(image, depth, [0.4], None, False, 3.0)
    assert torch.equal(weights, deglad.soften(hard, 3.0)[0]) and torch.allclose(hidden, 1 - weights.cumsum(0))
    assert torch.allclose(over(stack), image, atol=1e-9)
    matte, colours = random(2, 6, 7, seed=2).softmax(0), random(2, 6, 7, 3, seed=3)

    def refine(picture, masks):
        assert torch.equal(picture, image) and torch.equal(masks, hard[0])
        return matte, colours

    stack, weights, _ = deglad.slice_picture(image, depth, [0.4], None, False, 3.0, refine)
    assert torch.equal(weights, matte)
    assert torch.allclose(over(stack), (matte[..., None] * colours).sum(0), atol=1e-9)


def test_hidden_parts_are_what_nearer_layers_cover():
    masks = deglad.slice_masks(torch.tensor([[[0.1, 0.5, 0.9]]]), [0.3, 0.7])
    assert deglad.hidden_parts(masks)[0, :, 0].tolist() == [[1, 1, 0], [1, 0, 0], [0, 0, 0]]


def test_fill_behind_makes_the_farthest_layer_whole_and_keeps_what_is_visible():
    depth = torch.ones(1, 16, 16, dtype=torch.float64)
    depth[:, 4:12, 4:12] = 0.1
    image = torch.where(
        depth[0, ..., None] < 0.5, torch.tensor([1.0, 0, 0]).double(), torch.tensor([0, 0.25, 1.0]).double()
    )
    weights = deglad.slice_masks(depth, [0.5])
    colours, extra = deglad.fill_behind(image.expand(1, 2, -1, -1, -1), weights)
    assert torch.equal(extra[0, 0], (depth[0] < 0.5).double()) and not extra[0, 1].any()
    assert (colours[0, 0] - torch.tensor([0, 0.25, 1.0])).abs().max() < 1e-9  # a flat background is continued flat
    assert torch.equal(colours[0, 1][4:12, 4:12], image[4:12, 4:12])


def test_push_pull_keeps_known_values_and_stays_within_their_range():
    values, weights = random(1, 2, 13, 7, 3), (random(1, 2, 13, 7, seed=3) > 0.6).double()
    filled = deglad.push_pull(values, weights)
    assert torch.allclose(filled[weights > 0], values[weights > 0], rtol=0, atol=1e-12)
    assert filled.min() >= values[weights > 0].min() - 1e-9 and filled.max() <= values[weights > 0].max() + 1e-9


def pyramid_fill(values, weights):
    """push_pull of one layer [H,W,C] with weights [H,W], one pixel at a time."""
    levels = [(values * weights[..., None], weights)]
    while max(levels[-1][1].shape) > 1:
        image, weight = levels[-1]
        height, width = (-(-side // 2) for side in weight.shape)
        smaller, shares = np.zeros((height, width, image.shape[2])), np.zeros((height, width))
        for row in range(height):
            for column in range(width):
                block = slice(2 * row, 2 * row + 2), slice(2 * column, 2 * column + 2)
                total = 4 * weight[block].mean()
                smaller[row, column] = 4 * image[block].mean((0, 1)) / max(total, 1)
                shares[row, column] = min(total, 1)
        levels.append((smaller, shares))
    image, weight = levels.pop()
    filled = image / np.maximum(weight[..., None], 1e-12)
    for image, weight in reversed(levels):
        larger = np.zeros_like(image)
        for row in range(image.shape[0]):
            for column in range(image.shape[1]):
                parts = 0
                places = []
                for place, length, old in zip((row, column), image.shape, filled.shape, strict=False):
                    at = min(max((place + 0.5) * old / length - 0.5, 0), old - 1)
                    low = int(at)
                    places.append(((low, 1 - at + low), (min(low + 1, old - 1), at - low)))
                for y, v in places[0]:
                    for x, u in places[1]:
                        parts = parts + v * u * filled[y, x]
                larger[row, column] = parts
        filled = image + (1 - weight[..., None]) * larger
    return filled


@pytest.mark.parametrize("seed", range(6))
def test_hidden_pixels_of_several_layers_are_filled_as_written(seed):
    """Every layer and pixel by itself: hidden where nothing of it and what is behind it is seen; whose it is by the
    shares of the visible surroundings; its colour from what is not within 3 pixels of a nearer layer.
    """
    layers, height, width = 3 + seed % 2, 13 + seed, 17
    blobs = torch.nn.functional.interpolate(random(1, 1, 4, 5, seed=seed), (height, width), mode="bicubic")[0]
    weights = deglad.slice_masks(blobs.clamp(0, 1), [0.4, 0.55, 0.7][: layers - 1])
    weights = deglad.soften(weights, 2) if seed > 2 else weights
    colours = random(1, layers, height, width, 3, seed=seed + 50)
    filled, extra = deglad.fill_behind(colours, weights)
    own = weights[0].numpy()
    behind = own.cumsum(0)
    counts = [0, 0]
    for layer in range(layers):
        hidden = behind[layer] <= 1e-4
        share = pyramid_fill((own[layer] / np.maximum(behind[layer], 1e-4))[..., None], behind[layer])[..., 0]
        opaque = hidden & ((share > 0.5) | (layer == 0))
        clean = np.zeros((height, width))
        for row in range(height):
            for column in range(width):
                clean[row, column] = behind[layer][max(row - 3, 0) : row + 4, max(column - 3, 0) : column + 4].min()
        expected = pyramid_fill(colours[0, layer].numpy(), own[layer] * (clean.clip(0, 1) + 1e-3))
        expected = np.where(hidden[..., None], expected, colours[0, layer].numpy())
        assert np.array_equal(extra[0, layer].numpy(), opaque)
        assert np.abs(filled[0, layer].numpy() - expected).max() < 1e-9
        counts = [counts[0] + (layer > 0 and opaque.sum()), counts[1] + (hidden & ~opaque).sum()]
    assert min(counts) > 0, "of the middle layers some hidden pixels are filled, some left open"


@pytest.mark.parametrize("soft_edge", [0, 1, 2, 4, 7.5, 8])
def test_a_filled_layer_has_no_outline_of_what_was_in_front_of_it(soft_edge):
    """An antialiased red disc before blue: its rim is mixed of both, and the blue layer is blue all over. The flattened
    picture is the picture.
    """
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(80.0), indexing="ij")
    distance = ((x - 40) ** 2 + (y - 30) ** 2).sqrt()
    share = (20.5 - distance).clamp(0, 1)[..., None].double()
    blue, red = torch.tensor([0, 0.25, 1.0]).double(), torch.tensor([1.0, 0, 0]).double()
    # The depth's edge is a pixel inside.
    image, depth = (share * red + (1 - share) * blue, torch.where(distance < 19.5, 0.1, 1.0)[None].double())
    weights = deglad.slice_masks(depth, [0.5])
    stack = deglad.cut_layers(image.expand(1, 2, -1, -1, -1), weights, [0.5], True, soft_edge=soft_edge)
    back, front = (layer.image.double() for layer in stack.layers)
    assert (back[..., :3] - blue).abs().max() < 1e-6 and back[..., 3].min() == 1
    flat = front[..., :3] * front[..., 3:] + back[..., :3] * (1 - front[..., 3:])
    assert (flat - image).abs().max() < 1e-6
    plain = deglad.cut_layers(image.expand(1, 2, -1, -1, -1), weights, [0.5], True, rim=0).layers[0].image
    assert (plain[..., :3] - blue).abs().max() > 0.2, "without a rim the outline stays"
    open_ = deglad.cut_layers(image.expand(1, 2, -1, -1, -1), weights, [0.5], False)
    assert torch.equal(open_.layers[1].image[..., 3].double(), weights[0, 1]), (
        "without filling the cut is where the depth says"
    )


def test_hidden_pixels_go_to_the_layer_that_surrounds_them():
    """Three layers: a near disc over the middle of a box, which stands before a wall. The box is made whole under the
    disc, the wall under both.
    """
    depth = torch.ones(1, 60, 60).double()
    depth[:, 15:45, 15:45] = 0.5
    depth[:, 26:34, 26:34] = 0.1
    depth[:, 2:8, 2:8] = 0.1  # before the wall alone
    weights = deglad.slice_masks(depth, [0.3, 0.7])
    colours = torch.stack([torch.full((60, 60, 3), value).double() for value in (0.2, 0.6, 0.9)])[None]
    filled, extra = deglad.fill_behind(colours, weights)
    assert torch.equal(extra[0, 0], (depth[0] < 0.7).double()), "the farthest is whole"
    assert torch.equal(extra[0, 1, 20:40, 20:40], (depth[0, 20:40, 20:40] == 0.1).double()), "the box under the disc"
    assert not extra[0, 1, :12, :12].any(), "no box behind what stands before the wall"
    assert not extra[0, 2].any() and torch.allclose(
        filled[0, 1][26:34, 26:34], torch.tensor(0.6).double(), rtol=0, atol=1e-12
    )


def test_growing_keeps_the_sum_and_hands_the_rim_to_the_nearer():
    weights = deglad.slice_masks(torch.tensor([[[0.9] * 6 + [0.5] * 5 + [0.1] * 5]]).double(), [0.3, 0.7])
    grown = deglad.grow_nearer(weights, 2)
    assert torch.equal(grown.sum(1), torch.ones(1, 1, 16).double())
    assert grown[0].argmax(0)[0].tolist() == [0] * 4 + [1] * 5 + [2] * 7
    assert torch.equal(deglad.grow_nearer(weights[:, :1], 2), weights[:, :1])


def test_the_range_of_a_batch_or_fixed_values_keeps_a_cut_in_its_place():
    frames = torch.stack([torch.linspace(1, 4, 12).view(3, 4), torch.linspace(1, 8, 12).view(3, 4)])
    each, batch, fixed = (deglad.normalise_depth(frames, False, True, how, (0.0, 10.0)) for how in deglad.RANGES)
    assert each.amin((1, 2)).tolist() == [0, 0] and each.amax((1, 2)).tolist() == [1, 1]
    assert torch.allclose(batch, (frames - 1) / 7, rtol=0, atol=1e-12) and torch.allclose(
        fixed, frames / 10, rtol=0, atol=1e-12
    )
    assert torch.allclose(
        deglad.normalise_depth(frames, True, False, "fixed", (2.0, 5.0)),
        1 - ((frames - 2) / 3).clamp(0, 1),
        rtol=1e-5,
        atol=1e-8,
    )
    assert torch.equal(deglad.normalise_depth(frames / 8, False, True, "fixed"), frames / 8), "0 to 1 unless given"
    for limits in ((1.0, 1.0), (2.0, 1.0), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="range_low, range_high: .* is not below"):
            deglad.normalise_depth(frames, False, True, "fixed", limits)


def test_a_smooth_depth_is_resized_as_a_picture_along_both_axes():
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(10.0), indexing="ij")
    ramp = (x**2 + 10 * y + x * y)[None] / 2000
    found = deglad.resize_depth(ramp, 15, 19, edge=1.0)
    assert torch.allclose(
        found, torch.nn.functional.interpolate(ramp[None], (15, 19), mode="bilinear")[0], rtol=0, atol=1e-5
    )
    assert found[0, -1, 0] - found[0, 0, 0] > 0.03


@pytest.mark.parametrize("white", [True, False])
def test_normalise_depth_puts_the_nearest_at_0_and_fills_what_is_missing(white):
    raw = torch.tensor([[[2.0, 4.0, 6.0], [math.nan, math.inf, 6.0]]])
    depth = deglad.normalise_depth(raw, white, True)
    assert depth[0, 0].tolist() == pytest.approx([1.0, 0.5, 0.0] if white else [0.0, 0.5, 1.0])
    assert depth.isfinite().all() and depth.min() >= 0 and depth.max() <= 1


def test_zero_is_missing_only_when_asked():
    raw = torch.tensor([[[0.0, 2.0, 4.0]]])
    assert deglad.normalise_depth(raw, False, False)[0, 0].tolist() == pytest.approx([0, 0.5, 1])
    assert deglad.normalise_depth(raw, False, True)[0, 0].tolist() == pytest.approx([0, 0, 1])


def test_a_constant_depth_and_a_single_pixel_are_depth_too():
    for shape in ((1, 1, 1), (1, 3, 4)):
        depth = deglad.normalise_depth(torch.full(shape, 7.0), False, True)
        assert torch.equal(depth, torch.zeros(shape))


def test_all_missing_depth_is_refused():
    with pytest.raises(ValueError, match="no valid value"):
        deglad.normalise_depth(torch.zeros(1, 3, 3), False, True)


def brute_fill(depth, valid):
    """fill_missing for one image, one pixel at a time."""
    height, width = depth.shape
    while not valid.all():
        new, new_valid = depth.copy(), valid.copy()
        for row in range(height):
            for column in range(width):
                if valid[row, column]:
                    continue
                found = []  # (width, depth) of the hole along the column, then along the row
                for steps in (((-1, 0), (1, 0)), ((0, -1), (0, 1))):
                    ends = []
                    for dy, dx in steps:
                        y, x = row + dy, column + dx
                        while 0 <= y < height and 0 <= x < width and not valid[y, x]:
                            y, x = y + dy, x + dx
                        if 0 <= y < height and 0 <= x < width:
                            ends.append((abs(y - row) + abs(x - column), depth[y, x]))
                    if not ends:
                        continue
                    wide = 2 * ends[0][0] if len(ends) == 1 else ends[0][0] + ends[1][0]
                    farther = max(value for _, value in ends)
                    closest = min(distance for distance, _ in ends)
                    found.append(
                        (
                            wide,
                            max(value for distance, value in ends if distance == closest)
                            if wide <= deglad.RIM
                            else farther,
                        )
                    )
                if found:
                    new[row, column] = min(found, key=lambda item: item[0])[1]
                    new_valid[row, column] = True
        depth, valid = new, new_valid
    return depth


@settings(max_examples=40, deadline=None)
@given(larger_sizes, st.floats(0.1, 0.99), st.integers(0, 999))
def test_fill_missing_equals_a_walk_from_every_pixel(size, missing, seed):
    depth, valid = random(1, *size, seed=seed), random(1, *size, seed=seed + 1) > missing
    valid[0, 0, 0] = True
    depth = torch.where(valid, depth, 0.0)
    assert np.allclose(
        deglad.fill_missing(depth, valid)[0], brute_fill(depth[0].numpy(), valid[0].numpy()), rtol=0, atol=1e-12
    )


def test_a_wide_hole_beside_a_near_object_belongs_to_what_is_behind():
    depth = torch.full((1, 40, 60), 0.9)
    depth[:, 10:30, 30:] = 0.2
    hole = torch.zeros_like(depth, dtype=torch.bool)
    hole[:, 8:32, 14:30] = True  # what the object hides from a camera's other eye
    filled = deglad.fill_missing(torch.where(hole, 0.0, depth), ~hole)
    assert torch.equal(filled, depth)


def test_an_edge_that_was_not_measured_sharply_stays_in_the_middle_of_its_rim():
    depth = torch.full((1, 40, 60), 0.9)
    depth[:, :, 30:] = 0.2
    hole = torch.zeros_like(depth, dtype=torch.bool)
    hole[:, :, 27:33] = True
    assert torch.equal(deglad.fill_missing(torch.where(hole, 0.0, depth), ~hole), depth)


@settings(max_examples=40, deadline=None)
@given(sizes, sizes, st.integers(0, 999))
def test_resize_depth_never_invents_a_depth_across_an_edge(old, new, seed):
    depth = (random(1, *old, seed=seed) * 4).floor() / 4  # steps of 0.25: every difference is an edge
    resized = deglad.resize_depth(depth, *new)
    assert resized.shape == (1, *new) and set(resized.flatten().tolist()) <= set(depth.flatten().tolist())


def test_across_an_edge_the_depth_closest_to_the_interpolated_one_is_taken():
    for depths in ([0.0, 1.0], [1.0, 0.0]):
        found = deglad.resize_depth(torch.tensor([[depths]]), 1, 8)[0, 0]
        assert found.tolist() == [depths[0]] * 4 + [depths[1]] * 4


def test_a_nearer_layer_takes_two_pixels_more_where_what_it_hides_is_filled():
    depth = torch.cat([torch.zeros(6, 10), torch.ones(6, 10)], 1)
    for fill, columns in ((False, 10), (True, 12)):
        stack, _, _ = deglad.slice_picture(torch.rand(6, 20, 3), depth, [0.5], None, fill)
        assert (stack.layers[-1].rgba()[..., 3] > 0).sum(1).tolist() == [columns] * 6


def test_depths_that_differ_by_less_than_two_hundredths_are_no_edge():
    for step, between in ((0.019, True), (0.021, False)):
        found = deglad.resize_depth(torch.tensor([[[0.5, 0.5 + step]]]), 1, 8)
        assert (len(found.unique()) > 2) == between


def test_resize_depth_interpolates_smooth_ground_like_pillow():
    ramp = torch.linspace(0, 0.3, 20, dtype=torch.float64).expand(1, 20, 20)
    expected = np.array(Image.fromarray(ramp[0].float().numpy()).resize((40, 40), Image.BILINEAR))
    assert np.abs(deglad.resize_depth(ramp, 40, 40)[0].numpy() - expected).max() < 1e-6


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.35, 0.6", [0.35, 0.6]),
        ("", []),
        (" 0.5 ;0.75\n", [0.5, 0.75]),
        ("0.6, 0.3", [0.3, 0.6]),
        ("0.3, 0.3", [0.3]),
    ],
)
def test_parse_thresholds(text, values):
    assert deglad.parse_thresholds(text) == values


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1.5", "outside of 0 to 1"),
        ("0", "outside"),
        ("nan", "outside"),
        ("near", "not a list of numbers"),
    ],
)
def test_parse_thresholds_says_what_is_wrong(text, words):
    with pytest.raises(ValueError, match=f"^thresholds: .*{words}"):
        deglad.parse_thresholds(text)


def test_parse_points():
    assert deglad.parse_points("0.5, 0.4; 0.2,0.7;") == [(0.5, 0.4), (0.2, 0.7)]
    assert deglad.parse_points("0, 1; 1, 0") == [(0.0, 1.0), (1.0, 0.0)], "the borders belong to the picture"
    for text in ("0.5", "1.5, 0", "a, b", "nan, 0.5"):
        with pytest.raises(ValueError, match="^points: "):
            deglad.parse_points(text)


def three_planes():
    depth = torch.full((1, 60, 80), 0.9, dtype=torch.float64)
    depth[:, 10:50, 20:40] = 0.2
    depth[:, 20:50, 45:70] = 0.55
    return depth


@pytest.mark.parametrize(("point", "low", "high"), [((0.35, 0.5), 0.2, 0.55), ((0.7, 0.6), 0.55, 0.9)])
def test_threshold_behind_lies_between_the_object_and_the_next(point, low, high):
    assert low < deglad.threshold_behind(three_planes()[0], *point) < high


@pytest.mark.parametrize("seed", range(9))
def test_threshold_behind_follows_its_written_steps(seed):
    """The docstring's steps in plain Python, which the picker repeats in JavaScript."""
    height, width = ((30, 40), (40, 30))[seed % 2]
    ramp = torch.sort(random(height * width, seed=seed)).values.view(height, width) ** 2
    depth = ramp if seed < 2 else (0.7 * ramp.flip(seed % 2) + 0.3 * random(height, width, seed=seed + 9)).clamp(0, 1)
    x, y = [(0.3, 0.4), (0.6, 0.9), (1.0, 1.0), (0.1, 0.5), (0.3, 0.4)][seed // 2]
    if seed == 8:  # something before a wall that is as far as anything can be: the last bins decide
        depth = torch.ones(height, width)
        depth[:, 10:] = 251.5 / 256
    at = min(int(y * height), height - 1), min(int(x * width), width - 1)
    counts = [0.0] * 256
    for row in range(height):
        for column in range(width):
            distance = (row - at[0]) ** 2 + (column - at[1]) ** 2
            counts[min(int(256 * float(depth[row, column])), 255)] += math.exp(-distance / (2 * (0.15 * 40) ** 2))
    for _ in range(3):
        padded = [counts[0], *counts, counts[-1]]
        counts = [(a + 2 * b + c) / 4 for a, b, c in zip(padded, padded[1:], padded[2:], strict=False)]
    place = min(int(256 * float(depth[at])), 255)
    while place < 255 and counts[place + 1] > counts[place]:
        place += 1
    peak = lowest = place
    for place in range(peak + 1, 256):
        if counts[lowest] < counts[peak] / 20 or counts[place] > 1.5 * counts[lowest]:
            break
        lowest = place if counts[place] < counts[lowest] else lowest
    assert deglad.threshold_behind(depth, x, y) == min(lowest + 1, 255) / 256


@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize("side", [500, 560, 600])
def test_threshold_behind_ends_a_smooth_object_where_its_weight_has_fallen_to_a_twentieth(side, upright):
    """One pixel a bin, deeper with its distance r from the point: the histogram is the weight exp(−r²/2s²), which is
    1/20 of its peak at r = s·√(2·ln 20). The sides are such that 1/19 and 1/21 end in other bins.
    """
    depth = ((torch.arange(side, dtype=torch.float64) + 0.5) / 256).clamp(max=1)[None]
    edge = math.ceil(0.15 * side * math.sqrt(2 * math.log(20)))
    assert deglad.threshold_behind(depth.T if upright else depth, 0, 0) == (edge + 1) / 256


def test_threshold_behind_takes_the_nearer_of_two_depths_that_are_equally_rare():
    """Eight pixels at one distance from the point make a flat floor of eight bins between the object and what begins
    behind it; smoothing leaves two of them untouched.
    """
    depth = torch.full((21, 21), 109.5, dtype=torch.float64)
    depth[9:12, 10] = depth[10, 9:12] = 100.5
    around = [(row, column) for row in (-2, -1, 1, 2) for column in (-2, -1, 1, 2) if abs(row) != abs(column)]
    for number, (row, column) in enumerate(around):
        depth[10 + row, 10 + column] = 101.5 + number
    assert deglad.threshold_behind(depth / 256, 0.5, 0.5) == 105 / 256


def test_all_thresholds_adds_points_to_what_was_typed():
    depth = three_planes()[0]
    used = deglad.all_thresholds(depth, [0.1], [(0.7, 0.6), (0.35, 0.5), (0.36, 0.5)])
    assert used[0] == 0.1 and len(used) == 3 and used == sorted(used)
    behind = deglad.threshold_behind(depth, 0.7, 0.6)
    assert deglad.all_thresholds(depth, [behind], [(0.7, 0.6)]) == [behind]
    for apart, used in ((1 / 256, [behind - 1 / 256, behind]), (0.5 / 256, [behind - 0.5 / 256])):
        assert deglad.all_thresholds(depth, [behind - apart], [(0.7, 0.6)]) == used
    with pytest.raises(ValueError, match="^thresholds: there are 50 cuts .* at most 49"):
        deglad.all_thresholds(depth, [k / 51 for k in range(1, 51)], [])
    with pytest.raises(ValueError, match="no threshold and no point"):
        deglad.all_thresholds(depth, [], [])


def test_amodal_mask_is_the_region_without_what_is_nearer():
    region = torch.zeros(1, 60, 80)
    region[:, 15:45, 30:60] = 1
    depth = three_planes().float()
    mask = deglad.amodal_mask(region, depth, 0.5)
    expected = [[float(15 <= r < 45 and 30 <= c < 60 and depth[0, r, c] >= 0.5) for c in range(80)] for r in range(60)]
    assert mask[0].tolist() == expected


def test_compose_by_depth_is_equation_3_and_paste_layers_flatten_to_it():
    front, back, weights = random(1, 5, 6, 3), random(1, 5, 6, 3, seed=1), random(1, 5, 6, seed=2)
    image, depth = deglad.compose_by_depth(front, back, front[..., 0], back[..., 0], weights)
    for row in range(5):
        for column in range(6):
            w = float(weights[0, row, column])
            assert image[0, row, column].tolist() == pytest.approx(
                (w * front[0, row, column] + (1 - w) * back[0, row, column]).tolist()
            )
            assert float(depth[0, row, column]) == pytest.approx(float(image[0, row, column, 0]))
    stack = deglad.paste_layers(back[0], front[0], weights[0])
    top = stack.layers[1].image
    assert torch.allclose(
        top[..., 3:] * top[..., :3] + (1 - top[..., 3:]) * stack.layers[0].image, image[0], rtol=0, atol=1e-12
    )


def test_top_view_places_every_pixel_at_its_column_and_depth():
    image, depth = random(1, 6, 5, 3), random(1, 6, 5, seed=4)
    view = deglad.top_view(image, depth, 10)[0]
    for column in range(5):
        rows = [min(max(int((1 - float(depth[0, r, column])) * 10), 0), 9) for r in range(6)]
        for place in range(10):
            members = [image[0, r, column] for r in range(6) if rows[r] == place]
            density = 0.4 + 0.6 * (1 - math.exp(-len(members) * 12 / 6)) if members else 0.0
            expected = (torch.stack(members).mean(0) * density).tolist() if members else [0, 0, 0]
            assert view[place, column].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["redwood", "tum", "sun"])
@pytest.mark.parametrize("width", [0, 3])
def test_real_photographs_with_measured_depth_come_back_whole(shared, name, width):
    folder = shared / "data" / "rgbd"
    image = torch.from_numpy(np.array(Image.open(folder / f"{name}_color.png").convert("RGB"))).float() / 255
    raw = torch.from_numpy(np.array(Image.open(folder / f"{name}_depth.png")).astype("float32"))[None]
    depth = deglad.normalise_depth(raw, False, True)
    thresholds = deglad.all_thresholds(depth[0], [], [(0.5, 0.8), (0.7, 0.5)])
    weights = deglad.soften(deglad.slice_masks(depth, thresholds), width)
    stack = deglad.cut_layers(image.expand(1, len(thresholds) + 1, -1, -1, -1), weights, thresholds, True)
    assert len(stack.layers) == 3 and all((layer.image[..., 3] > 0.5).float().mean() > 0.01 for layer in stack.layers)
    assert (over(stack) - image).abs().max() < 1 / 255


def test_layers_have_the_names_that_were_given_and_their_depths_for_the_rest():
    depth = torch.linspace(0, 1, 30).expand(4, 30)
    stack, _, _ = deglad.slice_picture(torch.rand(4, 30, 3), depth, [0.3, 0.7], None, False, names=["Sky", ""])
    assert [layer.name for layer in stack.layers] == ["Sky", "Depth 0.30-0.70", "Depth 0.00-0.30"]


def both_ways(depth: torch.Tensor) -> tuple[float, float]:
    """The scores of a metric depth [H,W], near is dark and 0 is missing, and of the disparity 1 / depth."""
    disparity = torch.where(depth > 0, 1 / depth.clamp_min(1e-6), 0.0)
    return deglad.white_is_near(depth[None]), deglad.white_is_near(disparity[None])


@pytest.mark.parametrize("name", ["redwood", "sun", "tum"])
def test_near_is_guessed_right_on_photographs_with_measured_depth(shared, name):
    depth = np.asarray(Image.open(shared / "data" / "rgbd" / f"{name}_depth.png"), np.float32)
    black, white = both_ways(torch.from_numpy(depth))
    assert black < -0.15 and white == pytest.approx(-black, abs=1e-9)


def test_near_is_guessed_right_on_rendered_scenes():
    from strata.scenes.renderer import KINDS, Request, render

    scores = [both_ways(torch.from_numpy(render(Request(kind), 48, 48, 1000).depth) + 0.01) for kind in KINDS]
    assert max(black for black, _ in scores) < -0.5 and min(white for _, white in scores) > 0.5


def test_the_guess_is_spearmans_correlation_without_what_is_missing():
    from scipy.stats import spearmanr

    depth = torch.randint(0, 6, (2, 9, 7)).double()  # many ties, and zeros
    depth[0, 0, 0] = float("nan")
    rows = torch.arange(9.0)[:, None].expand(9, 7)
    expected = []
    for one in depth:
        valid = one.isfinite() & (one != 0)
        expected.append(spearmanr(one[valid], rows[valid]).statistic)
    assert deglad.white_is_near(depth) == pytest.approx(np.mean(expected), abs=1e-12)


@pytest.mark.parametrize("depth", [torch.zeros(1, 4, 4), torch.ones(1, 4, 4), torch.rand(1, 1, 5)])
def test_nothing_to_guess_from_is_zero(depth):
    assert deglad.white_is_near(depth) == 0
