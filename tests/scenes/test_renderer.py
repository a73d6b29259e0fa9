"""The truth of rendered scenes: what the renderer says about a picture is what is in the picture."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from strata.scenes import renderer
from strata.scenes.renderer import Request

SIZES = [(128, 128), (96, 160), (200, 120)]
SEEDS = range(40)


def many():
    for seed in SEEDS:
        yield renderer.render(Request(count=1 + seed % 3), *SIZES[seed % 3], seed)


def over64(layers, background):
    """Laying straight-alpha layers over a background, written again in float64."""
    picture = background.astype(np.float64)
    for layer in layers:
        alpha = layer[..., 3:].astype(np.float64)
        picture = layer[..., :3] * alpha + picture * (1 - alpha)
    return picture


def test_layers_over_the_background_give_the_composite():
    for scene in many():
        joined = over64([o.rgba_with_shadow for o in scene.objects], scene.background)
        apart = over64([layer for o in scene.objects for layer in (o.shadow, o.rgba)], scene.background)
        assert np.abs(joined - scene.composite).max() < 1e-4
        assert np.abs(apart - scene.composite).max() < 1e-4


def test_everything_behind_the_nearest_object_is_the_layers_below_it():
    for scene in many():
        *others, front = scene.objects
        below = over64([layer for o in others for layer in (o.shadow, o.rgba)], scene.background)
        assert np.abs(below - scene.behind_nearest).max() < 1e-4
        whole = renderer.over(front.rgba, renderer.over(front.shadow, scene.behind_nearest))
        assert np.array_equal(whole.astype(np.float32), scene.composite)


def test_masks_are_disjoint_and_the_nearest_wins():
    for scene in many():
        assert np.array_equal(scene.masks.sum(0), np.ones_like(scene.depth))
        assert set(np.unique(scene.masks)) <= {0.0, 1.0}
        solid = np.array([o.rgba[..., 3] > 0.5 for o in scene.objects])
        front = np.where(solid.any(0), len(solid) - 1 - solid[::-1].argmax(0), -1)
        for index, item in enumerate(scene.objects):
            assert np.array_equal(item.mask > 0, front == index)


def test_depth_falls_with_the_order_of_layers_and_is_that_of_the_frontmost_object():
    for scene in many():
        depths = [o.depth for o in scene.objects]
        assert depths == sorted(depths, reverse=True) and len(set(depths)) == len(depths)
        expected = scene.background_depth.copy()
        for item in scene.objects:
            expected[item.mask > 0] = item.depth
        assert np.array_equal(expected, scene.depth)
        assert scene.depth.min() >= 0 and scene.depth.max() <= 1
        assert (np.diff(scene.background_depth, axis=0) <= 0).all()


def test_an_object_stands_where_its_depth_says():
    for scene in many():
        height = len(scene.depth)
        for item in scene.objects:
            if renderer.catalogue()[item.name].hover == 0:
                foot = scene.horizon + (1 - scene.horizon) * (1 - item.depth)
                assert abs(item.box[3] - foot * height) <= 0.025 * height


def test_boxes_are_tight():
    for scene in many():
        for item in scene.objects:
            left, top, right, bottom = item.box
            inside = np.zeros_like(scene.depth, bool)
            inside[top:bottom, left:right] = True
            alpha = item.rgba[..., 3]
            assert not alpha[~inside].any()
            assert all(
                edge.any() for edge in (alpha[top, :], alpha[bottom - 1, :], alpha[:, left], alpha[:, right - 1])
            )


def test_a_shadow_is_in_the_shadow_layer_alone():
    cast = 0
    for scene in many():
        for item in scene.objects:
            pixels = item.shadow[..., 3] > 0
            assert not pixels[: int(scene.horizon * len(pixels))].any()
            assert np.allclose(item.shadow[pixels][:, :3], scene.light.shade, rtol=0, atol=1e-6)
            plain = renderer.over(item.rgba, scene.background)
            assert np.array_equal(plain[item.rgba[..., 3] == 0], scene.background[item.rgba[..., 3] == 0])
            if renderer.catalogue()[item.name].material == "solid":
                assert item.shadow[..., 3].max() > 0.25, (item.name, scene.seed)
                cast += 1
    assert cast > 40


def test_a_shadow_touches_the_foot_of_what_stands():
    for name in ("dog", "soccer ball", "house"):
        item = renderer.render(Request("snow", (name,)), 256, 256, 3).objects[0]
        left, _, right, bottom = item.box
        below = item.shadow[bottom - 3 : bottom + 2, left:right, 3]
        assert below.max() > 0.3, name


def test_a_bright_side_is_where_the_shadows_come_from():
    sides = []
    for seed in SEEDS:
        size = SIZES[seed % 3]
        plain = renderer.render(Request(count=1), *size, seed)
        bright = renderer.render(Request(count=1, bright_side=True), *size, seed)
        (item,), (same,) = plain.objects, bright.objects
        assert np.array_equal(item.rgba_with_shadow, same.rgba_with_shadow)
        left, right = np.array_split(bright.background / plain.background.clip(1e-3), 2, axis=1)
        assert max(left.mean(), right.mean()) > 1.1 * min(left.mean(), right.mean())
        across = np.arange(size[1])
        centres = [
            (alpha * across).sum() / alpha.sum() for alpha in (item.shadow[..., 3], item.rgba[..., 3]) if alpha.any()
        ]
        if len(centres) == 2 and abs(centres[0] - centres[1]) > 3:
            sides.append((left.mean() > right.mean()) == (centres[0] > centres[1]))
    assert (
        len(sides) > 15 and np.mean(sides) > 0.9
    )  # a shadow that the image's edge cuts may seem to fall the other way


def test_words_match_the_content():
    known = renderer.catalogue()
    for scene in many():
        for item in scene.objects:
            assert item.prompt in known[item.name].prompts and item.prompt in scene.prompt
        assert any(words in scene.prompt for words in renderer.PLACE_WORDS[scene.kind])


def test_the_same_seed_gives_the_same_pixels_and_another_one_does_not():
    first, again, other = (renderer.render(Request(), 128, 128, seed) for seed in (5, 5, 6))
    assert np.array_equal(first.composite, again.composite) and first.prompt == again.prompt
    assert not np.array_equal(first.composite, other.composite)


@pytest.mark.parametrize("kind", renderer.KINDS)
def test_every_place_has_a_ground_and_a_far_end(kind):
    scene = renderer.render(Request(kind, ()), 128, 128, 1)
    assert np.array_equal(scene.composite, scene.background) and scene.composite.std() > 0.03
    rows = (np.arange(128) + 0.5) / 128
    ground = 1 - (rows - scene.horizon) / (1 - scene.horizon)
    lower = rows > scene.horizon + 0.25 * (1 - scene.horizon)
    assert np.allclose(scene.depth[lower], ground[lower, None], rtol=0, atol=1e-5)
    assert scene.depth[0].min() > 0.7


@pytest.mark.parametrize("name", list(renderer.catalogue()))
def test_every_object_renders(name):
    scene = renderer.render(Request("table", (name,)), 128, 128, 2)
    item = scene.objects[0]
    material = renderer.catalogue()[name].material
    middle = item.rgba[..., 3][item.rgba[..., 3] > 0.05]
    assert len(middle) > 200 and item.visible == pytest.approx(1)
    partial = ((middle > 0.1) & (middle < 0.9)).mean()
    assert partial > 0.3 if material != "solid" else partial < 0.3


def test_training_never_sees_what_is_held_out():
    for seed in range(150):
        scene = renderer.render(Request(train=True), 64, 64, seed)
        assert not any(renderer.is_held_out(o.name, scene.kind) for o in scene.objects)
    kept = [renderer.render(Request(held_out=True, count=1), 64, 64, seed) for seed in range(20)]
    assert all(
        renderer.is_held_out(s.objects[0].name, s.kind) and not renderer.catalogue()[s.objects[0].name].held_out
        for s in kept
    )


@pytest.mark.parametrize(
    "request_, word",
    [
        (Request("moon"), "moon"),
        (Request(objects=("dragon",)), "dragon"),
        (Request(objects=("dog",) * 7), "at most 6"),
    ],
)
def test_a_wrong_request_says_what_is_known(request_, word):
    with pytest.raises(ValueError, match=word):
        renderer.render(request_, 64, 64, 0)


@pytest.mark.parametrize(
    ("name", "request_", "seed"),
    [
        ("scene", Request("meadow", ("house", "dog", "pumpkin")), 7),
        ("beach", Request("beach"), 5),
    ],
)
def test_the_bundled_pictures_are_what_the_renderer_says(name, request_, seed):
    folder = Path(renderer.__file__).parent.parent / "workflows" / "input"
    scene = renderer.render(request_, 512, 768, seed)
    picture = np.asarray(Image.open(folder / f"strata_{name}.png"), np.float32) / 255
    depth = np.asarray(Image.open(folder / f"strata_{name}_depth.png"))
    assert np.abs(picture - scene.composite).max() < 1 / 255
    assert depth.min() > 0 and np.abs((depth.astype(np.float64) - 1) / 65534 - scene.depth).max() < 1 / 65534
