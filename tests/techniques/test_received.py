"""What decomposers hand over, made from rendered scenes whose layers are known."""

import itertools

import numpy as np
import pytest
import torch
from strata.scenes.renderer import Request, render
from strata.techniques import received
from strata.techniques.layers import Layer, LayerStack
from strata.techniques.received import Wishes

SIDE = 96


def scene(seed, count=2):
    """Image [3,H,W] and true layers [K,4,H,W], back to front."""
    found = render(Request(count=count), SIDE, SIDE, seed)
    back = np.concatenate([found.background, np.ones((SIDE, SIDE, 1), np.float32)], -1)
    layers = np.stack([back, *(item.rgba_with_shadow for item in found.objects)])
    return torch.from_numpy(found.composite).movedim(-1, 0), torch.from_numpy(layers).float().movedim(-1, 1)


def noisy(layers, seed=0):
    noise = torch.randn(len(layers), *layers.shape[2:], generator=torch.Generator().manual_seed(seed))
    return torch.cat([layers[:, :3], (layers[:, 3:] + 0.05 * noise[:, None]).clamp(0, 1)], 1)


def stacked(layers):
    return LayerStack((SIDE, SIDE), tuple(Layer(one.movedim(0, -1), f"L{n}") for n, one in enumerate(layers)))


def small(layers):
    return received.small_layers(stacked(layers))


def opaque(image):
    return torch.cat([image, torch.ones_like(image[:1])])[None]


def names(stack):
    return [layer.name for layer in stack.layers]


def test_layers_over_each_other_are_the_image():
    image, layers = scene(0)
    shown = received.over_each_other(layers.double())
    assert (shown[:3] - image).abs().max() < 1e-4 and (shown[3] - 1).abs().max() < 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_blanks_and_duplicates_are_found_through_noise(seed):
    _, layers = scene(seed, 1 + seed % 3)
    blank = torch.zeros_like(layers[:1])
    batch = torch.cat([layers, blank, layers[1:2], layers[:1]])
    given = small(noisy(batch, seed))
    count = len(layers)
    assert received.blanks(given) == [count] and received.duplicates(given) == [count + 1, count + 2]
    assert received.blanks(small(layers)) == received.duplicates(small(layers)) == []


def test_a_faint_and_a_small_layer_are_no_blanks_and_a_moved_one_is_no_duplicate():
    faint = torch.zeros(3, 4, SIDE, SIDE)
    faint[0, 3, 20:60, 20:60] = 0.2
    faint[1, 3, 50:54, 50:54] = 1
    faint[2, 3, 24:64, 20:60] = 0.2
    assert received.blanks(faint) == received.duplicates(faint) == []


@pytest.mark.parametrize("seed", range(6))
def test_the_whole_image_is_told_from_a_background(seed):
    image, layers = scene(seed, 1 + seed % 2)
    whole = opaque(image)
    for place in (0, 1, len(layers)):
        batch = small(torch.cat([layers[:place], whole, layers[place:]]))
        assert received.whole_image(batch) == received.whole_image(batch, image) == place
    assert received.whole_image(small(layers)) is None and received.whole_image(small(layers), image) is None
    assert received.whole_image(small(torch.cat([whole, layers[:1]]))) is None  # nothing to tell them by


@pytest.mark.parametrize("seed", range(3))
def test_the_order_is_one_that_no_other_beats(seed):
    """Against all orders, by brute force."""
    image, layers = scene(seed, 3)
    shuffled = layers[[2, 0, 3, 1]]
    order = received.recomposed_order(shuffled, image)
    errors = {
        perm: (received.over_each_other(shuffled[list(perm)])[:3] - image).abs().mean().item()
        for perm in itertools.permutations(range(4))
    }
    assert errors[tuple(order)] <= min(errors.values()) + 1e-5
    assert received.recomposed_order(layers, image) == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", received.ALPHAS[:3])
def test_the_meaning_of_alpha_is_found_and_read(kind):
    for seed in range(4):
        image, layers = scene(seed)
        given = layers.clone()
        if kind == "premultiplied":
            given = received.premultiplied(layers)
        if kind == "inverted":
            given[:, 3] = 1 - given[:, 3]
        assert received.alpha_kind(given) == received.alpha_kind(given, image) == kind
        found = received.read_alpha(given, kind)
        seen = layers[:, 3:] > 0.01
        assert ((found - layers).abs() * seen).max() < 1e-5


def test_odd_stacks_have_straight_alpha():
    image, layers = scene(0)
    for odd in (torch.zeros(1, 4, 8, 8), torch.ones(2, 4, 8, 8), torch.zeros(3, 4, 8, 8), layers[1:]):
        assert received.alpha_kind(odd) == "straight"
    nearly = torch.full((1, 4, 8, 8), 0.95)  # is not half transparent: there is nothing to tell premultiplied by
    assert received.alpha_kind(nearly) == "straight"
    assert received.alpha_kind(nearly - 0.01) == "premultiplied"


def test_no_wishes_change_nothing():
    stack = stacked(scene(0)[1])
    assert received.take_in(stack, None, Wishes()) == (stack, [])


def test_a_batch_of_a_decomposer_becomes_its_layers():
    image, layers = scene(1)
    batch = torch.cat([opaque(image), layers[:2], torch.zeros_like(layers[:1]), layers[1:]])
    batch[:, 3] = 1 - batch[:, 3]
    original = torch.nn.functional.interpolate(image[None], scale_factor=2, mode="bilinear")[0].movedim(0, -1)
    wishes = Wishes(alpha="auto", drop=True, order="by recomposition", crop=True)
    found, notes = received.take_in(stacked(batch[[0, 5, 1, 3, 4, 2]]), original, wishes)
    assert names(found) == ["L2", "L4", "L1"] and found.canvas == (SIDE, SIDE)
    assert notes == [
        "The alpha was taken for inverted.",
        "'L0' is the whole image and was left out.",
        "'L3' is blank and was left out.",
        "'L5' is the same as another and was left out.",
    ]
    for layer, true in zip(found.layers, layers, strict=True):
        whole = torch.zeros(SIDE, SIDE, 4)
        height, width = layer.image.shape[:2]
        whole[layer.y : layer.y + height, layer.x : layer.x + width] = layer.image
        seen = true[3] > 0.5 / 255
        assert (height, width) == (int(seen.any(1).sum()), int(seen.any(0).sum())) or layer.name == "L4"
        assert ((whole.movedim(-1, 0) - true).abs() * seen).max() < 1e-6


def test_the_whole_image_among_the_layers_gives_their_order():
    image, layers = scene(2)
    batch = torch.cat([layers[1:2], opaque(image), layers[:1], layers[2:]])
    found, _ = received.take_in(stacked(batch), None, Wishes(order="by recomposition"))
    assert names(found) == ["L1", "L2", "L0", "L3"]
    found, _ = received.take_in(stacked(batch), None, Wishes(order="reversed"))
    assert names(found) == ["L3", "L2", "L1", "L0"]
    with pytest.raises(ValueError, match="order: by recomposition needs the image"):
        received.take_in(stacked(layers), None, Wishes(order="by recomposition"))


def test_useless_layers_of_a_document_are_left_out_and_hidden_ones_stay():
    image, layers = scene(3)
    batch = stacked(torch.cat([opaque(image), layers, torch.zeros_like(layers[:1]), layers[1:2]]))
    found, notes = received.without_useless(batch, image.movedim(0, -1))
    assert names(found) == ["L1", "L2", "L3"] and len(notes) == 3
    hidden = batch.with_layers(Layer(one.image, one.name, visible=False) for one in batch.layers)
    assert received.without_useless(hidden, image.movedim(0, -1)) == (hidden, [])
    blank, notes = received.without_useless(stacked(torch.zeros(3, 4, SIDE, SIDE)), image.movedim(0, -1))
    assert names(blank) == ["L0"] and notes == ["All layers are blank; the first one was kept."]
