"""The shipped RGBA autoencoder on objects and scenes that training has not seen, beside LayerDiffuse's pair of the
family, which needs an encoder and a decoder of its own.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from mini_models import LAYER_MODEL
from strata.networks.autoencoder import Autoencoder
from strata.networks.transparency import OffsetEncoder, TransparentDecoder
from strata.techniques.transparency import median_of_passes
from strata.training import published, settings
from strata.training.cutouts import CutOuts, hidden
from strata.training.rgba_autoencoder import Check, build

COUNT, SAMPLE = 64, 0
CLAIMS = [("RGBA autoencoder", "transparency pair", figure) for figure in ("iou", "shadow", "composite")]
FIRST = 2 * 10**9  # behind the scenes of training and of its watching


class Pair:
    """LayerDiffuse's pair as an autoencoder; opaque images go through the autoencoder of colours alone."""

    def __init__(self, colours: Autoencoder):
        self.colours = colours
        halves = [
            published.read(LAYER_MODEL / f"strata_mini_transparent_{half}.safetensors")[0]
            for half in ("encoder", "decoder")
        ]
        config = settings.CONFIGS / "transparent_decoder.json"
        sizes = json.loads(config.read_text())
        self.encoder = OffsetEncoder(sizes["encoder_widths"])
        self.decoder = TransparentDecoder(sizes["decoder_widths"], sizes["attention_levels"])
        for network, state in zip((self.encoder, self.decoder), halves, strict=True):
            network.load_state_dict(state)
            network.eval()

    def parameters(self):
        return self.colours.parameters()

    def __call__(self, rgba: torch.Tensor) -> tuple[None, torch.Tensor]:
        if (rgba[:, 3:] == 1).all():
            image = self.colours.decode(self.colours.encode(rgba[:, :3]))
            return None, torch.cat([image, rgba[:, 3:]], 1)
        latent = sum(hidden(rgba, self.colours, self.encoder))
        found = median_of_passes(self.decoder, self.colours.decode(latent).clamp(0, 1), latent)
        return None, torch.cat([found[:, 1:], found[:, :1]], 1)


@torch.no_grad()
def measure(seeds: range) -> dict[str, dict[str, list[float]]]:
    colours = published.checkpoint()[1]
    model = build("published")
    with tempfile.TemporaryDirectory() as folder:
        pools = [
            CutOuts(Path(folder), 1, 128, (0.45, 0.85)),
            CutOuts(Path(folder), 1, 128, None, shadows=1.0),
        ]
        check = Check(128, *pools, colours, range(FIRST + seeds.start, FIRST + seeds.stop))
    found = {}
    for name, one in (("RGBA autoencoder", model.eval()), ("transparency pair", Pair(colours))):
        report, _ = check(one)
        report.pop("scene_rgb")
        found[name] = {figure: values.tolist() for figure, values in report.items()}
    return found
