"""OpenRaster files: what is written is read back and found by a plain zip reader, and strangers' files show what the
format's formulas give.
"""

import io
import zipfile
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from strata.formats import files, openraster, psd
from strata.formats.groups import GROUPS
from strata.formats.raster import check_total, eight_bits, in_place, in_srgb, picture
from strata.techniques.layers import BLEND_MODES, Layer, LayerStack

from .stacks import eight_bit, example, layers, linear_srgb, pixels, srgb_of

STACK = '<image version="0.0.3" w="4" h="3"><stack>{}</stack></image>'
LAYER = '<layer name="one" src="data/one.png" {}/>'
STACKED = '<stack x="2" y="1">{}</stack>'


def save(folder, stack, metadata=None):
    path = folder / "stack.ora"
    with open(path, "wb") as file:
        openraster.write(file, stack, picture(stack), metadata or {})
    return path


def png(width=4, height=3, mode="RGBA", colour=(1, 2, 3, 4)):
    file = io.BytesIO()
    Image.new(mode, (width, height), colour).save(file, "PNG")
    return file.getvalue()


ONE = STACK.format(LAYER.format(""))


def archive(folder, stack=ONE, **entries):
    """An OpenRaster file as another program might write it, with further entries, or others than its own."""
    path = folder / "made.ora"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("mimetype", openraster.MIMETYPE)
        if stack is not None:
            made.writestr("stack.xml", stack)
        for name, content in ({"data/one.png": png()} | entries).items():
            made.writestr(name, content)
    return path


def test_round_trip_keeps_pixels_and_fields(tmp_path):
    stack = example()
    back = openraster.read(save(tmp_path, stack))
    assert back.canvas == stack.canvas
    for ours, theirs in zip(stack.layers, back.layers, strict=True):
        expected = ours.image if ours.mask is None else ours.rgba()
        assert np.array_equal(eight_bit(expected), eight_bit(theirs.image))
        assert replace(ours, image=None, mask=None) == replace(theirs, image=None, mask=None)


@settings(max_examples=40, deadline=None)
@given(st.lists(layers(tuple(openraster.MODES)), min_size=1, max_size=3))
def test_round_trip_of_any_layer(tmp_path_factory, made):
    back = openraster.read(save(tmp_path_factory.mktemp("ora"), LayerStack((7, 5), tuple(made)))).layers
    for ours, theirs in zip(made, back, strict=True):
        assert np.array_equal(eight_bit(ours.image), eight_bit(theirs.image))
        assert replace(ours, image=None) == replace(theirs, image=None)


def test_a_plain_zip_reader_finds_what_the_format_demands(tmp_path):
    stack = example()
    with zipfile.ZipFile(save(tmp_path, stack)) as found:
        first = found.infolist()[0]
        assert (first.filename, first.compress_type, found.read(first)) == (
            "mimetype",
            zipfile.ZIP_STORED,
            b"image/openraster",
        )
        root = ElementTree.fromstring(found.read("stack.xml"))
        assert (root.get("w"), root.get("h")) == ("40", "30")
        elements = root.findall("stack/layer")
        # Topmost first.
        assert [element.get("name") for element in elements] == [layer.name for layer in reversed(stack.layers)]
        assert [element.get("composite-op") for element in elements] == [
            "svg:src-over",
            "svg:luminosity",
            "svg:multiply",
            "svg:src-over",
        ]
        assert [element.get("visibility") for element in elements] == ["visible", "hidden", "visible", "visible"]
        assert (elements[2].get("x"), elements[2].get("y"), elements[2].get("opacity")) == ("-3", "-2", "0.5")
        for element, layer in zip(elements, reversed(stack.layers), strict=True):
            with Image.open(found.open(element.get("src"))) as image:
                assert np.array_equal(np.array(image), eight_bit(layer.image if layer.mask is None else layer.rgba()))
        with (
            Image.open(found.open("mergedimage.png")) as merged,
            Image.open(found.open("Thumbnails/thumbnail.png")) as thumbnail,
        ):
            assert np.array_equal(np.array(merged), eight_bit(picture(stack)))
            assert merged.format == thumbnail.format == "PNG" and max(thumbnail.size) <= 256


def test_metadata_is_read_back(tmp_path):
    metadata = {"prompt": {"1": {"text": "<a> & 漢 \n"}}, "workflow": {"nodes": [1, 2.5, None]}}
    assert openraster.read_metadata(save(tmp_path, example(), metadata)) == metadata


@pytest.mark.parametrize("mode", sorted(set(BLEND_MODES) - set(openraster.MODES)))
def test_blend_mode_that_openraster_lacks(tmp_path, mode):
    stack = LayerStack((2, 2), (Layer(pixels(1, 2, 2, 4), "odd", blend_mode=mode),))
    with pytest.raises(ValueError, match=f"layer 'odd' has the blend mode {mode}, which OpenRaster does not have"):
        files.save(tmp_path, "x_", stack, pixels(1, 2, 2, 4), "OpenRaster", {})
    assert not list(tmp_path.iterdir())


def test_groups_become_their_leaves(tmp_path):
    nested = (
        '<layer name="top" src="data/one.png" opacity="0.5"/><stack name="g" opacity="0.5" visibility="hidden">'
        '<stack opacity="0.5"><layer name="deep" src="data/one.png" opacity="0.5" x="-2"/></stack></stack>'
    )
    deep, top = openraster.read(archive(tmp_path, STACK.format(nested))).layers
    assert (deep.name, deep.opacity, deep.visible, deep.x) == ("deep", 0.125, False, -2)
    assert (top.name, top.opacity, top.visible) == ("top", 0.5, True)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "P", "1"])
def test_other_kinds_of_png(tmp_path, mode):
    colour = {"L": 90, "LA": (90, 60), "RGB": (9, 80, 170), "P": 1, "1": 1}[mode]
    (layer,) = files.load(archive(tmp_path, **{"data/one.png": png(mode=mode, colour=colour)})).layers
    expected = Image.new(mode, (4, 3), colour).convert("RGBA")
    assert layer.image.shape[2] in (3, 4) and np.array_equal(eight_bit(layer.rgba()), np.array(expected))


ENTITIES = '<!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;&b;">]>'


def claims(side: bytes) -> dict[str, bytes]:
    """A picture whose head claims these sides."""
    return {"data/one.png": png()[:16] + side * 2 + png()[24:]}


def bomb(folder):
    return archive(folder, **{"data/one.png": png() + bytes(2**26 + 4096)})


REFUSED = {
    "zip bomb": (bomb, "layer 'one' would unpack to 67 MB for 4×3 pixels"),
    "xml bomb": (lambda f: archive(f, " " * 2**23), "stack.xml would unpack to 8 MB"),
    "zip bomb by a byte": (
        lambda f: archive(f, **{"data/one.png": png().ljust(4 * 3 * 8 + 64 * 1024**2 + 1, b"\0")}),
        "layer 'one' would unpack to 67 MB",
    ),
    "xml bomb by a byte": (lambda f: archive(f, " " * (4 * 1024**2 + 1)), "stack.xml would unpack to 4 MB"),
    "as much xml as may be": (lambda f: archive(f, " " * 4 * 1024**2), "stack.xml cannot be read"),
    "entities": (lambda f: archive(f, ENTITIES + STACK.format(LAYER.format('x="&c;"'))), "declares a DOCTYPE"),
    "entities in UTF-16": (
        lambda f: archive(f, ('<?xml version="1.0" encoding="UTF-16"?>' + ENTITIES + ONE).encode("utf-16")),
        "declares a DOCTYPE",
    ),
    "broken xml": (lambda f: archive(f, "<image"), "stack.xml cannot be read"),
    "no stack.xml": (lambda f: archive(f, None), "has no stack.xml"),
    "no layers": (lambda f: archive(f, STACK.format("")), "has 0 layers with pixels"),
    "51 layers": (lambda f: archive(f, STACK.format(LAYER.format("") * 51)), "has 51 layers with pixels"),
    "canvas": (
        lambda f: archive(f, STACK.replace('w="4"', 'w="99999"').format(LAYER.format(""))),
        "the canvas is 99999×3; sides must be",
    ),
    "canvas missing": (lambda f: archive(f, "<image><stack/></image>"), "the canvas is 0×0; sides must be"),
    "traversal": (
        lambda f: archive(f, STACK.format('<layer name="one" src="../../etc/a.png"/>'), **{"../../etc/a.png": png()}),
        "points outside the file",
    ),
    "absolute": (lambda f: archive(f, STACK.format('<layer name="one" src="/etc/a.png"/>')), "points outside the file"),
    "missing layer": (
        lambda f: archive(f, STACK.format('<layer name="one" src="data/two.png"/>')),
        "names 'data/two.png', which is not in the file",
    ),
    "not a png": (lambda f: archive(f, **{"data/one.png": b"GIF89a" * 9}), "layer 'one' is not a PNG"),
    "cut png": (lambda f: archive(f, **{"data/one.png": png()[:-30]}), "the PNG of layer 'one' cannot be read"),
    "huge png": (lambda f: archive(f, **claims(b"\x00\x10\x00\x00")), "layer 'one' is 1048576×1048576; sides must be"),
    "too much in all": (
        lambda f: archive(f, STACK.format(LAYER.format("") * 9), **claims(b"\x00\x00\x20\x00")),
        "has 604 million pixels in its layers",
    ),
    "number": (lambda f: archive(f, STACK.format(LAYER.format('x="nan"'))), "has 'nan' as the x of 'one'"),
    "number above 31 bits": (
        lambda f: archive(f, STACK.format(LAYER.format('opacity="2147483648"'))),
        "has '2147483648' as the opacity of 'one'",
    ),
    "number below 31 bits": (
        lambda f: archive(f, STACK.format(LAYER.format('x="-2147483648"'))),
        "has '-2147483648' as the x of 'one'",
    ),
    "word": (lambda f: archive(f, STACK.format(LAYER.format('opacity="half"'))), "has 'half' as the opacity of 'one'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_files_are_refused_with_one_sentence(tmp_path, case):
    make, message = REFUSED[case]
    path = make(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        files.load(path)
    assert str(caught.value).startswith("made.ora") and "\n" not in str(caught.value)


def test_what_is_as_large_as_may_be_is_loaded(tmp_path):
    """8 bytes for each pixel and 64 MB; 8 GB of all layers together, at four floats a pixel."""
    content = png().ljust(4 * 3 * 8 + 64 * 1024**2, b"\0")
    assert files.load(archive(tmp_path, **{"data/one.png": content})).canvas == (4, 3)
    most = 8 * 1024**3 // (4 * 4)
    check_total("file", [(most // 4, 3), (most // 4, 1)])
    with pytest.raises(ValueError, match="file has 537 million pixels in its layers and 537 million can be loaded"):
        check_total("file", [(most, 1), (1, 1)])


@pytest.mark.parametrize("share", [0.05, 0.5, 0.99])
def test_truncated(tmp_path, share):
    path = save(tmp_path, example())
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ValueError, match=r"^stack\.ora is not an OpenRaster file, or is damaged"):
        files.load(path)


@pytest.mark.parametrize(
    ("mode", "colour"),
    [("1", 1), ("L", 200), ("LA", (200, 90)), ("P", 7), ("RGB", (1, 2, 3)), ("RGBA", (1, 2, 3, 4)), ("I;16", 51400)],
)
def test_layers_of_every_kind_of_png_are_read(tmp_path, mode, colour):
    """16-bit gray is scaled; Pillow's conversion would clip it to white."""
    (layer,) = files.load(archive(tmp_path, **{"data/one.png": png(mode=mode, colour=colour)})).layers
    reference = (
        Image.new("L", (4, 3), 200).convert("RGBA")
        if mode == "I;16"
        else Image.new(mode, (4, 3), colour).convert("RGBA")
    )
    assert np.array_equal(eight_bit(layer.rgba()), np.array(reference))


def test_pictures_of_more_than_8_bits_are_scaled():
    values = np.array([[0.0, 0.25], [0.5, 1.0]], np.float32)
    for image in (
        Image.fromarray((values * 65535).astype(np.uint16)),
        Image.fromarray((values * 65535).astype(np.int32)),
        Image.fromarray(values),
    ):
        assert np.abs(eight_bits(image)[..., 0].astype(int) - values * 255).max() <= 1, image.mode


@pytest.mark.parametrize("source", ["./data/one.png", "data\\one.png", "data//one.png"])
def test_a_layers_path_may_be_written_in_another_way(tmp_path, source):
    stack = ONE.replace("data/one.png", source)
    assert len(files.load(archive(tmp_path, stack)).layers) == 1


def test_turned_flipped_and_resized_layers_are_drawn_in_their_place(tmp_path):
    """A quarter turn by NumPy, and resizing by Pillow's nearest pixel of a picture in blocks."""
    image = pixels(7, 4, 6, 4)
    turned = Layer(image, "turned", None, 10, 5, rotation=np.pi / 2, flip_h=True)
    large = Layer(torch.kron(pixels(8, 2, 2, 4), torch.ones(8, 8, 1)), "large", None, 3, 2, w=8, h=8)
    first, second = openraster.read(save(tmp_path, LayerStack((40, 30), (turned, large)))).layers
    expected = np.rot90(eight_bit(image)[:, ::-1], -1)
    top, left = 5 + 2 - 3 - first.y, 10 + 3 - 2 - first.x
    found = eight_bit(first.image)[top : top + 6, left : left + 4]
    assert np.abs((found - expected)[expected[..., 3] > 8]).max() <= 8
    inside = eight_bit(second.image)[2 - second.y : 10 - second.y, 3 - second.x : 11 - second.x]
    expected = eight_bit(large.image)[::2, ::2]
    away = np.ix_([1, 6], [1, 6])  # from the blocks' edges
    assert np.abs(inside[away] - expected[away]).max() <= 1
    around = eight_bit(second.image)[..., 3].sum() - inside[..., 3].sum()
    assert inside.shape == (8, 8, 4) and around <= 0.01 * inside[..., 3].sum(), "nothing of it lies outside of its box"


def test_a_layer_that_is_shown_much_larger_than_the_canvas_is_drawn_where_it_is_visible(tmp_path):
    huge = Layer(pixels(9, 4, 4, 3), "huge", None, -8000, -8000, w=16384, h=16384)
    outside = replace(huge, name="outside", x=20000, y=0)
    visible, hidden = openraster.read(save(tmp_path, LayerStack((32, 24), (huge, outside)))).layers
    assert visible.image.shape[:2] == (24, 32) and (visible.x, visible.y) == (0, 0)
    assert np.array_equal(eight_bit(visible.image)[..., :3], eight_bit(picture(LayerStack((32, 24), (huge,))))[..., :3])
    assert hidden.image.shape[:2] == (1, 1) and hidden.rgba()[..., 3].max() == 0


@pytest.mark.parametrize(("wide", "whole"), [(8191, True), (8193, False)])
def test_up_to_a_gigabyte_a_layer_is_kept_where_it_lies_outside_of_the_canvas(wide, whole):
    """Drawn on a square as wide as its diagonal, of at most 8192 by 8192 pixels of 16 bytes."""
    layer = Layer(pixels(9, 1, 1, 4), "line", None, -100, 3, w=wide, h=1)
    drawn = in_place(layer, (32, 24))
    assert drawn.image.shape[1] >= wide if whole else drawn.image.shape[1] == 32
    assert drawn.x <= -100 if whole else drawn.x == 0


def test_names_that_end_in_nul_are_cleaned_when_read(tmp_path):
    path = tmp_path / "krita.psd"
    with open(path, "wb") as file:
        psd.write(file, LayerStack((4, 3), (Layer(pixels(1, 3, 4, 4), "ink~"),)), pixels(1, 3, 4, 4), {})
    path.write_bytes(path.read_bytes().replace("ink~".encode("utf-16-be"), "ink\0".encode("utf-16-be")))
    assert [layer.name for layer in files.load(path).layers] == ["ink"]


def ora(path, xml, **pictures):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mimetype", "image/openraster")
        archive.writestr("stack.xml", f"<image w='8' h='6'><stack>{xml}</stack></image>")
        for name, image in pictures.items():
            file = io.BytesIO()
            image.save(file, "PNG", **image.info)
            archive.writestr(f"{name}.png", file.getvalue())
    return path


def flat(colour, size=(8, 6)):
    return Image.new("RGBA", size, colour)


def half(colour):
    """The left half."""
    image = Image.new("RGBA", (8, 6))
    image.paste(colour, (0, 0, 4, 6))
    return image


def test_operators_that_cut_become_masks(tmp_path):
    """src-atop (Krita's "inherit alpha") stays inside of what is below it in its stack; dst-out and dst-in cut that."""
    red, green, blue = (255, 0, 0, 255), (0, 255, 0, 255), (0, 0, 255, 255)
    ground = "<layer src='ground.png' name='ground'/>"
    for operator, left, right in (("src-atop", green, blue), ("dst-out", blue, red), ("dst-in", red, blue)):
        top = half(green) if operator != "src-atop" else flat(green)
        body = half(red) if operator == "src-atop" else flat(red)
        xml = (
            f"<stack name='g'><layer src='top.png' name='top' composite-op='svg:{operator}'/><layer src='body.png' "
            f"name='body'/></stack>{ground}"
        )
        notes = []
        found = eight_bit(
            picture(
                files.load(ora(tmp_path / f"{operator}.ora", xml, ground=flat(blue), body=body, top=top), notes=notes)
            )
        )
        assert found[2, 1].tolist() == list(left) and found[2, 6].tolist() == list(right), operator
        assert not notes


def test_what_layers_cannot_hold_is_noted(tmp_path):
    xml = (
        "<layer src='a.png' name='odd' composite-op='krita:freeze'/><layer src='b.svg' name='vector'/><stack "
        "name='veil' opacity='0.5'><layer src='a.png' name='one'/><layer src='a.png' name='two'/></stack><layer "
        "src='a.png' name='ground'/>"
    )
    notes = []
    stack = files.load(ora(tmp_path / "odd.ora", xml, a=flat((200, 10, 30, 255))), notes=notes)
    assert [layer.name for layer in stack.layers] == ["ground", "veil", "odd"] and stack.layers[1].opacity == 0.5
    assert [layer.blend_mode for layer in stack.layers] == ["normal"] * 3
    assert sorted(notes) == [
        "'odd' has the blend mode krita:freeze, which ComfyUI's layers do not have; it is read as normal.",
        "Group 'veil' is one layer now, because its opacity or mask acts on all its layers together.",
        "layer 'vector' has no PNG pixels and is left out.",
    ]


def test_a_groups_opacity_and_isolation_show_what_the_formula_gives(tmp_path):
    xml = (
        "<stack name='g' opacity='0.5'><layer src='top.png' name='top'/><layer src='low.png' name='low'/></stack>"
        "<layer src='ground.png' name='ground'/>"
    )
    path = ora(
        tmp_path / "g.ora", xml, ground=flat((0, 0, 0, 255)), low=flat((255, 0, 0, 255)), top=half((0, 0, 255, 255))
    )
    for groups in GROUPS:
        found = eight_bit(picture(files.load(path, groups)))
        assert found[2, 1].tolist() == [0, 0, 128, 255] and found[2, 6].tolist() == [128, 0, 0, 255]


def test_a_layers_colour_profile_is_applied(tmp_path):
    """One whose red and blue primaries are swapped swaps them; a broken one is left alone with a note; sRGB's own
    changes nothing.
    """
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = (
        srgb.replace(b"rXYZ", b"tXYZ")
        .replace(b"bXYZ", b"rXYZ")
        .replace(b"tXYZ", b"bXYZ")
        .replace(b"\0s\0R\0G\0B", b"\0x\0R\0G\0B")
    )
    images = {}
    for name, profile in (("srgb", srgb), ("broken", b"no profile at all"), ("swapped", swapped)):
        images[name] = flat((200, 100, 50, 128))
        images[name].info["icc_profile"] = profile
    notes = []
    xml = "".join(f"<layer src='{name}.png' name='{name}'/>" for name in images)
    found = {
        layer.name: eight_bit(layer.image)[0, 0].tolist()
        for layer in files.load(ora(tmp_path / "icc.ora", xml, **images), notes=notes).layers
    }
    assert found["srgb"] == found["broken"] == [200, 100, 50, 128]
    assert np.abs(np.array(found["swapped"]) - [50, 100, 200, 128]).max() <= 2
    assert notes == ["The colour profile of layer 'broken' cannot be used; its colours are taken as sRGB."]


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("L", 77, (77, 77, 77, 255)),
        ("LA", (77, 128), (77, 77, 77, 128)),
        ("1", 1, (255, 255, 255, 255)),
        ("I;16", 25700, (100, 100, 100, 255)),
        ("P", 3, (9, 80, 170, 255)),
        ("RGB", (1, 2, 3), (1, 2, 3, 255)),
    ],
)
def test_pictures_of_every_mode(tmp_path, mode, value, expected):
    image = Image.new(mode, (8, 6), value)
    if mode == "P":
        image.putpalette([0, 0, 0] * 3 + [9, 80, 170])
    (layer,) = files.load(
        ora(tmp_path / "mode.ora", "<layer src='a.png' name='a' x='1.4' y='-1.6' opacity='1.5'/>", a=image)
    ).layers
    assert eight_bit(layer.rgba())[3, 3].tolist() == list(expected) and (layer.x, layer.y, layer.opacity) == (
        1,
        -2,
        1.0,
    )


# Porter and Duff: what is shown where the layer and what is below it both lie, where the layer lies alone, and where
# the other does.
SHOWN = {
    "src-atop": "s-b",
    "src-in": "s--",
    "src-out": "-s-",
    "dst-atop": "bs-",
    "dst-in": "b--",
    "dst-out": "--b",
    "dst-over": "bsb",
    "xor": "-sb",
    "src": "ss-",
    "dst": "b-b",
    "clear": "---",
}


def by_areas(operator, source, below):
    """[H,W,4] premultiplied float64, by the areas of a pixel that two layers [H,W,4] cover independently of
    each other.
    """
    s, b = source[..., 3:], below[..., 3:]
    result = np.zeros(source.shape)
    for area, what in zip((s * b, s * (1 - b), (1 - s) * b), SHOWN[operator], strict=True):
        if what != "-":
            result[..., :3] += area * (source if what == "s" else below)[..., :3]
            result[..., 3:] += area
    return result


@pytest.mark.parametrize("axis", ["x", "y"])
def test_layers_that_become_one_may_lie_far_out_but_not_far_apart(tmp_path, axis):
    def load(far, low):
        xml = (
            f"<layer src='top.png' name='top' composite-op='svg:src-atop' {axis}='{far}'/>"
            f"<layer src='low.png' name='low' {axis}='{low}'/>"
        )
        images = {name: flat((0, 90, 200, 120)) for name in ("top", "low")}
        return files.load(ora(tmp_path / "far.ora", xml, **images)).layers

    (one,) = load(12000, 12002)
    assert getattr(one, axis) == 12000
    with pytest.raises(ValueError, match="layer 'top' with the layers below it is .*; sides must be from 1 to 16384"):
        load(18000, 0)


@pytest.mark.parametrize("grouped_layer", [False, True])
@pytest.mark.parametrize("operator", SHOWN)
def test_operators_on_half_transparent_layers_are_exact(tmp_path, operator, grouped_layer):
    """A layer, or a group of two, of 60 % over two overlapping layers; a hidden one stays as it is."""
    assert {f"svg:{name}" for name in SHOWN} == set(openraster.OPERATORS)
    random = np.random.default_rng(5)
    images = {
        name: Image.fromarray(random.integers(0, 256, (6, 8, 4), np.uint8))
        for name in ("top", "low", "ground", "hidden")
    }
    top = f"<layer src='top.png' name='top' composite-op='svg:{operator}' opacity='0.6'/>"
    if grouped_layer:
        top = (
            f"<stack name='top' composite-op='svg:{operator}' opacity='0.6'><layer src='top.png'/><layer "
            "src='low.png'/></stack>"
        )
    rest = (
        "<layer src='low.png' name='low'/><layer src='ground.png' name='ground'/><layer src='hidden.png' "
        "name='hidden' visibility='hidden'/>"
    )
    notes = []
    stack = files.load(ora(tmp_path / "soft.ora", top + rest, **images), notes=notes)
    values = {name: np.array(image, np.float64) / 255 for name, image in images.items()}

    def over(first, second):
        """Straight alpha."""
        alpha = first[..., 3:] + (1 - first[..., 3:]) * second[..., 3:]
        premultiplied = first[..., :3] * first[..., 3:] + (1 - first[..., 3:]) * second[..., :3] * second[..., 3:]
        return np.concatenate([premultiplied / np.maximum(alpha, 1e-12), alpha], -1)

    source = over(values["top"], values["low"]) if grouped_layer else values["top"].copy()
    source[..., 3] *= 0.6
    expected = by_areas(operator, source, over(values["low"], values["ground"]))
    found = picture(stack).numpy().astype(np.float64)
    found[..., :3] *= found[..., 3:]
    assert np.abs(found - expected).max() < 1e-5
    assert [layer.name for layer in stack.layers if not layer.visible] == ["hidden"]
    assert any("are one layer now" in note and operator in note for note in notes)


def test_an_operator_with_nothing_below_it(tmp_path):
    for below in ("", "<layer src='a.png' name='below' visibility='hidden'/>"):
        xml = f"<layer src='a.png' name='top' composite-op='svg:src-atop'/>{below}"
        assert picture(files.load(ora(tmp_path / "alone.ora", xml, a=flat((9, 8, 7, 255)))))[..., 3].max() == 0


def test_values_that_layers_cannot_hold_are_told(tmp_path):
    xml = (
        "<layer src='a.png' name='a' x='1.6' y='-1.4' opacity='1.5'/>"
        "<layer src='a.png' name='b' x='1.0' opacity='-2147483647'/>"
    )
    notes = []
    back, front = files.load(ora(tmp_path / "values.ora", xml, a=flat((1, 2, 3, 255))), notes=notes).layers
    assert (front.x, front.y, front.opacity, back.x, back.y, back.opacity) == (2, -1, 1, 1, 0, 0)
    assert sorted(notes) == [
        "'a' has the opacity 1.5, which is read as 1.",
        "'b' has the opacity -2.14748e+09, which is read as 0.",
        "Layer 'a' lies between pixels and is moved to whole ones.",
    ]


@pytest.mark.parametrize(("step", "applied"), [(1, False), (2, True)])
def test_a_profile_that_moves_no_colour_by_more_than_rounding_is_srgbs(step, applied):
    profile = linear_srgb(2.2)
    ramp = Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, 2))
    own, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
    moved = np.array(ImageCms.profileToProfile(ramp, own, srgb))[0].astype(int)
    value = next(v for v in range(256) if np.abs(moved[v] - v).max() == step)
    image = Image.new("RGB", (4, 4), (value,) * 3)
    image.info["icc_profile"] = profile
    found = in_srgb(image, "a", [])[0, 0, :3]
    assert found.tolist() == (moved[value].tolist() if applied else [value] * 3)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "I;16", "1"])
def test_a_profile_is_applied_or_told_whatever_the_picture_is(tmp_path, mode):
    colour = {
        "RGB": (200, 100, 20),
        "RGBA": (200, 100, 20, 128),
        "P": 1,
        "L": 100,
        "LA": (100, 128),
        "I;16": 25700,
        "1": 1,
    }[mode]
    image = Image.new(mode, (8, 6), colour)
    if mode == "P":
        image.putpalette([0, 0, 0, 200, 100, 20])
    image.info["icc_profile"] = linear_srgb()
    notes = []
    (layer,) = files.load(ora(tmp_path / "linear.ora", "<layer src='a.png' name='a'/>", a=image), notes=notes).layers
    found = eight_bit(layer.rgba())[3, 3]
    if mode in ("RGB", "RGBA", "P"):
        assert np.abs(found[:3] - [srgb_of(value) for value in (200, 100, 20)]).max() <= 1 and not notes
    else:  # a profile of three channels does not go with a gray picture
        assert found[:3].tolist() == [255 if mode == "1" else 100] * 3
        assert notes == ["The colour profile of layer 'a' cannot be used; its colours are taken as sRGB."]
    assert found[3] == (128 if "A" in mode else 255)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "I;16", "RGB"])
def test_pictures_of_every_mode_keep_their_rows_and_columns(tmp_path, mode):
    values = np.random.default_rng(8).integers(0, 2 if mode in "1P" else 256, (6, 8), np.uint8)
    if mode == "1":
        image, gray = Image.fromarray(values * 255).convert("1"), values * 255
    elif mode == "P":
        image, gray = Image.fromarray(values, "P"), np.array([30, 220], np.uint8)[values]
        image.putpalette([30, 30, 30, 220, 220, 220])
    elif mode == "I;16":
        image, gray = Image.fromarray(values.astype(np.uint16) * 257), values
    else:
        image, gray = Image.fromarray(values).convert(mode), values
    (layer,) = files.load(ora(tmp_path / "rows.ora", "<layer src='a.png'/>", a=image)).layers
    assert np.array_equal(eight_bit(layer.rgba()), np.dstack([gray, gray, gray, np.full_like(gray, 255)]))


@pytest.mark.parametrize("module", [openraster, psd])
@pytest.mark.parametrize(
    "fields",
    [{"rotation": 0.6}, {"rotation": 2.5, "flip_h": True}, {"w": 29, "h": 9}, {"w": 5, "h": 7, "rotation": -1.1}],
)
def test_a_turned_or_resized_layer_is_whole_after_saving(tmp_path, module, fields):
    """What lies outside the canvas too: the saved layer, moved to the middle of a larger canvas, shows what the layer
    itself shows there.
    """
    smooth = torch.nn.functional.interpolate(pixels(6, 1, 4, 3, 4), size=(17, 4)).movedim(1, 2)[0]
    layer = Layer(smooth.contiguous(), "turned", None, -9, -11, **fields)
    path = tmp_path / "turned"
    with open(path, "wb") as file:
        module.write(file, LayerStack((12, 10), (layer,)), pixels(1, 10, 12, 3), {})
    (saved,) = module.read(path).layers
    shown = [
        picture(LayerStack((80, 80), (replace(one, x=one.x + 40, y=one.y + 40),))).numpy().astype(np.float64)
        for one in (layer, saved)
    ]
    for image in shown:
        image[..., :3] *= image[..., 3:]
    assert shown[0][..., 3].sum() > 10 and np.abs(shown[0] - shown[1]).max() <= 1 / 255


def test_the_thumbnail_is_the_picture_made_small(tmp_path):
    y, x = np.mgrid[0:300, 0:500]
    image = torch.from_numpy(np.dstack([x / 499, y / 299, (x + y) / 798]).astype(np.float32))
    with (
        zipfile.ZipFile(save(tmp_path, LayerStack((500, 300), (Layer(image),)))) as found,
        Image.open(found.open("Thumbnails/thumbnail.png")) as small,
    ):
        assert small.size == (256, 154)
        expected = Image.fromarray(eight_bit(image).astype(np.uint8)).resize(small.size, Image.Resampling.BOX)
        assert np.abs(np.array(small.convert("RGB"), int) - np.array(expected)).max() <= 4


def test_a_group_with_an_operator_in_it_is_isolated(tmp_path):
    """The blend mode beside the operator does not reach the ground: half green over plain red, and not over red times
    gray.
    """
    xml = (
        "<stack name='g'><layer src='top.png' name='top' composite-op='svg:src-atop'/><layer src='body.png' "
        "name='body' composite-op='svg:multiply'/></stack><layer src='ground.png' name='ground'/>"
    )
    path = ora(
        tmp_path / "isolated.ora",
        xml,
        ground=flat((128, 128, 128, 255)),
        body=half((255, 0, 0, 255)),
        top=flat((0, 255, 0, 128)),
    )
    found = eight_bit(picture(files.load(path)))
    assert np.abs(found[2, 1] - [127, 128, 0, 255]).max() <= 1 and found[2, 6].tolist() == [128, 128, 128, 255]


def test_a_stack_of_an_old_file_moves_its_layers(tmp_path):
    inner = STACKED.format(LAYER.format('x="1"'))
    stack = f'<image version="0.0.1" w="4" h="3"><stack x="10" y="20">{inner}{LAYER.format("")}</stack></image>'
    assert [(layer.x, layer.y) for layer in openraster.read(archive(tmp_path, stack)).layers] == [(10, 20), (13, 21)]
