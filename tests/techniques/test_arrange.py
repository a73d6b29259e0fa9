"""Layers chosen, ordered, renamed, merged and changed: the documents that come out, and the sentences of the errors."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strata.techniques import arrange
from strata.techniques.compositing import flatten
from strata.techniques.layers import Layer, LayerStack, read_layers, write_layers


def stack(*names, size=(4, 3)):
    images = torch.rand((len(names), size[1], size[0], 4), generator=torch.Generator().manual_seed(3))
    return LayerStack(size, tuple(Layer(image, name) for image, name in zip(images, names, strict=True)))


FIVE = stack("Sky", "Hill", "Tree, left", "tree", "5")


def names_of(result):
    return [layer.name for layer in result.layers]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", [0, 1, 2, 3, 4]),
        ("  ", [0, 1, 2, 3, 4]),
        ("1", [0]),
        ("2-4", [1, 2, 3]),
        ("4-2, 1", [3, 2, 1, 0]),
        ("sky, TREE", [0, 3]),
        ('"Tree, left", Hill', [2, 1]),
        ("5", [4]),
        ('"5"', [4]),
        ("1 - 2,,", [0, 1]),
        ("3, Sky", [2, 0]),
    ],
)
def test_select(text, expected):
    assert arrange.select(FIVE, text) == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("6", "select: there is no layer 6; numbers run from 1 at the back to 5"),
        ("0-2", "there is no layer 0"),
        ("Cloud", "there is no layer 'Cloud'; the layers are 1 'Sky', 2 'Hill', 3 'Tree, left', 4 'tree', 5 '5'"),
        ("1-3, Hill", "names layer 2 \\('Hill'\\) twice"),
        ('"Sky', "cannot be read"),
        ('"2"', "there is no layer '2'"),
    ],
)
def test_select_raises(text, message):
    with pytest.raises(ValueError, match=message):
        arrange.select(FIVE, text)


def test_select_takes_every_layer_of_a_name_and_names_with_dashes():
    assert arrange.select(stack("a", "b", "A", "x-1"), "a, x-1") == [0, 2, 3]


@given(st.lists(st.integers(1, 9), unique=True, min_size=1))
def test_select_reads_any_list_of_numbers(numbers):
    assert arrange.select(stack(*"abcdefghi"), ", ".join(map(str, numbers))) == [number - 1 for number in numbers]


@pytest.mark.parametrize(
    "action, text, expected",
    [
        ("pick", "3, 1", "ca"),
        ("drop", "2-3", "ad"),
        ("reorder", "d, 1-3", "dabc"),
        ("bring to front", "1, 3", "bdac"),
        ("send to back", "d, b", "dbac"),
        ("reverse", "", "dcba"),
        ("reverse", "1, 3", "cbad"),
        ("pick", "", "abcd"),
    ],
)
def test_arrange_orders(action, text, expected):
    before = stack(*"abcd")
    after = arrange.arrange(before, action, text)
    assert "".join(names_of(after)) == expected
    assert {id(layer) for layer in after.layers} <= {id(layer) for layer in before.layers}


@pytest.mark.parametrize(
    "action, text, names, message",
    [
        ("drop", "", "", "select: this drops every layer"),
        ("reorder", "1, 2", "", "select: the new order leaves out 'c', 'd'"),
        ("rename", "1-2", "x", "names: the number of names is 1 and that of selected layers 2; write"),
        ("merge", "1, 3", "", "select: only neighbouring layers"),
        ("shuffle", "", "", "action: 'shuffle' is not known"),
    ],
)
def test_arrange_raises(action, text, names, message):
    with pytest.raises(ValueError, match=message):
        arrange.arrange(stack(*"abcd"), action, text, names)


def test_rename_follows_the_order_of_the_selection():
    assert names_of(arrange.arrange(stack(*"abcd"), "rename", "3, 1", "Tree\n\nSky\n")) == ["Sky", "b", "Tree", "d"]
    assert names_of(arrange.rename(stack("a"), [0], "b")) == ["b"]


def test_merge_covers_the_boxes_and_is_named():
    layers = [
        Layer(torch.rand(4, 4, 3), "back"),
        Layer(torch.rand(2, 3, 3), "small", x=1, y=1, opacity=0.5),
        Layer(torch.rand(2, 2, 4), "edge", x=-1, y=3),
        Layer(torch.rand(9, 9, 3), "hidden", visible=False),
    ]
    document = LayerStack((6, 6), tuple(layers))
    merged = arrange.merge(document, [2, 1])
    assert names_of(merged) == ["back", "edge", "hidden"]
    assert (merged.layers[1].x, merged.layers[1].y, merged.layers[1].image.shape) == (0, 1, (4, 4, 4))
    assert names_of(arrange.arrange(document, "merge", "2-4", "Both")) == ["back", "Both"]
    with pytest.raises(ValueError, match="none of the selected layers is visible"):
        arrange.merge(document, [3])


def test_merge_from_the_back_keeps_the_picture_of_any_blend_mode():
    layers = [
        replace(layer, blend_mode=mode)
        for layer, mode in zip(FIVE.layers, ("multiply", "screen", "hue", "normal", "overlay"), strict=True)
    ]
    document = FIVE.with_layers(layers)
    for got, expected in zip(flatten(arrange.merge(document, [0, 1, 2])), flatten(document), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_from_images_names_masks_and_appends():
    images = torch.rand(3, 4, 5, 3)
    made = arrange.from_images(images, torch.ones(1, 4, 5), "Sky\nHill")
    assert names_of(made) == ["Sky", "Hill", "Layer 3"] and made.canvas == (5, 4)
    assert all(torch.equal(layer.mask, torch.ones(4, 5)) for layer in made.layers)
    masks = torch.rand(3, 4, 5)
    for number, layer in enumerate(arrange.from_images(images, masks).layers):
        assert torch.equal(layer.mask, masks[number]) and torch.equal(layer.image, images[number])
    more = arrange.from_images(torch.rand(2, 9, 9, 4), below=made)
    assert names_of(more) == ["Sky", "Hill", "Layer 3", "Layer 4", "Layer 5"] and more.canvas == (5, 4)
    assert all(now is then for now, then in zip(more.layers, made.layers, strict=False))


def test_a_mask_that_is_the_alpha_over_again_counts_once():
    images = torch.rand(2, 4, 5, 4)
    batch = arrange.to_batch(arrange.from_images(images))
    masks = 1 - batch[..., 3]
    assert torch.equal(arrange.to_batch(arrange.from_images(batch, masks)), batch)
    added = arrange.insert(None, batch[:1], (masks[:1] * 255).round() / 255, None, {})
    assert added.layers[0].mask is None
    changed = arrange.change(added, "1", batch[1:], masks[1:], {"x": 3})
    assert changed.layers[0].mask is None and torch.equal(changed.layers[0].image, batch[1])
    mine = masks.clone()
    mine[1, 2, 2] = 1 - mine[1, 2, 2]
    first, second = arrange.from_images(batch, mine).layers
    assert first.mask is None and torch.equal(second.mask, mine[1]), "any other mask multiplies"
    assert arrange.from_images(batch[..., :3], masks).layers[0].mask is not None


@pytest.mark.parametrize(
    "count, masks, names, message",
    [
        (51, None, "", "images: this makes 51 layers and a LAYERS document holds at most 50"),
        (2, torch.zeros(1, 3, 3), "", "masks: it is 3×3 and images is 5×4; make them the same size"),
        (2, torch.zeros(3, 4, 5), "", "masks: there are 3 masks for 2 images"),
        (1, None, "a\nb", "names: there are 2 names for 1 images"),
    ],
)
def test_from_images_raises(count, masks, names, message):
    with pytest.raises(ValueError, match=message):
        arrange.from_images(torch.zeros(count, 4, 5, 3), masks, names)


def test_insert_on_top_and_below():
    before, image = stack(*"abc"), torch.rand(1, 2, 2, 3)
    assert names_of(arrange.insert(before, image, None, None, {"name": "new", "x": 3})) == ["a", "b", "c", "new"]
    below = arrange.insert(before, image, None, "b", {"opacity": 0.5})
    assert names_of(below) == ["a", "Layer 4", "b", "c"] and below.layers[1].opacity == 0.5
    assert names_of(arrange.insert(before, image.expand(2, -1, -1, -1), None, "1", {"name": "n"})) == [
        "n 1",
        "n 2",
        "a",
        "b",
        "c",
    ]
    alone = arrange.insert(None, image, torch.zeros(1, 2, 2), None, {})
    assert alone.canvas == (2, 2) and names_of(alone) == ["Layer 1"]
    with pytest.raises(ValueError, match="layer: '1-2' stands for 2 layers"):
        arrange.insert(before, image, None, "1-2", {})


def test_change_sets_only_what_is_given():
    before = stack(*"abc")
    after = arrange.change(before, "b", None, None, {"opacity": 0.25, "visible": False})
    assert torch.equal(after.layers[1].image, before.layers[1].image) and (
        after.layers[1].opacity,
        after.layers[1].visible,
    ) == (0.25, False)
    assert after.layers[1].name == "b"
    assert after.layers[0] is before.layers[0]
    image, mask = torch.rand(1, 6, 6, 3), torch.rand(1, 6, 6)
    swapped = arrange.change(before, "1", image, mask, {}).layers[0]
    assert torch.equal(swapped.image, image[0]) and torch.equal(swapped.mask, mask[0])
    hidden = arrange.change(before, "1", None, torch.ones(1, 3, 4), {}).layers[0]
    assert torch.equal(hidden.image, before.layers[0].image) and torch.equal(hidden.mask, torch.ones(3, 4))


def test_change_keeps_the_mask_that_a_layer_has():
    mask = torch.rand(3, 4)
    before = stack("a").with_layers([replace(stack("a").layers[0], mask=mask)])
    image = torch.rand(1, 3, 4, 3)
    for changed in (arrange.change(before, "a", None, None, {"x": 5}), arrange.change(before, "a", image, None, {})):
        assert torch.equal(changed.layers[0].mask, mask)
    with pytest.raises(ValueError, match="mask: it is 4×3 and image is 7×7"):
        arrange.change(before, "a", torch.zeros(1, 7, 7, 3), None, {})


@pytest.mark.parametrize(
    "image, mask, message",
    [
        (torch.zeros(2, 3, 4, 3), None, "image: there are 2 frames"),
        (None, torch.zeros(2, 3, 4), "mask: there are 2 frames"),
        (None, torch.zeros(1, 5, 5), "mask: it is 5×5 and layer 'a' is 4×3"),
        (torch.zeros(1, 7, 7, 3), torch.zeros(1, 5, 5), "mask: it is 5×5 and image is 7×7"),
    ],
)
def test_change_raises(image, mask, message):
    with pytest.raises(ValueError, match=message):
        arrange.change(stack("a"), "a", image, mask, {})


def test_chosen_fields():
    values = {"name": "", "x": 0, "opacity": 0.5, "visible": True}
    assert arrange.chosen_fields(values, "") == {"opacity": 0.5}
    assert arrange.chosen_fields(values, "x, visible") == {"x": 0, "visible": True}
    with pytest.raises(ValueError, match="fields: 'size' is not a field of a layer; use name, x, opacity, visible"):
        arrange.chosen_fields(values, "x, size")


def test_transform_layers_changes_the_selected():
    before = stack(*"ab")
    after = arrange.transform_layers(before, "b", "centre", move=(2.0, 0.0))
    assert after.layers[0] is before.layers[0] and after.layers[1].x == 2
    fitted = arrange.transform_layers(LayerStack((8, 10), before.layers), "b", "contain", move=(1.0, 0.0)).layers[1]
    assert fitted.size == (8, 6) and (fitted.x, fitted.y) == (1, 2), "twice as large, moved by one from where it fits"


def test_to_batch():
    layers = (Layer(torch.rand(2, 3, 3), x=1, opacity=0.5, mask=torch.zeros(2, 3)), Layer(torch.rand(2, 3, 4)))
    placed = arrange.to_batch(LayerStack((5, 4), layers))
    assert placed.shape == (2, 4, 5, 4)
    assert torch.equal(placed[0, :2, 1:4, :3], layers[0].image) and placed[0, :2, 1:4, 3].eq(0.5).all()
    own = arrange.to_batch(LayerStack((5, 4), layers), at_canvas_size=False)
    assert own[0, ..., 3].eq(0.5).all() and torch.equal(own[1], layers[1].image)
    alpha, mask = torch.rand(2, 3), torch.rand(2, 3)
    cut = Layer(torch.cat([torch.rand(2, 3, 3), alpha[..., None]], -1), x=2, y=1, opacity=0.25, mask=mask)
    expected = torch.zeros(4, 5)
    expected[1:3, 2:5] = alpha * (1 - mask) * 0.25
    for at_canvas_size, shown in ((True, expected), (False, expected[1:3, 2:5])):
        (batch,) = arrange.to_batch(LayerStack((5, 4), (cut,)), at_canvas_size)
        assert torch.allclose(batch[..., 3], shown, rtol=0, atol=1e-7)
    with pytest.raises(ValueError, match=r"at_canvas_size: the layers have different sizes \(4×1, 3×2\)"):
        arrange.to_batch(LayerStack((5, 4), (*layers, Layer(torch.rand(1, 4, 3)))), at_canvas_size=False)


def test_documents_survive_an_edit_with_their_unknown_keys():
    document = write_layers(stack(*"abc"))
    document["layers"][1]["strata"] = {"prompt": "a hill"}
    after = arrange.arrange(read_layers(document), "reverse", "")
    assert write_layers(after)["layers"][1]["strata"] == {"prompt": "a hill"}
    assert [entry["z_index"] for entry in write_layers(after)["layers"]] == [0, 1, 2]


@pytest.mark.parametrize("text", [",,,", " , "])
def test_a_selection_of_nothing_names_its_own_input(text):
    with pytest.raises(ValueError, match="^select: .* names no layer"):
        arrange.select(LayerStack((1, 1), (Layer(torch.zeros(1, 1, 3)),)), text)


def test_an_empty_line_leaves_a_new_layer_its_number():
    made = arrange.from_images(torch.zeros(3, 4, 5, 3), None, "a\n\nc\n")
    assert names_of(made) == ["a", "Layer 2", "c"]
    with pytest.raises(ValueError, match="^names: there are 3 names for 2 images; write one name per line"):
        arrange.from_images(torch.zeros(2, 4, 5, 3), None, "a\n\nc")


def test_layers_that_hide_all_behind_them_are_named():
    solid, clear = torch.ones(4, 5, 3), torch.ones(4, 5, 4)
    clear[0, 0, 3] = 0.5
    layers = (
        Layer(solid, "back"),
        Layer(solid, "covers"),
        Layer(clear, "has alpha"),
        Layer(solid, "masked", mask=torch.tensor([[1.0, 0, 0, 0, 0]] * 4)),
        Layer(solid, "faint", opacity=0.9),
        Layer(solid, "mixed", blend_mode="multiply"),
        Layer(solid, "off", visible=False),
        Layer(solid, "beside", x=1),
        Layer(solid, "turned", rotation=0.4),
        Layer(torch.ones(2, 2, 3), "stretched", w=5, h=4),
    )
    assert arrange.covering(LayerStack((5, 4), layers)) == ["covers", "stretched"]
