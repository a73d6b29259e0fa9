"""Whole images from words by the shipped Flux-Fill at both its sizes, with a box over all of the image, beside the
first generation at its own.
"""

from __future__ import annotations

import torch
from figures_flux import MODELS_OF, SIDE, STEPS, load, scene_of
from mini_models import OUTPUT, Family
from strata.scenes import renderer
from strata.training import loop, oracle

import nodes as comfyui_nodes

COUNT, SAMPLE = 48, 1
CLAIMS = [("Flux-Fill, 256", "text to image", "object")]


def measure(seeds: range) -> dict[str, dict[str, list[float]]]:
    family, judge, found = Family(), oracle.load(), {}
    columns = {"Flux-Fill": (filled, SIDE), "Flux-Fill, 256": (filled, 256), "text to image": (drawn, SIDE)}
    for column, (draw, side) in columns.items():
        scenes = [scene_of(seed, side) for seed in seeds]
        made = torch.cat([draw(family, scene, seed) for scene, seed in zip(scenes, seeds, strict=True)])
        place, right = judge.text_agreement(
            made, [scene.kind for scene in scenes], [[scene.objects[0].name] for scene in scenes]
        )
        found[column] = {"object": right.tolist(), "place": place.tolist()}
        loop.save_grid(OUTPUT / f"{column} from words.png", made[:32], 8)
    return found


@torch.no_grad()
def filled(family: Family, scene: renderer.Scene, seed: int) -> torch.Tensor:
    """[1,3,S,S]"""
    file, *run = MODELS_OF["Flux-Fill"]
    side = len(scene.background)
    empty = torch.full((1, side, side, 3), 0.5), family.vae, torch.ones(1, side, side)
    words = family.text(scene.prompt)
    given = comfyui_nodes.InpaintModelConditioning().encode(words, family.negative, *empty, noise_mask=False)
    (sampled,) = comfyui_nodes.common_ksampler(load(file, side), seed, STEPS, *run, *given)
    return family.vae.decode(sampled["samples"]).movedim(-1, 1)


@torch.no_grad()
def drawn(family: Family, scene: renderer.Scene, seed: int) -> torch.Tensor:
    """[1,3,S,S]"""
    latent = {"samples": torch.zeros(1, 4, *(len(scene.background) // 8,) * 2)}
    run = (STEPS, 4.0, "dpmpp_2m", "karras")
    (sampled,) = comfyui_nodes.common_ksampler(
        family.model, seed, *run, family.text(scene.prompt), family.negative, latent
    )
    return family.vae.decode(sampled["samples"]).movedim(-1, 1)
