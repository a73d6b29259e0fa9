"""Objects cut out of rendered scenes, and the pair of networks that hides their transparency in latents and finds it
again: what the trainers of the pair, of its adapter and of the layers share.
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
from ..techniques.transparency import extend_colours, over_gray
from . import data, settings

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
