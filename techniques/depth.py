"""Depth-guided layer decomposition: normalised depth, the masks of its slices, and the layers that they cut.

Depth here is 0..1 with 0 = nearest. Slices and layers are ordered back to front: index 0 is the farthest.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from itertools import chain, repeat

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .layers import MAX_LAYERS, Layer, LayerStack

BINS = 256
RIM = 8  # pixels: a hole no wider is an edge that was not measured sharply, see fill_missing
RANGES = ("each image", "whole batch", "fixed")


def normalise_depth(
    depth: Tensor,
    near_is_white: bool,
    zero_is_missing: bool,
    spread: str = RANGES[0],
    limits: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Raw depth or disparity [B,H,W] -> 0..1, 0 = nearest; missing values filled.

    spread: one of RANGES, what is stretched to 0..1: each image's own range, that of the whole batch (a video, whose
    cuts would jump otherwise), or the fixed range from limits[0] to limits[1]. NaN and infinite values are missing,
    zeros too with zero_is_missing. Raises ValueError when a whole image is missing, and for limits that do not rise.
    Source: deglad, Sec. 3.2 (the depth map D that a threshold d is compared with).
    Differs: the paper takes the predictor's values as they are; a range of 0..1 makes thresholds comparable between
    sources.
    """
    valid = depth.isfinite() & ((depth != 0) | (not zero_is_missing))
    if not valid.flatten(1).any(1).all():
        raise ValueError(
            "depth: there is no valid value in it (all are missing, NaN or infinite); connect the depth of this image."
        )
    if spread == "fixed":
        if not limits[0] < limits[1]:
            raise ValueError(
                f"range_low, range_high: {limits[0]:g} is not below {limits[1]:g}; enter the lowest and the highest "
                "value of the depth."
            )
        low, high = (depth.new_tensor(limit) for limit in limits)
    else:
        over = (1, 2) if spread == RANGES[0] else (0, 1, 2)
        low = torch.where(valid, depth, math.inf).amin(over, keepdim=True)
        high = torch.where(valid, depth, -math.inf).amax(over, keepdim=True)
    scaled = ((depth - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    scaled = 1 - scaled if near_is_white else scaled
    return fill_missing(torch.where(valid, scaled, 0.0), valid)


def white_is_near(depth: Tensor) -> float:
    """Whether larger values of raw depth or disparity [B,H,W] are nearer, as a number in −1..1: above 0 they are, and
    the farther from 0 the surer.

    Spearman's correlation of a pixel's value with its row, the mean over the images. Zeros do not count, since sensors
    give them for what they have not measured; nor does NaN.
    Source: ours, the ground is nearest at the lower edge of nearly every image.
    """
    scores = [_rank_correlation(one) for one in depth.double().cpu()]
    return sum(scores) / len(scores)


def _rank_correlation(depth: Tensor) -> float:
    rows, columns = (depth.isfinite() & (depth != 0)).nonzero(as_tuple=True)
    values, rows = _ranks(depth[rows, columns]), _ranks(rows)
    spread = (values.square().sum() * rows.square().sum()).sqrt()
    return float((values * rows).sum() / spread) if spread > 0 else 0.0


def _ranks(values: Tensor) -> Tensor:
    """[N], their mean 0; equal values share their middle rank."""
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    ranks = (count.double().cumsum(0) - count / 2)[place]
    return ranks - ranks.sum() / max(1, len(ranks))


def fill_missing(depth: Tensor, valid: Tensor) -> Tensor:
    """Depth [B,H,W], 0 = nearest, with every pixel outside `valid` given the depth of a valid one in its row or column.

    A hole is crossed where it is narrowest, along its row or along its column. A rim of at most RIM pixels is an edge
    that was not measured sharply, and each pixel takes the closer end; a wider hole is what a nearer object hides from
    one of a camera's two eyes, or lies beyond its range, and takes the farther end. So nothing near is smeared over
    what is behind it. At the picture's border, where a hole has one end, it counts as twice as wide as that end is far.
    Source: ours, depth sensors leave holes on the far side of an edge.
    """
    while not valid.all():
        holes = (~valid).nonzero(as_tuple=True)
        nearest = [_nearest(depth, valid, holes, axis, reverse) for axis in (1, 2) for reverse in (False, True)]
        distances, depths = (
            rearrange(list(ends), "(line side) hole -> line side hole", line=2) for ends in zip(*nearest, strict=True)
        )
        width = torch.where(distances.isinf().any(1), 2 * distances.amin(1), distances.sum(1))
        one_side_closer = (width <= RIM) & (distances[:, 0] != distances[:, 1])
        closer = torch.where(distances[:, 0] < distances[:, 1], depths[:, 0], depths[:, 1])
        ends = torch.where(one_side_closer, closer, depths.amax(1))
        narrowest, axis = width.min(0)
        has_end = narrowest.isfinite()
        reached = tuple(place[has_end] for place in holes)
        depth = depth.index_put(reached, ends.gather(0, axis[None])[0, has_end])
        valid = valid.index_put(reached, torch.ones_like(has_end[has_end]))
    return depth


def _nearest(
    depth: Tensor, valid: Tensor, holes: tuple[Tensor, ...], axis: int, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Distance to, and depth of, the last valid pixel before each hole along an axis (after it when reversed);
    infinity, −1 if none.
    """
    length = depth.shape[axis]
    known = (valid.flip(axis) if reverse else valid).cpu().numpy()
    place = np.where(
        known, np.arange(length, dtype=np.int32).reshape([-1 if i == axis else 1 for i in range(3)]), np.int32(-1)
    )
    last = torch.from_numpy(np.maximum.accumulate(place, axis, out=place)).to(depth.device)
    last = last.flip(axis)[holes] if reverse else last[holes]
    none = last < 0
    last = (length - 1 - last if reverse else last).long().clamp(0, length - 1)
    distance = torch.where(none, math.inf, (holes[axis] - last).abs().to(depth.dtype))
    source = tuple(last if i == axis else index for i, index in enumerate(holes))
    return distance, torch.where(distance.isfinite(), depth[source], -1.0)


def resize_depth(depth: Tensor, height: int, width: int, edge: float = 0.02) -> Tensor:
    """Depth [B,H,W] at another size without new depths at edges.

    Where the four samples around a pixel agree within `edge` they are interpolated; across an edge the one closest to
    the interpolated value is taken, so that no rim of in-between depth appears.
    Source: ours, a rim of invented depth would fall into a middle slice.
    """
    if depth.shape[1:] == (height, width):
        return depth
    rows, columns = (
        (torch.arange(n, device=depth.device) + 0.5) * old / n - 0.5
        for n, old in ((height, depth.shape[1]), (width, depth.shape[2]))
    )
    y, x = (p.floor().long() for p in (rows, columns))
    corners = torch.stack(
        [
            depth[:, (y + i).clamp(0, depth.shape[1] - 1)][:, :, (x + j).clamp(0, depth.shape[2] - 1)]
            for i in (0, 1)
            for j in (0, 1)
        ]
    )
    v, u = (rows - y)[:, None].to(depth.dtype), (columns - x).to(depth.dtype)
    smooth = corners[0] * (1 - v) * (1 - u) + corners[1] * (1 - v) * u + corners[2] * v * (1 - u) + corners[3] * v * u
    closest = corners.gather(0, (corners - smooth).abs().argmin(0, keepdim=True))[0]
    return torch.where(corners.amax(0) - corners.amin(0) < edge, smooth, closest)


def parse_thresholds(text: str) -> list[float]:
    """ "0.6, 0.35" -> [0.35, 0.6], ascending without repeats; an empty text is no threshold. Raises ValueError naming
    the input.

    Source: deglad, Sec. 3.2 (a set of depth values {d_1..d_k}).
    """
    try:
        values = [float(part) for part in re.split(r"[,;\s]+", text.strip()) if part]
    except ValueError as error:
        raise ValueError(f"thresholds: {text!r} is not a list of numbers; write for example 0.35, 0.6.") from error
    if outside := [value for value in values if not 0 < value < 1]:
        raise ValueError(
            f"thresholds: {outside[0]:g} is outside of 0 to 1, where 0 is the nearest depth of the image and 1 the "
            "farthest; write for example 0.35, 0.6."
        )
    return sorted(set(values))


def parse_points(text: str) -> list[tuple[float, float]]:
    """ "0.5, 0.4; 0.2, 0.7" -> [(0.5, 0.4), (0.2, 0.7)]: x, y as fractions of width and height. Raises ValueError
    naming the input.

    Source: ours, one click per slice as in the paper's interface.
    """
    try:
        points = [tuple(float(value) for value in part.split(",")) for part in text.split(";") if part.strip()]
    except ValueError as error:
        raise ValueError(f"points: {text!r} is not a list of points; write for example 0.5, 0.4; 0.2, 0.7.") from error
    for point in points:
        if len(point) != 2 or not all(0 <= value <= 1 for value in point):
            raise ValueError(
                f"points: {point} is not x, y with both from 0 to 1, as fractions of width and height; write for "
                "example 0.5, 0.4."
            )
    return [(x, y) for x, y in points]


def threshold_behind(depth: Tensor, x: float, y: float) -> float:
    """The depth just behind the object at a point. depth [H,W]; x, y fractions of width and height; returns a value in
    (0, 1).

    1. A histogram of depth in 256 bins (bin = min(floor(256·D), 255)); a pixel counts exp(−r²/2s²), where r is its
       distance in pixels from the pixel of the point (floor(x·W), floor(y·H), clamped) and s = 0.15·max(W, H).
    2. Smoothed three times by (1, 2, 1)/4, the end bins repeated.
    3. From the point's bin, deeper while it rises: the object's peak. Then on, keeping the lowest bin so far, until a
       bin is above 1.5 times the lowest (something else begins), or the lowest is below 1/20 of the peak, or the end.
    4. The far edge of the lowest bin: (bin + 1)/256, at most 255/256.
    Source: ours, the paper's click chooses a depth on the top view; this one chooses an object.
    """
    height, width = depth.shape
    row, column = min(int(y * height), height - 1), min(int(x * width), width - 1)
    scale = 2 * (0.15 * max(width, height)) ** 2
    rows = torch.exp(-((torch.arange(height, dtype=torch.float64) - row) ** 2) / scale)
    columns = torch.exp(-((torch.arange(width, dtype=torch.float64) - column) ** 2) / scale)
    bins = (depth.double().cpu() * BINS).long().clamp(0, BINS - 1)
    histogram = torch.bincount(bins.flatten(), (rows[:, None] * columns).flatten(), BINS)
    for _ in range(3):
        padded = torch.cat([histogram[:1], histogram, histogram[-1:]])
        histogram = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
    counts = histogram.tolist()
    peak = int(bins[row, column])
    while peak + 1 < BINS and counts[peak + 1] > counts[peak]:
        peak += 1
    lowest = peak
    for place in range(peak + 1, BINS):
        if counts[lowest] < counts[peak] / 20 or counts[place] > 1.5 * counts[lowest]:
            break
        if counts[place] < counts[lowest]:
            lowest = place
    return min(lowest + 1, BINS - 1) / BINS


def slice_masks(depth: Tensor, thresholds: list[float]) -> Tensor:
    """Membership [B,N+1,H,W] of each slice, back to front, exactly 0 or 1: disjoint, and their sum is one everywhere.

    Source: deglad, Eq. 2, with several depths.
    """
    edges = torch.tensor([-math.inf, *thresholds, math.inf], dtype=depth.dtype, device=depth.device)
    slices = [(depth >= near) & (depth < far) for near, far in zip(edges[:-1], edges[1:], strict=True)]
    return torch.stack(slices[::-1], 1).to(depth.dtype)


def soften(weights: Tensor, width: float) -> Tensor:
    """Slice weights [B,N,H,W] with edges that fade over about `width` pixels; their sum stays what it was. 0 changes
    nothing.

    Source: ours, a normalised blur of a partition of one is a partition of one.
    """
    if width <= 0:
        return weights
    half = width / 2 + 1
    reach = math.ceil(half) - 1
    shares = [1 - abs(offset) / half for offset in range(-reach, reach + 1)]
    shares = [share / sum(shares) for share in shares]
    # sums of shifted copies: on a CPU a convolution of one channel is ten times slower
    for size in ((0, 0, reach, reach), (reach, reach, 0, 0)):
        padded = F.pad(weights, size, mode="replicate")
        axis = 2 if size[2] else 3
        weights = padded.narrow(axis, 0, weights.shape[axis]) * shares[0]
        for offset, share in enumerate(shares[1:], 1):
            weights.add_(padded.narrow(axis, offset, weights.shape[axis]), alpha=share)
    return weights


def over_alphas(weights: Tensor, opacity: Tensor | None = None) -> Tensor:
    """Alpha [B,N,H,W] of each layer, back to front, with which the layers laid over each other show these weights.

    weights: [B,N,H,W], shares of a pixel, sum one. alpha_i = M_i / (M_1 + … + M_i), since the layers in front of i take
    their shares off it afterwards.
    opacity: [B,H,W] in 0..1, the alpha a of the picture that is cut, which the layers together then have:
    alpha_i = a M_i / (1 − a + a (M_1 + … + M_i)).
    Source: ours, the inverse of dreamlayer Eq. 1 (composite of layers by "over").
    """
    alphas, behind = torch.empty_like(weights), torch.zeros_like(weights[:, 0])
    # One layer at a time stays in the processor's cache.
    for weight, alpha in zip(weights.unbind(1), alphas.unbind(1), strict=True):
        behind += weight
        let_through = behind if opacity is None else torch.lerp(torch.ones_like(behind), behind, opacity)
        torch.div(weight if opacity is None else weight * opacity, let_through.clamp_min(1e-4), out=alpha)
        alpha.mul_(behind > 1e-4).clamp_(0, 1)
    return alphas


def hidden_parts(weights: Tensor) -> Tensor:
    """What nearer layers hide of each layer, [B,N,H,W] in 0..1: the mask to inpaint when a layer must be whole.

    Source: deglad, Sec. 3.4 (the background layer behind the foreground is what an object is inserted into).
    """
    return (1 - weights.cumsum(1)).clamp(0, 1)


def grow_nearer(weights: Tensor, pixels: int) -> Tensor:
    """Weights [B,N,H,W], back to front, with each layer and all that is nearer grown by so many pixels; their sum
    stays.

    Source: ours, the rim of a hard cut is mixed of both sides, and belongs to the nearer one when the farther one is
    made whole.
    """
    nearer = weights.flip(1).cumsum(1).flip(1)
    grown = (
        torch.cat([nearer[:, :1], F.max_pool2d(nearer[:, 1:], 2 * pixels + 1, 1, pixels)], 1)
        if weights.shape[1] > 1
        else nearer
    )
    return grown - torch.cat([grown[:, 1:], torch.zeros_like(grown[:, :1])], 1)


def fill_behind(colours: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Colours [B,N,H,W,3] and extra alpha [B,N,H,W] (0 or 1) that make layers whole where nearer ones hide them
    completely.

    colours: of each layer, of use where its weight is. A hidden pixel goes to the layer that most of the visible,
    farther surroundings belong to, and always to the farthest one; its colour is a smooth continuation. The flattened
    picture is unchanged.
    Source: ours, push-pull interpolation (Gortler et al. 1996, The Lumigraph, Sec. 3.4).
    """
    behind = weights.cumsum(1)
    hidden = behind <= 1e-4
    share = push_pull((weights / behind.clamp_min(1e-4))[..., None], behind)[..., 0]
    share[:, 0] = 1
    clean = 1 - F.max_pool2d(1 - behind, 7, 1, 3)  # the rim of a nearer layer is stained by its colour
    smooth = push_pull(colours, weights * (clean.clamp(0, 1) + 1e-3))
    return torch.where(hidden[..., None], smooth, colours), (hidden & (share > 0.5)).to(weights.dtype)


def push_pull(values: Tensor, weights: Tensor) -> Tensor:
    """Values [B,N,H,W,C] continued smoothly to where weights [B,N,H,W] are 0; unchanged where they are 1.

    Source: ours, push-pull interpolation (Gortler et al. 1996, The Lumigraph, Sec. 3.4).
    """
    image = rearrange((values * weights[..., None]).flatten(0, 1), "b h w c -> b c h w")
    weight = rearrange(weights, "b layer h w -> (b layer) 1 h w")
    levels = [(image, weight)]
    while max(image.shape[-2:]) > 1:
        image, weight = (
            F.avg_pool2d(level, 2, ceil_mode=True, count_include_pad=False) * 4 for level in (image, weight)
        )
        excess = weight.clamp_min(1)
        image, weight = image / excess, weight / excess
        levels.append((image, weight))
    image, weight = levels.pop()
    image = image / weight.clamp_min(1e-12)
    for detail, weight in reversed(levels):
        image = detail + (1 - weight) * F.interpolate(image, detail.shape[-2:], mode="bilinear", align_corners=False)
    return rearrange(image, "(b layer) c h w -> b layer h w c", b=len(values))


def _depth_layers(colours: Tensor, alphas: Tensor, thresholds: list[float], names: Sequence[str] = ()) -> LayerStack:
    """Layers of one picture, back to front, from colours [N,H,W,3] and alphas [N,H,W]; each carries its depth range.
    names: back to front too; an empty or missing one is the depth range.

    Source: deglad, Sec. 3.2 (the layers that the masks of Eq. 2 give).
    """
    edges = [0.0, *thresholds, 1.0]
    ranges = list(zip(edges[:-1], edges[1:], strict=True))[::-1]
    images = torch.cat([colours, alphas[..., None]], -1)
    layers = [
        Layer(image, name or f"Depth {near:.2f}-{far:.2f}", extra={"strata": {"depth": (near, far)}})
        for image, (near, far), name in zip(images, ranges, chain(names, repeat("")), strict=False)
    ]
    return LayerStack((images.shape[2], images.shape[1]), tuple(layers))


def amodal_mask(region: Tensor, depth: Tensor, threshold: float) -> Tensor:
    """The part of a region [B,H,W] (1 = in it) where an object at depth `threshold` is visible: the region minus what
    is nearer.

    Source: deglad, Sec. 4.3 (amodal bounding box).
    """
    return region * (depth >= threshold)


def compose_by_depth(
    front: Tensor, back: Tensor, front_depth: Tensor, back_depth: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Image [B,H,W,3] and depth [B,H,W] of one scene's foreground pasted over another scene; weights [B,H,W] 1 =
    foreground.

    Source: deglad, Eq. 3 in image space (the paste baseline); the depth as the released code composes it.
    """
    share = weights[..., None]
    return front * share + back * (1 - share), front_depth * weights + back_depth * (1 - weights)


def top_view(image: Tensor, depth: Tensor, height: int) -> Tensor:
    """Picture [B,height,W,3] of the scene from above: columns of the image [B,H,W,3] against depth [B,H,W], nearest at
    the bottom.

    A place shows the mean colour of the pixels that fall there, and is brighter the more they are.
    Source: deglad, Suppl. B (the top view that a click chooses the depth on).
    """
    batch, rows, width = depth.shape
    bins = ((1 - depth) * height).long().clamp(0, height - 1)
    place = (bins * width + torch.arange(width, device=depth.device)).flatten(1)
    sums = torch.zeros(batch, height * width, 4, dtype=image.dtype, device=image.device)
    pixels = rearrange(torch.cat([image[..., :3], torch.ones_like(image[..., :1])], -1), "b h w c -> b (h w) c")
    sums.scatter_add_(1, place[..., None].expand(-1, -1, 4), pixels)
    count = sums[..., 3:]
    density = torch.where(count > 0, 0.4, 0.0) + 0.6 * (1 - torch.exp(-count * (12 / rows)))
    return rearrange(sums[..., :3] / count.clamp_min(1) * density, "b (h w) c -> b h w c", h=height)


def all_thresholds(depth: Tensor, given: list[float], points: list[tuple[float, float]]) -> list[float]:
    """The given thresholds and one behind the object at each point of depth [H,W], ascending, without repeats closer
    than 1/256.

    Raises ValueError when there are none or too many for a document.
    Source: ours, clicks add to what was typed.
    """
    used: list[float] = []
    for value in sorted([*given, *(threshold_behind(depth, x, y) for x, y in points)]):
        if not used or value - used[-1] >= 1 / BINS or (value in given and value != used[-1]):
            used.append(value)
    if not used:
        raise ValueError(
            "thresholds: there is no threshold and no point; write one, for example 0.5, or click in the node's views."
        )
    if len(used) >= MAX_LAYERS:
        raise ValueError(
            f"thresholds: there are {len(used)} cuts and a document holds {MAX_LAYERS} layers; give at most "
            f"{MAX_LAYERS - 1}."
        )
    return used


def cut_layers(
    colours: Tensor,
    weights: Tensor,
    thresholds: list[float],
    fill: bool,
    opacity: Tensor | None = None,
    rim: int = 2,
    soft_edge: float = 0,
    names: Sequence[str] = (),
) -> LayerStack:
    """The layers of one picture from colours [1,N,H,W,3] and weights [1,N,H,W], back to front, made whole behind nearer
    ones if asked.

    rim: by how many pixels nearer layers grow then, for colours that are the picture's for every layer; 0 for colours
    that are cleaned already.
    opacity: [1,H,W] in 0..1, the alpha of a picture that is itself transparent in places.
    soft_edge: over how many pixels the cut fades; the rim then is wider by half of it, so that the fade ends beside
    what is removed.
    names: of the layers, back to front; an empty or missing one is the layer's depth range.
    Source: deglad, Sec. 3.2 (the layers that the masks of Eq. 2 give).
    """
    if fill and rim:
        weights = grow_nearer(weights, rim + math.ceil(soft_edge / 2))
    weights = soften(weights, soft_edge)
    alphas = over_alphas(weights, opacity)
    if fill:
        colours, extra = fill_behind(colours, weights)
        alphas = alphas + (extra if opacity is None else extra * opacity)
    return _depth_layers(colours[0], alphas[0], thresholds, names)


def slice_picture(
    picture: Tensor,
    depth: Tensor,
    thresholds: list[float],
    opacity: Tensor | None,
    fill: bool,
    soft_edge: float = 0,
    refine: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    names: Sequence[str] = (),
) -> tuple[LayerStack, Tensor, Tensor]:
    """The layers of a picture [H,W,3] with depth [H,W], their weights [N,H,W], and what nearer ones hide of each
    [N,H,W], back to front.

    opacity, fill, soft_edge, names: see cut_layers. refine: gives weights and colours for the picture and its hard
    weights, as techniques.matting.refine_slices does; such edges are soft and clean already.
    Source: deglad, Sec. 3.2 (a picture cut at several depths).
    """
    weights, colours = slice_masks(depth[None], thresholds), picture.expand(1, len(thresholds) + 1, -1, -1, -1)
    rim, fade = (2, soft_edge) if refine is None else (0, 0)
    if refine is not None:
        weights, colours = (value[None] for value in refine(picture, weights[0]))
    stack = cut_layers(colours, weights, thresholds, fill, opacity, rim, fade, names)
    weights = soften(weights, fade)
    return stack, weights[0], hidden_parts(weights)[0]


def paste_layers(back: Tensor, front: Tensor, weights: Tensor) -> LayerStack:
    """Background [H,W,3] and, over it, the foreground [H,W,3] where weights [H,W] are.

    Source: deglad, Eq. 3 in image space (the paste baseline).
    """
    layers = (Layer(back, "Background"), Layer(torch.cat([front, weights[..., None]], -1), "Foreground"))
    return LayerStack((back.shape[1], back.shape[0]), layers)
