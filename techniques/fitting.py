"""Layers of any decomposer fitted to the image that they were made from: to its size, and so that over each other they
are the image in every pixel.

Arrays of layers are [K,...], the back layer first. Alphas are 1 = opaque, colours straight sRGB in 0..1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .geometry import place
from .harmonization import visible_shares
from .layering import exact_layers
from .layers import MAX_LAYERS, MAX_SIDE, Layer, LayerStack

TRACE = 1 / 510  # half a step of 8 bits
WINDOW = 2  # pixels to each side over which clean_alpha takes its mean
COLOUR_ERROR = 0.1  # assumed deviation of enlarged colours, per channel: the smaller, the more the image moves alpha
ALPHA_ERROR = 0.4  # assumed deviation of an enlarged alpha, as a share of its range around the pixel in the small layer
HAZE = 0.05  # an alpha found anew that is nearer than this to 0 or 1 is taken for 0 or 1
BACKDROP = 0.5  # share of the canvas that a back layer covers at least when it is a background and not a cut-out
_STRIP_PIXELS = 2**18


@dataclass(frozen=True)
class Fitted:
    """stack: the layers at the image's size. before, after: [H,W], how far their composite is from the image, mean over
    RGB, when they are only enlarged, and now. rest: whether a layer was added for what no layer covers.
    """

    stack: LayerStack
    before: Tensor
    after: Tensor
    rest: bool


def noise_of(alpha: Tensor) -> float:
    """Standard deviation of the noise in an alpha [H,W] in 0..1; 0 for one that is smooth in most places.

    Source: immerkaer, Eq. 3
    Differs: the median of absolute values instead of their mean, so that edges do not count.
    """
    if min(alpha.shape) < 3:
        return 0.0
    kernel = alpha.new_tensor([[1, -2, 1], [-2, 4, -2], [1, -2, 1]])[None, None]
    return float(F.conv2d(alpha[None, None], kernel).abs().median()) / 6 / 0.6745


def clean_alpha(alpha: Tensor) -> Tensor:
    """An alpha [H,W] in 0..1 without noise: 0 where it was next to 0, and 1 where it was next to 1.

    Each pixel becomes the mean of those around it that differ from it by no more than noise does, so that edges stay.
    An alpha without noise stays as it is, except for what 8 bits cannot tell from 0 or 1.
    Source: sigmafilter, the sigma filter, with the noise as `noise_of` finds it
    """
    noise = noise_of(alpha)
    if noise > TRACE:
        alpha = _mean_of_near(alpha, 6 * noise)
    return _without_haze(alpha, max(TRACE, 2 * noise))


def _mean_of_near(alpha: Tensor, room: float) -> Tensor:
    size = 2 * WINDOW + 1
    around = F.pad(alpha[None, None], [WINDOW] * 4, mode="replicate")[0, 0]
    total, count = torch.zeros_like(alpha), torch.zeros_like(alpha)
    for down in range(size):
        for across in range(size):
            other = around[down : down + alpha.shape[0], across : across + alpha.shape[1]]
            near = ((other - alpha).abs() <= room).to(alpha)
            total, count = total + near * other, count + near
    return total / count


def _without_haze(alpha: Tensor, low: float) -> Tensor:
    """0 below low, 1 above 1 - low, unchanged from twice low to 1 minus twice low, and without a jump between."""
    alpha = torch.where(alpha < 2 * low, (2 * (alpha - low)).clamp(min=0), alpha)
    return torch.where(alpha > 1 - 2 * low, (1 - 2 * (1 - low - alpha)).clamp(max=1), alpha)


def exact_colours(image: Tensor, alphas: Tensor, colours: Tensor) -> Tensor:
    """Colours [K,3,N] of layers near the given ones whose composite is the image [3,N]; alphas [K,N], the back one 1.

    The smallest change of all layers together that adds up, each within 0..1 and what the others can make up for: from
    the front to the back, one layer against the composite of all behind it. What is not seen stays.
    Source: ours, the projection of `exact_layers` for several layers
    """
    behind, give = [colours[0]], [torch.ones_like(alphas[0])]
    for alpha, colour in zip(alphas[1:], colours[1:], strict=True):
        behind.append(torch.lerp(behind[-1], colour, alpha))
        give.append(alpha.square() + (1 - alpha).square() * give[-1])
    exact = colours.clone()
    for index in range(len(colours) - 1, 0, -1):
        exact[index], image = exact_layers(image, alphas[index], colours[index], behind[index - 1], give[index - 1])
    exact[0] = image
    return exact


def alphas_by_image(image: Tensor, alphas: Tensor, colours: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Alphas [K,N] of enlarged layers, nearer to what the image [3,N] shows; colours [K,3,N].

    low, high: [K,N], the range of each alpha in the small layer around the pixel. The likeliest change when alphas are
    off by ALPHA_ERROR of that range and colours by COLOUR_ERROR: large where two layers differ in colour, none where
    they do not, since the image cannot tell there.
    Source: ours, one step of Gauss-Newton for alphas with a Gaussian prior, as in Bayesian matting
    """
    left, behind = torch.ones_like(alphas[0]), [colours[0]]
    for alpha, colour in zip(alphas[1:], colours[1:], strict=True):
        behind.append(torch.lerp(behind[-1], colour, alpha))
    missing = image - behind[-1]
    variance = (ALPHA_ERROR * (high - low)).square()
    slopes, explained = torch.zeros_like(alphas), torch.full_like(left, 3 * COLOUR_ERROR**2)
    for index in range(len(alphas) - 1, 0, -1):
        slope = left * (colours[index] - behind[index - 1])
        slopes[index] = (slope * missing).sum(0)
        explained += variance[index] * slope.square().sum(0)
        left = left * (1 - alphas[index])
    return (alphas + variance * slopes / explained).clamp(low, high)


def sharpened(alpha: Tensor, low: Tensor, high: Tensor, gain: Tensor) -> Tensor:
    """Alpha, any shape, steeper by a gain where it goes from nothing to all between one pixel of the small layer and
    the next (low, high: its range there), and as it is where it changes slowly.

    Source: ours, the edge that enlarging has made wide
    """
    gains = 1 + (gain - 1) * ((high - low - 0.3) / 0.5).clamp(0, 1)
    return (0.5 + (alpha - 0.5) * gains).clamp(0, 1)


def finer_alphas(image: Tensor, alphas: Tensor, colours: Tensor, ratios: list[float], rounds: int = 3) -> Tensor:
    """Alphas [K,H,W] of layers that were enlarged by these ratios, their edges where the image [3,H,W] has them;
    colours [K,3,H,W]. What is empty or opaque stays, and so do layers that were not enlarged.

    Source: ours, see `alphas_by_image` and `sharpened`
    """
    enlarged = alphas.new_tensor([ratio > 1 for ratio in ratios])[:, None, None].bool()
    soft = (alphas > 0) & (alphas < 1) & enlarged
    rows, columns = soft.any(0).nonzero(as_tuple=True)
    if not len(rows):
        return alphas
    ranges = [_range_around(*pair, rows, columns) for pair in zip(alphas, ratios, strict=True)]
    low, high = (torch.stack(ends) for ends in zip(*ranges, strict=True))
    target, colour, given, changing = (part[..., rows, columns] for part in (image, colours, alphas, soft))
    gain = (alphas.new_tensor(ratios)[:, None] / 2).clamp(min=1)
    fine = sharpened(given, low, high, gain)
    for _ in range(rounds):
        fine = alphas_by_image(target, fine, colour, low, high)
    fine = _without_haze(sharpened(fine, low, high, gain.clamp(max=2)), HAZE)
    result = alphas.clone()
    result[:, rows, columns] = torch.where(changing, fine, given)
    return result


def _range_around(alpha: Tensor, ratio: float, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest alpha [N] of the nine pixels that are as far apart as pixels of the small layer."""
    (height, width), reach = alpha.shape, math.ceil(ratio)
    low = high = alpha[rows, columns]
    if ratio <= 1:
        return low, high
    for down in (-reach, 0, reach):
        for across in (-reach, 0, reach):
            other = alpha[(rows + down).clamp(0, height - 1), (columns + across).clamp(0, width - 1)]
            low, high = torch.minimum(low, other), torch.maximum(high, other)
    return low, high


def fit_colours(image: Tensor, alphas: Tensor, colours: Tensor) -> None:
    """Colours [K,3,H,W] changed in place so that they make up the image [3,H,W]; alphas [K,H,W], the back one 1 where
    it is seen.

    Source: ours, see `exact_colours`; where one layer is all that is seen it takes the image's own pixels
    """
    _, seen = visible_shares(alphas)
    mixed = torch.ones_like(seen[0], dtype=torch.bool)
    for share, colour in zip(seen, colours, strict=True):
        alone = share >= 1 - TRACE
        colour.copy_(torch.where(alone, image, colour))
        mixed &= ~alone
    rows, columns = mixed.nonzero(as_tuple=True)
    if len(rows):
        picked = [part[..., rows, columns] for part in (image, alphas, colours)]
        colours[..., rows, columns] = exact_colours(*picked)


def resized(stack: LayerStack, canvas: tuple[int, int]) -> LayerStack:
    """The stack on a canvas (width, height) of another size, all layers shown larger or smaller with it.

    Source: ours, ComfyUI's layer fields times the ratio of the canvases
    """
    across, down = (new / old for new, old in zip(canvas, stack.canvas, strict=True))

    def moved(layer: Layer) -> Layer:
        left, right = (round(side * across) for side in (layer.x, layer.x + layer.size[0]))
        top, bottom = (round(side * down) for side in (layer.y, layer.y + layer.size[1]))
        width, height = (min(max(1, side), MAX_SIDE) for side in (right - left, bottom - top))
        return replace(layer, x=left, y=top, w=width, h=height)

    return LayerStack(canvas, stack.layers if canvas == stack.canvas else tuple(map(moved, stack.layers)))


def rastered(layer: Layer, canvas: tuple[int, int]) -> Layer | None:
    """The layer as one with an alpha and its own pixels at the canvas's resolution, mask and opacity in its alpha; None
    when it lies wholly outside.

    Source: ours, the layer as `place` reads it; enlarged by Pillow's bicubic where it is not turned, which is faster
    """
    native = (layer.image.shape[1], layer.image.shape[0])
    upright = abs(layer.rotation) < 1e-9 and layer.size != native
    box = place(_enlarged(layer) if upright else layer, canvas)
    if box is None:
        return None
    if box.inverse or box.mask is not None or box.image.shape[-1] == 3:
        colour, alpha = box.rows(box.top, box.bottom)
        image = rearrange(torch.cat([colour, alpha[None]]), "c h w -> h w c").contiguous()
    else:  # a copy as it is
        image = box.image.clone()
    image[..., 3].clamp_(0, 1).mul_(layer.opacity)
    plain = Layer(image, layer.name, x=box.left, y=box.top)
    return replace(plain, blend_mode=layer.blend_mode, visible=layer.visible, extra=layer.extra)


def _enlarged(layer: Layer) -> Layer:
    width, height = layer.size
    pixels = rearrange(layer.rgba(), "h w c -> 1 c h w")
    pixels = torch.cat([pixels[:, :3] * pixels[:, 3:], pixels[:, 3:]], 1)
    pixels = F.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True)[0].clamp_(min=0)
    colour, alpha = pixels[:3], pixels[3:].clamp_(max=1)
    colour.clamp_(max=alpha).div_(alpha.clamp(min=1e-6))
    return replace(layer, image=rearrange(pixels, "c h w -> h w c"), mask=None, w=0, h=0)


def fit_stack(stack: LayerStack, image: Tensor, refine: bool = True) -> Fitted:
    """The visible layers of a stack at the size of the image [H,W,3] that they were made from, so that their composite
    is the image; hidden layers are only resized along.

    refine: alphas lose their noise, and where layers are enlarged their edges are looked for in the image. The back
    layer becomes opaque where nothing else covers the image; where it is no background, a layer behind all is added.
    Raises ValueError for a blend mode other than normal.
    Source: ours, see `finer_alphas` and `fit_colours`, on strips of the image
    """
    _check_modes(stack)
    height, width = image.shape[:2]
    large = resized(stack, (width, height))
    drawn: dict[int, Layer] = {}
    for index, layer in enumerate(large.layers):
        if layer.visible and (raster := rastered(_cleaned(layer) if refine else layer, large.canvas)):
            drawn[index] = raster
    back = min(drawn, default=None)
    backdrop = back is not None and _covers(drawn[back], large.canvas)
    if back is not None and backdrop:
        drawn[back] = _on_canvas(drawn[back], large.canvas)
    elif len(stack.layers) >= MAX_LAYERS:
        raise ValueError(
            f"layers: there are {len(stack.layers)} layers and no background among them, so that one must be added, "
            f"and a LAYERS document holds {MAX_LAYERS}; drop or merge one."
        )
    rest = [] if backdrop else [Layer(torch.cat([image, torch.zeros_like(image[..., :1])], -1), "Rest")]
    ratios = [1.0] * len(rest) + [_ratio(large.layers[index]) if refine else 1.0 for index in drawn]
    before, after = torch.zeros_like(image[..., 0]), torch.zeros_like(image[..., 0])
    _fit_strips(image, [*rest, *drawn.values()], ratios, before, after)
    layers = [drawn.get(index, layer) for index, layer in enumerate(large.layers)]
    return Fitted(large.with_layers([*rest, *layers]), before, after, not backdrop)


def _fit_strips(image: Tensor, layers: list[Layer], ratios: list[float], before: Tensor, after: Tensor) -> None:
    """Change the pixels of layers in place; the first one covers the canvas."""
    given = [layer.image[..., 3].clone() for layer in layers]  # rows above a strip are looked at when they are changed
    halo = math.ceil(max(ratios))
    for top, bottom, first, last in strips(image.shape[0], image.shape[1], halo):
        target = rearrange(image[first:last], "h w c -> c h w")
        alphas, colours = _strip(layers, given, first, last, image.shape[1])
        inner = slice(top - first, bottom - first)
        before[top:bottom] = _error(target, alphas, colours)[inner]
        alphas = finer_alphas(target, alphas, colours, ratios)
        target, alphas, colours = (part[..., inner, :].contiguous() for part in (target, alphas, colours))
        left = (1 - alphas[1:]).prod(0)
        alphas[0] = torch.where(left > 0, 1.0, alphas[0])
        fit_colours(target, alphas, colours)
        after[top:bottom] = _error(target, alphas, colours)
        _put_back(layers, alphas, colours, top, bottom)


def strips(height: int, width: int, halo: int) -> Iterator[tuple[int, int, int, int]]:
    """(top, bottom, top with a halo, bottom with a halo) of strips of whole rows of an image of this size.

    Source: ours, so that what is computed for all layers at once stays small
    """
    rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        yield top, bottom, max(0, top - halo), min(height, bottom + halo)


def _strip(layers: list[Layer], given: list[Tensor], first: int, last: int, width: int) -> tuple[Tensor, Tensor]:
    """Alphas [K,h,W] and colours [K,3,h,W] of these rows of the canvas, 0 beside a layer."""
    alphas = given[0].new_zeros((len(layers), last - first, width))
    colours = alphas[:, None].expand(-1, 3, -1, -1).clone()
    for layer, own, alpha, colour in zip(layers, given, alphas, colours, strict=True):
        there, rows, columns = _inside(layer, first, last)
        alpha[there, columns] = own[rows]
        colour[:, there, columns] = rearrange(layer.image[rows, :, :3], "h w c -> c h w")
    return alphas, colours


def _put_back(layers: list[Layer], alphas: Tensor, colours: Tensor, first: int, last: int) -> None:
    for layer, alpha, colour in zip(layers, alphas, colours, strict=True):
        there, rows, columns = _inside(layer, first, last)
        layer.image[rows, :, 3] = alpha[there, columns]
        layer.image[rows, :, :3] = rearrange(colour[:, there, columns], "c h w -> h w c")


def _inside(layer: Layer, first: int, last: int) -> tuple[slice, slice, slice]:
    """Rows of a strip of the canvas that a layer lies in, its own rows there, and its columns on the canvas."""
    height, width = layer.image.shape[:2]
    top = min(max(layer.y, first), last)
    bottom = max(min(layer.y + height, last), top)
    return slice(top - first, bottom - first), slice(top - layer.y, bottom - layer.y), slice(layer.x, layer.x + width)


def _error(image: Tensor, alphas: Tensor, colours: Tensor) -> Tensor:
    """[h,W]: how far the composite is from the image, mean over RGB; what nothing covers is black."""
    shown = torch.zeros_like(image)
    for alpha, colour in zip(alphas, colours, strict=True):
        shown.lerp_(colour, alpha.expand_as(colour))
    return (shown - image).abs().mean(0)


def _cleaned(layer: Layer) -> Layer:
    if layer.image.shape[-1] == 3 and layer.mask is None:
        return layer
    rgba = layer.rgba()
    alpha = clean_alpha(rgba[..., 3].clamp(0, 1))
    return replace(layer, image=torch.cat([rgba[..., :3], alpha[..., None]], -1), mask=None)


def _ratio(layer: Layer) -> float:
    """How much larger a layer is shown than it is."""
    height, width = layer.image.shape[:2]
    return max(layer.size[0] / width, layer.size[1] / height)


def _covers(layer: Layer, canvas: tuple[int, int]) -> bool:
    return float(layer.image[..., 3].sum()) >= BACKDROP * canvas[0] * canvas[1]


def _on_canvas(layer: Layer, canvas: tuple[int, int]) -> Layer:
    """A raster layer, as large as the canvas."""
    pixels = layer.image.new_zeros((canvas[1], canvas[0], 4))
    height, width = layer.image.shape[:2]
    pixels[layer.y : layer.y + height, layer.x : layer.x + width] = layer.image
    return replace(layer, image=pixels, x=0, y=0)


def _check_modes(stack: LayerStack) -> None:
    for layer in stack.layers:
        if layer.visible and layer.blend_mode != "normal":
            raise ValueError(
                f"layers: layer {layer.name!r} has the blend mode {layer.blend_mode!r}, and only normal layers can be "
                "fitted; merge it with the layer behind it, or hide it."
            )
