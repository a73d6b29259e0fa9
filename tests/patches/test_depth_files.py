"""Depth files of every kind that Load depth offers, and damaged ones."""

import struct
import zlib

import numpy as np
import pytest
import torch
from strata.nodes.depth import read_depth_file
from strata.nodes.depth_inputs import depth_layer

DEPTH = np.random.default_rng(0).integers(0, 65536, (6, 9)).astype(np.uint16)


def rgb16(path, values):
    """A PNG of 16 bits a channel, by the format's own words: no filter, big-endian."""
    rows = b"".join(b"\0" + np.repeat(row[:, None], 3, 1).astype(">u2").tobytes() for row in values)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def test_16_bits_of_a_colour_png_are_kept(tmp_path):
    rgb16(tmp_path / "depth.png", DEPTH)
    assert np.abs(read_depth_file(tmp_path / "depth.png") * 65535 - DEPTH).max() < 0.6


@pytest.mark.parametrize("shape", [(6, 9), (1, 6, 9), (6, 9, 1), (1, 6, 9, 1), (1, 1, 6, 9)])
def test_axes_of_length_one_do_not_matter(tmp_path, shape):
    np.save(tmp_path / "depth.npy", DEPTH.reshape(shape))
    assert np.allclose(read_depth_file(tmp_path / "depth.npy"), DEPTH / 65535, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"intrinsics": np.eye(3), "mask": np.ones((6, 9), bool)},
        {"name": np.array("x"), "normal": np.ones((6, 9, 3))},
    ],
)
def test_the_depth_of_an_archive_is_found(tmp_path, others):
    np.savez(tmp_path / "depth.npz", **others, **({"depth": DEPTH} if "intrinsics" in others else {"arr": DEPTH}))
    assert np.allclose(read_depth_file(tmp_path / "depth.npz"), DEPTH / 65535, rtol=0, atol=1e-6)


def test_an_archive_with_none_or_several_says_so(tmp_path):
    np.savez(tmp_path / "empty.npz")
    with pytest.raises(ValueError, match="file: empty.npz holds no array"):
        read_depth_file(tmp_path / "empty.npz")
    np.savez(tmp_path / "two.npz", a=DEPTH, b=DEPTH)
    with pytest.raises(ValueError, match="file: two.npz holds a, b, and it is not clear"):
        read_depth_file(tmp_path / "two.npz")


@pytest.mark.parametrize("suffix", ["npy", "npz", "png", "tiff"])
def test_damaged_files_are_named_in_one_sentence(tmp_path, suffix):
    from PIL import Image

    path = tmp_path / f"whole.{suffix}"
    if suffix == "npz":
        np.savez_compressed(path, depth=DEPTH)
    elif suffix == "npy":
        np.save(path, DEPTH)
    else:
        Image.fromarray(DEPTH).save(path)
    whole, rng = path.read_bytes(), np.random.default_rng(1)
    refused = 0
    for case in range(60):
        data = bytearray(whole[: rng.integers(0, len(whole))] if case % 2 else whole)
        for place in rng.integers(0, max(len(data), 1), 4 if data else 0):
            data[place] = rng.integers(256)
        (tmp_path / f"bad.{suffix}").write_bytes(data)
        try:
            assert read_depth_file(tmp_path / f"bad.{suffix}").ndim == 2
        except ValueError as error:
            refused += 1
            assert str(error).startswith(f"file: bad.{suffix} ")
    assert refused > 20


IMAGE = torch.zeros(1, 2, 3, 4)


def test_the_layer_of_a_depth_shows_it_as_it_came_in():
    values, notes = torch.tensor([[[0.1, 0.5, 0.9], [0.2, torch.nan, 0.6]]]), []
    layer = depth_layer(values, IMAGE, notes)
    assert not layer.visible and not notes and layer.image.shape == (2, 3, 3)
    known = ~values[0].isnan()
    assert torch.allclose(layer.image[known], values[0][known][:, None].expand(-1, 3))
    assert layer.image[1, 1, 0] in (0.2, 0.5, 0.6), "filled from beside"
    of_image = depth_layer(values.nan_to_num(0.3)[..., None].expand(-1, -1, -1, 3), IMAGE, notes)
    assert torch.allclose(of_image.image[0], layer.image[0])


def test_metres_are_stretched_and_told():
    notes = []
    layer = depth_layer(torch.tensor([[[1.0, 3.0, 5.0], [2.0, 4.0, torch.inf]]]), IMAGE, notes)
    assert torch.allclose(layer.image[..., 0].flatten()[:5], torch.tensor([0, 0.5, 1, 0.25, 0.75]))
    assert notes == ["The depth's values go beyond 0 to 1; its layer shows them stretched to that range."]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.zeros(2, 2, 3), "there are 2 depth images for 1 images"),
        ("depth", "this is not a depth image"),
        (torch.full((1, 2, 3), torch.nan), "there is no valid value in it"),
    ],
)
def test_what_is_no_depth_of_one_image_is_one_sentence(value, words):
    with pytest.raises(ValueError, match=f"^depth: {words}"):
        depth_layer(value, IMAGE, [])
