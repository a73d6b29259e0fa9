"""Effect layers as a node: exact on a rendered scene, and what it refuses or tells."""

import pytest
import torch
from strata.nodes.finish import EffectLayers
from strata.scenes import renderer
from strata.techniques.compositing import flatten
from strata.techniques.layers import Layer, LayerStack, read_layers, write_layers


def lit(stack, image, **given):
    return EffectLayers.execute(**{"layers": write_layers(stack), "image": image[None], "reach": 0.5} | given)


@pytest.fixture(scope="module")
def plain():
    """(layers without shadow, the picture with)."""
    made = renderer.render(renderer.Request("meadow", ("apple",), 1), 64, 80, 3)
    back, thing = torch.from_numpy(made.background), torch.from_numpy(made.objects[0].rgba)
    return LayerStack((80, 64), (Layer(back, "meadow"), Layer(thing, "apple"))), torch.from_numpy(made.composite)


def test_layers_and_their_effects_are_the_picture(plain):
    stack, picture = plain
    found = lit(stack, picture)
    made = read_layers(found.args[0])
    assert (flatten(made)[0] - picture).abs().max() < 2e-3 and found.args[1] < 1e-3
    assert [layer.name for layer in made.layers][:3] == ["meadow", "apple shadow", "apple"]
    assert found.ui is None


def test_the_background_may_come_apart_and_hidden_layers_do_not_count(plain):
    stack, picture = plain
    hidden = Layer(torch.ones(64, 80, 3), "sketch", visible=False)
    cut = stack.with_layers((hidden, stack.layers[1]))
    made = read_layers(lit(cut, picture, background=stack.layers[0].image[None]).args[0])
    assert (flatten(made)[0] - picture).abs().max() < 2e-3 and made.layers[0].name == "background"


def test_what_is_out_of_reach_is_told(plain):
    stack, picture = plain
    found = lit(stack, (picture * 0.8), reach=0.02)
    assert "raise reach" in found.ui["text"][0] and found.args[1] > 0.05


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"image": torch.zeros(1, 8, 8, 3)}, "image: it is 8×8 and the canvas 80×64"),
        ({"background": torch.zeros(1, 8, 8, 3)}, "background: it is 8×8 and the canvas 80×64"),
    ],
)
def test_effects_need_images_of_the_canvas(plain, change, sentence):
    stack, picture = plain
    with pytest.raises(ValueError, match=sentence):
        EffectLayers.execute(**{"layers": write_layers(stack), "image": picture[None], "reach": 0.5} | change)


def test_effects_need_a_ground_and_plain_layers(plain):
    stack, picture = plain
    with pytest.raises(ValueError, match="layers: effects need an opaque background at the back"):
        lit(stack.with_layers(stack.layers[1:]), picture)
    with pytest.raises(ValueError, match="layers: effects need an opaque background at the back"):
        lit(stack.with_layers(stack.layers[:1]), picture)
    mixed = stack.with_layers((stack.layers[0], Layer(stack.layers[1].image, "apple", blend_mode="multiply")))
    with pytest.raises(ValueError, match="layers: 'apple' has the blend mode 'multiply'"):
        lit(mixed, picture)
