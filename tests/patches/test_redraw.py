"""Complete layers and Redraw layer: what they draw, what they leave alone, and what they refuse."""

from dataclasses import replace

import comfy.sd
import mini_models
import pytest
import torch
from strata.nodes.redraw import CompleteLayers, RedrawLayer
from strata.patches import back_to_front, completion, decomposer, layer_files, mini_family, redraw, rgba_vae
from strata.patches import transparency as files
from strata.scenes import renderer
from strata.techniques import effects
from strata.techniques.compositing import flatten
from strata.techniques.layers import Layer, LayerStack, bound_to, parent_of, read_layers, write_layers

from . import random_transparency, small_models

pytestmark = pytest.mark.skipif(not mini_models.CHECKPOINT.exists(), reason="no trained weights: make mini")
SAMPLING = {"seed": 3, "steps": 2, "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple"}


@pytest.fixture(scope="module")
def family():
    mini_family.register(decomposer.UNETS)
    return mini_models.Family()


def diffusion_model(name):
    return comfy.sd.load_diffusion_model(
        str(mini_models.MODELS / "diffusion_models" / f"strata_mini_{name}.safetensors")
    )


@pytest.fixture(scope="module")
def inpaint(family):
    return diffusion_model("inpaint")


@pytest.fixture(scope="module")
def coupled(family):
    file = layer_files.load(layer_files.BACK_TO_FRONT, layer_files.BackToFront)
    return back_to_front.apply(diffusion_model("flux_fill"), file)


@pytest.fixture(scope="module")
def rgba(family):
    return rgba_vae.load(rgba_vae.SHIPPED)


@pytest.fixture(scope="module")
def scene():
    """An apple in front of a house on a beach, cut to what is seen of each; three layers of different placement."""
    made = renderer.render(renderer.Request("beach", ("house", "apple"), 2), 96, 128, 11)
    whole, masks = torch.from_numpy(made.composite), torch.from_numpy(made.masks)
    assert masks[1].any() and masks[2].any()
    left, top, right, bottom = made.objects[1].box
    apple = torch.cat([whole, masks[2][..., None]], -1)[top:bottom, left:right]
    layers = (
        Layer(torch.cat([whole, masks[0][..., None]], -1), "beach"),
        Layer(torch.cat([whole, masks[1][..., None]], -1), "a house"),
        Layer(apple, "an apple", x=left, y=top, opacity=0.9, extra={"strata": {"parent": ["fruit"]}}),
    )
    return LayerStack((128, 96), layers)


def complete(stack, family, inpaint, **given):
    words = {"positive": family.text("an empty beach"), "negative": family.negative, "model": inpaint}
    own = {"vae": family.vae, "layers": write_layers(stack), "select": "", "grow": 4} | SAMPLING | words | given
    return CompleteLayers.execute(**own)


@torch.inference_mode()
def test_the_background_gets_whole_and_what_is_seen_stays(family, inpaint, scene):
    found = complete(scene, family, inpaint)
    stack, drawn = read_layers(found.args[0]), found.args[1]
    before, after = flatten(scene)[0], flatten(stack)[0]
    background = stack.layers[0].image
    seen = scene.layers[0].image[..., 3] == 1
    assert (background[..., 3] == 1).all() and not seen.all()
    assert torch.equal(background[seen], scene.layers[0].image[seen])
    assert torch.equal(after[seen], before[seen])
    assert torch.equal(drawn[0] > 0, ~seen)
    assert stack.layers[2].image is not None and torch.equal(stack.layers[2].image, scene.layers[2].image)
    assert (stack.layers[2].x, stack.layers[2].opacity) == (scene.layers[2].x, 0.9)
    assert found.ui["text"][0].startswith("beach: ")


@torch.inference_mode()
def test_only_chosen_layers_are_drawn_and_a_second_run_is_the_first(family, inpaint, scene):
    once, again = (read_layers(complete(scene, family, inpaint, select="beach").args[0]) for _ in range(2))
    assert torch.equal(once.layers[0].image, again.layers[0].image)
    assert torch.equal(once.layers[1].image, scene.layers[1].image)
    other = read_layers(complete(scene, family, inpaint, select="beach", seed=4).args[0])
    assert not torch.equal(once.layers[0].image, other.layers[0].image)


@torch.inference_mode()
def test_a_layers_own_name_can_be_its_prompt(family, inpaint, scene):
    clip, seen = family.clip, []

    class Noting:
        def tokenize(self, words):
            seen.append(words)
            return clip.tokenize(words)

        def encode_from_tokens_scheduled(self, tokens):
            return clip.encode_from_tokens_scheduled(tokens)

    named = read_layers(complete(scene, family, inpaint, clip=Noting(), positive=None).args[0])
    assert seen[0] == "beach"
    plain = read_layers(complete(scene, family, inpaint, positive=family.text("beach")).args[0])
    assert torch.equal(named.layers[0].image, plain.layers[0].image)


@torch.inference_mode()
def test_a_decomposers_background_model_needs_no_words(family, inpaint, scene):
    file = layer_files.load(layer_files.DECOMPOSER, decomposer.Decomposer)
    settings = {"positive": None, "negative": None, "decomposer": file, "sampler_name": "ddim"}
    stack = read_layers(complete(scene, family, inpaint, **settings).args[0])
    assert (stack.layers[0].image[..., 3] == 1).all()
    seen = scene.layers[0].image[..., 3] == 1
    assert torch.equal(stack.layers[0].image[seen], scene.layers[0].image[seen])


@torch.inference_mode()
def test_layers_that_lack_nothing_cost_nothing_and_are_told(family, inpaint):
    whole = LayerStack((64, 64), (Layer(torch.rand(64, 64, 3)), Layer(torch.rand(20, 20, 4))))
    asked = inpaint.clone()
    asked.set_model_unet_function_wrapper(lambda *_: pytest.fail("nothing is to be drawn"))
    found = complete(whole, family, asked)
    for one, other in zip(read_layers(found.args[0]).layers, whole.layers, strict=True):
        assert torch.equal(one.image, other.image)
    assert not found.args[1].any() and "Nothing was missing" in found.ui["text"][0]


@torch.inference_mode()
def test_a_hole_of_one_colour_is_filled_from_around_it(family, inpaint):
    """The truth of a beach without anything on it, in the mean over seeds that nobody tuned on."""
    errors = []
    for seed in range(4):
        made = renderer.render(renderer.Request("beach", ("apple",), 1), 128, 128, 5_000 + seed)
        whole, own = torch.from_numpy(made.composite), torch.from_numpy(made.objects[0].rgba_with_shadow[..., 3])
        hole = (own > 1 / 255).float()
        stack = LayerStack(
            (128, 128),
            (
                Layer(torch.cat([whole, 1 - hole[..., None]], -1)),
                Layer(torch.cat([whole, hole[..., None]], -1)),
            ),
        )
        found = read_layers(complete(stack, family, inpaint, steps=20, cfg=4.0, select="1", grow=8).args[0])
        truth = torch.from_numpy(made.background)
        gray = (truth - 0.5).abs()[hole > 0].mean()
        errors.append(((found.layers[0].image[..., :3] - truth).abs()[hole > 0].mean() / gray).item())
    assert sum(errors) / len(errors) < 0.3, errors


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"model": None}, "model: nothing is connected"),
        ({"positive": None}, "positive: nothing is connected"),
        ({"negative": None}, "negative: nothing is connected"),
        ({"select": "nobody"}, "select: there is no layer 'nobody'"),
    ],
)
def test_what_is_lacking_is_said_before_anything_is_drawn(family, inpaint, scene, given, sentence):
    with pytest.raises(ValueError, match=sentence):
        complete(scene, family, inpaint, **given)


def redrawn(stack, family, model, rgba, **given):
    values = {
        "model": model,
        "positive": family.text("a pumpkin"),
        "negative": family.negative,
        "vae": family.vae,
        "layers": write_layers(stack),
        "layer": "an apple",
        "room": 0.2,
        "noise": "one each",
        "rgba_vae": rgba,
    }
    return RedrawLayer.execute(**values | SAMPLING | given).args


@pytest.fixture(scope="module")
def whole(scene):
    """The scene with a background that is opaque."""
    background = torch.from_numpy(renderer.render(renderer.Request("beach", (), 0), 96, 128, 11).background)
    return scene.with_layers((Layer(background, "beach"), *scene.layers[1:]))


@torch.inference_mode()
def test_one_layer_is_new_and_all_others_are_as_they_were(family, coupled, rgba, whole):
    document, image, drawn = redrawn(whole, family, coupled, rgba, effects=False)
    stack = read_layers(document)
    for one, other in zip(stack.layers[:2], whole.layers[:2], strict=True):
        assert torch.equal(one.image, other.image)
    new, old = stack.layers[2], whole.layers[2]
    assert (new.name, new.opacity, new.extra) == (old.name, 0.9, old.extra)
    place = redraw.place_of(whole, 2, 0.2)
    left, top, right, bottom = place.box
    assert left <= new.x and top <= new.y
    assert new.x + new.size[0] <= right and new.y + new.size[1] <= bottom
    assert torch.equal(drawn[0], new.image) and new.image.shape[-1] == 4
    assert torch.equal(image[0], torch.cat([flatten(stack)[0], flatten(stack)[1][..., None]], -1))
    outside = place.mask[0] == 0
    assert torch.equal(image[0, ..., :3][outside], flatten(whole.with_layers(whole.layers[:2]))[0][outside])
    again = redrawn(whole, family, coupled, rgba)[2]
    assert torch.equal(again, drawn)


@torch.inference_mode()
def test_the_old_ones_effects_go_and_the_shadow_is_a_layer_that_goes_along(family, coupled, rgba, whole, monkeypatch):
    """What BFS draws is the renderer's, since the point is what becomes of it."""
    made = renderer.render(renderer.Request("beach", ("car",), 1), 96, 128, 3)
    true = torch.from_numpy(made.objects[0].rgba_with_shadow)
    lit = torch.from_numpy(renderer.render(renderer.Request("beach", ("house", "apple"), 2), 96, 128, 11).composite)
    plain = whole.with_layers(replace(layer, opacity=1.0) for layer in whole.layers)
    before = effects.with_effect_layers(plain, lit * 0.9, 0)
    old = next(number for number, layer in enumerate(before.layers) if layer.name == "an apple")
    assert bound_to(before, old) and parent_of(before.layers[old]) == ("fruit", "an apple")

    def drawn_by(place, *_, **__):
        left, top, right, bottom = place.box
        return true[top:bottom, left:right]

    monkeypatch.setattr(redraw, "by_back_to_front", drawn_by)
    document, image, drawn = redrawn(before, family, coupled, rgba, room=4.0)
    stack = read_layers(document)
    gone = [old, *bound_to(before, old)]
    kept = [layer for number, layer in enumerate(before.layers) if number not in gone]
    assert [layer.name for layer in stack.layers] == [layer.name for layer in kept] + ["an apple shadow", "an apple"]
    assert all(torch.equal(one.image, other.image) for one, other in zip(stack.layers, kept, strict=False))
    assert bound_to(stack, len(stack.layers) - 1) == [len(stack.layers) - 2]
    assert parent_of(stack.layers[-1]) == ("fruit", "an apple")
    behind = flatten(stack.with_layers(kept))[0]
    expected = torch.lerp(behind, true[..., :3], true[..., 3:])
    assert (image[0, ..., :3] - expected).abs().max() < 2e-3
    assert drawn.shape[1] <= 96 and drawn.shape[2] <= 128


@torch.inference_mode()
def test_without_a_shadow_there_is_one_layer(family, coupled, rgba, whole, monkeypatch):
    def drawn_by(place, *_, **__):
        left, top, right, bottom = place.box
        return torch.ones(bottom - top, right - left, 4)

    monkeypatch.setattr(redraw, "by_back_to_front", drawn_by)
    stack = read_layers(redrawn(whole, family, coupled, rgba)[0])
    assert len(stack.layers) == 3 and parent_of(stack.layers[2]) == ("fruit",)


def test_the_place_is_the_old_layer_and_room_around_it():
    alpha = torch.zeros(20, 30)
    alpha[4:10, 6:18] = 1
    alpha[3, 6] = 0.4
    front = Layer(torch.cat([torch.zeros(20, 30, 3), alpha[..., None]], -1), x=40, y=50)
    stack = LayerStack((100, 80), (Layer(torch.zeros(80, 100, 3)), front))
    assert redraw.place_of(stack, 1, 0.0).box == (46, 54, 58, 60)
    assert redraw.place_of(stack, 1, 0.5).box == (40, 48, 64, 66)
    assert redraw.place_of(stack, 1, 4.0).box == (0, 6, 100, 80)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"layer": "1-2"}, "layer: '1-2' names 2 layers"),
        ({"layer": "moon"}, "layer: there is no layer 'moon'"),
        ({"layer": "beach"}, "layers: behind 'beach' there are transparent pixels"),
        ({"rgba_vae": None}, "rgba_vae: BFS needs a VAE with alpha"),
    ],
)
def test_what_cannot_be_drawn_is_said_first(family, coupled, rgba, whole, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        redrawn(whole, family, coupled, rgba, **change)


def test_other_models_hidden_layers_and_holes_behind_are_refused(family, inpaint, coupled, rgba, scene, whole):
    with pytest.raises(ValueError, match="model: there is no Back to front on it"):
        redrawn(whole, family, inpaint, rgba)
    with pytest.raises(ValueError, match="layers: behind 'an apple' there are transparent pixels"):
        redrawn(scene, family, coupled, rgba)
    hidden = whole.with_layers((*whole.layers[:2], Layer(torch.zeros(4, 4, 4), "an apple")))
    with pytest.raises(ValueError, match="layer: 'an apple' is not seen on the canvas"):
        redrawn(hidden, family, coupled, rgba)


@pytest.mark.parametrize("height, width", [(100, 100), (64, 256), (2000, 300)])
def test_stable_diffusion_draws_at_a_size_that_it_knows(height, width):
    found = redraw.drawn_size(height, width)
    assert all(side % 64 == 0 for side in found)
    assert 0.7 < found[0] * found[1] / 512**2 < 1.4
    assert abs(found[0] / found[1] / (height / width) - 1) < 0.35


@torch.inference_mode()
def test_attention_sharing_draws_around_what_is_behind(family, whole, monkeypatch):
    monkeypatch.setattr(redraw, "SIDE", 128)
    torch.manual_seed(0)
    shapes = [row[1:] for row in small_models.attentions(family.model.model.diffusion_model)]
    weights = random_transparency.sharing(shapes, 2, control=16)
    shared = files.recognise("given.safetensors", weights)
    decoder = layer_files.load("strata_mini_transparent_decoder.safetensors", files.Transparency)
    document, _, drawn = redrawn(whole, family, family.model, None, sharing=shared, decoder=decoder)
    left, top, right, bottom = redraw.place_of(whole, 2, 0.2).box
    assert drawn.shape[-1] == 4 and drawn.shape[1] <= bottom - top and drawn.shape[2] <= right - left
    assert drawn[..., :3].min() >= 0 and drawn[..., :3].max() <= 1
    darker = whole.with_layers((Layer(whole.layers[0].image * 0.3, "beach"), *whole.layers[1:]))
    _, _, other = redrawn(darker, family, family.model, None, sharing=shared, decoder=decoder)
    assert drawn.shape != other.shape or not torch.equal(drawn, other), "it sees what is behind"
    with pytest.raises(ValueError, match="decoder: nothing is connected"):
        redrawn(whole, family, family.model, None, sharing=shared)
    assert torch.equal(read_layers(document).layers[1].image, whole.layers[1].image)


def test_a_shadow_that_multiplies_hides_nothing():
    shadow = Layer(torch.ones(8, 8, 4), "shadow", blend_mode="multiply")
    half = Layer(torch.ones(8, 8, 4), "half", opacity=0.25)
    assert completion._hides(LayerStack((8, 8), (half, shadow)), 1) == 0
    assert completion._hides(LayerStack((8, 8), (half, shadow)), 0) == 0.25
