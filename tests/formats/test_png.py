"""PNG and WebP layers: pixels and metadata come back, opened by Pillow too."""

import json

import numpy as np
import pytest
from PIL import Image
from strata.formats import files, png
from strata.formats.raster import on_canvas, picture
from strata.techniques.layers import Layer, LayerStack

from .stacks import eight_bit, example, pixels

METADATA = {"prompt": {"1": {"text": 'a "b" 漢'}}, "workflow": {"nodes": [1, 2.5]}, "more": [1]}


@pytest.mark.parametrize(("format", "kind"), [("PNG layers", "PNG"), ("WebP layers", "WEBP")])
def test_every_layer_is_a_picture_of_the_canvas(tmp_path, format, kind):
    stack = example()
    paths = files.save(tmp_path, "s_00001_", stack, picture(stack), format, METADATA)
    assert sorted(tmp_path.iterdir()) == sorted(paths) and len(paths) == 5
    for index, (path, layer) in enumerate(zip(paths[:-1], stack.layers, strict=True)):
        expected = np.zeros((30, 40, 4), int)
        for y, x in np.ndindex(layer.image.shape[:2]):
            if 0 <= y + layer.y < 30 and 0 <= x + layer.x < 40:
                expected[y + layer.y, x + layer.x] = eight_bit(layer.rgba()[y, x])
        with Image.open(path) as image:
            assert image.format == kind and image.mode in ("RGBA", "RGB")
            assert np.array_equal(np.array(image.convert("RGBA")), expected)
        fields = {
            "name": layer.name,
            "opacity": layer.opacity,
            "blend_mode": layer.blend_mode,
            "visible": layer.visible,
        }
        assert png.read_metadata(path) == METADATA | {"strata": fields | {"z_index": index}}
    with Image.open(paths[-1]) as image:
        assert np.array_equal(np.array(image.convert("RGBA")), eight_bit(picture(stack)))
    assert png.read_metadata(paths[-1]) == METADATA


def test_metadata_lies_where_comfyui_looks_for_it(tmp_path):
    paths = files.save(tmp_path, "p", example(), picture(example()), "PNG layers", METADATA)
    with Image.open(paths[0]) as image:
        assert json.loads(image.text["workflow"]) == METADATA["workflow"]
    paths = files.save(tmp_path, "w", example(), picture(example()), "WebP layers", METADATA)
    with Image.open(paths[0]) as image:
        assert image.getexif()[0x0110] == "prompt:" + json.dumps(METADATA["prompt"])
        assert image.getexif()[0x010F] == "workflow:" + json.dumps(METADATA["workflow"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sky", "sky"),
        ("../../etc/passwd", "etc-passwd"),
        ('a/b\\c:d*e?f"g<h>i|j', "a-b-c-d-e-f-g-h-i-j"),
        ("", "layer"),
        ("...", "layer"),
        ("two  words\n", "two-words"),
        ("漢" * 50, "漢" * 20),
        ("x" * 300, "x" * 60),
        ("nul\0", "nul"),
        ("100%", "100"),
        ("\ud800", "layer"),
    ],
)
def test_file_names(name, expected):
    assert files.file_name(name) == expected


def test_nothing_is_left_after_an_error(tmp_path):
    def fail(done):
        if done == 2:
            raise KeyboardInterrupt

    for format in files.FORMATS:
        with pytest.raises(KeyboardInterrupt):
            files.save(tmp_path, "x_", example(), picture(example()), format, {}, fail)
        assert not list(tmp_path.iterdir())


def test_a_layer_wholly_outside_is_empty():
    assert not on_canvas(Layer(pixels(1, 3, 3, 4), x=50), (9, 9)).any()


def test_webp_side_limit(tmp_path):
    stack = LayerStack((16384, 1), (Layer(pixels(1, 1, 1, 4)),))
    with pytest.raises(ValueError, match="WebP holds sides up to 16383 pixels and the canvas is 16384×1"):
        files.save(tmp_path, "x_", stack, picture(stack), "WebP layers", {})
    assert not list(tmp_path.iterdir())
    stack = LayerStack((16383, 1), stack.layers)
    files.save(tmp_path, "x_", stack, picture(stack), "WebP layers", {})
    assert {Image.open(path).size for path in tmp_path.iterdir()} == {(16383, 1)}


@pytest.mark.parametrize("format", files.FORMATS)
def test_a_file_that_is_there_stays(tmp_path, format):
    (first, *_) = files.save(tmp_path, "x_", example(), picture(example()), format, {})
    content = first.read_bytes()
    with pytest.raises(ValueError, match="is there already"):
        files.save(
            tmp_path, "x_", LayerStack((1, 1), (Layer(pixels(1, 1, 1, 4), "Back"),)), pixels(2, 1, 1, 4), format, {}
        )
    assert first.read_bytes() == content


def test_what_cameras_write_is_no_metadata_of_ours(tmp_path):
    exif = Image.Exif()
    exif[0x010F], exif[0x0110], exif[0x0131], exif[0x0112] = 'seed:{"a": 1}', "a camera", "software: 3", 1
    Image.new("RGB", (4, 3)).save(tmp_path / "camera.webp", exif=exif)
    assert png.read_metadata(tmp_path / "camera.webp") == {"seed": {"a": 1}}
