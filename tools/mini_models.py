"""The shipped mini family in this process, through ComfyUI's own loader, for figures and for the tests that check them.

ComfyUI must be importable already: tests/patches/conftest.py and tools/figures.py see to it.
"""

from __future__ import annotations

from pathlib import Path

import comfy.samplers
import comfy.sd
import torch
from strata.patches import mini_family
from strata.scenes.renderer import Request, render

MODELS = Path(mini_family.PACK) / "models"
OUTPUT = Path(mini_family.PACK) / "output"
CHECKPOINT = MODELS / "checkpoints" / "strata_mini_sd.safetensors"
LAYER_MODEL = MODELS / "layer_model"


def picture(array) -> torch.Tensor:
    """[1,C,H,W] of the renderer's [H,W,C]."""
    return torch.from_numpy(array.copy()).movedim(-1, 0)[None].float()


class Family:
    def __init__(self, checkpoint: Path = CHECKPOINT):
        mini_family.register()
        self.model, self.clip, self.vae, _ = comfy.sd.load_checkpoint_guess_config(str(checkpoint))
        self.negative = self.text("")

    def text(self, words):
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(words))

    def scene(self, kind, objects, seed):
        """(rendered scene, its latent, its conditioning)."""
        scene = render(Request(kind, objects, len(objects)), 128, 128, seed)
        return scene, self.vae.encode(torch.from_numpy(scene.composite)[None]), self.text(scene.prompt)

    def sigmas(self, steps):
        return comfy.samplers.calculate_sigmas(self.model.get_model_object("model_sampling"), "ddim_uniform", steps)
