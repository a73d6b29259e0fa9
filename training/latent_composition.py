"""Trains the network that lays a foreground's latent over a background's: what BFS's composition loss asks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..techniques.back_to_front import composition_loss
from . import data, layered_scenes, loop, published, rgba_autoencoder, settings
from .layered_scenes import LayeredScenes

CHECK = 32  # the last scenes of the pool are kept for validation
CHANNELS = 4


class Composition(nn.Module):
    """Source: bfs, Eq. 16 (the network)"""

    def __init__(self, widths: list[int]):
        from diffusers import UNet2DModel

        super().__init__()
        self.unet = UNet2DModel(
            in_channels=2 * CHANNELS,
            out_channels=CHANNELS,
            layers_per_block=2,
            block_out_channels=tuple(widths),
            down_block_types=("DownBlock2D",) * len(widths),
            up_block_types=("UpBlock2D",) * len(widths),
        )

    def forward(self, foreground: Tensor, background: Tensor) -> Tensor:
        """The composite's latent, [B,4,h,w] each."""
        steps = torch.zeros(len(foreground), device=foreground.device)
        return self.unet(torch.cat([foreground, background], 1), steps).sample


def load(folder: Path) -> Composition:
    """The trained one, frozen. Raises TrainingError when there is none."""
    import json

    if not (folder / "model.safetensors").exists():
        raise settings.TrainingError(f"{folder} has no model; train it first: python -m training latent_composition.")
    found = Composition(json.loads((folder / "config.json").read_text())["widths"])
    found.load_state_dict(load_file(folder / "model.safetensors"))
    return found.eval().requires_grad_(False)


def loss_of(model: nn.Module, batch: layered_scenes.Batch) -> dict[str, Tensor]:
    """Squared error of the composite's latent; a scalar.

    Source: bfs, Eq. 16
    """
    device = next(model.parameters()).device
    found = model(batch.foreground.to(device), batch.background.to(device))
    return {"loss": (found - batch.composite.to(device)).square().mean()}


def train(config: dict, folder: Path, minutes: float | None, save_every: float) -> nn.Module:
    autoencoder = published.checkpoint()[1]
    rgba = rgba_autoencoder.build("published").eval().requires_grad_(False)
    pool = LayeredScenes(folder.parent / "scenes", autoencoder, rgba, config["scenes"], config["side"])
    last = np.arange(config["scenes"] - CHECK, config["scenes"])

    def loss(model, step, rank):
        rng = np.random.default_rng((config["seed"], step, rank))
        known = data.known_at(step, config["scenes"] - CHECK, config["scenes_per_step"])
        indices = rng.integers(0, known, config["batch"])
        return loss_of(model, pool.batch(indices, 0, step % 2))

    @torch.no_grad()
    def validate(model, step):
        batch = pool.batch(last, 0)
        device = next(model.parameters()).device
        made = model(batch.foreground.to(device), batch.background.to(device)).cpu()
        decoded, true = (autoencoder.decode(part).clamp(0, 1) for part in (made, batch.composite))
        loop.save_grid(folder / "grid.png", torch.cat([decoded[:16], true[:16]]), 8)
        report = {
            "square": loss_of(model, batch)["loss"].item(),
            "absolute": composition_loss(made, batch.composite).item(),
            "decoded": (decoded - true).abs().mean().item(),
        }
        print(f"step {step}: " + "  ".join(f"{key} {value:.4g}" for key, value in report.items()), flush=True)
        return report

    torch.manual_seed(config["seed"])
    return loop.fit(Composition(config["widths"]), loss, validate, config, folder, minutes, save_every)
