"""Eight layers of 640 pixels fitted to an image of 2048 × 2048, against the formula written down plainly: all layers
enlarged, and three rounds of least change, clamped, over whole pictures.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from turns import compared, in_turns, rows_of

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import conftest  # noqa: E402, F401  makes the pack importable as strata
from strata.techniques.compositing import flatten  # noqa: E402
from strata.techniques.fitting import fit_colours, fit_stack  # noqa: E402
from strata.techniques.layers import Layer, LayerStack  # noqa: E402

SMALL, LARGE, LAYERS = 640, 2048, 8


def stack_of(size: int, count: int = LAYERS) -> LayerStack:
    """A background and discs with soft edges."""
    rng = np.random.default_rng(0)
    y, x = (torch.arange(size) + 0.5)[:, None] / size, (torch.arange(size) + 0.5)[None] / size
    layers = []
    for index in range(count):
        waves = [torch.sin(x * rng.uniform(3, 60) + y * rng.uniform(3, 60) + rng.uniform(0, 6)) for _ in range(3)]
        colour = 0.5 + 0.4 * torch.stack(waves, -1)
        distance = torch.hypot(y - rng.uniform(0.2, 0.8), x - rng.uniform(0.2, 0.8))
        alpha = ((rng.uniform(0.1, 0.3) - distance) * 150).clamp(0, 1) if index else torch.ones(size, size)
        layers.append(Layer(torch.cat([colour, alpha[..., None]], -1), str(index)))
    return LayerStack((size, size), tuple(layers))


def plain_fit(stack: LayerStack, image: torch.Tensor) -> torch.Tensor:
    target = image.movedim(-1, 0)[None]
    large = torch.stack([layer.image.movedim(-1, 0) for layer in stack.layers])
    large = F.interpolate(large, size=target.shape[2:], mode="bicubic").clamp(0, 1)
    return torch.cat([plain_colours(target, large[:, 3:], large[:, :3]), large[:, 3:]], 1)


def plain_colours(target: torch.Tensor, alphas: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
    left, shares = torch.ones_like(alphas[:1]), []
    for alpha in alphas.flip(0):
        shares.append(alpha[None] * left)
        left = left * (1 - alpha[None])
    weights = torch.cat(shares[::-1])
    for _ in range(3):
        missing = target - (weights * colours).sum(0, keepdim=True)
        squares = weights.square().sum(0, keepdim=True).clamp_min(1e-6)
        colours = (colours + weights * missing / squares).clamp(0, 1)
    return colours


def rows():
    """As tools/turns.py gives them."""
    image = flatten(stack_of(LARGE))[0]
    stack, large = stack_of(SMALL), stack_of(LARGE)
    target = image.movedim(-1, 0).contiguous()
    alphas = torch.stack([layer.image[..., 3] for layer in large.layers])
    colours = torch.stack([layer.image[..., :3].movedim(-1, 0) for layer in large.layers]).contiguous()
    yield from compared(
        "colours of 8 layers of 2048², of their size already",
        lambda: fit_colours(target, alphas, colours),
        lambda: plain_colours(target[None], alphas[:, None], colours),
    )
    yield from compared(
        "8 layers of 640² fitted to 2048², alphas kept",
        lambda: fit_stack(stack, image, refine=False),
        lambda: plain_fit(stack, image),
    )
    yield from compared(
        "8 layers of 640² fitted to 2048², alphas refined",
        lambda: fit_stack(stack, image),
        lambda: plain_fit(stack, image),
    )
    twice = stack_of(SMALL, 2 * LAYERS)
    yield from rows_of(
        "16 layers of 640² fitted to 2048², beside 8 in place of a plain way",
        *in_turns(lambda: fit_stack(twice, image), lambda: fit_stack(stack, image)),
    )


if __name__ == "__main__":
    for row in rows():
        print(*row, flush=True)
