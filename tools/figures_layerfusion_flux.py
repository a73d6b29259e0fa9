"""figures_layerfusion.py on the mini Flux-Fill with the RGBA autoencoder, at both its sizes, beside the mini SD on the
same seeds. The pictures go to output/layerfusion_mini Flux, 256.png and so on.
"""

from __future__ import annotations

import figures_layerfusion
import torch
from figures_flux import load
from figures_layerfusion import OUTPUT, Family, drawn, measured, rendered_overlap
from figures_layers_flux import adapter, rgba
from mini_models import Family as Checkpoint
from strata.patches.fusion import Settings
from strata.training import oracle

COUNT, SAMPLE = figures_layerfusion.COUNT, 2
SIDES = {"mini Flux, 256": 256, "mini Flux, 128": 128}
SD = "mini SD, 128"
SETTINGS = Settings(boundary=15.0, wide=True)
SAMPLING = {"cfg": 2.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
STEPS = 15
CLAIMS = [
    (column, SD, figure)
    for column in SIDES
    for figure in ("iou", "layers to blended", "layers nearer than pasted", "class", "class in the blended picture")
]


@torch.inference_mode()
def measure(seeds: range, columns=(*SIDES, SD), settings=SETTINGS) -> dict[str, dict[str, list[float]]]:
    """{column: {figure: one value a picture}}"""
    judge, checkpoint, found = oracle.load(), Checkpoint(), {}
    for column in columns:
        if column == SD:
            found[SD] = figures_layerfusion.measure(seeds, {"wide": figures_layerfusion.COLUMNS["wide"]})["wide"]
            continue
        side = SIDES[column]
        model = load("strata_mini_flux_fill.safetensors", side)
        family = Family(model, checkpoint.clip, checkpoint.vae, adapter(), None, rgba())
        shown, names = drawn(family, seeds, settings, STEPS, side, SAMPLING)
        figures = measured(shown, names, judge, OUTPUT / f"layerfusion_{column}.png")
        figures["iou of rendered scenes"] = rendered_overlap(family, names, side)
        found[column] = {figure: values.tolist() for figure, values in figures.items()}
    return found
