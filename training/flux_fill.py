"""Trains the mini Flux-Fill: flow matching in Flux's structure, filling a box of a scene, or all of it, from words.

An object comes with its light and its shadow. The text encoder and the autoencoder are the published checkpoint's and
do not learn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from ..networks import flux
from ..networks.autoencoder import Autoencoder
from ..networks.text_to_image import TextToImage
from ..scenes import renderer
from ..techniques import diffusion as formulas
from ..techniques import layering
from . import data, latents, loop, oracle, published, sampling, settings, text

SIDE = 128  # of the images that sigma_mean speaks of
CHECK = 64  # the last scenes of the pool are kept for validation
EMPTY_EVERY = 12  # of so many scenes one has no object
OBJECT, BOX, EVERYTHING = range(3)  # what a hole is
SHARES = (0.7, 0.1, 0.2)  # of the holes in scenes with objects
SHADOW = 1 / 16  # least alpha of the shadow that a box is drawn around


@dataclass(frozen=True)
class Batch:
    """latent: [B,4,h,w]. condition: [B,68,h,w], the latent of the scene with the hole gray, and the hole's cells.

    weight: [B,1,h,w], the share of each latent pixel that is to be painted. prompts: one each.
    """

    latent: Tensor
    condition: Tensor
    weight: Tensor
    prompts: list[str]


@dataclass(frozen=True)
class Hole:
    """box: (left, top, right, bottom) pixels. image: [S,S,3], the scene as it is to become; outside the box it shows no
    shadow of the object that stands in it, since nothing there may tell what is missing.
    """

    kind: int
    box: tuple[int, int, int, int]
    image: np.ndarray
    scene: renderer.Scene
    name: str | None


class Words:
    """Prompts as the published text encoder's states."""

    def __init__(self, encoder: TextToImage, tokens: int):
        self.encoder, self.tokens = encoder, tokens

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """[B,T,D] of the first T tokens, and [B,D] of the end token."""
        rows = text.rows(prompts)
        states = self.encoder.encode(rows)
        ends = (rows == len(text.token_ids()) - 1).int().argmax(1)  # the end token has the highest number
        return states[:, : self.tokens], states[torch.arange(len(rows)), ends]


class FillPool(data.ScenePool):
    """Scene i with its hole, encoded when first asked for and kept on disk; another encoder starts anew."""

    def __init__(self, folder: Path, autoencoder: Autoencoder, count: int, side: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.autoencoder, self.count, self.side = autoencoder, count, side
        size = side // latents.FACTOR
        path = folder / f"fills-bright-{data.RENDERER}-{side}-{count}-{latents.digest(autoencoder.taesd_encoder)}"
        self.values = self._open(path, (count, 8, size, size), np.float16)
        self.boxes = self._open(path.with_name(path.name + "-boxes"), (count, 6), np.int16)
        self.blank = autoencoder.encode(torch.full((1, 3, side, side), 0.5))[0].half().numpy()

    def request(self, index: int) -> renderer.Request:
        return renderer.Request(train=True, count=0 if index % EMPTY_EVERY == 0 else None, bright_side=True)

    def hole(self, index: int) -> Hole:
        scene = renderer.render(self.request(index), self.side, self.side, index)
        rng = np.random.default_rng((index, 4))
        kind = int(rng.choice(3, p=SHARES)) if scene.objects else BOX if rng.random() < 0.5 else EVERYTHING
        if kind == OBJECT:
            chosen = int(rng.integers(len(scene.objects)))
            box = object_box(scene.objects[chosen], rng)
            return Hole(kind, box, without_shadow_outside(scene, chosen, box), scene, scene.objects[chosen].name)
        if kind == BOX:
            corners = [sorted(rng.choice(self.side + 1, 2, replace=False)) for _ in range(2)]
            box = (corners[0][0], corners[1][0], corners[0][1], corners[1][1])
        else:
            box = (0, 0, self.side, self.side)
        return Hole(kind, tuple(map(int, box)), scene.composite, scene, None)

    def batch(self, indices: np.ndarray, draw: int) -> Batch:
        """The scenes of these numbers; `draw` chooses among the prompts that fit."""
        missing = [int(i) for i in np.unique(indices) if not self.boxes[i].any()]
        for start in range(0, len(missing), latents.AT_ONCE):
            self._encode(missing[start : start + latents.AT_ONCE])
        values = torch.from_numpy(self.values[indices]).float()
        mask = torch.zeros(len(indices), self.side, self.side)
        for row, i in zip(mask, indices, strict=True):
            left, top, right, bottom = self.boxes[i][:4]
            row[top:bottom, left:right] = 1
        given = values[:, 4:]
        # A graph without an image gives zeros in its place.
        bare = torch.tensor([self.boxes[i][4] == EVERYTHING and (i + draw) % 2 == 0 for i in indices])
        given[bare] = 0
        cells = layering.alpha_cells(mask[:, None])
        prompts = [self.words(int(i), draw) for i in indices]
        return Batch(values[:, :4], torch.cat([given, cells], 1), cells.mean(1, keepdim=True), prompts)

    def words(self, index: int, draw: int) -> str:
        """The prompt of a scene, or, in half of the draws, of nothing but the object that is to be painted."""
        rng = np.random.default_rng((index, draw))
        kind, name = self.boxes[index][4], self.boxes[index][5]
        if kind == OBJECT and rng.random() < 0.5:
            return str(rng.choice(list(renderer.catalogue().values())[name].prompts))
        place, objects = self.content(index)
        if not objects:
            return f"{renderer.EMPTY} {rng.choice(renderer.PLACE_WORDS[place])}"
        return renderer.describe(place, objects, rng)

    @torch.no_grad()
    def _encode(self, indices: list[int]) -> None:
        holes = [self.hole(index) for index in indices]
        images = torch.from_numpy(np.stack([hole.image for hole in holes] + [gray(hole) for hole in holes]))
        device = next(self.autoencoder.parameters()).device
        images = rearrange(images, "b h w c -> b c h w").contiguous(memory_format=torch.channels_last)
        values = self.autoencoder.encode(images.to(device)).cpu().numpy()
        self.values[indices] = np.concatenate(np.split(values, 2), 1)
        names = list(renderer.catalogue())
        self.boxes[indices] = [[*hole.box, hole.kind, names.index(hole.name) if hole.name else -1] for hole in holes]


def object_box(
    shown: renderer.SceneObject, rng: np.random.Generator, shadowed: float = 0.75
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) around the object and, in the share `shadowed` of the draws, its shadow; each side
    grown by 5 to 35 % of the object's size.
    """
    side = np.array(shown.rgba.shape[1::-1] * 2)
    left, top, right, bottom = shown.box
    grow = rng.uniform(0.05, 0.35, 4) * (right - left + bottom - top) / 2
    if rng.random() < shadowed:
        rows, columns = np.nonzero(shown.shadow[..., 3] > SHADOW)
        if len(rows):
            left, right = min(left, columns.min()), max(right, columns.max() + 1)
            top, bottom = min(top, rows.min()), max(bottom, rows.max() + 1)
    box = np.array([left - grow[0], top - grow[1], right + grow[2], bottom + grow[3]])
    return tuple(int(value) for value in np.clip(np.round(box), 0, side))


def without_shadow_outside(scene: renderer.Scene, chosen: int, box: tuple[int, int, int, int]) -> np.ndarray:
    """[H,W,3]: the scene whose object `chosen` casts its shadow inside the box alone, fading out towards its edge."""
    height, width = scene.depth.shape
    left, top, right, bottom = box
    inside = [
        # A box that ends with the image does not cut there.
        _ramp(size, low if low else -size, high if high < size else 2 * size, 0.12 * (high - low))
        for low, high, size in ((top, bottom, height), (left, right, width))
    ]
    fade = inside[0][:, None] * inside[1][None]
    image = scene.background
    for i, shown in enumerate(scene.objects):
        shadow = shown.shadow
        if i == chosen:
            shadow = np.concatenate([shadow[..., :3], shadow[..., 3:] * fade[..., None]], -1)
        image = renderer.over(shown.rgba, renderer.over(shadow, image))
    return image.astype(np.float32)


def _ramp(size: int, low: int, high: int, length: float) -> np.ndarray:
    """[size]: 0 outside low..high, rising to 1 within `length` pixels."""
    places = np.arange(size, dtype=np.float32) + 0.5
    return np.clip(np.minimum(places - low, high - places) / max(length, 1), 0, 1)


def gray(hole: Hole) -> np.ndarray:
    """[S,S,3] with mid gray in the box, as ComfyUI's inpainting nodes prepare an image."""
    image = hole.image.copy()
    left, top, right, bottom = hole.box
    image[top:bottom, left:right] = 0.5
    return image


def build(config: dict) -> nn.Module:
    torch.manual_seed(config["seed"])
    return flux.build(settings.family()["flux"])


def loss_of(model: nn.Module, batch: Batch, words: Words, config: dict, rng: np.random.Generator) -> dict[str, Tensor]:
    """Squared error of the velocity, counted less outside the hole; a share `empty_prompt` of the prompts is left out.

    Scalars: what is minimised, and the plain error inside the hole.
    Source: bfs, Eq. 5 (one branch)
    Source: cfg, Alg. 1 (training with prompts left out)
    Differs: sigma is the sigmoid of a normal number, and what lies outside the hole counts `outside_weight`.
    Differs: a larger image needs more noise to hide the same, by the ratio of the sides (SD3's shift).
    """
    device, size = next(model.parameters()).device, len(batch.prompts)
    mean = config["sigma_mean"] + math.log(batch.latent.shape[-1] * latents.FACTOR / SIDE)
    sigma = torch.from_numpy(rng.normal(mean, config["sigma_deviation"], size)).float().sigmoid()
    noise = torch.from_numpy(rng.standard_normal(batch.latent.shape, np.float32))
    kept = rng.random(size) >= config["empty_prompt"]
    states, pooled = words([prompt if keep else "" for prompt, keep in zip(batch.prompts, kept, strict=True)])
    noisy = formulas.flow_noise(batch.latent, noise, sigma)
    predicted = flux.predict(model, *(part.to(device) for part in (noisy, batch.condition, sigma, states, pooled)))
    error = (predicted - formulas.flow_velocity(batch.latent, noise).to(device)).square()
    inside = batch.weight.to(device)
    outside = config["outside_weight"]
    return {
        "loss": (error * (outside + (1 - outside) * inside)).mean(),
        "error": (error * inside).sum().detach() / (inside.sum() * error.shape[1]),
    }


@torch.no_grad()
def sample(
    model: nn.Module,
    condition: Tensor,
    prompts: list[str],
    words: Words,
    steps: int = 20,
    guidance: float = 3.0,
    seed: int = 0,
) -> Tensor:
    """[B,4,h,w] of B prompts, for conditions [B,68,h,w]."""
    device = next(model.parameters()).device
    noise = torch.randn(len(prompts), 4, *condition.shape[2:], generator=torch.Generator().manual_seed(seed))
    states, pooled = (part.to(device) for part in words(prompts + [""] * len(prompts)))
    given = torch.cat([condition] * 2).to(device)

    def velocity(latent: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return flux.predict(model, torch.cat([latent] * 2), given, torch.cat([sigma] * 2), states, pooled).chunk(2)

    return sampling.euler(velocity, noise.to(device), steps, guidance)


def train(config: dict, folder: Path, minutes: float | None, save_every: float) -> nn.Module:
    encoder, autoencoder = published.checkpoint()
    words = Words(encoder, settings.family()["flux_tokens"])
    pool = FillPool(folder.parent / "scenes", autoencoder, config["scenes"], config["side"])
    pools = [(pool, config["batch"])]
    if smaller := config.get("smaller_side"):  # takes turns, so that it is not forgotten, with as many tokens
        many = config["batch"] * config["side"] ** 2 // smaller**2
        pools.append((FillPool(folder.parent / "scenes", autoencoder, config["smaller_scenes"], smaller), many))
    last = np.arange(config["scenes"] - CHECK, config["scenes"])

    def loss(model, step, rank):
        rng = np.random.default_rng((config["seed"], step, rank))
        own, batch = pools[step % len(pools)]
        known = data.known_at(step, own.count - CHECK, config["scenes_per_step"])
        return loss_of(model, own.batch(rng.integers(0, known, batch), step), words, config, rng)

    @torch.no_grad()
    def validate(model, step):
        """The error on kept scenes, and 32 images judged: 16 holes in kept scenes, and 16 from words alone."""
        report = {}
        for part in last.reshape(2, -1):
            terms = loss_of(model, pool.batch(part, 0), words, {**config, "empty_prompt": 0}, np.random.default_rng(0))
            report = {key: report.get(key, 0) + value.item() / 2 for key, value in terms.items()}
        holes = [i for i in last if pool.boxes[i][4] == OBJECT][:16]
        batch = pool.batch(np.array(holes), 0)
        known = [entry for entry in renderer.catalogue().values() if not entry.held_out]
        asked = [(known[7 * i % len(known)], renderer.KINDS[i % len(renderer.KINDS)]) for i in range(32 - len(holes))]
        prompts = [f"{entry.prompts[0]} {renderer.PLACE_WORDS[kind][0]}" for entry, kind in asked]
        bare = torch.cat([torch.zeros_like(batch.condition[:1, :4]), torch.ones_like(batch.condition[:1, 4:])], 1)
        condition = torch.cat([batch.condition, bare.expand(len(asked), -1, -1, -1)])
        drawn = sample(model, condition, batch.prompts + prompts, words, steps=12)
        images = autoencoder.decode(drawn.cpu()).clamp(0, 1)
        loop.save_grid(folder / "grid.png", images, 8)
        names = [[list(renderer.catalogue())[pool.boxes[i][5]]] for i in holes] + [[entry.name] for entry, _ in asked]
        places = [pool.content(int(i))[0] for i in holes] + [kind for _, kind in asked]
        place, shown = oracle.load().text_agreement(images, places, names)
        report |= {"place": place.mean().item(), "filled": shown[: len(holes)].mean().item()}
        report |= {"drawn": shown[len(holes) :].mean().item()}
        print(f"step {step}: " + "  ".join(f"{key} {value:.4g}" for key, value in report.items()), flush=True)
        return report

    model = build(config)
    if config["start"] == "published":
        model.load_state_dict(published.flux_fill().state_dict())
    elif config["start"] and not (folder / "last").exists():
        loop.start_from(model, folder.parent / config["start"] / "model.safetensors")
    return loop.fit(model, loss, validate, config, folder, minutes, save_every)
