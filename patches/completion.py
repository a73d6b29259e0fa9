"""What nearer layers hide, drawn by an inpainting model or by LayeringDiff's background model, layer by layer from the
back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import comfy.sample
import comfy.utils
import node_helpers
import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from einops import rearrange
from torch import Tensor

from ..techniques import completion
from ..techniques.compositing import flatten, left_clear
from ..techniques.geometry import filled_up, rasterise
from ..techniques.layers import LayerStack
from . import autoencoder
from . import decomposer as layeringdiff

MULTIPLE = 16  # of sides, as Flux's patches of latents want them
Painter = Callable[["Hole", layeringdiff.Progress], Tensor]


@dataclass(frozen=True)
class Hole:
    """image: [H,W,3], the layer over those behind it. region: [H,W], 1 where it is to be drawn, else 0. name: the
    layer's. whole: [H,W,3], the image of all layers. cover: [H,W], how much nearer layers cover.
    """

    image: Tensor
    region: Tensor
    name: str
    whole: Tensor
    cover: Tensor


def complete(
    stack: LayerStack, chosen: Sequence[int], paint: Painter, steps: int, grow: int = 0
) -> tuple[LayerStack, dict[int, Tensor]]:
    """The stack whose chosen layers are continued behind nearer ones, and by layer the alpha [H,W] that it now has
    there. Layers that lack nothing are the same objects; the others fill the canvas.

    steps: sampling steps for each layer, for the progress bar. grow: how many pixels around what is missing are drawn
    anew too; nothing of them is taken.
    """
    pixels = {
        number: rasterise(replace(layer, opacity=1.0), stack.canvas)
        for number, layer in enumerate(stack.layers)
        if layer.visible
    }
    numbers = list(pixels)
    hiding = [_hides(stack, number) * pixels[number][..., 3] for number in numbers]
    cover = dict(zip(numbers, 1 - left_clear(torch.stack(hiding))[1:], strict=True)) if numbers else {}
    added = {}
    for number in numbers:
        missing = completion.missing_behind(pixels[number][..., 3], cover[number], number == numbers[0])
        if number in chosen and missing.any():
            added[number] = missing
    composite, progress, layers = flatten(stack)[0], layeringdiff.Progress(len(added) * steps), list(stack.layers)
    for number, region in added.items():
        colour, alpha = flatten(stack.with_layers(layers[: number + 1]))
        around = completion.grown(region, grow)
        image = completion.continued(colour, around + (alpha <= 0))
        drawn = paint(Hole(image, around, layers[number].name, composite, cover[number]), progress)
        drawn = completion.matched(drawn, image, around)
        layers[number] = layers[number].with_pixels(completion.filled_in(pixels[number], drawn, region))
    return stack.with_layers(layers), added


def _hides(stack: LayerStack, number: int) -> float:
    """What a layer's alpha counts as cover: a shadow that multiplies hides nothing."""
    layer = stack.layers[number]
    return layer.opacity if layer.blend_mode == "normal" else 0.0


@dataclass(frozen=True)
class Inpainting:
    """Any model, as KSampler behind InpaintModelConditioning. clip: for the layers' names as prompts, in place of
    positive.
    """

    model: ModelPatcher
    vae: object
    positive: list
    negative: list
    seed: int
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    clip: object = None

    def __call__(self, hole: Hole, progress: layeringdiff.Progress) -> Tensor:
        """[H,W,3]"""
        height, width = hole.region.shape
        image = filled_up(rearrange(hole.image, "h w c -> 1 c h w"), MULTIPLE)
        mask = F.pad(hole.region[None, None], (0, -width % MULTIPLE, 0, -height % MULTIPLE))
        gray = torch.where(mask > 0, 0.5, image)
        latent, given = (autoencoder.encode(self.vae, rearrange(one, "b c h w -> b h w c")) for one in (image, gray))
        values = {"concat_latent_image": given, "concat_mask": mask}
        positive = self.positive
        if self.clip is not None:
            positive = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(hole.name))
        conditionings = [node_helpers.conditioning_set_values(one, values) for one in (positive, self.negative)]
        sampled = comfy.sample.sample(
            self.model,
            comfy.sample.prepare_noise(latent, self.seed),
            self.steps,
            self.cfg,
            self.sampler_name,
            self.scheduler,
            *conditionings,
            latent,
            noise_mask=mask,
            callback=progress.callback(self.model, self.steps),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=self.seed,
        )
        return autoencoder.decode(self.vae, sampled)[0, :height, :width, :3].to(hole.image)


@dataclass(frozen=True)
class Decomposing:
    """LayeringDiff's denoiser of the background, which takes all nearer layers away at once."""

    model: ModelPatcher | None
    vae: object
    decomposer: layeringdiff.Decomposer
    run: layeringdiff.Run

    def __call__(self, hole: Hole, progress: layeringdiff.Progress) -> Tensor:
        """[H,W,3]"""
        image, alpha = rearrange(hole.whole, "h w c -> 1 c h w"), torch.maximum(hole.cover, hole.region)[None, None]
        parts = (self.model, self.vae, self.decomposer, image, alpha, self.run, progress)
        (drawn,) = layeringdiff.draw(*parts, ("background",))
        return rearrange(drawn, "1 c h w -> h w c").clamp(0, 1)
