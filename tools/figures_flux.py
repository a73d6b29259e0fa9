"""The shipped Flux-Fill through ComfyUI's own loader, nodes and sampler: an object asked for in a box of an empty
place, beside the truth through the autoencoder and beside the first generation's inpainting model. At 128 pixels;
figures_flux_large.py is at 256, and figures_flux_words.py has whole images from words.
"""

from __future__ import annotations

import math
from functools import cache

import comfy.sd
import numpy as np
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingFlux
from mini_models import MODELS, OUTPUT, Family, picture
from strata.patches.mini_family import StrataMiniFlux
from strata.scenes import renderer
from strata.techniques import metrics
from strata.training import flux_fill, loop, oracle

import nodes as comfyui_nodes

COUNT, SAMPLE = 96, 4
CLAIMS = []
SIDE = 128
STEPS = 20
MODELS_OF = {
    "Flux-Fill": ("strata_mini_flux_fill.safetensors", 3.0, "euler", "simple"),
    "inpaint": ("strata_mini_inpaint.safetensors", 4.0, "euler", "normal"),
}
FIRST = 10**6  # behind the scenes of training


def scene_of(seed: int, side: int) -> renderer.Scene:
    """One object in a place; every third pair is one that training has never seen."""
    known = [entry.name for entry in renderer.catalogue().values() if not entry.held_out]
    pairs = [(name, kind) for name in known for kind in renderer.KINDS]
    chosen = [pair for pair in pairs if renderer.is_held_out(*pair) == (seed % 3 == 0)]
    name, kind = chosen[seed * 7919 % len(chosen)]
    return renderer.render(renderer.Request(kind, (name,)), side, side, FIRST + seed)


def measure(seeds: range, side: int = SIDE) -> dict[str, dict[str, list[float]]]:
    family, judge = Family(), oracle.load()
    scenes = [scene_of(seed, side) for seed in seeds]
    rngs = [np.random.default_rng((seed, 5)) for seed in seeds]
    boxes = [flux_fill.object_box(scene.objects[0], rng) for scene, rng in zip(scenes, rngs, strict=True)]
    truth = torch.cat(
        [picture(flux_fill.without_shadow_outside(scene, 0, box)) for scene, box in zip(scenes, boxes, strict=True)]
    )
    masks = torch.zeros(len(scenes), 1, side, side)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[:, top:bottom, left:right] = 1
    ceiling = family.vae.decode(family.vae.encode(truth.movedim(1, -1))).movedim(-1, 1)
    images = {"truth through the autoencoder": ceiling}
    for column, settings in MODELS_OF.items():
        if not (MODELS / "diffusion_models" / settings[0]).exists():  # it is still learning
            continue
        images[column] = torch.cat(
            [fill(family, settings, scene, mask, seed) for scene, mask, seed in zip(scenes, masks, seeds, strict=True)]
        )
        shown = torch.stack([truth[:32], images[column][:32]], 1).flatten(0, 1)
        loop.save_grid(OUTPUT / f"{column}, {side}.png", shown, 8)
    background = torch.cat([picture(scene.background) for scene in scenes])
    found = {}
    for column, made in images.items():
        place, right = judge.text_agreement(
            made, [scene.kind for scene in scenes], [[scene.objects[0].name] for scene in scenes]
        )
        unseen = torch.tensor([seed % 3 == 0 for seed in seeds])
        edge, lines = steps(made, boxes, seeds)
        found[column] = {
            "object, trained pairs": torch.where(unseen, torch.nan, right).tolist(),
            "object, pairs never trained": torch.where(unseen, right, torch.nan).tolist(),
            "place": place.tolist(),
            "error outside the box": metrics.mask_error(made, background, 1 - masks).tolist(),
            "step across the box's edge": edge,
            "step across other lines": lines,
        }
    return found


@torch.no_grad()
def fill(family: Family, settings: tuple, scene: renderer.Scene, mask: torch.Tensor, seed: int) -> torch.Tensor:
    """[1,3,S,S] as the sampler leaves it: nothing is pasted back."""
    file, cfg, sampler, scheduler = settings
    model = load(file, scene.depth.shape[0])
    image = torch.from_numpy(scene.background)[None]
    positive, negative, latent = comfyui_nodes.InpaintModelConditioning().encode(
        family.text(scene.objects[0].prompt), family.negative, image, family.vae, mask, noise_mask=False
    )
    (sampled,) = comfyui_nodes.common_ksampler(model, seed, STEPS, cfg, sampler, scheduler, positive, negative, latent)
    return family.vae.decode(sampled["samples"]).movedim(-1, 1)


@cache
def load(file: str, side: int = SIDE):
    """A larger image needs more noise to hide the same: the flow model's shift is the trainer's."""
    model = comfy.sd.load_diffusion_model(str(MODELS / "diffusion_models" / file))
    if side == SIDE or "flux" not in file:
        return model
    shift = StrataMiniFlux.sampling_settings["shift"] + math.log(side / SIDE)
    return ModelSamplingFlux().patch(model, shift, shift, side, side)[0]


def steps(images: torch.Tensor, boxes: list, seeds: range) -> tuple[list[float], list[float]]:
    """Per image, the mean difference of neighbours across the box's edges, and across lines of the same lengths that
    lie anywhere else; edges that are the image's own do not count.
    """
    edge, other = [], []
    for image, (left, top, right, bottom), seed in zip(images, boxes, seeds, strict=True):
        rng = torch.Generator().manual_seed(seed)
        own, rest = [], []
        for turned, across, along in (
            (image.diff(dim=2).abs().mean(0), (left, right), slice(top, bottom)),
            (image.diff(dim=1).abs().mean(0).T, (top, bottom), slice(left, right)),
        ):
            own += [turned[along, at - 1] for at in across if 0 < at < image.shape[-1]]
            places = torch.randint(0, image.shape[-1] - 1, (16,), generator=rng).tolist()
            rest += [turned[along, at] for at in places if at + 1 not in across]
        edge.append(torch.cat(own).mean().item() if own else float("nan"))
        other.append(torch.cat(rest).mean().item())
    return edge, other
