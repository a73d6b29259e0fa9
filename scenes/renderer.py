"""Layered scenes whose truth is known exactly: objects on a ground plane, their shadows, masks, depth, boxes and words.
NumPy and Pillow only.

    scene = render(Request(kind="beach", objects=("dog", "apple")), 128, 128, seed=7)

Every picture is float32 sRGB in 0..1 at one resolution; alpha is straight, 1 = opaque. Layers go from back to front,
farthest object first, and laying them over the background gives the composite.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from . import backgrounds
from .backgrounds import FOCAL, Light

OBJECTS = Path(__file__).parent / "objects"
KINDS = tuple(backgrounds.PLACES)
EMPTY = "an empty place"
PLACE_WORDS = {
    "meadow": ("in a meadow", "on the grass", "in a green field"),
    "beach": ("on a beach", "on the sand by the sea", "at the seaside"),
    "snow": ("in the snow", "on a snowy field", "in winter"),
    "night": ("at night", "under the moon", "in the dark under the stars"),
    "desert": ("in a desert", "on a sand dune", "in the hot desert"),
    "table": ("on a wooden table", "on a table", "on a wooden desk"),
    "room": ("in a brick room", "in front of a brick wall", "in a room with a brick wall"),
    "tiles": ("on a tiled floor", "on checkered tiles", "in a tiled hall"),
    "autumn": ("in autumn leaves", "in an autumn park", "among orange trees in autumn"),
    "street": ("on a street", "on a road in a city", "in a city street"),
}
ARRANGEMENTS = ("{what} {where}", "{what} {where}", "a picture of {what} {where}", "a photo of {what} {where}")
MOST_OBJECTS = 6
SIZE = 0.58  # height of an object of size 1 at the lower edge, in picture heights
FALLOFF = 0.28  # share of the light that is lost on the way across a place with a bright side
NEAREST, FARTHEST = 0.97, 0.42  # where feet may stand, as t of the ground plane


@dataclass(frozen=True)
class ObjectKind:
    """size: height relative to the others. hover: gap to the ground, in heights. material: solid, glass, bubble, smoke
    or flame.
    """

    name: str
    file: str
    prompts: tuple[str, ...]
    size: float
    hover: float
    material: str
    held_out: bool


@dataclass(frozen=True)
class Request:
    """What to render; None is drawn from the seed. train: leave out the objects and pairs kept for tests; held_out:
    only those pairs. bright_side: the place is brighter on the side that its light comes from. Without it an empty
    place does not show where a shadow would fall.
    """

    kind: str | None = None
    objects: tuple[str, ...] | None = None
    count: int | None = None
    train: bool = False
    held_out: bool = False
    bright_side: bool = False


@dataclass(frozen=True)
class SceneObject:
    """rgba: without shadow. shadow: shadow alone. rgba_with_shadow: both. mask: [H,W], 1 where this is the frontmost
    thing with alpha over 1/2.
    depth: 0 = nearest .. 1 = farthest, of the ground at its foot. box: (left, top, right, bottom) pixels of the whole
    object, right and bottom exclusive. visible: share of the object's alpha that nearer ones leave.
    """

    name: str
    prompt: str
    rgba: np.ndarray
    shadow: np.ndarray
    rgba_with_shadow: np.ndarray
    mask: np.ndarray
    depth: float
    box: tuple[int, int, int, int]
    visible: float


@dataclass(frozen=True)
class Scene:
    """composite, background: [H,W,3]. depth, background_depth: [H,W], 0 = nearest, 1 = farthest. objects: farthest
    first. horizon: row as a fraction of the height.
    """

    composite: np.ndarray
    background: np.ndarray
    depth: np.ndarray
    background_depth: np.ndarray
    objects: tuple[SceneObject, ...]
    kind: str
    prompt: str
    background_prompt: str
    horizon: float
    light: Light
    seed: int

    @property
    def masks(self) -> np.ndarray:
        """[1 + objects, H, W]: the background's mask, then the objects', back to front; 1 = belongs to it, they sum to
        one.
        """
        objects = np.array([o.mask for o in self.objects], np.float32).reshape(-1, *self.depth.shape)
        return np.concatenate([1 - objects.sum(0, keepdims=True), objects])

    @property
    def behind_nearest(self) -> np.ndarray:
        """[H,W,3]: everything but the nearest object and its shadow."""
        image = self.background
        for shown in self.objects[:-1]:
            image = over(shown.rgba, over(shown.shadow, image))
        return image


@lru_cache(maxsize=1)
def catalogue() -> dict[str, ObjectKind]:
    """Every object by name, in a fixed order."""
    entries = json.loads((OBJECTS / "objects.json").read_text(encoding="utf-8"))
    return {
        e["name"]: ObjectKind(
            e["name"], e["file"], tuple(e["prompts"]), e["size"], e["hover"], e["material"], e["held_out"]
        )
        for e in entries
    }


def is_held_out_pair(name: str, kind: str) -> bool:
    """Whether this object in this place is one of the pairs, one in ten, that are kept for tests."""
    return (3 * list(catalogue()).index(name) + KINDS.index(kind)) % 10 == 0


@lru_cache(maxsize=1024)
def is_held_out(name: str, kind: str) -> bool:
    """Whether this object in this place is never seen in training: a held-out pair, or a held-out object in
    any place.
    """
    return catalogue()[name].held_out or is_held_out_pair(name, kind)


def over(top: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Straight-alpha RGBA `top` laid over opaque RGB `below`."""
    alpha = top[..., 3:]
    return top[..., :3] * alpha + below * (1 - alpha)


def render(request: Request, height: int, width: int, seed: int, light: Light | None = None) -> Scene:
    """Render one scene; light: another one than the place's for the objects, which stay where they are.

    Raises ValueError when an object or a place is not known or no such pair is left.
    """
    rng = np.random.default_rng(seed)
    kind, names = choose(request, rng)
    place = backgrounds.render(kind, height, width, rng)
    place = replace(place, light=light or place.light)
    if request.bright_side:
        place = replace(place, image=place.image * _falloff(width, place.light))
    spots = _arrange([catalogue()[name] for name in names], place.horizon, height, width, rng)
    composite, depth, covered = place.image, place.depth, np.zeros((height, width), bool)
    drawn = []
    for entry, t, left, size in spots:
        sprite = _lit(_sprite(entry.name, bool(rng.integers(2)), size), entry, place.light)
        box, rgba, shadow = _stand(sprite, entry, place, t, left, height, width)
        drawn.append((entry, str(rng.choice(entry.prompts)), rgba, shadow, t, box))
        composite = over(rgba, over(shadow, composite))
        depth = np.where(rgba[..., 3] > 0.5, np.float32(1 - t), depth)
    objects = []
    clear = np.ones((height, width), np.float32)
    for entry, words, rgba, shadow, t, box in reversed(drawn):
        alpha = rgba[..., 3]
        mask = (alpha > 0.5) & ~covered
        visible = float((alpha * clear).sum() / max(alpha.sum(), 1e-6))
        covered, clear = covered | mask, clear * (1 - alpha)
        both = stack(rgba, shadow)
        objects.insert(
            0, SceneObject(entry.name, words, rgba, shadow, both, mask.astype(np.float32), float(1 - t), box, visible)
        )
    where, prompt = _sentence(kind, [o.prompt for o in objects], rng)
    return Scene(
        composite.astype(np.float32),
        place.image,
        depth.astype(np.float32),
        place.depth,
        tuple(objects),
        kind,
        prompt,
        f"{EMPTY} {where}",
        place.horizon,
        place.light,
        seed,
    )


def describe(kind: str, names: list[str], rng: np.random.Generator) -> str:
    """A sentence for these objects, farthest first, in this place, worded like a scene's own prompt."""
    return _sentence(kind, [str(rng.choice(catalogue()[name].prompts)) for name in names], rng)[1]


def _sentence(kind: str, prompts: list[str], rng) -> tuple[str, str]:
    """The words for the place, and the whole prompt, which names the nearest object first."""
    where = str(rng.choice(PLACE_WORDS[kind]))
    return where, str(rng.choice(ARRANGEMENTS)).format(what=_list(prompts[::-1]), where=where)


def choose(request: Request, rng: np.random.Generator) -> tuple[str, list[str]]:
    """The place and the objects, farthest first, that a scene of this request shows; the first thing that render()
    draws.

    Raises ValueError when an object or a place is not known or no such pair is left.
    """
    known = catalogue()
    for name in request.objects or ():
        if name not in known:
            raise ValueError(f"objects: {name!r} is not one of the objects; use {', '.join(known)}.")
    if request.kind is not None and request.kind not in KINDS:
        raise ValueError(f"kind: {request.kind!r} is not one of the places; use {', '.join(KINDS)}.")
    kind = request.kind or str(rng.choice(KINDS))
    if len(request.objects or ()) > MOST_OBJECTS:
        raise ValueError(
            f"objects: there are {len(request.objects)} of them and a scene holds at most {MOST_OBJECTS}; name fewer."
        )
    if request.objects is not None:
        return kind, list(request.objects)
    pool = list(known)
    if request.train:
        pool = [name for name in known if not is_held_out(name, kind)]
    elif request.held_out:
        pool = [name for name in known if is_held_out(name, kind) and not known[name].held_out]
    count = request.count if request.count is not None else int(rng.choice((1, 1, 2, 3)))
    if count > len(pool):
        raise ValueError(f"count: {count} objects were asked for and there are {len(pool)} to choose from.")
    return kind, [str(n) for n in rng.choice(pool, count, replace=False)]


def _arrange(entries: list[ObjectKind], horizon: float, height: int, width: int, rng):
    """Feet and sizes, farthest first: (object, t, left pixel, (height, width) pixels). Tries for places where nothing
    hides another.
    """
    best, best_hidden = [], np.inf
    for _attempt in range(24):
        spots, boxes, hidden = [], [], 0.0
        for entry, t in zip(entries, _depths(len(entries), rng), strict=True):
            full = _sprite_size(entry)
            tall = SIZE * entry.size * t * height * rng.uniform(0.92, 1.08)
            wide = tall * full[1] / full[0]
            shrink = min(
                1.0, 0.62 * width / wide, 0.9 * (horizon + (1 - horizon) * t) * height / (tall * (1 + entry.hover))
            )
            size = max(4, round(tall * shrink)), max(4, round(wide * shrink))
            room = width - size[1]
            left = int(rng.integers(0, room + 1)) if len(entries) > 1 else int(round(room * rng.uniform(0.2, 0.8)))
            foot = (horizon + (1 - horizon) * t) * height
            for _, other_left, other_size, other_foot in boxes:
                wide_share = (
                    max(0, min(left + size[1], other_left + other_size[1]) - max(left, other_left)) / other_size[1]
                )
                tall_share = np.clip((other_foot - (foot - size[0])) / other_size[0], 0, 1)
                hidden = max(hidden, wide_share * tall_share)
            spots.append((entry, t, left, size))
            boxes.append((entry, left, size, foot))
        if hidden < best_hidden:
            best, best_hidden = spots, hidden
        if hidden < 0.4:
            break
    return best


def _depths(count: int, rng) -> list[float]:
    """Where the feet stand, farthest first and clearly apart."""
    if count <= 1:
        return [float(rng.uniform(0.66, NEAREST))] * count
    edges = np.linspace(FARTHEST, NEAREST, count + 1)
    gap = 0.25 * (edges[1] - edges[0])
    return [
        float(rng.uniform(low + gap * (i > 0), high))
        for i, (low, high) in enumerate(zip(edges, edges[1:], strict=False))
    ]


@lru_cache(maxsize=256)
def _picture(name: str) -> Image.Image:
    """The object cut to its content, with the alpha of its material."""
    entry = catalogue()[name]
    with Image.open(OBJECTS / entry.file) as file:
        image = file.convert("RGBA")
    if entry.material != "solid":
        image = _translucent(image, entry.material)
    return image.crop(image.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox())


def _translucent(image: Image.Image, material: str) -> Image.Image:
    data = np.asarray(image, np.float32) / 255
    alpha = data[..., 3]
    inner = np.asarray(image.getchannel("A").filter(ImageFilter.GaussianBlur(9)), np.float32) / 255
    rim = np.clip((1 - inner) * 2.2, 0, 1)
    high, low = data[..., :3].max(-1), data[..., :3].min(-1)
    color = np.clip((high - low) * 1.6, 0, 1)
    rows = np.linspace(0, 1, alpha.shape[0], dtype=np.float32)[:, None]
    if material == "glass":
        shape = np.clip(0.3 + 0.55 * rim + 0.75 * np.clip(color - 0.25, 0, 1) + 0.5 * np.clip(0.75 - high, 0, 1), 0, 1)
    elif material == "bubble":
        shape = np.clip(0.18 + 0.75 * rim + 0.8 * np.clip(low - 0.86, 0, 1) * 5, 0, 1)
    elif material == "smoke":
        shape = np.clip((inner - 0.25) * 1.2, 0, 0.72)
    else:
        shape = np.clip((inner - 0.12) * 1.8, 0, 1) * np.clip(0.45 + 0.75 * rows, 0, 0.95)
    data[..., 3] = alpha * shape
    return Image.fromarray(np.round(data * 255).astype(np.uint8), "RGBA")


def _sprite_size(entry: ObjectKind) -> tuple[int, int]:
    width, height = _picture(entry.name).size
    return height, width


def _sprite(name: str, flip: bool, size: tuple[int, int]) -> np.ndarray:
    image = _picture(name)
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC), np.float32) / 255


def _falloff(width: int, light: Light) -> np.ndarray:
    """[1,W,1]: from 1 on the side that the light comes from down to what reaches the other."""
    share = np.linspace(0, 1, width, dtype=np.float32) if light.shadow[0] > 0 else np.linspace(1, 0, width)
    return (1 - FALLOFF * share.astype(np.float32))[None, :, None]


def _lit(sprite: np.ndarray, entry: ObjectKind, light: Light) -> np.ndarray:
    """Tinted by the light, brighter on its side, darker near the ground; a flame shines by itself."""
    if entry.material == "flame":
        return sprite
    height, width = sprite.shape[:2]
    side = -np.sign(light.shadow[0]) * np.linspace(-1, 1, width, dtype=np.float32)[None, :, None]
    low = np.clip(np.linspace(-5, 1, height, dtype=np.float32), 0, 1)[:, None, None]
    lit = sprite[..., :3] * np.array(light.color, np.float32) * (1 + 0.12 * side) * (1 - 0.18 * low)
    return np.concatenate([np.clip(lit, 0, 1), sprite[..., 3:]], -1)


def _stand(sprite, entry: ObjectKind, place, t: float, left: int, height: int, width: int):
    """Put a lit sprite on the ground at t: its box and the full canvases of object and shadow."""
    tall, wide = sprite.shape[:2]
    foot = place.horizon + (1 - place.horizon) * t
    bottom = min(height, round(foot * height) - round(entry.hover * tall))
    top = max(0, bottom - tall)
    rgba = np.zeros((height, width, 4), np.float32)
    rgba[top:bottom, left : left + wide] = sprite[tall - (bottom - top) :]
    alpha = _cast(sprite[..., 3], entry, place, t, left, height, width)
    shadow = np.empty((height, width, 4), np.float32)
    shadow[..., :3] = place.light.shade
    shadow[..., 3] = alpha
    ys, xs = np.flatnonzero((rgba[..., 3] > 0).any(1)), np.flatnonzero((rgba[..., 3] > 0).any(0))
    return (int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1), rgba, shadow


def _cast(alpha, entry: ObjectKind, place, t: float, left: int, height: int, width: int) -> np.ndarray:
    """Alpha of the shadow on the ground: the outline thrown along the light, and a dark spot where the object
    touches.
    """
    shadow = np.zeros((height, width), np.float32)
    if entry.material == "flame":
        return shadow
    tall, wide = alpha.shape
    first = max(0, int(np.ceil((place.horizon + 0.02) * height)))
    rows = (np.arange(first, height, dtype=np.float32)[:, None] + 0.5) / height
    z = (1 - place.horizon) / (rows - place.horizon)
    columns = np.arange(width, dtype=np.float32)[None] + 0.5
    right, away = place.light.shadow
    up = (z - 1 / t) * FOCAL / away  # height, in world units, of the point that shades this row
    scale = height * t  # pixels per world unit at the foot
    centre = left + wide / 2
    across = ((columns - width / 2) / height * z - (centre - width / 2) / scale - up * right) * scale / wide + 0.5
    level = up * scale / tall - entry.hover
    grain = int(np.clip(tall * 0.4, 10, 64))
    small = Image.fromarray(np.round(alpha * 255).astype(np.uint8)).resize(
        (max(4, grain * wide // tall), grain), Image.Resampling.BOX
    )
    soft = np.asarray(small.filter(ImageFilter.GaussianBlur(grain / 22)), np.float32) / 255
    penumbra = 1 - 0.45 * np.clip(level, 0, 1)
    fall = _sample(soft, across, 1 - level) * penumbra * place.light.strength
    touch = np.flatnonzero(alpha[int(tall * 0.88) :].max(0) > 0.3)
    low, high = (touch[0], touch[-1] + 1) if len(touch) else (0, wide)
    radius = max(1.5, (high - low) * 0.56)
    flat = max(1.0, radius * t * (1 - place.horizon) / FOCAL * 0.8)
    foot = (place.horizon + (1 - place.horizon) * t) * height - flat * 0.35
    distance = ((columns - left - (low + high) / 2) / radius) ** 2 + ((rows * height - foot) / flat) ** 2
    weight = 0.62 * float(alpha.max() * (0.4 if entry.material != "solid" else 1)) / (1 + 6 * entry.hover)
    contact = weight * np.exp(-(distance**1.5))
    shadow[first:] = 1 - (1 - np.clip(fall, 0, 1)) * (1 - contact)
    return np.where(shadow > 1 / 512, shadow, 0)


def _sample(image: np.ndarray, across: np.ndarray, down: np.ndarray) -> np.ndarray:
    """Bilinear, coordinates in 0..1 of the image, zero outside."""
    padded = np.pad(image, 1)
    height, width = image.shape
    x = np.clip(across * width + 0.5, 0, width + 0.999)
    y = np.clip(np.broadcast_to(down, across.shape) * height + 0.5, 0, height + 0.999)
    ix, iy = x.astype(np.int32), y.astype(np.int32)
    fx, fy = x - ix, y - iy
    row, flat = iy * (width + 2) + ix, padded.ravel()
    return (flat[row] * (1 - fx) + flat[row + 1] * fx) * (1 - fy) + (
        flat[row + width + 2] * (1 - fx) + flat[row + width + 3] * fx
    ) * fy


def stack(rgba: np.ndarray, shadow: np.ndarray) -> np.ndarray:
    """The object over its shadow as one straight-alpha layer."""
    below = shadow[..., 3:] * (1 - rgba[..., 3:])
    alpha = rgba[..., 3:] + below
    color = (rgba[..., :3] * rgba[..., 3:] + shadow[..., :3] * below) / np.maximum(alpha, 1e-6)
    return np.concatenate([color * (alpha > 0), alpha], -1)


def _list(words: list[str]) -> str:
    if not words:
        return EMPTY
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
