"""Fit layers, Score layers and what Layers from images does with decomposers' batches, in a real ComfyUI."""

import json

import numpy as np
import pytest

from .graphs import Graph, assert_refused

SIZE = 64


@pytest.fixture
def graph(comfy):
    return Graph(comfy)


def scene(graph, **inputs):
    """Image and layers of a rendered scene."""
    node = graph.add("Strata_RenderScene", kind="beach", objects="apple", count=1, width=SIZE, height=SIZE, **inputs)[0]
    return [node, 0], [node, 2]


def small(graph, layers):
    """The layers' pictures at half their size, as a batch."""
    batch = graph.add("Strata_LayersToBatch", layers=layers)
    scaled = {"width": SIZE // 2, "height": SIZE // 2, "crop": "disabled"}
    masks = graph.add("MaskToImage", mask=[batch[0], 1])
    images, masks = (
        graph.add("ImageScale", image=one, upscale_method="area", **scaled) for one in ([batch[0], 0], masks)
    )
    return images, graph.add("ImageToMask", image=masks, channel="red")


def text_of(graph, source):
    node = graph.add("PreviewAny", source=source)[0]
    return graph.comfy.run(graph.prompt)["outputs"][node]["text"][0]


def test_half_sized_layers_are_fitted_and_score(graph):
    image, layers = scene(graph)
    images, masks = small(graph, layers)
    rough = graph.layers(images, masks=masks)
    fitted = graph.add("Strata_FitLayers", layers=rough, image=image)
    flat = graph.flat(fitted)
    original = graph.pictures(image)[0]
    assert flat.shape[:2] == (SIZE, SIZE) and np.abs(flat[..., :3].astype(int) - original).max() <= 1
    assert (flat[..., 3] == 255).all()
    scores = []
    for stack in (rough, fitted):
        node = graph.add("Strata_ScoreLayers", layers=stack, image=image, truth=layers)[0]
        scores.append(json.loads(text_of(graph, [node, 2])))
    before, after = scores
    assert after["within_1"] == 1 > before["within_1"] and after["recomposition"] < 0.001 < before["recomposition"]
    assert after["rgb_l1"] < before["rgb_l1"] and after["alpha_iou"] > before["alpha_iou"]
    assert after["layerd"][0]["merges"] == after["blank"] == after["duplicate"] == after["open"] == 0
    assert "Mean error of 255" in text_of(graph, [fitted[0], 1])


def test_a_limit_ends_the_prompt(graph):
    image, layers = scene(graph)
    images, masks = small(graph, layers)
    rough = graph.layers(images, masks=masks)
    graph.add("Strata_ScoreLayers", layers=rough, image=image, limits="layers <= 50\nwithin_1 >= 0.999")
    assert_refused(graph, "limits: within_1 is 0.")


def test_limits_that_are_kept_let_the_layers_through(graph):
    image, layers = scene(graph)
    kept = graph.add("Strata_ScoreLayers", layers=layers, image=image, limits="within_1 >= 0.999, worst < 0.01")
    flat = graph.flat(kept)
    assert np.abs(flat[..., :3].astype(int) - graph.pictures(image)[0]).max() <= 1


def test_a_batch_with_the_whole_image_becomes_layers(graph):
    image, layers = scene(graph)
    batch = graph.add("Strata_LayersToBatch", layers=layers)
    masked = graph.add("JoinImageWithAlpha", image=image, alpha=graph.add("SolidMask", value=0.0, width=64, height=64))
    images = graph.add("ImageBatch", image1=masked, image2=[batch[0], 0])
    found = graph.layers(images, names="all\nback\napple", drop=True, crop=True, alpha="auto", original=image)
    assert graph.names(found) == ["back", "apple"]
    assert np.abs(graph.flat(found)[..., :3].astype(int) - graph.pictures(image)[0]).max() <= 1


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"order": "by recomposition"}, "order: by recomposition needs the image"),
        ({"original": "two"}, "original: there are 2 images"),
    ],
)
def test_wrong_wishes_are_refused(graph, change, sentence):
    batch = graph.colour(0xFF0000, 8, 8, 2)
    change = {name: batch if value == "two" else value for name, value in change.items()}
    graph.add("Strata_PreviewLayers", layers=graph.layers(batch, **change))
    assert_refused(graph, sentence)


def test_several_images_and_blend_modes_are_refused(graph):
    layers = graph.layers(graph.colour(0xFF0000, 8, 8, 2))
    graph.add("Strata_PreviewLayers", layers=graph.add("Strata_FitLayers", layers=layers, image=graph.rgb()))
    assert_refused(graph, "image: there are 3 images")
    graph = Graph(graph.comfy)
    layers = graph.layers(graph.rgb())
    layers = graph.add("Strata_ChangeLayer", layers=layers, layer="2", blend_mode="multiply")
    fitted = graph.add("Strata_FitLayers", layers=layers, image=graph.colour(0x808080))
    graph.add("Strata_PreviewLayers", layers=fitted)
    assert_refused(graph, "has the blend mode 'multiply'")


def test_odd_stacks_are_fitted(graph):
    """One layer, fifty, all blank, and an image without any alpha: over each other they are the image."""
    clear = graph.add("SolidMask", value=1.0, width=8, height=8)
    image = graph.colour(0x336699, 20, 12)
    for layers in (
        graph.layers(graph.colour(0xFF0000, 8, 8)),
        graph.layers(graph.colour(0x00FF00, 8, 8, 50)),
        graph.layers(graph.colour(0x0000FF, 8, 8, 3), masks=clear),
    ):
        flat = graph.flat(graph.add("Strata_FitLayers", layers=layers, image=image))
        assert flat.shape[:2] == (12, 20) and np.abs(flat[..., :3].astype(int) - [0x33, 0x66, 0x99]).max() <= 1
