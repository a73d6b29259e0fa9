"""Trains the small autoencoder: L1, squared and gradient loss on rendered scenes, latents kept at about unit variance.

Its second run, `decoder`, leaves the encoder as it is: what was trained on its latents stays valid while pictures get
sharper.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..networks.autoencoder import Autoencoder
from ..techniques.losses import gradient_loss, psnr
from . import data, loop


class Joined(Autoencoder):
    """Both halves in one forward, so that accelerate can wrap it for several devices."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.taesd_encoder[0].weight.requires_grad):
            latent = self.encode(image)
        return latent, self.decode(latent)


def build(config: dict) -> Joined:
    """A fresh model that already carries a blurred picture: colours pass through three channels all the way.

    From random weights that path has to be found first.
    """
    torch.manual_seed(config["seed"])
    model = Joined(config["channels"], config["latent_channels"])
    with torch.no_grad():
        for module in model.modules():
            # The last convolution of a residual branch.
            if isinstance(module, torch.nn.Sequential) and len(module) == 5:
                module[4].weight.mul_(0.15)
        for layer in (*model.taesd_encoder, *model.taesd_decoder):
            if isinstance(layer, torch.nn.Conv2d):
                layer.weight.mul_(0.5)
                taps = [(1, 1)] if layer.stride == (1, 1) else [(1, 1), (1, 2), (2, 1), (2, 2)]
                for channel in range(3):
                    layer.weight[channel] = 0
                    for y, x in taps:
                        layer.weight[channel, channel, y, x] = 1 / len(taps)
                if layer.bias is not None:
                    layer.bias.zero_()
        last, first = model.taesd_encoder[-1], model.taesd_decoder[1]
        last.weight[:3] *= 4  # colours of 0..1 become latents of -2..2
        last.bias[:3] = -2
        first.weight[:3] /= 4
        first.bias[:3] = 0.5
    return model


def losses(config: dict, latent: Tensor, decoded: Tensor, image: Tensor) -> dict[str, Tensor]:
    """What is minimised, and its parts: latent_weight pulls each channel's mean to 0 and deviation to 1.

    latent: [B,C,h,w]; decoded and image: [B,3,H,W] in 0..1.
    Source: ours, sharp edges, and latents of the unit variance that a denoiser wants
    """
    l1 = (decoded - image).abs().mean()
    square = (decoded - image).square().mean()
    gradient = gradient_loss(decoded, image)
    spread = (latent.mean((0, 2, 3)).square() + (latent.std((0, 2, 3)) - 1).square()).mean()
    total = (
        l1 + config["square_weight"] * square + config["gradient_weight"] * gradient + config["latent_weight"] * spread
    )
    return {"loss": total, "l1": l1, "square": square, "gradient": gradient, "spread": spread}


def train(config: dict, folder: Path, minutes: float | None, save_every: float) -> Autoencoder:
    pool = data.ScenePool(folder.parent / "scenes", config["scenes"], config["side"])
    check = data.held_out(32, config["side"])

    def loss(model, step, rank):
        device = next(model.parameters()).device
        image = pool.batch(config["batch"], config["crop"], config["seed"], step, rank).to(device)
        return losses(config, *model(image), image)

    @torch.no_grad()
    def validate(model, step):
        latent, decoded = model(check.to(next(model.parameters()).device))
        decoded = decoded.clamp(0, 1).cpu()
        shown = torch.cat([check[:8], decoded[:8], check[8:16], decoded[8:16]])
        loop.save_grid(folder / "grid.png", shown, 8)
        metrics = {
            "psnr": psnr(decoded, check).mean().item(),
            "latent_mean": latent.mean().item(),
            "latent_std": latent.std().item(),
        }
        print(
            f"held-out pairs at step {step}: " + "  ".join(f"{key} {value:.4g}" for key, value in metrics.items()),
            flush=True,
        )
        return metrics

    model = build(config)
    if config["start"]:
        loop.start_from(model, folder.parent / config["start"] / "model.safetensors")
        model.taesd_encoder.requires_grad_(False)
    return loop.fit(model, loss, validate, config, folder, minutes, save_every)
