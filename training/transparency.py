"""Trains LayerDiffuse's pair on rendered objects: an encoder that hides transparency in a latent, a decoder that finds
it again.

Its second run, `transparent_decoder`, leaves the encoder as it is: an adapter that was trained on its latents stays
valid. It sees cut-outs turned and mirrored, since the decoder's passes do so too.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn

from ..networks.autoencoder import Autoencoder
from ..networks.transparency import OffsetEncoder, TransparentDecoder
from ..scenes import renderer
from ..techniques import metrics
from ..techniques.transparency import extend_colours, median_of_passes, over_gray, turned
from . import data, latents, loop, settings

HELD_OUT = range(10**9, 10**9 + 64)  # numbers of the cut-outs that are kept for validation
SHADOW_SHARE = 0.2  # of the cut-outs have their shadow with them, which is wide and faint


class CutOuts(data.ScenePool):
    """Objects without their scene: bytes [side,side,4], colours that run on under the transparent part, then alpha.

    longer_side: least and most length of an object, in picture sides, anywhere in the picture; None leaves it as it is
    in its scene. shadows: the share of the objects that have their shadow with them.
    """

    channels = 4

    def __init__(
        self,
        folder: Path,
        count: int,
        side: int,
        longer_side: tuple[float, float] | None,
        shadows: float = SHADOW_SHARE,
    ):
        self.longer_side, self.shadows = longer_side, shadows
        self.name = "cutouts-{}-{}".format(*longer_side) if longer_side else "cutouts"
        if shadows != SHADOW_SHARE:
            self.name += f"-{shadows}"
        super().__init__(folder, count, side)

    def request(self, index: int) -> renderer.Request:
        return renderer.Request(train=True, count=1)

    def render(self, index: int) -> np.ndarray:
        rng = np.random.default_rng((index, 3))
        shadow = rng.random() < self.shadows
        shown = renderer.render(self.request(index), self.side, self.side, index).objects[0]
        if self.longer_side:
            left, top, right, bottom = shown.box
            large = round(self.side * rng.uniform(*self.longer_side) * self.side / max(right - left, bottom - top))
            shown = renderer.render(self.request(index), large, large, index).objects[0]
        rgba = shown.rgba_with_shadow if shadow else shown.rgba
        rgba = self._window(rgba, shown.box, rng) if self.longer_side else rgba
        picture = rearrange(torch.from_numpy(rgba), "h w c -> 1 c h w")
        colour = extend_colours(picture[:, :3], picture[:, 3:])
        return rearrange(torch.cat([colour, picture[:, 3:]], 1), "1 c h w -> h w c").numpy()

    def _window(self, canvas: np.ndarray, box: tuple[int, int, int, int], rng) -> np.ndarray:
        """[side,side,4] of a canvas, the box anywhere in it; transparent where the canvas ends."""
        corner = [
            low - int(rng.integers(0, max(1, self.side - (high - low) + 1)))
            for low, high in zip(box[:2], box[2:], strict=True)
        ]
        left, top = (value + self.side for value in corner)
        return np.pad(canvas, [(self.side,) * 2] * 2 + [(0, 0)])[top : top + self.side, left : left + self.side]


class Pair(nn.Module):
    """Keys encoder.* and decoder.*, each in the form of the published files."""

    def __init__(self, config: dict):
        super().__init__()
        self.encoder = OffsetEncoder(config["encoder_widths"])
        self.decoder = TransparentDecoder(config["decoder_widths"], config["attention_levels"])

    def forward(
        self, rgba: Tensor, autoencoder: Autoencoder, kept: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, ...]:
        """rgba: [B,4,S,S], colours that run on, then alpha -> the latent, its offset, the decoded picture, and
        [B,4,S,S], alpha first.

        kept: the first three, where they are known.
        """
        if kept is None:
            clean, offset = hidden(rgba, autoencoder, self.encoder)
            latent = clean + offset
            kept = latent, offset, autoencoder.decode(latent)
        latent, _, picture = kept
        # A third faster on two cores.
        return *kept, self.decoder(picture.clamp(0, 1).contiguous(memory_format=torch.channels_last), latent)


def hidden(rgba: Tensor, autoencoder: Autoencoder, encoder: OffsetEncoder) -> tuple[Tensor, Tensor]:
    """Latents of [B,4,H,W], colours that run on, then alpha; and the offsets to add, which hide the transparency in
    them.
    """
    colour, alpha = rgba[:, :3], rgba[:, 3:]
    return autoencoder.encode(over_gray(colour, alpha)), encoder(torch.cat([alpha, colour], 1))


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


def checkerboard(side: int) -> Tensor:
    squares = (torch.arange(side) // 8)[:, None] + torch.arange(side) // 8
    return 0.45 + 0.15 * (squares % 2).float()


def load_pair(folder: Path) -> tuple[OffsetEncoder, TransparentDecoder]:
    """The trained transparency pair. Raises TrainingError when it is not there."""
    path = folder / "model.safetensors"
    if not path.exists():
        raise settings.TrainingError(f"{path} is missing; train the pair first: python -m training transparency.")
    pair = Pair(json.loads((folder / "config.json").read_text()))
    pair.load_state_dict(load_file(path))
    pair.eval().requires_grad_(False)
    return pair.encoder, pair.decoder
