"""Harmonize layers against plain stacking, by the rendered truth. The pictures go to output/harmonize.png, one column a
scene: plain stacking, harmonised, truth.
"""

from __future__ import annotations

import numpy as np
import torch
from mini_models import OUTPUT, Family, picture
from strata.nodes.harmonize import HarmonizeLayers
from strata.scenes import renderer
from strata.techniques import metrics
from strata.techniques.layers import Layer, LayerStack, write_layers
from strata.training import loop

COUNT, SAMPLE = 48, 6
FIRST = 5 * 10**9  # numbers of scenes that nothing was trained on
SETTINGS = {
    "steps": 30,
    "cfg": 2.5,
    "sampler_name": "euler",
    "scheduler": "normal",
    "start_percent": 0.85,
    "end_percent": 0.95,
    "foregrounds": "keep",
    "feather": 0.0,
    "detail": 10.0,
}
CLAIMS = [("harmonised", "plain stacking", "shadow band"), ("harmonised", "plain stacking", "darker at the new place")]


def stacked(scene, moved=0):
    """The layers without their shadows, the objects so many pixels to the right, and what they look like one over the
    other.
    """
    items = [np.roll(item.rgba, moved, 1) for item in scene.objects]
    below = scene.background
    for item in items:
        below = renderer.over(item, below)
    layers = [
        Layer(torch.from_numpy(np.ascontiguousarray(pixels)), str(number))
        for number, pixels in enumerate((scene.background, *items))
    ]
    return write_layers(LayerStack((128, 128), tuple(layers))), picture(below)


def band(scene, moved=0):
    """Where the objects' shadows are seen around them, [1,1,H,W]."""
    shadows, alphas = (
        np.roll(np.stack([values[..., 3] for values in found]), moved, 2)[None]
        for found in ([item.shadow for item in scene.objects], [item.rgba for item in scene.objects])
    )
    return metrics.shadow_band(torch.from_numpy(shadows), torch.from_numpy(alphas), 3)


def harmonised(family, scene, moved=0, **settings):
    layers, plain = stacked(scene, moved)
    result = HarmonizeLayers.execute(
        family.model,
        family.text(scene.prompt),
        family.negative,
        family.vae,
        layers,
        seed=scene.seed % 2**32,
        **SETTINGS | settings,
    )
    return result.args[0].movedim(-1, 1)[:, :3], plain


def scene_of(seed: int, count: int):
    return renderer.render(renderer.Request(train=True, count=count), 128, 128, FIRST + seed)


@torch.inference_mode()
def measure(seeds: range) -> dict[str, dict[str, list[float]]]:
    """{method: {figure: one value a seed}}. Shadow band: mean error there. Darker: how much darker than the stack the
    ground is, where the shadow of an object that was moved belongs now, and where it was; 0 for plain stacking by its
    definition.
    """
    family, shown = Family(), []
    found = {
        method: {"shadow band": [], "darker at the new place": [], "darker at the old place": []}
        for method in ("plain stacking", "harmonised")
    }
    for seed in seeds:
        scene = scene_of(seed, 1 + seed % 3)
        made, plain = harmonised(family, scene)
        truth = picture(scene.composite)
        for method, values in zip(found, (plain, made), strict=True):
            found[method]["shadow band"].append(metrics.mask_error(values, truth, band(scene)).item())
        shown.append(torch.cat([plain, made, truth]))
        scene = scene_of(seed + 100_000, 1)
        left, _, right, _ = scene.objects[0].box
        moved = min(34, 128 - right) if left + right < 128 else -min(34, left)
        made, plain = harmonised(family, scene, moved)
        change = (plain - made).mean(1, keepdim=True)
        places = [band(scene, step) for step in (0, moved)]
        for where, place in (("old", places[0] * (1 - places[1].clamp(0, 1))), ("new", places[1])):
            found["harmonised"][f"darker at the {where} place"].append(float((change * place).sum() / place.sum()))
            found["plain stacking"][f"darker at the {where} place"].append(0.0)
    loop.save_grid(OUTPUT / "harmonize.png", torch.stack(shown[:12], 1).flatten(0, 1), min(len(shown), 12))
    return found
