"""Edits as JSON: against Set layer's and Order layers' own ways, and every text that is refused."""

import json
import math
import random

import pytest
import torch
from strata.techniques import arrange
from strata.techniques.compositing import W3C_MODES, flatten
from strata.techniques.geometry import content_box
from strata.techniques.layer_edits import Edits, Reference, apply_edits, read_edits
from strata.techniques.layers import Layer, LayerStack


def stack(*names, size=(24, 18)):
    generator = torch.Generator().manual_seed(3)
    return LayerStack(
        size, tuple(Layer(torch.rand(9, 12, 4, generator=generator), name, x=i) for i, name in enumerate(names))
    )


def edited(layers, text):
    return apply_edits(layers, read_edits(text if isinstance(text, str) else json.dumps(text)))


def test_an_empty_text_changes_nothing():
    layers = stack("Sky", "Dog")
    for text in ("", "  \n", "{}", '{"version": 1}', '{"layers": [], "order": []}'):
        assert edited(layers, text) == (layers, [])


def some_fields(random_):
    every = {
        "x": random_.randint(-20, 20),
        "y": random_.randint(-20, 20),
        "w": random_.randint(1, 40),
        "h": random_.randint(1, 40),
        "rotation": random_.choice([0, 90, -37.5, 180]),
        "flip_h": random_.random() < 0.5,
        "flip_v": random_.random() < 0.5,
        "opacity": random_.random(),
        "blend_mode": random_.choice(W3C_MODES),
        "visible": random_.random() < 0.8,
        "name": random_.choice(["Größe", "Dog, left", "1"]),
    }
    return {name: every[name] for name in random_.sample(sorted(every), random_.randint(0, len(every)))}


@pytest.mark.parametrize("seed", range(20))
def test_edits_are_what_set_layer_and_order_layers_do_one_after_the_other(seed):
    random_ = random.Random(seed)
    layers = stack("Sky", "Hill", "Dog", "Mist")
    fields = {number: some_fields(random_) for number in random_.sample(range(1, 5), 3)}
    order = random_.sample(range(1, 5), 4)
    by_name = random_.random() < 0.5
    call = (lambda number: layers.layers[number - 1].name.upper()) if by_name else (lambda number: number)
    found, notes = edited(
        layers,
        {
            "layers": [{"layer": call(number), **values} for number, values in fields.items()],
            "order": [call(number) for number in order],
        },
    )
    expected = layers
    for number, values in fields.items():
        values = {**values, **({"rotation": math.radians(values["rotation"])} if "rotation" in values else {})}
        expected = arrange.change(expected, str(number), None, None, values)
    expected = arrange.arrange(expected, "reorder", ", ".join(map(str, order)))
    assert notes == []
    assert [layer.name for layer in found.layers] == [layer.name for layer in expected.layers]
    for ours, theirs in zip(flatten(found), flatten(expected), strict=True):
        assert torch.equal(ours, theirs)


def test_numbers_are_rounded_to_whole_pixels_and_angles_are_kept():
    (layer,) = edited(stack("Dog"), {"layers": [{"layer": 1, "x": -0.5, "y": 2.5, "w": 7.49, "rotation": 22.5}]})[
        0
    ].layers
    assert (layer.x, layer.y, layer.w, layer.h) == (0, 3, 7, 0)
    assert layer.rotation == pytest.approx(math.pi / 8)


def test_layers_that_the_order_leaves_out_keep_their_places():
    layers = stack("a", "b", "c", "d")
    found, _ = edited(layers, {"order": ["d", 1]})
    assert [layer.name for layer in found.layers] == ["d", "b", "c", "a"]


def test_one_of_several_layers_of_a_name_is_found_by_its_number():
    layers = stack("Dog", "Sky", "dog")
    found, notes = edited(
        layers, {"layers": [{"layer": "Dog", "number": 3, "x": 9}, {"layer": "Sky", "number": 1, "x": 8}]}
    )
    assert [layer.x for layer in found.layers] == [0, 8, 9] and notes == [], "of a single one the number may be old"
    found, notes = edited(layers, {"layers": [{"layer": "Dog", "number": 2, "x": 9}, {"layer": "Dog", "x": 9}]})
    assert found == layers
    assert set(notes) == {"edits: several layers are called 'Dog', so its edits are left out."}


def test_layers_that_are_not_there_are_told_and_the_others_edited():
    text = {
        "layers": [{"layer": "Cat", "x": 5}, {"layer": "Dog", "x": 6}, {"layer": 9, "x": 5}],
        "order": ["Dog", "Cat", "Sky"],
    }
    found, notes = edited(stack("Sky", "Dog"), text)
    assert [(layer.name, layer.x) for layer in found.layers] == [("Dog", 6), ("Sky", 0)]
    assert notes == [
        "edits: there is no layer 'Cat' here, so its edits are left out.",
        "edits: there is no layer 9 here, so its edits are left out.",
    ]


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "this is not JSON"),
        ("[" * 100_000, "this is not JSON"),
        ('{"layers": [{"layer": 1, "x": %s}]}' % ("9" * 5000), "this is not JSON"),
        ([], r"the text is \[\]"),
        ({"layer": []}, 'the text has "layer", which is not known; use version, layers, order'),
        ({"version": 2}, "version 2 and only version 1"),
        ({"layers": {}}, "layers is {}"),
        ({"order": "Dog"}, 'order is "Dog"'),
        ({"layers": [3]}, "entry 1 of layers is 3"),
        ({"layers": [{"x": 3}]}, "entry 1 of layers does not say which layer"),
        ({"layers": [{"layer": 0}]}, "entry 1 of layers has 0 for a layer"),
        ({"layers": [{"layer": True}]}, "entry 1 of layers has true for a layer"),
        ({"layers": [{"layer": "Dog", "number": "2"}]}, 'entry 1 of layers has "2" for a layer'),
        ({"order": [None]}, "entry 1 of order does not say which layer"),
        ({"order": [{"layer": "Dog", "x": 1}]}, 'entry 1 of order has "x", which is not known'),
        ({"layers": [{"layer": 1, "z": 3}]}, 'entry 1 of layers has "z", which is not known'),
        ({"layers": [{"layer": 1, "x": "3"}]}, 'has "3" as its x; write a number from -16384 to 16384'),
        ({"layers": [{"layer": 1, "x": math.nan}]}, "has NaN as its x"),
        ({"layers": [{"layer": 1, "w": 0}]}, "has 0 as its w; write a number from 1 to 16384"),
        ({"layers": [{"layer": 1, "opacity": True}]}, "has true as its opacity"),
        ({"layers": [{"layer": 1, "rotation": 361}]}, "has 361 as its rotation"),
        ({"layers": [{"layer": 1, "visible": 1}]}, "has 1 as its visible; write true or false"),
        ({"layers": [{"layer": 1, "blend_mode": ["normal"]}]}, "as its blend_mode; write one of normal, multiply"),
        ({"layers": [{"layer": 1, "name": " "}]}, 'has " " as its name; write a text in one line'),
        ({"layers": [{"layer": 1, "name": "a\nb"}]}, "as its name"),
        ({"layers": [{"layer": 1, "name": "\ud800"}]}, "as its name"),
        ({"layers": [{"layer": 1, "name": "x" * 9 + "\0"}]}, "as its name"),
    ],
)
def test_texts_that_are_refused(text, message):
    with pytest.raises(ValueError, match=message) as error:
        read_edits(text if isinstance(text, str) else json.dumps(text))
    sentence = str(error.value)
    assert sentence.startswith("edits: ") and sentence.endswith(".") and "\n" not in sentence and len(sentence) < 500


@pytest.mark.parametrize("key", ["layers", "order"])
def test_a_layer_that_is_named_twice_is_refused(key):
    with pytest.raises(ValueError, match=f"edits: {key} has layer 2 \\('Dog'\\) twice"):
        edited(stack("Sky", "Dog"), {key: [{"layer": "dog"}, {"layer": 2}]})


def test_names_may_be_any_text_in_one_line():
    for name in ("Größe", "👩‍🚀", "a, b", "\u202eabc"):
        assert read_edits(json.dumps({"layers": [{"layer": 1, "name": name}]})) == Edits(
            ((Reference(None, 1), {"name": name}),)
        )


@pytest.mark.parametrize("seed", range(5))
def test_content_box_is_pillows(seed):
    from PIL import Image

    random_ = random.Random(seed)
    alpha = torch.zeros(17, 23)
    for _ in range(3):
        alpha[random_.randrange(17), random_.randrange(23)] = random_.random() + 0.01
    alpha[0, 0], alpha[0, 22], alpha[16, 20] = 0.499 / 255, 0.5 / 255, 0.501 / 255  # the last alone is seen in 8 bits
    assert content_box(alpha) == Image.fromarray((alpha * 255).round().byte().numpy()).getbbox()
    assert content_box(torch.zeros(4, 5)) == (0, 0, 5, 4)
