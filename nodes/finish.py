"""Nodes of the menu category Strata/Finish: layers made exact, layers judged, shadow and light as layers."""

from __future__ import annotations

import json
import math

import torch
from comfy_api.latest import io

from ..formats.raster import to_bytes
from ..techniques import effects, fitting, received, scoring
from ..techniques.compositing import TRANSPARENT, flatten
from ..techniques.geometry import rasterise
from ..techniques.layers import Layer, LayerStack, read_layers, write_layers
from .layers_edit import layers_input, layers_output
from .sockets import Layers, Node, schema, told

DECOMPOSERS = ["Qwen-Image-Layered", "LayerD", "See-through", "Seedream", "decompose"]
ALPHAS = ("refine", "keep")
STRETCH = 1.02  # ratio of two aspect ratios from which one is told that layers are stretched


class FitLayers(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Strata_FitLayers",
            display_name="Fit layers to the image",
            category="Strata/Finish",
            search_aliases=[*DECOMPOSERS, "upscale layers", "full size layers", "exact layers", "recompose"],
            description="Brings the layers of any decomposer to the original's size, so that over each other they are "
            "the original in every pixel.",
            inputs=[
                Layers.Input("layers", tooltip="The layers, of any size: from a decomposer, a file, or this pack."),
                io.Image.Input("image", tooltip="The image that they are of, at the size that they are to have."),
                io.Combo.Input(
                    "alpha",
                    options=list(ALPHAS),
                    default=ALPHAS[0],
                    tooltip="refine: noise is taken out of the alphas, and where layers are enlarged their edges are "
                    "looked for in the image. keep: alphas are only enlarged.",
                ),
                io.Boolean.Input(
                    "drop",
                    default=True,
                    tooltip="Leave out layers that are blank, there twice, or the whole image.",
                ),
            ],
            outputs=[
                layers_output(),
                io.String.Output("REPORT", display_name="report", tooltip="The error when enlarged, and when fitted."),
                io.Image.Output(
                    "ERROR",
                    display_name="error",
                    tooltip="Where the layers are off when they are only enlarged, and where they are now: two images, "
                    "black for no error, pale yellow from a tenth of the range on.",
                ),
            ],
        )

    @classmethod
    def execute(cls, layers, image, alpha, drop):
        stack, (image, notes) = read_layers(layers), _original(image, "image")
        notes += _stretched(stack, image)
        if drop:
            stack, dropped = received.without_useless(stack, image)
            notes += dropped
        fitted = fitting.fit_stack(stack, image, alpha == ALPHAS[0])
        if fitted.rest:
            notes.append("No layer covers the image, so the layer Rest behind all shows what they leave.")
        before, after = (f"{255 * float(error.mean()):.3g}" for error in (fitted.before, fitted.after))
        size = f"{image.shape[1]}×{image.shape[0]}"
        report = f"{len(fitted.stack.layers)} layers at {size}. Mean error of 255: {before} enlarged, {after} fitted."
        maps = torch.stack([scoring.heat(error) for error in (fitted.before, fitted.after)])
        return io.NodeOutput(write_layers(fitted.stack), report, maps, ui=told([report, *notes]))


class ScoreLayers(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Strata_ScoreLayers",
            display_name="Score layers",
            category="Strata/Finish",
            is_output_node=True,
            search_aliases=[*DECOMPOSERS, "evaluate layers", "quality", "metrics", "benchmark", "gate"],
            description="Tells how good a stack of layers is: whether it makes up the image, and how near it is to a "
            "true stack, as LayerD's evaluation measures it. Can end the prompt when a limit is not kept.",
            inputs=[
                Layers.Input("layers", tooltip="The layers to judge."),
                io.Image.Input(
                    "image", optional=True, tooltip="The image that they should make up. They are judged at its size."
                ),
                Layers.Input("truth", optional=True, tooltip="The true layers, where they are known."),
                io.Int.Input(
                    "merges",
                    default=scoring.MOST_MERGES,
                    min=0,
                    max=50,
                    tooltip="With truth: how many merges of neighbouring layers are allowed in the last row, LayerD's "
                    "0 to 5.",
                ),
                io.String.Input(
                    "limits",
                    multiline=True,
                    default="",
                    tooltip="What must hold, or the prompt ends with an error, as in: recomposition < 0.01, "
                    "within_1 >= 0.99. The names are those of the JSON. Empty only tells.",
                ),
            ],
            outputs=[
                Layers.Output("LAYERS", display_name="layers", tooltip="The same layers, when all limits are kept."),
                io.String.Output("REPORT", display_name="report", tooltip="The figures, one a line."),
                io.String.Output("JSON", display_name="json", tooltip="The figures as JSON."),
                io.Image.Output(
                    "ERROR",
                    display_name="error",
                    tooltip="Where the layers are off: black for no error, pale yellow from a tenth of the range on. "
                    "Black without an image.",
                ),
            ],
        )

    @classmethod
    def execute(cls, layers, merges, limits, image=None, truth=None):
        stack, notes = read_layers(layers), []
        if image is not None:
            image, notes = _original(image, "image", opaque=False)
            stack = fitting.resized(stack, (image.shape[1], image.shape[0]))
        error, figures = _figures(stack, image)
        rows = [] if truth is None else _rows(stack, read_layers(truth, "truth"), merges)
        if rows:
            figures |= {name: rows[0][name] for name in ("rgb_l1", "alpha_iou")}
            figures |= {f"{name}_merged": rows[-1][name] for name in ("rgb_l1", "alpha_iou")}
        wanted = scoring.parse_limits(limits, list(figures))
        if broken := scoring.broken_limits(figures, wanted):
            raise ValueError(f"limits: {'; '.join(broken)}; give better layers, or other limits.")
        lines = [f"{name}: {value:.4g}" for name, value in figures.items()]
        lines += [f"after {row['merges']} merges: " + _words(row) for row in rows]
        known = {name: None if math.isnan(value) else value for name, value in figures.items()}
        text = json.dumps(known | ({"layerd": rows} if rows else {}))
        shown = scoring.heat(error)[None]
        return io.NodeOutput(layers, "\n".join(lines), text, shown, ui=told([*lines, *notes]))


def _figures(stack: LayerStack, image: torch.Tensor | None) -> tuple[torch.Tensor, dict[str, float]]:
    """What can be told without true layers, and a map [H,W] of the error, 0 without an image."""
    small = received.small_layers(stack)
    colour, alpha = flatten(stack, TRANSPARENT)
    rasters = (rasterise(layer, stack.canvas) for layer in stack.layers if layer.visible)  # one at a time in memory
    seen = [(scoring.halo(raster), raster[..., 3].clone()) for raster in rasters]
    edges, alphas = [one for one, _ in seen], [own for _, own in seen]
    figures = {
        "layers": float(len(stack.layers)),
        "blank": float(len(received.blanks(small))),
        "duplicate": float(len(received.duplicates(small))),
        "open": float((alpha < 1 - fitting.TRACE).double().mean()),
        "halo": sum(one for one, _ in edges) / max(sum(weight for _, weight in edges), 1e-6),
        "hidden_filled": scoring.hidden_filled(alphas) if alphas else math.nan,
    }
    if image is None:
        return torch.zeros_like(alpha), figures
    error, of_image = scoring.recomposition(colour, alpha, image)
    return error, figures | of_image


def _rows(stack: LayerStack, truth: LayerStack, merges: int) -> list[dict[str, float]]:
    """LayerD's scores at the size of the truth, of what is shown."""
    pair = []
    for one, socket in ((fitting.resized(stack, truth.canvas), "layers"), (truth, "truth")):
        pair.append([to_bytes(rasterise(layer, one.canvas)) for layer in one.layers if layer.visible])
        if not pair[-1]:
            raise ValueError(f"{socket}: no layer is visible, so there is nothing to compare; show one.")
    return scoring.layerd_scores(*pair, merges)


def _words(row: dict[str, float]) -> str:
    return f"RGB L1 {row['rgb_l1']:.4f}, alpha soft IoU {row['alpha_iou']:.4f}"


def _original(image: torch.Tensor, socket: str, opaque: bool = True) -> tuple[torch.Tensor, list[str]]:
    """[H,W,3] of the one image that layers are of, and notes. opaque: its alpha is left out, otherwise it is put over
    black. Raises ValueError for several.
    """
    if len(image) != 1:
        raise ValueError(f"{socket}: there are {len(image)} images and the layers are of one; connect a single one.")
    colour, alpha = image[0, ..., :3].clamp(0, 1), image[0, ..., 3:]
    if not alpha.numel() or (alpha >= 1).all():
        return colour, []
    return (colour, ["The transparency of the image was left out."]) if opaque else (colour * alpha.clamp(0, 1), [])


def _stretched(stack: LayerStack, image: torch.Tensor) -> list[str]:
    (width, height), (tall, wide) = stack.canvas, image.shape[:2]
    ratio = width * tall / (height * wide)
    if 1 / STRETCH <= ratio <= STRETCH:
        return []
    return [f"The layers are {width}×{height} and the image is {wide}×{tall}, so they were stretched."]


class EffectLayers(Node):
    """Shadows and light of a picture as layers, bound to the objects that throw and catch them."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Strata_EffectLayers",
            display_name="Effect layers (shadow and light)",
            category="Strata/Finish",
            search_aliases=["shadow layer", "extract shadow", "separate shadow", "multiply layer", "light layer"],
            description="Takes the shadows and the light that a picture has and its plain layers lack, as layers of "
            "their own: multiply for what is darker, screen for what is brighter. Each goes with its object.",
            inputs=[
                layers_input("Background and cut-outs without shadows. The background at the back has to be opaque."),
                io.Image.Input(
                    "image",
                    tooltip="The same things with shadow and light, of the canvas's size: from Harmonize layers, or a "
                    "photograph.",
                ),
                io.Image.Input(
                    "background",
                    optional=True,
                    tooltip="The place without the things, of the canvas's size, where the layers have none. It goes "
                    "to the back.",
                ),
                io.Float.Input(
                    "reach",
                    default=0.5,
                    min=0.0,
                    max=2.0,
                    step=0.01,
                    tooltip="How far from a thing its shadow and light may lie on the ground, as a share of the "
                    "canvas's longer side. 0 is any distance.",
                ),
            ],
            outputs=[
                layers_output(),
                io.Float.Output(
                    "error",
                    display_name="error",
                    tooltip="Largest difference between the layers over each other and the image, 0 to 1.",
                ),
            ],
        )

    @classmethod
    def execute(cls, layers, image, reach, background=None):
        stack = _on_ground(read_layers(layers), image, background)
        found = effects.find_effects(stack, image[0, ..., :3], reach)
        notes = []
        if share := (found.error > 1 / 255).float().mean().item():
            notes.append(
                f"{100 * share:.2f} % of the image lies farther than reach from every thing and is other than the "
                "background there; raise reach, or connect the background of this image."
            )
        made = write_layers(effects.effect_layers(stack, found))
        return io.NodeOutput(made, found.error.max().item(), ui=told(notes) or None)


def _on_ground(stack: LayerStack, image: torch.Tensor, background: torch.Tensor | None) -> LayerStack:
    """The visible layers, over the background where there is one. Raises ValueError for images of another size."""
    for name, one in (("image", image), ("background", background)):
        if one is not None and (one.shape[2], one.shape[1]) != stack.canvas:
            raise ValueError(
                f"{name}: it is {one.shape[2]}×{one.shape[1]} and the canvas {stack.canvas[0]}×{stack.canvas[1]}; "
                "scale it to the canvas."
            )
    own = [layer for layer in stack.layers if layer.visible]
    if background is not None:
        own = [Layer(background[0, ..., :3], "background"), *own]
    return stack.with_layers(own)


NODES = [FitLayers, ScoreLayers, EffectLayers]
