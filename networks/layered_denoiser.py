"""The family's denoiser on scenes of several layers, as ComfyUI runs it with Shared layers and Context maps: by the
same functions of the equations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from ..techniques import shared_layers as dreamlayer
from .context_layers import ContextLayers
from .text_to_image import TextToImage
from .unet import Downsample, TransformerBlock, UNet

LEARNING = ("to_k", "to_v")


@dataclass
class Call:
    """One call for B scenes of L rows: background, objects back to front, whole picture. It goes through the denoiser
    in the place of the context.

    tokens: [B·L,S,D]. token_indices: of each scene, each layer's tokens in the whole picture's. ends: [B][L-1], where
    each layer's own prompt ends. early: [B], 1 where Eq. 9 acts. known: [B,F,h,w], maps for scenes without words.
    recorded: the attention of the down blocks.
    """

    layers: int
    size: tuple[int, int]
    tokens: Tensor
    token_indices: list[list[list[int]]]
    ends: list[list[int]]
    early: Tensor
    refine: ContextLayers
    known: Tensor | None = None
    recorded: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def size_of(self, x: Tensor) -> tuple[int, int]:
        factor = round((self.size[0] * self.size[1] / x.shape[1]) ** 0.5)
        return self.size[0] // factor, self.size[1] // factor

    def mix(self, n: Tensor) -> Tensor:
        maps = dreamlayer.resize_maps(self.maps[0], self.size_of(n))
        maps = rearrange(maps, "scene object h w -> scene object (h w)") * self.early[:, None, None]
        layers = rearrange(n, "(scene layer) token c -> scene layer token c", layer=self.layers)
        return rearrange(dreamlayer.mix_global_in(layers, maps), "scene layer token c -> (scene layer) token c")

    def record_attention(self, n: Tensor, q: Tensor, k: Tensor, heads: int) -> None:
        n, q, k = (
            rearrange(rows, "(scene layer) token c -> scene layer token c", layer=self.layers) for rows in (n, q, k)
        )
        shares, own = [], []
        for scene, (indices, ends) in enumerate(zip(self.token_indices, self.ends, strict=True)):
            shares.append(dreamlayer.token_shares(q[scene, -1:], k[scene, -1:], heads, indices[1:]))
            own.append(
                torch.cat(
                    [
                        dreamlayer.token_shares(q[scene, [row]], k[scene, [row]], heads, [list(range(1, ends[row]))])
                        for row in range(1, self.layers - 1)
                    ],
                    1,
                )
            )
        self.recorded.append((torch.cat(shares), torch.cat(own), n[:, -1]))

    @cached_property
    def maps(self) -> tuple[Tensor, Tensor]:
        """[B,F,h,w] by the whole picture and by the objects' own branches, from the recorded attention."""
        shares, own, hidden = (torch.stack(values).sum(0) for values in zip(*self.recorded, strict=True))
        size = self.size_of(hidden)
        maps, own = (
            rearrange(values, "scene object (h w) -> scene object h w", h=size[0])
            for values in (self.refine(dreamlayer.context_maps(shares), hidden), dreamlayer.context_maps(own))
        )
        if self.known is not None:
            has_words = torch.tensor([any(indices) for indices in self.token_indices], device=maps.device)
            maps = torch.where(has_words[:, None, None, None], maps, dreamlayer.resize_maps(self.known, size))
        return maps, own


class RowLinear(nn.Module):
    """A frozen projection of any precision. Background and whole picture add `shared` to its weight, objects
    `foreground`, where it learns, and `adapter`.

    Source: dreamlayer, Sec. 4.1 Training (keys and values are tuned, those of the objects' layers apart)
    """

    adapter: Tensor | None

    def __init__(self, plain: nn.Linear, adapter: Tensor | None, learns: bool):
        super().__init__()
        self.weight, self.bias = plain.weight, plain.bias
        self.register_buffer("adapter", adapter)
        self.shared, self.foreground = (
            nn.Parameter(torch.zeros_like(plain.weight, dtype=torch.float32)) if learns else None for _ in range(2)
        )

    def forward(self, x: Tensor, layers: int) -> Tensor:
        """x: [B·L,T,C]"""
        others, objects = self.weight, self.weight if self.adapter is None else self.weight + self.adapter
        if self.shared is not None and self.foreground is not None:
            others, objects = others + self.shared, objects + self.foreground
        bias = None if self.bias is None else self.bias.to(x.dtype)
        x = rearrange(x, "(scene layer) token c -> scene layer token c", layer=layers)
        first, between, last = x.split([1, layers - 2, 1], 1)
        first, last = F.linear(torch.cat([first, last], 1), others.to(x.dtype), bias).chunk(2, 1)
        x = torch.cat([first, F.linear(between, objects.to(x.dtype), bias), last], 1)
        return rearrange(x, "scene layer token c -> (scene layer) token c")


def split_rows(module: Any, adapter: dict[str, Tensor]) -> None:
    """An attention's projections become RowLinear; keys and values learn. adapter: by the names of projections."""
    for part in ("to_q", *LEARNING):
        setattr(module, part, RowLinear(getattr(module, part), adapter.get(part), part in LEARNING))
    module.to_out[0] = RowLinear(module.to_out[0], adapter.get("to_out.0"), False)


def attend(module: Any, n: Tensor, context: Tensor, call: Call, jointly: bool, gives_maps: bool = False) -> Tensor:
    """[B·L,M,C] from an attention with split rows, of this repository's class or diffusers'. jointly: all layers of a
    scene see one another's keys.
    """
    q, k, v = module.to_q(n, call.layers), module.to_k(context, call.layers), module.to_v(context, call.layers)
    if gives_maps:
        call.record_attention(n, q, k, module.heads)

    def heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (rearrange(part, "b token (head c) -> b head token c", head=module.heads) for part in (q, k, v))
        return rearrange(F.scaled_dot_product_attention(q, k, v), "b head token c -> b token (head c)")

    out = dreamlayer.joint_attention(q, k, v, call.layers, heads) if jointly else heads(q, k, v)
    return module.to_out[0](out, call.layers)


class LayerBlock(nn.Module):
    """A transformer block of the UNet, its parts under the names that they had. up: it is on the way up, so it mixes
    maps in and shares attention. gives_maps: maps are taken from it.
    """

    def __init__(self, plain: TransformerBlock, adapter: dict[str, Tensor], up: bool, gives_maps: bool):
        super().__init__()
        self.attn1, self.attn2, self.ff, self.up, self.gives_maps = plain.attn1, plain.attn2, plain.ff, up, gives_maps
        self.norm1, self.norm2, self.norm3 = plain.norm1, plain.norm2, plain.norm3
        for name in ("attn1", "attn2"):
            own = {key.removeprefix(f"{name}."): term for key, term in adapter.items() if key.startswith(name)}
            split_rows(getattr(self, name), own)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        n = self.norm1(x)
        if self.up:
            n = call.mix(n)
        x = x + attend(self.attn1, n, n, call, self.up)
        n = self.norm2(x)
        x = x + attend(self.attn2, n, call.tokens, call, False, self.gives_maps)
        return x + self.ff(self.norm3(x))


def layer_tokens(
    encoded: Tensor, ends: list[list[int]], embedding: Tensor
) -> tuple[Tensor, list[list[list[int]]], list[list[int]]]:
    """A Call's tokens, token_indices and ends. encoded: [B,L-1,77,D], the layers' prompts, which end there; embedding:
    [N,D], the trained one, for scenes with words.
    """
    tokens, token_indices = [], []
    for layers, own in zip(encoded, ends, strict=True):
        joined, own_indices = dreamlayer.global_embedding(list(layers), [[end] for end in own])
        scene = torch.cat([layers, joined[None]])
        if any(own_indices):
            scene = scene + dreamlayer.layer_offsets(embedding, own_indices, len(joined))
        tokens.append(scene)
        token_indices.append(own_indices)
    return torch.cat(tokens), token_indices, ends


def map_blocks(unet: UNet) -> list[str]:
    """The transformer blocks of the way down at its lowest resolution, which is where the nodes take the maps."""
    level = 0
    levels: dict[str, int] = {}
    for number, part in enumerate(unet.input_blocks):
        level += any(isinstance(layer, Downsample) for layer in part.modules())
        levels |= {
            f"input_blocks.{number}.{name}": level
            for name, layer in part.named_modules()
            if isinstance(layer, TransformerBlock)
        }
    return [name for name, depth in levels.items() if depth == max(levels.values())]


class LayeredDenoiser(nn.Module):
    """A trained denoiser and its text encoder, taken over and frozen, under their own keys; embedding, keys, values and
    context-aware layers learn.

    adapter: differences that the objects' rows have already, by the UNet's module, as in
    "input_blocks.1.1.transformer_blocks.0.attn1.to_q".
    end: the row of the embedding that ends a prompt.
    Source: dreamlayer, Sec. 3 and 4.1 (what learns, maps from the way down, shared attention on the way up)
    """

    def __init__(
        self, plain: TextToImage, adapter: dict[str, Tensor], most_objects: int, context_layers: int, end: int
    ):
        super().__init__()
        self.model, self.cond_stage_model = plain.requires_grad_(False).model, plain.cond_stage_model
        self.end, unet = end, self.unet
        blocks = {name: module for name, module in unet.named_modules() if isinstance(module, TransformerBlock)}
        gives_maps = map_blocks(unet)
        for name, block in blocks.items():
            terms = {key.removeprefix(f"{name}."): term for key, term in adapter.items() if key.startswith(f"{name}.")}
            unet.set_submodule(name, LayerBlock(block, terms, name.startswith("output_blocks"), name in gives_maps))
        last = blocks[gives_maps[-1]]
        self.layer_embedding = nn.Parameter(torch.zeros(1 + most_objects, last.attn2.to_k.weight.shape[1]))
        self.context_layers = ContextLayers(context_layers, last.norm2.normalized_shape[0])

    @property
    def unet(self) -> UNet:
        unet = self.model["diffusion_model"]
        assert isinstance(unet, UNet)
        return unet

    def forward(
        self, latent: Tensor, timesteps: Tensor, rows: Tensor, early: Tensor, known: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """latent: [B,L,4,h,w]; timesteps, early: [B]; rows: [B,L-1,77] of each layer's prompt -> noise like the latent,
        the maps, the own maps.

        A scene of empty prompts is the estimate without words of classifier-free guidance: no layer embedding, and maps
        as known.
        """
        _, layers, _, height, width = latent.shape
        call = Call(layers, (height, width), *self.embed(rows), early, self.context_layers, known)
        latent = rearrange(latent, "scene layer c h w -> (scene layer) c h w")
        noise = self.unet(latent, repeat(timesteps, "scene -> (scene layer)", layer=layers), call)
        return rearrange(noise, "(scene layer) c h w -> scene layer c h w", layer=layers), *call.maps

    def embed(self, rows: Tensor) -> tuple[Tensor, list[list[list[int]]], list[list[int]]]:
        """[B,L-1,77] -> a Call's tokens, token_indices and ends."""
        unique, place = rearrange(rows, "scene layer token -> (scene layer) token").unique(dim=0, return_inverse=True)
        encode = self.cond_stage_model.get_submodule("transformer.text_model")
        encoded = rearrange(encode(unique)[place], "(scene layer) token c -> scene layer token c", scene=len(rows))
        return layer_tokens(encoded, (rows == self.end).int().argmax(-1).tolist(), self.layer_embedding)


def published_form(
    state: dict[str, Tensor], prefix: str = "model.", named: Callable[[str], str] = str
) -> dict[str, Tensor]:
    """What has been learnt under the keys that Load layer modules reads, which patches/layer_modules.py explains.

    prefix: of the UNet's keys in the state. named: ComfyUI's name of a module of it ("diffusion_model.…").
    """
    published = {}
    for key, value in state.items():
        module, _, kind = key.removeprefix(prefix).rpartition(".")
        if kind in ("shared", "foreground"):
            published[f"{kind}.{named(module)}.weight"] = value
        elif key.startswith(("layer_embedding", "context_layers.")):
            published[key] = value
    return published
