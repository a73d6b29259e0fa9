"""The layer nodes in a real ComfyUI: every node in a graph, its pictures looked at, and the sentences that bad input
gets.
"""

import io

import numpy as np
import pytest
from PIL import Image

from .graphs import BLUE, GREEN, RED, Graph, assert_refused


@pytest.fixture
def graph(comfy):
    return Graph(comfy)


def test_layers_from_images_puts_the_first_at_the_back_and_masks_them(graph):
    mask = graph.add("SolidMask", value=0.0, width=8, height=6)
    mask = graph.add(
        "MaskComposite",
        destination=mask,
        source=graph.add("SolidMask", value=1.0, width=4, height=6),
        x=4,
        y=0,
        operation="add",
    )
    layers = graph.layers(graph.rgb(), masks=mask, names="Sky\nHill")
    flat = graph.flat(layers)
    assert flat.shape == (6, 8, 4)
    assert (flat[:, :4] == [0, 0, 255, 255]).all() and (flat[:, 4:, 3] == 0).all()
    assert graph.names(layers) == ["Sky", "Hill", "Layer 3"]
    assert graph.names(graph.layers(graph.colour(RED), layers=layers, names="Top")) == ["Sky", "Hill", "Layer 3", "Top"]


def test_set_layer_appends_inserts_and_changes(graph):
    layers = graph.add("Strata_SetLayer", image=graph.colour(RED), name="Red")
    layers = graph.add("Strata_SetLayer", layers=layers, image=graph.colour(BLUE, 2, 2), name="Dot", x=1, y=2, w=4, h=3)
    layers = graph.add(
        "Strata_SetLayer",
        layers=layers,
        image=graph.colour(GREEN, 8, 1),
        action="insert below",
        layer="dot",
        name="Bar",
        opacity=0.5,
    )
    flat = graph.flat(layers, background="black")
    assert flat.shape == (6, 8, 3)
    expected = np.zeros((6, 8, 3), np.uint8)
    expected[:] = [255, 0, 0]
    expected[0] = [127, 127, 0]
    expected[2:5, 1:5] = [0, 0, 255]
    assert np.abs(flat.astype(int) - expected).max() <= 1
    assert graph.names(layers) == ["Red", "Bar", "Dot"]
    moved = graph.add("Strata_SetLayer", layers=layers, action="change", layer="Dot", x=0, y=0, fields="x, y")
    hidden = graph.add("Strata_SetLayer", layers=moved, action="change", layer="2", visible=False)
    flat = graph.flat(hidden)
    assert (
        (flat[:3, :4] == [0, 0, 255, 255]).all()
        and (flat[3:] == [255, 0, 0, 255]).all()
        and (flat[:3, 4:] == [255, 0, 0, 255]).all()
    )


def same_as_set_layer(graph, images):
    one, other = (graph.add("Strata_FlattenLayers", layers=layers) for layers in images)
    first, second = graph.pictures(graph.add("ImageBatch", image1=one, image2=other))
    return np.array_equal(first, second)


def test_add_layer_does_what_set_layer_did(graph):
    fields = {"name": "Bar", "x": 2, "y": 1, "rotation": 30.0, "opacity": 0.5, "blend_mode": "screen", "flip_h": True}
    image = graph.colour(GREEN, 4, 3)
    for old, new in (({"action": "append"}, {}), ({"action": "insert below", "layer": "2"}, {"below": "2"})):
        layers = graph.layers(graph.rgb())
        pair = [
            graph.add("Strata_SetLayer", layers=layers, image=image, **fields, **old),
            graph.add("Strata_AddLayer", layers=layers, image=image, **fields, **new),
        ]
        assert same_as_set_layer(graph, pair)
    assert graph.names(graph.add("Strata_AddLayer", image=image)) == ["Layer 1"]
    graph.add("Strata_PreviewLayers", layers=graph.add("Strata_AddLayer", layers=layers, image=image, below="Cloud"))
    assert_refused(graph, "below: there is no layer 'Cloud'")


def test_change_layer_does_what_set_layer_did(graph):
    fields = {"layer": "2", "name": "Hill", "x": 3, "opacity": 0.5}
    mask = graph.add("SolidMask", value=0.25, width=8, height=6)
    layers = graph.layers(graph.rgb())
    pair = [
        graph.add("Strata_SetLayer", layers=layers, mask=mask, action="change", **fields),
        graph.add("Strata_ChangeLayer", layers=layers, mask=mask, **fields),
    ]
    assert same_as_set_layer(graph, pair)
    assert graph.names(pair[1]) == ["Layer 1", "Hill", "Layer 3"]
    back = graph.add("Strata_ChangeLayer", layers=pair[1], layer="Hill", fields="opacity, x, name", name="Tree")
    assert graph.names(back) == ["Layer 1", "Tree", "Layer 3"]


def shown(graph, node):
    """The lines that a node shows."""
    graph.add("Strata_PreviewLayers", layers=node)
    return graph.comfy.run(graph.prompt)["outputs"].get(node[0], {}).get("text", [""])[0].splitlines()


@pytest.mark.parametrize("node, inputs", [("Strata_SetLayer", {"action": "change"}), ("Strata_ChangeLayer", {})])
def test_a_change_of_nothing_is_told(graph, node, inputs):
    layers = graph.layers(graph.colour(RED))
    (note,) = shown(graph, graph.add(node, layers=layers, **inputs))
    assert note.startswith("Nothing was changed: every value is its default")
    assert shown(graph, graph.add(node, layers=layers, fields="opacity", **inputs)) == []


def test_layers_without_alpha_that_hide_all_behind_them_are_told(graph):
    (note,) = shown(graph, graph.layers(graph.rgb(), names="A\nB\nC"))
    assert note.startswith("Layer 'C' has no transparent pixel and hides everything behind it;")
    back = graph.layers(graph.colour(RED))
    assert shown(graph, back) == []
    assert shown(graph, graph.add("Strata_AddLayer", layers=back, image=graph.colour(BLUE, 2, 2))) == []
    (note,) = shown(graph, graph.add("Strata_AddLayer", layers=back, image=graph.colour(BLUE), name="On top"))
    assert note.startswith("Layer 'On top' has no transparent pixel")


def test_set_layer_takes_every_field(graph):
    white = graph.add("Strata_SetLayer", image=graph.colour(0x808080, 9, 9))
    mask = graph.add(
        "MaskComposite",
        destination=graph.add("SolidMask", value=0.0, width=3, height=3),
        operation="add",
        x=0,
        y=0,
        source=graph.add("SolidMask", value=1.0, width=3, height=1),
    )
    layers = graph.add(
        "Strata_SetLayer",
        layers=white,
        image=graph.colour(RED, 3, 3),
        mask=mask,
        x=3,
        y=3,
        rotation=90.0,
        flip_v=True,
        blend_mode="multiply",
    )
    flat = graph.flat(layers, background="white")
    # The first row is transparent; mirrored it is the last one, and a quarter turn clockwise takes that to the left
    # column.
    expected = np.full((9, 9, 3), 128, np.uint8)
    expected[3:6, 4:6] = [128, 0, 0]
    assert np.abs(flat.astype(int) - expected).max() <= 1


def test_transform_layer_fits_moves_scales_and_turns(graph):
    layers = graph.layers(graph.colour(RED, 16, 12))
    layers = graph.add("Strata_SetLayer", layers=layers, image=graph.colour(BLUE, 4, 2), name="Dot")

    def boxes(**inputs):
        flat = graph.flat(graph.add("Strata_TransformLayer", layers=layers, select="Dot", **inputs))
        y, x = np.nonzero(flat[..., 2] > 200)
        return int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1

    assert boxes(move_x=3, move_y=1) == (3, 1, 7, 3)
    assert boxes(move_x=0.25, move_y=0.5, unit="fractions") == (4, 6, 8, 8)
    assert boxes(fit="contain") == (0, 2, 16, 10)
    assert boxes(fit="stretch") == (0, 0, 16, 12)
    assert boxes(fit="centre", rotation=90) == (7, 4, 9, 8)
    assert boxes(scale=2.0, about="canvas top left") == (0, 0, 8, 4)
    assert boxes(flip_h=True, about="canvas centre") == (12, 0, 16, 2)


@pytest.mark.parametrize(
    "inputs, names",
    [
        ({"action": "pick", "select": "C, 1"}, ["C", "A"]),
        ({"action": "drop", "select": "2"}, ["A", "C"]),
        ({"action": "reorder", "select": "3-1"}, ["C", "B", "A"]),
        ({"action": "bring to front", "select": "A"}, ["B", "C", "A"]),
        ({"action": "rename", "select": "B", "names": "Hill"}, ["A", "Hill", "C"]),
        ({"action": "merge", "select": "2-3", "names": "Both"}, ["A", "Both"]),
    ],
)
def test_order_layers(graph, inputs, names):
    layers = graph.layers(graph.rgb(), names="A\nB\nC")
    assert graph.names(graph.add("Strata_OrderLayers", layers=layers, **inputs)) == names


def test_merging_keeps_the_picture(graph):
    half = graph.add("SolidMask", value=0.4, width=8, height=6)
    layers = graph.layers(graph.rgb(), masks=half)
    merged = graph.add("Strata_OrderLayers", layers=layers, action="merge", select="1-2")
    one, other = graph.add("Strata_FlattenLayers", layers=layers), graph.add("Strata_FlattenLayers", layers=merged)
    first, second = graph.pictures(graph.add("ImageBatch", image1=one, image2=other))
    assert np.array_equal(first, second)


def test_flatten_layers_in_both_blendings_on_a_background(graph):
    layers = graph.layers(graph.colour(0xFFFFFF), masks=graph.add("SolidMask", value=0.5, width=8, height=6))
    assert abs(int(graph.flat(layers, background="#000")[0, 0, 0]) - 127) <= 1
    again = Graph(graph.comfy)
    layers = again.layers(again.colour(0xFFFFFF), masks=again.add("SolidMask", value=0.5, width=8, height=6))
    assert abs(int(again.flat(layers, background="black", blending="linear light")[0, 0, 0]) - 187) <= 1


def test_flatten_gives_transparency_as_mask(graph):
    flatten = graph.add(
        "Strata_FlattenLayers",
        layers=graph.layers(graph.colour(RED), masks=graph.add("SolidMask", value=0.25, width=8, height=6)),
    )
    picture = graph.pictures(graph.add("MaskToImage", mask=[flatten[0], 1]))[0]
    assert np.abs(picture.astype(int) - 63).max() <= 1


def test_layers_to_batch_gives_rgba_images_and_masks(graph):
    layers = graph.layers(graph.colour(RED, 4, 4))
    layers = graph.add("Strata_SetLayer", layers=layers, image=graph.colour(BLUE, 2, 2), x=1, y=1)
    batch = graph.add("Strata_LayersToBatch", layers=layers)
    red, blue = graph.pictures(batch)
    assert (
        (red == [255, 0, 0, 255]).all() and (blue[1:3, 1:3] == [0, 0, 255, 255]).all() and blue[..., 3].sum() == 4 * 255
    )
    masks = graph.pictures(graph.add("MaskToImage", mask=[batch[0], 1]))
    assert (masks[0] == 0).all() and (masks[1][0] == 255).all() and (masks[1][1:3, 1:3] == 0).all()


def test_layers_to_batch_and_back_by_both_outputs(graph):
    mask = graph.add("SolidMask", value=0.5, width=8, height=6)
    layers = graph.layers(graph.rgb(), masks=mask)
    batch = graph.add("Strata_LayersToBatch", layers=layers)
    again = graph.add("Strata_LayersFromImages", images=batch, masks=[batch[0], 1], names="")
    assert np.array_equal(graph.flat(again), graph.flat(layers))


def test_preview_layers_shows_pictures_and_passes_the_layers_on(graph):
    mask = graph.add("SolidMask", value=0.5, width=80, height=40)
    shown = graph.add("Strata_PreviewLayers", layers=graph.layers(graph.rgb(width=80, height=40), masks=mask))
    flat = graph.add("Strata_FlattenLayers", layers=shown)
    graph.add("SaveImage", images=flat, filename_prefix="edit")
    entry = graph.comfy.run(graph.prompt)
    (sheet,) = entry["outputs"][shown[0]]["images"]
    sheet = np.asarray(Image.open(io.BytesIO(graph.comfy.download(sheet))))
    assert sheet.shape == (2 * (160 + 28 + 24) + 12, 2 * 332 + 12, 3), "four pictures, enlarged four times, with names"
    # Red on the squares, in the second cell of the first row
    assert abs(int(sheet[20, 12 + 332 + 4, 0]) - 204) <= 1
    images = entry["outputs"][shown[0]]["strata_pictures"]
    assert len(images) == 4 and {image["type"] for image in images} == {"temp"}
    pictures = [np.asarray(Image.open(io.BytesIO(graph.comfy.download(image)))) for image in images]
    assert all(picture.shape == (40, 80, 3) for picture in pictures)
    # Red on the squares.
    assert abs(int(pictures[1][0, 0, 0]) - 204) <= 1 and pictures[1][0, 0, 1] != pictures[1][0, 8, 1]


def test_a_single_pixel_goes_through_every_node(graph):
    layers = graph.layers(graph.colour(RED, 1, 1))
    layers = graph.add("Strata_SetLayer", layers=layers, image=graph.colour(BLUE, 1, 1), opacity=0.5)
    layers = graph.add("Strata_TransformLayer", layers=layers, rotation=180, flip_h=True, fit="cover")
    layers = graph.add("Strata_OrderLayers", layers=layers, action="merge")
    layers = graph.add("Strata_PreviewLayers", layers=layers)
    assert np.abs(graph.flat(layers)[0, 0].astype(int) - [127, 0, 127, 255]).max() <= 1


def test_more_than_fifty_layers(graph):
    graph.flat(graph.layers(graph.colour(RED, 2, 2, count=50)))
    again = Graph(graph.comfy)
    again.add("Strata_PreviewLayers", layers=again.layers(again.colour(RED, 2, 2, count=51)))
    assert_refused(again, "images: this makes 51 layers and a LAYERS document holds at most 50")


def test_zero_layers(graph):
    layers = graph.layers(graph.colour(RED))
    graph.add("Strata_PreviewLayers", layers=graph.add("Strata_OrderLayers", layers=layers, action="drop"))
    assert_refused(graph, "select: this drops every layer")


def test_nan_image(graph):
    """0/0 in a stock node: tone mapping an empty latent to nothing, shown as pixels."""
    latent = graph.add("EmptyLatentImage", width=64, height=64)
    latent = graph.add(
        "LatentApplyOperation", samples=latent, operation=graph.add("LatentOperationTonemapReinhard", multiplier=0.0)
    )
    image = graph.add("VAEDecode", samples=latent, vae=graph.add("VAELoader", vae_name="pixel_space"))
    graph.add("Strata_PreviewLayers", layers=graph.layers(image))
    assert_refused(graph, "images: there are NaN or infinite values in it")


def test_mismatched_sizes(graph):
    graph.add(
        "Strata_PreviewLayers",
        layers=graph.layers(graph.rgb(), masks=graph.add("SolidMask", value=0.5, width=5, height=5)),
    )
    assert_refused(graph, "masks: it is 5×5 and images is 8×6; make them the same size.")


@pytest.mark.parametrize(
    "inputs, sentence",
    [
        ({}, "image: connect an image for the new layer"),
        ({"action": "change"}, "layers: connect the layers to change"),
    ],
)
def test_set_layer_says_what_is_not_connected(graph, inputs, sentence):
    graph.add("Strata_PreviewLayers", layers=graph.add("Strata_SetLayer", **inputs))
    assert_refused(graph, sentence)


def test_blend_mode_without_formula_and_unknown_one(graph):
    layers = graph.add(
        "Strata_SetLayer",
        layers=graph.layers(graph.colour(RED)),
        image=graph.colour(BLUE),
        name="Glow",
        blend_mode="linear-dodge",
    )
    graph.add(
        "PreviewImage",
        images=graph.add("Strata_FlattenLayers", layers=layers, blending="sRGB", background="transparent"),
    )
    assert_refused(graph, "layers: layer 'Glow' has the blend mode 'linear-dodge', which has no W3C formula")
    unknown = Graph(graph.comfy)
    unknown.add(
        "Strata_PreviewLayers", layers=unknown.add("Strata_SetLayer", image=unknown.colour(BLUE), blend_mode="dissolve")
    )
    assert_refused(unknown, "dissolve")


@pytest.mark.parametrize(
    "node, inputs, sentence",
    [
        ("Strata_OrderLayers", {"select": "Cloud"}, "select: there is no layer 'Cloud'; the layers are 1 'Layer 1'"),
        ("Strata_TransformLayer", {"select": "7"}, "select: there is no layer 7; numbers run from 1 at the back to 3"),
        ("Strata_SetLayer", {"action": "change", "fields": "size"}, "fields: 'size' is not a field of a layer"),
        ("Strata_SetLayer", {"action": "change", "layer": "x"}, "layer: there is no layer 'x'"),
    ],
)
def test_selections_and_fields_that_do_not_exist(graph, node, inputs, sentence):
    graph.add("Strata_PreviewLayers", layers=graph.add(node, layers=graph.layers(graph.rgb()), **inputs))
    assert_refused(graph, sentence)


def test_background_that_is_no_colour(graph):
    graph.add(
        "PreviewImage",
        images=graph.add("Strata_FlattenLayers", layers=graph.layers(graph.colour(RED)), background="nothing"),
    )
    assert_refused(
        graph,
        "background: 'nothing' is not a colour; write transparent, a hex colour such as #ffffff, or a name such as "
        "white.",
    )
