"""The depth nodes in a real ComfyUI: what comes out is what the techniques say, and what is wrong is said in one
sentence.
"""

import io
import json

import node_files
import numpy as np
import pytest
import run
import torch
from PIL import Image
from strata.techniques import depth as deglad


@pytest.fixture(scope="module")
def inputs(comfy):
    """A picture of three planes with 16-bit depth, near = dark, a hole (0) in the far plane; uploaded as planes.png and
    planes_depth.png.
    """
    folder = comfy.server.base / "input"
    rng = np.random.default_rng(0)
    depth = np.full((48, 64), 60000, np.uint16)
    depth[10:40, 10:30], depth[15:44, 36:58] = 9000, 30000
    picture = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
    depth[0:3, 60:] = 0
    Image.fromarray(picture).save(folder / "planes.png")
    Image.fromarray(depth).save(folder / "planes_depth.png")
    np.save(folder / "planes_depth.npy", depth.astype(np.float32))
    Image.fromarray(np.zeros((48, 64), np.uint8)).save(folder / "nothing.png")
    Image.fromarray(picture[:1, :1]).save(folder / "dot.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    return picture, depth


def graph(picture="planes.png", depth="planes_depth.png", **changes):
    settings = {
        "thresholds": "0.3, 0.7",
        "points": "",
        "near_is": "black",
        "missing_depth": "auto",
        "soft_edge": 0.0,
        "refine_edges": "off",
        "refine_width": 8,
        "fill_holes": "none",
        **changes,
    }
    return {
        "image": {"class_type": "LoadImage", "inputs": {"image": picture}},
        "depth": {"class_type": "Strata_LoadDepth", "inputs": {"file": depth}},
        "slice": {
            "class_type": "Strata_SliceByDepth",
            "inputs": {"image": ["image", 0], "depth": ["depth", 0], **settings},
        },
    }


def saved(comfy, prompt, link, mask=False):
    """Run the prompt with the link saved as PNG: the pictures, 8 bit."""
    prompt = json.loads(json.dumps(prompt))
    if mask:
        prompt["as_image"] = {"class_type": "MaskToImage", "inputs": {"mask": link}}
        link = ["as_image", 0]
    prompt["save"] = {"class_type": "SaveImage", "inputs": {"images": link, "filename_prefix": "depth_test"}}
    entry = comfy.run(prompt)
    return [np.array(Image.open(io.BytesIO(comfy.download(ref)))) for ref in entry["outputs"]["save"]["images"]]


def error(comfy, prompt, preview="slice"):
    prompt["show"] = {"class_type": "PreviewImage", "inputs": {"images": [preview, 2 if preview == "slice" else 0]}}
    with pytest.raises(run.RunError) as raised:
        comfy.run(prompt)
    assert comfy.get("/queue").json() == {"queue_running": [], "queue_pending": []}
    return str(raised.value)


def test_slices_are_those_of_equation_2_on_the_16_bit_depth(comfy, inputs):
    masks = saved(comfy, graph(), ["slice", 1], mask=True)
    raw = torch.from_numpy(inputs[1].astype(np.float32))[None]
    expected = deglad.slice_masks(deglad.normalise_depth(raw, False, True), [0.3, 0.7])[0]
    assert [mask[..., 0].tolist() for mask in masks] == (expected * 255).int().tolist()
    assert sum(mask[..., 0].astype(int) for mask in masks).tolist() == [[255] * 64] * 48


def test_a_point_cuts_behind_the_object_and_the_picker_gets_its_pictures(comfy, inputs):
    entry = comfy.run(graph(thresholds="", points="0.3, 0.5; 0.7, 0.6"))
    shown = entry["outputs"]["slice"]["strata_slice"][0]
    near, far = shown["thresholds"]
    assert 0 < near < 21000 / 51000 < far < 1
    packed = np.array(Image.open(io.BytesIO(comfy.download(shown["depth"])))).astype(int)
    values = (packed[..., 0] * 256 + packed[..., 1]) / 65535
    expected = deglad.normalise_depth(torch.from_numpy(inputs[1].astype(np.float32))[None], False, True)[0].numpy()
    assert np.abs(values - expected).max() < 1e-4 and (shown["width"], shown["height"]) == (64, 48)


@pytest.mark.parametrize(
    "changes", [{}, {"soft_edge": 4.0}, {"refine_edges": "matting"}, {"fill_holes": "blurred", "soft_edge": 2.0}]
)
def test_flattening_the_layers_gives_the_picture_back(comfy, inputs, changes):
    prompt = graph(**changes)
    prompt["flat"] = {
        "class_type": "Strata_FlattenLayers",
        "inputs": {
            "layers": ["slice", 0],
            **{key: options["default"] for key, _, options, _ in widgets(comfy, "Strata_FlattenLayers")},
        },
    }
    picture = saved(comfy, prompt, ["flat", 0])[0][..., :3].astype(int)
    assert np.abs(picture - inputs[0].astype(int)).max() <= 1


def widgets(comfy, node):
    return [item for item in node_files.inputs(comfy.object_info()[node]) if "default" in item[2]]


def notes(comfy, prompt, node="slice"):
    """What the node shows as text, one sentence a line."""
    return comfy.run(prompt)["outputs"][node].get("text", [""])[0].splitlines()


def test_thresholds_are_sorted_and_layers_named(comfy, inputs):
    prompt = graph(thresholds="0.7, 0.3", names="Wall\n\nFigure")
    prompt["batch"] = {"class_type": "Strata_LayersToBatch", "inputs": {"layers": ["slice", 0], "at_canvas_size": True}}
    prompt["names"] = {"class_type": "PreviewAny", "inputs": {"source": ["batch", 2]}}
    entry = comfy.run(prompt)
    assert entry["outputs"]["names"]["text"][0].split("\n") == ["Wall", "Depth 0.30-0.70", "Figure"]
    assert entry["outputs"]["slice"]["strata_slice"][0]["thresholds"] == [0.3, 0.7]
    assert "text" not in entry["outputs"]["slice"], "nothing to tell"


def test_new_graphs_start_with_soft_edges_and_filled_holes(comfy):
    """Old ones say what they want: both inputs are required."""
    info = comfy.object_info()["Strata_SliceByDepth"]["input"]["required"]
    assert info["soft_edge"][1]["default"] == 1 and info["fill_holes"][1]["default"] == "blurred"
    prompt = graph()
    del prompt["slice"]["inputs"]["fill_holes"]
    assert "fill_holes" in error(comfy, prompt)


@pytest.mark.parametrize("near", ["black", "white"])
def test_auto_finds_what_is_near_and_says_so(comfy, inputs, near):
    ramp = np.broadcast_to(np.linspace(60000, 5000, 48).astype(np.uint16)[:, None], (48, 64))
    ramp = ramp if near == "black" else 65000 - ramp
    Image.fromarray(ramp.copy()).save(comfy.server.base / "input" / f"ramp_{near}.png")
    masks = [
        saved(comfy, graph(depth=f"ramp_{near}.png", near_is=chosen, thresholds="0.4"), ["slice", 1], mask=True)
        for chosen in ("auto", near)
    ]
    assert np.array_equal(*masks)
    output = comfy.run(graph(depth=f"ramp_{near}.png", near_is="auto"))["outputs"]["slice"]
    assert output["strata_near"] == [near]
    assert output["text"][0] == (
        f"depth: auto takes {near} as near, since it gets {'darker' if near == 'black' else 'lighter'} towards the "
        "lower edge; if that is wrong, press the flip button."
    )
    other = {"black": "white", "white": "black"}[near]
    (note,) = notes(comfy, graph(depth=f"ramp_{near}.png", near_is=other))
    assert note.startswith(f"depth: with near_is {other} the image's lower part is farther")
    assert f"choose {near}" in note


def test_flat_depth_and_depth_of_another_shape_are_told(comfy, inputs):
    prompt = graph()
    prompt["flat"] = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 40, "batch_size": 1, "color": 5}}
    prompt["slice"]["inputs"]["depth"] = ["flat", 0]
    flat, stretched = notes(comfy, prompt)
    assert flat == (
        "depth: it has the same depth everywhere, so there is nothing to cut; connect the depth of this image."
    )
    assert stretched.startswith("depth: it is 64×40 and the image 64×48, so it was stretched to another shape;")


def test_two_images_of_a_batch_are_sliced_apart(comfy, inputs):
    prompt = graph()
    prompt["both"] = {"class_type": "ImageBatch", "inputs": {"image1": ["image", 0], "image2": ["image", 0]}}
    prompt["slice"]["inputs"]["image"] = ["both", 0]
    assert len(saved(comfy, prompt, ["slice", 1], mask=True)) == 6


def test_a_transparent_picture_stays_transparent(comfy, inputs):
    folder = comfy.server.base / "input"
    alpha = np.tile(np.linspace(0, 255, 64).round().astype(np.uint8), (48, 1))
    Image.fromarray(alpha).save(folder / "planes_alpha.png")
    prompt = graph(soft_edge=4.0)
    prompt["alpha"] = {"class_type": "LoadImageMask", "inputs": {"image": "planes_alpha.png", "channel": "red"}}
    prompt["invert"] = {"class_type": "InvertMask", "inputs": {"mask": ["alpha", 0]}}
    prompt["rgba"] = {"class_type": "JoinImageWithAlpha", "inputs": {"image": ["image", 0], "alpha": ["invert", 0]}}
    prompt["slice"]["inputs"]["image"] = ["rgba", 0]
    prompt["flat"] = {
        "class_type": "Strata_FlattenLayers",
        "inputs": {
            "layers": ["slice", 0],
            **{key: options["default"] for key, _, options, _ in widgets(comfy, "Strata_FlattenLayers")},
        },
    }
    prompt["flat"]["inputs"]["background"] = "transparent"
    picture = saved(comfy, prompt, ["flat", 0])[0].astype(int)
    assert picture.shape[-1] == 4 and np.abs(picture[..., 3] - alpha).max() <= 1


def test_numpy_depth_and_another_size_give_the_same_cut(comfy, inputs):
    a, b = (
        saved(comfy, graph(depth=name), ["slice", 1], mask=True) for name in ("planes_depth.png", "planes_depth.npy")
    )
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    prompt = graph()
    prompt["half"] = {
        "class_type": "ImageScale",
        "inputs": {
            "image": ["depth", 0],
            "upscale_method": "nearest-exact",
            "width": 32,
            "height": 24,
            "crop": "disabled",
        },
    }
    prompt["slice"]["inputs"]["depth"] = ["half", 0]
    masks = saved(comfy, prompt, ["slice", 1], mask=True)
    assert np.mean([np.mean(x != y) for x, y in zip(a, masks, strict=True)]) < 0.05


def test_one_pixel_is_a_picture_too(comfy, inputs):
    assert [
        mask[0, 0, 0] for mask in saved(comfy, graph("dot.png", "dot.png", near_is="white"), ["slice", 1], mask=True)
    ] == [255, 0, 0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"names": "a\nb\nc\nd"}, ["names", "4 names for 3 layers"]),
        ({"thresholds": "1.2"}, ["thresholds", "outside of 0 to 1"]),
        ({"thresholds": "near"}, ["thresholds", "not a list of numbers"]),
        ({"thresholds": ""}, ["thresholds", "no threshold and no point"]),
        ({"points": "0.5"}, ["points", "x, y"]),
        ({"depth": "nothing.png"}, ["depth", "no valid value"]),
    ],
)
def test_bad_slicing_is_one_sentence(comfy, inputs, changes, words):
    message = error(comfy, graph(**changes))
    assert all(word in message for word in words) and "\n" not in message and message.endswith("."), message


def test_a_picture_with_nan_is_refused_and_nan_in_depth_is_filled(comfy, inputs):
    values = inputs[1].astype(np.float32) / 65535
    values[5:9, 5:9] = np.nan
    np.save(comfy.server.base / "input" / "nan.npy", values)
    prompt = graph(depth="nan.npy")
    assert len(saved(comfy, prompt, ["slice", 1], mask=True)) == 3
    prompt["slice"]["inputs"]["image"] = ["depth", 0]
    message = error(comfy, prompt)
    assert "image: there are NaN" in message and message.endswith(".")


def test_a_broken_or_missing_depth_file_is_named(comfy, inputs):
    assert "broken.png" in error(comfy, graph(depth="broken.png"))
    assert "'absent.png' is not a file in ComfyUI's input folder" in error(comfy, graph(depth="absent.png"))
    (comfy.server.base / "outside.npy").write_bytes((comfy.server.base / "input" / "planes_depth.npy").read_bytes())
    for outside in ("../outside.npy", str(comfy.server.base / "outside.npy")):
        assert "outside.npy" in error(comfy, graph(depth=outside)) and "input folder" in error(
            comfy, graph(depth=outside)
        )


def compose(**changes):
    prompt = graph()
    del prompt["slice"]
    prompt["back"] = {
        "class_type": "EmptyImage",
        "inputs": {"width": 100, "height": 40, "batch_size": 1, "color": 0x3060C0},
    }
    prompt["compose"] = {
        "class_type": "Strata_ComposeByDepth",
        "inputs": {
            "foreground": ["image", 0],
            "foreground_depth": ["depth", 0],
            "background": ["back", 0],
            "background_depth": ["back", 0],
            "threshold": 0.3,
            "near_is": "black",
            "missing_depth": "NaN only",
            "soft_edge": 0.0,
            **changes,
        },
    }
    return prompt


def test_compose_keeps_the_near_part_over_the_other_scene(comfy, inputs):
    picture = saved(comfy, compose(missing_depth="auto"), ["compose", 0])[0]
    expected = np.broadcast_to(np.array([0x30, 0x60, 0xC0], np.uint8), (48, 64, 3)).copy()
    expected[10:40, 10:30] = inputs[0][10:40, 10:30]
    assert np.abs(picture.astype(int) - expected).max() <= 1


def test_amodal_mask_is_the_box_without_what_is_nearer(comfy, inputs):
    prompt = graph()
    prompt["amodal"] = {
        "class_type": "Strata_AmodalMask",
        "inputs": {
            "image": ["image", 0],
            "depth": ["depth", 0],
            "threshold": 0.3,
            "x": 20,
            "y": 5,
            "width": 30,
            "height": 30,
            "near_is": "black",
            "missing_depth": "auto",
        },
    }
    mask = saved(comfy, prompt, ["amodal", 0], mask=True)[0][..., 0]
    expected = np.zeros((48, 64), int)
    expected[5:35, 20:50] = 255
    expected[10:40, 10:30] = 0
    assert mask.tolist() == expected.tolist()
    prompt["amodal"]["inputs"]["x"] = 500
    prompt["as_image"] = {"class_type": "MaskToImage", "inputs": {"mask": ["amodal", 0]}}
    assert "outside of the image of 64×48" in error(comfy, prompt, "as_image")


def test_the_top_view_is_a_picture_of_the_asked_height(comfy, inputs):
    prompt = graph()
    prompt["top"] = {
        "class_type": "Strata_DepthTopView",
        "inputs": {
            "image": ["image", 0],
            "depth": ["depth", 0],
            "near_is": "black",
            "missing_depth": "auto",
            "height": 64,
        },
    }
    view = saved(comfy, prompt, ["top", 0])[0]
    assert view.shape == (64, 64, 3)
    assert view[63, 10:30].any() and not view[40, 10:30].any()  # the nearest plane lies at the bottom


def estimate(model):
    return {
        "image": graph()["image"],
        "estimate": {"class_type": "Strata_EstimateDepth", "inputs": {"image": ["image", 0], "model": model}},
    }


def test_estimate_depth_names_what_is_missing(comfy, inputs):
    message = error(comfy, estimate("Depth-Anything-V2-Small-hf"), "estimate")
    assert (
        "model.safetensors" in message
        and "depth_estimation" in message
        and "https://huggingface.co/depth-anything/" in message
    )


def test_estimate_depth_equals_transformers_on_the_same_weights(comfy, inputs):
    """A Depth Anything of full structure and small width, random weights: the node against the model called
    directly.
    """
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    backbone = Dinov2Config(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=70,
        patch_size=14,
        out_features=["stage1", "stage2", "stage3", "stage4"],
        reshape_hidden_states=False,
        apply_layernorm=True,
    )
    torch.manual_seed(0)
    model = DepthAnythingForDepthEstimation(
        DepthAnythingConfig(
            backbone_config=backbone,
            reassemble_hidden_size=32,
            neck_hidden_sizes=[8, 16, 32, 32],
            fusion_hidden_size=16,
            head_hidden_size=8,
            patch_size=14,
        )
    ).eval()
    for weight in (p for p in model.parameters() if p.ndim > 1):
        torch.nn.init.normal_(weight, 0, 0.2)  # transformers' own initial weights give a depth of 1e-8: all rounding
    folder = comfy.server.base / "models" / "depth_estimation" / "tiny"
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"size": {"height": 70, "width": 70}, "ensure_multiple_of": 14})
    )
    comfy._object_info = None
    assert "tiny" in comfy.object_info()["Strata_EstimateDepth"]["input"]["required"]["model"][1]["options"]
    got = saved(comfy, estimate("tiny"), ["estimate", 0])[0][..., 0].astype(float) / 255
    pixels = torch.from_numpy(inputs[0]).float().movedim(-1, 0)[None] / 255
    pixels = torch.nn.functional.interpolate(pixels, (70, 98), mode="bicubic", antialias=True).clamp(0, 1)
    pixels = (pixels - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
        3, 1, 1
    )
    with torch.no_grad():
        depth = torch.nn.functional.interpolate(
            model(pixel_values=pixels).predicted_depth[:, None], (48, 64), mode="bilinear"
        )[0, 0]
    expected = ((depth - depth.min()) / (depth.max() - depth.min())).numpy()
    assert np.abs(got - expected).max() <= 1.01 / 255
