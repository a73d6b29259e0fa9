"""Trains LayerDiffuse's pair on rendered objects: an encoder that hides transparency in a latent, a decoder that finds
it again.

Its second run, `transparent_decoder`, leaves the encoder as it is: an adapter that was trained on its latents stays
valid. It sees cut-outs turned and mirrored, since the decoder's passes do so too.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from ..networks.autoencoder import Autoencoder
from ..networks.transparency import OffsetEncoder
from ..techniques import metrics
from ..techniques.transparency import median_of_passes, over_gray, turned
from . import data, latents, loop
from .cutouts import HELD_OUT, CutOuts, Pair, checkerboard, hidden


class Hidden:
    """Cut-outs with what an encoder that no longer learns makes of them, kept in memory: 129 KB each at 128 pixels."""

    def __init__(self, pool: CutOuts, autoencoder: Autoencoder, encoder: OffsetEncoder):
        self.pool, self.autoencoder, self.encoder, self.kept = pool, autoencoder, encoder, {}

    @torch.no_grad()
    def batch(self, indices: np.ndarray, views: np.ndarray, device) -> tuple[Tensor, ...]:
        """rgba [B,4,S,S], latent, offset and decoded picture of the cut-outs with these numbers.

        views: how each is shown: 0 to 3 quarter turns, 4 more when mirrored before.
        """
        missing = [int(i) for i in np.unique(indices) if int(i) not in self.kept]
        if missing:
            rgba = data.to_tensor(np.stack([self.pool[i] for i in missing])).to(device)
            clean, offset = hidden(rgba, self.autoencoder.to(device), self.encoder)
            picture = self.autoencoder.decode(clean + offset)
            for i, *parts in zip(missing, clean + offset, offset, picture, strict=True):
                self.kept[i] = [part.half().cpu() for part in parts]
        rgba = (rearrange(torch.from_numpy(self.pool[i]), "h w c -> c h w") / 255 for i in indices)
        rows = zip(*([one, *self.kept[int(i)]] for one, i in zip(rgba, indices, strict=True)), strict=True)
        return tuple(
            torch.stack(
                [turned(one.float(), view > 3, int(view) % 4) for one, view in zip(part, views, strict=True)]
            ).to(device)
            for part in rows
        )


def losses(config: dict, rgba: Tensor, offset: Tensor, picture: Tensor, found: Tensor) -> dict[str, Tensor]:
    """Alpha and colours found again, colours counted where they are seen; the picture stays what it would be without
    the offset.

    rgba: [B,4,H,W]; offset: [B,C,H/8,W/8]; picture: [B,3,H,W]; found: [B,4,H,W], alpha first. Scalars: what is
    minimised, and its parts. overlap counts small and faint objects as much as large ones.
    Source: layerdiffuse, Sec. 3.1 (reconstruction of alpha and colours, and the decoded picture left as it is)
    Differs: absolute differences, the overlap of the alphas and a small offset in place of squared ones and of a
    discriminator.
    """
    colour, alpha = rgba[:, :3], rgba[:, 3:]
    terms = {
        "alpha": (found[:, :1] - alpha).abs().mean(),
        "colour": ((found[:, 1:] - colour).abs() * (alpha + config["hidden_colour_weight"])).mean(),
        "overlap": 1 - metrics.alpha_iou(found[:, :1].clamp(0, 1), alpha).mean(),
        "picture": (picture - over_gray(colour, alpha)).abs().mean(),
        "offset": offset.square().mean(),
    }
    weighted = [config[f"{name}_weight"] * terms[name] for name in ("overlap", "picture", "offset")]
    return {"loss": terms["alpha"] + terms["colour"] + sum(weighted), **terms}


def build(config: dict) -> Pair:
    torch.manual_seed(config["seed"])
    return Pair(config)


def train(config: dict, folder: Path, minutes: float | None, save_every: float) -> nn.Module:
    autoencoder = latents.load_autoencoder(folder.parent)
    pool = CutOuts(folder.parent / "scenes", config["cutouts"], config["side"], config["longer_side"])
    check = rearrange(torch.from_numpy(np.stack([pool.render(i) for i in HELD_OUT])), "b h w c -> b c h w")

    def loss(model, step, rank):
        device = next(model.parameters()).device
        autoencoder.to(device)
        rgba = pool.batch(config["batch"], config["crop"], config["seed"], step, rank).to(device)
        return losses(config, rgba, *model(rgba, autoencoder)[1:])

    def loss_of_decoder(model, step, rank):
        rng = np.random.default_rng((config["seed"], step, rank))
        indices, views = rng.integers(0, config["cutouts"], config["batch"]), rng.integers(0, 8, config["batch"])
        rgba, *parts = kept.batch(indices, views, next(model.parameters()).device)
        return losses(config, rgba, *model(rgba, autoencoder, kept=parts)[1:])

    @torch.no_grad()
    def validate(model, step):
        device = next(model.parameters()).device
        parts = []
        for part in check.split(16):
            latent, offset, picture, once = model(part.to(device), autoencoder)
            parts.append(
                (offset, picture, once.clamp(0, 1), median_of_passes(model.decoder, picture.clamp(0, 1), latent))
            )
        offset, picture, once, found = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
        alpha, board = check[:, 3:], checkerboard(config["side"])
        shown = [
            found[:16, 1:] * found[:16, :1] + board * (1 - found[:16, :1]),
            check[:16, :3] * alpha[:16] + board * (1 - alpha[:16]),
        ]
        loop.save_grid(folder / "grid.png", torch.cat(shown), 8)
        report = {
            name: metrics.alpha_iou(decoded[:, :1], alpha).mean().item()
            for name, decoded in (("iou", found), ("iou of one pass", once))
        }
        report |= {
            "sad": metrics.alpha_sad(found[:, :1], alpha).mean().item(),
            "picture": (picture - over_gray(check[:, :3], alpha)).abs().mean().item(),
            "offset": offset.std().item(),
        }
        print(
            f"held-out cut-outs at step {step}: " + "  ".join(f"{key} {value:.4g}" for key, value in report.items()),
            flush=True,
        )
        return report

    pair = build(config)
    if config["start"]:
        loop.start_from(pair, folder.parent / config["start"] / "model.safetensors")
        pair.encoder.requires_grad_(False)
        kept = Hidden(pool, autoencoder, pair.encoder)
    return loop.fit(pair, loss_of_decoder if config["start"] else loss, validate, config, folder, minutes, save_every)
