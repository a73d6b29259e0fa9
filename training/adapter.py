"""Trains the low-rank adapter that makes a denoiser draw one object with hidden transparency, in LayerDiffuse's
attention form: the mini family's on rendered scenes, or a model of the user's own on RGBA images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..networks.autoencoder import Autoencoder
from ..networks.transparency import OffsetEncoder, published_adapter
from ..scenes import renderer
from ..techniques import diffusion as formulas
from . import data, diffusion, export, image_folders, latents, loop, settings, text, text_base
from .cutouts import CutOuts, checkerboard, hidden, load_pair
from .transparent_images import TransparentImages, load_encoder

FILE = "transparent_adapter.safetensors"
SHOWN = 4  # images of a user's own model in a grid


class CutOutLatents:
    """Latents of cut-outs with their transparency in them, encoded once. Prompts name the object, now and then with a
    plain background.
    """

    def __init__(self, pool: CutOuts, autoencoder: Autoencoder, encoder: OffsetEncoder):
        self.pool, self.autoencoder, self.encoder = pool, autoencoder, encoder
        self.kept: dict[int, Tensor] = {}

    @torch.no_grad()
    def batch(self, indices: np.ndarray, draw: int) -> latents.Batch:
        missing = [int(i) for i in np.unique(indices) if int(i) not in self.kept]
        for start in range(0, len(missing), latents.AT_ONCE):
            part = missing[start : start + latents.AT_ONCE]
            rgba = data.to_tensor(np.stack([self.pool[i] for i in part]))
            self.kept.update(zip(part, sum(hidden(rgba, self.autoencoder, self.encoder)), strict=True))
        return latents.Batch(
            torch.stack([self.kept[int(i)] for i in indices]), None, [self.words(int(i), draw) for i in indices]
        )

    def words(self, index: int, draw: int) -> str:
        rng = np.random.default_rng((index, draw))
        what = str(rng.choice(renderer.catalogue()[self.pool.content(index)[1][0]].prompts))
        return text.PLAIN.format(what=what) if rng.random() < 0.3 else what


@dataclass(frozen=True)
class Task:
    """batch: makes a batch from numbers, those below `count` or those of `check`, and a draw. words: as
    diffusion.loss_of takes them. show: the images of a grid [N,3,S,S], and how many are in a row.
    """

    model: nn.Module
    batch: Callable[[np.ndarray, int], latents.Batch]
    count: int
    check: np.ndarray
    words: diffusion.Words | None
    show: Callable[[nn.Module], tuple[Tensor, int]]


def build(config: dict, folder: Path) -> nn.Module:
    """The trained denoiser, frozen, with low-rank terms on every attention's projections, which are all that learns."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(config["seed"])
    model = diffusion.build({**config, "in_channels": 4})
    loop.start_from(model, folder / "diffusion" / "model.safetensors")
    model.requires_grad_(False)
    terms = LoraConfig(r=config["rank"], lora_alpha=config["rank"], target_modules=text_base.PROJECTIONS)
    inject_adapter_in_model(terms, model.model["diffusion_model"])
    return model


def _mini(config: dict, root: Path) -> Task:
    autoencoder = latents.load_autoencoder(root)
    encoder, decoder = load_pair(root / "transparency")
    pool = CutOutLatents(
        CutOuts(root / "scenes", config["cutouts"], config["side"], config["longer_side"]), autoencoder, encoder
    )

    def show(model: nn.Module) -> tuple[Tensor, int]:
        names = [entry.prompts[0] for entry in renderer.catalogue().values() if not entry.held_out]
        latent = diffusion.sample(model, names[::2][:24], config["side"]).cpu()
        decoded = decoder(autoencoder.decode(latent).clamp(0, 1), latent).clamp(0, 1)
        board = checkerboard(config["side"])
        return decoded[:, 1:] * decoded[:, :1] + board * (1 - decoded[:, :1]), 8

    return Task(build(config, root), pool.batch, config["cutouts"], np.arange(64), None, show)


def _own(config: dict, root: Path, base: text_base.Base) -> Task:
    """Of a user's own model and images. Raises TrainingError."""
    folder = settings.given(config, "foregrounds")
    settings.given(config, "transparent_encoder")
    pool = TransparentImages(root / "scenes", base, load_encoder(config), folder, config["side"])
    count = image_folders.learnt(len(pool.paths), config["held_out"])
    known = base.words(pool.captions, root / "scenes")

    def words(prompts: list[str]) -> tuple[Tensor, ...]:
        return known(prompts)[:2]

    def show(model: nn.Module) -> tuple[Tensor, int]:
        prompts = pool.captions[count:][:SHOWN]
        latent = diffusion.sample(model, prompts, config["side"], steps=config["sampling_steps"], words=words)
        return base.decode(latent).cpu(), len(prompts)

    torch.manual_seed(config["seed"])
    model = text_base.Denoiser(base, config["rank"], config["gradient_checkpointing"])
    return Task(model, pool.batch, count, np.arange(count, len(pool.paths)), words, show)


def train(config: dict, folder: Path, minutes: float | None, save_every: float) -> nn.Module:
    from accelerate import PartialState

    base = text_base.load(config) if "base" in config else None
    task = _mini(config, folder.parent) if base is None else _own(config, folder.parent, base)
    levels = formulas.noise_levels()

    def loss(model, step, rank):
        rng = np.random.default_rng((config["seed"], step, rank))
        batch = task.batch(rng.integers(0, task.count, config["batch"]), step)
        return diffusion.loss_of(model, batch, config, levels, rng, task.words)

    @torch.no_grad()
    def validate(model, step):
        plain = {**config, "empty_prompt": 0, "unknown_words": 0}
        batch = task.batch(task.check, 0)
        error = diffusion.loss_of(model, batch, plain, levels, np.random.default_rng(0), task.words)
        loop.save_grid(folder / "grid.png", *task.show(model))
        return {key: value.item() for key, value in error.items()}

    trained = loop.fit(task.model, loss, validate, config, folder, minutes, save_every)
    if base is not None and PartialState().is_main_process:  # `publish` writes the mini family's
        write(folder, trained, config, base)
    return trained


def write(folder: Path, model: nn.Module, config: dict, base: text_base.Base) -> None:
    """The file that users load."""
    state = {f"model.{text_base.host_key(key, base.names)}": value for key, value in model.state_dict().items()}
    about = export.describe("adapter", folder, config, f"RGBA images of {Path(config['foregrounds']).name}")
    export.save(folder / FILE, published_adapter(state), about | {"base": base.family, "licence": base.licence})
    print(f"{folder / FILE}: put it into ComfyUI's models/layer_model.", flush=True)
