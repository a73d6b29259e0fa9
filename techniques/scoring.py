"""How good a stack of layers is: by the image that it should make up, and by a true stack as LayerD's evaluation judges
it.

LayerD compares layers of 8 bits, so these are bytes: a layer is [H,W,4] uint8, straight alpha. Stacks are back to
front.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import reduce

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from .smoothing import gaussian_blur

MOST_MERGES = 5
FEWEST_LAYERS = 2  # that merging leaves
STEP = 1 / 255
RIM = 4.0  # pixels around a soft edge in which a layer's solid colour is looked for
HEAT = ((0.0, (0, 0, 0)), (0.25, (84, 16, 109)), (0.5, (187, 55, 84)), (0.75, (249, 142, 9)), (1.0, (252, 255, 164)))
_LIMIT = re.compile(r"\s*([a-z_0-9]+)\s*(<=|>=|<|>)\s*([-+0-9.eE]+)\s*")
_HOLDS: dict[str, Callable[[float, float], bool]] = {
    "<": lambda value, limit: value < limit,
    "<=": lambda value, limit: value <= limit,
    ">": lambda value, limit: value > limit,
    ">=": lambda value, limit: value >= limit,
}


def rgb_l1(found: np.ndarray, true: np.ndarray) -> float:
    """Mean absolute difference of RGB, 0..1, where the true layer has any alpha; bytes [H,W,4].

    Source: layerd, RGB L1 of its evaluation, as in the released code (every pixel of alpha above 0 counts fully)
    """
    there = true[..., 3] > 0
    apart = np.abs(found[..., :3].astype(np.int16) - true[..., :3]).sum(-1, dtype=np.int64)[there].sum()
    return float(apart) / 3 / 255 / (int(there.sum()) + 1e-8)


def soft_iou(found: np.ndarray, true: np.ndarray) -> float:
    """Σ min / Σ max of two alphas, 0..1; 0 where both are empty; bytes [H,W,4].

    Source: layerd, alpha soft IoU of its evaluation, as in the released code
    """
    pair = found[..., 3], true[..., 3]
    both, either = np.minimum(*pair).sum(dtype=np.int64), np.maximum(*pair).sum(dtype=np.int64)
    return float(both) / float(either) if either else 0.0


def bytes_over(below: np.ndarray, top: np.ndarray) -> np.ndarray:
    """One layer of bytes [H,W,4] over another, with the rounding of Pillow's alpha_composite, with which LayerD merges.

    Source: w3c, section 5.1 (source over)
    """
    bits = 7
    alpha, alpha_below = top[..., 3].astype(np.uint32), below[..., 3].astype(np.uint32)
    together = alpha * 255 + alpha_below * (255 - alpha)
    share = alpha * (255 * 255 << bits) // np.maximum(together, 1)
    rest = np.uint32(255 << bits) - share
    colour = top[..., :3] * share[..., None] + below[..., :3] * rest[..., None]
    result = np.empty_like(below)
    result[..., :3] = _by_255(colour + np.uint32(0x80 << bits)) >> bits
    result[..., 3] = _by_255(together + np.uint32(0x80))
    return np.where((alpha == 0)[..., None], below, result)


def _by_255(value: np.ndarray) -> np.ndarray:
    return ((value >> 8) + value) >> 8


def depth_groups(layers: Sequence[np.ndarray]) -> list[list[int]]:
    """Indices of layers that lie on nothing and under nothing of each other, back to front: from the front, all those
    that no other remaining layer covers anywhere.

    Source: layerd, the grouping of layers before its evaluation
    """
    there = [layer[..., 3] > 0 for layer in layers]
    left, groups = list(range(len(layers))), []
    while left:
        top = [one for at, one in enumerate(left) if not any((there[one] & there[two]).any() for two in left[at + 1 :])]
        groups.append(top)
        left = [index for index in left if index not in top]
    return groups[::-1]


def warped_pairs(costs: np.ndarray) -> list[tuple[int, int]]:
    """The cheapest alignment of the rows of costs [N,M] with its columns, from (0, 0) to the end: dynamic time warping.

    Source: layerd, the alignment of its evaluation
    """
    total = np.full((costs.shape[0] + 1, costs.shape[1] + 1), np.inf)
    total[0, 0] = 0
    for i, j in np.ndindex(costs.shape):
        total[i + 1, j + 1] = costs[i, j] + min(total[i, j + 1], total[i + 1, j], total[i, j])
    i, j = costs.shape
    path = [(i - 1, j - 1)]
    while (i, j) != (1, 1):
        both, up, left = total[i - 1, j - 1], total[i - 1, j], total[i, j - 1]
        i, j = (i - 1, j - 1) if both <= min(up, left) else (i - 1, j) if up <= left else (i, j - 1)
        path.append((i - 1, j - 1))
    return path[::-1]


def layerd_scores(
    found: Sequence[np.ndarray], true: Sequence[np.ndarray], most: int = MOST_MERGES
) -> list[dict[str, float]]:
    """Scores after 0, 1, … most merges of neighbouring layers of either stack, as far as merging brings the two nearer
    to each other: {merges, cost, rgb_l1, alpha_iou}, means over aligned pairs. Layers are bytes [H,W,4] of one size.

    Source: layerd, the evaluation protocol (dynamic time warping with edits), as in the released code
    """
    compared = _Compared()
    stacks = [_grouped(found), _grouped(true)]
    pairs, scores = compared.aligned(*stacks)
    rows = [{"merges": 0, **scores}]
    while len(rows) <= most:
        gains = [
            compared.best_merge(stacks[0], stacks[1], pairs),
            compared.best_merge(stacks[1], stacks[0], [(j, i) for i, j in pairs]),
        ]
        side = int(gains[1][0] >= gains[0][0])
        place = gains[side][1]
        if place is None:
            break
        stacks[side][place : place + 2] = [bytes_over(*stacks[side][place : place + 2])]
        pairs, scores = compared.aligned(*stacks)
        rows.append({"merges": len(rows), **scores})
    return rows


def _grouped(layers: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [reduce(bytes_over, [layers[index] for index in group]) for group in depth_groups(layers)]


class _Compared:
    """Costs of pairs of layers, each computed once."""

    def __init__(self):
        self.known: dict[tuple[int, int], tuple] = {}

    def __call__(self, one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
        """(RGB L1, soft IoU). The arrays are kept, so that no other gets their address."""
        key = id(one), id(other)
        if key not in self.known:
            self.known[key] = rgb_l1(one, other), soft_iou(one, other), one, other
        return self.known[key][:2]

    def cost(self, one: np.ndarray, other: np.ndarray) -> float:
        l1, iou = self(one, other)
        return (l1 + 1 - iou) / 2

    def aligned(self, found: list[np.ndarray], true: list[np.ndarray]) -> tuple[list[tuple[int, int]], dict]:
        """Which layers belong to each other, and the mean scores of these pairs."""
        pairs = warped_pairs(np.array([[self.cost(one, other) for other in true] for one in found]))
        scores = np.array([self(found[i], true[j]) for i, j in pairs]).mean(0)
        l1, iou = (float(score) for score in scores)
        return pairs, {"cost": (l1 + 1 - iou) / 2, "rgb_l1": l1, "alpha_iou": iou}

    def best_merge(
        self, layers: list[np.ndarray], others: list[np.ndarray], pairs: list[tuple[int, int]]
    ) -> tuple[float, int | None]:
        """(gain in likeness, place) of the merge of two neighbours that helps most; no place where none helps.

        After a merge, the partners of the two are like the merged layer or like the one above it, whichever is better.
        """
        best: tuple[float, int | None] = (-math.inf, None)
        if len(layers) <= FEWEST_LAYERS:
            return best
        for place in range(len(layers) - 1):
            partners = [[others[j] for i, j in pairs if i == index] for index in (place, place + 1)]
            candidates = [bytes_over(*layers[place : place + 2]), *layers[place + 2 : place + 3]]
            now = sum(self.likeness(layers[place + n], partners[n]) for n in (0, 1))
            then = [self.likeness(one, group) for one in candidates for group in partners]
            gain = then[0] + max(then[1:]) - now
            if gain > max(0, best[0]):
                best = gain, place
        return best

    def likeness(self, layer: np.ndarray, partners: list[np.ndarray]) -> float:
        return sum(1 - self.cost(layer, one) for one in partners)


def heat(error: Tensor, most: float = 0.1) -> Tensor:
    """[H,W,3] of errors [H,W]: black for 0, over red and orange to pale yellow for most and above.

    Source: ours, colours that grow lighter with the error
    """
    value = (error / most).clamp(0, 1)
    picture = torch.zeros((*error.shape, 3), dtype=error.dtype, device=error.device)
    for (low, dark), (high, bright) in zip(HEAT, HEAT[1:], strict=False):
        share = ((value - low) / (high - low)).clamp(0, 1)[..., None]
        start, end = (error.new_tensor(colour) / 255 for colour in (dark, bright))
        picture = torch.where((value >= low)[..., None], start + share * (end - start), picture)
    return picture


def recomposition(colour: Tensor, alpha: Tensor, image: Tensor) -> tuple[Tensor, dict[str, float]]:
    """How far a flattened stack, colour [H,W,3] and alpha [H,W], is from the image [H,W,3]: a map [H,W], mean over RGB,
    and of it the mean, the share of pixels whose every channel is within one step of 8 bits, and the largest.

    Source: ours, what is open counts as black
    """
    apart = (colour * alpha[..., None] - image).abs()
    worst = apart.amax(-1)
    figures = {
        "recomposition": float(apart.mean()),
        "within_1": float((worst <= STEP + 1e-6).double().mean()),
        "worst": float(worst.max()),
    }
    return apart.mean(-1), figures


def halo(rgba: Tensor) -> tuple[float, float]:
    """(sum, weight) of how far the colours of a layer's soft edge are from those of its solid parts nearby, weighted by
    alpha (1 - alpha); rgba [H,W,4]. Light or dark seams of another background make it large.

    Source: ours, the colour of an edge is that of the thing it is of
    """
    planes = rearrange(rgba, "h w c -> 1 c h w")
    colour, alpha = planes[:, :3], planes[:, 3:]
    solid = (alpha >= 0.98).to(alpha)
    near = gaussian_blur(solid, RIM / 2, RIM)
    inside = gaussian_blur(colour * solid, RIM / 2, RIM) / near.clamp(min=1e-6)
    weight = alpha * (1 - alpha) * (near > 0.05)
    return float(((colour - inside).abs().mean(1, keepdim=True) * weight).sum()), float(weight.sum())


def hidden_filled(alphas: Sequence[Tensor]) -> float:
    """Share of what nearer layers hide of the back layer that it has pixels for; alphas [H,W], back to front; nan where
    nothing is hidden.

    Source: ours, a background that can be uncovered
    """
    left = torch.ones_like(alphas[0])
    for alpha in alphas[1:]:
        left = left * (1 - alpha)
    hidden = left < 0.5
    return float((alphas[0][hidden] >= 0.5).double().mean()) if hidden.any() else math.nan


def parse_limits(text: str, known: Sequence[str]) -> list[tuple[str, str, float]]:
    """(figure, sign, number) of limits such as `recomposition < 0.01, alpha_iou >= 0.9`, commas or lines between.

    Raises ValueError for what cannot be read or is no figure.
    Source: ours, conditions of a gate
    """
    limits = []
    for part in filter(str.strip, re.split(r"[,\n]", text)):
        match = _LIMIT.fullmatch(part)
        number = _number(match[3]) if match else None
        if match is None or number is None:
            raise ValueError(
                f"limits: {part.strip()[:60]!r} cannot be read; write a figure, one of < <= > >=, and a number, as in: "
                "recomposition < 0.01, within_1 >= 0.99."
            )
        if match[1] not in known:
            raise ValueError(f"limits: there is no figure {match[1]!r}; the figures are {', '.join(known)}.")
        limits.append((match[1], match[2], number))
    return limits


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def broken_limits(figures: dict[str, float], limits: Sequence[tuple[str, str, float]]) -> list[str]:
    """Words for each limit that the figures do not keep; a figure that is nan keeps none.

    Source: ours, conditions of a gate
    """
    return [
        f"{name} is {figures[name]:.4g} and should be {sign} {limit:g}"
        for name, sign, limit in limits
        if not _HOLDS[sign](figures[name], limit)
    ]
