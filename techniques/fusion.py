"""LayerFusion's masks from a foreground model's attention, and its blending of attention outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

MOST_PROBABILITIES = 2**21  # held at once, over all heads: 8 MB in float32, which a processor's cache holds

PRIORS = BOTH, STRUCTURE, CONTENT = ("both", "structure alone", "content alone")


def structure_prior(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """[B,M] in 0..1, high where a token of the foreground attends to few others; q: [B,M,C], k: [B,T,C], projected, C =
    heads × width.

    Exact, in chunks of rows: the extra memory grows with tokens, not with their square.
    Source: layerfusion, Alg. 1
    """

    def density(probabilities: Tensor) -> Tensor:
        return 1 / probabilities.mean(0).square().sum(-1)

    return 1 - min_max_normalise(reduce_attention(q, k, heads, density))


def content_prior(q: Tensor, k: Tensor, heads: int, ends: list[int]) -> Tensor:
    """[B,M] in 0..1: how much of each token's attention goes to the prompt's end; q: [B,M,C] of the foreground, k:
    [B,T,C] of its prompt.

    ends: positions of the end-of-text tokens; a prompt of several chunks has one in each, and their shares add up.
    Source: layerfusion, Alg. 2
    """
    return reduce_attention(q, k, heads, lambda probabilities: probabilities[..., ends].sum(-1).mean(0))


def blending_masks(structure: Tensor, content: Tensor, boundary: float, priors: str = BOTH) -> tuple[Tensor, Tensor]:
    """(mask_soft, mask_hard), each [B,M] in 0..1, from the two priors [B,M] or one of them, see PRIORS; boundary: the
    coefficient d, larger is sharper.

    Source: layerfusion, Alg. 3; one prior alone is the ablation of Fig. 8c
    """
    soft = min_max_normalise({BOTH: structure * content, STRUCTURE: structure, CONTENT: content}[priors])
    return soft, torch.sigmoid(boundary * (soft - 0.5))


def wide_mask(soft: Tensor, boundary: float) -> Tensor:
    """[B,M] in 0..1, as sharp as the hard mask but around the level that parts object and surroundings, so that an
    object comes in whole; soft: [B,M].

    The level is halfway between the means of the two sides that differ most (Otsu's threshold); in a flat mask there is
    no object, as in the hard one.
    Source: ours, in place of the soft mask of layerfusion, Eq. 1, for what the blended branch goes on with
    """
    count = soft.shape[1]
    # Of the 0 to M lowest.
    low, sums = (torch.arange(count + 1, device=soft.device), F.pad(soft.sort(1).values.cumsum(1), (1, 0)))
    below, above = sums / low.clamp_min(1), (sums[:, -1:] - sums) / (count - low).clamp_min(1)
    spread, best = (low * (count - low) * (above - below).square()).max(1, keepdim=True)
    level = torch.where(spread > 0, (below + above).gather(1, best) / 2, 0.5)
    return torch.sigmoid(boundary * (soft - level))


def blend_foreground_in(foreground: Tensor, blended: Tensor, soft: Tensor) -> Tensor:
    """The blended branch's attention output [B,M,C] with the foreground's in it; soft: [B,M].

    Source: layerfusion, Eq. 1
    """
    return torch.lerp(blended, foreground, soft[..., None].to(blended))


def return_to_foreground(foreground: Tensor, blended: Tensor, hard: Tensor) -> Tensor:
    """The foreground's attention output [B,M,C] after the exchange; blended: the result of Eq. 1; hard: [B,M].

    Source: layerfusion, Eq. 2
    """
    return torch.lerp(foreground, blended, hard[..., None].to(foreground))


def shared_tokens(values: Tensor) -> Tensor:
    """Queries, keys or values [B,3,T,C] of foreground, background and blended -> [B,2T,C]: background and blended as
    one picture of all their tokens.

    Source: layerfusion, Sec. 3.3, attention shared between the hidden states of background and blended
    """
    return rearrange(values[:, 1:], "scene branch token c -> scene (branch token) c")


def shared_prompt(values: Tensor) -> Tensor:
    """Keys or values [B,3,T,C] of the three prompts -> [3B,T,C] with the background's prompt for the blended branch as
    well.

    Source: layerfusion, Alg. 3, a_BG and a_Blended both with p_BG
    """
    return rearrange([values[:, branch] for branch in (0, 1, 1)], "branch scene token c -> (scene branch) token c")


def resize_prior(prior: Tensor, size: tuple[int, int], new_size: tuple[int, int]) -> Tensor:
    """A prior [B,H×W] of size (H, W) as the mean over each token's area at another attention resolution.

    Source: ours, the paper takes s from one layer and uses it at every resolution
    """
    if size == new_size:
        return prior
    image = rearrange(prior, "b (h w) -> b 1 h w", h=size[0], w=size[1])
    return rearrange(F.interpolate(image, new_size, mode="area"), "b 1 h w -> b (h w)")


def min_max_normalise(values: Tensor) -> Tensor:
    """Each row of [...,M] min-max normalised to 0..1; a flat one becomes zeros.

    Source: layerfusion, Alg. 1 and 3, their normalisation
    Source: dreamlayer, Eq. 4, its min-max normalisation
    """
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    return (values - low) / (high - low).clamp_min(torch.finfo(values.dtype).tiny)


def reduce_attention(q: Tensor, k: Tensor, heads: int, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """[B,M,…]: `reduce` to [rows,…] of the attention's probabilities [heads,rows,T], which exist for a few rows at a
    time; q: [B,M,C], k: [B,T,C].

    Source: ours, the extra memory does not grow with the picture
    """
    result = None
    for row, (one, keys) in enumerate(zip(q, k, strict=True)):
        start = 0
        for part in _probabilities(one, keys, heads):
            values = reduce(part)
            # Made before the large parts come and go: small results kept between would keep the heap from shrinking.
            if result is None:
                result = values.new_empty(len(q), q.shape[1], *values.shape[1:])
            result[row, start : start + len(values)] = values
            start += len(values)
    assert result is not None
    return result


def _probabilities(q: Tensor, k: Tensor, heads: int) -> Iterator[Tensor]:
    precise = torch.promote_types(q.dtype, torch.float32)
    keys = rearrange(k.to(precise), "token (head channel) -> head channel token", head=heads)
    scale = keys.shape[1] ** -0.5
    for rows in q.split(max(1, MOST_PROBABILITIES // (heads * len(k)))):
        queries = rearrange(rows.to(precise), "token (head channel) -> head token channel", head=heads)
        yield torch.softmax(queries @ keys * scale, -1)


def map_strips(steps: list[Tensor]) -> Tensor:
    """[steps × pictures,4H,4·K·W,3] of maps [N,K,H,W] of each step, each stretched to its own range; a black pixel
    where there are none.

    Source: ours, the maps of the figures of layerfusion and dreamlayer, for every step of a run
    """
    if not steps:
        return torch.zeros(1, 1, 1, 3)
    maps = torch.cat(steps)
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    strip = torch.cat(((maps - low) / (high - low).clamp_min(1e-12)).unbind(1), -1)
    return repeat(strip, "b h w -> b (h 4) (w 4) 3").contiguous()
