"""FeatGLaC on the mini Flux-Fill, over the same pairs and against the same ablations as figures_composition.py has for
the mini SD. A box over all of the image makes an ordinary model of it. The pictures go to output/composition_flux.png.
"""

from __future__ import annotations

import comfy.samplers
import figures_composition
import torch
from figures_composition import CLAIMS, COUNT  # noqa: F401  tools/figures.py asks for them
from figures_flux import MODELS_OF, SIDE, load
from mini_models import Family

import nodes as comfyui_nodes

SAMPLE = 2


class FluxFamily(Family):
    def __init__(self):
        super().__init__()
        file, self.cfg, _sampler, self.scheduler = MODELS_OF["Flux-Fill"]
        self.model = load(file)

    def text(self, words):
        empty = torch.full((1, SIDE, SIDE, 3), 0.5), self.vae, torch.ones(1, SIDE, SIDE)
        words = super().text(words)
        return comfyui_nodes.InpaintModelConditioning().encode(words, words, *empty, noise_mask=False)[0]

    def sigmas(self, steps):
        return comfy.samplers.calculate_sigmas(self.model.get_model_object("model_sampling"), self.scheduler, steps)


def measure(seeds: range) -> dict[str, dict[str, list[float]]]:
    with torch.inference_mode():
        family = FluxFamily()
    return figures_composition.measure(seeds, family, family.cfg, "composition_flux.png")
