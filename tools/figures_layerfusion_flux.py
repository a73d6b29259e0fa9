"""figures_layerfusion.py on the mini Flux-Fill with the RGBA autoencoder. The pictures go to
output/layerfusion_mini Flux.png.
"""

from __future__ import annotations

import torch
from figures_flux import load
from figures_layerfusion import OUTPUT, Family, drawn, measured, rendered_overlap
from figures_layers_flux import adapter, rgba
from mini_models import Family as Checkpoint
from strata.patches.fusion import Settings
from strata.training import oracle

COUNT, SAMPLE = 16, 2
SIDE = 128
COLUMN = "mini Flux"
CLAIMS = []
SETTINGS = Settings(boundary=15.0, wide=True)
SAMPLING = {"cfg": 2.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
STEPS = 15


@torch.inference_mode()
def measure(seeds: range, side=SIDE, settings=SETTINGS) -> dict[str, dict[str, list[float]]]:
    """{column: {figure: one value a picture}}"""
    checkpoint, model = Checkpoint(), load("strata_mini_flux_fill.safetensors", side)
    family = Family(model, checkpoint.clip, checkpoint.vae, adapter(), None, rgba())
    shown, names = drawn(family, seeds, settings, STEPS, side, SAMPLING)
    figures = measured(shown, names, oracle.load(), OUTPUT / f"layerfusion_{COLUMN}.png")
    figures["iou of rendered scenes"] = rendered_overlap(family, names, side)
    return {COLUMN: {figure: values.tolist() for figure, values in figures.items()}}
