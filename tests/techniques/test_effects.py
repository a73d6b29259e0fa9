"""Shadow and light as layers: exact against another compositor, bound to their objects, and moved with them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from strata.scenes import renderer
from strata.techniques import arrange, effects, geometry
from strata.techniques.compositing import blend, flatten
from strata.techniques.layers import Layer, LayerStack, bound_to, effect_of, parent_of


def drawn(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def scene():
    made = renderer.render(renderer.Request("beach", ("house", "apple"), 2), 96, 128, 11)
    back, picture = (torch.from_numpy(one) for one in (made.background, made.composite))
    objects = [Layer(torch.from_numpy(one.rgba), one.name) for one in made.objects]
    return LayerStack((128, 96), (Layer(back, "background"), *objects)), picture, made


@pytest.fixture(scope="module")
def found(scene):
    stack, picture, _ = scene
    effect = effects.find_effects(stack, picture, 0.5)
    return effect, effects.effect_layers(stack, effect)


def test_a_gain_is_multiplying_or_screening():
    colour, gain = drawn(3, 50, 40), 2 * drawn(3, 50, 40, seed=1) - 1
    expected = torch.where(
        gain < 0, blend(colour, 1 + gain.clamp(max=0), "multiply"), blend(colour, gain.clamp(min=0), "screen")
    )
    assert torch.allclose(effects.darken_or_brighten(colour, gain), expected, rtol=0, atol=1e-6)


def test_the_gain_between_two_colours_makes_one_the_other():
    steps = torch.linspace(0, 1, 52)
    colour, wanted = steps[:, None].expand(52, 52), steps[None].expand(52, 52)
    gain = effects.gain_between(colour, wanted)
    assert gain.min() >= -1 and gain.max() <= 1
    made = effects.darken_or_brighten(colour, gain)
    reachable = ~((colour == 0) & (wanted < 0)) & ~((colour == 1) & (wanted > 1))
    assert (made - wanted)[reachable].abs().max() < 1e-5
    assert not gain.diagonal().any()


def test_shares_of_a_gain_one_after_the_other_do_what_it_does():
    gain, colour = 2 * drawn(3, 200) - 1, drawn(3, 200, seed=1)
    shares = drawn(4, 200, seed=2)
    shares = shares / shares.sum(0)
    made = colour
    for share in shares:
        made = effects.darken_or_brighten(made, effects.shared_gain(gain, share))
    assert torch.allclose(made, effects.darken_or_brighten(colour, gain), rtol=0, atol=1e-5)
    assert not effects.shared_gain(gain, torch.zeros(200)).any()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_any_picture_is_reached_whatever_the_layers(count):
    """Colours and alphas without any sense in them: soft, overlapping, covered twice."""
    height, width = 40, 56
    layers = [Layer(drawn(height, width, 3), "ground")]
    for number in range(count):
        alpha = (drawn(10, 14, seed=5 + number) - 0.4).clamp(0, 1) * 1.8
        alpha = torch.nn.functional.interpolate(alpha[None, None], (height, width), mode="bilinear")[0, 0].clamp(0, 1)
        layers.append(Layer(torch.cat([drawn(height, width, 3, seed=20 + number), alpha[..., None]], -1), f"{number}"))
    stack, picture = LayerStack((width, height), tuple(layers)), drawn(height, width, 3, seed=9)
    effect = effects.find_effects(stack, picture, 0)
    assert effect.error.max() < 1e-3
    made, alpha = flatten(effects.effect_layers(stack, effect))
    assert (alpha == 1).all() and (made - picture).abs().max() < 2e-3


def test_a_rendered_scene_is_made_of_its_layers_in_8_bits(scene, found):
    stack, picture, _ = scene
    effect, made = found
    assert effect.error.max() < 1e-3
    assert (flatten(made)[0] - picture).abs().max() < 1.5e-3
    coarse = [replace(layer, image=(layer.image * 255).round() / 255) for layer in made.layers]
    assert (flatten(made.with_layers(coarse))[0] - picture).abs().max() < 1.5 / 255
    for before, after in zip(stack.layers, (one for one in made.layers if not effect_of(one)), strict=True):
        assert torch.equal(before.image, after.image) and before.name == after.name


def test_the_shadow_is_where_the_renderer_threw_it(scene, found):
    _, _, made = scene
    effect, _ = found
    seen = 1 - np.maximum(*(one.rgba[..., 3] for one in made.objects))
    for item, gain in zip(made.objects, effect.ground, strict=True):
        dark = (-gain.clamp(max=0)).mean(0).numpy()
        other = next(one for one in made.objects if one is not item)
        alone = (seen > 0.99) & (other.shadow[..., 3] < 0.02)
        ours, true = dark[alone] > 0.06, item.shadow[..., 3][alone] > 0.08
        assert (ours & true).sum() > 0.7 * (ours | true).sum() > 10


def test_effects_lie_around_their_object_in_its_group(found):
    _, made = found
    names = [layer.name for layer in made.layers]
    assert names[0] == "background" and parent_of(made.layers[0]) == ()
    for name in ("house", "apple"):
        own = [layer for layer in made.layers if parent_of(layer) == (name,)]
        kinds = [effect_of(layer) for layer in own]
        at = kinds.index(None)
        assert own[at].name == name
        assert set(kinds[:at]) <= {"shadow", "glow"} and set(kinds[at + 1 :]) <= {"shade", "light"}
        assert "shadow" in kinds
        modes = {"shadow": "multiply", "shade": "multiply", "glow": "screen", "light": "screen"}
        assert all(layer.blend_mode == modes[kind] for layer, kind in zip(own, kinds, strict=True) if kind)
        first = names.index(own[0].name)
        assert bound_to(made, first + at) == [first + number for number, kind in enumerate(kinds) if kind]
        assert bound_to(made, first + kinds.index("shadow")) == []


def test_without_its_group_an_object_leaves_no_trace(scene, found):
    stack, _, _ = scene
    _, made = found
    bare = made.with_layers(layer for layer in made.layers if not parent_of(layer))
    assert torch.equal(flatten(bare)[0], stack.layers[0].image)


def test_nothing_is_drawn_farther_away_than_reach():
    ground = Layer(torch.full((60, 200, 3), 0.6), "ground")
    thing = Layer(torch.ones(10, 10, 4), "thing", x=20, y=30)
    picture = flatten(LayerStack((200, 60), (ground, thing)))[0] * 0.8
    effect = effects.find_effects(LayerStack((200, 60), (ground, thing)), picture, 0.1)
    made = effects.effect_layers(LayerStack((200, 60), (ground, thing)), effect)
    shadow = next(layer for layer in made.layers if effect_of(layer) == "shadow")
    assert shadow.x >= 0 and shadow.x + shadow.size[0] <= 30 + 20
    assert not effect.ground[..., 50:].any() and effect.ground[0, :, 35, 49].any(), "20 pixels from the last one"
    assert effect.ground[0, :, 35, 40].min() < -0.19
    assert effect.error[:, 60:].min() > 0.1 and effect.error[25:45, 15:45].max() < 1e-3


def test_each_object_gets_the_ground_that_is_nearest_to_it():
    ground = Layer(torch.full((60, 120, 3), 0.5), "ground")
    left, right = (Layer(torch.ones(8, 8, 4), name, x=x, y=26) for name, x in (("left", 20), ("right", 92)))
    stack = LayerStack((120, 60), (ground, left, right))
    effect = effects.find_effects(stack, flatten(stack)[0] * 0.7, 0)
    dark = -effect.ground.mean(1)
    assert torch.allclose(dark[0, 30, 35], torch.tensor(0.3), atol=1e-3) and dark[1, 30, 35] < 0.01
    assert torch.allclose(dark[1, 30, 85], torch.tensor(0.3), atol=1e-3) and dark[0, 30, 85] < 0.01
    assert torch.allclose((1 - dark).prod(0)[:, 40], torch.tensor(0.7), atol=1e-3)


def test_a_picture_of_the_plain_stack_has_no_effects(scene):
    stack, _, _ = scene
    effect = effects.find_effects(stack, flatten(stack)[0], 0.5)
    made = effects.effect_layers(stack, effect)
    assert [layer.name for layer in made.layers] == [layer.name for layer in stack.layers]
    assert all(one is other for one, other in zip(made.layers, stack.layers, strict=True))


def test_effects_go_where_their_object_goes(found):
    _, made = found
    moved = arrange.transform_layers(made, "apple", move=(9, -4))
    for before, after in zip(made.layers, moved.layers, strict=True):
        along = parent_of(before) == ("apple",)
        assert (after.x - before.x, after.y - before.y) == ((9, -4) if along else (0, 0))
    only = next(layer.name for layer in made.layers if effect_of(layer) == "shadow" and parent_of(layer) == ("apple",))
    alone = arrange.transform_layers(made, f'"{only}"', move=(3, 0))
    assert [after.x - before.x for before, after in zip(made.layers, alone.layers, strict=True)].count(3) == 1


@pytest.mark.parametrize("changes", [{"flip_h": True}, {"scale": 2.0}, {"rotation": np.pi / 2}])
def test_a_group_turns_as_one_image_does(found, changes):
    """All about the object's centre: as one layer that holds the whole group's mask."""
    _, made = found
    own = [layer for layer in made.layers if parent_of(layer) == ("apple",)]
    flat = [replace(layer, image=torch.ones_like(layer.image), blend_mode="normal") for layer in own]
    stack = LayerStack(made.canvas, tuple(flat))
    lead = next(number for number, layer in enumerate(own) if effect_of(layer) is None)
    x, y = flat[lead].x + flat[lead].size[0] / 2, flat[lead].y + flat[lead].size[1] / 2
    turned = arrange.transform_layers(stack, "apple", **changes)
    for before, after in zip(flat, turned.layers, strict=True):
        expected = geometry.transform(before, (x, y), **changes)
        assert torch.equal(geometry.rasterise(after, made.canvas), geometry.rasterise(expected, made.canvas))


def test_a_fitted_object_takes_its_effects_along():
    lead, other = Layer(torch.ones(10, 20, 4), x=10, y=10), Layer(torch.ones(4, 8, 4), x=30, y=14)
    fitted = geometry.fit(lead, (100, 100), "contain")
    along = geometry.fitted_along(other, lead, fitted)
    assert (fitted.x, fitted.y, fitted.w, fitted.h) == (0, 25, 100, 50)
    assert (along.x, along.y, along.w, along.h) == (100, 45, 40, 20)
    assert geometry.fitted_along(other, lead, lead) is other


def test_order_takes_effects_along_and_a_named_one_alone(found):
    _, made = found
    names = [layer.name for layer in made.layers]
    apple = [name for name, layer in zip(names, made.layers, strict=True) if parent_of(layer) == ("apple",)]
    house = [name for name, layer in zip(names, made.layers, strict=True) if parent_of(layer) == ("house",)]

    def after(action, text):
        return [layer.name for layer in arrange.arrange(made, action, text).layers]

    assert after("pick", "apple") == apple
    assert after("drop", "apple") == ["background", *house]
    assert after("bring to front", "house") == ["background", *apple, *house]
    assert after("send to back", "apple") == [*apple, "background", *house]
    assert after("reorder", "background, apple, house") == ["background", *apple, *house]
    assert after("pick", f'"{apple[0]}"') == [apple[0]]
    assert after("drop", f'"{apple[0]}"') == [name for name in names if name != apple[0]]


@pytest.mark.parametrize("name", ["apple", "car", "dog", "bubbles"])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_shadow_comes_apart_from_its_object(name, seed):
    made = renderer.render(renderer.Request(None, (name,), 1), 128, 128, 40 + seed)
    item = made.objects[0]
    whole, bare, shadow = (torch.from_numpy(one) for one in (item.rgba_with_shadow, item.rgba, item.shadow))
    own, dark = effects.shadow_apart(whole)
    # Over each other they are the layer, before white and before black
    for ground in (0.0, 1.0):
        shown = torch.full((128, 128, 3), ground)
        expected = torch.lerp(shown, whole[..., :3], whole[..., 3:])
        for part in (dark, own):
            shown = torch.lerp(shown, part[..., :3], part[..., 3:])
        assert (shown - expected).abs().max() < 1e-3
    free = bare[..., 3] < 0.02
    ours, true = dark[..., 3][free] > 0.06, shadow[..., 3][free] > 0.06
    assert (ours & true).sum() > 0.95 * (ours | true).sum() > 20
    assert (own[..., 3] - bare[..., 3]).abs().mean() < 0.005


def test_a_layer_without_shadow_stays_one():
    made = renderer.render(renderer.Request(None, ("car",), 1), 96, 96, 40)
    assert effects.shadow_apart(torch.from_numpy(made.objects[0].rgba)) is None
    assert effects.shadow_apart(torch.zeros(20, 20, 4)) is None


def test_an_object_without_its_effects_leaves_their_group(found):
    _, made = found
    number = next(place for place, layer in enumerate(made.layers) if layer.name == "apple")
    bare, place = effects.without_effects(made, number)
    assert bare.layers[place].name == "apple" and parent_of(bare.layers[place]) == ()
    assert len(bare.layers) == len(made.layers) - len(bound_to(made, number))
    assert effects.without_effects(bare, place) == (bare, place)


def test_a_group_of_a_file_without_effects_binds_nothing():
    one, other = (Layer(torch.ones(4, 4, 4), name, extra={"strata": {"parent": ["g"]}}) for name in "ab")
    stack = LayerStack((20, 20), (one, other))
    assert bound_to(stack, 0) == [] and arrange.with_effects(stack, [1]) == [1]
    moved = arrange.transform_layers(stack, "a", move=(5, 0))
    assert [layer.x for layer in moved.layers] == [5, 0]
    for unknown in ("mist", 1, ["shadow"]):
        assert effect_of(Layer(torch.ones(4, 4, 4), extra={"strata": {"effect": unknown}})) is None
