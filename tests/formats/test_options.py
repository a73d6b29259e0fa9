"""What Save layers may be asked for: groups, 16 bits, trimmed layers, masks in place of alpha. Second readers:
psd-tools and its compositor, and a plain zip and XML reader.
"""

import io
import zipfile
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from psd_tools import PSDImage
from psd_tools.constants import BlendMode, Resource
from strata.formats import files, openraster
from strata.formats.groups import GROUPS, in_sequence
from strata.formats.raster import is_srgb, picture, srgb_profile, trimmed
from strata.techniques.compositing import W3C_MODES
from strata.techniques.effects import bound
from strata.techniques.layers import (
    EFFECTS,
    MAX_GROUPS,
    Layer,
    LayerStack,
    as_effect,
    bound_to,
    effect_of,
    in_group,
    parent_of,
    read_layers,
    write_layers,
)

from .stacks import eight_bit, example, linear_srgb, pixels, random_stack

FORMATS = ("PSD", "OpenRaster")
MODES = tuple(mode for mode in openraster.MODES if mode in W3C_MODES)


def saved(folder, stack, format="PSD", **choices):
    (path,) = files.save(folder, "stack", stack, picture(stack), format, {}, **choices)
    return path


def inside(name, *layers):
    return [in_group(layer, name) for layer in layers]


def dot(name, **fields):
    return Layer(pixels(1, 2, 2, 4), name, **fields)


def nested():
    """Two groups in one, a group that comes twice, because a layer lies between its parts, and one by itself."""
    outer = inside("outer", dot("a"), *inside("one", dot("b"), dot("c")), *inside("two", dot("d", visible=False)))
    return LayerStack(
        (6, 5), (dot("back"), *outer, dot("between"), *inside("outer", dot("e")), *inside("Ümläut/漢", dot("f")))
    )


TREE = [
    "back",
    ("outer", ["a", ("one", ["b", "c"]), ("two", ["d"])]),
    "between",
    ("outer", ["e"]),
    ("Ümläut/漢", ["f"]),
]


def of_psd(items):
    return [(item.name, of_psd(item)) if item.is_group() else item.name for item in items]


def of_xml(stack):
    return [
        (item.get("name"), of_xml(item)) if item.tag == "stack" else item.get("name") for item in reversed(list(stack))
    ]


def test_groups_are_where_other_readers_find_them(tmp_path):
    document = PSDImage.open(saved(tmp_path, nested()))
    assert of_psd(document) == TREE
    assert {item.blend_mode for item in document.descendants() if item.is_group()} == {BlendMode.PASS_THROUGH}
    with zipfile.ZipFile(saved(tmp_path, nested(), "OpenRaster")) as archive:
        (stack,) = ElementTree.fromstring(archive.read("stack.xml")).findall("stack")
        assert of_xml(stack) == TREE
        assert {item.get("isolation") for item in stack.iter("stack")} == {None, "auto"}


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("seed", range(8))
def test_random_stacks_come_back_with_their_groups(tmp_path, format, seed, bits):
    stack, notes = random_stack(seed, MODES), []
    back = files.load(saved(tmp_path, stack, format, bits=bits), notes=notes)
    assert not notes and back.canvas == stack.canvas
    for ours, theirs in zip(stack.layers, back.layers, strict=True):
        assert parent_of(ours) == parent_of(theirs)
        assert np.array_equal(eight_bit(ours.rgba())[..., :3], eight_bit(theirs.rgba())[..., :3])
        assert np.abs(eight_bit(ours.rgba())[..., 3] - eight_bit(theirs.rgba())[..., 3]).max() <= (format != "PSD")
        fields = [replace(layer, image=None, mask=None, extra={}) for layer in (ours, theirs)]
        assert fields[0] == fields[1]


def test_the_random_stacks_have_what_is_to_be_tested():
    stacks = [random_stack(seed, MODES).layers for seed in range(8)]
    found = [layer for stack in stacks for layer in stack]
    assert {len(parent_of(layer)) for layer in found} == {0, 1, 2}
    assert any(layer.mask is not None for layer in found) and any(not layer.visible for layer in found)
    assert len({layer.blend_mode for layer in found}) > 5


@pytest.mark.parametrize("seed", range(8))
def test_groups_do_not_change_what_psd_tools_shows(tmp_path, seed):
    stack = random_stack(seed, ("normal", "multiply", "screen"))
    composite = PSDImage.open(saved(tmp_path, stack)).composite(force=True).convert("RGBA")
    assert np.abs(np.asarray(composite, int) - eight_bit(picture(stack))).max() <= 2


def with_effects():
    """Two apples of one name, in a group of the user's, each with all four effects."""
    layers = [dot("back")]
    for x in (0, 3):
        effects = [as_effect(dot(f"apple {kind}", x=x, y=1, blend_mode="multiply"), kind) for kind in EFFECTS]
        (apple,) = inside("fruit", dot("apple", x=x))
        layers += bound(effects[:2], apple, effects[2:], layers)
    return LayerStack((6, 5), tuple(layers))


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_effects_are_bound_again_after_loading(tmp_path, format, trim):
    stack = with_effects()
    assert [bound_to(stack, number) for number in (3, 8)] == [[1, 2, 4, 5], [6, 7, 9, 10]]
    back = files.load(saved(tmp_path, stack, format, trim=trim))
    assert [(effect_of(one), parent_of(one)) for one in back.layers] == [
        (effect_of(one), parent_of(one)) for one in stack.layers
    ]
    assert parent_of(back.layers[8]) == ("fruit", "apple 2")
    second = tmp_path / "second"
    second.mkdir()
    again = files.load(saved(second, back, format))
    assert [bound_to(again, number) for number in (3, 8)] == [[1, 2, 4, 5], [6, 7, 9, 10]]


def test_an_effect_that_is_none_of_ours_is_an_ordinary_layer(tmp_path):
    with zipfile.ZipFile(saved(tmp_path, with_effects(), "OpenRaster")) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "other.ora", "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data.replace(b'effect="shadow"', b'effect="smoke"'))
    back = files.load(tmp_path / "other.ora")
    assert [effect_of(one) for one in back.layers[:4]] == [None, None, "glow", None]
    assert bound_to(back, 3) == [2, 4, 5]


def test_one_layer_each_makes_one_layer_of_an_outermost_group(tmp_path):
    for format in FORMATS:
        back = files.load(saved(tmp_path, nested(), format), GROUPS[1])
        assert [layer.name for layer in back.layers] == ["back", "outer", "between", "outer", "Ümläut/漢"]
        assert not any(parent_of(layer) for layer in back.layers)


def test_a_group_that_becomes_one_layer_stays_in_the_group_around_it(tmp_path):
    document = PSDImage.new("RGB", (4, 4))
    parts = [document.create_pixel_layer(Image.new("RGB", (4, 4), (90, 90, 90)), name=name) for name in "ab"]
    inner = document.create_group(parts, name="inner")
    inner.opacity, inner.blend_mode = 128, BlendMode.NORMAL
    document.create_group([inner], name="outer")
    document.save(tmp_path / "made.psd")
    (layer,) = files.load(tmp_path / "made.psd").layers
    assert layer.name == "inner" and parent_of(layer) == ("outer",)


def test_the_document_keeps_groups_and_refuses_what_is_none():
    document = write_layers(nested())
    assert [parent_of(layer) for layer in read_layers(document).layers] == [parent_of(one) for one in nested().layers]
    for parent, words in (
        ("outer", "has 'outer' as its parent; it must be a list of group names"),
        ([1], "as its parent"),
        (["deep"] * (MAX_GROUPS + 1), f"at most {MAX_GROUPS} may lie in each other"),
    ):
        document["layers"][0]["strata"] = {"parent": parent}
        with pytest.raises(ValueError, match=f"layer 'back' .*{words}"):
            read_layers(document)
    for strata in (None, "of another pack", {"parent": None}, {"depth": (0, 1)}):
        document["layers"][0]["strata"] = strata
        assert parent_of(read_layers(document).layers[0]) == ()


def test_groups_deeper_than_the_limit_keep_the_innermost():
    layer = dot("deep")
    for number in range(MAX_GROUPS + 3):
        layer = in_group(layer, str(number))
    assert parent_of(layer)[-1] == "0" and len(parent_of(layer)) == MAX_GROUPS
    assert len(list(in_sequence([layer]))) == 2 * MAX_GROUPS + 1


def test_other_keys_of_ours_stay_beside_the_parent():
    layer = in_group(dot("a", extra={"strata": {"prompt": "a cat"}, "other": 1}), "g")
    assert layer.extra == {"strata": {"prompt": "a cat", "parent": ["g"]}, "other": 1}


def test_sixteen_bits_are_written_in_full(tmp_path):
    image, mask = torch.rand(9, 12, 4), torch.rand(9, 12)
    stack = LayerStack((16, 14), (Layer(torch.rand(14, 16, 3), "back"), Layer(image, "ünï", mask, 3, -2, opacity=0.5)))
    path = saved(tmp_path, stack, bits=16)
    document = PSDImage.open(path)
    assert document.depth == 16 and [item.name for item in document] == ["back", "ünï"]
    assert np.abs(document[1].numpy() - image.numpy()).max() <= 0.51 / 65535
    assert np.abs(document[1].numpy("mask")[..., 0] - (1 - mask.numpy())).max() <= 0.51 / 65535
    assert np.abs(document.numpy() - picture(stack)[..., :3].numpy()).max() <= 0.51 / 65535  # the merged picture
    for ours, theirs in zip(stack.layers, files.load(path).layers, strict=True):
        assert (ours.rgba() - theirs.rgba()).abs().max() <= 1.1 / 65535


def test_sixteen_bits_say_that_they_are_srgb(tmp_path):
    """Without a profile Krita takes them for linear light."""
    (tmp_path / "eight").mkdir()
    resources = PSDImage.open(saved(tmp_path, example(), bits=16)).image_resources
    profile = resources.get_data(Resource.ICC_PROFILE)
    values = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    own, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
    found = np.array(ImageCms.profileToProfile(Image.fromarray(values), own, srgb))
    assert np.abs(found.astype(int) - values).max() <= 1
    assert Resource.ICC_PROFILE not in PSDImage.open(saved(tmp_path / "eight", example())).image_resources


def test_profiles_are_told_by_what_they_do():
    assert is_srgb(srgb_profile())
    assert not is_srgb(linear_srgb()) and not is_srgb(b"no profile")


def test_a_transparent_picture_of_sixteen_bits_is_over_white(tmp_path):
    half = Layer(torch.tensor([1.0, 0, 0, 0.6]).expand(2, 2, 4))
    document = PSDImage.open(saved(tmp_path, LayerStack((3, 2), (half,)), bits=16))._record
    planes = [np.frombuffer(plane, ">u2") for plane in document.image_data.get_data(document.header)]
    assert [plane.tolist() for plane in planes] == [
        [65535] * 6,
        *[[26214, 26214, 65535] * 2] * 2,
        [39321, 39321, 0] * 2,
    ]


def test_trimmed_layers_end_where_something_is_drawn(tmp_path):
    image = pixels(3, 20, 30, 4)
    image[..., 3] = 0
    image[5:9, 7:20, 3] = 1
    image[5, 7, 3] = 0.4 / 255  # nothing in 8 bits
    mask = torch.zeros(20, 30)
    mask[:, 15:] = 1
    layer = Layer(image, "one", mask, -4, 2)
    small = trimmed(layer, (40, 40))
    assert (small.x, small.y, *small.image.shape) == (-4 + 7, 2 + 5, 4, 8, 4)
    assert torch.equal(small.rgba(), layer.rgba()[5:9, 7:15])
    nothing = trimmed(replace(layer, image=image * 0), (40, 40))
    assert nothing.image.shape == (1, 1, 4) and nothing.rgba()[..., 3].max() == 0


@pytest.mark.parametrize("format", FORMATS)
def test_trimmed_files_show_the_same_and_have_tight_layers(tmp_path, format):
    stack = example()
    layers = [*stack.layers, Layer(torch.nn.functional.pad(pixels(9, 6, 5, 4), (0, 0, 9, 8, 7, 6)), "wide", None, 2, 1)]
    layers.append(replace(layers[-1], rotation=0.7, w=40, opacity=0.5))
    stack = stack.with_layers(layers)
    back = files.load(saved(tmp_path, stack, format, trim=True))
    assert np.abs(eight_bit(picture(back)) - eight_bit(picture(stack))).max() <= 1
    assert back.layers[4].image.shape[:2] == (6, 5) and (back.layers[4].x, back.layers[4].y) == (11, 8)
    for layer in back.layers[2:]:
        drawn = layer.rgba()[..., 3] > 0
        assert all(side.any() for side in (drawn[0], drawn[-1], drawn[:, 0], drawn[:, -1]))


@pytest.mark.parametrize(("format", "side"), [("PSD", 6), ("OpenRaster", 2)])
def test_what_is_too_faint_for_a_file_is_no_content(tmp_path, format, side):
    image = torch.full((6, 6, 4), 0.4 / 255)
    image[2:4, 2:4] = 1
    stack = LayerStack((8, 8), (Layer(image, "veil"),))
    (layer,) = files.load(saved(tmp_path, stack, format, trim=True, bits=16)).layers
    assert layer.image.shape[:2] == (side, side)


def test_alpha_becomes_a_mask_over_opaque_colours(tmp_path):
    stack = example().with_layers([*example().layers, Layer(pixels(7, 6, 6, 4), "turned", None, 20, 9, rotation=0.4)])
    path = saved(tmp_path, stack, alpha_as_mask=True)
    document = PSDImage.open(path)
    assert [item.has_mask() for item in document] == [False, True, True, True, True]
    for item, layer in zip(list(document)[1:4], stack.layers[1:4], strict=True):
        assert item.numpy("shape") is None and np.array_equal(
            eight_bit(torch.from_numpy(item.numpy("color"))), eight_bit(layer.image[..., :3])
        )
        assert np.abs(item.numpy("mask")[..., 0] - layer.rgba()[..., 3].numpy()).max() <= 0.51 / 255
    assert np.abs(eight_bit(picture(files.load(path))) - eight_bit(picture(stack))).max() <= 1


def test_what_a_format_lacks_is_told():
    asked = {"bits": 16, "trim": True, "alpha_as_mask": True}
    assert files.unused("PSD", **asked) == [] and files.unused("PNG layers") == []
    assert [note.split(":")[0] for note in files.unused("OpenRaster", **asked)] == ["bits", "alpha_as_mask"]
    assert [note.split(":")[0] for note in files.unused("WebP layers", **asked)] == ["bits", "trim", "alpha_as_mask"]
