"""figures_layers.py on the mini Flux-Fill with the RGBA autoencoder: layers from text, sampled apart and with what the
method shares; no module is trained for it. The pictures go to output/layers_flux.png.
"""

from __future__ import annotations

from functools import cache

import figures_layers
from figures_flux import load
from strata.patches import layer_files, rgba_vae
from strata.patches.shared_layers import Sharing, map_context, share_layers

COUNT, SAMPLE = 96, 1
SIDE = 128
METHODS = {name: figures_layers.METHODS[name] for name in ("none", "LSSA", "CACA", "both")}
CLAIMS = [
    (method, "none", figure)
    for method in ("LSSA", "CACA", "both")
    for figure in ("overlap", "layers to whole", "objects seen in the layers", "objects seen in the whole")
]
FILE = "strata_mini_flux_transparent.safetensors"
SAMPLING = {"steps": 15, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}


@cache
def rgba():
    return rgba_vae.load(rgba_vae.SHIPPED)


@cache
def adapter():
    return layer_files.load(FILE, layer_files.Transparency)


def sampled(family, seed, method, way, side=SIDE):
    sharing, maps, noise = way
    model = load("strata_mini_flux_fill.safetensors", side)
    model = map_context(share_layers(model, Sharing(sharing)), maps)
    return figures_layers.drawn(family, seed, model, rgba(), noise, adapter(), None, side, **SAMPLING)


def measure(seeds: range, methods=METHODS) -> dict[str, dict[str, list[float]]]:
    return figures_layers.measure(seeds, methods, sampled, "layers_flux")
