"""Image files as layers, and pictures beside each other on a sheet."""

import numpy as np
import pytest
from PIL import Image
from strata.formats.images import load_images
from strata.formats.sheet import CELL, GAP, TEXT, contact_sheet


def test_images_lie_in_the_middle_of_a_canvas_for_all_of_them(tmp_path):
    rng = np.random.default_rng(0)
    wide, high = rng.integers(0, 256, (4, 9, 3), np.uint8), rng.integers(0, 256, (7, 2, 4), np.uint8)
    for name, pixels in (("wide.bmp", wide), ("high.tiff", high)):
        Image.fromarray(pixels).save(tmp_path / name)
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
