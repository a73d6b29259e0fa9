"""The shipped LayeringDiff through the node's own pipeline on scenes with exact alpha: layers beside the truth, beside
smooth fills, and beside inpainting, and how the switches of the node and the spreading of residuals change them.

Errors are absolute differences times 1000, of a background where it is hidden (alpha above 0.95) and where it is partly
covered, and of a foreground where it is partly covered, each weighted by its own opacity there.
"""

from __future__ import annotations

import comfy.sd
import torch
from mini_models import MODELS, OUTPUT, Family, picture
from strata.patches import decomposer, layer_files, mini_family
from strata.scenes import renderer
from strata.techniques import layering, matting, metrics
from strata.techniques.transparency import extend_colours
from strata.training import loop, oracle

import nodes as comfyui_nodes

COUNT, SAMPLE = 96, 3
OURS, SMOOTH = "FBDD + exact", "smooth fill"
PAINTED = ("smooth fill + inpainting", "inpainting")
CLAIMS = [
    (OURS, other, figure)
    for other in (SMOOTH, *PAINTED, "FBDD + HFA + exact", "FBDD + projection")
    for figure in ("hidden background", "perceptual distance")
]
FILE = "strata_mini_layeringdiff.safetensors"
SIDE, STEPS, FIRST = 128, 20, 2 * 10**6  # behind the scenes of training
GROWN = 0.02  # alpha above which inpainting draws anew


def scene_of(seed: int) -> renderer.Scene:
    """One to three objects; the nearest one is taken out."""
    return renderer.render(renderer.Request(), SIDE, SIDE, FIRST + 10 * seed)


def truth_of(scene: renderer.Scene) -> tuple[torch.Tensor, ...]:
    """Image, foreground, background [1,3,H,W] and alpha [1,1,H,W]. The shadow belongs to the background."""
    front = scene.objects[-1]
    behind = picture(renderer.over(front.shadow, scene.behind_nearest))
    colour, alpha = picture(front.rgba).split([3, 1], 1)
    return layering.composite(colour, behind, alpha), colour, behind, alpha


def opened() -> tuple:
    """The family, the classifier, the inpainting model and the decomposer."""
    family, judge = Family(), oracle.load()
    mini_family.register(decomposer.UNETS)
    model = comfy.sd.load_diffusion_model(str(MODELS / "diffusion_models" / "strata_mini_inpaint.safetensors"))
    loaded = layer_files.load(FILE, decomposer.Decomposer)
    return family, judge, model, loaded


@torch.inference_mode()
def measure(seeds: range) -> dict[str, dict[str, list[float]]]:
    family, judge, model, loaded = opened()
    found: dict[str, dict[str, list[float]]] = {}
    shown = []
    for seed in seeds:
        scene = scene_of(seed)
        image, front, behind, alpha = truth_of(scene)
        layers = layers_of(family, model, loaded, scene, image, front, behind, alpha, seed)
        for name, (made_front, made_behind) in layers.items():
            column = found.setdefault(name, {})
            for figure, value in figures_of(judge, scene, image, front, behind, alpha, made_front, made_behind).items():
                column.setdefault(figure, []).append(value)
        if len(shown) < 48:
            shown += [image, *(layers[name][1] for name in (OURS, SMOOTH, PAINTED[1])), behind, layers[OURS][0]]
    loop.save_grid(OUTPUT / "decompose.png", torch.cat(shown), 6)
    return found


def layers_of(family, model, loaded, scene, image, front, behind, alpha, seed) -> dict[str, tuple]:
    """Foreground and background of each way; None where a way makes none."""
    run = decomposer.Run(seed, STEPS, "ddim", "ddim_uniform")
    drawn = decomposer.draw(model, family.vae, loaded, image, alpha, run, decomposer.Progress(2 * STEPS))
    layers = {
        name: decomposer.finish(loaded, image, alpha, drawn, align, exact)
        for name, align, exact in (
            (OURS, False, True),
            ("FBDD + HFA + exact", True, True),
            ("FBDD + HFA", True, False),
            ("FBDD", False, False),
        )
    }
    layers["FBDD + projection"] = layering.exact_layers(image, alpha, *layers["FBDD"])  # without the spreading
    smooth = [
        part.movedim(-1, 0)[None]
        for part in matting.separate_colours(image[0].movedim(0, -1).contiguous(), alpha[0, 0])
    ]
    layers[SMOOTH] = tuple(smooth)
    words = family.text(f"{renderer.EMPTY} {renderer.PLACE_WORDS[scene.kind][0]}")
    inside = (alpha > 0.95).float()
    painted = inpainted(family, model, words, smooth[1], inside, seed)
    layers[PAINTED[0]] = (smooth[0], torch.where(inside > 0, painted, smooth[1]))
    outside = (alpha > GROWN).float()
    painted = inpainted(family, model, words, image, outside, seed)
    layers[PAINTED[1]] = (None, torch.where(outside > 0, painted, image))
    return layers | known_of(family, image, front, behind, alpha)


def known_of(family, image, front, behind, alpha) -> dict[str, tuple]:
    """The truth, and what the autoencoder leaves of it."""
    parts = (extend_colours(front, alpha), behind)
    ceiling = [family.vae.decode(family.vae.encode(part.movedim(1, -1))).movedim(-1, 1) for part in parts]
    return {
        "truth through the autoencoder": layering.copy_visible(image, alpha, *ceiling),
        "truth": (front, behind),
    }


def inpainted(family, model, words, image, mask, seed) -> torch.Tensor:
    """[1,3,H,W] as stock nodes draw it."""
    positive, negative, latent = comfyui_nodes.InpaintModelConditioning().encode(
        words, family.negative, image.movedim(1, -1), family.vae, mask[:, 0], noise_mask=True
    )
    (sampled,) = comfyui_nodes.common_ksampler(model, seed, STEPS, 4.0, "euler", "normal", positive, negative, latent)
    return family.vae.decode(sampled["samples"]).movedim(-1, 1)


def figures_of(judge, scene, image, front, behind, alpha, made_front, made_behind) -> dict[str, float]:
    hidden, partly = (alpha > 0.95).float(), ((alpha > 0.02) & (alpha <= 0.95)).float()
    error = (made_behind - behind) * hidden
    name = scene.objects[-1].name
    _, objects = judge.logits(made_behind)
    place, _ = judge.text_agreement(made_behind, [scene.kind], [[]])
    found = {
        "hidden background": 1000 * metrics.mask_error(made_behind, behind, hidden).item(),
        "hidden background, squared": 1000 * (error.square().sum() / (3 * hidden.sum())).item(),
        "hidden background, sum in thousands": error.abs().mean(1).sum().item() / 1000,
        "background partly covered": 1000 * metrics.mask_error(made_behind, behind, partly * (1 - alpha)).item(),
        "perceptual distance": 1000 * judge.distance(made_behind, behind).item(),
        "object still seen": float(objects[0, judge.objects.index(name)] > 0),
        "place kept": place.item(),
    }
    if made_front is not None:
        missing = (layering.composite(made_front, made_behind, alpha) - image).abs()
        found |= {
            "foreground partly covered": 1000 * metrics.mask_error(made_front, front, partly * alpha).item(),
            "recomposition": 1000 * missing.mean().item(),
            "recomposition, largest, of 255": 255 * missing.max().item(),
        }
    return found
