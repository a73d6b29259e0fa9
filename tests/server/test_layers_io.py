"""Files in and out through the real server: what is saved is loaded back equal, and nothing bad ends it."""

import io
import json
import re
import zipfile

import numpy as np
import pytest
import requests
import run
from PIL import Image
from psd_tools import PSDImage
from psd_tools.constants import BlendMode
from strata.formats import files, openraster, png, psd
from strata.formats.raster import picture
from strata.techniques.layers import Layer, LayerStack, parent_of

MODULES = {"PSD": psd, "OpenRaster": openraster}


def pixels(seed, *shape):
    import torch

    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape).astype(np.float32) / 255)


def stack():
    return LayerStack(
        (12, 10),
        (
            Layer(pixels(1, 10, 12, 3), "sky"),
            Layer(pixels(2, 6, 5, 4), "a/b 漢", None, -2, 7, opacity=0.5, blend_mode="screen"),
            Layer(pixels(3, 3, 3, 4), "off", None, 4, 4, visible=False),
        ),
    )


@pytest.fixture(scope="module")
def source(comfy, tmp_path_factory):
    """A PSD in the input folder, put there as the upload button does it."""
    folder = tmp_path_factory.mktemp("source")
    (path,) = files.save(folder, "layers_io", stack(), picture(stack()), "PSD", {})
    return comfy.upload(path)


def save(comfy, file, format, prefix="io/strata"):
    return comfy.run(
        {
            "1": {"class_type": "Strata_LoadLayers", "inputs": {"file": file}},
            "2": {
                "class_type": "Strata_SaveLayers",
                "inputs": {"layers": ["1", 0], "filename_prefix": prefix, "format": format},
            },
        }
    )


def flattened(comfy, file):
    """What a graph sees of a file: the IMAGE output of Load layers joined with its MASK, as SaveImage writes them."""
    entry = comfy.run(
        {
            "1": {"class_type": "Strata_LoadLayers", "inputs": {"file": file}},
            "2": {"class_type": "JoinImageWithAlpha", "inputs": {"image": ["1", 1], "alpha": ["1", 2]}},
            "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "io/flat"}},
        }
    )
    return np.array(Image.open(io.BytesIO(comfy.download(comfy.files(entry)[0]))))


@pytest.mark.parametrize("format", ["PSD", "OpenRaster"])
def test_document_saved_and_loaded_again_is_equal(comfy, source, format, tmp_path):
    (reference,) = comfy.files(save(comfy, source, format))
    assert reference["subfolder"] == "io"
    path = tmp_path / reference["filename"]
    path.write_bytes(comfy.download(reference))
    for ours, theirs in zip(stack().layers, files.load(path).layers, strict=True):
        assert np.array_equal(np.rint(ours.image.numpy() * 255), np.rint(theirs.image.numpy() * 255))
        assert [
            getattr(ours, key) == getattr(theirs, key) for key in ("name", "x", "y", "opacity", "blend_mode", "visible")
        ] == [True] * 6
    assert "Strata_SaveLayers" in json.dumps(MODULES[format].read_metadata(path)["prompt"])
    assert "workflow" in MODULES[format].read_metadata(path)
    assert np.array_equal(flattened(comfy, source), flattened(comfy, f"io/{reference['filename']} [output]"))


@pytest.mark.parametrize("format", ["PNG layers", "WebP layers"])
def test_pictures_carry_the_workflow(comfy, source, format):
    references = comfy.files(save(comfy, source, format))
    assert len(references) == 4
    metadata = png.read_metadata(io.BytesIO(comfy.download(references[1])))
    assert metadata["strata"]["name"] == "a/b 漢" and "prompt" in metadata and "workflow" in metadata
    last = Image.open(io.BytesIO(comfy.download(references[-1]))).convert("RGBA")
    assert np.array_equal(np.array(last), np.rint(picture(stack()).numpy() * 255))


def test_a_preview_is_shown_beside_the_document(comfy, source):
    entry = save(comfy, source, "PSD", "io/preview")
    (shown,) = [item for output in entry["outputs"].values() for item in output.get("images", [])]
    assert shown["type"] == "temp" and Image.open(io.BytesIO(comfy.download(shown))).size == (12, 10)


def test_nothing_is_overwritten(comfy, source):
    first, second = (comfy.files(save(comfy, source, "PSD", f"io/twice{subfolder}"))[0] for subfolder in ("", "/"))
    assert (first["filename"], second["filename"]) == ("twice_00001_.psd", "twice_00002_.psd")


def test_dates_and_sizes_in_the_prefix(comfy, source):
    (reference,) = comfy.files(save(comfy, source, "PSD", "io/%date:yyyy%-%width%x%height%"))
    assert reference["filename"].endswith("-12x10_00001_.psd") and reference["filename"][:4].isdigit()


@pytest.mark.parametrize("prefix", ["../x", "a/../../x", "/tmp/x", "io/../../output2/x"])
def test_nothing_is_written_outside_the_output_folder(comfy, source, prefix):
    before = sorted(comfy.server.base.rglob("*.psd"))
    with pytest.raises(run.RunError, match="filename_prefix: .* leads outside ComfyUI's output folder"):
        save(comfy, source, "PSD", prefix)
    assert sorted(comfy.server.base.rglob("*.psd")) == before


@pytest.mark.parametrize("prefix", ["", ".", "../output"])
def test_a_prefix_without_a_name_is_refused(comfy, source, prefix):
    with pytest.raises(run.RunError, match="filename_prefix"):
        save(comfy, source, "PSD", prefix)


@pytest.mark.parametrize("name", ["missing.psd", "../output/io/x.psd", "/etc/passwd", ""])
def test_a_file_that_is_not_there_is_refused_before_the_run(comfy, name):
    with pytest.raises(run.RunError, match="is not a file in ComfyUI's input folder; upload a PSD or ORA file"):
        flattened(comfy, name)


def test_damaged_files_give_one_sentence_and_the_server_lives_on(comfy, source, tmp_path):
    whole = (comfy.server.base / "input" / source).read_bytes()
    (tmp_path / "cut.psd").write_bytes(whole[: len(whole) // 2])
    with zipfile.ZipFile(tmp_path / "bomb.ora", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("stack.xml", " " * 2**25)
    (tmp_path / "text.psd").write_text("hello")
    for name, message in (
        ("cut.psd", "cut.psd (is|has) damaged"),
        ("bomb.ora", "would unpack to"),
        ("text.psd", "neither a PSD nor an OpenRaster"),
    ):
        with pytest.raises(run.RunError, match=message) as caught:
            flattened(comfy, comfy.upload(tmp_path / name))
        assert "\n" not in str(caught.value)
    assert flattened(comfy, source).shape == (10, 12, 4)


def test_a_changed_file_is_loaded_again(comfy, tmp_path):
    shades = []
    for shade in (10, 200):
        layers = LayerStack((2, 2), (Layer(pixels(0, 2, 2, 3) * 0 + shade / 255, "flat"),))
        (tmp_path / "changing.psd").unlink(missing_ok=True)
        (path,) = files.save(tmp_path, "changing", layers, picture(layers), "PSD", {})
        shades.append(flattened(comfy, comfy.upload(path))[0, 0, 0])
    assert shades == [10, 200]


def test_the_upload_extension_is_served_and_new_files_are_listed(comfy, source):
    assert "Strata.LoadLayers" in comfy.get("/extensions/ComfyUI-Strata/load_layers.js").text
    options = requests.get(comfy.url + "/object_info/Strata_LoadLayers", timeout=60).json()["Strata_LoadLayers"][
        "input"
    ]["required"]["file"]
    assert source in str(options)


def test_links_in_the_folders_are_followed_as_comfyui_does(comfy, source, tmp_path):
    """Many keep models and pictures on another disk and link them."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    inputs, outputs = comfy.server.base / "input", comfy.server.base / "output"
    (elsewhere / "linked.psd").write_bytes((inputs / source).read_bytes())
    for link, target in (
        (inputs / "linked.psd", elsewhere / "linked.psd"),
        (inputs / "disk", elsewhere),
        (outputs / "disk", elsewhere),
    ):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    assert flattened(comfy, "linked.psd").shape == flattened(comfy, "disk/linked.psd").shape == (10, 12, 4)
    try:
        (reference,) = comfy.files(save(comfy, source, "PSD", "disk/saved"))
    except run.RunError as error:  # newer ones do not write through links
        assert re.search(
            r"filename_prefix: ComfyUI does not save to 'disk/saved', which leads outside its output folder by a "
            r"link; [^\n]*$",
            str(error),
        )
        return
    assert (elsewhere / reference["filename"]).exists() and reference["subfolder"] == "disk"


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "\ud800", "ä" * 150])
def test_names_that_no_file_can_have_are_one_sentence(comfy, source, name):
    with pytest.raises(
        run.RunError, match="filename_prefix: .*(cannot be the start of a file name|half of a character)"
    ) as caught:
        save(comfy, source, "PSD", name)
    assert "\n" not in str(caught.value)
    with pytest.raises(run.RunError, match="is not a file in ComfyUI's input folder"):
        flattened(comfy, f"{name}.psd")


def test_what_is_lost_is_told_on_the_node_and_groups_can_be_one_layer_each(comfy, tmp_path):
    document = PSDImage.new("RGB", (8, 6))
    document.create_pixel_layer(Image.new("RGB", (8, 6), 90), name="ground")
    inner = [document.create_pixel_layer(Image.new("RGB", (8, 6), shade), name=f"inner {shade}") for shade in (10, 200)]
    group = document.create_group(inner, name="veil")
    group.opacity = 128
    document.create_pixel_layer(Image.new("RGB", (2, 2), 9), name="odd").blend_mode = BlendMode.DISSOLVE
    document.save(tmp_path / "told.psd")
    name = comfy.upload(tmp_path / "told.psd")
    for groups, count in ((None, 3), ("one layer each", 3)):
        prompt = {
            "load": {
                "class_type": "Strata_LoadLayers",
                "inputs": {"file": name, **({"groups": groups} if groups else {})},
            },
            "batch": {"class_type": "Strata_LayersToBatch", "inputs": {"layers": ["load", 0], "at_canvas_size": True}},
            "show": {"class_type": "PreviewImage", "inputs": {"images": ["batch", 0]}},
            "text": {"class_type": "PreviewAny", "inputs": {"source": ["load", 3]}},
        }
        outputs = comfy.run(prompt)["outputs"]
        told = outputs["load"]["text"][0]
        assert told == outputs["text"]["text"][0] and len(outputs["show"]["images"]) == count
        assert "Group 'veil' is one layer now" in told and "'odd' has the blend mode dissolve" in told


def test_a_folder_that_cannot_be_made_is_one_sentence(comfy, source):
    (reference,) = comfy.files(save(comfy, source, "PSD", "io/taken"))
    for prefix in (f"io/{reference['filename']}/x", "/".join(["deep"] * 1200)):
        with pytest.raises(run.RunError, match="filename_prefix: the folder of .* cannot be used") as caught:
            save(comfy, source, "PSD", prefix)
        assert "\n" not in str(caught.value)


def test_a_blend_mode_without_a_formula_is_previewed_and_told(comfy, tmp_path):
    (path,) = files.save(
        tmp_path,
        "add",
        LayerStack(
            (12, 10), (Layer(pixels(1, 10, 12, 3), "sky"), Layer(pixels(2, 6, 5, 4), "glow", blend_mode="linear-dodge"))
        ),
        pixels(1, 10, 12, 3),
        "PSD",
        {},
    )
    outputs = comfy.run(
        {
            "load": {"class_type": "Strata_LoadLayers", "inputs": {"file": comfy.upload(path)}},
            "show": {"class_type": "Strata_PreviewLayers", "inputs": {"layers": ["load", 0]}},
        }
    )["outputs"]
    assert len(outputs["show"]["strata_pictures"]) == 3
    assert outputs["show"]["text"] == [
        "The preview shows 'glow' (linear-dodge) in blend mode normal; the layers themselves keep their modes."
    ]


SCENE = {"class_type": "Strata_RenderScene", "inputs": {"kind": "beach", "objects": "dog, frog", "count": 2}}
SCENE["inputs"] |= {"width": 96, "height": 64, "seed": 5}


def saved_scene(comfy, tmp_path, format, layers=("1", 2), nodes=None, **choices):
    """(the file, what the node says) of a rendered scene with its depth."""
    inputs = {"layers": list(layers), "filename_prefix": "io/choices", "format": format, "depth": ["1", 3], **choices}
    entry = comfy.run({"1": SCENE, "2": {"class_type": "Strata_SaveLayers", "inputs": inputs}} | (nodes or {}))
    path = tmp_path / comfy.files(entry)[0]["filename"]
    path.write_bytes(comfy.download(comfy.files(entry)[0]))
    return path, " ".join(entry["outputs"]["2"].get("text", []))


def test_sixteen_bits_masks_trimmed_layers_and_the_depth(comfy, tmp_path):
    path, told = saved_scene(comfy, tmp_path, "PSD", bits="16", trim=True, alpha_as_mask=True)
    document, notes = PSDImage.open(path), []
    assert told == "" and document.depth == 16
    *layers, depth = files.load(path, notes=notes).layers
    assert depth.name == "Depth" and not depth.visible and depth.image.shape[:2] == (64, 96) and not notes
    gray = depth.image.numpy()
    assert (gray[..., 0] == gray[..., 1]).all() and gray.max() == 1
    assert np.abs(gray * 255 - np.rint(gray * 255)).max() > 0.2, "more than 8 bits"
    assert [item.has_mask() for item in document] == [False, True, True, False]
    assert all(layer.image.shape[0] < 64 and layer.image.shape[1] < 96 for layer in layers[1:])
    plain, _ = saved_scene(comfy, tmp_path, "PSD")
    shown = [picture(files.load(each)).numpy() for each in (path, plain)]
    assert np.abs(shown[0] - shown[1]).max() <= 2.5 / 255


def test_a_small_depth_is_resized_and_what_a_format_lacks_is_told(comfy, tmp_path):
    half = {"class_type": "ImageScaleBy", "inputs": {"image": ["1", 3], "upscale_method": "area", "scale_by": 0.5}}
    path, told = saved_scene(comfy, tmp_path, "OpenRaster", bits="16", depth=["3", 0], nodes={"3": half})
    assert "bits: OpenRaster is written in 8 bits; save as PSD for 16." in told
    assert files.load(path).layers[-1].image.shape[:2] == (64, 96)


MOVED = {"fit": "none", "flip_h": False, "flip_v": False, "scale": 1.0, "rotation": 0.0, "about": "layer centre"}
MOVED |= {"unit": "pixels", "move_x": 3.0, "move_y": 0.0}


def test_groups_go_through_the_graph(comfy, tmp_path):
    document = PSDImage.new("RGB", (12, 10))
    layers = [document.create_pixel_layer(Image.new("RGBA", (4, 4), (9, 9, 9, 90)), name=name) for name in "ab"]
    document.create_group(layers, name="two").blend_mode = BlendMode.PASS_THROUGH
    document.save(tmp_path / "grouped.psd")
    prompt = {
        "1": {"class_type": "Strata_LoadLayers", "inputs": {"file": comfy.upload(tmp_path / "grouped.psd")}},
        "2": {"class_type": "Strata_TransformLayer", "inputs": MOVED | {"layers": ["1", 0], "select": "b"}},
    }
    for number, format in enumerate(MODULES, 3):
        prompt[str(number)] = {
            "class_type": "Strata_SaveLayers",
            "inputs": {"layers": ["2", 0], "filename_prefix": "io/grouped", "format": format},
        }
    for reference in comfy.files(comfy.run(prompt)):
        path = tmp_path / f"back{reference['filename']}"
        path.write_bytes(comfy.download(reference))
        back = files.load(path).layers
        assert [(layer.name, parent_of(layer), layer.x) for layer in back] == [("a", ("two",), 0), ("b", ("two",), 3)]


def layer_images(comfy, names, tmp_path):
    """What Load layer image makes of the files: layers through a PSD, the batch as PNG."""
    prompt = {
        "load": {"class_type": "Strata_LoadLayerImage", "inputs": {"files": names}},
        "psd": {
            "class_type": "Strata_SaveLayers",
            "inputs": {"layers": ["load", 0], "filename_prefix": "io/images", "format": "PSD"},
        },
        "batch": {"class_type": "SaveImage", "inputs": {"images": ["load", 1], "filename_prefix": "io/images"}},
        "masks": {"class_type": "MaskToImage", "inputs": {"mask": ["load", 2]}},
        "saved": {"class_type": "SaveImage", "inputs": {"images": ["masks", 0], "filename_prefix": "io/masks"}},
    }
    outputs = comfy.run(prompt)["outputs"]
    path = tmp_path / "images.psd"
    path.write_bytes(comfy.download(outputs["psd"]["files"][0]))
    pictures = [
        [np.array(Image.open(io.BytesIO(comfy.download(file)))) for file in outputs[node]["images"]]
        for node in ("batch", "saved")
    ]
    return files.load(path), *pictures, outputs.get("load", {}).get("text", [""])[0]


def test_image_files_become_layers_with_their_alpha(comfy, tmp_path):
    rng = np.random.default_rng(4)
    sky, tree = rng.integers(0, 256, (6, 8, 3), np.uint8), rng.integers(0, 256, (4, 2, 4), np.uint8)
    for pixels_, name in ((sky, "li_sky.png"), (tree, "li_tree.webp")):
        Image.fromarray(pixels_).save(comfy.server.base / "input" / name, lossless=True, exact=True)
    stack, batch, masks, told = layer_images(comfy, "li_sky.png\n\nli_tree.webp\n", tmp_path)
    assert [(layer.name, layer.x, layer.y) for layer in stack.layers] == [("li_sky", 0, 0), ("li_tree", 3, 1)]
    placed = np.zeros((6, 8, 4), np.uint8)
    placed[1:5, 3:5] = tree
    assert np.array_equal(batch[0][..., :3], sky) and (batch[0][..., 3] == 255).all()
    assert np.array_equal(batch[1][..., 3], placed[..., 3])
    seen = placed[..., 3] > 0
    assert np.array_equal(batch[1][seen], placed[seen])
    assert np.abs(masks[1][..., 0].astype(int) - (255 - placed[..., 3])).max() <= 1 and told == ""


def test_image_files_that_cannot_be_layers_are_named(comfy, tmp_path):
    folder = comfy.server.base / "input"
    Image.new("RGB", (8, 6)).save(folder / "li_opaque.png")
    (folder / "li_broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    for names, sentence in (
        ("li_absent.png", "files - 'li_absent.png' is not a file in ComfyUI's input folder; upload it."),
        ("../li_opaque.png", "is not a file in ComfyUI's input folder"),
        ("", "files - no file is named; upload one"),
        ("li_broken.png", "files: li_broken.png cannot be read"),
        ("\n".join(["li_opaque.png"] * 51), "files: 51 files are chosen and a LAYERS document holds 50 layers"),
    ):
        with pytest.raises(run.RunError) as caught:
            layer_images(comfy, names, tmp_path)
        assert sentence in str(caught.value) and "Traceback" not in str(caught.value)
    *_, told = layer_images(comfy, "li_opaque.png\nli_opaque.png", tmp_path)
    assert told.startswith("Layer 'li_opaque' has no transparent pixel and hides everything behind it;")
