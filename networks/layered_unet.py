"""Stable Diffusion's UNets in diffusers' class on scenes of several layers, as ComfyUI runs them with Shared layers and
Context maps: the mini family's denoiser of layers, put into their attentions.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from . import diffusers_unet
from .context_layers import ContextLayers
from .layered_denoiser import Call, attend, layer_tokens, split_rows


def joined_prompt(prompts: list[str]) -> str:
    """What the whole picture's pooled vector (SDXL) is made of. prompts: of the layers, the background's first."""
    background, *objects = prompts
    return ", ".join(filter(None, [*objects[::-1], background]))


class LayerAttention:
    """Processor of one attention with split rows. up: it shares attention; gives_maps: maps are taken from it."""

    def __init__(self, up: bool, gives_maps: bool):
        self.up, self.gives_maps = up, gives_maps

    def __call__(
        self,
        attention: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        call: Call | None = None,
    ) -> Tensor:
        assert call is not None
        if encoder_hidden_states is not None:
            return attend(attention, hidden_states, encoder_hidden_states, call, False, self.gives_maps)
        n = call.mix(hidden_states) if self.up else hidden_states
        return attend(attention, n, n, call, self.up)


def transformer_blocks(unet: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in unet.named_modules() if hasattr(module, "attn2")}


def map_blocks(unet: nn.Module) -> list[str]:
    """The transformer blocks of the way down at its lowest resolution, which is where the nodes take the maps."""
    down = [name for name in transformer_blocks(unet) if name.startswith("down_blocks.")]
    deepest = max(int(name.split(".")[1]) for name in down)
    return [name for name in down if name.startswith(f"down_blocks.{deepest}.")]


def _make_maps(module: nn.Module, args: tuple, given: dict) -> None:
    """Before the way up, outside of what checkpointing runs again: the maps are made once."""
    _ = given["cross_attention_kwargs"]["call"].maps


class LayeredUNet(nn.Module):
    """A frozen UNet2DConditionModel; layer embedding, keys and values of every attention, and context-aware layers
    learn.

    adapter: differences that the objects' rows have already, by the UNet's module, as in
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q".
    Source: dreamlayer, Sec. 3 and 4.1 (what learns, maps from the way down, shared attention on the way up)
    """

    def __init__(self, unet: Any, adapter: dict[str, Tensor], most_objects: int, context_layers: int):
        super().__init__()
        self.unet = unet.requires_grad_(False)
        gives_maps, blocks = map_blocks(unet), transformer_blocks(unet)
        width = blocks[gives_maps[-1]].norm2.normalized_shape[0]
        for name, block in blocks.items():
            for part in ("attn1", "attn2"):
                place, attention = f"{name}.{part}.", getattr(block, part)
                own = {key.removeprefix(place): term for key, term in adapter.items() if key.startswith(place)}
                split_rows(attention, own)
                attention.set_processor(LayerAttention(name.startswith("up_blocks."), name in gives_maps))
        unet.mid_block.register_forward_pre_hook(_make_maps, with_kwargs=True)
        self.layer_embedding = nn.Parameter(torch.zeros(1 + most_objects, unet.config.cross_attention_dim))
        self.context_layers = ContextLayers(context_layers, width)

    def forward(
        self,
        latent: Tensor,
        timesteps: Tensor,
        words: tuple[Tensor, Tensor, Tensor],
        early: Tensor,
        known: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """latent: [B,L,4,h,w]; timesteps, early: [B]; words: states [B,L-1,77,D] of each layer's prompt, where it ends
        [B,L-1], and pooled vectors [B,L,P] of these and of the whole picture's -> as LayeredDenoiser.
        """
        states, ends, pooled = words
        layers, size = latent.shape[1], (latent.shape[-2], latent.shape[-1])
        tokens = layer_tokens(states, ends.long().tolist(), self.layer_embedding)
        call = Call(layers, size, *tokens, early, self.context_layers, known)
        noise = diffusers_unet.predict(
            self.unet,
            rearrange(latent, "scene layer c h w -> (scene layer) c h w"),
            repeat(timesteps, "scene -> (scene layer)", layer=layers),
            call.tokens,
            rearrange(pooled, "scene layer c -> (scene layer) c"),
            {"call": call},
        )
        return rearrange(noise, "(scene layer) c h w -> scene layer c h w", layer=layers), *call.maps
