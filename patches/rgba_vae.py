"""Autoencoders with alpha as ComfyUI's VAE: the mini family's, Flux's KL autoencoder with four channels (AlphaVAE's
form) under diffusers' or the host's names, and Qwen-Image-Layered's, which older hosts do not know.
"""

from __future__ import annotations

import comfy.sd
import comfy.utils
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..networks.autoencoder import LAST
from ..techniques.transparency import extend_colours
from . import autoencoder, layer_files

KIND = "vae"
FILLED_UP = 16  # pixels: fewer than this were added to a side, see patches/back_to_front.py
SHIPPED = "strata_mini_rgba.safetensors"
# The layer that an image enters by, and the one that it leaves by: TAESD's layout, the KL autoencoder's, and Wan's,
# which Qwen-Image has.
ENDS = (
    ("taesd_encoder.0", f"taesd_decoder.{LAST}"),
    ("encoder.conv_in", "decoder.conv_out"),
    ("encoder.conv1", "decoder.head.2"),
)


class RGBAVAE(comfy.sd.VAE):
    """A VAE whose images are [B,H,W,4] with straight alpha; it encodes [B,H,W,3] as opaque."""

    def __init__(self, weights: dict[str, Tensor], ends: tuple[str, str]):
        super().__init__(sd=_of_colours(weights, ends))
        self.throw_exception_if_invalid()
        for name in ends:
            _widen(self.first_stage_model, name, weights)
        self.first_stage_model.to(self.vae_dtype)
        self.output_channels = 4
        self.process_input = lambda image: _with_alpha(image) * 2 - 1

    def decode_tiled_(self, samples, tile_x=64, tile_y=64, overlap=16):
        """As ComfyUI's own, which allocates three channels."""
        shapes = ((tile_x // 2, tile_y * 2), (tile_x * 2, tile_y // 2), (tile_x, tile_y))
        steps = sum(comfy.utils.get_tiled_scale_steps(*samples.shape[:1:-1], *shape, overlap) for shape in shapes)
        progress = comfy.utils.ProgressBar(steps * len(samples))

        def decode(tile: Tensor) -> Tensor:
            return self.first_stage_model.decode(tile.to(self.device, self.vae_dtype)).float()

        made = sum(
            comfy.utils.tiled_scale(
                samples,
                decode,
                *shape,
                overlap,
                upscale_amount=self.upscale_ratio,
                out_channels=4,
                output_device=self.output_device,
                pbar=progress,
            )
            for shape in shapes
        )
        return self.process_output(made / len(shapes))


def choices() -> list[str]:
    """The files of the folder that have alpha, or may have; the shipped one where there is none."""
    return layer_files.fitting(KIND, lambda shapes: bool(ends := _ends(shapes)) and _has_alpha(shapes, ends)) or [
        SHIPPED
    ]


def _ends(weights: dict[str, Tensor]) -> tuple[str, str] | None:
    """The names of an autoencoder's first and last layer."""
    return next((ends for ends in ENDS if all(f"{end}.weight" in weights for end in ends)), None)


def _has_alpha(weights: dict[str, Tensor], ends: tuple[str, str]) -> bool:
    first, last = (weights[f"{end}.weight"] for end in ends)
    return min(first.ndim, last.ndim) >= 4 and (first.shape[1], last.shape[0]) == (4, 4)


def load(name: str) -> RGBAVAE:
    """Raises ValueError with one sentence for a missing or damaged file, and for one without alpha."""
    weights = layer_files.read(name, KIND)
    if (ends := _ends(weights)) is None:
        raise ValueError(
            f"file: {name} is no autoencoder in the form of Flux's, Qwen-Image's or TAESD's; choose one that the help "
            "page names."
        )
    if not _has_alpha(weights, ends):
        channels = weights[f"{ends[0]}.weight"].shape[1]
        raise ValueError(
            f"file: {name} is an autoencoder of {channels} channels without alpha; load it by Load VAE, or "
            "choose one with four channels."
        )
    try:
        return RGBAVAE(weights, ends)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(
            f"file: {name} does not have the weights of an autoencoder that ComfyUI knows ({reason} …); download it "
            "again."
        ) from error


def encode(vae: comfy.sd.VAE, colour: Tensor, alpha: Tensor) -> Tensor:
    """colour: [B,3,H,W] in 0..1, alpha: [B,1,H,W] -> [B,C,⌈H/8⌉,⌈W/8⌉], with a frame axis if the VAE has one; sides are
    filled up with transparency.

    Colours run on under what is transparent, as the autoencoder has learnt them. Raises ValueError for a VAE without
    alpha.
    """
    if not autoencoder.has_alpha(vae):
        raise ValueError(
            "transparency: nothing is connected and the VAE has no alpha; connect an encoder from Load transparency, "
            "or a VAE from Load RGBA VAE."
        )
    stride = vae.spacial_compression_encode()
    padding = (0, -colour.shape[-1] % stride, 0, -colour.shape[-2] % stride)
    colour, alpha = F.pad(colour, padding), F.pad(alpha, padding)
    rgba = torch.cat([extend_colours(colour, alpha), alpha], 1)
    return autoencoder.encode(vae, rgba.movedim(1, -1))


def decode(vae: comfy.sd.VAE | None, latent: Tensor, tile_size: int = 0, like: Tensor | None = None) -> Tensor:
    """[B,H,W,4] of latents [B,C,h,w] or [B,C,1,h,w]. like: an image [B,H,W,C] whose size they were filled up from, at
    the right and below, and are cut to again. Raises ValueError for a VAE without alpha.
    """
    if vae is None or not autoencoder.has_alpha(vae):
        lacking = "there is no VAE" if vae is None else "the VAE has no alpha"
        raise ValueError(
            f"transparency: nothing is connected and {lacking}; connect a decoder from Load transparency, or a VAE "
            "from Load RGBA VAE."
        )
    image = autoencoder.decode(vae, latent, tile_size)
    if like is not None and all(0 <= image.shape[axis] - like.shape[axis] < FILLED_UP for axis in (1, 2)):
        image = image[:, : like.shape[1], : like.shape[2]]
    return image


def _of_colours(weights: dict[str, Tensor], ends: tuple[str, str]) -> dict[str, Tensor]:
    """The weights without what belongs to alpha, from which ComfyUI tells the kind of autoencoder."""
    first, last = ends
    return weights | {
        f"{first}.weight": weights[f"{first}.weight"][:, :3],
        f"{last}.weight": weights[f"{last}.weight"][:3],
        f"{last}.bias": weights[f"{last}.bias"][:3],
    }


def _widen(network: nn.Module, name: str, weights: dict[str, Tensor]) -> None:
    """Give a convolution of three channels the file's weights for four."""
    layer = network.get_submodule(name)
    for end in ("weight", "bias"):
        setattr(layer, end, nn.Parameter(weights[f"{name}.{end}"], requires_grad=False))
    layer.out_channels, layer.in_channels = layer.weight.shape[:2]


def _with_alpha(image: Tensor) -> Tensor:
    """[B,4,H,W]; an image of three channels is opaque."""
    return image if image.shape[1] == 4 else torch.cat([image[:, :3], torch.ones_like(image[:, :1])], 1)
