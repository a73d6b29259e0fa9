"""Layers made, changed, arranged, flattened and looked at."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import ImageColor

from ..formats.raster import modes_note, to_bytes, with_formulas
from ..formats.sheet import contact_sheet
from ..techniques import arrange, geometry, received
from ..techniques.compositing import flatten_image, preview
from ..techniques.layers import BLEND_MODES, MAX_SIDE, LayerStack, read_layers, write_layers
from .inputs import named, save_temporary
from .sockets import Layers, Node, schema, told

SELECT = (
    "Which layers: numbers from 1 at the back, ranges and names, as in: 1, 3-5, Sky. A name with a comma, or one that "
    "is a number, goes in double quotes. Empty means all."
)


def layers_output():
    return Layers.Output(display_name="layers", tooltip="The LAYERS document, back to front.")


def layers_input(tooltip: str = "A LAYERS document, from any node that makes layers.", optional: bool = False):
    return Layers.Input("layers", optional=optional, tooltip=tooltip)


class LayersFromImages(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Strata_LayersFromImages",
            display_name="Layers from images (masks to layers)",
            category="Strata/Layers",
            description="Turns every image of a batch into a layer, the first one at the back.",
            search_aliases=["batch to layers", "stack images", "cut out by mask"],
            inputs=[
                io.Image.Input(
                    "images",
                    tooltip="RGB or RGBA images; the first becomes the back layer. The canvas takes their size.",
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="Transparency, 1 = transparent (as Load Image gives it): one mask for all images or "
                    "one for each, of the same size. It multiplies with the alpha of RGBA images; where it is that "
                    "alpha over again, it counts once.",
                ),
                layers_input(
                    "When connected, the new layers go on top of these and the canvas stays theirs.", optional=True
                ),
                io.String.Input(
                    "names",
                    multiline=True,
                    default="",
                    tooltip="Layer names, one per line, back to front. Layers with an empty line or none are "
                    "called Layer 1, Layer 2 and so on.",
                ),
                io.Image.Input(
                    "original",
                    optional=True,
                    tooltip="For layers of a decomposer: the image that they are of, of any size. It helps to find "
                    "what their alpha means, which of them is the whole image, and their order.",
                ),
                io.Combo.Input(
                    "alpha",
                    options=list(received.ALPHAS),
                    default=received.ALPHAS[0],
                    optional=True,
                    tooltip="What the alpha of the images means. straight: colours are as they are. premultiplied: "
                    "colours are darkened by it. inverted: 1 is transparent, in masks 1 is opaque. auto finds it.",
                ),
                io.Boolean.Input(
                    "drop",
                    default=False,
                    optional=True,
                    tooltip="Leave out images that are blank, there twice, or the whole image among its layers, as "
                    "Qwen-Image-Layered gives it first. The node says which.",
                ),
                io.Combo.Input(
                    "order",
                    options=list(received.ORDERS),
                    default=received.ORDERS[0],
                    optional=True,
                    tooltip="as given: the first image at the back. reversed: the last one. by recomposition: the "
                    "order in which they make up the original best.",
                ),
                io.Boolean.Input(
                    "crop",
                    default=False,
                    optional=True,
                    tooltip="Cut every layer to what is seen of it. It stays where it is on the canvas.",
                ),
            ],
            outputs=[layers_output()],
        )

    @classmethod
    def execute(cls, images, names, masks=None, layers=None, original=None, **wishes):
        below = None if layers is None else read_layers(layers)
        grown = arrange.from_images(images, masks, names, below)
        before = len(grown.layers) - len(images)
        of_images = LayerStack((images.shape[2], images.shape[1]), grown.layers[before:])
        new, notes = received.take_in(of_images, _only(original), received.Wishes(**wishes))
        return shown_layers(grown.with_layers((*grown.layers[:before], *new.layers)), notes=notes)


def _only(original: torch.Tensor | None) -> torch.Tensor | None:
    if original is not None and len(original) != 1:
        raise ValueError(
            f"original: there are {len(original)} images and the layers are of one; connect a single image."
        )
    return None if original is None else original[0]


def image_inputs(image: str, mask: str, optional: bool) -> list:
    return [
        io.Image.Input("image", optional=optional, tooltip=image),
        io.Mask.Input("mask", optional=True, tooltip=mask),
    ]


def field_inputs(name: str) -> list:
    """A layer's fields. name: the tooltip of its name."""
    place = {"min": -MAX_SIDE, "max": MAX_SIDE}
    size = {"default": 0, "min": 0, "max": MAX_SIDE}
    turn = {"default": 0.0, "min": -360.0, "max": 360.0, "step": 1.0, "round": 0.001}
    return [
        io.String.Input("name", default="", tooltip=name),
        io.Int.Input("x", default=0, **place, tooltip="Left side on the canvas in pixels; may be negative."),
        io.Int.Input("y", default=0, **place, tooltip="Top side on the canvas in pixels; may be negative."),
        io.Int.Input("w", **size, tooltip="Width on the canvas in pixels; 0 is the image's own."),
        io.Int.Input("h", **size, tooltip="Height on the canvas in pixels; 0 is the image's own."),
        io.Float.Input("rotation", **turn, tooltip="Degrees clockwise about the centre."),
        io.Boolean.Input("flip_h", default=False, tooltip="Mirror left and right."),
        io.Boolean.Input("flip_v", default=False, tooltip="Mirror top and bottom."),
        io.Float.Input(
            "opacity", default=1.0, min=0.0, max=1.0, step=0.01, tooltip="1 shows the layer fully, 0 not at all."
        ),
        io.Combo.Input(
            "blend_mode",
            options=list(BLEND_MODES),
            default="normal",
            tooltip="How the layer mixes with what is behind it. "
            "Saved in files; Flatten layers knows the sixteen of W3C (normal to exclusion, hue to luminosity).",
        ),
        io.Boolean.Input("visible", default=True, tooltip="Whether the layer is shown."),
    ]


def fields_input(when: str = ""):
    return io.String.Input(
        "fields",
        default="",
        tooltip=f"{when}The fields to set, as in: x, y, opacity. Empty sets those that differ "
        "from their default above and keeps the rest; to set one back to its default, name it here.",
    )


def _added(layers, image, mask, below, rotation, **fields) -> io.NodeOutput:
    """The images as new layers, just behind the layer that `below` names, or in front of all."""
    stack = None if layers is None else read_layers(layers)
    fields = arrange.chosen_fields({**fields, "rotation": math.radians(rotation)}, "")
    return shown_layers(arrange.insert(stack, image, mask, below, fields))


def _changed(layers, layer, image, mask, fields, rotation, **values) -> io.NodeOutput:
    fields = arrange.chosen_fields({**values, "rotation": math.radians(rotation)}, fields)
    stack = arrange.change(read_layers(layers), layer, image, mask, fields)
    notes = [] if fields or image is not None or mask is not None else [NOTHING]
    return io.NodeOutput(write_layers(stack), ui=told(notes) or None)


NOTHING = (
    "Nothing was changed: every value is its default, which is kept as it was in the layer; to set one back to its "
    "default, name it in fields."
)


def shown_layers(stack: LayerStack, *further, notes: Sequence[str] = ()) -> io.NodeOutput:
    """New layers as a document, with these notes, and one where a layer hides all that is behind it."""
    hiding = [
        f"Layer {name!r} has no transparent pixel and hides everything behind it; give it a mask, or load its file "
        "with Load layer image, which keeps the alpha."
        for name in arrange.covering(stack)[-1:]
    ]
    return io.NodeOutput(write_layers(stack), *further, ui=told([*notes, *hiding]) or None)


class SetLayer(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Strata_SetLayer",
            display_name="Set layer",
            category="Strata/Layers",
            description="Superseded by Add layer and Change layer, which have fewer inputs each; it goes on working. "
            "Adds an image as a new layer, or changes fields of the layers that are there.",
            search_aliases=["edit layer", "layer opacity", "layer blend mode"],
            inputs=[
                layers_input(
                    "The layers to add to or to change. Not needed to append the first layer of a new document.",
                    optional=True,
                ),
                *image_inputs(
                    "Image of the layer, RGB or RGBA. Needed for a new layer; a batch makes several. "
                    "When changing, leave it open to keep the image.",
                    "Transparency, 1 = transparent, of the image's size. When changing, leave it open to "
                    "keep the mask.",
                    optional=True,
                ),
                io.Combo.Input(
                    "action",
                    options=["append", "insert below", "change"],
                    default="append",
                    tooltip="append: a new layer in front of "
                    "all. insert below: a new layer just behind the one named in layer. change: set fields of the "
                    "layers named in layer.",
                ),
                io.String.Input("layer", default="", tooltip=f"For change and insert below. {SELECT}"),
                *field_inputs("Name of the layer. Empty keeps the name, or gives a new layer a number."),
                fields_input("For change: "),
            ],
            outputs=[layers_output()],
        )

    @classmethod
    def execute(cls, action, layer, fields, layers=None, image=None, mask=None, **values):
        if action == "change":
            _need(layers, "layers: connect the layers to change, or use the action append.")
            return _changed(layers, layer, image, mask, fields, **values)
        _need(image, f"image: connect an image for the new layer, or use the action change; {action} needs one.")
        if action == "insert below":
            return _added(layers, image, mask, layer, **values)
        return _added(layers, image, mask, None, **values)


class AddLayer(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Strata_AddLayer",
            display_name="Add layer (paste image)",
            category="Strata/Layers",
            description="Adds an image as a new layer, in front of all or behind one of them.",
            search_aliases=["new layer", "append layer", "insert layer", "paste as layer"],
            inputs=[
                layers_input("The layers to add to. Without them a new document begins.", optional=True),
                *image_inputs(
                    "Image of the new layer, RGB or RGBA; a batch makes several layers.",
                    "Transparency, 1 = transparent, of the image's size.",
                    optional=False,
                ),
                io.String.Input(
                    "below",
                    default="",
                    tooltip="The layer that the new one goes just behind: its name, or its number from 1 at the back. "
                    "Empty puts it in front of all.",
                ),
                *field_inputs("Name of the layer. Empty gives it a number."),
            ],
            outputs=[layers_output()],
        )

    @classmethod
    def execute(cls, image, below, layers=None, mask=None, **fields):
        with named("below", "layer"):
            return _added(layers, image, mask, below.strip() or None, **fields)


class ChangeLayer(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Strata_ChangeLayer",
            display_name="Change layer (opacity, blend mode)",
            category="Strata/Layers",
            description="Changes the name, place, size, opacity, blend mode, visibility, image or mask of layers.",
            search_aliases=["edit layer", "layer opacity", "layer blend mode", "hide layer", "replace layer image"],
            inputs=[
                layers_input("The layers to change."),
                io.String.Input("layer", default="", tooltip=SELECT),
                *field_inputs("The new name. Empty keeps the name."),
                fields_input(),
                *image_inputs(
                    "A new image for the layer; leave it open to keep the image.",
                    "A new mask, 1 = transparent, of the image's size; leave it open to keep the mask.",
                    optional=True,
                ),
            ],
            outputs=[layers_output()],
        )

    @classmethod
    def execute(cls, layers, layer, fields, image=None, mask=None, **values):
        return _changed(layers, layer, image, mask, fields, **values)


class TransformLayer(Node):
    @classmethod
    def define_schema(cls):
        reach = {"min": -MAX_SIDE, "max": MAX_SIDE, "step": 1.0, "round": 0.0001}
        return schema(
            node_id="Strata_TransformLayer",
            display_name="Transform layer (move, scale, rotate)",
            category="Strata/Layers",
            description="Fits, flips, scales, turns and moves layers, in this order. Pixels are not resampled until "
            "the layers are flattened. An object's effects come along.",
            search_aliases=["move layer", "scale layer", "rotate layer", "flip layer", "fit layer"],
            inputs=[
                layers_input(),
                io.String.Input("select", default="", tooltip=SELECT),
                io.Combo.Input(
                    "fit",
                    options=list(geometry.FITS),
                    default="none",
                    tooltip="First size and centre the layer, as it is before "
                    "rotation: contain (wholly visible), cover (no gap), stretch (exactly the canvas), centre (keep "
                    "the size).",
                ),
                io.Boolean.Input("flip_h", default=False, tooltip="Mirror left and right, as seen on the canvas."),
                io.Boolean.Input("flip_v", default=False, tooltip="Mirror top and bottom, as seen on the canvas."),
                io.Float.Input(
                    "scale",
                    default=1.0,
                    min=0.001,
                    max=1000.0,
                    step=0.01,
                    round=0.0001,
                    tooltip="Factor on the size; 2 doubles it.",
                ),
                io.Float.Input(
                    "rotation", default=0.0, min=-360.0, max=360.0, step=1.0, round=0.001, tooltip="Degrees clockwise."
                ),
                io.Combo.Input(
                    "about",
                    options=["layer centre", "canvas centre", "canvas top left"],
                    default="layer centre",
                    tooltip="The point that stays where it is in flip, scale and rotation. The canvas points keep "
                    "several layers together.",
                ),
                io.Combo.Input(
                    "unit",
                    options=["pixels", "fractions"],
                    default="pixels",
                    tooltip="Of move_x and move_y: pixels, or fractions of the "
                    "canvas's width and height (0.5 is half of it).",
                ),
                io.Float.Input("move_x", default=0.0, **reach, tooltip="Move to the right; negative: left."),
                io.Float.Input("move_y", default=0.0, **reach, tooltip="Move down; negative: up."),
            ],
            outputs=[layers_output()],
        )

    @classmethod
    def execute(cls, layers, select, fit, flip_h, flip_v, scale, rotation, about, unit, move_x, move_y):
        stack = read_layers(layers)
        move = geometry.in_pixels((move_x, move_y), unit, stack.canvas)
        changes = {
            "pivot": geometry.pivot(about, stack.canvas),
            "move": move,
            "scale": scale,
            "rotation": math.radians(rotation),
            "flip_h": flip_h,
            "flip_v": flip_v,
        }
        return io.NodeOutput(write_layers(arrange.transform_layers(stack, select, fit, **changes)))


class OrderLayers(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Strata_OrderLayers",
            display_name="Order layers (merge, rename)",
            category="Strata/Layers",
            description="Picks, drops, reorders, renames or merges layers.",
            search_aliases=[
                "merge layers",
                "rename layers",
                "pick layers",
                "drop layers",
                "delete layer",
                "reorder layers",
            ],
            inputs=[
                layers_input(),
                io.Combo.Input(
                    "action",
                    options=list(arrange.ACTIONS),
                    default="pick",
                    tooltip="pick: keep these, in the order written. drop: remove these. "
                    "reorder: all layers, in the order written, back to front. bring to front, send to back: move "
                    "these. reverse: turn the order of these round. rename: see names. merge: flatten neighbouring "
                    "layers into one; hidden ones are left out.",
                ),
                io.String.Input("select", default="", tooltip=SELECT),
                io.String.Input(
                    "names",
                    multiline=True,
                    default="",
                    tooltip="For rename: the new names, one per line, in the order of select. For "
                    "merge: the name of the merged layer; empty takes the name of its nearest layer.",
                ),
            ],
            outputs=[layers_output()],
        )

    @classmethod
    def execute(cls, layers, action, select, names):
        return io.NodeOutput(write_layers(arrange.arrange(read_layers(layers), action, select, names)))


class FlattenLayers(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Strata_FlattenLayers",
            display_name="Flatten layers (merge, composite)",
            category="Strata/Layers",
            description="Composites the visible layers into one image.",
            search_aliases=["composite layers", "merge visible", "layers to image"],
            inputs=[
                layers_input(),
                io.Combo.Input(
                    "blending",
                    options=["sRGB", "linear light"],
                    default="sRGB",
                    tooltip="sRGB mixes the stored values, as image editors "
                    "do, and gives a sliced image back as it was. linear light mixes light, as ComfyUI's layer "
                    "editor does.",
                ),
                io.String.Input(
                    "background",
                    default="transparent",
                    tooltip="What is behind the layers: transparent (the image is then RGBA), or a "
                    "colour such as #ffffff, #fff or white; #ff000080 is half transparent.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="image",
                    tooltip="The image at canvas size: RGB on an opaque background, otherwise RGBA.",
                ),
                io.Mask.Output(display_name="mask", tooltip="Transparency of the image, 1 = transparent."),
            ],
        )

    @classmethod
    def execute(cls, layers, blending, background):
        image, alpha = flatten_image(read_layers(layers), _colour(background), blending == "linear light")
        return io.NodeOutput(image[None], 1 - alpha[None])


class LayersToBatch(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Strata_LayersToBatch",
            display_name="Layers to batch (images and masks)",
            category="Strata/Layers",
            description="Gives the layers to nodes that know images and masks only, one image per layer, back to "
            "front.",
            search_aliases=["layers to images", "split layers"],
            inputs=[
                layers_input(),
                io.Boolean.Input(
                    "at_canvas_size",
                    default=True,
                    tooltip="On: every layer as it is placed on the canvas. Off: every layer's own "
                    "pixels, which must all have the same size.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="images",
                    tooltip="One RGBA image per layer, back to front, hidden ones too; opacity and mask are in "
                    "the alpha.",
                ),
                io.Mask.Output(display_name="masks", tooltip="Transparency of the images, 1 = transparent."),
                io.String.Output(display_name="names", tooltip="The layers' names, one per line, in the same order."),
            ],
        )

    @classmethod
    def execute(cls, layers, at_canvas_size):
        stack = read_layers(layers)
        images = arrange.to_batch(stack, at_canvas_size)
        return io.NodeOutput(images, 1 - images[..., 3], "\n".join(layer.name for layer in stack.layers))


class PreviewLayers(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Strata_PreviewLayers",
            display_name="Preview layers (show, contact sheet)",
            category="Strata/Layers",
            is_output_node=True,
            description="Shows the flattened image and every layer on a checkerboard, back to front with their names, "
            "hidden ones too, as one image.",
            search_aliases=["show layers", "view layers", "contact sheet"],
            inputs=[layers_input()],
            outputs=[Layers.Output(display_name="layers", tooltip="The same layers, unchanged.")],
        )

    @classmethod
    def execute(cls, layers):
        stack = read_layers(layers)
        pictures = preview(with_formulas(stack))
        shown = {
            "images": [save_temporary(sheet(stack, pictures))],
            "strata_pictures": ui.PreviewImage(pictures, cls=cls).as_dict()["images"],
        }
        return io.NodeOutput(layers, ui=shown | told(modes_note(stack.layers, "The preview")))


def sheet(stack: LayerStack, pictures: torch.Tensor) -> np.ndarray:
    """What `preview` gives of a stack, beside each other with the layers' names: bytes [H,W,3]."""
    names = [
        f"{number} {layer.name}{'' if layer.visible else ' (hidden)'}" for number, layer in enumerate(stack.layers, 1)
    ]
    return contact_sheet(to_bytes(pictures), ["flattened", *names])


def _need(value, message: str) -> None:
    if value is None:
        raise ValueError(message)


def _colour(text: str) -> tuple[float, float, float, float]:
    """A colour as people write it, to sRGB and alpha in 0..1."""
    if text.strip().lower() in ("", "transparent"):
        return 0.0, 0.0, 0.0, 0.0
    try:
        red, green, blue, *alpha = ImageColor.getrgb(text.strip())
    except ValueError:
        raise ValueError(
            f"background: {text!r} is not a colour; write transparent, a hex colour such as #ffffff, or a name such "
            "as white."
        ) from None
    return red / 255, green / 255, blue / 255, (alpha[0] / 255 if alpha else 1.0)


NODES = [
    LayersFromImages,
    AddLayer,
    ChangeLayer,
    SetLayer,
    TransformLayer,
    OrderLayers,
    FlattenLayers,
    LayersToBatch,
    PreviewLayers,
]
