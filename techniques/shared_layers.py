"""DreamLayer's prompts of many layers, the maps of where each object is in the whole picture, and attention shared by
all layers of a scene.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from .fusion import min_max_normalise, reduce_attention


def global_embedding(layers: list[Tensor], ends: list[list[int]], chunk: int = 77) -> tuple[Tensor, list[list[int]]]:
    """The whole picture's embedding [S,D], and for each layer the positions of its words in it; S is the least multiple
    of `chunk` that holds all.

    layers: [S_i,D], back to front, as a text encoder gives them in chunks with a start, words, an end and padding.
    ends: the position of every chunk's end in each layer.
    Source: dreamlayer, Sec. 3 Overview, the tokens between start and end of every prompt, concatenated
    Differs: the paper does not say what stands before and behind them; here the layers' starts, and their ends with the
    padding, averaged.
    """
    words = [
        torch.cat([layer[i * chunk + 1 : end] for i, end in enumerate(own)])
        for layer, own in zip(layers, ends, strict=True)
    ]
    count = sum(map(len, words))
    rest = chunk * math.ceil((count + 2) / chunk) - count - 1
    tails = [layer[own[-1] :] for layer, own in zip(layers, ends, strict=True)]
    tail = torch.stack([tail[torch.arange(rest).clamp(max=len(tail) - 1)] for tail in tails]).mean(0)
    start = torch.stack([layer[0] for layer in layers]).mean(0)
    positions, first = [], 1
    for part in words:
        positions.append(list(range(first, first + len(part))))
        first += len(part)
    return torch.cat([start[None], *words, tail]), positions


def layer_offsets(embedding: Tensor, words: list[list[int]], length: int) -> Tensor:
    """[L+1,length,D]: what the trained layer embedding [N,D] adds to the tokens of L layers, back to front, and of the
    whole picture.

    words: the layers' positions in the whole picture's embedding, as global_embedding gives them. The result is what
    embedding the layers first and joining them then would give. Layers behind the last of the N take its row.
    Source: dreamlayer, Sec. 3 Overview, the learnable layer assign embedding
    Differs: the whole picture's tokens that are nobody's words (start, end and padding) get the mean of the layers'
    embeddings; the paper speaks of the words alone.
    """
    layers = embedding[torch.arange(len(words)).clamp(max=len(embedding) - 1)]
    composite = layers.mean(0).repeat(length, 1)
    for layer, own in zip(layers, words, strict=True):
        composite[own] = layer
    return torch.cat([repeat(layers, "layer c -> layer token c", token=length), composite[None]])


def token_shares(q: Tensor, k: Tensor, heads: int, tokens: list[list[int]]) -> Tensor:
    """[B,F,M]: how much attention each of M places of the whole picture pays to the words of each of F objects,
    averaged over the heads.

    q: [B,M,C] of the whole picture, k: [B,T,C] of the global embedding, projected, C = heads × width. tokens: the F
    objects' positions in T.
    Source: dreamlayer, Eq. 3 and the sum over an object's tokens in Eq. 4
    """
    shares = reduce_attention(
        q, k, heads, lambda parts: torch.stack([parts[..., own].sum(-1).mean(0) for own in tokens], -1)
    )
    return rearrange(shares, "b token object -> b object token")


def share_noise(shared: Tensor, own: Tensor, own_share: float) -> Tensor:
    """Noise of unit variance, of which the share `own_share` in 0..1 of the variance is each layer's own; both
    independent and of unit variance.

    Source: ours, between the paper's same noise for all layers (0) and layers that know nothing of each other (1)
    """
    return (1 - own_share) ** 0.5 * shared + own_share**0.5 * own


def context_maps(shares: Tensor) -> Tensor:
    """[B,F,M] in 0..1, from the shares [B,F,M] summed over the layers of the model: each map min-max normalised,
    a flat one zeros.

    Source: dreamlayer, Eq. 4
    """
    return min_max_normalise(shares)


def resize_maps(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps [B,F,h,w] at another size (H, W): linear between places when larger, means of areas when smaller.

    Source: ours, the paper takes the maps at one resolution and uses them at every one
    """
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    larger = size[0] >= maps.shape[-2]
    return F.interpolate(
        maps, size, mode="bilinear" if larger else "area", **({"align_corners": False} if larger else {})
    )


def mix_global_in(layers: Tensor, maps: Tensor) -> Tensor:
    """Hidden states [B,L,M,C] of background, objects and whole picture, in which the objects have the whole picture's
    where their maps [B,L-2,M] are 1.

    Source: dreamlayer, Eq. 9
    Differs: queries are made of the mixed states too, as keys and values are; Eq. 11 takes the layer's original query.
    """
    objects = torch.lerp(layers[:, 1:-1], layers[:, -1:], maps[..., None].to(layers))
    return torch.cat([layers[:, :1], objects, layers[:, -1:]], 1)


def joint_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layers: int,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    isolated: bool = False,
) -> Tensor:
    """[B·L,M,C]: attention of every layer's queries [B·L,M,C] to the keys and values [B·L,T,C] of all L layers of its
    scene.

    All layers see the same keys, so one call of `attend` over sequences as long as the layers together does it without
    repeating any.
    isolated: the last layer, the whole picture, sees its own keys only, which is Eq. 15's mask without writing the mask
    down.
    Source: dreamlayer, Eq. 10 and 11; Eq. 14 to 16 when isolated
    """
    q, k, v = (rearrange(values, "(scene layer) token c -> scene layer token c", layer=layers) for values in (q, k, v))
    asking = q[:, :-1] if isolated else q
    joined = (rearrange(values, "scene layer token c -> scene (layer token) c") for values in (asking, k, v))
    out = rearrange(attend(*joined), "scene (layer token) c -> scene layer token c", layer=asking.shape[1])
    if isolated:
        out = torch.cat([out, attend(q[:, -1], k[:, -1], v[:, -1])[:, None]], 1)
    return rearrange(out, "scene layer token c -> (scene layer) token c")


def map_distance(maps: Tensor, others: Tensor) -> Tensor:
    """[B]: how far the context maps [B,F,M] of F objects are from others of the same shape, added over the objects; all
    in 0..1.

    others: the objects' alphas at the maps' size, or the maps of the objects' own branches.
    Source: dreamlayer, Eq. 6 with alphas, Eq. 7 with the own maps
    Differs: each norm is divided by the root of M, so that its weight in Eq. 8 is the same at every resolution.
    """
    return (torch.linalg.vector_norm(maps - others, dim=-1) / maps.shape[-1] ** 0.5).sum(-1)


def map_alphas(maps: Tensor, size: tuple[int, int], low: float = 0.3, high: float = 0.6) -> Tensor:
    """Alphas [B,F,H,W] from context maps [B,F,h,w]: 0 where a map is below `low`, 1 above `high`.

    Source: ours, for models without a transparent decoder
    """
    return ((resize_maps(maps, size) - low) / (high - low)).clamp(0, 1)
