"""Flux's transformer at any size: diffusers' class, how it sees latents, and its weights under the host's key names.

The mini Flux-Fill is trained with it, as a trainer of the published Flux.1-Fill would be.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

PATCH = 2  # latent pixels that make a token, in each direction

# The host's name of a layer, and diffusers' names of what it holds, one above the other where there are several.
LAYERS = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
}
SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
BLOCKS = {"double_blocks": ("transformer_blocks", DOUBLE), "single_blocks": ("single_transformer_blocks", SINGLE)}


def build(shape: dict) -> nn.Module:
    """diffusers' FluxTransformer2DModel of a shape in models_config, with random weights; every block starts as the
    identity, and the output at zero.
    """
    from diffusers import FluxTransformer2DModel

    width, heads = shape["hidden_size"], shape["num_heads"]
    model: Any = FluxTransformer2DModel(
        patch_size=1,
        in_channels=shape["in_channels"] * PATCH**2,
        out_channels=shape["out_channels"] * PATCH**2,
        num_layers=shape["depth"],
        num_single_layers=shape["depth_single_blocks"],
        attention_head_dim=width // heads,
        num_attention_heads=heads,
        joint_attention_dim=shape["context_in_dim"],
        pooled_projection_dim=shape["vec_in_dim"],
        guidance_embeds=shape.get("guidance_embed", False),
        axes_dims_rope=tuple(shape["axes_dim"]),
    )
    with torch.no_grad():
        for name, module in model.named_modules():
            modulates = re.search(r"(norm1|norm1_context|norm|norm_out)\.linear$", name) or name == "proj_out"
            if modulates and isinstance(module, nn.Linear):
                module.weight.zero_()
                module.bias.zero_()
    return model


def predict(
    model: nn.Module,
    latent: Tensor,
    condition: Tensor,
    sigma: Tensor,
    text: Tensor,
    pooled: Tensor,
    guidance: float | None = None,
) -> Tensor:
    """The velocity noise - image, [B,C,h,w] like the latent; sides are even.

    condition: [B,C+64,h,w], the latent of the image that is filled, then the mask's cells. sigma: [B], 1 = noise.
    text: [B,T,D] states of the prompt's tokens; pooled: [B,D]. guidance: for a model that embeds it.
    """
    height, width = latent.shape[-2] // PATCH, latent.shape[-1] // PATCH
    places = torch.zeros(height, width, 3, device=latent.device)
    places[..., 1] = torch.arange(height, device=latent.device)[:, None]
    places[..., 2] = torch.arange(width, device=latent.device)
    tokens = model(
        hidden_states=pack(torch.cat([latent, condition], 1)),
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=sigma,
        guidance=None if guidance is None else torch.full_like(sigma, guidance),
        img_ids=rearrange(places, "h w place -> (h w) place"),
        txt_ids=torch.zeros(text.shape[1], 3, device=latent.device),
        return_dict=False,
    )[0]
    return unpack(tokens, height)


def linear_layers(model: nn.Module) -> list[str]:
    """The names of the linear layers in its blocks, without those that modulate: where low-rank terms go."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "transformer_blocks." in name and ".norm" not in name
    ]


def pack(latent: Tensor) -> Tensor:
    """[B,C,h,w] -> tokens [B,(h/2)(w/2),4C], as Flux sees latents."""
    return rearrange(latent, "b c (h down) (w across) -> b (h w) (c down across)", down=PATCH, across=PATCH)


def unpack(tokens: Tensor, rows: int) -> Tensor:
    """The way back from pack, tokens [B,N,4C] -> [B,C,h,w]; rows: of tokens, h/2."""
    return rearrange(tokens, "b (h w) (c down across) -> b c (h down) (w across)", h=rows, down=PATCH, across=PATCH)


def host_form(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of diffusers' FluxTransformer2DModel under the host's names, as checkpoints of Flux have them."""
    renamed = {}
    for host, parts, ends in _layers(state, "transformer_blocks", "single_transformer_blocks"):
        for end in ends:
            if f"{parts[0]}.{end}" in state:
                value = torch.cat([state[f"{part}.{end}"] for part in parts])
                renamed[f"{host}.{'scale' if 'norm' in host else end}"] = _turned(host, value)
    return renamed


def diffusers_form(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The way back from host_form."""
    renamed, width = {}, state["img_in.weight"].shape[0]
    for host, parts, ends in _layers(state, "double_blocks", "single_blocks"):
        for end in ends:
            name = f"{host}.{'scale' if 'norm' in host else end}"
            if name in state:
                # What is joined is as wide as the model, but for the last, which takes the rest.
                rows = [width] * (len(parts) - 1)
                values = _turned(host, state[name]).split([*rows, len(state[name]) - sum(rows)])
                renamed.update({f"{part}.{end}": value for part, value in zip(parts, values, strict=True)})
    return renamed


def _layers(state: dict[str, Tensor], *kinds: str) -> Iterator[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    """Every layer's name in the host, its parts' names in diffusers, and the ends of its weights' names.

    kinds: what the two kinds of block are called in this state.
    """
    table: dict[str, tuple[str, ...]] = dict(LAYERS)
    for kind, (host, (theirs, layers)) in zip(kinds, BLOCKS.items(), strict=True):
        count = 1 + max(int(key.split(".")[1]) for key in state if key.startswith(f"{kind}."))
        for i in range(count):
            table |= {
                f"{host}.{i}.{name}": tuple(f"{theirs}.{i}.{part}" for part in parts) for name, parts in layers.items()
            }
    for host, parts in table.items():
        yield host, parts, ("weight",) if "norm" in host else ("weight", "bias")


def _turned(host: str, value: Tensor) -> Tensor:
    """The last layer's scale and shift stand in the other order."""
    return torch.cat(value.chunk(2)[::-1]) if host == "final_layer.adaLN_modulation.1" else value
