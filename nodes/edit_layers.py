"""Layers arranged by hand: the node behind the editor in web/layer_editor.js."""

import math

from comfy_api.latest import io

from ..formats.raster import to_bytes
from ..techniques.geometry import content_box, rasterise
from ..techniques.layer_edits import apply_edits, read_edits
from ..techniques.layers import Layer, LayerStack, bound_to, read_layers, write_layers
from .inputs import save_temporary
from .layers_edit import layers_input, layers_output
from .sockets import Node, schema, told

LARGEST = 2048  # longer side of what the editor shows of a layer


class EditLayers(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Strata_EditLayers",
            display_name="Edit layers (layer editor, move)",
            category="Strata/Layers",
            is_output_node=True,
            description="Moves, scales, turns, orders and blends layers by hand. Run it once, then press the button on "
            "the node to open the editor.",
            search_aliases=["layer editor", "move layers", "arrange layers", "Photoshop", "compose by hand"],
            inputs=[
                layers_input(),
                io.String.Input(
                    "edits",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="What the editor has changed, as JSON; the help page says how to write it by hand. Empty "
                    "changes nothing.",
                ),
            ],
            outputs=[layers_output()],
        )

    @classmethod
    def execute(cls, layers, edits=""):
        stack = read_layers(layers)
        edited, notes = apply_edits(stack, read_edits(edits or ""))
        return io.NodeOutput(write_layers(edited), ui={"strata_layers": [editor_files(stack)]} | told(notes))


def editor_files(stack: LayerStack) -> dict:
    """What the editor draws: the layers as they come in, each with a PNG of what can be seen of it and the indices of
    the effects that go along with it.
    """
    shown = [_shown(layer) | {"bound": bound_to(stack, number)} for number, layer in enumerate(stack.layers)]
    return {"canvas": list(stack.canvas), "layers": shown}


def _shown(layer: Layer) -> dict:
    pixels = layer.rgba()
    left, top, right, bottom = content_box(pixels[..., 3])
    shrink = min(1.0, LARGEST / max(right - left, bottom - top))
    size = max(1, round((right - left) * shrink)), max(1, round((bottom - top) * shrink))
    seen = rasterise(Layer(pixels[top:bottom, left:right], w=size[0], h=size[1]), size)
    return {
        "name": layer.name,
        **{name: getattr(layer, name) for name in ("x", "y", "flip_h", "flip_v", "opacity", "blend_mode", "visible")},
        "w": layer.size[0],
        "h": layer.size[1],
        "rotation": math.degrees(layer.rotation),
        # Where the PNG lies in the layer, as fractions of its sides
        "box": [left / pixels.shape[1], top / pixels.shape[0], right / pixels.shape[1], bottom / pixels.shape[0]],
        "image": save_temporary(to_bytes(seen)),
    }


NODES = [EditLayers]
