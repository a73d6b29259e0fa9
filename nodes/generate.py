"""Pictures made here: the scene renderer."""

import torch
from comfy_api.latest import io

from ..scenes.renderer import KINDS, MOST_OBJECTS, Request, Scene, SceneObject, catalogue, render
from ..techniques.layers import Layer, LayerStack, write_layers
from .sampling import seed_input
from .sockets import Layers, Node, schema


class RenderScene(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Strata_RenderScene",
            display_name="Render a layered scene",
            category="Strata/Generate",
            search_aliases=["synthetic scene", "example layers", "ground truth", "test image"],
            description="Draws objects with shadows on a ground plane and returns the image with its exact layers, "
            "depth and masks.",
            inputs=[
                io.Combo.Input(
                    "kind",
                    options=["random", *KINDS],
                    default="random",
                    tooltip="The place; random draws one from the seed.",
                ),
                io.String.Input(
                    "objects",
                    default="",
                    tooltip="Names with commas between them, such as: house, dog, pumpkin (nearest last). "
                    f"Empty draws them from the seed. Known: {', '.join(catalogue())}.",
                ),
                io.Int.Input(
                    "count",
                    default=2,
                    min=0,
                    max=MOST_OBJECTS,
                    tooltip="How many objects to draw when none are named; 0 leaves the place empty.",
                ),
                io.Int.Input("width", default=512, min=64, max=2048, tooltip="Width in pixels."),
                io.Int.Input("height", default=512, min=64, max=2048, tooltip="Height in pixels."),
                seed_input("The same seed gives the same image."),
                io.Boolean.Input(
                    "shadows",
                    default=True,
                    optional=True,
                    tooltip="Whether the layers bring their shadows along. Off, they are bare cut-outs, "
                    "as for Harmonize layers; the image has its shadows either way.",
                ),
                io.Boolean.Input(
                    "bright_side",
                    default=False,
                    optional=True,
                    tooltip="on: the place is brighter on the side that the light comes from, so that an empty place "
                    "shows where shadows fall. The Flux-Fill and BFS of the mini family know such places.",
                ),
            ],
            outputs=[
                io.Image.Output("IMAGE", display_name="image", tooltip="The whole image."),
                io.Image.Output(
                    "BACKGROUND",
                    display_name="background",
                    tooltip="The same place without the objects and their shadows.",
                ),
                Layers.Output(
                    "LAYERS",
                    display_name="layers",
                    tooltip="Background and an object with its shadow per layer, back to front; flattened they are "
                    "the image.",
                ),
                io.Image.Output(
                    "DEPTH", display_name="depth", tooltip="Exact depth, near is black: 0 = nearest, 1 = farthest."
                ),
                io.Mask.Output(
                    "MASKS",
                    display_name="masks",
                    tooltip="One per layer, back to front: 1 where that layer is in front. They sum to one.",
                ),
                io.String.Output("PROMPT", display_name="prompt", tooltip="A sentence that says what is in the image."),
            ],
        )

    @classmethod
    def execute(cls, kind, objects, count, width, height, seed, shadows=True, bright_side=False):
        names = tuple(name.strip().lower() for name in objects.split(",") if name.strip())
        request = Request(None if kind == "random" else kind, names or None, count, bright_side=bright_side)
        scene = render(request, height, width, seed)
        layers = write_layers(_scene_layers(scene, (width, height), shadows))
        depth = _tensor(scene.depth)[None, ..., None].expand(-1, -1, -1, 3)
        pictures = (_tensor(picture)[None] for picture in (scene.composite, scene.background))
        return io.NodeOutput(*pictures, layers, depth, _tensor(scene.masks), scene.prompt)


def _tensor(array) -> torch.Tensor:
    return torch.from_numpy(array)


def _scene_layers(scene: Scene, canvas: tuple[int, int], shadows: bool) -> LayerStack:
    strata = {"prompt": scene.background_prompt, "depth": (0.0, 1.0)}
    back = Layer(_tensor(scene.background), "background", extra={"strata": strata})
    return LayerStack(canvas, (back, *(_layer(item, shadows) for item in scene.objects)))


def _layer(item: SceneObject, shadow: bool) -> Layer:
    strata = {"prompt": item.prompt, "depth": (item.depth, item.depth)}
    return Layer(_tensor(item.rgba_with_shadow if shadow else item.rgba), item.name, extra={"strata": strata})


NODES = [RenderScene]
