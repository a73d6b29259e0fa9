"""The LAYERS document: what is read is what was written, and what is wrong is said with the layer's name."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strata.techniques.layers import BLEND_MODES, MAX_LAYERS, MAX_SIDE, Layer, LayerStack, read_layers, write_layers

IMAGE = torch.rand(1, 4, 5, 4, generator=torch.Generator().manual_seed(0))


def document(**changes):
    entry = {"type": "raster", "image": IMAGE, "name": "Sky", **changes}
    return {"version": 1, "canvas": (5, 4), "layers": [entry]}


layers_strategy = st.builds(
    Layer,
    image=st.tuples(st.integers(1, 4), st.integers(1, 4), st.sampled_from([3, 4])).map(torch.rand),
    name=st.text(min_size=1, max_size=8),
    x=st.integers(-50, 50),
    y=st.integers(-50, 50),
    w=st.integers(0, 9),
    h=st.integers(0, 9),
    rotation=st.floats(-7, 7),
    flip_h=st.booleans(),
    flip_v=st.booleans(),
    opacity=st.floats(0, 1),
    blend_mode=st.sampled_from(BLEND_MODES),
    visible=st.booleans(),
    extra=st.just({"strata": {"depth": (0.1, 0.2)}, "other_pack": 7}),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(layers_strategy, min_size=1, max_size=5), st.tuples(st.integers(1, 99), st.integers(1, 99)))
def test_read_layers_returns_what_write_layers_was_given(layers, canvas):
    stack = read_layers(write_layers(LayerStack(canvas, tuple(layers))))
    assert stack.canvas == canvas
    for got, want in zip(stack.layers, layers, strict=True):
        assert torch.equal(got.image, want.image)
        for name in (
            "name",
            "x",
            "y",
            "w",
            "h",
            "rotation",
            "flip_h",
            "flip_v",
            "opacity",
            "blend_mode",
            "visible",
            "extra",
        ):
            assert getattr(got, name) == getattr(want, name), name


def test_layers_are_sorted_back_to_front_and_equal_z_keeps_order():
    entries = [
        {"image": IMAGE, "name": name, "z_index": z} for name, z in (("top", 9), ("a", 1), ("b", 1), ("back", -3))
    ]
    stack = read_layers({"version": 1, "layers": entries})
    assert [layer.name for layer in stack.layers] == ["back", "a", "b", "top"]


def test_frames_of_a_batch_become_consecutive_layers():
    stack = read_layers(document(image=IMAGE.expand(3, -1, -1, -1), mask=torch.zeros(1, 4, 5)))
    assert [layer.name for layer in stack.layers] == ["Sky 1", "Sky 2", "Sky 3"]
    assert all(layer.image.shape == (4, 5, 4) and layer.mask.shape == (4, 5) for layer in stack.layers)


def test_an_absent_canvas_holds_every_layer():
    entries = [{"image": IMAGE, "x": 10, "y": -2}, {"image": IMAGE, "w": 30, "h": 7}]
    assert read_layers({"version": 1, "layers": entries}).canvas == (30, 7)


def test_what_an_entry_does_not_say_is_that_of_a_plain_layer():
    (layer,) = read_layers({"version": 1, "layers": [{"image": IMAGE}]}).layers
    plain = {"name": "Layer 1", "mask": None, "x": 0, "y": 0, "w": 0, "h": 0, "rotation": 0, "opacity": 1, "extra": {}}
    plain |= {"flip_h": False, "flip_v": False, "visible": True, "blend_mode": "normal"}
    assert {key: getattr(layer, key) for key in plain} == plain
    assert torch.equal(layer.image, IMAGE[0])


def test_masks_are_written_and_read_back():
    masks = torch.rand(2, 4, 5)
    stack = read_layers(document(image=IMAGE.expand(2, -1, -1, -1), mask=masks))
    written = write_layers(stack)["layers"]
    assert [entry["mask"].shape for entry in written] == [(1, 4, 5)] * 2
    for mask, layer in zip(masks, read_layers({"version": 1, "layers": written}).layers, strict=True):
        assert torch.equal(layer.mask, mask)
    assert "mask" not in write_layers(read_layers(document()))["layers"][0]


def test_rgba_multiplies_the_mask_into_alpha():
    mask = torch.rand(4, 5)
    layer = Layer(IMAGE[0], mask=mask)
    assert torch.equal(layer.rgba()[..., 3], IMAGE[0, ..., 3] * (1 - mask))
    assert torch.equal(Layer(IMAGE[0, ..., :3]).rgba()[..., 3], torch.ones(4, 5))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, ["layers", "LAYERS document"]),
        ({"version": 2, "layers": []}, ["version 2", "version 1"]),
        ({"version": 1, "layers": []}, ["no layers"]),
        ({"version": 1, "layers": [3]}, ["layer 0", "int"]),
        ({"version": 1, "layers": [{"image": IMAGE}] * (MAX_LAYERS + 1)}, ["51 layers", "50"]),
        ({"version": 1, "layers": [{"image": IMAGE}], "canvas": (0, 5)}, ["canvas", "(0, 5)"]),
        (document(type="text"), ["'Sky'", "'text'", "raster"]),
        (document(image=IMAGE[..., :2]), ["'Sky'", "2 channels"]),
        (document(image=IMAGE[0]), ["'Sky'", "(4, 5, 4)"]),
        (document(image=None), ["'Sky'", "NoneType"]),
        (document(image=IMAGE * math.nan), ["'Sky'", "NaN"]),
        (document(image=torch.empty(1, 1, 16385, 3)), ["16385×1", "16384"]),
        (document(mask=torch.zeros(1, 9, 9)), ["'Sky'", "9×9", "5×4"]),
        (document(blend_mode="dissolve"), ["'Sky'", "'dissolve'", "multiply"]),
        (document(opacity=1.5), ["'Sky'", "1.5", "0 to 1"]),
        (document(x="left"), ["'Sky'", "'left'", "number"]),
        (document(rotation=math.inf), ["'Sky'", "rotation"]),
        (document(w=20000), ["'Sky'", "20000", "16384"]),
        (document(name=7), ["name", "7"]),
    ],
)
def test_a_bad_document_is_named_in_one_sentence(given, words):
    with pytest.raises(ValueError) as raised:
        read_layers(given)
    message = str(raised.value)
    assert "\n" not in message and message.endswith(".")
    assert all(word in message for word in words), message


def test_a_side_may_be_as_long_as_the_limit_and_no_longer():
    document = {"version": 1, "layers": [{"image": torch.zeros(1, 1, MAX_SIDE, 3)}], "canvas": (8, 8)}
    assert read_layers(document).layers[0].image.shape[1] == MAX_SIDE
    document["layers"][0]["image"] = torch.zeros(1, MAX_SIDE + 1, 1, 3)
    with pytest.raises(ValueError, match=f"image of 1×{MAX_SIDE + 1}; sides must be at most {MAX_SIDE} pixels"):
        read_layers(document)
