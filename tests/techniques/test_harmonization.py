"""Fusing layers by their alphas: against Eq. 1 and 12 of DreamLayer written out pixel by pixel in float64."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter, minimum_filter
from strata.techniques.compositing import flatten
from strata.techniques.depth import push_pull
from strata.techniques.feature_guidance import masks_at_level
from strata.techniques.geometry import rasterise
from strata.techniques.harmonization import (
    band,
    colours_and_alphas,
    feathered,
    fuse_latents,
    harmonised_layers,
    harmonised_picture,
    keep_detail,
    light_behind,
    on_canvas,
    visible_shares,
)
from strata.techniques.layers import Layer, LayerStack


def alphas(count, *size, seed=0):
    return torch.rand(count, 1, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def written_out(background, foregrounds, alpha):
    """Eq. 12 as it stands: k layers, the background is the first."""
    k, out = len(foregrounds) + 1, np.zeros(background.shape)
    for y in range(background.shape[-2]):
        for x in range(background.shape[-1]):
            a = [None, *(float(part[0, y, x]) for part in alpha)]
            free = float(np.prod([1 - a[i] for i in range(1, k)]))
            value = background[..., y, x].numpy() * free
            for i in range(1, k):
                value = value + foregrounds[i - 1][..., y, x].numpy() * a[i] * float(
                    np.prod([1 - a[f] for f in range(i + 1, k)])
                )
            out[..., y, x] = value
    return out


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("extra", [(), (3,)])  # a video's latent has frames too
def test_fused_latents_are_equation_12(count, extra):
    background, foregrounds = (
        torch.randn(2, 4, *extra, 5, 6, dtype=torch.float64),
        torch.randn(count, 2, 4, *extra, 5, 6, dtype=torch.float64),
    )
    alpha = alphas(count, 5, 6)
    assert np.allclose(
        fuse_latents(background, foregrounds, alpha).numpy(),
        written_out(background, foregrounds, alpha),
        rtol=0,
        atol=1e-12,
    )


def test_the_shares_sum_to_one_and_fusing_pixels_is_flattening_them():
    alpha, colours = alphas(3, 8, 9).float(), torch.rand(4, 3, 8, 9)
    free, shares = visible_shares(alpha)
    assert torch.allclose(free + shares.sum(0), torch.ones(1, 8, 9), rtol=0, atol=1e-6)
    layers = [Layer(colours[0].permute(1, 2, 0))] + [
        Layer(torch.cat([c, a]).permute(1, 2, 0)) for c, a in zip(colours[1:], alpha, strict=True)
    ]
    flat, _ = flatten(LayerStack((9, 8), tuple(layers)))
    assert torch.allclose(fuse_latents(colours[0], colours[1:], alpha), flat.permute(2, 0, 1), rtol=0, atol=1e-5)


def test_layers_in_front_hide_those_behind():
    background, red, blue = torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4), torch.full((1, 1, 4, 4), 2.0)
    opaque = torch.ones(2, 1, 4, 4)
    assert (fuse_latents(background, torch.stack([red, blue]), opaque) == 2).all()
    assert (fuse_latents(background, torch.stack([blue, red]), opaque) == 1).all()
    assert torch.equal(fuse_latents(red, torch.stack([blue]), torch.zeros(1, 1, 4, 4)), red)


def test_alphas_at_latent_size_are_pillows_means():
    alpha = alphas(1, 48, 40).float()
    expected = np.asarray(Image.fromarray(alpha[0, 0].numpy()).resize((5, 6), Image.BOX))
    assert np.allclose(masks_at_level(alpha[:, 0], (6, 5))[0].numpy(), expected, rtol=0, atol=1e-6)


def test_a_latent_goes_where_its_layer_goes():
    latent, layer = torch.randn(4, 6, 6), Layer(torch.rand(48, 48, 4))

    def shown(canvas=(48, 48), **fields):
        return on_canvas(latent, replace(layer, **fields), canvas, 8)

    assert (
        torch.equal(shown(), latent)
        and torch.equal(shown(flip_h=True), latent.flip(2))
        and torch.equal(shown(flip_v=True), latent.flip(1))
    )
    assert torch.equal(shown(x=16, y=-8)[:, :5, 2:], latent[:, 1:, :4])
    assert torch.equal(shown(rotation=math.pi / 2), torch.rot90(latent, -1, (1, 2)))  # clockwise, as rot90 is not
    assert torch.equal(shown((96, 96), w=96, h=96), latent.repeat_interleave(2, 1).repeat_interleave(2, 2))
    # Sides that are no multiples.
    assert torch.equal(on_canvas(latent[:, :, :5], Layer(torch.rand(44, 37, 4)), (37, 44), 8), latent[:, :, :5])
    turned = shown(rotation=0.5)
    assert abs(turned[:, 2:4, 2:4].std() - latent.std()) < 0.4 and all(
        value in latent for value in turned[:, 2:4, 2:4].flatten()
    )


def test_feathering_ends_inside_of_the_edge():
    alpha = torch.zeros(1, 1, 40, 40)
    alpha[..., 10:30, 10:30] = 0.8
    soft = feathered(alpha, 4)
    assert torch.equal(feathered(alpha, 0), alpha) and (soft <= alpha).all() and (soft[alpha == 0] == 0).all()
    row = soft[0, 0, 20, 10:20]
    assert (row.diff() >= 0).all() and row[0] < 0.2 and row[6:].allclose(torch.tensor(0.8), rtol=0, atol=1e-6)


@pytest.mark.parametrize("radius", [0.5, 3.0, 4.0])
def test_feathering_is_scipys_gaussian_of_where_alpha_is(radius):
    alpha = alphas(2, 20, 24)
    alpha[:, :, :6, :9] = alpha[1, :, 12:] = 0
    where = (alpha > 0).double().numpy()
    for layer in (0, 1):
        soft = gaussian_filter(where[layer, 0], radius / 2, mode="nearest", radius=max(1, round(1.5 * radius)))
        expected = alpha[layer, 0].numpy() * (2 * soft - 1).clip(0, 1)
        assert np.abs(feathered(alpha, radius)[layer, 0].numpy() - expected).max() < 1e-12


@pytest.mark.parametrize("radius", [3.0, 6.0, 8.0])
def test_a_rim_of_a_third_of_the_radius_around_objects_does_not_count(radius):
    """Against the least of each window, one pixel at a time, and SciPy's Gaussian."""
    generator = torch.Generator().manual_seed(2)
    before, drawn, same = torch.rand(3, 1, 3, 20, 30, generator=generator, dtype=torch.float64)
    visible = torch.ones(20, 30, dtype=torch.float64)
    visible[6:12, 14:20] = torch.rand(6, 6, generator=generator, dtype=torch.float64).round()
    rim = {3.0: 1, 6.0: 2, 8.0: 3}[radius]
    counted = np.ones((20, 30))
    for y in range(20):
        for x in range(30):
            counted[y, x] = visible[max(y - rim, 0) : y + rim + 1, max(x - rim, 0) : x + rim + 1].min()

    def smooth(values):
        return gaussian_filter(values, radius / 2, mode="nearest", radius=round(1.5 * radius))

    found = (keep_detail(before, drawn, same, visible[None, None], radius) - before)[0].numpy()
    for channel in range(3):
        change = (drawn - same)[0, channel].numpy() * counted
        assert np.abs(found[channel] - smooth(change) / np.maximum(smooth(counted), 1e-4)).max() < 1e-12


def test_detail_stays_and_what_is_smooth_comes(radius=6.0):
    before, drawn, same = torch.rand(3, 1, 3, 40, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    visible = torch.ones(1, 1, 40, 50, dtype=torch.float64)
    found = keep_detail(before, drawn, same, visible, radius)
    for channel in range(3):
        smooth = gaussian_filter(
            (drawn - same)[0, channel].numpy(), radius / 2, mode="nearest", radius=round(1.5 * radius)
        )
        assert np.abs((found - before)[0, channel].numpy() - smooth).max() < 1e-12
    visible[..., 10:30, 20:40] = 0
    hidden = drawn.clone()
    hidden[..., 10:30, 20:40] = 100
    outside = visible.expand(1, 3, -1, -1) > 0
    assert torch.equal(
        keep_detail(before, drawn, same, visible, radius)[outside],
        keep_detail(before, hidden, same, visible, radius)[outside],
    )
    shade = torch.full_like(before, 0.2)
    assert torch.allclose(
        keep_detail(before, same - shade, same, visible, radius)[outside], (before - shade)[outside], rtol=0, atol=1e-12
    )


def two_objects(*size):
    """A background and two things in front of it, which lie over each other."""
    generator = torch.Generator().manual_seed(4)
    pictures = [torch.rand(*size, channels, generator=generator) for channels in (3, 4, 4)]
    for pixels, place in zip(pictures[1:], (slice(8, 24), slice(16, 32)), strict=True):
        pixels[..., 3] = 0
        pixels[place, place, 3] = 0.75
    names = ("place", "behind", "in front")
    return LayerStack(size[::-1], tuple(Layer(*one, extra={"kept": 1}) for one in zip(pictures, names, strict=True)))


def test_colours_and_alphas_are_the_layers_on_the_canvas():
    stack = two_objects(40, 44)
    stack = stack.with_layers([*stack.layers[:2], replace(stack.layers[2], x=5, y=-3, flip_h=True)])
    colours, opacity = colours_and_alphas(stack)
    for layer, colour, alpha in zip(stack.layers, colours, opacity, strict=True):
        pixels = rasterise(layer, stack.canvas).permute(2, 0, 1)
        assert torch.equal(alpha, pixels[3:]) and torch.equal((colour * (alpha > 0)), pixels[:3] * (alpha > 0))
        assert colour[:, alpha[0] == 0].any() or (alpha > 0).all()


def test_an_even_change_of_light_goes_on_behind_an_object():
    before, free = torch.rand(1, 3, 48, 48, generator=torch.Generator().manual_seed(5)) / 2, torch.ones(1, 48, 48)
    free[:, 16:32, 16:32] = 0
    drawn = before + 0.25
    drawn[..., 16:32, 16:32] = 1  # the thing, as the model draws it
    for soft in (True, False):
        found = light_behind(before, drawn, free, soft)
        assert torch.allclose(found, (before[0] + 0.25).movedim(0, -1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("soft", [False, True])
def test_the_background_is_the_drawn_one_where_it_is_seen_and_else_keeps_its_own_in_the_light_around(soft):
    """A pixel of the latent, 8, around the foregrounds is not looked at: their rim is drawn there."""
    before, drawn = torch.rand(2, 1, 3, 64, 72, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    free = torch.ones(1, 64, 72, dtype=torch.float64)
    free[:, 20:30, 30:44], free[:, 40, 20] = 0.25, 0
    clear = minimum_filter(free[0].numpy(), 2 * 8 + 1, mode="constant", cval=1)
    light = push_pull((drawn - before).movedim(1, -1)[:, None], torch.from_numpy(clear)[None, None])[0, 0]
    seen = feathered(torch.from_numpy(clear)[None, None], 8)[0, 0] if soft else free[0]
    seen = seen[..., None].numpy()
    lit = before[0].movedim(0, -1).numpy() + light.numpy()
    expected = ((1 - seen) * lit + seen * drawn[0].movedim(0, -1).numpy()).clip(0, 1)
    assert np.abs(light_behind(before, drawn, free, soft).numpy() - expected).max() < 1e-9


@pytest.mark.parametrize("relight", [False, True])
def test_harmonised_layers_are_the_picture_where_nothing_fades(relight):
    stack = two_objects(56, 60)
    colours, opacity = colours_and_alphas(stack)
    drawn = torch.rand(1, 3, 56, 60, generator=torch.Generator().manual_seed(6))
    picture = harmonised_picture(colours, opacity, drawn, relight, 0.0)
    found = harmonised_layers(stack, colours, opacity, drawn, relight)
    assert picture.shape == (1, 56, 60, 3) and [layer.name for layer in found.layers] == ["place", "behind", "in front"]
    assert all(layer.extra == {"kept": 1} for layer in found.layers)
    ground = found.layers[0].image.movedim(-1, 0)
    if relight:
        assert torch.equal(picture[0], drawn[0].movedim(0, -1))
        for layer, own, share in zip(found.layers[1:], colours[1:], visible_shares(opacity[1:])[1], strict=True):
            expected = own + (drawn[0] - own) * share
            assert torch.allclose(layer.image[..., :3].movedim(-1, 0), expected, rtol=0, atol=1e-6)
    else:
        assert found.layers[1:] == stack.layers[1:]
        expected = fuse_latents(drawn[0], colours[1:], opacity[1:])
        assert torch.allclose(picture[0].movedim(-1, 0), expected, rtol=0, atol=1e-6)
    assert torch.equal(ground[:, 48:], drawn[0, :, 48:])
    opacity[0, :, :5] = 0.5
    picture = harmonised_picture(colours, opacity, drawn, relight, 0.0)
    found = harmonised_layers(stack, colours, opacity, drawn, relight)
    assert picture.shape[-1] == 4 and torch.equal(picture[0, ..., 3], flatten(found)[1])


def test_a_band_is_whole_near_the_things_and_nothing_beyond_its_reach():
    things = torch.zeros(1, 96, 128)
    things[:, 40:60, 50:70] = 1
    found = band(things, 40.0)
    y, x = torch.meshgrid(torch.arange(96.0), torch.arange(128.0), indexing="ij")
    apart = torch.hypot((40 - y).clamp_min(0) + (y - 59).clamp_min(0), (50 - x).clamp_min(0) + (x - 69).clamp_min(0))
    expected = (2 - 2 * apart / 40).clamp(0, 1)  # by every pixel's own distance; the grid's cells are of 2 pixels
    assert found.shape == things.shape and (found[0] - expected).abs().max() < 0.2
    assert found[things == 1].min() == 1 and found[0][apart > 45].max() == 0
    assert band(torch.zeros(1, 8, 8), 5.0).max() == 0
    assert band(things[..., :1], 5.0).shape == (1, 96, 1)
