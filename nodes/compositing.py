"""Nodes of the menu category Strata/Compose: inversion, and composition under the guidance of decoder features."""

from __future__ import annotations

import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image, ImageDraw

import nodes as comfyui_nodes

from ..patches import autoencoder, inversion_cache
from ..patches.feature_guidance import STARTS, UNCONDITIONAL, Plane, Planes, Settings, guider, insertion_guider
from ..patches.inversion import METHODS, Inversion, noise_levels
from ..techniques.depth import RANGES, amodal_mask
from ..techniques.feature_guidance import NORMS
from ..techniques.harmonization import feathered
from ..techniques.losses import psnr
from . import sockets
from .depth_inputs import MISSING, NEAR, THRESHOLD, DepthReader, box_or_region, depth_input, range_inputs
from .inputs import centred, crop_to_latent, encodable, save_temporary
from .sampling import end_below_start, scheduler_input
from .sockets import Node, schema, told

SOURCES = ("recompute", "cache")
CAPTION = 18


class InvertImage(Node):
    """A picture's path to noise, and what comes back from there.

    Source: featglac, Sec. 3.3, the inversion of the scenes
    Differs: the method ddim is the default, one call of the model a step; the paper takes null-text inversion, which is
    the method null-text.
    """

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Strata_InvertImage",
            display_name="Invert image",
            category="Strata/Compose",
            search_aliases=["DDIM inversion", "null-text inversion", "FeatGLaC", "unsample"],
            description="Finds the noise that a model would make an image from, and the path to it. Shows the "
            "image that comes back and how near it is.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model that will compose; any with noise prediction, v prediction or flow matching.",
                ),
                io.Vae.Input("vae", tooltip="The model's VAE."),
                io.Image.Input(
                    "image",
                    tooltip="The image. Sides are cut to multiples of 8; scenes to be composed need one size.",
                ),
                io.Conditioning.Input("positive", tooltip="A plain description of the image."),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default=METHODS[0],
                    tooltip="ddim: one call of the model per step, exact enough for feature "
                    "guidance. null-text: also optimises an unconditional embedding per step, so that the image "
                    "comes back at this cfg. noise only: no inversion, just the image with growing noise; costs "
                    "nothing and keeps less of the image.",
                ),
                io.Int.Input(
                    "steps",
                    default=50,
                    min=1,
                    max=1000,
                    tooltip="Steps of the path, 50 in the paper. Sample with the sigmas of this node.",
                ),
                scheduler_input(
                    "ddim_uniform",
                    "The noise levels of the steps; ddim_uniform as in the paper, simple for flow matching models.",
                ),
                io.Float.Input(
                    "cfg",
                    default=7.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Of null-text: the guidance with which it comes back.",
                ),
                io.Int.Input(
                    "inner_steps",
                    default=5,
                    min=1,
                    max=10,
                    tooltip="Of null-text: optimisation steps for each embedding, at most.",
                ),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, tooltip="Of noise only: the noise."),
                io.Combo.Input(
                    "disk_cache",
                    options=["on", "off"],
                    default="on",
                    tooltip="on: keeps the result in ComfyUI's user folder, at most 1 GB "
                    "of them, and finds it again by the content of image, texts, settings and model.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="Of null-text: the embedding to start from, the encoding of an empty text.",
                ),
                io.Boolean.Input(
                    "checkpointing",
                    default=False,
                    optional=True,
                    tooltip="Of null-text: computes activations twice in place of keeping "
                    "them: a fraction of the memory, about a third more time.",
                ),
            ],
            outputs=[
                sockets.Inversion.Output(
                    "INVERSION", display_name="inversion", tooltip="For Guidance plane or Insert at a depth."
                ),
                io.Sigmas.Output(
                    "SIGMAS", display_name="sigmas", tooltip="The noise levels of the steps, for SamplerCustomAdvanced."
                ),
                io.Latent.Output(
                    "LATENT", display_name="latent", tooltip="The encoded image; gives a sampler its size."
                ),
                io.Image.Output(
                    "RECONSTRUCTION",
                    display_name="reconstruction",
                    tooltip="What sampling makes of the noise that was found: with the prompt "
                    "alone for ddim, with cfg for null-text; for noise only the image through the VAE.",
                ),
                io.String.Output(
                    "REPORT", display_name="report", tooltip="How near the reconstruction is, in decibels."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        vae,
        image,
        positive,
        method,
        steps,
        scheduler,
        cfg,
        inner_steps,
        seed,
        disk_cache,
        negative=None,
        checkpointing=False,
    ):
        image = encodable(image, vae)[..., :3]
        sigmas = noise_levels(model, steps, scheduler)
        latent = autoencoder.encode(vae, image)
        inversion = inversion_cache.invert_once(
            model, latent, positive, negative, sigmas, method, cfg, inner_steps, seed, checkpointing, disk_cache == "on"
        )
        made = latent if inversion.reconstruction is None else inversion.reconstruction
        after = autoencoder.decode(vae, made)[..., :3].cpu()
        report = _report(inversion, latent, image, after)
        shown = {"images": [_before_after(image[0].cpu(), after[0], report)]}
        return io.NodeOutput(inversion, inversion.sigmas, {"samples": latent}, after, report, ui=shown)


def _report(found: Inversion, latent: torch.Tensor, image: torch.Tensor, after: torch.Tensor) -> str:
    if found.reconstruction is None:
        return "noise only: noised, not inverted; the image would not come back"
    before = centred(image, *after.shape[1:3]).to(after)
    return (
        f"{found.method}: latent {psnr(found.reconstruction, latent.cpu(), None).min():.1f} dB, image "
        f"{psnr(after, before).min():.1f} dB"
    )


def _before_after(before: torch.Tensor, after: torch.Tensor, text: str) -> dict:
    """One picture for the node: before, after, and the report above them."""
    pair = torch.cat([centred(before[None], *after.shape[:2])[0], after], 1)
    pixels = Image.fromarray((pair.clamp(0, 1) * 255).round().byte().numpy())
    sheet = Image.new("RGB", (max(pixels.width, 12 + 6 * len(text)), pixels.height + CAPTION), "#202024")
    sheet.paste(pixels, (0, CAPTION))
    ImageDraw.Draw(sheet).text((4, 3), text, fill="#e0e0e4")
    return save_temporary(np.asarray(sheet))


class GuidancePlane(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Strata_GuidancePlane",
            display_name="Guidance plane",
            category="Strata/Compose",
            search_aliases=["FeatGLaC", "multi plane guidance", "foreground and background"],
            description="One scene of a composition and where it is seen. Chain one node per plane, the background "
            "first.",
            inputs=[
                sockets.Inversion.Input("inversion", tooltip="The scene, from Invert image."),
                io.Int.Input(
                    "mask_index",
                    default=-1,
                    min=-64,
                    max=63,
                    tooltip="Which of several masks: 0 is the first, -1 the last; Slice by depth gives "
                    "them back to front, so -1 is the nearest slice.",
                ),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.05,
                    tooltip="How strongly this plane holds, beside the others.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="1 where the scene is seen, from Slice by depth or Compose two scenes at a depth. Without "
                    "one it is seen wherever no nearer plane is, which is what a background wants.",
                ),
                sockets.Planes.Input("behind", optional=True, tooltip="The planes behind this one."),
            ],
            outputs=[
                sockets.Planes.Output(
                    "PLANES", display_name="planes", tooltip="For the next, nearer plane, or for Feature guidance."
                )
            ],
        )

    @classmethod
    def execute(cls, inversion, mask_index, weight, mask=None, behind=None):
        if mask is not None:
            if not -len(mask) <= mask_index < len(mask):
                raise ValueError(
                    f"mask_index: there are {len(mask)} masks and no number {mask_index}; the last one is -1."
                )
            mask = crop_to_latent(mask, inversion.latents)[mask_index].cpu()
        before = behind.planes if behind is not None else ()
        return io.NodeOutput(Planes((*before, Plane(inversion, mask, weight))))


def level_weights_input():
    return io.String.Input(
        "level_weights",
        default=Settings.level_weights,
        tooltip="Weights of the decoder's levels, the last number for the finest; "
        "earlier levels hold less of an image's look. The paper: 0.2 and 8.5 for the last two. With Flux the numbers "
        "are for two early blocks; or name blocks, as in double 1: 8.5, single 0: 2.",
    )


def norm_input():
    return io.Combo.Input(
        "norm",
        options=list(NORMS),
        default=NORMS[0],
        tooltip="l2: the squared norm of the paper's Eq. 4. l1: the mean absolute "
        "difference of the released code, with its factors per iteration.",
    )


class FeatureGuidance(Node):
    @classmethod
    def define_schema(cls):
        percent = {"min": 0.0, "max": 1.0, "step": 0.01}
        return schema(
            node_id="Strata_FeatureGuidance",
            display_name="Feature guidance (sampler, FeatGLaC)",
            category="Strata/Compose",
            search_aliases=["FeatGLaC", "feature-guided compositing", "guider", "harmonize"],
            description="Composes scenes while sampling: each plane's features are held where it is seen, and the "
            "model makes light and seams fit. Sample with euler or ddim, the sigmas of Invert image, and its latent "
            "for the size.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="SD1.5, SD2, SDXL, Flux.1 or the mini family, the one that inverted the scenes."
                ),
                io.Conditioning.Input(
                    "positive",
                    tooltip="A description of the composite. A depth ControlNet with the composite's depth helps.",
                ),
                io.Conditioning.Input("negative", tooltip="An ordinary text encoding, empty in the paper."),
                sockets.Planes.Input("planes", tooltip="The scenes, from Guidance plane: the first is the background."),
                io.Float.Input(
                    "cfg",
                    default=7.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Guidance by the prompt, as in KSampler.",
                ),
                level_weights_input(),
                io.Float.Input(
                    "foreground",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.05,
                    tooltip="The paper's lambda: weight of all planes but the first. "
                    "Lower lets the background's light change the foreground more; 0 switches all guidance off.",
                ),
                io.Int.Input(
                    "iterations",
                    default=5,
                    min=0,
                    max=50,
                    tooltip="Updates of the latent before each step (K); 0 switches the guidance off.",
                ),
                io.Float.Input(
                    "step_size",
                    default=Settings.step_size,
                    min=0.0,
                    max=100.0,
                    step=0.001,
                    round=0.0001,
                    tooltip="Size of an update.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    **percent,
                    tooltip="When in the sampling the guidance starts, 0 = at once.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=0.76,
                    **percent,
                    tooltip="When it ends; after that the model finishes freely. 0.76 is 38 of 50 steps. "
                    "Later keeps more of the scenes and less of a common light.",
                ),
                norm_input(),
                io.Combo.Input(
                    "start",
                    options=list(STARTS),
                    default=STARTS[0],
                    tooltip="background inversion: from the first plane's noise, as in the "
                    "paper. given latent: from the sampler's own noise and latent.",
                ),
                io.Combo.Input(
                    "source_features",
                    options=list(SOURCES),
                    default=SOURCES[0],
                    tooltip="recompute: one more call of the model per step, "
                    "nothing kept. cache: keeps them in main memory in half precision (SD1.5 at 512: 16 MB per step), "
                    "so that the next run with the same planes and model saves that call.",
                ),
                io.Boolean.Input(
                    "checkpointing",
                    default=False,
                    tooltip="Computes activations twice in place of keeping them: a fraction of the memory, "
                    "about a third more time. With Flux it is always so.",
                ),
                io.Combo.Input(
                    "unconditional",
                    options=list(UNCONDITIONAL),
                    default=UNCONDITIONAL[0],
                    optional=True,
                    tooltip="What cfg leads away "
                    "from. negative: the negative prompt, as in the paper. null-text of the background: at each step "
                    "the embedding that Invert image found with the method null-text; take its cfg, too.",
                ),
            ],
            outputs=[io.Guider.Output("GUIDER", display_name="guider", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, model, positive, negative, planes, cfg, source_features, **settings):
        settings = Settings(cache=source_features == SOURCES[1], **settings)
        notes = end_below_start(settings.start_percent, settings.end_percent, "nothing is guided")
        return io.NodeOutput(guider(model, positive, negative, cfg, planes, settings), ui=told(notes) or None)


class InsertAtDepth(Node):
    """The inpainting of an object at a depth, guided by what is nearer.

    Source: featglac, Sec. 3.4.2, with the steps of the released code
    Differs: any inpainting model and a prompt; the released code takes AnyDoor and a picture of the object.
    """

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Strata_InsertAtDepth",
            display_name="Insert at a depth (inpaint object)",
            category="Strata/Compose",
            search_aliases=["FeatGLaC", "depth-aware object insertion", "insert behind", "occlusion"],
            description="Prepares inpainting an object into a box at a depth: what is nearer stays in front of it, "
            "and is held there by feature guidance.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="An inpainting model is best: SD1.5, SD2, SDXL, Flux.1-Fill or the mini family. IPAdapter "
                    "and the like go in front.",
                ),
                io.Conditioning.Input(
                    "positive",
                    tooltip="The object in its scene. Reference objects come in through this conditioning, or the "
                    "model.",
                ),
                io.Conditioning.Input("negative", tooltip="An ordinary text encoding."),
                io.Vae.Input("vae", tooltip="The model's VAE."),
                io.Image.Input("image", tooltip="The image to insert into."),
                sockets.Inversion.Input("inversion", tooltip="The same image, from Invert image with the same model."),
                depth_input(),
                THRESHOLD,
                io.Int.Input("x", default=0, min=-16384, max=16384, tooltip="Left side of the object's box in pixels."),
                io.Int.Input("y", default=0, min=-16384, max=16384, tooltip="Upper side of the box in pixels."),
                io.Int.Input("width", default=256, min=1, max=16384, tooltip="Width of the box in pixels."),
                io.Int.Input("height", default=256, min=1, max=16384, tooltip="Height of the box in pixels."),
                NEAR,
                MISSING,
                io.Float.Input(
                    "cfg",
                    default=7.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Guidance by the prompt, as in KSampler.",
                ),
                level_weights_input(),
                io.Float.Input(
                    "foreground",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.05,
                    tooltip="How strongly what is nearer is held; 0 leaves it to the inpainting.",
                ),
                io.Int.Input(
                    "iterations",
                    default=3,
                    min=0,
                    max=50,
                    tooltip="Updates of the latent before each step from 62 to 96 % of the sampling.",
                ),
                io.Float.Input(
                    "step_size",
                    default=2 * Settings.step_size,
                    min=0.0,
                    max=100.0,
                    step=0.001,
                    round=0.0001,
                    tooltip="Size of an update.",
                ),
                norm_input(),
                io.Mask.Input("region", optional=True, tooltip="A mask to use in place of the box, 1 = in it."),
                *range_inputs(),
                io.Float.Input(
                    "feather",
                    default=8.0,
                    min=0.0,
                    max=256.0,
                    step=0.5,
                    optional=True,
                    tooltip="Pixels over which visible fades in from the "
                    "box's sides, so that no rectangle is seen; what is nearer keeps its sharp edge. 0 is a hard box.",
                ),
            ],
            outputs=[
                io.Guider.Output(
                    "GUIDER", display_name="guider", tooltip="For SamplerCustomAdvanced, with random noise."
                ),
                io.Latent.Output(
                    "LATENT",
                    display_name="latent",
                    tooltip="The image with the box as noise mask, for SamplerCustomAdvanced.",
                ),
                io.Mask.Output(
                    "VISIBLE",
                    display_name="visible",
                    tooltip="Where the object can be seen: the box, fading in from its sides, without "
                    "what is nearer. Paste the sampled image by it (ImageCompositeMasked).",
                ),
                io.Mask.Output(
                    "NEARER",
                    display_name="nearer",
                    tooltip="1 where something in the box is nearer: paste the image back there "
                    "(ImageCompositeMasked) for pixels that are exactly the old ones.",
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
        image,
        inversion,
        depth,
        threshold,
        x,
        y,
        width,
        height,
        near_is,
        missing_depth,
        cfg,
        region=None,
        range=RANGES[0],
        range_low=0.0,
        range_high=1.0,
        feather=8.0,
        **settings,
    ):
        image = encodable(image, vae)[:1, ..., :3]
        reader = DepthReader(near_is, missing_depth, range, range_low, range_high)
        depth = reader.read(depth, image)
        region = box_or_region(depth, x, y, width, height, region)
        visible = _visible_part(region, depth, threshold)
        positive, negative, latent = comfyui_nodes.InpaintModelConditioning().encode(
            positive, negative, image, vae, visible, noise_mask=False
        )
        nearer = region - visible
        held, noise_mask = (crop_to_latent(mask, latent["samples"]) for mask in (nearer, region))
        guidance = insertion_guider(model, positive, negative, cfg, Plane(inversion, held[0]), **settings)
        faded = visible * feathered(region[:, None], feather)[:, 0]
        return io.NodeOutput(guidance, {**latent, "noise_mask": noise_mask}, faded, nearer, ui=reader.ui() or None)


def _visible_part(region: torch.Tensor, depth: torch.Tensor, threshold: float) -> torch.Tensor:
    """The mask [B,H,W] of where an object in the region is seen. Raises ValueError when it is nowhere."""
    visible = amodal_mask(region, depth, threshold)
    if not visible.any():
        raise ValueError(
            f"threshold: everything in the box is nearer than {threshold:g}; raise the threshold, or move the box."
        )
    return visible


NODES = [InvertImage, GuidancePlane, FeatureGuidance, InsertAtDepth]
