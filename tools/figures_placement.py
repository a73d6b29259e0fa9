"""Where layers from words put their object and how much of the picture it fills, by LayeringDiff's Tab. 2: a sentence
drawn and taken apart as in text_to_layers_by_decomposition_mini.json, beside this pack's other ways to layers from
words and beside rendered scenes, whose objects stand where and as large as they should.

Figures are percent of the picture. `nothing there` is the share of layers without a pixel of alpha above a half.
"""

from __future__ import annotations

import figures_layerfusion
import figures_layers
import numpy as np
import torch
from mini_models import LAYER_MODEL, Family
from safetensors.torch import load_file
from strata.nodes.decompose import METHODS, MatteForeground
from strata.nodes.shared_layers import ImageToLayers, LayerPrompts, LayersSampler
from strata.patches import detection, layer_modules, transparency, transparency_model
from strata.patches.fusion import Settings, blend_attention
from strata.patches.layer_prompts import encode_prompts
from strata.patches.layer_rows import sample_rows
from strata.patches.shared_layers import Maps, Sharing, map_context, share_layers
from strata.scenes import renderer
from strata.techniques import metrics
from strata.techniques.layers import read_layers

import nodes as comfyui_nodes

COUNT, SAMPLE = 24, 0
SIDE = 128
RENDERED, DECOMPOSED = "rendered scenes", "image taken apart"
FIGURES = ("occupancy", "longest span", "vertical centre", "horizontal centre")
CLAIMS = [
    (DECOMPOSED, other, figure)
    for other in (RENDERED, "LayerFusion", "Layers sampler")
    for figure in ("occupancy", "longest span")
]


def content(seed: int) -> tuple[str, str]:
    """Place and object of a sentence."""
    kind, (name,) = renderer.choose(renderer.Request(train=True, count=1), np.random.default_rng(8 * 10**9 + seed))
    return kind, name


class Ways:
    """Alphas [1,1,H,W] of an object in a place."""

    def __init__(self):
        self.family = Family()
        self.adapter, self.decoder = (
            transparency.recognise(name, load_file(LAYER_MODEL / f"strata_mini_transparent_{name}.safetensors"))
            for name in ("attn", "decoder")
        )
        path = LAYER_MODEL / "strata_mini_dreamlayer.safetensors"
        terms = layer_modules.recognise(path.name, load_file(path))
        self.layered = map_context(share_layers(self.family.model, Sharing(1.0), terms), Maps(1.0), terms)

    def latent(self) -> dict:
        return {"samples": torch.zeros(1, 4, SIDE // 8, SIDE // 8)}

    def apart(self, what: str, where: str, seed: int) -> torch.Tensor:
        family = self.family
        (drawn,) = comfyui_nodes.common_ksampler(
            *(family.model, seed, 20, 4.0, "dpmpp_2m", "normal", family.text(f"{what} {where}"), family.negative),
            self.latent(),
        )
        image = family.vae.decode(drawn["samples"])
        (prompts,) = LayerPrompts.execute(family.clip, where, what).args
        document, *_ = ImageToLayers.execute(
            *(self.layered, family.vae, image, prompts, family.negative, 20, 2.0, "ddim_uniform"),
            self.adapter,
            self.decoder,
        ).args
        rough = read_layers(document).layers[1].rgba()[None, ..., 3]
        unused = detection.MATTING.choices()[0]
        return MatteForeground.execute(image, rough, False, METHODS[0], unused, 4.0, 0, "off")[0][:, None]

    def fused(self, what: str, where: str, seed: int) -> torch.Tensor:
        settings = Settings(boundary=15.0, wide=True)
        model = blend_attention(transparency_model.apply_to_foreground(self.family.model, self.adapter), settings)
        positive = encode_prompts(self.family.clip, (what, f"{renderer.EMPTY} {where}", f"{what} {where}"))
        given = {"negative": self.family.negative, "latent_image": self.latent(), "steps": 15, "seed": seed}
        front, *_ = sample_rows(model, positive, 3, **given, **figures_layerfusion.SAMPLING, own_noise=0.0)
        return figures_layerfusion.foreground(self, front)[1]

    @property
    def vae(self):
        return self.family.vae

    def sampled(self, what: str, where: str, seed: int) -> torch.Tensor:
        (positive,) = LayerPrompts.execute(self.family.clip, f"{renderer.EMPTY} {where}", what).args
        layers, *_ = LayersSampler.execute(
            *(self.layered, self.family.vae, positive, figures_layers.SAME, False, 0.4, 0.6),
            self.adapter,
            self.decoder,
            negative=self.family.negative,
            latent_image=self.latent(),
            seed=seed,
            **figures_layers.SAMPLING,
        ).args
        return read_layers(layers[0]).layers[1].rgba()[None, None, ..., 3]


@torch.inference_mode()
def measure(seeds: range) -> dict[str, dict[str, list[float]]]:
    ways = Ways()
    found: dict[str, dict[str, list[float]]] = {}
    for seed in seeds:
        kind, name = content(seed)
        what, where = renderer.catalogue()[name].prompts[0], renderer.PLACE_WORDS[kind][0]
        truth = renderer.render(renderer.Request(kind, (name,)), SIDE, SIDE, seed).objects[0].rgba
        alphas = {
            RENDERED: torch.from_numpy(truth)[None, None, ..., 3],
            DECOMPOSED: ways.apart(what, where, seed),
            "LayerFusion": ways.fused(what, where, seed),
            "Layers sampler": ways.sampled(what, where, seed),
        }
        for way, alpha in alphas.items():
            (placed,) = 100 * metrics.placement(alpha)
            values = dict(zip(FIGURES, placed.tolist(), strict=True)) | {
                "nothing there": 100.0 * placed[0].isnan().item()
            }
            for figure, value in values.items():
                found.setdefault(way, {}).setdefault(figure, []).append(value)
    return found
