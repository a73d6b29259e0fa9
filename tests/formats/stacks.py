"""Stacks of layers for the tests of every format: 8-bit colours, the ones under alpha 0 included."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import ImageCms
from strata.techniques.layers import Layer, LayerStack, in_group


def pixels(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape).astype(np.float32) / 255)


def eight_bit(image: torch.Tensor) -> np.ndarray:
    return np.rint(image.numpy().astype(np.float64) * 255).astype(int)


def example() -> LayerStack:
    """Opaque back, a masked layer that begins outside the canvas, a hidden one that ends outside, one over transparent
    black.
    """
    soft = pixels(4, 9, 20, 4)
    soft[:4, :, 3] = 0
    return LayerStack(
        (40, 30),
        (
            Layer(pixels(1, 30, 40, 3), "Back"),
            Layer(pixels(2, 10, 12, 4), "ünï 漢 😀", pixels(3, 10, 12), -3, -2, opacity=0.5, blend_mode="multiply"),
            Layer(soft, 'a/b\\c:<d>&"e"', None, 30, 25, visible=False, blend_mode="luminosity"),
            Layer(pixels(5, 1, 1, 4), "dot", None, 39, 29, opacity=0.25),
        ),
    )


def layers(modes: tuple[str, ...]):
    """Any one layer that a file of these blend modes can hold."""
    text = st.text(st.characters(exclude_categories=("Cs", "Cc", "Cn")), min_size=1, max_size=300)
    return st.builds(
        lambda seed, width, height, channels, **fields: Layer(pixels(seed, height, width, channels), **fields),
        st.integers(0, 999),
        st.integers(1, 9),
        st.integers(1, 9),
        st.sampled_from((3, 4)),
        name=text,
        x=st.integers(-20000, 20000),
        y=st.integers(-20000, 20000),
        opacity=st.floats(0, 1),
        blend_mode=st.sampled_from(modes),
        visible=st.booleans(),
    )


NAMES = ("sky", "a/b", "ünï 漢", "<&>", "Layer 1", "Ground", "tree (left)", "été")


def random_stack(seed: int, modes: tuple[str, ...]) -> LayerStack:
    """2 to 6 layers of smooth colours with soft edges, some masked, some hidden, some in groups, some in part outside
    the canvas.
    """
    random = np.random.default_rng(seed)
    width, height = (int(side) for side in random.integers(24, 65, 2))
    made = [Layer(_smooth(random, height, width, 3), "back")]
    for number in range(random.integers(1, 6)):
        own = tuple(int(side) for side in random.integers(3, 40, 2))
        made.append(
            Layer(
                _smooth(random, *own, 4 if random.random() < 0.8 else 3),
                f"{random.choice(NAMES)} {number}",
                _smooth(random, *own, 1)[..., 0] if random.random() < 0.3 else None,
                int(random.integers(-9, width)),
                int(random.integers(-9, height)),
                opacity=int(random.integers(10, 101)) / 100,
                blend_mode=str(random.choice(modes)),
                visible=bool(random.random() < 0.8),
            )
        )
    first, last = sorted(int(number) for number in random.integers(1, len(made) + 1, 2))
    for number in range(first, last):
        made[number] = in_group(made[number], "inner") if random.random() < 0.5 else made[number]
        made[number] = in_group(made[number], "grüppe")
    return LayerStack((width, height), tuple(made))


def _smooth(random, height: int, width: int, channels: int) -> torch.Tensor:
    """[H,W,C] in 255ths: a few values spread over the picture."""
    few = torch.from_numpy(random.random((1, channels, 3, 3), np.float32))
    large = torch.nn.functional.interpolate(few * 1.4 - 0.2, (height, width), mode="bilinear", align_corners=True)
    return torch.round(large[0].movedim(0, -1).clamp(0, 1) * 255) / 255


def linear_srgb(gamma=1.0):
    """sRGB's primaries with linear light, which calls itself sRGB as Krita's profiles do: each parametric curve becomes
    a gamma of 1, or another one.
    """
    power = round(gamma * 2**16).to_bytes(4, "big")
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    place = profile.find(b"para")
    while place >= 0:
        profile[place + 8 : place + 10], profile[place + 12 : place + 16] = b"\0\0", power
        place = profile.find(b"para", place + 4)
    return bytes(profile)


def srgb_of(value):
    """An 8-bit value of linear light, by IEC 61966-2-1."""
    return round(
        255 * (12.92 * value / 255 if value / 255 <= 0.0031308 else 1.055 * (value / 255) ** (1 / 2.4) - 0.055)
    )
