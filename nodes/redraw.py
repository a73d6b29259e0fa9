"""Layers finished by a model: what is hidden of them drawn, or one of them drawn anew."""

import torch
from comfy_api.latest import io

from ..patches import back_to_front, completion, redraw
from ..patches import decomposer as layeringdiff
from ..techniques import arrange
from ..techniques.compositing import TRANSPARENT, flatten_image
from ..techniques.effects import shadow_apart, without_effects
from ..techniques.layers import MAX_LAYERS, LayerStack, read_layers, write_layers
from .layers_edit import SELECT, layers_input, layers_output
from .sampling import cfg_input, sampler_input, scheduler_input, seed_input, steps_input
from .sockets import Decomposer, Node, Transparency, schema, told


class CompleteLayers(Node):
    """What nearer layers hide of a layer, drawn, from the back to the front.

    Source: layeringdiff, Sec. 3.3 (the background's half of FBDD, where a decomposer is connected)
    """

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Strata_CompleteLayers",
            display_name="Complete layers (fill what is hidden)",
            category="Strata/Finish",
            search_aliases=["inpaint layers", "fill holes", "amodal completion", "outpaint behind", "clean background"],
            description="Draws what nearer layers hide of each layer, so that it can be seen when they are moved away. "
            "Pixels that can be seen now stay as they are.",
            inputs=[
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="An inpainting model, or any other. With a decomposer: the model that it is added to.",
                ),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="What is behind, in words, for example: an empty beach. Not used with a decomposer.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="What should not be seen, such as the things in front. With a decomposer: an empty prompt, "
                    "needed only where its file has none.",
                ),
                io.Vae.Input("vae", tooltip="The model's VAE."),
                layers_input(
                    "Layers with holes behind nearer ones, as Slice by depth, Load layers or decomposers of "
                    "other packs give them."
                ),
                io.String.Input("select", default="", tooltip=SELECT),
                io.Int.Input(
                    "grow",
                    default=8,
                    min=0,
                    max=256,
                    tooltip="So many pixels around what is hidden are drawn too, so that the model does not go on "
                    "with the edges of the things in front. Of these pixels nothing is taken.",
                ),
                seed_input("The same seed draws the same."),
                steps_input("Steps for each layer that lacks something."),
                cfg_input(4.0, "How closely to follow the words. With a decomposer it is 1."),
                sampler_input("euler", "As in KSampler."),
                scheduler_input("normal", "As in KSampler."),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The model's text encoder: each layer is then drawn by its own name in place of positive.",
                ),
                Decomposer.Input(
                    "decomposer",
                    optional=True,
                    tooltip="From Load decomposer: its background model draws what is behind, and needs no words.",
                ),
            ],
            outputs=[
                layers_output(),
                io.Mask.Output(
                    "drawn",
                    display_name="drawn",
                    tooltip="1 where something was drawn, one mask for each layer that got something; one empty mask "
                    "when nothing was missing.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        vae,
        layers,
        select,
        grow,
        seed,
        steps,
        cfg,
        sampler_name,
        scheduler,
        model=None,
        positive=None,
        negative=None,
        clip=None,
        decomposer=None,
    ):
        stack = read_layers(layers)
        if decomposer is None:
            _check_connected(model=model, positive=positive or clip, negative=negative)
            paint = completion.Inpainting(
                model, vae, positive, negative, seed, steps, cfg, sampler_name, scheduler, clip
            )
        else:
            decomposer = layeringdiff.ready(decomposer, vae, model, negative, "negative")
            paint = completion.Decomposing(
                model, vae, decomposer, layeringdiff.Run(seed, steps, sampler_name, scheduler)
            )
        completed, added = completion.complete(stack, arrange.select(stack, select), paint, steps, grow)
        drawn = [(alpha > 0).float() for alpha in added.values()]
        return io.NodeOutput(
            write_layers(completed),
            torch.stack(drawn or [torch.zeros(stack.canvas[::-1])]),
            ui=told(_notes(stack, added)) or None,
        )


def _check_connected(**sockets) -> None:
    """Raises ValueError for the first that is not connected."""
    for name, value in sockets.items():
        if value is None:
            raise ValueError(f"{name}: nothing is connected; connect it, or a decomposer, which needs no words.")


def _notes(stack: LayerStack, added: dict[int, torch.Tensor]) -> list[str]:
    if not added:
        return ["Nothing was missing behind the nearer layers, so all layers are as they were."]
    width, height = stack.canvas
    notes = []
    for number, alpha in added.items():
        layer = stack.layers[number]
        share = (alpha > 0).float().mean().item()
        notes.append(f"{layer.name}: {100 * share:.1f} % of the canvas was drawn.")
        if layer.x < 0 or layer.y < 0 or layer.x + layer.size[0] > width or layer.y + layer.size[1] > height:
            notes.append(f"{layer.name}: it reached beyond the canvas and was cut to it.")
    return notes


class RedrawLayer(Node):
    """One layer anew from words, in the context of what is behind it; the old one's effects go, and the new one's
    shadow becomes a layer of its own.

    Source: bfs, Sec. 3 (where the model is a Flux-Fill)
    Source: layerdiffuse, released code (bg2fg, where attention sharing is connected)
    """

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Strata_RedrawLayer",
            display_name="Redraw layer (inpaint, replace)",
            category="Strata/Finish",
            search_aliases=["replace object", "regenerate layer", "inpaint layer", "change object", "BFS"],
            description="Draws one layer anew from words, in its place and with its shadow. All other layers stay as "
            "they are.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A Flux-Fill from Back to front, or an SD1.5 model when attention sharing is connected.",
                ),
                io.Conditioning.Input("positive", tooltip="What the layer shall show, as in: a red apple."),
                io.Conditioning.Input("negative", tooltip="An empty prompt; with cfg 1 it is not used."),
                io.Vae.Input("vae", tooltip="The model's VAE."),
                layers_input(),
                io.String.Input(
                    "layer",
                    default="",
                    tooltip="Which layer: its number from 1 at the back, or its name. Empty means the one in front.",
                ),
                io.Float.Input(
                    "room",
                    default=0.2,
                    min=0.0,
                    max=4.0,
                    step=0.05,
                    tooltip="How far beyond the old layer the new one may reach on each side, as a share of the old "
                    "one's longer side. Its shadow has to fit in.",
                ),
                seed_input("The same seed draws the same layer."),
                steps_input("Number of steps; 50 as published for BFS."),
                cfg_input(
                    1.0, "1 for Flux, which has its guidance from FluxGuidance; 2 for the mini family; 7 for SD1.5."
                ),
                sampler_input("euler", "The sampler, as in KSampler."),
                scheduler_input("simple", "Noise levels, as in KSampler."),
                io.Combo.Input(
                    "noise",
                    options=list(back_to_front.NOISE),
                    default=next(iter(back_to_front.NOISE)),
                    tooltip="For BFS: the same noise for both branches, as in the paper, or one each, as in the "
                    "released code and for the mini family.",
                ),
                io.Vae.Input("rgba_vae", optional=True, tooltip="For BFS: the VAE with alpha, from Load RGBA VAE."),
                Transparency.Input(
                    "sharing",
                    optional=True,
                    tooltip="For SD1.5: layer_sd15_bg2fg, from Load transparency.",
                ),
                Transparency.Input(
                    "decoder",
                    optional=True,
                    tooltip="For SD1.5: layer_sd15_vae_transparent_decoder, from Load transparency.",
                ),
                io.Boolean.Input(
                    "effects",
                    default=True,
                    optional=True,
                    tooltip="For BFS: on puts the shadow into a layer of its own, which goes along with the new one. "
                    "off leaves it in the same layer.",
                ),
            ],
            outputs=[
                layers_output(),
                io.Image.Output("IMAGE", display_name="image", tooltip="All visible layers over each other."),
                io.Image.Output("drawn", display_name="drawn", tooltip="The new thing with its shadow, RGBA."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        vae,
        layers,
        layer,
        room,
        noise,
        rgba_vae=None,
        sharing=None,
        decoder=None,
        effects=True,
        **sampling,
    ):
        stack = read_layers(layers)
        stack, number = without_effects(stack, _one(stack, layer))
        place = redraw.place_of(stack, number, room)
        parts = (place, model, positive, negative, vae)
        if sharing is None:
            pixels = redraw.by_back_to_front(*parts, rgba_vae, noise, **sampling)
        else:
            pixels = redraw.around_layer(*parts, sharing, decoder, **sampling)
        apart = effects and sharing is None and len(stack.layers) < MAX_LAYERS and shadow_apart(pixels)
        new = redraw.put(stack, number, place, *(apart or (pixels,)))
        image, _ = flatten_image(new, TRANSPARENT)
        drawn = redraw.cut(stack.layers[number], place, pixels)
        return io.NodeOutput(write_layers(new), image[None], drawn.image[None])


def _one(stack: LayerStack, text: str) -> int:
    """Index of the layer that the text names, the frontmost for an empty text. Raises ValueError when it does not name
    a single layer.
    """
    if not text.strip():
        return len(stack.layers) - 1
    indices = arrange.select(stack, text, "layer")
    if len(indices) != 1:
        raise ValueError(f"layer: {text[:60]!r} names {len(indices)} layers; name the one that is to be drawn anew.")
    return indices[0]


NODES = [CompleteLayers, RedrawLayer]
