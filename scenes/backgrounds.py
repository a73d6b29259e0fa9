"""Procedural places: a ground plane in perspective, what stands behind it, and the light that falls on it. NumPy only.

The camera looks level over a plane. `t` is 0 at the horizon and 1 at the lower edge of the picture, so z = 1/t is the
distance along the plane; one unit of world length is one picture height at z = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

FOCAL = 1.2  # in picture heights; how fast the plane runs away from the viewer
TILE = 256  # cells of noise on a side before it repeats


@dataclass(frozen=True)
class Light:
    """shadow: where the shadow of a point one unit high falls, (right, away from the viewer), in world units. color:
    tint of lit things, RGB factors in 0..1. strength: of the shadow, 0..1. shade: the shadow's colour, sRGB in 0..1.
    """

    shadow: tuple[float, float]
    color: tuple[float, float, float]
    strength: float
    shade: tuple[float, float, float]


@dataclass(frozen=True)
class Place:
    """image: [H,W,3] sRGB 0..1. depth: [H,W], 0 = nearest, 1 = farthest; on the ground exactly 1 - t. horizon: row as a
    fraction of H.
    """

    image: np.ndarray
    depth: np.ndarray
    horizon: float
    light: Light


class Plane:
    """Pixel centres of a picture and the points of the ground plane under them."""

    def __init__(self, height: int, width: int, horizon: float):
        self.horizon = horizon
        self.y = ((np.arange(height, dtype=np.float32) + 0.5) / height)[:, None]
        self.x = ((np.arange(width, dtype=np.float32) + 0.5 - width / 2) / height)[None]
        self.t = (self.y - horizon) / (1 - horizon)
        self.z = 1 / np.maximum(self.t, 1e-3)
        self.u = self.x * self.z
        self.v = np.broadcast_to(self.z * FOCAL, self.u.shape)
        self.step = self.z**2 * FOCAL / ((1 - horizon) * height)  # world length of one pixel's height

    def texture(self, rng, cell: float, stretch: float = 1.0) -> np.ndarray:
        """Noise in -1..1 on the ground, faded where a cell becomes smaller than a pixel."""
        fade = np.clip(cell / self.step - 0.5, 0, 1)
        return noise(rng, self.u / (cell * stretch), self.v / cell) * fade

    def stripes(self, coordinate, size: float, line: float) -> np.ndarray:
        """1 on joints of width `line` between tiles of `size`, antialiased by the size of a pixel."""
        near = np.abs((coordinate / size + 0.5) % 1 - 0.5) * size
        soft = np.maximum(self.step, line * 0.5)
        return np.clip((line - near) / soft + 0.5, 0, 1) * np.clip(size / (2 * self.step) - 0.3, 0, 1)


@lru_cache(maxsize=1)
def _tile() -> np.ndarray:
    return np.random.default_rng(7).uniform(-1, 1, (TILE, TILE)).astype(np.float32)


def noise(rng, u, v) -> np.ndarray:
    """Smooth value noise in -1..1 at any coordinates, one cell per unit, shifted by the generator."""
    du, dv = rng.uniform(0, TILE, 2)
    u, v = np.broadcast_arrays(np.asarray(u + du, np.float32), np.asarray(v + dv, np.float32))
    iu, iv = np.floor(u).astype(np.int32), np.floor(v).astype(np.int32)
    fu, fv = u - iu, v - iv
    fu, fv = fu * fu * (3 - 2 * fu), fv * fv * (3 - 2 * fv)
    u0, u1, v0, v1 = iu % TILE, (iu + 1) % TILE, iv % TILE * TILE, (iv + 1) % TILE * TILE
    tile = _tile().ravel()
    low = tile[v0 + u0] * (1 - fu) + tile[v0 + u1] * fu
    return low * (1 - fv) + (tile[v1 + u0] * (1 - fu) + tile[v1 + u1] * fu) * fv


def rgb(*values) -> np.ndarray:
    """A colour of 0..255 as [3] in 0..1."""
    return np.array(values, np.float32) / 255


def mix(a, b, weight) -> np.ndarray:
    """Colours [...,3], from a at weight [...] 0 to b at 1."""
    weight = np.asarray(weight, np.float32)[..., None]
    return a * (1 - weight) + b * weight


def ridge(plane: Plane, rng, height: float, roughness: float) -> np.ndarray:
    """1 under a wavy line that rises to about `height` (in picture heights) above the horizon."""
    line = noise(rng, plane.x * roughness, 0) * 0.6 + noise(rng, plane.x * roughness * 2.7, 0) * 0.4
    top = plane.horizon - height * (0.55 + 0.45 * line)
    return np.clip((plane.y - top) * len(plane.y) + 0.5, 0, 1) * (plane.y < plane.horizon)


def sky(plane: Plane, rng, top, low, clouds: float = 0.0) -> np.ndarray:
    """[H,W,3] from one colour at the horizon to another at the top. clouds: how many, 0 for none."""
    up = np.clip((plane.horizon - plane.y) / max(plane.horizon, 1e-3), 0, 1)
    image = mix(low, top, np.broadcast_to(up**0.7, plane.u.shape))
    if clouds:
        reach = plane.x / (up + 0.25), 0.6 / (up + 0.25)
        puff = noise(rng, reach[0] * 2.5, reach[1] * 4) + 0.5 * noise(rng, reach[0] * 6, reach[1] * 9)
        image = mix(image, rgb(255, 255, 255), np.clip(puff * 1.3 + clouds - 0.5, 0, 1) * np.clip(up * 3, 0, 1) * 0.85)
    return image


def disc(plane: Plane, x: float, y: float, radius: float) -> np.ndarray:
    """[H,W]: 1 inside a disc, antialiased; picture heights, x from the middle and y from the top."""
    return np.clip((radius - np.hypot(plane.x - x, plane.y - y)) * len(plane.y) + 0.5, 0, 1)


def _outdoor(plane: Plane, back, ground):
    weight = np.broadcast_to(np.clip(plane.t * (1 - plane.horizon) * len(plane.y) + 0.5, 0, 1), plane.u.shape)
    return mix(back, ground, weight), np.broadcast_to(np.clip(1 - plane.t, 0, 1), plane.u.shape)


def _indoor(plane: Plane, wall, floor, edge: float):
    """A wall or the end of a table at t = edge; its depth is that of the ground where it stands."""
    rows = (plane.t - edge) * (1 - plane.horizon) * len(plane.y)
    image = mix(wall, floor, np.broadcast_to(np.clip(rows + 0.5, 0, 1), plane.u.shape))
    return image, np.broadcast_to(np.where(rows >= 0, 1 - plane.t, 1 - edge), plane.u.shape)


def meadow(plane, rng):
    back = sky(plane, rng, rgb(70, 140, 220), rgb(190, 222, 245), 0.35)
    back = mix(back, rgb(96, 140, 120), ridge(plane, rng, 0.14, 2))
    back = mix(back, rgb(62, 118, 58), ridge(plane, rng, 0.05, 9))
    blades = 0.5 * plane.texture(rng, 0.02) + 0.5 * plane.texture(rng, 0.07) + 0.5 * plane.texture(rng, 0.5)
    ground = mix(rgb(70, 138, 46), rgb(142, 190, 74), np.clip(0.5 + 0.5 * blades, 0, 1))
    petals = np.clip((plane.texture(rng, 0.03) - 0.72) * 8, 0, 1)
    ground = mix(ground, rgb(250, 240, 150) if rng.random() < 0.5 else rgb(250, 250, 250), petals)
    return *_outdoor(plane, back, ground), rgb(255, 250, 238), 0.5, rgb(14, 34, 12)


def beach(plane, rng):
    back = sky(plane, rng, rgb(60, 150, 225), rgb(205, 234, 246), 0.2)
    shore = 0.17 + 0.025 * noise(rng, plane.x * 3, 0)
    ripples = 0.5 + 0.5 * noise(rng, plane.u * 2, plane.v * 1.2)
    sea = mix(rgb(24, 110, 168), rgb(74, 186, 200), np.clip(plane.t / shore, 0, 1) * np.ones_like(ripples))
    sea = mix(sea, rgb(210, 240, 245), np.clip(ripples - 0.62, 0, 1))
    grain = 0.3 * plane.texture(rng, 0.02) + 0.4 * plane.texture(rng, 0.3) + 0.3 * plane.texture(rng, 0.12, 3)
    sand = mix(rgb(214, 184, 134), rgb(246, 226, 182), np.clip(0.55 + 0.5 * grain, 0, 1))
    sand = mix(rgb(164, 136, 98), sand, np.clip((plane.t - shore) / 0.07, 0, 1))
    ground = mix(sea, sand, np.clip((plane.t - shore) * 60, 0, 1))
    ground = mix(ground, rgb(250, 252, 252), np.clip(1 - np.abs(plane.t - shore) * 55, 0, 1))
    return *_outdoor(plane, back, ground), rgb(255, 248, 228), 0.5, rgb(70, 48, 30)


def snow(plane, rng):
    back = sky(plane, rng, rgb(140, 176, 214), rgb(224, 234, 242), 0.25)
    mountain = ridge(plane, rng, 0.22, 2.4)
    back = mix(
        back,
        mix(rgb(146, 164, 190), rgb(246, 250, 255), np.clip(0.5 + noise(rng, plane.x * 12, plane.y * 9), 0, 1)),
        mountain,
    )
    back = mix(back, rgb(58, 84, 86), ridge(plane, rng, 0.045, 26))
    drift = 0.6 * plane.texture(rng, 0.5) + 0.25 * plane.texture(rng, 0.12, 2) + 0.2 * plane.texture(rng, 0.02)
    ground = mix(rgb(196, 212, 236), rgb(250, 252, 255), np.clip(0.6 + 0.5 * drift, 0, 1))
    return *_outdoor(plane, back, ground), rgb(244, 248, 255), 0.42, rgb(52, 74, 122)


def night(plane, rng):
    back = sky(plane, rng, rgb(8, 12, 36), rgb(36, 48, 96))
    spots = rng.random((70, 3))
    for sx, sy, bright in spots:
        row, column = int(sy * plane.horizon * len(plane.y)), int(sx * plane.u.shape[1])
        back[row, column] = mix(back[row, column], rgb(250, 250, 235), 0.3 + 0.7 * bright)
    x, y = rng.uniform(-0.35, 0.35), plane.horizon * rng.uniform(0.25, 0.5)
    back = back + 0.25 * np.exp(-np.hypot(plane.x - x, plane.y - y) * 12)[..., None] * rgb(200, 210, 255)
    back = mix(back, rgb(245, 240, 214), disc(plane, x, y, 0.05))
    back = mix(back, rgb(10, 16, 30), ridge(plane, rng, 0.09, 7))
    blades = 0.5 * plane.texture(rng, 0.03) + 0.6 * plane.texture(rng, 0.4)
    ground = mix(rgb(18, 34, 44), rgb(48, 76, 84), np.clip(0.5 + 0.5 * blades, 0, 1))
    return *_outdoor(plane, back, ground), rgb(150, 168, 226), 0.5, rgb(2, 5, 14)


def desert(plane, rng):
    back = sky(plane, rng, rgb(96, 168, 226), rgb(250, 226, 184))
    back = mix(back, rgb(190, 112, 70), ridge(plane, rng, 0.16, 3.2))
    back = mix(back, rgb(214, 142, 82), ridge(plane, rng, 0.05, 2))
    waves = np.sin(plane.v * 9 + 2.5 * noise(rng, plane.u * 0.8, plane.v * 0.8)) * np.clip(0.35 / plane.step - 1, 0, 1)
    grain = 0.45 * waves + 0.3 * plane.texture(rng, 0.03) + 0.4 * plane.texture(rng, 0.7)
    ground = mix(rgb(196, 122, 62), rgb(240, 182, 106), np.clip(0.5 + 0.45 * grain, 0, 1))
    return *_outdoor(plane, back, ground), rgb(255, 236, 200), 0.55, rgb(74, 32, 18)


def autumn(plane, rng):
    back = sky(plane, rng, rgb(176, 196, 214), rgb(240, 228, 206), 0.3)
    leaves = np.clip(0.5 + 0.6 * noise(rng, plane.x * 26, plane.y * 26), 0, 1)
    back = mix(back, mix(rgb(168, 80, 28), rgb(236, 170, 60), leaves), ridge(plane, rng, 0.3, 4.5))
    trunks = (
        np.clip((noise(rng, plane.x * 45, 0) - 0.45) * 6, 0, 1)
        * (plane.y > plane.horizon - 0.07)
        * (plane.y < plane.horizon)
    )
    back = mix(back, rgb(74, 48, 32), trunks)
    litter = 0.6 * plane.texture(rng, 0.045) + 0.5 * plane.texture(rng, 0.02) + 0.3 * plane.texture(rng, 0.5)
    ground = mix(rgb(118, 66, 28), rgb(226, 142, 48), np.clip(0.5 + 0.5 * litter, 0, 1))
    ground = mix(ground, rgb(190, 54, 28), np.clip((plane.texture(rng, 0.05) - 0.45) * 4, 0, 1))
    return *_outdoor(plane, back, ground), rgb(255, 240, 214), 0.5, rgb(40, 18, 8)


def street(plane, rng):
    back = sky(plane, rng, rgb(118, 158, 202), rgb(222, 226, 230), 0.3)
    block = np.floor(plane.x * 9 + rng.uniform(0, 9)).astype(np.int32)
    heights = 0.1 + 0.22 * (0.5 + 0.5 * _tile()[3, block % TILE])
    walls = rgb(150, 134, 128) + 0.16 * _tile()[5:8, block % TILE].transpose(1, 2, 0) * rgb(255, 220, 200)
    floors = ((plane.y * 34) % 1 > 0.45) & ((plane.x * 45) % 1 > 0.4)
    walls = mix(walls, rgb(250, 232, 176) if rng.random() < 0.5 else rgb(84, 100, 122), floors * 0.7)
    back = mix(back, walls, np.clip((plane.y - plane.horizon + heights) * len(plane.y) + 0.5, 0, 1))
    grain = 0.5 * plane.texture(rng, 0.015) + 0.3 * plane.texture(rng, 0.3)
    ground = rgb(98, 100, 106) + 0.07 * grain[..., None]
    dash = np.clip((0.035 - np.abs(plane.u - rng.uniform(-0.5, 0.5))) / np.maximum(plane.step, 0.01) + 0.5, 0, 1)
    dash *= (plane.v + rng.uniform(0, 2)) % 1.6 < 0.9
    ground = mix(ground, rgb(240, 236, 220), dash * np.clip(0.4 / plane.step, 0, 1))
    return *_outdoor(plane, back, ground), rgb(250, 248, 244), 0.5, rgb(14, 15, 20)


def table(plane, rng):
    tone = rng.uniform(0, 1)
    wall = mix(rgb(206, 214, 204), rgb(232, 214, 186), tone) * (1.05 - 0.25 * np.clip(plane.y, 0, 1))[..., None]
    blobs = noise(rng, plane.x * 4, plane.y * 4)
    wall = mix(wall, rgb(250, 246, 226), np.clip(blobs, 0, 1) * 0.4) + np.zeros((*plane.u.shape, 1), np.float32)
    plank = np.floor(plane.u / 0.34).astype(np.int32)
    grain = (
        noise(rng, plane.u * 26, plane.v * 1.5 + plank * 9) * np.clip(0.04 / plane.step * 2, 0, 1)
        + 0.7 * _tile()[11, plank % TILE]
    )
    wood = mix(rgb(132, 78, 38), rgb(206, 146, 86), np.clip(0.5 + 0.4 * grain, 0, 1))
    wood = mix(wood, rgb(74, 42, 20), plane.stripes(plane.u, 0.34, 0.006))
    return *_indoor(plane, wall, wood, rng.uniform(0.14, 0.22)), rgb(255, 246, 226), 0.5, rgb(40, 20, 8)


def room(plane, rng):
    edge = rng.uniform(0.16, 0.24)
    line = plane.horizon + edge * (1 - plane.horizon)
    row = np.floor((plane.y - line) * 14).astype(np.int32)
    along = plane.x * 6.5 + 0.5 * (row % 2)
    brick = np.floor(along).astype(np.int32)
    tone = _tile()[(row * 31) % TILE, brick % TILE]
    bricks = mix(rgb(150, 68, 50), rgb(196, 104, 76), np.clip(0.5 + 0.5 * tone, 0, 1))
    upright, level = (np.abs((place + 0.5) % 1 - 0.5) for place in (along, (plane.y - line) * 14))
    joint = np.maximum(np.clip(1.3 - 9 * upright, 0, 1), np.clip(1.3 - 7 * level, 0, 1))
    wall = mix(bricks, rgb(206, 194, 180), joint * 0.8)
    wall = wall * (0.78 + 0.22 * np.clip(plane.y / line, 0, 1))[..., None]
    boards = np.floor(plane.v / 0.3).astype(np.int32)
    tint = 0.6 * _tile()[17, boards % TILE] + 0.4 * plane.texture(rng, 0.04, 6)
    floor = mix(rgb(104, 88, 80), rgb(150, 130, 116), np.clip(0.5 + 0.5 * tint, 0, 1))
    floor = mix(floor, rgb(66, 54, 48), plane.stripes(plane.v, 0.3, 0.008))
    return *_indoor(plane, wall, floor, edge), rgb(255, 240, 216), 0.5, rgb(24, 14, 10)


def tiles(plane, rng):
    pairs = ((244, 244, 240), (60, 66, 76)), ((246, 240, 226), (120, 170, 178)), ((240, 236, 240), (176, 110, 120))
    pale, dark = (rgb(*color) for color in pairs[rng.integers(3)])
    wall = mix(rgb(226, 232, 236), rgb(206, 216, 224), np.broadcast_to(np.clip(plane.y * 2, 0, 1), plane.u.shape))
    side = rng.uniform(-0.3, 0.3)
    window = (np.abs(plane.x - side) < 0.2) & (plane.y < plane.horizon * 0.7)
    wall = mix(wall, rgb(176, 214, 242), window * 0.9)
    wall = mix(wall, rgb(250, 250, 250), window * (np.abs(plane.x - side) < 0.012))
    size = 0.4
    angle = rng.choice([0.0, np.pi / 4])
    u, v = plane.u * np.cos(angle) + plane.v * np.sin(angle), plane.v * np.cos(angle) - plane.u * np.sin(angle)
    soft = np.maximum(plane.step, 0.01) * 1.2
    across, along = (np.clip((np.abs(place / size % 2 - 1) - 0.5) * size / soft, -0.5, 0.5) for place in (u, v))
    wave = across * along
    floor = mix(pale, dark, (0.5 + 2 * wave * np.clip(size / (2 * plane.step) - 0.3, 0, 1)))
    return *_indoor(plane, wall, floor, rng.uniform(0.12, 0.2)), rgb(250, 250, 255), 0.42, rgb(24, 28, 36)


# Each gives image [H,W,3], depth [H,W], and of its light colour, strength and shade, see Light.
PLACES = {
    "meadow": meadow,
    "beach": beach,
    "snow": snow,
    "night": night,
    "desert": desert,
    "table": table,
    "room": room,
    "tiles": tiles,
    "autumn": autumn,
    "street": street,
}


def render(kind: str, height: int, width: int, rng) -> Place:
    """One place of a kind, its details drawn from the generator."""
    plane = Plane(height, width, float(rng.uniform(0.34, 0.46)))
    image, depth, color, strength, shade = PLACES[kind](plane, rng)
    shadow = (float(rng.uniform(0.35, 0.9) * rng.choice([-1, 1])), float(rng.uniform(0.25, 0.6) * rng.choice([-1, 1])))
    exposure = rng.uniform(0.92, 1.05)
    light = Light(
        shadow,
        tuple(float(c) for c in color),
        float(strength * rng.uniform(0.85, 1.15)),
        tuple(float(c) for c in shade),
    )
    return Place(
        np.clip(image * exposure, 0, 1).astype(np.float32),
        np.ascontiguousarray(depth, np.float32),
        plane.horizon,
        light,
    )
