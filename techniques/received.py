"""What decomposers hand over: which alpha they write, the whole image among the layers, blank and duplicate layers, and
the order. All is judged on small rasters [K,4,h,w] of the layers, straight alpha, back to front.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .fitting import clean_alpha, resized
from .geometry import content_box, rasterise
from .layers import Layer, LayerStack

SMALL = 256  # pixels of the longer side on which layers are judged
FAINTEST = 0.1  # alpha below which nothing of a layer is seen
SAME = 0.1  # how far two layers may differ in any window and still be duplicates
OPEN = 0.02  # share of the canvas that layers may leave open and still be a whole picture
ALPHAS = ("straight", "premultiplied", "inverted", "auto")
ORDERS = ("as given", "reversed", "by recomposition")


@dataclass(frozen=True)
class Wishes:
    """What is to be done with layers of a decomposer. alpha: one of ALPHAS. drop: leave out the whole image, blanks and
    duplicates. order: one of ORDERS. crop: cut layers to what is seen of them.
    """

    alpha: str = "straight"
    drop: bool = False
    order: str = "as given"
    crop: bool = False


def small_layers(stack: LayerStack) -> Tensor:
    """[K,4,h,w]: every layer as it lies on a canvas of at most SMALL pixels, without the noise of its alpha.

    Source: ours, noise and single pixels do not count when layers are compared
    """
    height, width = _small_size(stack.canvas)
    layers = [rasterise(layer, (width, height)) for layer in resized(stack, (width, height)).layers]
    small = rearrange(torch.stack(layers), "k h w c -> k c h w")
    return torch.cat([small[:, :3], torch.stack([clean_alpha(alpha) for alpha in small[:, 3]])[:, None]], 1)


def small_image(image: Tensor, like: Tensor) -> Tensor:
    """[3,h,w] of an image [H,W,3|4], of the height and width of layers [K,4,h,w].

    Source: ours, see `small_layers`
    """
    planes = rearrange(image[..., :3], "h w c -> 1 c h w")
    return F.interpolate(planes, size=like.shape[2:], mode="bilinear", antialias=True)[0].clamp(0, 1)


def over_each_other(layers: Tensor) -> Tensor:
    """[4,h,w], premultiplied: layers [K,4,h,w] over each other.

    Source: w3c, section 5.1 (source over)
    """
    result = torch.zeros_like(layers[0])
    for layer in premultiplied(layers):
        result = _over(result, layer)
    return result


def premultiplied(layers: Tensor) -> Tensor:
    """[...,4,h,w] with colours times alpha, of straight ones.

    Source: w3c, section 5.1
    """
    return torch.cat([layers[..., :3, :, :] * layers[..., 3:, :, :], layers[..., 3:, :, :]], -3)


def _over(below: Tensor, top: Tensor) -> Tensor:
    return top + (1 - top[3:]) * below


def blanks(layers: Tensor) -> list[int]:
    """Layers of which nothing is seen.

    Source: ours, the largest alpha without noise, mean over a window of three pixels
    """
    return [index for index, layer in enumerate(layers) if _strongest(layer[3], 1) < FAINTEST]


def duplicates(layers: Tensor) -> list[int]:
    """Layers that are the same as one behind them: nowhere, in a window of five pixels, do they differ.

    Source: ours, the largest difference of premultiplied colours and alpha, mean over a window
    """
    shown = premultiplied(layers)
    blank = blanks(layers)
    repeated: list[int] = []
    for index in range(1, len(layers)):
        before = [other for other in range(index) if not {index, other} & {*blank, *repeated}]
        if any(_strongest((shown[index] - shown[other]).abs().amax(0), 2) < SAME for other in before):
            repeated.append(index)
    return repeated


def _strongest(plane: Tensor, reach: int) -> float:
    """The largest mean over a window of a plane [h,w]."""
    return float(F.avg_pool2d(F.pad(plane[None, None], [reach] * 4, mode="replicate"), 2 * reach + 1, 1).max())


def whole_image(layers: Tensor, image: Tensor | None = None) -> int | None:
    """The layer that is the whole image and not a part of it: opaque, and where the others show more than their
    background it is like the image [3,h,w], or like the others together, and not like that background. None when there
    is none.

    Source: ours, Qwen-Image-Layered's first picture
    """
    for index, layer in enumerate(layers):
        others = torch.cat([layers[:index], layers[index + 1 :]])
        if len(others) < 2 or not _opaque(layer):
            continue
        back = int(others[:, 3].mean((1, 2)).argmax())
        objects = over_each_other(torch.cat([others[:back], others[back + 1 :]]))[3] > 0.5
        together = over_each_other(others)
        if not objects.any() or not _opaque(together):
            continue
        target = together[:3] if image is None else image
        own, its = ((part[:3] - target).abs().mean(0)[objects].mean() for part in (layer, others[back]))
        if own < 0.5 * its:
            return index
    return None


def _opaque(layer: Tensor) -> bool:
    return float((layer[3] < 1 - FAINTEST).float().mean()) <= OPEN


def recomposed_order(layers: Tensor, image: Tensor) -> list[int]:
    """Indices of layers, back to front, in the order in which they make up the image [3,h,w] best: one after the other
    moves to where it brings them nearest, until none does. Where the order does not matter it stays.

    Source: ours, a search by the error of the composite
    """
    shown, order = premultiplied(layers), list(range(len(layers)))
    for _ in layers if len(layers) > 1 else ():
        before = list(order)
        for index in before:
            others = [other for other in order if other != index]
            places = zip(_behind(shown[others]), _above(shown[others]), strict=True)
            errors = [_error(_over(_over(behind, shown[index]), above), image) for behind, above in places]
            place = min(range(len(errors)), key=errors.__getitem__)
            if errors[place] < errors[order.index(index)] - 1e-5:
                order = [*others[:place], index, *others[place:]]
        if order == before:
            break
    return order


def _behind(shown: Tensor) -> list[Tensor]:
    """The composites of all layers before each one, and of all."""
    composites = [torch.zeros_like(shown[0])]
    for layer in shown:
        composites.append(_over(composites[-1], layer))
    return composites


def _above(shown: Tensor) -> list[Tensor]:
    """The composites of all layers from each one on, and of none."""
    composites = [torch.zeros_like(shown[0])]
    for layer in shown.flip(0):
        composites.append(_over(layer, composites[-1]))
    return composites[::-1]


def _error(shown: Tensor, image: Tensor) -> float:
    return float((shown[:3] - image).abs().mean())


def alpha_kind(layers: Tensor, image: Tensor | None = None) -> str:
    """What the alpha of layers as they came [K,4,h,w] means, one of ALPHAS but auto: inverted where the back layer is
    clear and most of the others are opaque; premultiplied where no colour is above its alpha and there are places that
    are half transparent. With the image [3,h,w] the one that makes it up best counts.

    Source: ours, conventions of files and nodes
    """
    read = {kind: read_alpha(layers, kind) for kind in ALPHAS[:3]}
    if image is not None:
        errors = {kind: _error(over_each_other(straight), image) for kind, straight in read.items()}
        best = min(errors, key=errors.__getitem__)
        return best if errors[best] < 0.9 * errors["straight"] else "straight"
    if len(layers) > 1 and layers[0, 3].mean() < OPEN and layers[1:, 3].mean() > 0.5:
        return "inverted"
    half = (layers[:, 3] > 0.05) & (layers[:, 3] < 0.95)
    bright = layers[:, :3].amax(1) > layers[:, 3] + 0.03
    clear = layers[:, 3] <= 0.05
    if half.any() and bright[half].float().mean() < 0.01 and bright[clear].float().sum() == 0:
        return "premultiplied"
    return "straight"


def read_alpha(rgba: Tensor, kind: str) -> Tensor:
    """Straight colours and alpha, [...,4,h,w], of pixels of one of the kinds straight, premultiplied or inverted.

    Source: ours, conventions of files and nodes
    """
    colour, alpha = rgba[..., :3, :, :], rgba[..., 3:, :, :]
    if kind == "inverted":
        alpha = 1 - alpha
    if kind == "premultiplied":
        colour = torch.where(alpha > 0, colour / alpha.clamp(min=1e-6), colour).clamp(max=1)
    return torch.cat([colour, alpha], -3)


def take_in(stack: LayerStack, original: Tensor | None, wishes: Wishes) -> tuple[LayerStack, list[str]]:
    """A decomposer's layers, all of the canvas's size, as one works with them, and notes of what was found. original:
    [H,W,3|4], the image that they are of.

    Raises ValueError where the order is wished by recomposition and there is no image.
    Source: ours, see `alpha_kind`, `whole_image`, `blanks`, `duplicates` and `recomposed_order`
    """
    if wishes == Wishes():
        return stack, []
    layers, notes = list(stack.layers), []
    kind = wishes.alpha
    if kind == "auto":
        raw = rearrange(torch.stack([layer.rgba() for layer in layers]), "k h w c -> k c h w")
        raw = F.interpolate(raw, size=_small_size(stack.canvas), mode="bilinear", antialias=True)
        kind = alpha_kind(raw, None if original is None else small_image(original, raw))
        notes += [f"The alpha was taken for {kind}."] if kind != "straight" else []
    if kind != "straight":
        layers = [_with_alpha(layer, kind) for layer in layers]
    layers = layers[::-1] if wishes.order == "reversed" else layers
    small = small_layers(stack.with_layers(layers))
    image = None if original is None else small_image(original, small)
    whole = whole_image(small, image)
    kept = list(range(len(layers)))
    if wishes.drop:
        kept, told = _worth_keeping(small, whole, [layer.name for layer in layers])
        notes += told
    if wishes.order == "by recomposition":
        if image is None and whole is None:
            raise ValueError(
                "order: by recomposition needs the image that the layers are of; connect it to original, or take "
                "another order."
            )
        target = image if image is not None else small[whole, :3]
        # The whole image hides all others wherever it stands, so it goes to the back first.
        kept = [index for index in kept if index == whole] + _by_image(small, [i for i in kept if i != whole], target)
    layers = [layers[index] for index in kept]
    return stack.with_layers([_cropped(layer) for layer in layers] if wishes.crop else layers), notes


def without_useless(stack: LayerStack, image: Tensor) -> tuple[LayerStack, list[str]]:
    """The stack without those visible layers that are the whole image [H,W,3], blank or there twice, and a note for
    each of them.

    Source: ours, see `whole_image`, `blanks` and `duplicates`
    """
    shown = [index for index, layer in enumerate(stack.layers) if layer.visible]
    if not shown:
        return stack, []
    small = small_layers(stack.with_layers(stack.layers[index] for index in shown))
    whole = whole_image(small, small_image(image, small))
    kept, notes = _worth_keeping(small, whole, [stack.layers[index].name for index in shown])
    gone = {shown[index] for index in range(len(shown)) if index not in kept}
    return stack.with_layers(layer for index, layer in enumerate(stack.layers) if index not in gone), notes


def _worth_keeping(small: Tensor, whole: int | None, names: list[str]) -> tuple[list[int], list[str]]:
    """Indices of layers that are neither the whole image nor blank nor there twice, and a note for each of the rest."""
    twice, blank = duplicates(small), blanks(small)
    reasons = {index: "is the same as another" for index in twice} | {index: "is blank" for index in blank}
    reasons |= {} if whole is None else {whole: "is the whole image"}
    if len(reasons) == len(small):
        return [0], ["All layers are blank; the first one was kept."]
    notes = [f"{names[index]!r} {reason} and was left out." for index, reason in sorted(reasons.items())]
    return [index for index in range(len(small)) if index not in reasons], notes


def _by_image(small: Tensor, indices: list[int], image: Tensor) -> list[int]:
    return [indices[place] for place in recomposed_order(small[indices], image)] if indices else []


def _with_alpha(layer: Layer, kind: str) -> Layer:
    rgba = read_alpha(rearrange(layer.rgba(), "h w c -> c h w"), kind)
    return replace(layer, image=rearrange(rgba, "c h w -> h w c").contiguous(), mask=None)


def _cropped(layer: Layer) -> Layer:
    """A layer of its own size, cut to what is seen of it."""
    rgba = layer.rgba()
    left, top, right, bottom = content_box(rgba[..., 3])
    if (left, top, right, bottom) == (0, 0, rgba.shape[1], rgba.shape[0]):
        return layer
    return replace(layer, image=rgba[top:bottom, left:right], mask=None, x=layer.x + left, y=layer.y + top)


def _small_size(canvas: tuple[int, int]) -> tuple[int, int]:
    """Height and width of what layers are judged on."""
    ratio = min(1, SMALL / max(canvas))
    return max(1, round(canvas[1] * ratio)), max(1, round(canvas[0] * ratio))
