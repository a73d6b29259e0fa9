"""Fit layers on what a decomposer makes of rendered scenes, beside enlarging alone.

A decomposer is simulated: layers reduced 2 to 8 times, blurred as by an autoencoder, noise of 5 % in the alpha and of
1 % in the colours, and in two of five scenes a blank layer, a layer twice, or the whole image as the first layer. RGB
L1 is weighted by the true alpha, as the whole layer, and by what is seen of it; layers of a scene count alike.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from strata.scenes.renderer import Request, render
from strata.techniques import fitting, metrics, received
from strata.techniques.harmonization import visible_shares
from strata.techniques.layers import Layer, LayerStack
from strata.techniques.smoothing import gaussian_blur

COUNT, SAMPLE = 200, 6
SIDE = 384
BLUR, ALPHA_NOISE, COLOUR_NOISE, SHARE = 0.7, 0.05, 0.01, 0.4
ENLARGED, FITTED, KEPT = "enlarged", "Fit layers", "Fit layers, alpha kept"
WHOLE, BLANK = "whole", "blank"
CLAIMS = [(FITTED, ENLARGED, figure) for figure in ("RGB L1", "RGB L1 of what is seen", "alpha soft IoU")]


def scene_of(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Image [3,H,W] and true layers [K,4,H,W], objects with their shadows."""
    scene = render(Request(count=1 + seed % 3), SIDE, SIDE, seed)
    back = np.concatenate([scene.background, np.ones_like(scene.background[..., :1])], -1)
    layers = np.stack([back, *(item.rgba_with_shadow for item in scene.objects)]).astype(np.float32)
    return (rearrange(torch.from_numpy(one).clamp(0, 1), "... h w c -> ... c h w") for one in (scene.composite, layers))


def decomposed(image: torch.Tensor, layers: torch.Tensor, seed: int) -> tuple[torch.Tensor, list[int | str]]:
    """What a decomposer gives, [N,4,h,w], and what each of it is: the number of a true layer, or one of the faults."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    given = torch.cat([layers, torch.cat([image, torch.ones_like(image[:1])])[None], torch.zeros_like(layers[:1])])
    kinds: list[int | str] = list(range(len(layers)))
    if rng.random() < SHARE:
        kinds.insert(int(rng.integers(1, len(kinds) + 1)), BLANK)
    if rng.random() < SHARE:
        twice = int(rng.integers(1, len(layers)))
        kinds.insert(kinds.index(twice) + 1, twice)
    if rng.random() < SHARE:
        kinds.insert(0, WHOLE)
    side = SIDE // int(rng.integers(2, 9))
    small = F.interpolate(received.premultiplied(given), size=(side, side), mode="area")
    small = gaussian_blur(small, BLUR, 3 * BLUR)
    small = torch.cat([small[:, :3] / small[:, 3:].clamp(min=1e-3), small[:, 3:]], 1)
    places = {WHOLE: len(layers), BLANK: len(layers) + 1}
    batch = torch.stack([small[places.get(kind, kind)] for kind in kinds])
    noise = batch.new_tensor((COLOUR_NOISE,) * 3 + (ALPHA_NOISE,))[:, None, None]
    return (batch + noise * torch.randn(batch.shape, generator=generator)).clamp(0, 1), kinds


def stack_of(layers: torch.Tensor) -> LayerStack:
    pixels = rearrange(layers, "k c h w -> k h w c").contiguous()
    return LayerStack(tuple(layers.shape[:1:-1]), tuple(Layer(one, str(n)) for n, one in enumerate(pixels)))


def found_and_true(given: LayerStack, left: LayerStack, kinds: list[int | str]) -> dict[str, tuple[int, int, int]]:
    """(found rightly, found, there) of each fault; the layers that are left have their numbers as names."""
    gone = {int(layer.name) for layer in given.layers} - {int(layer.name) for layer in left.layers}
    true = {
        "blank": {n for n, kind in enumerate(kinds) if kind == BLANK},
        "whole image": {n for n, kind in enumerate(kinds) if kind == WHOLE},
    }
    true["twice"] = {n for n, kind in enumerate(kinds) if kind in kinds[:n] and kind not in (BLANK, WHOLE)}
    of_others = {name: set().union(*(true[other] for other in true if other != name)) for name in true}
    return {name: (len(gone & true[name]), len(gone - of_others[name]), len(true[name])) for name in true}


def pixels_of(stack: LayerStack) -> torch.Tensor:
    return rearrange(torch.stack([layer.image for layer in stack.layers]), "k h w c -> k c h w")


def figures_of(found: torch.Tensor, true: torch.Tensor, image: torch.Tensor) -> dict[str, float]:
    _, seen = visible_shares(true[:, 3:])
    shown = (visible_shares(found[:, 3:])[1] * found[:, :3]).sum(0)
    eight = (found * 255).round() / 255
    rounded = (visible_shares(eight[:, 3:])[1] * eight[:, :3]).sum(0)
    within, within_8 = (((one - image).abs().amax(0) <= 1 / 255 + 1e-6).double().mean() for one in (shown, rounded))
    return {
        "RGB L1": float(metrics.layer_rgb_l1(found, true).mean()),
        "RGB L1 of what is seen": float(metrics.mask_error(found[:, :3], true[:, :3], seen).mean()),
        "alpha soft IoU": float(metrics.alpha_iou(found[:, 3:], true[:, 3:]).mean()),
        "recomposition error": float((shown - image).abs().mean()),
        "pixels within 1/255, percent": 100 * float(within),
        "the same with layers of 8 bits": 100 * float(within_8),
    }


@torch.inference_mode()
def measure(seeds: range) -> dict[str, dict[str, list[float]]]:
    found: dict[str, dict[str, list[float]]] = {}
    counts: dict[str, list[tuple[int, int, int]]] = {}
    for seed in seeds:
        image, true = scene_of(seed)
        batch, kinds = decomposed(image, true, seed)
        given, target = stack_of(batch), rearrange(image, "c h w -> h w c")
        left, _ = received.without_useless(given, target)
        for fault, count in found_and_true(given, left, kinds).items():
            counts.setdefault(fault, []).append(count)
        # The figures of layers are of the right ones, whether or not the faults were found.
        right = given.with_layers(given.layers[kinds.index(number)] for number in range(len(true)))
        large = fitting.resized(right, (SIDE, SIDE))
        enlarged = torch.stack([fitting.rastered(layer, large.canvas).image.movedim(-1, 0) for layer in large.layers])
        for name, layers in (
            (ENLARGED, enlarged),
            (FITTED, pixels_of(fitting.fit_stack(right, target).stack)),
            (KEPT, pixels_of(fitting.fit_stack(right, target, refine=False).stack)),
        ):
            for figure, value in figures_of(layers, true, image).items():
                found.setdefault(name, {}).setdefault(figure, []).append(value)
    for fault, of_scenes in counts.items():
        hits, told, there = np.array(of_scenes, float).T
        for name, total in (("precision", told), ("recall", there)):
            # A scene without the fault, or where none was told, says nothing.
            values = np.where(total > 0, hits / np.maximum(total, 1), np.nan).tolist()
            found[FITTED][f"{fault}, {name}"] = values
    return found
