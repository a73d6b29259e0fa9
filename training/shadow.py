"""Trains BFS's shadow network: the mini Flux-Fill with a low-rank adapter and a wider first layer, which draws the
shadow of an object that stands on white.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn

from ..networks import flux
from ..networks.autoencoder import Autoencoder
from ..scenes import renderer
from ..techniques import back_to_front as formulas
from ..techniques import diffusion, layering
from . import data, latents, loop, published, sampling, settings
from .flux_fill import Words

CHECK = 32  # the last objects of the pool are kept for validation
SHOWN = 8  # of them are drawn
CAPTION = ""


@dataclass(frozen=True)
class Batch:
    """plain, shadowed: latents [B,4,h,w] of the object on white, without and with its shadow. alpha: [B,1,H,W] of the
    object alone.
    """

    plain: Tensor
    shadowed: Tensor
    alpha: Tensor


class Objects(data.ScenePool):
    """Object i on white, encoded when first asked for and kept on disk; another encoder starts anew."""

    def __init__(self, folder: Path, autoencoder: Autoencoder, count: int, side: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.autoencoder, self.count, self.side = autoencoder, count, side
        size = side // latents.FACTOR
        path = folder / f"shadows-{data.RENDERER}-{side}-{count}-{latents.digest(autoencoder.taesd_encoder)}"
        self.values = self._open(path, (count, 2, 4, size, size), np.float16)
        self.alphas = self._open(path.with_name(path.name + "-alphas"), (count, side, side))

    def request(self, index: int) -> renderer.Request:
        return renderer.Request(train=True, count=1)

    def object(self, index: int) -> renderer.SceneObject:
        return renderer.render(self.request(index), self.side, self.side, index).objects[0]

    def batch(self, indices: np.ndarray) -> Batch:
        missing = [int(i) for i in np.unique(indices) if not self.values[i].any()]
        for start in range(0, len(missing), latents.AT_ONCE):
            self._encode(missing[start : start + latents.AT_ONCE])
        plain, shadowed = torch.from_numpy(self.values[indices]).float().unbind(1)
        return Batch(plain, shadowed, data.to_tensor(self.alphas[indices][..., None]))

    @torch.no_grad()
    def _encode(self, indices: list[int]) -> None:
        found = [self.object(index) for index in indices]
        images = np.stack([part for shown in found for part in on_white(shown)])
        values = self.autoencoder.encode(rearrange(torch.from_numpy(images), "b h w c -> b c h w").float())
        self.alphas[indices] = np.round(np.stack([shown.rgba[..., 3] for shown in found]) * 255)
        self.values[indices] = rearrange(values, "(b two) c h w -> b two c h w", two=2).cpu().numpy()


def on_white(shown: renderer.SceneObject) -> tuple[np.ndarray, np.ndarray]:
    """[S,S,3]: the object on white without and with its shadow, which is black there: white has no colour to give."""
    white = np.ones_like(shown.rgba[..., :3])
    return renderer.over(shown.rgba, white), renderer.over(shown.rgba, white * (1 - shown.shadow[..., 3:]))


class Shadow(nn.Module):
    """A Flux-Fill with low-rank terms on the layers of its blocks, and a first layer that sees the object too.

    caption: states [1,T,D] and pooled [1,D] of the text.
    Source: bfs, A.4 (the shadow generation network)
    Differs: on a Flux-Fill, whose own mask is empty, in place of Flux.1-dev; and with the empty prompt, since the mini
    family does not know the words "Realistic image with natural shadow".
    """

    def __init__(self, base: nn.Module, rank: int, caption: tuple[Tensor, Tensor]):
        from peft import LoraConfig, inject_adapter_in_model

        super().__init__()
        self.transformer = copy.deepcopy(base).requires_grad_(False)
        targets = flux.linear_layers(self.transformer)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), self.transformer)
        old = self.transformer.x_embedder
        further = 2 * base.config.out_channels  # the object on white, and its mask as often as a latent has channels
        first = self.transformer.x_embedder = nn.Linear(old.in_features + further, old.out_features)
        with torch.no_grad():
            first.weight.copy_(F.pad(old.weight, (0, further)))
            first.bias.copy_(old.bias)
        self.register_buffer("text", caption[0], persistent=False)
        self.register_buffer("pooled", caption[1], persistent=False)

    def forward(self, noisy: Tensor, condition: Tensor, sigma: Tensor) -> Tensor:
        """The velocity [B,4,h,w] of noisy [B,4,h,w] at sigma [B]; condition: [B,76,h,w], see condition_of."""
        count = len(noisy)
        given = self.text.expand(count, -1, -1), self.pooled.expand(count, -1)
        return flux.predict(self.transformer, noisy, condition, sigma, *given)


def condition_of(image: Tensor, plain: Tensor, alpha: Tensor) -> Tensor:
    """[B,76,h,w] of latents [B,4,h,w] of the image without the shadow and of the object on white, and the object's
    alpha [B,1,H,W].

    Source: bfs, A.4 (the input layer that takes the image and the mask)
    """
    small = F.avg_pool2d(alpha, latents.FACTOR)
    nothing = torch.zeros_like(layering.alpha_cells(alpha))  # the Flux-Fill's own mask: it starts by keeping the image
    return torch.cat([image, nothing, plain, small.expand_as(plain)], 1)


def loss_of(model: Shadow, batch: Batch, config: dict, rng: np.random.Generator) -> dict[str, Tensor]:
    """Squared error of the velocity; a scalar.

    Source: bfs, A.4 (the loss of the shadow network)
    Differs: the flow loss, as the author's earlier trainer has it, where the text says l2 of images; and the second of
    the two stages alone, in which the image without the shadow is the object on white itself.
    """
    device = next(model.parameters()).device
    sigma = torch.from_numpy(rng.normal(config["sigma_mean"], config["sigma_deviation"], len(batch.plain)))
    sigma = sigma.float().sigmoid()
    noise = torch.from_numpy(rng.standard_normal(batch.plain.shape, np.float32))
    given = diffusion.flow_noise(batch.shadowed, noise, sigma), condition_of(batch.plain, batch.plain, batch.alpha)
    predicted = model(*(part.to(device) for part in (*given, sigma)))
    return {"loss": (predicted - diffusion.flow_velocity(batch.shadowed, noise).to(device)).square().mean()}


@torch.no_grad()
def sample(model: Shadow, plain: Tensor, alpha: Tensor, steps: int, seeds: Sequence[int]) -> Tensor:
    """Latents [B,4,h,w] of objects with their shadow, from those of the objects on white and their alpha [B,1,H,W].
    seeds: of each row's noise.
    """
    device = next(model.parameters()).device
    noise = torch.stack([torch.randn(plain.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    condition = condition_of(plain, plain, alpha).to(device)

    def velocity(latent: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return (model(latent, condition, sigma),) * 2

    return sampling.euler(velocity, noise.to(device), steps, guidance=1.0).cpu()


def build(config: dict) -> Shadow:
    torch.manual_seed(config["seed"])
    return Shadow(
        published.flux_fill(),
        config["rank"],
        Words(published.checkpoint()[0], settings.family()["flux_tokens"])([CAPTION]),
    )


def load(folder: Path) -> Shadow:
    """The trained network, frozen. Raises TrainingError when there is none."""
    if not (folder / "model.safetensors").exists():
        raise settings.TrainingError(f"{folder} has no model; train it first: python -m training shadow.")
    model = build(json.loads((folder / "config.json").read_text()))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval().requires_grad_(False)


def train(config: dict, folder: Path, minutes: float | None, save_every: float) -> nn.Module:
    autoencoder = published.checkpoint()[1]
    pool = Objects(folder.parent / "scenes", autoencoder, config["scenes"], config["side"])
    last = np.arange(config["scenes"] - CHECK, config["scenes"])

    def loss(model, step, rank):
        rng = np.random.default_rng((config["seed"], step, rank))
        known = data.known_at(step, config["scenes"] - CHECK, config["scenes_per_step"])
        return loss_of(model, pool.batch(rng.integers(0, known, config["batch"])), config, rng)

    @torch.no_grad()
    def validate(model, step):
        """The error on kept objects, and how far the opacity of what is drawn is from the truth."""
        batch = pool.batch(last)
        report = {"error": loss_of(model, batch, config, np.random.default_rng(0))["loss"].item()}
        drawn = sample(model, batch.plain[:SHOWN], batch.alpha[:SHOWN], 12, range(SHOWN))
        pictures = [autoencoder.decode(part).clamp(0, 1) for part in (drawn, batch.shadowed[:SHOWN])]
        shown = [pool.object(int(i)) for i in last[:SHOWN]]
        rgba, true = (
            rearrange(torch.from_numpy(np.stack(part)), "b h w c -> b c h w")
            for part in ([one.rgba for one in shown], [one.rgba_with_shadow[..., 3:] for one in shown])
        )
        alpha = rgba[:, 3:]
        for name, picture in zip(("opacity", "opacity, true latents"), pictures, strict=True):
            found = formulas.opacity_with_shadow(rgba[:, :3] * alpha, picture, alpha)
            report[name] = (found - true).abs().mean().item()
        report["opacity without shadow"] = (alpha - true).abs().mean().item()
        loop.save_grid(folder / "grid.png", torch.cat(pictures), SHOWN)
        print(f"step {step}: " + "  ".join(f"{key} {value:.4g}" for key, value in report.items()), flush=True)
        return report

    return loop.fit(build(config), loss, validate, config, folder, minutes, save_every)
