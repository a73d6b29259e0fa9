"""Trains the network that lays a foreground's latent over a background's: what BFS's composition loss asks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..techniques.back_to_front import composition_loss
from . import fill_base, layered_images, layered_scenes, loop, settings

CHECK = 32  # the last scenes of the pool are kept for validation
SHOWN = 16  # of them at most, in the grid


class Composition(nn.Module):
    """The composite's latent from those of foreground and background.

    Source: bfs, Eq. 16 (the network)
    """

    def __init__(self, widths: list[int], channels: int = 4):
        from diffusers import UNet2DModel

        super().__init__()
        self.unet = UNet2DModel(
            in_channels=2 * channels,
            out_channels=channels,
            layers_per_block=2,
            block_out_channels=tuple(widths),
            down_block_types=("DownBlock2D",) * len(widths),
            up_block_types=("UpBlock2D",) * len(widths),
        )

    def forward(self, foreground: Tensor, background: Tensor) -> Tensor:
        """The composite's latent, [B,C,h,w] each."""
        steps = torch.zeros(len(foreground), device=foreground.device)
        return self.unet(torch.cat([foreground, background], 1), steps).sample


def build(config: dict) -> Composition:
    return Composition(config["widths"], config.get("channels", 4))


def load(folder: Path, base: str) -> Composition:
    """The trained network, frozen. base: the family whose latents it is for. Raises TrainingError without one."""
    if not (folder / "model.safetensors").exists():
        raise settings.TrainingError(f"{folder} has no model; train it first: python -m training latent_composition.")
    config = json.loads((folder / "config.json").read_text())
    if (base == fill_base.MINI) != (not config.get("base")):
        raise settings.TrainingError(
            f"{folder} was trained on another base's latents; train latent_composition on {base} and give it a "
            "--folder beside this one's."
        )
    found = build(config)
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
    base = fill_base.load(config)
    sets = list(layered_images.samples(config, folder.parent / "scenes", base, CHECK).values())

    def loss(model, step, rank):
        rng, samples = np.random.default_rng((config["seed"], step, rank)), sets[step % len(sets)]
        return loss_of(model, samples.batch(rng.integers(0, samples.known(step), config["batch"]), 0))

    @torch.no_grad()
    def validate(model, step):
        batch = sets[0].batch(sets[0].held_out, 0)
        device = next(model.parameters()).device
        made = model(batch.foreground.to(device), batch.background.to(device)).cpu()
        decoded, true = (base.autoencoder.decode(part).clamp(0, 1) for part in (made, batch.composite))
        shown = min(SHOWN, len(decoded))
        loop.save_grid(folder / "grid.png", torch.cat([decoded[:shown], true[:shown]]), math.gcd(shown, 8))
        report = {
            "square": loss_of(model, batch)["loss"].item(),
            "absolute": composition_loss(made, batch.composite).item(),
            "decoded": (decoded - true).abs().mean().item(),
        }
        print(f"step {step}: " + "  ".join(f"{key} {value:.4g}" for key, value in report.items()), flush=True)
        return report

    torch.manual_seed(config["seed"])
    return loop.fit(build(config), loss, validate, config, folder, minutes, save_every)
