"""Attention of diffusion transformers, whose sequences hold a prompt and an image: rows of a batch that read the image
tokens of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from .shared_layers import mix_global_in

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Reads(NamedTuple):
    """What a row's image tokens read: the tokens beside the image of row `beside`, and the image tokens of `images`."""

    beside: int
    images: Sequence[int]


def attend_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    image: slice,
    beside: list[list[slice]],
    reads: list[Reads],
    attend: Attend,
    mixed: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """[B,T,C]: each row's image tokens read what `reads` says; its other tokens read their own row, as without sharing.

    q, k, v: [B,H,T,D], C = H·D. image: the image's N tokens of each row. beside: for each row the other tokens that
    count as keys; what is in none of them, as a shorter prompt's padding, is read by nobody. mixed: other queries, keys
    and values [B,H,N,D] of the image tokens for the reading of image tokens. attend: [1,H,M,D], [1,H,S,D] twice
    -> [1,M,C]; it gets no mask, so that every kernel can do it.
    Source: dreamlayer, Eq. 10 and 11, on joint attention
    Source: layerfusion, Sec. 3.3, attention shared between hidden states, on joint attention
    Differs: prompts are in the same sequence here, and are not shared: each row reads one prompt.
    """
    images = mixed or (q[:, :, image], k[:, :, image], v[:, :, image])
    out = v.new_empty(len(q), q.shape[2], q.shape[1] * v.shape[3])
    for row, read in enumerate(reads):
        own = [torch.cat([values[row, :, part] for part in [*beside[row], image]], 1)[None] for values in (k, v)]
        for part in (slice(image.start), slice(image.stop, q.shape[2])):
            if (asking := q[row : row + 1, :, part]).shape[2]:
                out[row : row + 1, part] = attend(asking, *own)
        joined = (
            torch.cat(
                [values[read.beside, :, part] for part in beside[read.beside]] + [tokens[one] for one in read.images], 1
            )[None]
            for values, tokens in ((k, images[1]), (v, images[2]))
        )
        out[row : row + 1, image] = attend(images[0][row : row + 1], *joined)
    return out


def of_layers(rows: int, layers: int, isolated: bool = False) -> list[Reads]:
    """All layers of a scene read each other's images; rows: scenes × layers, the whole picture last of each scene.
    With one layer a scene every row reads itself, as without sharing.

    isolated: the whole picture reads itself only.
    Source: dreamlayer, Eq. 10 and 11; Eq. 15 when isolated
    """
    reads = []
    for row in range(rows):
        first = row - row % layers
        by_itself = isolated and row == first + layers - 1
        reads.append(Reads(row, [row] if by_itself else range(first, first + layers)))
    return reads


def of_blending(rows: int, own_prompt: bool = False) -> list[Reads]:
    """Foreground, background and blended of each scene: the foreground reads itself, the other two read both of their
    images and the background's prompt; own_prompt: the blended one reads its own.

    Source: layerfusion, Sec. 3.3 and Alg. 3, a_BG and a_Blended both with p_BG
    """
    reads = []
    for row in range(0, rows, 3):
        pair = range(row + 1, row + 3)
        reads += [Reads(row, [row]), Reads(row + 1, pair), Reads(row + 2 if own_prompt else row + 1, pair)]
    return reads


def mix_layers(tokens: Tensor, maps: Tensor) -> Tensor:
    """Image tokens [B·L,H,N,D] of scenes of L layers, in which the objects have the whole picture's where their maps
    [B,L-2,N] in 0..1 are 1.

    Source: dreamlayer, Eq. 9, on joint attention
    Differs: queries, keys and values are mixed after their norm and their positions, as the one place to reach them in
    every transformer; the positions of all layers are the same, and mixing values is mixing hidden states.
    """
    layers = rearrange(tokens, "(scene layer) head token c -> scene layer head token c", layer=maps.shape[1] + 2)
    return rearrange(mix_global_in(layers, maps[:, :, None]), "scene layer head token c -> (scene layer) head token c")
