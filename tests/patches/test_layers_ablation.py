"""DreamLayer's ablation (its Tab. 3) on the trained mini family: what shared attention, context maps and trained modules do for layers from text.

The pictures go to output/layers_ablation.png, for each scene one row a method: background, objects on a checkerboard, empty places, layers over each
other, whole picture. docs/dreamlayer.md has the figures of 32 scenes:

    STRATA_SCENES=32 make test ARGS="tests/patches/test_layers_ablation.py -s"
"""
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from strata.nodes.shared_layers import LayerPrompts, LayersSampler
from strata.patches import layer_modules, transparency
from strata.patches.shared_layers import Maps, Sharing, map_context, share_layers
from strata.techniques.compositing import flatten
from strata.techniques.layers import read_layers
from strata.training import loop, metrics, oracle, scenes
from strata.training.transparency import checkerboard

from .test_trained_composition import CHECKPOINT, Family

FOLDER = CHECKPOINT.parents[1] / "layer_model"
FILES = [FOLDER / f"strata_mini_{name}.safetensors" for name in ("transparent_attn", "transparent_decoder", "dreamlayer")]
pytestmark = pytest.mark.skipif(not all(path.exists() for path in (CHECKPOINT, *FILES)), reason="no trained weights: make mini")

SCENES, SIDE, MOST = int(os.environ.get("STRATA_SCENES", 6)), 128, 3
SAME, HALF = "same for all layers", "half the same"
METHODS = {"none": (0, 0, SAME), "LSSA": (1, 0, SAME), "CACA": (0, 1, SAME), "both": (1, 1, SAME), "both, trained": (1, 1, SAME),
           "both, trained, half the same noise": (1, 1, HALF)}
if SCENES < 32:
    METHODS = {name: METHODS[name] for name in ("none", "both, trained")}
SAMPLING = {"steps": 15, "cfg": 4.0, "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 1.0}


def content(number):
    """Place and objects of a scene of one to three objects, as often each."""
    return scenes.choose(scenes.Request(train=True, count=1 + number % MOST), np.random.default_rng(7 * 10**9 + number))


def overlap(alphas):
    """Mean IoU of every two of the objects' alphas [F,1,H,W]; nan for a single one."""
    pairs = torch.combinations(torch.arange(len(alphas)))
    return metrics.alpha_iou(alphas[pairs[:, 0]], alphas[pairs[:, 1]]).mean() if len(pairs) else torch.tensor(torch.nan)


@pytest.fixture(scope="module")
def family():
    with torch.inference_mode():
        return Family()


@pytest.fixture(scope="module")
def figures(family):
    """{figure: [methods, scenes]}"""
    judge, found, rows = oracle.load(), {}, []
    adapter, decoder = (transparency.recognise(path.name, load_file(path)) for path in FILES[:2])
    modules = layer_modules.recognise(FILES[2].name, load_file(FILES[2]))
    board = checkerboard(SIDE).expand(3, -1, -1)

    @torch.inference_mode()
    def sampled(number, method):
        kind, names = content(number)
        where = scenes.PLACE_WORDS[kind][0]
        prompts = [scenes.catalogue()[name].prompts[0] for name in names]
        sharing, mixing, noise = METHODS[method]
        terms = modules if "trained" in method else None
        model = map_context(share_layers(family.model, Sharing(sharing), terms), Maps(mixing), terms)
        positive, = LayerPrompts.execute(family.clip, f"{scenes.EMPTY} {where}", "\n".join(prompts)).args
        latent = {"samples": torch.zeros(1, 4, SIDE // 8, SIDE // 8)}
        layers, _composite, whole, *_ = LayersSampler.execute(
            model, family.vae, positive, noise, False, 0.4, 0.6, adapter, decoder, negative=family.negative, latent_image=latent,
            seed=number, **SAMPLING).args
        return read_layers(layers[0]), whole[0].movedim(-1, 0).clamp(0, 1), kind, names

    for number in range(SCENES):
        for method in METHODS:
            stack, whole, kind, names = sampled(number, method)
            background, *objects = (layer.rgba().movedim(-1, 0) for layer in stack.layers)
            objects = torch.stack(objects)
            flat = flatten(stack)[0].movedim(-1, 0)
            place, share = judge.text_agreement(torch.stack([flat, whole]), [kind] * 2, [names] * 2)
            values = {"overlap": overlap(objects[:, 3:]), "layers to whole": (flat - whole).abs().mean(), "objects seen in the layers": share[0],
                      "objects seen in the whole": share[1], "place of the layers": place[0]}
            for name, value in values.items():
                found.setdefault(name, {}).setdefault(method, []).append(float(value))
            shown = [*(objects[:, :3] * objects[:, 3:] + board * (1 - objects[:, 3:])), *[torch.ones(3, SIDE, SIDE)] * (MOST - len(names))]
            rows.append(torch.stack([background[:3], *shown, flat, whole]))
    output = CHECKPOINT.parents[2] / "output"
    output.mkdir(exist_ok=True)
    loop.save_grid(output / "layers_ablation.png", torch.cat(rows), len(rows[0]))
    for name, values in found.items():
        print(f"{name}: " + ", ".join(f"{method} {np.nanmean(one):.3f}" for method, one in values.items()))
    return {name: {method: np.array(one) for method, one in values.items()} for name, values in found.items()}


def test_trained_layers_match_the_whole_picture_better_than_layers_apart(figures):
    match = {method: values.mean() for method, values in figures["layers to whole"].items()}
    assert match["both, trained"] < 0.9 * match["none"]


def test_trained_layers_overlap_less_than_layers_apart(figures):
    between = {method: np.nanmean(values) for method, values in figures["overlap"].items()}
    assert between["both, trained"] < 0.95 * between["none"]
    assert SCENES < 32 or between["both, trained, half the same noise"] < 0.9 * between["both, trained"]


def test_the_trained_whole_picture_shows_what_was_asked_for(figures):
    seen = {method: values.mean() for method, values in figures["objects seen in the whole"].items()}
    assert seen["both, trained"] > seen["none"]
    assert figures["objects seen in the layers"]["both, trained"].mean() > 0.5
