"""Trains the low-rank adapter that makes the mini Flux-Fill draw one object in the RGBA autoencoder's latents, at two
sizes in turns: what layers on it need in place of LayerDiffuse's.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..networks import flux
from ..networks.autoencoder import Autoencoder
from ..networks.back_to_front import CONTENT
from ..scenes import renderer
from . import data, fill_base, flux_fill, latents, loop, published, settings, text
from .cutouts import CutOuts, checkerboard

CHECK = 32  # the last cut-outs are kept for validation
SHOWN = 6  # images in the grid, at the smaller side
CELLS = 64  # of a mask, for each latent pixel
START = "back_to_front"  # whose terms for the foreground are a start: they draw an object with its shadow


class CutOutLatents:
    """Cut-outs as latents, encoded once; a batch is of whole images that are to be drawn from words."""

    def __init__(self, pool: CutOuts, rgba: Autoencoder, blank: Tensor):
        self.pool, self.rgba, self.blank = pool, rgba, blank
        self.kept: dict[int, Tensor] = {}

    @torch.no_grad()
    def batch(self, indices: np.ndarray, draw: int) -> flux_fill.Batch:
        """The cut-outs of these numbers; `draw` chooses among the words that fit, and whether there is an image to
        fill, gray all over, or none, which a graph without one gives as zeros.
        """
        missing = [int(i) for i in np.unique(indices) if int(i) not in self.kept]
        for start in range(0, len(missing), latents.AT_ONCE):
            part = missing[start : start + latents.AT_ONCE]
            rgba = data.to_tensor(np.stack([self.pool[i] for i in part]))
            rgba = rgba.contiguous(memory_format=torch.channels_last)  # a third faster
            self.kept.update(zip(part, self.rgba.encode(rgba), strict=True))
        latent = torch.stack([self.kept[int(i)] for i in indices])
        given = torch.stack([self.blank * float((i + draw) % 2) for i in indices])
        everywhere = torch.ones_like(latent[:, :1])
        condition = torch.cat([given, everywhere.expand(-1, CELLS, -1, -1)], 1)
        return flux_fill.Batch(latent, condition, everywhere, [self.words(int(i), draw) for i in indices])

    def words(self, index: int, draw: int) -> str:
        rng = np.random.default_rng((index, draw))
        what = str(rng.choice(renderer.catalogue()[self.pool.content(index)[1][0]].prompts))
        return text.PLAIN.format(what=what) if rng.random() < 0.2 else what


def build(config: dict) -> nn.Module:
    """The published Flux-Fill, frozen, with low-rank terms on the layers of its blocks, which are all that learns, and
    all of the state that is saved.
    """
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(config["seed"])
    model = published.flux_fill()
    terms = LoraConfig(r=config["rank"], lora_alpha=config["rank"], target_modules=flux.linear_layers(model))
    inject_adapter_in_model(terms, model)
    loop.save_what_learns(model)
    if config["start"] == "published":
        state = published.read(settings.MODELS / published.FLUX_ADAPTER)[0]
        model.load_state_dict({key: state[published_key(key)] for key in model.state_dict()})
    elif config["start"] == START:
        state = published.read(settings.MODELS / published.BACK_TO_FRONT)[0]
        model.load_state_dict({key: state[key.replace(".default.", f".{CONTENT[1]}.")] for key in model.state_dict()})
    return model


def published_key(key: str) -> str:
    """diffusers' name of a learnt weight in a LoRA file, which ComfyUI reads."""
    return "transformer." + key.replace(".default.", ".")


def published_form(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {published_key(key): value for key, value in state.items()}


def train(config: dict, folder: Path, minutes: float | None, save_every: float) -> nn.Module:
    base = fill_base.load({})
    words = base.words([], folder)

    def pool(side: int) -> CutOutLatents:
        cutouts = CutOuts(folder.parent / "scenes", config["scenes"], side, None, shadows=0.0)
        return CutOutLatents(cutouts, base.rgba, base.autoencoder.encode(torch.full((1, 3, side, side), 0.5))[0])

    sides = config["side"], config["smaller_side"]
    batches = config["batch"], config["batch"] * config["side"] ** 2 // config["smaller_side"] ** 2
    pools, check = [pool(side) for side in sides], np.arange(config["scenes"] - CHECK, config["scenes"])
    board = checkerboard(config["smaller_side"])

    def loss(model, step, rank):
        rng = np.random.default_rng((config["seed"], step, rank))
        known = data.known_at(step, config["scenes"] - CHECK, config["scenes_per_step"])
        batch = pools[step % 2].batch(rng.integers(0, known, batches[step % 2]), step)
        return flux_fill.loss_of(model, batch, words, config, rng)

    @torch.no_grad()
    def validate(model, step):
        plain, report = {**config, "empty_prompt": 0}, {}
        for side, own in zip(sides, pools, strict=True):
            batch = own.batch(check, 0)
            terms = flux_fill.loss_of(model, batch, words, plain, np.random.default_rng(0))
            report[f"error {side}"] = terms["error"].item()
        condition = pools[1].batch(check[:SHOWN], 0).condition
        names = [entry.prompts[0] for entry in renderer.catalogue().values() if not entry.held_out][::8][:SHOWN]
        found = base.rgba.decode(flux_fill.sample(model, condition, names, words, steps=12)).clamp(0, 1)
        loop.save_grid(folder / "grid.png", found[:, :3] * found[:, 3:] + board * (1 - found[:, 3:]), SHOWN)
        print(f"step {step}: " + "  ".join(f"{key} {value:.4g}" for key, value in report.items()), flush=True)
        return report

    return loop.fit(build(config), loss, validate, config, folder, minutes, save_every)
