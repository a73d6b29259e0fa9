"""Trains the RGBA autoencoder: the published one with a fourth channel, in the same latent space on opaque images.

A third of a batch are large objects, a third objects with their shadow, and a third opaque scenes, over which the
objects are laid.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from ..networks.autoencoder import Autoencoder, with_alpha
from ..scenes import renderer
from ..techniques import losses as formulas
from ..techniques import metrics
from ..techniques.layering import composite
from . import data, loop, published, settings
from .autoencoder import Joined
from .cutouts import HELD_OUT, CutOuts, checkerboard

SHADOW = 1 / 16  # alpha from which on a pixel counts as shadow
WEIGHTED = ("square", "gradient", "overlap", "hidden_colour", "latent", "range")
BACKGROUNDS = 8  # over which held-out objects are laid


def build(start: str | None = None) -> Joined:
    """The published autoencoder of colours, which does not see alpha yet and decodes every image as opaque; or, with
    start "published", the published one of RGBA.
    """
    model = Joined(image_channels=4)
    if start == "published":
        state = published.read(settings.MODELS / published.RGBA)[0]
        model.load_state_dict({key: state[key] for key in model.state_dict()})
    else:
        model.load_state_dict(with_alpha(published.checkpoint()[1].state_dict()))
    return model


def over(rgba: Tensor, below: Tensor) -> Tensor:
    """[B,4,H,W] laid over [B,3,H,W] of opaque images."""
    return composite(rgba[:, :3], below, rgba[:, 3:])


def losses(
    config: dict, decoded: Tensor, rgba: Tensor, below: Tensor, latent: Tensor, known: Tensor
) -> dict[str, Tensor]:
    """What is minimised, and its parts.

    decoded, rgba: [B,4,H,W] straight; below: [B,3,H,W] of backgrounds. latent: [B,C,h,w]; known: [K,C,h,w] of the last
    ones, which are opaque, from the encoder of colours. Colours count where they are seen, and hidden ones a little.
    Latents beyond `range` are drawn back, or alpha would stand out of the noise long before the colours do, and a
    diffusion model of these latents would choose an outline before it knows what it draws.
    Source: alphavae, the expectation of the squared error over random backgrounds, with an own term for alpha
    Differs: absolute and gradient differences over scenes in place of LPIPS and of a discriminator; latents that stay
    those of the autoencoder of colours, and in a range, in place of a KL term.
    """
    shown, wanted = over(decoded, below), over(rgba, below)
    alpha, true = decoded[:, 3:], rgba[:, 3:]
    terms = {
        "l1": (shown - wanted).abs().mean(),
        "square": formulas.expected_composite_error(decoded, rgba),
        "gradient": formulas.gradient_loss(shown, wanted),
        "alpha": (alpha - true).abs().mean(),
        "overlap": 1 - metrics.alpha_iou(alpha.clamp(0, 1), true).mean(),
        "hidden_colour": ((decoded[:, :3] - rgba[:, :3]).abs() * (1 - true)).mean(),
        "latent": (latent[-len(known) :] - known).square().mean(),
        "range": (latent.abs() - config["range"]).clamp_min(0).square().mean(),
    }
    weighted = [config[f"{name}_weight"] * terms[name] for name in WEIGHTED]
    return {"loss": terms["l1"] + terms["alpha"] + sum(weighted), **terms}


def opaque(image: Tensor) -> Tensor:
    """Colours [B,3,H,W] with alpha 1: [B,4,H,W]."""
    return nn.functional.pad(image, (0, 0, 0, 0, 0, 1), value=1.0)


def train(config: dict, folder: Path, minutes: float | None, save_every: float) -> Autoencoder:
    first = published.checkpoint()[1]
    root, count = folder.parent / "scenes", config["cutouts"]
    scenes = data.ScenePool(root, config["scenes"], config["side"])
    large = CutOuts(root, count, config["side"], config["longer_side"])
    standing = CutOuts(root, count, config["side"], None, shadows=1.0)

    def loss(model, step, rank):
        device = next(model.parameters()).device
        numbers = config["batch"], config["crop"], config["seed"], step, rank
        image, *cut = (pool.batch(*numbers).to(device) for pool in (scenes, large, standing))
        rgba = torch.cat([*cut, opaque(image)])
        # Files differ in the colours that they hide: those of ours run on, others are black, white or anything.
        rng = torch.Generator().manual_seed(step)
        plain = torch.rand(len(rgba), 3, 1, 1, generator=rng).mul(1.6).sub(0.3).clamp(0, 1).to(device)
        seen = torch.rand(len(rgba), 1, 1, 1, generator=rng).to(device) < 0.5
        given = torch.cat([torch.where(seen | (rgba[:, 3:] > 0), rgba[:, :3], plain), rgba[:, 3:]], 1)
        latent, decoded = model(given.contiguous(memory_format=torch.channels_last))
        with torch.no_grad():
            known = first.to(device).encode(image)
        return losses(config, decoded, rgba, torch.cat([image.roll(1, 0)] * 3), latent, known)

    check = Check(config["side"], large, standing, first, HELD_OUT)

    @torch.no_grad()
    def validate(model, step):
        report, shown = check(model)
        loop.save_grid(folder / "grid.png", shown, 8)
        print(f"step {step}: " + "  ".join(f"{key} {value.nanmean():.4g}" for key, value in report.items()), flush=True)
        return {key: value.nanmean().item() for key, value in report.items()}

    return loop.fit(build(config["start"]), loss, validate, config, folder, minutes, save_every)


class Check:
    """What an RGBA autoencoder makes of objects and scenes that are not trained, beside the one of colours.

    large: cut-outs as the transparency pair is judged by. standing: objects with their shadow, as they are in scenes.
    numbers: which of each; figures are taken from others than those that training watches.
    """

    def __init__(self, side: int, large: CutOuts, standing: CutOuts, colours: Autoencoder, numbers: range):
        self.large, self.standing = (
            rearrange(torch.from_numpy(np.stack([pool.render(i) for i in numbers])), "b h w c -> b c h w")
            for pool in (large, standing)
        )
        bare = [renderer.render(standing.request(i), side, side, i).objects[0].rgba[..., 3] for i in numbers]
        self.bare = torch.from_numpy(np.stack(bare))[:, None]
        self.scenes, self.colours = data.held_out(len(numbers), side, numbers.start), colours
        empty = [
            renderer.render(renderer.Request(kind=kind, count=0), side, side, numbers.start + i).composite
            for i, kind in enumerate(renderer.KINDS[:BACKGROUNDS])
        ]
        self.below = rearrange(torch.from_numpy(np.stack(empty)), "b h w c -> b c h w")

    def __call__(self, model: Joined) -> tuple[dict[str, Tensor], Tensor]:
        """Per object or scene, and a grid of 8 columns.

        iou: of the large objects' alphas. shadow: mean absolute error of alpha where the shadow alone is seen.
        composite: dB over eight backgrounds. scene: dB on scenes, beside scene_rgb of the autoencoder of colours.
        """
        device = next(model.parameters()).device

        def decoded(images: Tensor) -> Tensor:
            return torch.cat([model(part.to(device))[1].clamp(0, 1).cpu() for part in images.split(16)])

        found, standing = decoded(self.large), decoded(self.standing)
        shadow = (self.standing[:, 3:] > SHADOW) & (self.bare == 0)
        error = (standing[:, 3:] - self.standing[:, 3:]).abs() * shadow
        seen = shadow.sum((1, 2, 3)) > 0  # a flame has none
        scenes = decoded(opaque(self.scenes))
        colours = self.colours.decode(self.colours.encode(self.scenes.to(next(self.colours.parameters()).device)))
        composites = [
            formulas.psnr(over(one, below.expand_as(one[:, :3])), over(true, below.expand_as(one[:, :3])))
            for one, true in ((found, self.large), (standing, self.standing))
            for below in self.below[:, None]
        ]
        report = {
            "iou": metrics.alpha_iou(found[:, 3:], self.large[:, 3:]),
            "shadow": torch.where(seen, error.sum((1, 2, 3)) / shadow.sum((1, 2, 3)), torch.nan),
            "composite": torch.stack(composites).mean(0),
            "scene": formulas.psnr(scenes[:, :3], self.scenes),
            "scene_rgb": formulas.psnr(colours.clamp(0, 1).cpu(), self.scenes),
            "scene_alpha": scenes[:, 3].mean((1, 2)),
        }
        board = checkerboard(self.scenes.shape[-1]).expand(8, 3, -1, -1)
        rows = [over(found[:8], board), over(self.large[:8], board)]
        rows += [over(standing[:8], board), over(self.standing[:8], board), scenes[:8, :3], self.scenes[:8]]
        return report, torch.cat(rows)
