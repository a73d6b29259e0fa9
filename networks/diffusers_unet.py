"""Stable Diffusion's UNets in diffusers' class, called as ComfyUI calls its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

FACTOR = 8  # pixels per latent pixel


def predict(
    unet: Any, latent: Tensor, timesteps: Tensor, states: Tensor, pooled: Tensor, options: dict | None = None
) -> Tensor:
    """Noise like the latent [B,4,h,w] of diffusers' UNet2DConditionModel. timesteps: [B], 0..999; states: [B,T,D];
    pooled: [B,P], of a model that takes them. options: for its attentions.

    SDXL is told the latent's own size, and that nothing is cropped.
    """
    more = {}
    if unet.config.addition_embed_type == "text_time":
        height, width = (FACTOR * side for side in latent.shape[-2:])
        sizes = latent.new_tensor([height, width, 0, 0, height, width]).expand(len(latent), -1)
        more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
    return unet(latent, timesteps, encoder_hidden_states=states, cross_attention_kwargs=options, **more).sample
