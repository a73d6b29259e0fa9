"""Harmonize layers as a node on a checkpoint with random weights: which pixels are kept, what the layers hold, and what
is refused.
"""

from dataclasses import replace

import comfy.samplers
import comfy.sd
import pytest
import torch
from strata.nodes.harmonize import HarmonizeLayers
from strata.patches import mini_family
from strata.patches.inversion import invert
from strata.techniques.compositing import flatten
from strata.techniques.layers import Layer, LayerStack, effect_of, read_layers, write_layers

WIDTH, HEIGHT = 100, 76  # no multiples of eight
SETTINGS = {
    "seed": 1,
    "steps": 6,
    "cfg": 1.0,
    "sampler_name": "euler",
    "scheduler": "normal",
    "start_percent": 0.4,
    "end_percent": 0.6,
}


@pytest.fixture(scope="module")
def loaded(family):
    mini_family.register()
    with torch.inference_mode():
        model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(family["sd"]))
        return (
            model,
            clip.encode_from_tokens_scheduled(clip.tokenize("a dog")),
            clip.encode_from_tokens_scheduled(clip.tokenize("")),
            vae,
        )


def stack(*changes):
    generator = torch.Generator().manual_seed(0)
    item = torch.rand(30, 40, 4, generator=generator)
    item[..., 3] = 1
    first = Layer(item, "first", x=10, y=20)
    second = Layer(item.flip(0), "second", x=40, y=30, opacity=0.5)
    return LayerStack(
        (WIDTH, HEIGHT), (Layer(torch.rand(HEIGHT, WIDTH, 3, generator=generator), "back"), first, second, *changes)
    )


def run(loaded, layers, foregrounds="keep", feather=0.0, **changed):
    with torch.inference_mode():
        result = HarmonizeLayers.execute(
            *loaded, write_layers(layers), **{**SETTINGS, **changed}, foregrounds=foregrounds, feather=feather
        )
    image, latent, found = result.args
    return image, latent["samples"], read_layers(found)


def test_objects_keep_their_pixels_and_the_rest_is_the_models(loaded):
    layers = stack()
    image, latent, found = run(loaded, layers)
    drawn = run(loaded, layers, "relight")[0]
    assert image.shape == (1, HEIGHT, WIDTH, 3) and latent.shape == (1, 4, 10, 13)
    # Where nothing lies over the first.
    assert torch.allclose(image[0, 21:29, 11:39], layers.layers[1].image[1:9, 1:29, :3], rtol=0, atol=1e-6)
    assert torch.equal(image[0, :19], drawn[0, :19]) and not torch.allclose(
        image[0, 21:29], drawn[0, 21:29], rtol=1e-5, atol=0.05
    )
    half = layers.layers[2].image[20:, 20:, :3] * 0.5 + drawn[0, 50:60, 60:80] * 0.5
    assert torch.allclose(image[0, 50:60, 60:80], half, rtol=1e-5, atol=1e-5)
    assert (
        [layer.name for layer in found.layers] == ["back", "first", "second"]
        and found.layers[1].x == 10
        and found.layers[2].opacity == 0.5
    )
    assert torch.allclose(flatten(found)[0][:3, :40], image[0, :3, :40], rtol=0, atol=1e-6)


def test_behind_an_object_the_background_is_as_it_was_in_the_light_around_it(loaded):
    """Its texture stays, and what the model has changed around the thing goes on smoothly behind it, so that no
    silhouette is left.
    """
    layers = stack()
    layers = layers.with_layers(
        [replace(layers.layers[0], image=0.45 + 0.1 * layers.layers[0].image), *layers.layers[1:]]
    )
    before, found = layers.layers[0].image, run(loaded, layers)[2].layers[0].image
    change = found - before
    inside, around = change[23:27, 13:37], change[:4, :40]
    assert inside.diff(dim=1).abs().mean() < 0.3 * around.diff(dim=1).abs().mean(), (
        "no texture of the model behind the thing"
    )
    assert inside.abs().max() > 1e-3 and (inside.mean((0, 1)) - change[:12].mean((0, 1))).abs().max() < around.std()
    assert torch.allclose(found[:3, :40], run(loaded, layers, "relight")[2].layers[0].image[:3, :40], rtol=0, atol=1e-6)


def test_a_transparent_canvas_stays_transparent(loaded):
    """Where nothing lies the picture and the background are as transparent as they were; an opaque one has three
    channels as ever.
    """
    opaque = stack()
    alpha = torch.ones(HEIGHT, WIDTH, 1)
    alpha[:10] = 0
    alpha[10:15] = 0.5
    ground = replace(opaque.layers[0], image=torch.cat([opaque.layers[0].image, alpha], -1))
    for foregrounds in ("keep", "relight"):
        image, _, found = run(loaded, opaque.with_layers([ground, *opaque.layers[1:]]), foregrounds)
        expected = flatten(opaque.with_layers([ground, *opaque.layers[1:]]))[1]
        assert image.shape == (1, HEIGHT, WIDTH, 4) and torch.allclose(image[0, ..., 3], expected, rtol=0, atol=1e-6)
        assert torch.equal(found.layers[0].image[..., 3], alpha[..., 0]) and image[0, :8, 60:, 3].max() == 0
    full = replace(opaque.layers[0], image=torch.cat([opaque.layers[0].image, torch.ones_like(alpha)], -1))
    image, _, found = run(loaded, opaque.with_layers([full, *opaque.layers[1:]]))
    assert torch.equal(image, run(loaded, opaque)[0]) and found.layers[0].image.shape[-1] == 3


def test_relit_objects_have_the_models_colours_and_flatten_to_its_picture(loaded):
    layers = LayerStack((WIDTH, HEIGHT), stack().layers[:2])
    image, _, found = run(loaded, layers, "relight")
    assert torch.allclose(flatten(found)[0], image[0], rtol=1e-5, atol=2e-3)


def test_feathering_changes_the_edge_alone(loaded):
    layers = LayerStack((WIDTH, HEIGHT), stack().layers[:2])
    hard, soft = run(loaded, layers)[0][0], run(loaded, layers, feather=4.0)[0][0]
    assert torch.equal(hard[:20], soft[:20]) and torch.allclose(
        hard[30:40, 20:40], soft[30:40, 20:40], rtol=1e-5, atol=1e-5
    )
    assert (hard[20, 12:48] - soft[20, 12:48]).abs().max() > 0.05


def test_with_detail_the_background_changes_smoothly_and_objects_keep_their_pixels(loaded):
    layers = stack()
    plain, detailed = run(loaded, layers)[0], run(loaded, layers, detail=16.0)[0]
    before = layers.layers[0].image

    def roughness(image):
        change = image[0, :19] - before[:19]
        return (change[1:] - change[:-1]).abs().mean()

    assert roughness(detailed) < 0.2 * roughness(plain) and (detailed[0, :19] - before[:19]).abs().mean() > 0.005
    assert torch.equal(detailed[0, 21:29, 11:39], plain[0, 21:29, 11:39])


def test_hidden_layers_are_left_out_and_moved_ones_move(loaded):
    cover = Layer(torch.ones(HEIGHT, WIDTH, 3), "cover", visible=False)
    assert torch.equal(run(loaded, stack(cover))[0], run(loaded, stack())[0])
    moved = stack().with_layers(
        layer if layer.name != "first" else Layer(layer.image, "first", x=2, y=2) for layer in stack().layers
    )
    assert torch.allclose(
        run(loaded, moved)[0][0, 3:20, 3:30], stack().layers[1].image[1:18, 1:28, :3], rtol=0, atol=1e-6
    )


def inverted(loaded, count, method="noise only"):
    """The way of so many pictures of the canvas's size."""
    model, positive, negative, vae = loaded
    with torch.inference_mode():
        pictures = torch.rand(count, HEIGHT + 4, WIDTH + 4, 3, generator=torch.Generator().manual_seed(2))
        return invert(model, vae.encode(pictures), positive, negative, schedule(model), method, seed=5)


def schedule(model):
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 8)


def full_size():
    alpha = torch.zeros(HEIGHT, WIDTH, 4)
    alpha[20:50, 10:50] = torch.rand(30, 40, 4, generator=torch.Generator().manual_seed(0))
    return LayerStack((WIDTH, HEIGHT), (stack().layers[0], Layer(alpha, "thing")))


def test_retained_latents_of_an_inversion_are_followed_where_the_layers_are(loaded):
    layers, trajectory = full_size(), inverted(loaded, 2, "ddim")
    plain, kept = run(loaded, layers, "relight")[0], run(loaded, layers, "relight", retained=trajectory)[0]
    assert not torch.allclose(plain, kept, rtol=1e-5, atol=0.02)
    hidden = layers.with_layers([*layers.layers, Layer(torch.ones(HEIGHT, WIDTH, 3), "cover", visible=False)])
    three = replace(trajectory, latents=torch.cat([trajectory.latents, trajectory.latents[:, :1]], 1))
    assert torch.equal(run(loaded, hidden, "relight", retained=three)[0], kept)
    moved = layers.with_layers([layers.layers[0], replace(layers.layers[1], x=24)])
    background, foreground = trajectory.latents.unbind(1)
    along = replace(trajectory, latents=torch.stack([background, foreground.roll(3, -1)], 1))
    there = layers.with_layers([layers.layers[0], replace(layers.layers[1], image=layers.layers[1].image.roll(24, 1))])
    assert torch.allclose(
        run(loaded, moved, "relight", retained=trajectory)[0],
        run(loaded, there, "relight", retained=along)[0],
        rtol=0,
        atol=1e-5,
    )


def test_retained_latents_of_other_layers_are_refused(loaded):
    with pytest.raises(
        ValueError,
        match="retained: it is the way of 3 latents and layers has 2; connect layers and path of the same run",
    ):
        run(loaded, full_size(), retained=inverted(loaded, 3))
    with pytest.raises(ValueError, match="retained: its latents are of 104×80 pixels and layer 'first' is 40×30"):
        run(loaded, stack(), retained=inverted(loaded, 3))


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (
            LayerStack((WIDTH, HEIGHT), stack().layers[:1]),
            "layers: there are 1 visible layers; harmonising needs a background",
        ),
        (
            stack(Layer(torch.rand(8, 8, 4), "glow", blend_mode="screen")),
            "layers: layer 'glow' has the blend mode 'screen'.*merge it",
        ),
        (
            stack(Layer(torch.ones(HEIGHT, WIDTH, 3), "sheet")),
            "layers: layer 'sheet' covers the whole canvas.*give it an alpha or a mask",
        ),
    ],
)
def test_what_cannot_be_harmonised_is_said(loaded, layers, words):
    with pytest.raises(ValueError, match=words):
        run(loaded, layers)


def test_beyond_its_reach_the_background_keeps_its_pixels(loaded):
    layers = stack()
    ground = layers.layers[0].image
    whole, latent, _ = run(loaded, layers)
    assert torch.equal(run(loaded, layers, reach=0.0)[0], whole), "0 is off"
    image, same, found = run(loaded, layers, reach=0.2)  # of 100 pixels: 20
    assert torch.equal(same, latent)
    assert torch.equal(image[0, :8, 72:], ground[:8, 72:])
    assert not torch.allclose(whole[0, :8, 72:], ground[:8, 72:], rtol=0, atol=0.05)
    assert torch.allclose(image[0, 16:19, 12:38], whole[0, 16:19, 12:38], rtol=0, atol=1e-6), "near the things"
    assert torch.allclose(flatten(found)[0][:1, 90:], ground[:1, 90:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("foregrounds", ["keep", "relight"])
def test_shadow_and_light_can_be_layers_over_the_same_background(loaded, foregrounds):
    layers = stack()
    image, latent, _ = run(loaded, layers, foregrounds)
    again, same, found = run(loaded, layers, foregrounds, effects=True)
    assert torch.equal(again, image) and torch.equal(same, latent)
    assert (flatten(found)[0] - image[0, ..., :3]).abs().max() < 2e-3
    assert torch.equal(found.layers[0].image, layers.layers[0].image)
    own = [layer for layer in found.layers if effect_of(layer) is None]
    assert all(torch.equal(one.image, other.image) for one, other in zip(own, layers.layers, strict=True))
    assert len(found.layers) > len(layers.layers)


def test_an_end_that_is_not_above_the_start_is_told(loaded):
    with torch.inference_mode():
        values = {**SETTINGS, "end_percent": 0.3, "foregrounds": "keep", "feather": 0.0}
        result = HarmonizeLayers.execute(*loaded, write_layers(stack()), **values)
    assert result.ui["text"] == (
        "end_percent: 0.3 is not above start_percent, 0.4, so the layers are never put back; raise it.",
    )


def test_an_end_with_no_less_noise_than_the_start_is_told(loaded):
    values = {**SETTINGS, "foregrounds": "keep", "feather": 0.0, "start_noise": 0.3}
    for socket, changed in {"end_noise": {"end_noise": 0.3}, "end_percent": {"end_percent": 0.2}}.items():
        with torch.inference_mode():
            result = HarmonizeLayers.execute(*loaded, write_layers(stack()), **{**values, **changed})
        assert result.ui["text"] == (
            f"{socket}: there is no less noise then than at the start, so the layers are never put back; end later.",
        )
    with torch.inference_mode():
        assert HarmonizeLayers.execute(*loaded, write_layers(stack()), **values, end_noise=0.2).ui is None
