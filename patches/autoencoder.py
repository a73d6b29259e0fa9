"""Images through any autoencoder of ComfyUI: with and without alpha, with and without a frame axis. The pack's nodes
encode and decode by these two functions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def has_alpha(vae) -> bool:
    """Whether its images are [B,H,W,4] with straight alpha."""
    return getattr(vae, "output_channels", 3) == 4


def has_frames(vae) -> bool:
    """Whether its latents are [B,C,T,h,w], as Qwen-Image's are."""
    return getattr(vae, "latent_dim", 2) == 3


def encode(vae, images: Tensor) -> Tensor:
    """images: [B,H,W,3|4] in 0..1 -> [B,C,h,w], with a frame axis [B,C,1,h,w].

    An autoencoder without alpha takes the colours, for one with alpha an image without is opaque.
    """
    if not has_alpha(vae):
        images = images[..., :3]
    elif images.shape[-1] == 3:
        images = F.pad(images, (0, 1), value=1.0)
    if not has_frames(vae):
        return vae.encode(images)
    # A batch would be the frames of one video, four of them in a latent.
    return torch.cat([vae.encode(image) for image in images.split(1)])


def decode(vae, latent: Tensor, tile: int = 0) -> Tensor:
    """latent: [B,C,h,w] or [B,C,T,h,w], for either kind of autoencoder -> [B·T,H,W,3|4] in 0..1, as VAE Decode orders
    them.

    tile: sides in pixels of the parts that are decoded one by one, 0 for the whole image.
    """
    if has_frames(vae) and latent.ndim == 4:
        latent = latent[:, :, None]
    elif not has_frames(vae) and latent.ndim == 5:
        latent = rearrange(latent, "b c t h w -> (b t) c h w")
    if side := tile // vae.spacial_compression_decode():
        # Of ComfyUI's three rounds one has tiles of half a side, which must be wider than what they overlap by.
        images = vae.decode_tiled(latent, tile_x=side, tile_y=side, overlap=min(16, max(1, side // 4)))
    else:
        images = vae.decode(latent)
    return images.reshape(-1, *images.shape[-3:])
