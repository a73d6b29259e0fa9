"""DreamLayer's ablation (its Tab. 3): what shared attention, context maps and trained modules do for layers from text.

The pictures go to output/layers.png, for each scene one row a method: background, objects on a checkerboard, empty
places, layers over each other, whole picture.
"""

from __future__ import annotations

import numpy as np
import torch
from mini_models import LAYER_MODEL, OUTPUT, Family
from safetensors.torch import load_file
from strata.nodes.shared_layers import LayerPrompts, LayersSampler
from strata.patches import layer_modules, transparency
from strata.patches.shared_layers import Maps, Sharing, map_context, share_layers
from strata.scenes import renderer
from strata.techniques import metrics
from strata.techniques.compositing import flatten
from strata.techniques.layers import read_layers
from strata.training import loop, oracle
from strata.training.cutouts import checkerboard

COUNT, SAMPLE = 32, 2
SIDE, MOST = 128, 3
SHOWN = 192  # rows of the grid
SAME, HALF = "same for all layers", "half the same"
METHODS = {  # strength of sharing, context maps, noise
    "none": (0, Maps(0), SAME),
    "LSSA": (1, Maps(0), SAME),
    "CACA": (0, Maps(), SAME),
    "both": (1, Maps(), SAME),
    "both, trained": (1, Maps(), SAME),
    "both, trained, half the same noise": (1, Maps(), HALF),
}
CLAIMS = [("both, trained", "none", figure) for figure in ("overlap", "layers to whole", "objects seen in the whole")]
SAMPLING = {"steps": 15, "cfg": 4.0, "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 1.0}
EMPTY = 0.5  # an object's layer whose alpha stays below is taken for empty


def content(number):
    """Place and objects of a scene of one to three objects, as often each."""
    return renderer.choose(
        renderer.Request(train=True, count=1 + number % MOST), np.random.default_rng(7 * 10**9 + number)
    )


def overlap(alphas):
    """Mean IoU of every two of the objects' alphas [F,1,H,W]; a pair with an empty layer counts 1, a miss; nan for a
    single one.
    """
    pairs = torch.combinations(torch.arange(len(alphas)))
    if not len(pairs):
        return torch.tensor(torch.nan)
    empty = alphas.flatten(1).amax(1) < EMPTY
    missed = empty[pairs].any(1)
    return torch.where(missed, 1.0, metrics.alpha_iou(alphas[pairs[:, 0]], alphas[pairs[:, 1]])).mean()


def sampled(family, seed, method, way, terms=None):
    """Layers, whole picture [3,S,S], place and objects.

    terms: of layer modules; those that ship where the method says that it is trained.
    """
    sharing, maps, noise = way
    adapter, decoder = (
        transparency.recognise(name, load_file(LAYER_MODEL / f"strata_mini_transparent_{name}.safetensors"))
        for name in ("attn", "decoder")
    )
    if "trained" in method:
        path = LAYER_MODEL / "strata_mini_dreamlayer.safetensors"
        terms = layer_modules.recognise(path.name, load_file(path))
    model = map_context(share_layers(family.model, Sharing(sharing), terms), maps, terms)
    return drawn(family, seed, model, family.vae, noise, adapter, decoder, SIDE, **SAMPLING)


def drawn(family, seed, model, vae, noise, adapter, decoder, side, **sampling):
    kind, names = content(seed)
    where = renderer.PLACE_WORDS[kind][0]
    prompts = [renderer.catalogue()[name].prompts[0] for name in names]
    (positive,) = LayerPrompts.execute(family.clip, f"{renderer.EMPTY} {where}", "\n".join(prompts)).args
    layers, _composite, whole, *_ = LayersSampler.execute(
        model,
        vae,
        positive,
        noise,
        False,
        0.4,
        0.6,
        adapter,
        decoder,
        negative=family.negative,
        latent_image={"samples": torch.zeros(1, 4, side // 8, side // 8)},
        seed=seed,
        **sampling,
    ).args
    return read_layers(layers[0]), whole[0].movedim(-1, 0).clamp(0, 1), kind, names


@torch.inference_mode()
def measure(seeds: range, methods=METHODS, draw=sampled, grid="layers") -> dict[str, dict[str, list[float]]]:
    """{method: {figure: one value a seed}}"""
    judge, family, rows, found = oracle.load(), Family(), [], {method: {} for method in methods}
    for seed in seeds:
        for method, way in methods.items():
            stack, whole, kind, names = draw(family, seed, method, way)
            side = whole.shape[-1]
            board = checkerboard(side).expand(3, -1, -1)
            background, *objects = (layer.rgba().movedim(-1, 0) for layer in stack.layers)
            objects = torch.stack(objects)
            flat = flatten(stack)[0].movedim(-1, 0)
            place, share = judge.text_agreement(torch.stack([flat, whole]), [kind] * 2, [names] * 2)
            values = {
                "overlap": overlap(objects[:, 3:]),
                "layers to whole": (flat - whole).abs().mean(),
                "objects seen in the layers": share[0],
                "objects seen in the whole": share[1],
                "place of the layers": place[0],
                "empty layers": (objects[:, 3].flatten(1).amax(1) < EMPTY).float().mean(),
            }
            for figure, value in values.items():
                found[method].setdefault(figure, []).append(float(value))
            shown = [
                *(objects[:, :3] * objects[:, 3:] + board * (1 - objects[:, 3:])),
                *[torch.ones(3, side, side)] * (MOST - len(names)),
            ]
            if len(rows) < SHOWN:
                rows.append(torch.stack([background[:3], *shown, flat, whole]))
    loop.save_grid(OUTPUT / f"{grid}.png", torch.cat(rows), len(rows[0]))
    return found
