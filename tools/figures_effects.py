"""Effect layers on rendered scenes: shadow and light found by comparing the image with its plain layers. Then the
object is moved, with its effects, without them, and harmonised again.

The truth at the new place is the renderer's own layer of object and shadow, moved. The band is where that shadow lies.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from figures_harmonize import band, harmonised
from mini_models import OUTPUT, Family, picture
from strata.scenes.renderer import Request, render
from strata.techniques import arrange, effects, metrics
from strata.techniques.compositing import flatten
from strata.techniques.layers import Layer, LayerStack
from strata.training import loop

COUNT, SAMPLE = 48, 2
SIDE = 128
FIRST = 6 * 10**6  # behind the scenes of training
EFFECTS, AGAIN, PLAIN = "effect layers", "harmonised again", "plain stacking"
CLAIMS = [(EFFECTS, other, "shadow band at the new place") for other in (AGAIN, PLAIN)]
SEEN = 0.06  # less darkening is no shadow


def stack_of(scene) -> LayerStack:
    objects = [Layer(torch.from_numpy(one.rgba), one.name) for one in scene.objects]
    return LayerStack((SIDE, SIDE), (Layer(torch.from_numpy(scene.background), "background"), *objects))


def in_bytes(stack: LayerStack) -> LayerStack:
    return stack.with_layers(replace(layer, image=(layer.image * 255).round() / 255) for layer in stack.layers)


@torch.inference_mode()
def measure(seeds: range) -> dict[str, dict[str, list[float]]]:
    family, shown = Family(), []
    found: dict[str, dict[str, list[float]]] = {EFFECTS: {}, AGAIN: {}, PLAIN: {}}

    def note(column: str, figure: str, value) -> None:
        found[column].setdefault(figure, []).append(float(value))

    for seed in seeds:
        scene = render(Request(train=True, count=1 + seed % 3), SIDE, SIDE, FIRST + seed)
        stack, image = stack_of(scene), torch.from_numpy(scene.composite)
        effect = effects.find_effects(stack, image, 0)
        made = effects.effect_layers(stack, effect)
        note(EFFECTS, "largest difference from the image, of 255", 255 * (flatten(made)[0] - image).abs().max())
        off = (flatten(in_bytes(made))[0] - image).abs().amax(-1)
        note(EFFECTS, "share of pixels within 1/255, in 8 bits", (off <= 1 / 255 + 1e-6).float().mean())
        for item, gain in zip(scene.objects, effect.ground, strict=True):
            ours, true = -gain.clamp(max=0).mean(0), torch.from_numpy(item.shadow[..., 3])
            others = [other for other in scene.objects if other is not item]
            free = 1 - torch.from_numpy(item.rgba[..., 3])
            for other in others:
                free = free * (1 - torch.from_numpy(other.rgba_with_shadow[..., 3]))
            pixels = free > 0.98
            if ((true > SEEN) & pixels).any():
                note(
                    EFFECTS,
                    "shadow alone on the ground, IoU",
                    metrics.alpha_iou(
                        ((ours > SEEN) & pixels).float()[None, None], ((true > SEEN) & pixels).float()[None, None]
                    ),
                )
        scene = render(Request(train=True, count=1), SIDE, SIDE, FIRST + 100_000 + seed)
        left, _, right, _ = scene.objects[0].box
        moved = min(34, SIDE - right) if left + right < SIDE else -min(34, left)
        stack = stack_of(scene)
        lit = effects.with_effect_layers(stack, torch.from_numpy(scene.composite), 0)
        along = flatten(arrange.transform_layers(lit, scene.objects[0].name, move=(moved, 0)))[0]
        again, plain = harmonised(family, scene, moved)
        truth = moved_truth(scene, moved)
        images = {EFFECTS: along.movedim(-1, 0)[None], AGAIN: again, PLAIN: plain}
        for column, one in images.items():
            note(column, "shadow band at the new place", metrics.mask_error(one, truth, band(scene, moved)))
        shown.append(torch.cat([picture(scene.composite), truth, *images.values()]))
    loop.save_grid(OUTPUT / "effects.png", torch.stack(shown[:12], 1).flatten(0, 1), min(len(shown), 12))
    return found


def moved_truth(scene, moved: int) -> torch.Tensor:
    """[1,3,H,W]: the object with its shadow, moved to the side, over its place."""
    layer, place = picture(scene.objects[0].rgba_with_shadow), picture(scene.background)
    layer = F.pad(layer, (moved, -moved))
    return layer[:, :3] * layer[:, 3:] + place * (1 - layer[:, 3:])
