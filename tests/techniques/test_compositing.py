"""Flattening against the W3C recommendation written out pixel by pixel, and against Pillow."""

import colorsys
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops
from strata.techniques import compositing
from strata.techniques.arrange import merge
from strata.techniques.layers import BLEND_MODES, Layer, LayerStack

LEVELS = [0.0, 0.1, 0.25, 0.5, 0.7, 1.0]


# The recommendation's formulas, one number at a time, with its own names.
def multiply(cb, cs):
    return cb * cs


def screen(cb, cs):
    return 1 - (1 - cb) * (1 - cs)


def hard_light(cb, cs):
    return multiply(cb, 2 * cs) if cs <= 0.5 else screen(cb, 2 * cs - 1)


def color_dodge(cb, cs):
    if cb == 0:
        return 0.0
    return 1.0 if cs == 1 else min(1.0, cb / (1 - cs))


def color_burn(cb, cs):
    if cb == 1:
        return 1.0
    return 0.0 if cs == 0 else 1 - min(1.0, (1 - cb) / cs)


def soft_light(cb, cs):
    if cs <= 0.5:
        return cb - (1 - 2 * cs) * cb * (1 - cb)
    d = ((16 * cb - 12) * cb + 4) * cb if cb <= 0.25 else math.sqrt(cb)
    return cb + (2 * cs - 1) * (d - cb)


SEPARABLE = {
    "normal": lambda cb, cs: cs,
    "multiply": multiply,
    "screen": screen,
    "overlay": lambda cb, cs: hard_light(cs, cb),
    "darken": min,
    "lighten": max,
    "color-dodge": color_dodge,
    "color-burn": color_burn,
    "hard-light": hard_light,
    "soft-light": soft_light,
    "difference": lambda cb, cs: abs(cb - cs),
    "exclusion": lambda cb, cs: cb + cs - 2 * cb * cs,
}


def lum(c):
    return 0.3 * c[0] + 0.59 * c[1] + 0.11 * c[2]


def clip_color(c):
    low, high, light = min(c), max(c), lum(c)
    if low < 0:
        c = [light + (x - light) * light / (light - low) for x in c]
    if high > 1:
        c = [light + (x - light) * (1 - light) / (high - light) for x in c]
    return c


def set_lum(c, light):
    return clip_color([x + light - lum(c) for x in c])


def sat(c):
    return max(c) - min(c)


def set_sat(c, s):
    order = sorted(range(3), key=lambda i: c[i])
    result = [0.0, 0.0, 0.0]
    if c[order[2]] > c[order[0]]:
        result[order[1]] = (c[order[1]] - c[order[0]]) * s / (c[order[2]] - c[order[0]])
        result[order[2]] = s
    return result


WHOLE = {
    "hue": lambda cb, cs: set_lum(set_sat(cs, sat(cb)), lum(cb)),
    "saturation": lambda cb, cs: set_lum(set_sat(cb, sat(cs)), lum(cb)),
    "color": lambda cb, cs: set_lum(cs, lum(cb)),
    "luminosity": lambda cb, cs: set_lum(cb, lum(cs)),
}


def w3c_blend(mode, cb, cs):
    return WHOLE[mode](cb, cs) if mode in WHOLE else [SEPARABLE[mode](b, s) for b, s in zip(cb, cs, strict=True)]


def w3c_over(mode, backdrop, source):
    """co = cs·αs·(1 − αb) + αs·αb·B(cb, cs) + (1 − αs)·αb·cb on straight RGBA tuples."""
    (*cb, ab), (*cs, a) = backdrop, source
    alpha = a + ab * (1 - a)
    if alpha == 0:
        return [0.0] * 4
    blended = w3c_blend(mode, cb, cs)
    return [
        (s * a * (1 - ab) + a * ab * m + (1 - a) * ab * b) / alpha for s, m, b in zip(cs, blended, cb, strict=True)
    ] + [alpha]


def random_rgba(seed, height=6, width=7, levels=True):
    generator = np.random.default_rng(seed)
    values = generator.choice(LEVELS, (height, width, 4)) if levels else generator.random((height, width, 4))
    return torch.from_numpy(values)


def flat(*layers, canvas=(7, 6), **options):
    colour, alpha = compositing.flatten(LayerStack(canvas, layers), **options)
    return torch.cat([colour, alpha[..., None]], -1)


@pytest.mark.parametrize("mode", compositing.W3C_MODES)
def test_blend_equals_the_recommendation(mode):
    generator = np.random.default_rng(1)
    pairs = np.concatenate([generator.choice(LEVELS, (300, 2, 3)), generator.random((300, 2, 3))])
    expected = [w3c_blend(mode, list(cb), list(cs)) for cb, cs in pairs]
    got = compositing.blend(torch.from_numpy(pairs[:, 0].T.copy()), torch.from_numpy(pairs[:, 1].T.copy()), mode)
    torch.testing.assert_close(got.T, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("mode", compositing.W3C_MODES)
def test_flatten_equals_the_recommendation(mode):
    bottom, middle, top = (random_rgba(seed) for seed in (1, 2, 3))
    top = Layer(top, blend_mode=mode, opacity=0.75)
    got = flat(Layer(bottom), Layer(middle, blend_mode=mode), top)
    for y in range(6):
        for x in range(7):
            expected = [0.0] * 4
            for layer in (Layer(bottom), Layer(middle, blend_mode=mode), top):
                *colour, alpha = layer.image[y, x].tolist()
                expected = w3c_over(layer.blend_mode, expected, [*colour, alpha * layer.opacity])
            assert got[y, x].tolist() == pytest.approx(expected, abs=1e-7), (x, y)


def test_w3c_modes_are_the_sixteen_that_the_document_shares_with_the_recommendation():
    assert set(compositing.W3C_MODES) == set(SEPARABLE) | set(WHOLE)
    assert len(compositing.W3C_MODES) == 16 and set(compositing.W3C_MODES) < set(BLEND_MODES)


@pytest.mark.parametrize("mode", sorted(set(BLEND_MODES) - set(compositing.W3C_MODES)))
def test_other_modes_raise_and_name_the_layer(mode):
    layer = Layer(random_rgba(1), "Glow", blend_mode=mode)
    with pytest.raises(ValueError, match=f"layers: layer 'Glow' has the blend mode '{mode}'.*normal.*luminosity"):
        flat(layer)
    assert flat(replace(layer, visible=False)).eq(0).all()
    with pytest.raises(ValueError, match="no W3C formula"):
        compositing.blend(torch.zeros(3), torch.zeros(3), mode)


def test_linear_light_mixes_light():
    bottom, top = random_rgba(1), random_rgba(2)
    got = flat(Layer(bottom), Layer(top, blend_mode="multiply"), linear=True)

    def light(v):
        return v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4

    def srgb(v):
        return v * 12.92 if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055

    for y in range(6):
        for x in range(7):
            layers = [[*map(light, pixel[:3]), pixel[3]] for pixel in (bottom[y, x].tolist(), top[y, x].tolist())]
            *colour, alpha = w3c_over("multiply", w3c_over("normal", [0.0] * 4, layers[0]), layers[1])
            assert got[y, x].tolist() == pytest.approx([*map(srgb, colour), alpha], abs=1e-6)


def test_to_linear_and_to_srgb_undo_each_other_at_every_8_bit_value():
    values = torch.arange(256, dtype=torch.float64) / 255
    linear = compositing.to_linear(values)
    # The usual example: half the light is 188.
    assert linear[188].item() == pytest.approx(0.5028864580325687, abs=1e-12)
    torch.testing.assert_close(compositing.to_srgb(linear), values, atol=1e-7, rtol=0)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_what_layers_leave_clear_is_the_product_over_all_nearer_ones(count):
    alphas = torch.rand(count, 7, 9, generator=torch.Generator().manual_seed(1))
    left = np.ones((7, 9))
    for number in reversed(range(count + 1)):
        if number < count:
            left = left * (1 - alphas[number].double().numpy())
        found = compositing.left_clear(alphas)[number]
        assert np.abs(found.double().numpy() - left).max() < 1e-6


def test_flatten_image_equals_pillow_alpha_composite():
    pictures = [np.random.default_rng(seed).integers(0, 256, (40, 30, 4), dtype=np.uint8) for seed in range(4)]
    expected = Image.fromarray(pictures[0])
    for picture in pictures[1:]:
        expected = Image.alpha_composite(expected, Image.fromarray(picture))
    stack = LayerStack((30, 40), tuple(Layer(torch.from_numpy(picture).float() / 255) for picture in pictures))
    image, alpha = compositing.flatten_image(stack, (0, 0, 0, 0))
    assert torch.equal(image[..., 3], alpha)
    # Pillow rounds to 8 bits after each of the three layers.
    assert np.abs(image.numpy() * 255 - np.asarray(expected).astype(float)).max() <= 2


@pytest.mark.parametrize(
    "mode, pillow",
    [
        ("multiply", ImageChops.multiply),
        ("screen", ImageChops.screen),
        ("darken", ImageChops.darker),
        ("lighten", ImageChops.lighter),
        ("difference", ImageChops.difference),
        ("overlay", ImageChops.overlay),
        ("hard-light", ImageChops.hard_light),
    ],
)
def test_blends_equal_pillow_on_opaque_pictures(mode, pillow):
    a, b = (np.random.default_rng(seed).integers(0, 256, (40, 30, 3), dtype=np.uint8) for seed in range(2))
    expected = np.asarray(pillow(Image.fromarray(a), Image.fromarray(b))).astype(float)
    layers = [Layer(torch.from_numpy(a).float() / 255), Layer(torch.from_numpy(b).float() / 255, blend_mode=mode)]
    got = flat(*layers, canvas=(30, 40), background=(0, 0, 0, 1))[..., :3].numpy() * 255
    assert np.abs(got - expected).max() <= 2  # Pillow truncates


def test_luminosity_of_grey_keeps_hue():
    red = torch.tensor([0.8, 0.2, 0.2]).expand(2, 2, 3)
    grey = torch.full((2, 2, 3), 0.5)
    got = flat(Layer(red), Layer(grey, blend_mode="luminosity"), canvas=(2, 2))[0, 0, :3].tolist()
    assert colorsys.rgb_to_hls(*got)[0] == pytest.approx(0.0, abs=1e-6) and lum(got) == pytest.approx(0.5, abs=1e-6)


def test_background_shows_where_nothing_covers_it_and_opaque_gives_rgb():
    layer = Layer(torch.ones(2, 2, 3), x=1, y=1)
    image, alpha = compositing.flatten_image(LayerStack((4, 4), (layer,)), (0.2, 0.4, 0.6, 1))
    assert image.shape == (4, 4, 3) and alpha.eq(1).all()
    torch.testing.assert_close(image[0, 0], torch.tensor([0.2, 0.4, 0.6]))
    assert image[1:3, 1:3].eq(1).all()
    linear, _ = compositing.flatten_image(LayerStack((4, 4), (layer,)), (0.2, 0.4, 0.6, 0.5), linear=True)
    torch.testing.assert_close(linear[0, 0], torch.tensor([0.2, 0.4, 0.6, 0.5]), atol=1e-6, rtol=0)


def test_strips_do_not_show(monkeypatch):
    layers = [
        Layer(
            random_rgba(seed, 50, 40, levels=False),
            x=3 * seed,
            y=-2 * seed,
            w=40 + seed,
            rotation=0.1 * seed,
            opacity=0.8,
        )
        for seed in range(4)
    ]
    reference = flat(*layers, canvas=(60, 55))
    monkeypatch.setattr(compositing, "_STRIP_PIXELS", 60 * 7)
    torch.testing.assert_close(flat(*layers, canvas=(60, 55)), reference, atol=1e-12, rtol=0)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_a_partition_by_masks_flattens_to_the_picture(height, width, count, seed):
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand((height, width, 3), generator=generator)
    label = torch.randint(count, (height, width), generator=generator)
    layers = [Layer(image, str(i), mask=(label != i).float()) for i in range(count)]
    got = flat(*layers, canvas=(width, height))
    assert torch.equal(got[..., :3], image) and got[..., 3].eq(1).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.data())
def test_merging_a_range_of_normal_layers_keeps_the_picture(seed, data):
    generator = torch.Generator().manual_seed(seed)
    layers = [
        Layer(
            torch.rand((4, 5, 4), generator=generator, dtype=torch.float64),
            str(i),
            x=data.draw(st.integers(-4, 6)),
            y=data.draw(st.integers(-3, 6)),
            rotation=data.draw(st.sampled_from([0.0, 0.4, math.pi / 2])),
            opacity=data.draw(st.sampled_from([0.3, 1.0])),
            visible=data.draw(st.booleans()) or i == 1,
        )
        for i in range(4)
    ]
    layers[1] = replace(layers[1], x=1, y=1)  # one that is on the canvas for sure
    stack = LayerStack((7, 6), tuple(layers))
    last = data.draw(st.integers(1, 3))
    merged = merge(stack, range(data.draw(st.integers(0, 1)), last + 1))
    assert str(last) in [layer.name for layer in merged.layers]
    torch.testing.assert_close(flat(*merged.layers), flat(*layers), atol=1e-9, rtol=0)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(compositing.W3C_MODES), st.integers(0, 2), st.integers(0, 2**32 - 1))
def test_what_is_not_visible_changes_nothing(mode, position, seed):
    generator = torch.Generator().manual_seed(seed)
    layers = [Layer(torch.rand((6, 7, 4), generator=generator)) for _ in range(2)]
    ghost = torch.rand((6, 7, 4), generator=generator)
    clear = ghost.clone()
    clear[..., 3] = 0
    expected = flat(*layers)
    for unseen in (
        Layer(clear, blend_mode=mode),
        Layer(ghost, opacity=0.0, blend_mode=mode),
        Layer(ghost, visible=False, blend_mode=mode),
        Layer(ghost, mask=torch.ones(6, 7), blend_mode=mode),
        Layer(ghost, x=7, blend_mode=mode),
    ):
        assert torch.equal(flat(*layers[:position], unseen, *layers[position:]), expected)


def test_values_outside_the_range_come_out_inside_it():
    wild = Layer(torch.tensor([[[1.5, -0.5, 0.5, 1.2]]]))
    assert flat(wild, canvas=(1, 1)).tolist() == [[[1.0, 0.0, 0.5, 1.0]]]


def test_preview_shows_the_picture_and_then_every_layer_on_a_checkerboard():
    layers = (Layer(torch.full((100, 200, 3), 0.9)), Layer(torch.zeros(50, 50, 3), visible=False))
    pictures = compositing.preview(LayerStack((200, 100), layers), longest=100, square=5)
    assert pictures.shape == (3, 50, 100, 3)
    torch.testing.assert_close(pictures[0], torch.full((50, 100, 3), 0.9))
    assert pictures[2][:25, :25].eq(0).all()
    torch.testing.assert_close(pictures[2][40, [50, 55, 60], 0], torch.tensor([0.6, 0.8, 0.6]))
    small = compositing.preview(LayerStack((20, 10), (Layer(torch.full((10, 20, 3), 0.9)),)), longest=100)
    assert small.shape == (2, 10, 20, 3), "never enlarged"
    nothing = compositing.preview(LayerStack((1024, 32), (Layer(torch.zeros(32, 1024, 4)),)))
    board = np.kron(np.indices((2, 64)).sum(0) % 2 * 0.2 + 0.6, np.ones((8, 8)))  # 512 pixels long, squares of 8
    assert np.allclose(nothing, board[None, ..., None], rtol=0, atol=1e-6)
