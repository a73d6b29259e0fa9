"""Shadows and light as layers of their own: what turns a plain stack into a picture of the same things, split into
layers that darken and brighten the ground and each object.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, count

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .depth import push_pull
from .geometry import content_box, rasterise
from .harmonization import colours_and_alphas, visible_shares
from .layers import EFFECTS, Layer, LayerStack, as_effect, bound_to, in_groups, parent_of

STEPS = 24  # of bisection: finer than float32 shows
NEUTRAL = 0.25 / 255  # a change below it is none
SOLID = 0.05  # alpha over which a pixel throws shadows
# How shadow_apart tells shadow from object: alpha from which the object is opaque, brightness below which a pixel may
# be shadow, least alpha of a shadow, alpha below which there is nothing, and width of the object's soft edge in pixels.
OPAQUE, DARK, FAINT, TRACE, EDGE = 0.9, 0.35, 0.06, 0.02, 2
NEAR = 0.02  # of the canvas's longer side: over this distance the ground goes from one object to the next
SHADOW, GLOW, SHADE, LIGHT = EFFECTS


def darken_or_brighten(colour: Tensor, gain: Tensor) -> Tensor:
    """Colours in 0..1 after a gain in -1..1 of the same shape: below 0 they are multiplied by 1 + gain, above 0
    screened with it.

    Source: w3c, section 10 Blending (multiply, screen)
    """
    return torch.where(gain < 0, colour * (1 + gain), colour + (1 - colour) * gain)


def gain_between(colour: Tensor, wanted: Tensor) -> Tensor:
    """The gain in -1..1 that turns colours into the wanted ones, both in 0..1, all of one shape.

    Source: w3c, section 10 Blending (multiply, screen), solved for the source
    """
    darker = wanted / colour.clamp(min=1e-6) - 1
    brighter = (wanted - colour) / (1 - colour).clamp(min=1e-6)
    return torch.where(wanted < colour, darker, brighter).clamp(-1, 1)


def shared_gain(gain: Tensor, share: Tensor) -> Tensor:
    """The part of a gain in -1..1 that belongs to this share of it, 0..1. Applied one after the other, the parts of
    shares that sum to 1 do what the whole gain does.

    Source: ours, factors whose product is the multiplication, and likewise of what screening leaves
    """
    low, high = gain.clamp(max=0), gain.clamp(min=0)
    return torch.where(gain < 0, (1 + low) ** share - 1, 1 - (1 - high) ** share)


@dataclass(frozen=True)
class Effects:
    """Gains in -1..1 by object, back to front. ground: [K,3,H,W], on all that lies behind the object. own: [K,3,H,W],
    on the object itself. error: [H,W], how far the layers are from the picture, the largest of the channels.
    """

    ground: Tensor
    own: Tensor
    error: Tensor


def find_effects(stack: LayerStack, picture: Tensor, reach: float) -> Effects:
    """The gains that turn a stack of an opaque background and objects into the picture [H,W,3], sRGB in 0..1.

    reach: how far from an object, as a share of the canvas's longer side, a change of the ground counts as its effect;
    0 for any distance. Each pixel's change goes to what is seen most there, the ground or one object, and continues
    smoothly below the others. On the ground it belongs to the nearest object; where an object's shadow falls on another
    object, it becomes the other one's shade.
    Raises ValueError for blend modes other than normal, and without an opaque background and an object.
    Source: ours, layers as light on things: what was multiplied or screened, pixel by pixel
    """
    _check_plain(stack)
    colours, alphas = colours_and_alphas(stack)
    behind, front = visible_shares(alphas[1:])
    shares = torch.cat([behind, front[:, 0]])
    seen = shares.argmax(0)
    picture = rearrange(picture, "h w c -> c h w").clamp(0, 1)
    parts, within = _ground_shares(alphas[1:], reach * max(stack.canvas))
    gains = torch.stack(
        [
            _run_on(gain_between(colour, picture), (share >= 1) & within)
            for colour, share in zip(colours, shares, strict=True)
        ]
    )
    scene = _Scene(colours, alphas[:, 0], parts, seen)
    scene.solve(gains, seen, within & (shares.amax(0) < 1), picture)
    # Where a layer that is seen in part cannot make up for it, the frontmost object's own light can.
    top = (len(colours) - 1) - (alphas[:, 0].flip(0) > 0).int().argmax(0)
    scene.solve(gains, top, within & (top > 0) & (scene.error(gains, picture) > NEUTRAL), picture)
    return Effects(*scene.split(gains), scene.error(gains, picture))


def _check_plain(stack: LayerStack) -> None:
    for layer in stack.layers:
        if layer.blend_mode != "normal":
            raise ValueError(
                f"layers: {layer.name!r} has the blend mode {layer.blend_mode!r}, and effects are found for plain "
                "layers; merge it with the layer behind it (Order layers), or hide it."
            )
    if len(stack.layers) < 2 or not (rasterise(stack.layers[0], stack.canvas)[..., 3] >= 1).all():
        raise ValueError(
            "layers: effects need an opaque background at the back and a thing in front of it; put the place without "
            "the things there."
        )


@dataclass(frozen=True)
class _Scene:
    """colours: [N,3,...] of background and objects. alphas: [N,...]. parts: [K,...], of the objects in what happens to
    the ground. seen: [...], the layer that is seen most. Of all pixels, [H,W], or of some, [M].
    """

    colours: Tensor
    alphas: Tensor
    parts: Tensor
    seen: Tensor

    def at(self, where: Tensor) -> _Scene:
        return _Scene(*(value[..., where] for value in (self.colours, self.alphas, self.parts, self.seen)))

    def split(self, gains: Tensor) -> tuple[Tensor, Tensor]:
        """[K,3,...] on the ground and on themselves, of gains [N,3,...] of ground and objects."""
        numbers = torch.arange(1, len(self.colours), device=gains.device).view(-1, *[1] * self.seen.ndim)
        farther = (self.seen > 0) & (self.seen < numbers)  # what falls on another object is that one's shade
        ground = torch.where(farther[:, None], 0, shared_gain(gains[:1], self.parts[:, None]))
        return ground, torch.where(self.alphas[1:, None] > 0, gains[1:], 0)

    def image(self, gains: Tensor) -> Tensor:
        """[3,...]"""
        shown = self.colours[0]
        for colour, alpha, ground, own in zip(self.colours[1:], self.alphas[1:], *self.split(gains), strict=True):
            shown = torch.lerp(darken_or_brighten(shown, ground), colour, alpha.expand_as(colour))
            shown = darken_or_brighten(shown, own)
        return shown

    def error(self, gains: Tensor, picture: Tensor) -> Tensor:
        return (self.image(gains) - picture).abs().amax(0)

    def solve(self, gains: Tensor, whose: Tensor, where: Tensor, picture: Tensor) -> None:
        """Change gains in place where `where` [H,W] is true: of each pixel the gain of layer number `whose` [H,W], so
        that the image comes nearest to the picture. A higher gain makes the image brighter, so bisection finds it.
        """
        if not where.any():
            return
        own, wanted, chosen = self.at(where), picture[..., where], whose[where]
        trial, pixels = gains[..., where], torch.arange(len(chosen), device=gains.device)
        low, high = -torch.ones_like(wanted), torch.ones_like(wanted)
        for _ in range(STEPS):
            middle = (low + high) / 2
            trial[chosen, :, pixels] = middle.T
            darker = own.image(trial) < wanted
            low, high = torch.where(darker, middle, low), torch.where(darker, high, middle)
        gains[..., where] = trial


def _run_on(gain: Tensor, known: Tensor) -> Tensor:
    """[3,H,W]: a gain that goes on smoothly from where it is known [H,W]; 0 when it is nowhere."""
    weights = known.to(gain)[None, None]
    return rearrange(push_pull(rearrange(gain, "c h w -> 1 1 h w c"), weights), "1 1 h w c -> c h w")


def _ground_shares(alphas: Tensor, reach: float) -> tuple[Tensor, Tensor]:
    """Each object's share of what happens to the ground [K,H,W], which sum to 1 within reach of any, and where that is
    [H,W]. alphas: [K,1,H,W].
    """
    from scipy.ndimage import distance_transform_edt

    far = [
        torch.from_numpy(distance_transform_edt((alpha <= SOLID).cpu().numpy())).to(alpha)
        if (alpha > SOLID).any()
        else torch.full_like(alpha, torch.inf)
        for alpha in alphas[:, 0]
    ]
    apart = torch.stack(far)
    inside = apart <= (reach or torch.inf)
    width = max(1.0, NEAR * max(alphas.shape[-2:]))
    nearest = torch.where(inside, apart, torch.inf).amin(0)
    weights = torch.where(inside, torch.exp((nearest - apart).nan_to_num(0) / width), 0)
    return weights / weights.sum(0).clamp(min=1e-6), inside.any(0)


def effect_layers(stack: LayerStack, effects: Effects) -> LayerStack:
    """The stack with its effects as layers, each object's with it in a group of its own within those that it lies in:
    what darkens the ground (multiply) and brightens it (screen) below the object, what darkens and brightens itself
    above it. Layers of no effect are left out, and nothing is drawn where an effect is none.

    Source: ours, effects as ordinary layers that any program shows the same
    """
    background, *objects = stack.layers
    layers = [background]
    for layer, ground, own in zip(objects, effects.ground, effects.own, strict=True):
        below = _pair(ground, layer.name, SHADOW, GLOW)
        above = _pair(own, layer.name, SHADE, LIGHT)
        layers += bound(below, layer, above, layers)
    return stack.with_layers(layers)


def bound(below: Sequence[Layer], layer: Layer, above: Sequence[Layer], others: Sequence[Layer]) -> list[Layer]:
    """An object with its effects below and above it, all of them in a group of their own that is named after it, with a
    number where others have a group of that name; the layer as it is where there are no effects.

    Source: ours, shadows and light go where their object goes
    """
    if not below and not above:
        return [layer]
    parent, taken = parent_of(layer), {parent_of(one) for one in others}
    names = chain([layer.name], (f"{layer.name} {number}" for number in count(2)))
    name = next(name for name in names if (*parent, name) not in taken)
    return [in_groups(one, [*parent, name]) for one in (*below, layer, *above)]


def without_effects(stack: LayerStack, number: int) -> tuple[LayerStack, int]:
    """The stack without the effects of the layer of that number, which leaves their group, and its number there; the
    stack as it is where it has none.

    Source: ours, shadows and light go where their object goes
    """
    gone, layers = bound_to(stack, number), list(stack.layers)
    if gone:
        layers[number] = in_groups(layers[number], parent_of(layers[number])[:-1])
    left = [layer for place, layer in enumerate(layers) if place not in gone]
    return stack.with_layers(left), number - sum(place < number for place in gone)


def shadow_apart(pixels: Tensor) -> tuple[Tensor, Tensor] | None:
    """An object and its shadow, [H,W,4] each, of a layer [H,W,4] that shows both, straight alpha; the object over the
    shadow is the layer. None where there is no shadow.

    Shadow is what is dark and translucent and not beside what is opaque. From there, and from where the layer is empty,
    it continues smoothly below the object, whose alpha is what is left.
    Source: ours, over of Porter and Duff solved for the layer in front
    """
    colour, alpha = pixels[..., :3], pixels[..., 3]
    near = F.max_pool2d((alpha >= OPAQUE).to(alpha)[None, None], 2 * EDGE + 1, 1, EDGE)[0, 0]
    sure = (colour.mean(-1) < DARK) & (near == 0)
    if not (sure & (alpha > FAINT)).any():
        return None
    known = (sure | (alpha < TRACE))[None, None].to(alpha)
    share = torch.where(sure, alpha, 0)
    share = torch.minimum(push_pull(share[None, None, ..., None], known)[0, 0, ..., 0].clamp(min=0), alpha)
    shade = push_pull(colour[None, None], (sure & (alpha > TRACE))[None, None].to(alpha))[0, 0]
    shade = torch.where(sure[..., None], colour, shade.clamp(0, 1))
    alpha, share, shown = alpha[..., None], share[..., None], colour * alpha[..., None]
    rest = (alpha - share) / (1 - share).clamp(min=1e-6)
    below = share * (1 - rest)
    # As far as the object's own colour can still make up for it.
    least, most = (shown - rest) / below.clamp(min=1e-6), shown / below.clamp(min=1e-6)
    shade = torch.where(below > 1e-6, torch.minimum(torch.maximum(shade, least), most), shade).clamp(0, 1)
    own = torch.where(rest > 0, ((shown - shade * below) / rest.clamp(min=1e-6)).clamp(0, 1), colour)
    return torch.cat([own, rest], -1), torch.cat([shade, share], -1)


def with_effect_layers(stack: LayerStack, picture: Tensor, reach: float) -> LayerStack:
    """The stack with the effects that turn it into the picture [H,W,3|4] as layers, see find_effects and effect_layers.

    Source: ours, effects as ordinary layers that any program shows the same
    """
    return effect_layers(stack, find_effects(stack, picture[..., :3], reach))


def _pair(gain: Tensor, name: str, darker: str, brighter: str) -> list[Layer]:
    layers = []
    for kind, mode, factor in ((darker, "multiply", 1 + gain.clamp(max=0)), (brighter, "screen", gain.clamp(min=0))):
        neutral = 1.0 if mode == "multiply" else 0.0
        alpha = ((factor - neutral).abs() > NEUTRAL).any(0).to(factor)
        if not alpha.any():
            continue
        pixels = rearrange(torch.cat([factor, alpha[None]]), "c h w -> h w c")
        left, top, right, bottom = content_box(alpha)
        layer = Layer(pixels[top:bottom, left:right], f"{name} {kind}", x=left, y=top, blend_mode=mode)
        layers.append(as_effect(layer, kind))
    return layers
