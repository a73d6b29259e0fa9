"""DreamLayer's harmonisation: layers that were only stacked become one picture."""

from collections.abc import Callable
from dataclasses import replace

import comfy.samplers
import latent_preview
import torch
import torch.nn.functional as F
from comfy_api.latest import io

from ..patches.harmonize import harmonize
from ..patches.inversion import Inversion
from ..techniques.depth import push_pull
from ..techniques.geometry import rasterise
from ..techniques.harmonization import feathered, keep_detail, on_canvas, visible_shares
from ..techniques.layers import Layer, LayerStack, read_layers, write_layers
from ..techniques.transparency import clean_colours
from . import sockets
from .sockets import Layers, Node, schema

FOREGROUNDS = ("keep", "relight")
RIM = 8  # pixels, one of the latent


class HarmonizeLayers(Node):
    """The layers put into the denoising of the background, then the picture and the layers that come of it.

    Source: dreamlayer, Sec. 3.3
    Differs: with foregrounds = keep, the default, the layers' own pixels are pasted back onto the decoded picture; the
    paper decodes the fused latent, as relight does.
    Differs: without retained, noise is added to the layers; the paper keeps the latents of the run that made them.
    Differs: it starts with 30 steps of euler, scheduler normal, and takes Euler's steps while layers are put back; the
    paper takes 50 steps of DDIM.
    """

    @classmethod
    def define_schema(cls):
        percent = {"min": 0.0, "max": 1.0, "step": 0.01}
        return schema(
            node_id="Strata_HarmonizeLayers",
            display_name="Harmonize layers",
            category="Strata/Compose",
            search_aliases=["dreamlayer", "IRH", "harmonization", "contact shadow", "blend layers", "relight"],
            description="Draws the shadows and the light that a stack of layers lacks: the background is denoised "
            "anew with the layers put into it on the way.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="Any diffusion model of ComfyUI, with LoRAs and other patches as you like."
                ),
                io.Conditioning.Input(
                    "positive", tooltip="The whole picture in words: the place and the things in it."
                ),
                io.Conditioning.Input("negative", tooltip="What should not be seen, from an ordinary text encoding."),
                io.Vae.Input("vae", tooltip="The autoencoder of the model."),
                Layers.Input(
                    "layers",
                    tooltip="Background first, things in front of it. Move, turn, flip or resize a layer and run "
                    "again: nothing else has to "
                    "change.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The same seed gives the same picture.",
                ),
                io.Int.Input(
                    "steps",
                    default=30,
                    min=1,
                    max=10000,
                    tooltip="Steps of a whole denoising; only those after start_percent are done.",
                ),
                io.Float.Input(
                    "cfg",
                    default=5.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How closely to follow the words.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.KSampler.SAMPLERS,
                    default="euler",
                    tooltip="For the steps after end_percent; those before are Euler's.",
                ),
                io.Combo.Input(
                    "scheduler", options=comfy.samplers.KSampler.SCHEDULERS, default="normal", tooltip="As in KSampler."
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.4,
                    **percent,
                    tooltip="How far into the denoising to start: the published 0.4 (timestep 600). "
                    "Lower changes more of the background.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=0.6,
                    **percent,
                    tooltip="Until when the layers are put back at every step: the published 0.6 "
                    "(timestep 400). Higher keeps them closer, lower blends them more.",
                ),
                io.Combo.Input(
                    "foregrounds",
                    options=list(FOREGROUNDS),
                    default=FOREGROUNDS[0],
                    tooltip="keep: the things keep their own pixels. "
                    "relight: they are taken as the model has drawn them.",
                ),
                io.Float.Input(
                    "feather",
                    default=2.0,
                    min=0.0,
                    max=64.0,
                    step=0.5,
                    tooltip="With keep: over how many pixels inside of their edge the things "
                    "fade into what the model has drawn.",
                ),
                io.Float.Input(
                    "detail",
                    default=0.0,
                    min=0.0,
                    max=256.0,
                    step=0.5,
                    optional=True,
                    tooltip="Above 0 the background keeps its own texture, and "
                    "takes from the model only what is smoother than so many pixels: light and shadow. 0 takes it as "
                    "the model has drawn it.",
                ),
                sockets.Inversion.Input(
                    "retained",
                    optional=True,
                    tooltip="The layers' latents on their way, the background's first: of the run, from "
                    "Layers sampler, or of their pictures, from Invert image. Without it noise is added to the layers.",
                ),
            ],
            outputs=[
                io.Image.Output("IMAGE", display_name="image", tooltip="The picture, of the canvas's size."),
                io.Latent.Output("LATENT", display_name="latent", tooltip="The harmonised latent, to go on from."),
                Layers.Output(
                    "LAYERS",
                    display_name="layers",
                    tooltip="The layers with the harmonised background, shadows included. Behind the things it "
                    "is as it was, in the light around them, so that they can be moved away.",
                ),
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
        seed,
        steps,
        cfg,
        sampler_name,
        scheduler,
        start_percent,
        end_percent,
        foregrounds,
        feather,
        detail=0.0,
        retained=None,
    ):
        stack, side = read_layers(layers), vae.spacial_compression_encode()
        path = None if retained is None else _retained(retained, stack, side)
        stack = _shown(stack)
        background, *things = [rasterise(layer, stack.canvas).permute(2, 0, 1)[None] for layer in stack.layers]
        colours = [clean_colours(pixels[:, :3], pixels[:, 3:]) for pixels in (background, *things)]
        alphas = torch.cat([pixels[:, 3:] for pixels in things])
        latents = [vae.encode(_padded(colour, side).permute(0, 2, 3, 1)) for colour in colours]
        latent = harmonize(
            model,
            positive,
            negative,
            latents[0],
            torch.cat(latents[1:]),
            _padded(alphas, side),
            seed,
            steps,
            cfg,
            sampler_name,
            scheduler,
            start_percent,
            end_percent,
            lambda count: latent_preview.prepare_callback(model, count),
            path,
        )
        drawn, (free, _) = _decoded(vae, latent, stack.canvas), visible_shares(alphas)
        if detail:
            drawn = torch.lerp(
                drawn, keep_detail(colours[0], drawn, _decoded(vae, latents[0], stack.canvas), free[None], detail), free
            )
        clear = 1 - F.max_pool2d(1 - free, 2 * RIM + 1, 1, RIM)  # the model draws a thing's rim a little beside it
        seen = feathered(clear[None], RIM)[0] if foregrounds == FOREGROUNDS[0] else free
        found = _with_harmonised_background(stack, colours[0], drawn, clear, seen, background[:, 3:])
        if foregrounds == FOREGROUNDS[0]:
            behind, shares = visible_shares(feathered(alphas, feather))
            image = drawn * behind + sum(colour * share for colour, share in zip(colours[1:], shares, strict=True))
        else:
            image, found = drawn, _relit(found, drawn, colours[1:], alphas)
        if (background[:, 3:] < 1).any():  # nothing was asked for behind a transparent canvas
            image = torch.cat([image, 1 - (1 - background[:, 3:]) * free], 1)
        return io.NodeOutput(image.permute(0, 2, 3, 1).clamp(0, 1), {"samples": latent}, write_layers(found))


def _shown(stack: LayerStack) -> LayerStack:
    """The visible layers. Raises ValueError for fewer than two, for blend modes, and for layers without transparency in
    front.
    """
    stack = stack.with_layers(layer for layer in stack.layers if layer.visible)
    if len(stack.layers) < 2:
        raise ValueError(
            f"layers: there are {len(stack.layers)} visible layers; harmonising needs a background and at least one "
            "thing in front of it."
        )
    for layer in stack.layers[1:]:
        if layer.blend_mode != "normal":
            raise ValueError(
                f"layers: layer {layer.name!r} has the blend mode {layer.blend_mode!r}, and latents can only be laid "
                "over each other; "
                "merge it with the layer behind it (Order layers), or set it to normal."
            )
        if (rasterise(layer, stack.canvas)[..., 3] >= 1).all():
            raise ValueError(
                f"layers: layer {layer.name!r} covers the whole canvas and has no transparent pixel, so nothing "
                "behind it would be seen; "
                "give it an alpha or a mask."
            )
    return stack


def _retained(path: Inversion, stack: LayerStack, side: int) -> Callable[[float], torch.Tensor]:
    """[1+K,C,h,w] of the visible layers at a noise level, where they lie on the canvas. Raises ValueError for a path of
    other layers.
    """
    count, (height, width) = path.latents.shape[1], path.latents.shape[-2:]
    if count != len(stack.layers):
        raise ValueError(
            f"retained: it is the way of {count} latents and layers has {len(stack.layers)}; connect layers and path "
            "of the same run."
        )
    for layer in stack.layers:
        own = layer.image.shape[:2]
        if tuple(-(-length // side) for length in own) != (height, width):
            raise ValueError(
                f"retained: its latents are of {width * side}×{height * side} pixels and layer {layer.name!r} is "
                f"{own[1]}×{own[0]}; "
                "connect layers and path of the same run."
            )
    levels = len(path.latents)
    placed = [
        on_canvas(path.latents[:, number].flatten(0, 1), layer, stack.canvas, side).unflatten(0, (levels, -1))
        for number, layer in enumerate(stack.layers)
        if layer.visible
    ]
    return replace(path, latents=torch.stack(placed, 1)).at


def _padded(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """Edges repeated to the right and below, up to whole latent pixels."""
    height, width = pixels.shape[-2:]
    return F.pad(pixels, (0, -width % side, 0, -height % side), mode="replicate")


def _decoded(vae, latent: torch.Tensor, canvas: tuple[int, int]) -> torch.Tensor:
    """[1,3,H,W] of the first frame, cut to the canvas."""
    pixels = vae.decode(latent)
    return pixels.reshape(-1, *pixels.shape[-3:])[:1, : canvas[1], : canvas[0]].permute(0, 3, 1, 2)


def _with_harmonised_background(
    stack: LayerStack,
    before: torch.Tensor,
    drawn: torch.Tensor,
    clear: torch.Tensor,
    seen: torch.Tensor,
    alpha: torch.Tensor,
) -> LayerStack:
    """The model's background where it is seen, and behind the things what was there before, in the light that goes on
    from around them.

    So no silhouette shows when a thing is moved away. clear, seen [1,H,W]: where that light is taken from, and where
    the background is the model's.
    alpha [1,1,H,W] of the background stays.
    """
    before, drawn = before.movedim(1, -1), drawn.movedim(1, -1)
    light = push_pull((drawn - before)[:, None], clear.clamp(0, 1)[None])[:, 0]
    image = torch.lerp(before + light, drawn, seen[..., None]).clamp(0, 1)[0]
    image = image if (alpha == 1).all() else torch.cat([image, alpha[0].movedim(0, -1)], -1)
    back = stack.layers[0]
    return stack.with_layers([Layer(image, back.name, extra=back.extra), *stack.layers[1:]])


def _relit(stack: LayerStack, drawn: torch.Tensor, colours: list[torch.Tensor], alphas: torch.Tensor) -> LayerStack:
    """Things on the canvas in the model's colours where they are seen, in their own where others cover them."""
    _, shares = visible_shares(alphas)
    relit = []
    for layer, colour, share, alpha in zip(stack.layers[1:], colours, shares, alphas, strict=True):
        pixels = torch.cat([torch.lerp(colour, drawn, share)[0].clamp(0, 1), alpha])
        relit.append(Layer(pixels.permute(1, 2, 0), layer.name, extra=layer.extra))
    return stack.with_layers([stack.layers[0], *relit])


NODES = [HarmonizeLayers]
