"""Image files as layers, and pictures beside each other on a sheet."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from strata.formats import files
from strata.formats.images import load_images
from strata.formats.raster import picture
from strata.formats.sheet import CELL, GAP, TEXT, contact_sheet
from strata.techniques.arrange import transform_layers
from strata.techniques.layers import Layer, LayerStack, as_effect, bound_to, effect_of, in_group, parent_of

from .stacks import pixels


def test_images_lie_in_the_middle_of_a_canvas_for_all_of_them(tmp_path):
    rng = np.random.default_rng(0)
    wide, high = rng.integers(0, 256, (4, 9, 3), np.uint8), rng.integers(0, 256, (7, 2, 4), np.uint8)
    for name, image in (("wide.bmp", wide), ("high.tiff", high)):
        Image.fromarray(image).save(tmp_path / name)
    notes = []
    stack = load_images([tmp_path / "wide.bmp", tmp_path / "high.tiff"], notes)
    assert stack.canvas == (9, 7) and notes == []
    assert [(layer.name, layer.x, layer.y) for layer in stack.layers] == [("wide", 0, 1), ("high", 3, 0)]
    assert np.array_equal((stack.layers[0].image.numpy() * 255).round(), wide)
    assert np.array_equal((stack.layers[1].image.numpy() * 255).round(), high)


def test_a_photograph_is_turned_and_deep_gray_and_palettes_keep_what_they_show(tmp_path):
    photo = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3))
    exif = photo.getexif()
    exif[0x0112] = 6  # a quarter turn clockwise
    photo.save(tmp_path / "photo.png", exif=exif)
    deep = np.array([[0, 257 * 100, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    palette = Image.new("P", (3, 1), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    palette.save(tmp_path / "palette.png", transparency=1)
    turned, gray, clear = (
        load_images([tmp_path / f"{name}.png"], []).layers[0] for name in ("photo", "deep", "palette")
    )
    assert np.array_equal((turned.image.numpy() * 255).round(), np.rot90(np.asarray(photo), -1))
    assert (gray.image[0, :, 0] * 255).round().tolist() == [0, 100, 255]
    assert clear.image.shape == (1, 3, 4) and not clear.image[..., 3].any()


def test_an_animation_gives_its_first_frame_and_a_note(tmp_path):
    frames = [Image.new("RGB", (3, 2), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:], lossless=True)
    notes = []
    stack = load_images([tmp_path / "moving.webp"], notes)
    assert (stack.layers[0].image[..., 0] == 1).all() and notes == [
        "moving.webp has 2 frames, and the first one is taken."
    ]


@pytest.mark.parametrize("size", [(64, 48), (640, 480), (300, 1), (48, 64)])
def test_a_sheet_shows_every_picture_with_room_for_its_name(size):
    pictures = np.zeros((5, size[1], size[0], 3), np.uint8)
    pictures[:, :, :, 0] = np.arange(5)[:, None, None] * 50 + 5
    sheet = contact_sheet(pictures, ["", "a", "x" * 200, "漢", "e"])
    side = {(300, 1): (300, 1), (48, 64): (240, 320)}.get(size, (320, 240))
    row = side[1] + TEXT + 2 * GAP
    assert sheet.shape == (2 * row + GAP, 3 * (CELL + GAP) + GAP, 3)
    for number in range(5):
        left, top = GAP + number % 3 * (CELL + GAP) + CELL // 2, GAP + number // 3 * row
        assert sheet[top + side[1] // 2, left].tolist() == [number * 50 + 5, 0, 0]
        cell = sheet[top + side[1] // 2, left - CELL // 2 : left + CELL // 2]
        drawn = np.flatnonzero((cell == [number * 50 + 5, 0, 0]).all(-1))
        assert (drawn[0], drawn[-1] + 1) == ((CELL - side[0]) // 2, (CELL + side[0]) // 2), "in the middle"
    names = sheet[GAP + side[1] : row].max(-1) > 128
    cells = [names[:, GAP + n * (CELL + GAP) : (n + 1) * (CELL + GAP)] for n in range(3)]
    assert not cells[0].any() and 0 < cells[1].sum() < cells[2].sum()
    gaps = [names[:, n * (CELL + GAP) : n * (CELL + GAP) + GAP // 2] for n in (1, 2, 3)]
    assert not any(gap.any() for gap in gaps), "the long name ends in an ellipsis"


@pytest.mark.parametrize("format", ["PNG layers", "WebP layers"])
def test_saved_layers_are_what_they_were_and_effects_stay_bound(tmp_path, format):
    place = Layer(pixels(1, 30, 40, 3), "place")
    thing, shadow = Layer(pixels(2, 9, 8, 4), "a/thing", x=5, y=6), Layer(pixels(3, 30, 40, 4), "dark")
    hidden = replace(Layer(pixels(4, 30, 40, 4), "漢"), opacity=0.25, visible=False)
    dark = as_effect(replace(shadow, blend_mode="multiply", opacity=0.5), "shadow")
    given = LayerStack((40, 30), (place, in_group(dark, "a/thing"), in_group(thing, "a/thing"), hidden))
    paths = files.save(tmp_path, "x_", given, picture(given), format, {"prompt": {}})
    found = load_images(paths[:-1], [])
    for field in ("name", "opacity", "blend_mode", "visible"):
        assert [getattr(one, field) for one in found.layers] == [getattr(one, field) for one in given.layers]
    assert [parent_of(one) for one in found.layers] == [(), ("a/thing",), ("a/thing",), ()]
    assert bound_to(found, 2) == [1] and effect_of(found.layers[1]) == "shadow"
    assert (picture(found) - picture(given)).abs().max() <= 1 / 255
    moved = transform_layers(found, "a/thing", move=(7, 0))
    assert moved.layers[1].x - found.layers[1].x == 7
    flattened = load_images(paths[-1:], []).layers[0]
    assert flattened.name == "x_flattened" and flattened.opacity == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"opacity": 7}', "opacity 7"),
        ('{"blend_mode": "dissolve"}', "unknown blend mode"),
        ('{"parent": "a"}', "list of group names"),
        ("[1]", None),
        ("{", None),
        ('{"effect": ["shadow"], "name": ""}', None),
    ],
)
def test_what_others_write_under_that_name_is_checked(tmp_path, text, message):
    info = PngInfo()
    info.add_text("strata", text)
    info.add_text("parameters", "a castle, steps: 20")
    Image.new("RGBA", (4, 3)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(ValueError, match=f"^files: .*{message}") if message else nullcontext():
        (layer,) = load_images([tmp_path / "a.png"], []).layers
        assert effect_of(layer) is None and layer.opacity == 1
