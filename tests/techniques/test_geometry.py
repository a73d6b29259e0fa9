"""Placed layers against direct indexing, Pillow's resampling and an inverse mapping written out point by point."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from strata.techniques import geometry
from strata.techniques.layers import Layer, LayerStack, read_layers, write_layers


def picture(height, width, channels=4, seed=0):
    return torch.rand((height, width, channels), generator=torch.Generator().manual_seed(seed))


def ramp(height, width):
    """Colour grows linearly, so that any interpolation knows its value between pixels: red = u / width, green = v /
    height.
    """
    v, u = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack([u / width, v / height, torch.zeros_like(u)], -1).double()


def display_point(layer, x, y):
    """Where canvas point (x, y) is in the layer's own picture, as fractions of it: rotation, then scaling, then flips
    undone.
    """
    width, height = layer.size
    dx, dy = x - (layer.x + width / 2), y - (layer.y + height / 2)
    angle = -layer.rotation
    u = (dx * math.cos(angle) - dy * math.sin(angle) + width / 2) / width
    v = (dx * math.sin(angle) + dy * math.cos(angle) + height / 2) / height
    return (1 - u if layer.flip_h else u), (1 - v if layer.flip_v else v)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(-6, 8),
    st.integers(-6, 8),
    st.sampled_from([3, 4]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_rasterise_copies_native_layers_bit_by_bit(height, width, x, y, channels, masked, flip_h, flip_v):
    image, mask = picture(height, width, channels), picture(height, width, 3)[..., 0] if masked else None
    layer = Layer(image, mask=mask, x=x, y=y, flip_h=flip_h, flip_v=flip_v)
    got = geometry.rasterise(layer, (7, 6))
    expected = torch.zeros(6, 7, 4)
    for row in range(height):
        for column in range(width):
            to = (y + (height - 1 - row if flip_v else row), x + (width - 1 - column if flip_h else column))
            if 0 <= to[0] < 6 and 0 <= to[1] < 7:
                expected[to] = layer.rgba()[row, column]
    assert torch.equal(got, expected)
    assert (geometry.place(layer, (7, 6)) is None) == (x >= 7 or y >= 6 or x + width <= 0 or y + height <= 0)


@pytest.mark.parametrize("quarters", [-1, 1, 2, 3, 4, 5])
def test_rasterise_copies_quarter_turns(quarters):
    image = picture(4, 8)
    got = geometry.rasterise(Layer(image, x=2, y=3, rotation=quarters * math.pi / 2), (12, 12))
    turned = np.rot90(image.numpy(), -quarters)  # NumPy turns anticlockwise
    top, left = (3, 2) if quarters % 2 == 0 else (1, 4)
    expected = np.zeros((12, 12, 4), np.float32)
    expected[top : top + turned.shape[0], left : left + turned.shape[1]] = turned
    assert np.array_equal(got.numpy(), expected)


def test_quarter_turn_between_pixels_moves_to_the_left_and_up():
    image = picture(2, 5)
    got = geometry.rasterise(Layer(image, x=3, y=3, rotation=math.pi / 2), (10, 10))
    assert np.array_equal(got[1:6, 4:6].numpy(), np.rot90(image.numpy(), -1))


@pytest.mark.parametrize("size", [(10, 8), (39, 8), (10, 29), (1, 1), (3, 30)])
def test_reduction_equals_pillow_on_premultiplied_planes(size):
    image = picture(30, 40)
    got = geometry.rasterise(Layer(image, w=size[0], h=size[1]), size)
    planes = torch.cat([image[..., :3] * image[..., 3:], image[..., 3:]], -1).numpy()
    resized = np.stack(
        [np.asarray(Image.fromarray(planes[..., i]).resize(size, Image.Resampling.BICUBIC)) for i in range(4)], -1
    )
    np.testing.assert_allclose(got[..., 3].numpy(), resized[..., 3].clip(0, 1), atol=1e-4)
    premultiplied = (got[..., :3] * got[..., 3:]).numpy()
    np.testing.assert_allclose(premultiplied, np.clip(resized[..., :3], 0, resized[..., 3:].clip(0, 1)), atol=1e-4)


@pytest.mark.parametrize(
    "fields",
    [
        {"rotation": 0.5},
        {"rotation": -2.0, "flip_h": True},
        {"w": 90, "h": 60},
        {"w": 90, "h": 45, "rotation": 1.0, "flip_v": True},
        {"w": 25, "h": 18, "rotation": 0.3},
        {"w": 70, "flip_h": True, "flip_v": True},
    ],
)
def test_resampled_pixels_come_from_the_right_place(fields):
    layer = Layer(ramp(30, 40), x=30, y=40, **fields)
    got = geometry.rasterise(layer, (120, 110))
    checked, near = 0, 0.06 / min(30, layer.size[1])  # the lookup's cubic kernel bends a ramp by 0.06 of a pixel
    for y in range(110):
        for x in range(120):
            u, v = display_point(layer, x + 0.5, y + 0.5)
            if 0.1 < u < 0.9 and 0.1 < v < 0.9:  # near the border the picture does not go on linearly
                assert got[y, x].tolist() == pytest.approx([u, v, 0, 1], abs=near), (x, y)
                checked += 1
            elif max(abs(u - 0.5) * layer.size[0], abs(v - 0.5) * layer.size[1]) > max(layer.size) / 2 + 1:
                assert got[y, x, 3] == 0
    assert checked > 200


def test_rotation_is_clockwise():
    top_right = torch.zeros(20, 20, 4)
    top_right[:6, 14:] = 1
    got = geometry.rasterise(Layer(top_right, x=10, y=10, rotation=math.radians(80)), (40, 40))
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(40.0), indexing="ij")
    weight = got[..., 3] / got[..., 3].sum()
    assert (weight * x).sum() > 23 and (weight * y).sum() > 23  # the corner went from top right to bottom right


@pytest.mark.parametrize("degrees", [0.001, 7, 30, 45, 100])
def test_border_of_a_rotated_layer_is_its_coverage(degrees):
    layer = Layer(torch.ones(20, 30, 3).double(), x=12, y=15, w=36, h=25, rotation=math.radians(degrees))
    got = geometry.rasterise(layer, (60, 60))
    points = (np.arange(60 * 8) + 0.5) / 8
    x, y = np.meshgrid(points, points)
    u, v = np.vectorize(lambda x, y: display_point(layer, x, y))(x, y)
    covered = ((u > 0) & (u < 1) & (v > 0) & (v < 1)).reshape(60, 8, 60, 8).mean((1, 3))
    # At a corner pixel; the edge is a straight ramp, not the exact area.
    assert np.abs(got[..., 3].numpy() - covered).max() < 0.16
    assert got[..., 3].sum().item() == pytest.approx(36 * 25, rel=3e-3)
    assert got[..., :3][got[..., 3] > 1e-3].min() > 1 - 1e-6


@pytest.mark.parametrize(
    "fields", [{"w": 11, "h": 7}, {"w": 95, "h": 80}, {"rotation": 0.7}, {"rotation": 0.7, "w": 17}]
)
def test_hidden_colours_never_show(fields):
    """A white disc on transparent black, and the same on transparent magenta: no edge may show either."""
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(40.0), indexing="ij")
    disc = ((x - 19.5) ** 2 + (y - 19.5) ** 2 < 200).float()[..., None]
    for hidden in ((0.0, 0.0, 0.0), (1.0, 0.0, 1.0)):
        image = torch.cat([torch.where(disc > 0, torch.ones(3), torch.tensor(hidden)), disc], -1)
        got = geometry.rasterise(Layer(image, x=20, y=20, **fields), (130, 130))
        assert got[..., :3][got[..., 3] > 1e-3].min() > 0.999


def test_only_the_visible_box_of_a_huge_layer_is_made():
    layer = Layer(picture(2, 2, 3), x=-8000, y=-8000, w=16384, h=16384)
    placed = geometry.place(layer, (64, 48))
    assert (placed.left, placed.top, placed.right, placed.bottom) == (0, 0, 64, 48)
    colour, alpha = placed.rows(10, 12)
    assert colour.shape == (3, 2, 64) and alpha.eq(1).all()


def test_rasterise_applies_opacity_and_1x1_works():
    for fields in ({}, {"rotation": 0.3}, {"w": 3, "h": 2}):
        got = geometry.rasterise(Layer(torch.full((1, 1, 3), 0.25), opacity=0.5, x=2, y=2, **fields), (8, 8))
        assert got[2, 2, :3].tolist() == pytest.approx([0.25] * 3, abs=1e-6)
        assert 0.35 < got[..., 3].max() <= 0.5


@pytest.mark.parametrize(
    "how, box",
    [
        ("contain", (0, 25, 100, 50)),
        ("cover", (-50, 0, 200, 100)),
        ("stretch", (0, 0, 100, 100)),
        ("centre", (30, 40, 40, 20)),
    ],
)
def test_fit(how, box):
    fitted = geometry.fit(Layer(picture(20, 40), x=7, y=9), (100, 100), how)
    assert (fitted.x, fitted.y, *fitted.size) == box


def test_fit_none_changes_nothing_and_an_unknown_word_raises():
    layer = Layer(picture(20, 40), x=7)
    assert geometry.fit(layer, (100, 100), "none") is layer
    with pytest.raises(ValueError, match="fit: 'fill' is not known; use one of none, contain"):
        geometry.fit(layer, (100, 100), "fill")


@settings(max_examples=60, deadline=None)
@given(
    st.floats(-3, 3),
    st.floats(-3, 3),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, (50.0, 40.0), (0.0, 0.0)]),
)
def test_transform_moves_every_point_as_it_should(before, rotation, scale, flipped, flip_h, flip_v, pivot):
    layer = Layer(picture(20, 40), x=30, y=35, rotation=before, flip_h=flipped)
    new = geometry.transform(layer, pivot, (5.0, -3.0), scale, rotation, flip_h, flip_v)
    centre = pivot or (50.0, 45.0)
    for x, y in ((31.0, 36.0), (60.0, 44.0), (50.0, 50.0)):
        dx, dy = scale * (x - centre[0]) * (-1 if flip_h else 1), scale * (y - centre[1]) * (-1 if flip_v else 1)
        to = (
            centre[0] + dx * math.cos(rotation) - dy * math.sin(rotation) + 5,
            centre[1] + dx * math.sin(rotation) + dy * math.cos(rotation) - 3,
        )
        before_uv, after_uv = display_point(layer, x, y), display_point(new, *to)
        offset = [(a - b) * side for a, b, side in zip(after_uv, before_uv, new.size, strict=True)]
        assert math.hypot(*offset) <= 0.75  # whole pixels: half a pixel each way


def test_transform_keeps_native_layers_native_and_refuses_no_size():
    layer = Layer(picture(20, 41), x=3, y=-4)
    moved = geometry.transform(layer, move=(2.0, 1.0))
    assert (moved.x, moved.y, moved.w, moved.h) == (5, -3, 0, 0)
    assert vars(geometry.transform(layer)) == vars(layer)
    with pytest.raises(ValueError, match="scale: 0 is not a size"):
        geometry.transform(layer, scale=0)


def test_pivot_and_in_pixels():
    assert geometry.pivot("layer centre", (100, 50)) is None
    assert geometry.pivot("canvas centre", (100, 50)) == (50, 25)
    assert geometry.pivot("canvas top left", (100, 50)) == (0, 0)
    assert geometry.in_pixels((0.5, -0.1), "fractions", (100, 50)) == (50, -5)
    assert geometry.in_pixels((0.5, -0.1), "pixels", (100, 50)) == (0.5, -0.1)


def test_chains_of_transforms_do_not_drift():
    """Through the document each time, as nodes hand it on."""

    def through(layer, **changes):
        return read_layers(write_layers(LayerStack((200, 200), (geometry.transform(layer, **changes),)))).layers[0]

    layer = start = Layer(torch.zeros(37, 51, 3), x=20, y=31, extra={"strata": {"prompt": "a dog"}})
    for _ in range(20):
        layer = through(layer, pivot=(0.0, 0.0), scale=1.1)
    for _ in range(20):
        layer = through(layer, pivot=(0.0, 0.0), scale=1 / 1.1)
    assert (layer.x, layer.y, layer.size) == (20, 31, (51, 37)) and layer.extra["strata"]["prompt"] == "a dog"
    layer = start
    for _ in range(10):
        layer = through(layer, move=(0.4, -0.3))
    assert (layer.x, layer.y) == (24, 28) and layer.image is not None and layer.w == 0
    for _ in range(36):
        layer = through(layer, pivot=(100.0, 100.0), rotation=math.radians(10), scale=1.01)
    expected = geometry.transform(
        geometry.transform(start, move=(4.0, -3.0)), (100.0, 100.0), scale=1.01**36, rotation=math.radians(360)
    )
    assert (
        max(abs(layer.x - expected.x), abs(layer.y - expected.y), abs(layer.w - expected.w), abs(layer.h - expected.h))
        <= 1
    )


def test_fractions_count_only_for_the_place_they_belong_to():
    layer = geometry.transform(Layer(torch.zeros(10, 10, 3)), move=(0.4, 0.0))
    assert geometry.transform(layer, move=(0.2, 0.0)).x == 1
    assert geometry.transform(layer, move=(0.6, 0.0)).extra == {}, "whole again"
    assert geometry.transform(replace(layer, x=5), move=(0.2, 0.0)).x == 5, "moved by another node"
    for odd in ({"exact": "far"}, {"exact": [float("nan")] * 4}, [], None):
        assert geometry.transform(replace(layer, extra={"strata": odd}), move=(0.2, 0.0)).x == 0


def test_what_others_wrote_into_a_layer_stays_when_it_moves():
    others = {"author": "somebody", "strata": {"parent": ["group"]}}
    layer = Layer(torch.zeros(10, 10, 3), extra=others)
    for move in ((3.0, 1.0), (0.4, 0.0)):
        moved = geometry.transform(layer, move=move).extra
        moved["strata"] = {key: value for key, value in moved["strata"].items() if key != "exact"}
        assert moved == others


@pytest.mark.parametrize("size", [(4, 4), (5, 7), (8, 16), (3, 20)])
def test_sides_are_filled_up_by_what_is_beside_them(size):
    image = picture(*size).movedim(-1, 0)[None]
    found = geometry.filled_up(image, 8)[0].movedim(0, -1).numpy()
    added = [(0, -side % 8) for side in size]
    mode = "reflect" if all(more < side for (_, more), side in zip(added, size, strict=True)) else "edge"
    assert np.array_equal(found, np.pad(image[0].movedim(0, -1).numpy(), [*added, (0, 0)], mode=mode))
