"""Trains the judge of pictures: places and objects of rendered scenes, seen as soft, noisy and tinted as generated ones
are.

It learns all sixty objects, those that are held out from the other trainers too, because it has to judge them; what it
never sees are the held-out pairs of object and place, on which it is measured.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..networks.classifier import Classifier
from ..scenes import renderer
from . import data, loop

PLAIN = -1  # the place of an object that was cut out


class Extra(data.ScenePool):
    """What the common pool lacks: the held-out objects (even numbers), and every object cut out on a flat colour (odd
    numbers).
    """

    name = "extra"

    def request(self, index: int) -> renderer.Request:
        rng, known = np.random.default_rng((index, 1)), renderer.catalogue()
        kind = str(rng.choice(renderer.KINDS))
        if index % 2:
            return renderer.Request(kind=kind, objects=(str(rng.choice(list(known))),))
        unseen = [name for name in known if known[name].held_out and not renderer.is_held_out_pair(name, kind)]
        others = [name for name in known if not renderer.is_held_out(name, kind)]
        names = [str(rng.choice(unseen)), *rng.choice(others, rng.choice((0, 0, 1, 2)), replace=False).tolist()]
        return renderer.Request(kind=kind, objects=tuple(rng.permutation(names).tolist()))

    def render(self, index: int) -> np.ndarray:
        if index % 2 == 0:
            return super().render(index)
        cut = renderer.render(self.request(index), self.side, self.side, index).objects[0].rgba
        rng = np.random.default_rng((index, 2))
        flat = np.full(3, 0.5) if rng.random() < 0.5 else rng.random(3)
        return renderer.over(cut, flat.astype(np.float32))

    @property
    def labels(self) -> data.Labels:
        places, objects = super().labels
        return data.Labels(np.where(np.arange(self.count) % 2, PLAIN, places), objects)


class Mixture:
    """The common pool and the extra scenes, drawn alike."""

    def __init__(self, folder: Path, config: dict):
        self.pools = [
            data.ScenePool(folder, config["scenes"], config["side"]),
            Extra(folder, config["extra_scenes"], config["side"]),
        ]
        labels = [pool.labels for pool in self.pools]
        self.places = torch.from_numpy(np.concatenate([entry.places for entry in labels]))
        objects = torch.from_numpy(np.concatenate([entry.objects for entry in labels]))
        self.objects = torch.zeros(len(objects), len(renderer.catalogue()) + 1).scatter_(
            1, objects % (len(renderer.catalogue()) + 1), 1.0
        )[:, :-1]

    def batch(self, config: dict, step: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures [B,3,S,S] in 0..1, places [B], objects [B,objects] of 0 or 1; a function of the numbers alone."""
        rng = np.random.default_rng((config["seed"], step, rank))
        first, extra = self.pools
        picked = rng.integers(0, first.count + extra.count, config["batch"])
        pixels = np.stack([first[i] if i < first.count else extra[i - first.count] for i in picked])
        flip = rng.random(len(picked)) < 0.5
        pixels[flip] = pixels[flip][:, :, ::-1]
        return disturb(data.to_tensor(pixels), rng), self.places[picked], self.objects[picked]


def disturb(image: Tensor, rng: np.random.Generator) -> Tensor:
    """[B,3,S,S] as a generator might have drawn it: tinted, less or more saturated, every other one soft, some
    noisy.
    """

    def factors(low: float, high: float, channels: int = 1) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, (len(image), channels, 1, 1))).float()

    side, soft = image.shape[-1], slice(0, len(image) // 2)
    image = image * factors(0.8, 1.2) * factors(0.92, 1.08, 3)
    gray = image.mean(1, keepdim=True)
    image = gray + (image - gray) * factors(0.7, 1.2)
    small = F.interpolate(image[soft], int(side * rng.uniform(0.3, 0.9)), mode="bilinear", antialias=True)
    image[soft] = F.interpolate(small, side, mode="bicubic")
    noise = torch.from_numpy(rng.standard_normal(image.shape, np.float32)) * factors(-0.05, 0.05).relu()
    return (image + noise).clamp(0, 1)


def build(config: dict) -> Classifier:
    torch.manual_seed(config["seed"])
    model = Classifier(len(renderer.KINDS), len(renderer.catalogue()), config["widths"], config["features"])
    torch.nn.init.constant_(model.objects.bias, -3.5)  # about two of sixty objects are in a scene
    return model.to(memory_format=torch.channels_last)


def losses(logits: tuple[Tensor, Tensor], places: Tensor, objects: Tensor) -> dict[str, Tensor]:
    """Cross-entropy over the places, and over the presence of each object.

    logits: [B,places] and [B,objects]; places: [B], PLAIN counts for nothing; objects: [B,objects] of 0 or 1.
    Source: ours, one place and any number of objects in a picture
    """
    place = F.cross_entropy(logits[0], places, ignore_index=PLAIN)
    presence = F.binary_cross_entropy_with_logits(logits[1], objects, reduction="none").sum(1).mean()
    return {"loss": place + presence, "place": place, "objects": presence}


def checks(count: int, side: int, first: int = 2 * 10**9) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Scenes of one object that no training batch holds, `count` of ordinary pairs and of held-out ones each: bytes
    [N,3,S,S], places, objects.

    There are 540 ordinary pairs of object and place and 60 held-out ones; they take turns.
    """
    names, sets = list(renderer.catalogue()), {}
    pairs = [(name, kind) for name in names for kind in renderer.KINDS]
    for title, held in (("fresh", False), ("pairs", True)):
        entries = [pair for pair in pairs if renderer.is_held_out_pair(*pair) == held]
        order = np.random.default_rng(0).permutation(len(entries))
        taken = [entries[order[i % len(order)]] for i in range(count)]
        shown = [
            renderer.render(renderer.Request(kind=kind, objects=(name,)), side, side, first + i).composite
            for i, (name, kind) in enumerate(taken)
        ]
        pixels = torch.from_numpy(np.round(np.stack(shown) * 255).astype(np.uint8))
        sets[title] = (
            rearrange(pixels, "b h w c -> b c h w"),
            torch.tensor([renderer.KINDS.index(kind) for _, kind in taken]),
            torch.tensor([names.index(name) for name, _ in taken]),
        )
    return sets


def train(config: dict, folder: Path, minutes: float | None, save_every: float) -> Classifier:
    pool, sets = Mixture(folder.parent / "scenes", config), checks(config["check_scenes"], config["side"])

    def loss(model, step, rank):
        device = next(model.parameters()).device
        image, places, objects = (tensor.to(device) for tensor in pool.batch(config, step, rank))
        return losses(model(image.to(memory_format=torch.channels_last)), places, objects)

    @torch.no_grad()
    def validate(model, step):
        device, metrics = next(model.parameters()).device, {}
        for title, (pixels, places, objects) in sets.items():
            logits = [model(part.to(device).float() / 255) for part in pixels.split(60)]
            place, item = (torch.cat(parts).argmax(1).cpu() for parts in zip(*logits, strict=True))
            metrics |= {
                f"{title}_place": (place == places).float().mean().item(),
                f"{title}_object": (item == objects).float().mean().item(),
            }
        print(
            f"held-out scenes at step {step}: " + "  ".join(f"{key} {value:.4f}" for key, value in metrics.items()),
            flush=True,
        )
        return metrics

    return loop.fit(build(config), loss, validate, config, folder, minutes, save_every)
