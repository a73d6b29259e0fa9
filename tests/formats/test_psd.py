"""PSD files: what is written is read back, by Pillow, ImageMagick and psd-tools too, and strangers' files show what
psd-tools' own compositor shows.
"""

import io
import shutil
import struct
import subprocess
from dataclasses import replace

import host
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from psd_tools import PSDImage
from psd_tools.constants import BlendMode, Resource, Tag
from psd_tools.psd.descriptor import DescriptorBlock
from psd_tools.psd.image_resources import AlphaIdentifiers, ImageResource
from psd_tools.psd.layer_and_mask import LayerBlendingRanges, MaskParameters
from strata.formats import files, psd
from strata.formats.groups import GROUPS
from strata.formats.raster import picture
from strata.techniques.layers import BLEND_MODES, Layer, LayerStack

from .stacks import eight_bit, example, layers, linear_srgb, pixels, srgb_of

MODES = tuple(mode for mode in BLEND_MODES if mode not in psd.MISSING_MODES)


def save(folder, stack, metadata=None):
    path = folder / "stack.psd"
    with open(path, "wb") as file:
        psd.write(file, stack, picture(stack), metadata or {})
    return path


def test_round_trip_keeps_pixels_and_fields(tmp_path):
    stack = example()
    back = psd.read(save(tmp_path, stack))
    assert back.canvas == stack.canvas
    for ours, theirs in zip(stack.layers, back.layers, strict=True):
        assert np.array_equal(eight_bit(ours.image), eight_bit(theirs.image))
        assert (ours.mask is None) == (theirs.mask is None)
        assert ours.mask is None or np.array_equal(eight_bit(ours.mask), eight_bit(theirs.mask))
        assert replace(ours, image=None, mask=None) == replace(theirs, image=None, mask=None)


@settings(max_examples=40, deadline=None)
@given(st.lists(layers(MODES), min_size=1, max_size=3))
def test_round_trip_of_any_layer(tmp_path_factory, made):
    back = psd.read(save(tmp_path_factory.mktemp("psd"), LayerStack((7, 5), tuple(made)))).layers
    for ours, theirs in zip(made, back, strict=True):
        assert np.array_equal(eight_bit(ours.image), eight_bit(theirs.image))
        assert abs(ours.opacity - theirs.opacity) <= 0.5 / 255 + 0.005
        for field in ("name", "x", "y", "blend_mode", "visible"):
            assert getattr(ours, field) == getattr(theirs, field)


@pytest.mark.parametrize("hundredth", range(101))
def test_opacity_in_hundredths_comes_back(tmp_path, hundredth):
    layer = Layer(pixels(1, 1, 1, 4), opacity=hundredth / 100)
    assert psd.read(save(tmp_path, LayerStack((1, 1), (layer,)))).layers[0].opacity == hundredth / 100


def test_metadata_is_read_back(tmp_path):
    metadata = {"prompt": {"1": {"text": '<a> & "b" ]]> 漢 \n'}}, "workflow": {"nodes": [1, 2.5, None]}}
    assert psd.read_metadata(save(tmp_path, example(), metadata)) == metadata


def test_metadata_of_another_programs_file_is_empty(tmp_path):
    path = tmp_path / "other.psd"
    PSDImage.new("RGB", (4, 4)).save(path)
    assert psd.read_metadata(path) == {}


def test_pillow_reads_layers_and_flattened_picture(tmp_path):
    # Pillow takes layers of at most four channels, so none with a mask, and their old short names.
    stack = LayerStack(
        (40, 30), (Layer(pixels(1, 30, 40, 3), "Back"), Layer(pixels(2, 10, 12, 4), "front", None, 3, 5, opacity=0.5))
    )
    with Image.open(save(tmp_path, stack)) as image:
        assert np.array_equal(np.array(image), eight_bit(picture(stack))[..., :3])  # opaque, so no fourth channel
        assert [layer[:3] for layer in image.layers] == [
            ("Back", "RGB", (0, 0, 40, 30)),
            ("front", "RGBA", (3, 5, 15, 15)),
        ]
        # Pillow begins with frame 1 being the flattened picture.
        for number, layer in reversed(list(enumerate(stack.layers, 1))):
            image.seek(number)
            assert np.array_equal(np.array(image.crop(image.layers[number - 1][2])), eight_bit(layer.image))


def test_merged_picture_is_over_white_where_transparent(tmp_path):
    half = Layer(torch.tensor([1.0, 0, 0, 0.6]).expand(2, 2, 4))
    with Image.open(save(tmp_path, LayerStack((3, 2), (half,)))) as image:
        assert np.array(image).tolist() == [[[255, 102, 102, 153], [255, 102, 102, 153], [255, 255, 255, 0]]] * 2


@pytest.mark.parametrize("alpha", [1.0, 0.6])
def test_the_merged_pictures_fourth_channel_is_its_transparency(tmp_path, alpha):
    """The format says so by a negative number of layers, the first two bytes of their section's second length."""
    layer = Layer(torch.full((2, 3, 4), alpha))
    content = save(tmp_path, LayerStack((3, 2), (layer, layer))).read_bytes()
    place = 26 + 4  # behind the header and an empty table of colours
    place += 4 + struct.unpack(">I", content[place : place + 4])[0]  # behind the resources
    (channels,), (count,) = struct.unpack(">H", content[12:14]), struct.unpack(">h", content[place + 8 : place + 10])
    assert (channels, count) == ((3, 2) if alpha == 1 else (4, -2))


@pytest.mark.skipif(not shutil.which("identify"), reason="ImageMagick is not installed")
def test_imagemagick_reads_layers(tmp_path):
    stack, path = example(), save(tmp_path, example())
    lines = subprocess.check_output(["identify", "-format", "%wx%h%X%Y\n", str(path)], text=True).split()
    assert lines == ["40x30+0+0", "40x30+0+0", "12x10-3-2", "20x9+30+25", "1x1+39+29"]
    raw = subprocess.check_output(["convert", f"{path}[3]", "-depth", "8", "rgba:-"])
    assert np.array_equal(np.frombuffer(raw, np.uint8).reshape(9, 20, 4), eight_bit(stack.layers[2].image))


@pytest.mark.parametrize("mode", MODES)
def test_blend_modes_are_photoshops(tmp_path, mode):
    layer = PSDImage.open(save(tmp_path, LayerStack((2, 2), (Layer(pixels(1, 2, 2, 4), blend_mode=mode),))))[0]
    assert layer.blend_mode == BlendMode[mode.upper().replace("-", "_")]


@pytest.mark.parametrize("mode", psd.MISSING_MODES)
def test_blend_mode_that_psd_lacks(tmp_path, mode):
    stack = LayerStack((2, 2), (Layer(pixels(1, 2, 2, 4), "grain", blend_mode=mode),))
    with pytest.raises(ValueError, match=f"layer 'grain' has the blend mode {mode}, which PSD does not have"):
        files.save(tmp_path, "x_", stack, picture(stack), "PSD", {})
    assert not list(tmp_path.iterdir())


def test_flipped_and_turned_layers_are_drawn(tmp_path):
    image = pixels(1, 3, 5, 4)
    made = (
        Layer(image, x=2, y=1, flip_h=True, flip_v=True),
        Layer(image, x=-40, y=60, rotation=np.pi),
        Layer(image, w=10, h=6, x=1),
    )
    back = psd.read(save(tmp_path, LayerStack((20, 20), made))).layers
    turned = eight_bit(image)[::-1, ::-1]
    assert np.array_equal(eight_bit(back[0].image), turned) and (back[0].x, back[0].y) == (2, 1)
    assert np.array_equal(eight_bit(back[1].image), turned) and (back[1].x, back[1].y) == (-40, 60)
    assert back[2].image.shape == (6, 10, 4) and (back[2].x, back[2].w) == (1, 0)


def grouped(mode="RGB"):
    """A document as paint programs make it, built with psd-tools' own API: group of 50 % with a mask, clipped layer,
    hidden group.
    """
    document = PSDImage.new(mode, (8, 6))
    document.create_pixel_layer(Image.new(mode, (8, 6), 10), name="base")
    inner = document.create_pixel_layer(
        Image.fromarray(np.full((2, 4, 4), (200, 100, 50, 255), np.uint8)).convert(mode), name="inner", top=1, left=2
    )
    inner.opacity = 128
    group = document.create_group([inner], name="group")
    group.opacity = 128
    hidden = document.create_group(
        [document.create_pixel_layer(Image.new(mode, (1, 1)), name="in hidden")], name="hidden group"
    )
    hidden.visible = False
    clipped = document.create_pixel_layer(Image.new(mode, (6, 6), 90), name="clipped", left=4)
    clipped.clipping = True
    return document


def test_groups_become_their_leaves(tmp_path):
    path = tmp_path / "groups.psd"
    grouped().save(path)
    base, inner, hidden, clipped = psd.read(path).layers
    assert [layer.name for layer in (base, inner, hidden, clipped)] == ["base", "inner", "in hidden", "clipped"]
    assert inner.opacity == pytest.approx((128 / 255) ** 2) and (inner.x, inner.y) == (2, 1)
    assert [layer.visible for layer in (base, inner, hidden, clipped)] == [True, True, False, False], (
        "clipped to a hidden group"
    )


def test_group_mask_and_clipping_cut_the_layers(tmp_path):
    document = PSDImage.new("RGB", (8, 6))
    document.create_pixel_layer(Image.new("RGBA", (3, 6), (9, 9, 9, 102)), name="base", left=1)
    clipped = document.create_pixel_layer(Image.new("RGB", (8, 6), 90), name="clipped")
    clipped.clipping = True
    document.create_group(
        [document.create_pixel_layer(Image.new("RGB", (4, 2), 50), name="inner", top=1, left=2)], name="group"
    )
    path = tmp_path / "masks.psd"
    document.save(path)
    document = PSDImage.open(path)  # psd-tools cannot mask a group that it has just made
    document[2].create_mask(Image.new("L", (2, 6), 51), left=3)
    document[2].mask.data.background_color = 255
    document.save(path)
    _, over, inner = psd.read(path).layers
    assert eight_bit(over.rgba()[..., 3])[0].tolist() == [0, *[eight_bit(torch.tensor(0.4)).item()] * 3, 0, 0, 0, 0]
    assert eight_bit(inner.rgba()[..., 3]).tolist() == [[255, 51, 51, 255]] * 2


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_colour_modes_are_converted(tmp_path, mode):
    path = tmp_path / "mode.psd"
    document = PSDImage.new(mode, (4, 4))
    document.create_pixel_layer(Image.new("RGB", (4, 3), (255, 255, 255)), name="white")
    document.save(path)
    layer = psd.read(path).layers[0]
    assert layer.name == "white" and eight_bit(layer.image[..., :3]).min() == 255 and layer.image.shape[:2] == (3, 4)


def test_sixteen_bits_are_read_in_full(tmp_path):
    path = tmp_path / "deep.psd"
    document = PSDImage.new("RGB", (2, 2), depth=16)
    values = np.array([0.1234, 0.5005, 0.9, 1.0], np.float32)
    document.create_pixel_layer_from_array(np.broadcast_to(values, (2, 2, 4)).copy(), name="deep")
    document.save(path)
    assert np.abs(psd.read(path).layers[0].image.numpy() - values).max() <= 0.51 / 65535


def test_document_without_layers_is_one_layer(tmp_path):
    path = tmp_path / "flat.psd"
    PSDImage.frompil(Image.new("RGB", (3, 2), (1, 2, 3))).save(path)
    (layer,) = psd.read(path).layers
    assert layer.name == "Background" and eight_bit(layer.image[..., :3])[1, 2].tolist() == [1, 2, 3]


@pytest.mark.parametrize("share", [0.001, 0.02, 0.1, 0.3, 0.5])
def test_truncated(tmp_path, share):
    data = save(tmp_path, example()).read_bytes()
    path = tmp_path / "cut.psd"
    path.write_bytes(data[: max(5, int(len(data) * share))])
    with pytest.raises(ValueError, match=r"^cut\.psd (is damaged|has damaged|is not a PSD)"):
        files.load(path)


def test_cut_short_after_its_layers(tmp_path):
    # The flattened picture is the last part of the file and is not needed: every layer is still whole.
    path = save(tmp_path, example())
    path.write_bytes(path.read_bytes()[:-100])
    assert [layer.name for layer in files.load(path).layers] == [layer.name for layer in example().layers]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_bytes_never_give_anything_but_layers_or_one_sentence(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    content = bytearray(save(folder, example()).read_bytes())
    for place in data.draw(st.lists(st.integers(4, len(content) - 1), min_size=1, max_size=8)):
        content[place] = data.draw(st.integers(0, 255))
    path = folder / "bad.psd"
    path.write_bytes(content)
    try:
        assert files.load(path).layers
    except ValueError as error:
        assert str(error).startswith("bad.psd")


def test_huge_sides_are_refused_before_reading(tmp_path):
    path = tmp_path / "huge.psd"
    path.write_bytes(struct.pack(">4sH6xHIIHH", b"8BPS", 1, 3, 200000, 200000, 8, 3) + bytes(20))
    with pytest.raises(ValueError, match="200000×200000; sides must be from 1 to 16384"):
        files.load(path)


def test_too_many_layers(tmp_path):
    document = PSDImage.new("RGB", (2, 2))
    for _ in range(51):
        document.create_pixel_layer(Image.new("RGB", (1, 1)))
    document.save(tmp_path / "many.psd")
    with pytest.raises(ValueError, match="many.psd has 51 layers"):
        files.load(tmp_path / "many.psd")


def test_layers_are_counted_after_groups_were_merged(tmp_path):
    document = PSDImage.new("RGB", (2, 2))
    document.create_group([document.create_pixel_layer(Image.new("RGB", (1, 1))) for _ in range(60)], name="many")
    document.save(tmp_path / "many.psd")
    assert len(files.load(tmp_path / "many.psd", "one layer each").layers) == 1
    with pytest.raises(ValueError, match="many.psd has 60 layers .* groups: one layer each"):
        files.load(tmp_path / "many.psd")


def test_a_group_larger_than_any_layer_is_refused_by_name(tmp_path):
    document = PSDImage.new("RGB", (4, 4))
    inner = [document.create_pixel_layer(Image.new("RGB", (2, 2)), left=left) for left in (0, 20000)]
    document.create_group(inner, name="wide")
    document.save(tmp_path / "wide.psd")
    assert len(files.load(tmp_path / "wide.psd").layers) == 2
    with pytest.raises(ValueError, match="^wide.psd: group 'wide' is 20002×2; sides must be"):
        files.load(tmp_path / "wide.psd", "one layer each")


@pytest.mark.parametrize(
    ("identifiers", "expected"), [(None, (255, 102, 102, 255)), ([5], (255, 102, 102, 255)), ([0], (255, 0, 0, 153))]
)
def test_the_fourth_channel_of_a_flat_document_is_transparency_only_where_the_file_says_so(
    tmp_path, identifiers, expected
):
    """Stored are the colour over white and 153 of 255: either that colour with a saved selection, or red with an
    opacity of 0.6.
    """
    document = PSDImage.new("RGB", (4, 4))
    record = document._record
    record.header.channels = 4
    record.image_data.set_data([bytes([value]) * 16 for value in (255, 102, 102, 153)], record.header)
    if identifiers:
        key = Resource.ALPHA_IDENTIFIERS
        document.image_resources[key] = ImageResource(key=key.value, data=AlphaIdentifiers(identifiers))
    stack, notes = loaded(document, tmp_path / "flat.psd")
    assert (eight_bit(stack.layers[0].rgba()) == expected).all() and not notes


@pytest.mark.parametrize(("visible", "opacity"), [(True, 255), (True, 128), (False, 255)])
def test_what_is_clipped_to_a_fill_goes_with_its_mask_opacity_and_visibility(tmp_path, visible, opacity):
    document = PSDImage.new("RGB", (4, 4))
    fill = document.create_pixel_layer(block((1, 2, 3)), name="fill", opacity=opacity)
    fill.create_mask(Image.fromarray(np.repeat(np.array([[255, 255, 0, 0]], np.uint8), 4, 0)))
    document.create_pixel_layer(block((9, 8, 7)), name="clipped").clipping = True
    document.save(tmp_path / "made.psd")
    document = PSDImage.open(tmp_path / "made.psd")
    record = document[0]._record  # as Photoshop writes a fill: no pixels, its colour as a tagged block
    for info, plane in zip(record.channel_info, document[0]._channels, strict=True):
        if info.id >= -1:
            plane.data = b""
    record.top = record.left = record.bottom = record.right = 0
    record.tagged_blocks.set_data(Tag.SOLID_COLOR_SHEET_SETTING, DescriptorBlock(version=16, classID=b"null"))
    record.flags.visible = visible
    document.save(tmp_path / "fill.psd")
    notes = []
    stack = files.load(tmp_path / "fill.psd", notes=notes)
    found = eight_bit(picture(stack))
    assert (found[:, :2] == ([9, 8, 7, opacity] if visible else 0)).all() and found[:, 2:, 3].max() == 0
    assert len(notes) == 1 and notes[0].startswith("Layer 'fill' (solidcolorfill) has no pixels")


def test_what_is_clipped_to_an_empty_layer_does_not_show(tmp_path):
    document = PSDImage.new("RGB", (4, 4))
    base = document.create_pixel_layer(block((1, 2, 3)), name="base")
    document.create_pixel_layer(block((9, 8, 7)), name="clipped").clipping = True
    record = base._record
    record.top = record.left = record.bottom = record.right = 0
    for plane in base._channels:
        plane.data = b""
    stack, notes = loaded(document, tmp_path / "empty.psd")
    assert [layer.visible for layer in stack.layers] == [False] and notes


def test_not_a_layer_file(tmp_path):
    for content, message in ((b"", "is empty"), (b"GIF89a" * 9, "is neither a PSD nor an OpenRaster file")):
        (tmp_path / "x.psd").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            files.load(tmp_path / "x.psd")


def test_two_gigabytes_hold_the_layers_and_the_merged_picture_twice(monkeypatch):
    """Of noise, which is stored as it is: four channels of the layer, three of the picture."""
    stack, merged, side = LayerStack((40, 40), (Layer(pixels(1, 40, 40, 4)),)), pixels(2, 40, 40, 3), 40 * 40
    monkeypatch.setattr(psd, "MAX_BYTES", 4 * side + 2 * 3 * side)
    psd.write(io.BytesIO(), stack, merged, {})
    monkeypatch.setattr(psd, "MAX_BYTES", 4 * side + 2 * 3 * side - 1)
    with pytest.raises(ValueError, match="more than the 2 GB of a PSD file"):
        psd.write(io.BytesIO(), stack, merged, {})


def test_run_lengths_are_stored_where_they_are_shorter(tmp_path):
    layers = Layer(torch.full((64, 64, 4), 0.5), "flat"), Layer(pixels(1, 64, 64, 4), "noise")
    with open(tmp_path / "x.psd", "wb") as file:
        psd.write(file, LayerStack((64, 64), layers), pixels(2, 64, 64, 3), {})
    kinds = [
        {channel.compression.name for channel in layer._channels if channel.data}
        for layer in PSDImage.open(tmp_path / "x.psd")
    ]
    assert kinds == [{"RLE"}, {"RAW"}]


FAULTS = host.PACK.parent / "shared" / "faults" / "files"


@pytest.mark.skipif(not FAULTS.exists(), reason="the files are not here")
@pytest.mark.parametrize(
    ("name", "pixel", "note"),
    [
        ("clip_half_base", None, "are one with it now"),
        ("clip_hidden_base", (0, 0, 0, 0), ""),
        ("group_half_overlap", (0, 0, 255, 128), "Group 'g' is one layer now"),
        ("icc_broken", None, "The colour profile cannot be read"),
        ("mask_density", None, ""),
        ("flat_saved_selection", None, ""),
    ],
)
def test_files_that_were_shown_wrong(name, pixel, note):
    notes = []
    found = eight_bit(picture(files.load(FAULTS / f"{name}.psd", notes=notes)))
    if pixel is not None:
        assert (found == pixel).all() if sum(pixel) else found[..., 3].max() == 0
    if name == "flat_saved_selection":
        assert found[..., 3].min() == 255
    assert (note in " ".join(notes)) if note else not notes


def with_alpha(document, pixels, as_mask, **options):
    """A layer of pixels [H,W,4]. psd-tools makes a mask of a Pillow image's alpha, and transparency of an array's."""
    if as_mask:
        return document.create_pixel_layer(Image.fromarray(pixels), **options)
    return document.create_pixel_layer_from_array(pixels, **options)


def random_document(seed):
    """Pixel layers of random alpha, opacity, visibility and mode, some clipped, some in groups in groups: psd-tools'
    own compositor knows what it shows. The alpha is a mask for every other seed.
    """
    random = np.random.default_rng(seed)
    document = PSDImage.new("RGB", (16, 12))

    def a_layer(opaque=False):
        height, width = random.integers(4, 11, 2)
        pixels = random.integers(0, 256, (height, width, 4), np.uint8)
        pixels[..., 3] = 255 if opaque or random.random() < 0.4 else pixels[..., 3]
        layer = with_alpha(
            document,
            pixels,
            seed % 2 == 0,
            name=f"l{random.integers(99)}",
            top=int(random.integers(0, 6)),
            left=int(random.integers(0, 8)),
            opacity=int(random.choice([255, 255, 128, 60])),
        )
        layer.visible = bool(random.random() < 0.85)
        if random.random() < 0.3:
            layer.blend_mode = BlendMode.MULTIPLY
        return layer

    document.create_pixel_layer(Image.fromarray(random.integers(0, 256, (12, 16, 3), np.uint8)), name="ground")
    for _ in range(2):
        group = document.create_group([a_layer() for _ in range(random.integers(1, 4))], name="group")
        group.opacity = int(random.choice([255, 128]))
        group.blend_mode = (BlendMode.NORMAL, BlendMode.PASS_THROUGH, BlendMode.SCREEN)[random.integers(3)]
        group.visible = bool(random.random() < 0.9)
        a_layer(opaque=True)
        if random.random() < 0.7:
            a_layer().clipping = True
    return document


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("seed", range(40))
def test_groups_and_clipping_show_what_another_reader_shows(tmp_path, seed, groups):
    path = tmp_path / "random.psd"
    random_document(seed).save(path)
    expected = np.asarray(PSDImage.open(path).composite(force=True).convert("RGBA"), np.float32)
    notes = []
    stack = files.load(path, groups, notes)
    found = eight_bit(picture(stack)).astype(np.float32)
    loose = any("do not reach what is behind" in note or "soft edges" in note for note in notes)
    assert loose or np.abs(found - expected).max() <= 2.5, notes
    if groups == GROUPS[1]:
        assert all("one layer" in note for note in notes if "Group" in note)


def test_mask_density_and_feather(tmp_path):
    document = PSDImage.new("RGB", (4, 2))
    document.create_pixel_layer(Image.new("RGB", (4, 2), 200), name="masked")
    path = tmp_path / "mask.psd"
    document.save(path)
    document = PSDImage.open(path)
    document[0].create_mask(Image.fromarray(np.array([[0, 255], [0, 255]], np.uint8)), left=0)
    document[0].mask.data.background_color = 0
    document[0].mask.data.parameters = MaskParameters(user_mask_density=128, user_mask_feather=2.0)
    document[0].mask.data.flags.parameters_applied = True
    document.save(path)
    notes = []
    (layer,) = files.load(path, notes=notes).layers
    assert np.allclose(
        layer.rgba()[..., 3].numpy(), [[1 - 128 / 255, 1, 1 - 128 / 255, 1 - 128 / 255]] * 2, rtol=0, atol=1e-6
    )
    assert notes == ["The feather of the mask of 'masked' is not read."]


def lab_of(colours):
    """CIE Lab under D50 of 8-bit sRGB [N,3], by the standards' formulas: linear light, sRGB's matrix adapted to D50 by
    Bradford's transform, cube roots.
    """
    values = np.asarray(colours) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]]
    )
    ratio = linear @ to_xyz.T / [0.96422, 1, 0.82521]
    x, y, z = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio * (29 / 6) ** 2 / 3 + 4 / 29).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def test_a_flat_lab_document_has_its_colours(tmp_path):
    path = tmp_path / "lab.psd"
    colours = [(200, 120, 80), (100, 140, 110), (128, 128, 128), (90, 70, 160)]
    lab = lab_of(colours)
    # A and b have 128 for 0.
    planes = np.stack([lab[:, 0] * 2.55, lab[:, 1] + 128, lab[:, 2] + 128]).round().astype(np.uint8)
    header = struct.pack(">4sH6xHIIHH", b"8BPS", 1, 3, 1, len(colours), 8, 9)
    path.write_bytes(header + struct.pack(">III", 0, 0, 0) + struct.pack(">H", 0) + planes.tobytes())
    (layer,) = files.load(path).layers
    assert layer.image.shape == (1, len(colours), 3)
    assert np.abs(eight_bit(layer.image)[0].astype(int) - colours).max() <= 3


def loaded(document, path, **given):
    """(layers, notes) of a document that psd-tools wrote."""
    document.save(path)
    notes = []
    return files.load(path, notes=notes, **given), notes


def block(shade, size=(4, 4)):
    return Image.new("RGB", size, shade)


def test_a_mode_without_a_formula_is_told_where_layers_are_merged(tmp_path):
    document = PSDImage.new("RGB", (4, 4))
    document.create_pixel_layer(block((10, 10, 10)), name="ground")
    low, add = (document.create_pixel_layer(block((100, 50, 0)), name=name) for name in ("low", "add"))
    add.blend_mode = BlendMode.LINEAR_DODGE
    group = document.create_group([low, add], name="g")
    group.blend_mode = BlendMode.NORMAL
    base, clipped = (document.create_pixel_layer(block((100, 50, 0)), name=name) for name in ("base", "clipped"))
    base.opacity, clipped.clipping, clipped.blend_mode = 128, True, BlendMode.VIVID_LIGHT
    _, notes = loaded(document, tmp_path / "modes.psd")
    assert [note for note in notes if "no formula" in note] == [
        "The merged layer 'g' shows 'add' (linear-dodge) in blend mode normal, because there is no formula for it.",
        "The merged layer 'base' shows 'clipped' (vivid-light) in blend mode normal, because there is no formula for "
        "it.",
    ]


@pytest.mark.parametrize("visible", [0, 1, 2])
def test_hidden_clipped_layers_stay_or_are_told(tmp_path, visible):
    document = PSDImage.new("RGB", (4, 4))
    document.create_pixel_layer(block((100, 50, 0)), name="base", opacity=128)
    for number, shade in enumerate((9, 200)):
        layer = document.create_pixel_layer(block((shade,) * 3), name=f"clipped {shade}")
        layer.clipping, layer.visible = True, number < visible
    stack, notes = loaded(document, tmp_path / "hidden.psd")
    expected = {0: (100, 50, 0, 128), 1: (9, 9, 9, 128), 2: (200, 200, 200, 128)}[visible]
    assert (eight_bit(picture(stack)) == expected).all()
    if visible:
        assert len(stack.layers) == 1 and ("the hidden ones of them are left out" in notes[0]) == (visible == 1)
    else:
        assert [layer.visible for layer in stack.layers] == [True, False, False] and not notes


def test_hidden_layers_of_a_base_group_are_told_or_stay(tmp_path):
    for shown in (True, False):
        document = PSDImage.new("RGB", (4, 4))
        inner = [document.create_pixel_layer(block((shade,) * 3), name=f"in {shade}") for shade in (50, 90)]
        inner[1].visible = False
        document.create_group(inner, name="base")
        clipped = document.create_pixel_layer(block((9, 9, 9)), name="clipped")
        clipped.clipping, clipped.visible = True, shown
        stack, notes = loaded(document, tmp_path / f"{shown}.psd")
        assert (eight_bit(picture(stack))[..., 0] == (9 if shown else 50)).all()
        assert [layer.name for layer in stack.layers] == (
            ["base", "clipped"] if shown else ["in 50", "in 90", "clipped"]
        )
        assert ("its hidden layers are left out" in " ".join(notes)) == shown


def test_a_base_with_a_real_alpha_channel_cuts_what_is_clipped_to_it(tmp_path):
    alpha = np.array([[0, 255, 128], [255, 0, 64]], np.uint8)
    base = np.dstack([np.full((2, 3, 3), 40, np.uint8), alpha])
    document = PSDImage.new("RGB", (6, 5))
    with_alpha(document, base, False, name="base", top=1, left=2)
    document.create_pixel_layer(block((200, 100, 50), (6, 5)), name="clipped").clipping = True
    stack, _ = loaded(document, tmp_path / "base.psd")
    expected = np.zeros((5, 6), int)
    expected[1:3, 2:5] = alpha
    found = eight_bit(picture(stack))
    assert np.abs(found[..., 3] - expected).max() <= 1
    assert np.abs(found[expected > 0][:, :3] - [200, 100, 50]).max() <= 1, "an opaque clipped layer hides its base"


@pytest.mark.parametrize("as_mask", [True, False])
@pytest.mark.parametrize("opacity", [255, 51])
def test_a_half_transparent_layer_is_mixed_with_a_base_of_soft_alpha_as_clipping_does(tmp_path, opacity, as_mask):
    """Within the base's alpha: the clipped layer's share of its own colour, and of the base's the rest. The base's
    opacity weakens both.
    """
    alpha, share = np.array([[0, 40, 128, 200, 255]] * 2), np.array([[0] * 5, [100] * 5])
    document = PSDImage.new("RGB", (5, 2))
    base = np.dstack([np.full((2, 5, 3), 40), alpha]).astype(np.uint8)
    with_alpha(document, base, as_mask, name="base", opacity=opacity)
    for colour in (200, 120):
        top = np.dstack([np.full((2, 5, 3), colour), share]).astype(np.uint8)
        with_alpha(document, top, as_mask, name=f"clipped {colour}").clipping = True
    stack, _ = loaded(document, tmp_path / "soft.psd")
    found, expected = picture(stack).double().numpy(), np.full((2, 5), 40.0)
    for colour in (200, 120):
        expected = share / 255 * colour + (1 - share / 255) * expected
    assert np.abs(found[..., 3] * 255 - alpha * opacity / 255).max() < 0.01
    assert np.abs(found[..., 0] * 255 - expected)[alpha > 0].max() < 0.01


def test_fill_opacity_and_disabled_masks(tmp_path):
    document = PSDImage.new("RGB", (4, 4))
    document.create_pixel_layer(block((9, 9, 9)), name="filled", opacity=128)
    document.create_pixel_layer(block((9, 9, 9)), name="masked")
    document.save(tmp_path / "first.psd")
    document = PSDImage.open(tmp_path / "first.psd")
    document[0].fill_opacity = 64
    document[1].create_mask(Image.new("L", (4, 4), 0))
    document[1].mask.data.flags.mask_disabled = True
    stack, notes = loaded(document, tmp_path / "second.psd")
    assert stack.layers[0].opacity == pytest.approx(128 / 255 * 64 / 255, abs=1e-6)
    assert stack.layers[1].rgba()[..., 3].min() == 1 and not notes


def test_a_groups_fill_opacity_weakens_its_layers(tmp_path):
    document = PSDImage.new("RGB", (4, 4))
    layer = document.create_pixel_layer(block((9, 9, 9)), name="inside")
    document.create_group([layer], name="group", opacity=128)
    document.save(tmp_path / "first.psd")
    document = PSDImage.open(tmp_path / "first.psd")
    document[0].fill_opacity = 64
    (layer,) = loaded(document, tmp_path / "second.psd")[0].layers
    assert layer.opacity == pytest.approx(128 / 255 * 64 / 255, abs=1e-6)


def test_a_colour_profile_is_applied_and_lost_bits_are_told(tmp_path):
    """A profile of linear light: a middle value comes out brighter, by sRGB's own formula."""
    for depth in (8, 16):
        document = PSDImage.new("RGB", (4, 4), depth=depth)
        document.create_pixel_layer_from_array(np.full((4, 4, 4), 100 / 255, np.float32), name="one")
        document.image_resources[Resource.ICC_PROFILE] = ImageResource(key=Resource.ICC_PROFILE, data=linear_srgb())
        stack, notes = loaded(document, tmp_path / f"profile{depth}.psd")
        found = eight_bit(stack.layers[0].image)
        assert np.abs(found[..., :3] - srgb_of(100)).max() <= 1 and np.abs(found[..., 3] - 100).max() == 0
        told = [
            "The file's colours of more than 8 bits are converted to 8, because of its colour profile or colour mode."
        ]
        assert notes == (told if depth == 16 else [])


def test_what_photoshop_draws_a_layer_by_is_told_where_it_is_not_read(tmp_path):
    document = PSDImage.new("RGB", (4, 4))
    layers = [
        document.create_pixel_layer(block((9, 9, 9)), name=name) for name in ("range", "knocked", "none", "plain")
    ]
    layers[0]._record.blending_ranges.composite_ranges[0] = (0, 32768)
    layers[1].tagged_blocks.set_data(Tag.KNOCKOUT_SETTING, 1)
    layers[2].tagged_blocks.set_data(Tag.BLEND_CLIPPING_ELEMENTS, 0)
    layers[2]._record.blending_ranges = LayerBlendingRanges(None, None)  # as some programs write them
    stack, notes = loaded(document, tmp_path / "more.psd")
    assert len(stack.layers) == 4
    assert notes == [
        "The Blend If ranges of layer 'range' are not read.",
        "The knockout of layer 'knocked' is not read.",
        "The setting 'Blend Clipped Layers as Group' of layer 'none' is not read.",
    ]


def test_layers_overlap_where_both_draw_and_layers_far_apart_cost_no_memory():
    """Against counting on one canvas; the last two are a million pixels apart, more than any canvas would hold."""
    from strata.formats.groups import _overlap
    from strata.techniques.layers import Layer

    found = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        count, layers = torch.zeros(24, 24), []
        for _ in range(3):
            y, x, height, width = (int(torch.randint(1, 12, (), generator=generator)) for _ in range(4))
            image = (torch.rand(height, width, 4, generator=generator) > 0.8).float()
            layers.append(Layer(image, "layer", x=x, y=y))
            count[y : y + height, x : x + width] += image[..., 3]
        assert _overlap(layers) == bool((count > 1).any())
        found.append(_overlap(layers))
    assert 5 < sum(found) < 35
    assert not _overlap([Layer(torch.ones(2, 2, 4), "here"), Layer(torch.ones(2, 2, 4), "there", x=10**6, y=10**6)])


def test_a_group_that_layers_are_clipped_to_does_not_pass_through(tmp_path):
    """Its multiply layer would darken what is behind the group; a base is made for itself, gray as it is."""
    document = PSDImage.new("RGB", (4, 4))
    document.create_pixel_layer(block((100, 150, 200)), name="behind")
    inner = document.create_pixel_layer(block((128, 128, 128)), name="inner")
    inner.blend_mode = BlendMode.MULTIPLY
    document.create_group([inner], name="group").blend_mode = BlendMode.PASS_THROUGH
    document.create_pixel_layer(block((255, 0, 0), (2, 4)), name="clipped").clipping = True
    stack, notes = loaded(document, tmp_path / "base.psd")
    found = eight_bit(picture(stack))
    assert (found[:, :2] == [255, 0, 0, 255]).all() and (found[:, 2:] == [128, 128, 128, 255]).all()
    assert not any("do not reach what is behind" in note for note in notes)
