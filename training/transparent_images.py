"""RGBA images of a user's folder as latents with their transparency hidden in them, and their captions."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..networks.transparency import OffsetEncoder, encoder_shape
from ..techniques.transparency import extend_colours, over_gray
from . import base as bases
from . import data, image_folders, latents, layered_images, settings, text_base

CONFIG = settings.PACK / "models_config" / "transparency.json"
AT_ONCE = 2


def load_encoder(config: dict) -> OffsetEncoder | None:
    """LayerDiffuse's transparent encoder, from its own file or one with the decoder in it; None where none is named.
    Raises TrainingError.
    """
    if not config["transparent_encoder"]:
        return None
    path = Path(config["transparent_encoder"])
    try:
        state = {key.removeprefix("encoder."): value.float() for key, value in load_file(path).items()}
        state = {key: value for key, value in state.items() if key.startswith("blocks.")}
        encoder = OffsetEncoder(**encoder_shape(state))
        encoder.load_state_dict(state)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise settings.TrainingError(
            f"--transparent-encoder: {path} is not LayerDiffuse's encoder; give layer_sd15_vae_transparent_encoder or "
            "vae_transparent_encoder.safetensors."
        ) from error
    return encoder.to(bases.device()).eval().requires_grad_(False)


@torch.no_grad()
def hidden(rgba: Tensor, base: text_base.Base, encoder: OffsetEncoder | None) -> Tensor:
    """Latents [B,4,H/8,W/8] as the UNet sees them of images [B,4,H,W], straight colours and alpha in 0..1, over mid
    gray. With an encoder their transparency is hidden in them, as Encode transparency does it.
    """
    colour, alpha = rgba.to(bases.device()).split([3, 1], 1)
    mean, deviation = base.posterior(over_gray(colour, alpha))
    if encoder is not None:
        published = json.loads(CONFIG.read_text())["latents"]["published"]
        mean = mean + published["offset"] * deviation * encoder(torch.cat([alpha, extend_colours(colour, alpha)], 1))
    return (mean * base.scale).cpu()


class TransparentImages(data.ScenePool):
    """Images with alpha, each scaled into a square whose rest is transparent, encoded when first asked for and kept on
    disk; changed files and other encoders start anew.
    """

    def __init__(self, folder: Path, base: text_base.Base, encoder: OffsetEncoder | None, images: Path, side: int):
        """Raises TrainingError for images without alpha or words."""
        self.paths = list(image_folders.images(images, "foregrounds").values())
        layered_images.check_alpha(self.paths)
        self.captions = [image_folders.caption(path) for path in self.paths]
        self.base, self.encoder, self.side, size = base, encoder, side, side // latents.FACTOR
        folder.mkdir(parents=True, exist_ok=True)
        networks = [base.autoencoder.encoder, *filter(None, [encoder])]
        known = latents.digest(*networks), [(str(path), path.stat().st_mtime_ns) for path in self.paths]
        name = f"transparent-{side}-{hashlib.sha256(str(known).encode()).hexdigest()[:10]}"
        self.values = self._open(folder / name, (len(self.paths), 4, size, size), np.float16)
        self.ready = self._open(folder / f"{name}.ready", (len(self.paths),))

    def rgba(self, index: int) -> Tensor:
        """[4,S,S] in 0..1."""
        image = image_folders.read(self.paths[index], "RGBA")
        square = ImageOps.pad(image, (self.side,) * 2, Image.Resampling.BICUBIC, color=(0, 0, 0, 0))
        return rearrange(torch.from_numpy(np.asarray(square, np.float32) / 255), "h w c -> c h w")

    def batch(self, indices: np.ndarray, draw: int) -> latents.Batch:
        missing = [int(i) for i in np.unique(indices) if not self.ready[i]]
        for start in range(0, len(missing), AT_ONCE):
            part = missing[start : start + AT_ONCE]
            self.values[part] = hidden(torch.stack([self.rgba(i) for i in part]), self.base, self.encoder).numpy()
            self.ready[part] = 1
        values = torch.from_numpy(self.values[indices]).float()
        return latents.Batch(values, None, [self.captions[int(i)] for i in indices])
