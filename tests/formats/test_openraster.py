import io
import zipfile
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from strata.formats import files, openraster, psd
from strata.formats.raster import eight_bits, picture
from strata.techniques.layers import BLEND_MODES, Layer, LayerStack

from .stacks import eight_bit, example, layers, pixels

STACK = '<image version="0.0.3" w="4" h="3"><stack>{}</stack></image>'
LAYER = '<layer name="one" src="data/one.png" {}/>'


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
        assert (first.filename, first.compress_type, found.read(first)) == ("mimetype", zipfile.ZIP_STORED, b"image/openraster")
        root = ElementTree.fromstring(found.read("stack.xml"))
        assert (root.get("w"), root.get("h")) == ("40", "30")
        elements = root.findall("stack/layer")
        assert [element.get("name") for element in elements] == [layer.name for layer in reversed(stack.layers)]  # topmost first
        assert [element.get("composite-op") for element in elements] == ["svg:src-over", "svg:luminosity", "svg:multiply", "svg:src-over"]
        assert [element.get("visibility") for element in elements] == ["visible", "hidden", "visible", "visible"]
        assert (elements[2].get("x"), elements[2].get("y"), elements[2].get("opacity")) == ("-3", "-2", "0.5")
        for element, layer in zip(elements, reversed(stack.layers), strict=True):
            with Image.open(found.open(element.get("src"))) as image:
                assert np.array_equal(np.array(image), eight_bit(layer.image if layer.mask is None else layer.rgba()))
        with Image.open(found.open("mergedimage.png")) as merged, Image.open(found.open("Thumbnails/thumbnail.png")) as thumbnail:
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
    nested = ('<layer name="top" src="data/one.png" opacity="0.5"/><stack name="g" opacity="0.5" visibility="hidden">'
              '<stack opacity="0.5"><layer name="deep" src="data/one.png" opacity="0.5" x="-2"/></stack></stack>')
    deep, top = files.load(archive(tmp_path, STACK.format(nested))).layers
    assert (deep.name, deep.opacity, deep.visible, deep.x) == ("deep", 0.125, False, -2)
    assert (top.name, top.opacity, top.visible) == ("top", 0.5, True)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "P", "1"])
def test_other_kinds_of_png(tmp_path, mode):
    layer = files.load(archive(tmp_path, **{"data/one.png": png(mode=mode, colour=1 if mode in "LP1" else None)})).layers[0]
    assert layer.image.shape[:2] == (3, 4) and layer.image.shape[2] in (3, 4)


ENTITIES = '<!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;&b;">]>'


def claims(side: bytes) -> dict[str, bytes]:
    """A picture whose head claims these sides."""
    return {"data/one.png": png()[:16] + side * 2 + png()[24:]}


def bomb(folder):
    return archive(folder, **{"data/one.png": png() + bytes(2**26 + 4096)})


REFUSED = {
    "zip bomb": (bomb, "layer 'one' would unpack to 67 MB for 4×3 pixels"),
    "xml bomb": (lambda f: archive(f, " " * 2**23), "stack.xml would unpack to 8 MB"),
    "entities": (lambda f: archive(f, ENTITIES + STACK.format(LAYER.format('x="&c;"'))), "declares a DOCTYPE"),
    "entities in UTF-16": (lambda f: archive(f, ('<?xml version="1.0" encoding="UTF-16"?>' + ENTITIES + ONE).encode("utf-16")), "declares a DOCTYPE"),
    "broken xml": (lambda f: archive(f, "<image"), "stack.xml cannot be read"),
    "no stack.xml": (lambda f: archive(f, None), "has no stack.xml"),
    "no layers": (lambda f: archive(f, STACK.format("")), "has 0 layers with pixels"),
    "51 layers": (lambda f: archive(f, STACK.format(LAYER.format("") * 51)), "has 51 layers with pixels"),
    "canvas": (lambda f: archive(f, STACK.replace('w="4"', 'w="99999"').format(LAYER.format(""))), "the canvas is 99999×3; sides must be"),
    "canvas missing": (lambda f: archive(f, "<image><stack/></image>"), "the canvas is 0×0; sides must be"),
    "traversal": (lambda f: archive(f, STACK.format('<layer name="one" src="../../etc/a.png"/>'), **{"../../etc/a.png": png()}),
                  "points outside the file"),
    "absolute": (lambda f: archive(f, STACK.format('<layer name="one" src="/etc/a.png"/>')), "points outside the file"),
    "missing layer": (lambda f: archive(f, STACK.format('<layer name="one" src="data/two.png"/>')), "names 'data/two.png', which is not in the file"),
    "not a png": (lambda f: archive(f, **{"data/one.png": b"GIF89a" * 9}), "layer 'one' is not a PNG"),
    "cut png": (lambda f: archive(f, **{"data/one.png": png()[:-30]}), "the PNG of layer 'one' cannot be read"),
    "huge png": (lambda f: archive(f, **claims(b"\x00\x10\x00\x00")), "layer 'one' is 1048576×1048576; sides must be"),
    "too much in all": (lambda f: archive(f, STACK.format(LAYER.format("") * 9), **claims(b"\x00\x00\x20\x00")),
                        "has 604 million pixels in its layers"),
    "number": (lambda f: archive(f, STACK.format(LAYER.format('x="nan"'))), "has 'nan' as the x of 'one'"),
    "word": (lambda f: archive(f, STACK.format(LAYER.format('opacity="half"'))), "has 'half' as the opacity of 'one'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_files_are_refused_with_one_sentence(tmp_path, case):
    make, message = REFUSED[case]
    path = make(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        files.load(path)
    assert str(caught.value).startswith("made.ora") and "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.99])
def test_truncated(tmp_path, share):
    path = save(tmp_path, example())
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * share)])
    with pytest.raises(ValueError, match=r"^stack\.ora is not an OpenRaster file, or is damaged"):
        files.load(path)


@pytest.mark.parametrize(("mode", "colour"), [("1", 1), ("L", 200), ("LA", (200, 90)), ("P", 7), ("RGB", (1, 2, 3)), ("RGBA", (1, 2, 3, 4)), ("I;16", 51400)])
def test_layers_of_every_kind_of_png_are_read(tmp_path, mode, colour):
    """16-bit gray is scaled; Pillow's conversion would clip it to white."""
    layer, = files.load(archive(tmp_path, **{"data/one.png": png(mode=mode, colour=colour)})).layers
    reference = Image.new("L", (4, 3), 200).convert("RGBA") if mode == "I;16" else Image.new(mode, (4, 3), colour).convert("RGBA")
    assert np.array_equal(eight_bit(layer.rgba()), np.array(reference))


def test_pictures_of_more_than_8_bits_are_scaled():
    values = np.array([[0.0, 0.25], [0.5, 1.0]], np.float32)
    for image in (Image.fromarray((values * 65535).astype(np.uint16)), Image.fromarray((values * 65535).astype(np.int32)), Image.fromarray(values)):
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
    found = eight_bit(first.image)[top:top + 6, left:left + 4]
    assert np.abs((found - expected)[expected[..., 3] > 8]).max() <= 8
    assert second.image.shape[:2] == (8, 8) or second.image.shape[0] < 12
    inside = eight_bit(second.image)[2 - second.y:10 - second.y, 3 - second.x:11 - second.x]
    assert np.abs(inside[1, 1] - eight_bit(large.image)[2, 2]).max() <= 1


def test_a_layer_that_is_shown_much_larger_than_the_canvas_is_drawn_where_it_is_seen(tmp_path):
    huge = Layer(pixels(9, 4, 4, 3), "huge", None, -8000, -8000, w=16384, h=16384)
    outside = replace(huge, name="outside", x=20000, y=0)
    seen, unseen = openraster.read(save(tmp_path, LayerStack((32, 24), (huge, outside)))).layers
    assert seen.image.shape[:2] == (24, 32) and (seen.x, seen.y) == (0, 0)
    assert np.array_equal(eight_bit(seen.image)[..., :3], eight_bit(picture(LayerStack((32, 24), (huge,))))[..., :3])
    assert unseen.image.shape[:2] == (1, 1) and unseen.rgba()[..., 3].max() == 0


def test_names_that_end_in_nul_are_cleaned_when_read(tmp_path):
    path = tmp_path / "krita.psd"
    with open(path, "wb") as file:
        psd.write(file, LayerStack((4, 3), (Layer(pixels(1, 3, 4, 4), "ink~"),)), pixels(1, 3, 4, 4), {})
    path.write_bytes(path.read_bytes().replace("ink~".encode("utf-16-be"), "ink\0".encode("utf-16-be")))
    assert [layer.name for layer in files.load(path).layers] == ["ink"]
