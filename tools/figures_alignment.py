"""Fig. 3 of LayeringDiff: its network that aligns the background, trained from nothing with three losses on the same
samples of the shipped FBDD, and the backgrounds that they then give on scenes of other seeds.

As in the paper, with the visible pixels copied and without `exact`. Errors are absolute differences times 1000.
"""

from __future__ import annotations

import comfy.sample
import torch
from figures_decompose import SIDE, opened, scene_of, truth_of
from mini_models import OUTPUT
from strata.networks.alignment import Alignment
from strata.patches import decomposer
from strata.scenes import renderer
from strata.techniques import layering, metrics
from strata.training import loop

COUNT, SAMPLE = 32, 0  # it trains, so that there is no quick sample
FROM = 1200  # behind the seeds of figures_decompose.py and figures_mattes.py
PAIRS, STEPS, BATCH, CROP, RATE = 160, 400, 4, 64, 1e-3
WIDTHS = (24, 48, 96)  # as shipped
AT_ONCE = 8  # scenes
PLAIN, REGIONS, PAPER, NONE = "MSE", "region-wise MSE", "MSE and high frequencies (Eq. 2)", "no alignment"
CLAIMS = [
    (PAPER, other, figure)
    for other in (PLAIN, REGIONS, NONE)
    for figure in ("hidden background", "seam where hidden begins", "perceptual distance")
]


def loss_of(name: str, prediction, truth, decoded, alpha) -> torch.Tensor:
    """A scalar: prediction, truth and what FBDD decoded [B,3,H,W], alpha [B,1,H,W]."""
    if name == PAPER:
        return layering.background_loss(prediction, truth, decoded)
    aim = torch.where(alpha >= layering.OPAQUE, decoded, truth) if name == REGIONS else truth
    return (prediction - aim).square().mean()


def measure(seeds: range) -> dict[str, dict[str, list[float]]]:
    family, judge, model, loaded = opened()
    networks = trained(samples(family, model, loaded, [train_scene(index) for index in range(PAIRS)], 10))
    found: dict[str, dict[str, list[float]]] = {}
    for start in range(seeds.start, seeds.stop, AT_ONCE):
        scenes = [scene_of(seed) for seed in range(start, min(start + AT_ONCE, seeds.stop))]
        image, truth, alpha, decoded = samples(family, model, loaded, scenes, 20, start)
        shown = [image]
        for name in (NONE, PLAIN, REGIONS, PAPER):
            with torch.no_grad():
                made = decoded if name == NONE else networks[name](image, alpha, decoded).clamp(0, 1)
                _, made = layering.copy_visible(image, alpha, made, made)
                for figure, values in figures_of(judge, made, truth, alpha).items():
                    found.setdefault(name, {}).setdefault(figure, []).extend(values.tolist())
            shown.append(made)
        if start == seeds.start:
            loop.save_grid(OUTPUT / "alignment.png", torch.stack([*shown, truth], 1).flatten(0, 1), len(shown) + 1)
    return found


def train_scene(index: int) -> renderer.Scene:
    return renderer.render(renderer.Request(train=True), SIDE, SIDE, index)


@torch.no_grad()
def samples(family, model, loaded, scenes, steps: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Images, true backgrounds [N,3,H,W], alphas [N,1,H,W] and what FBDD draws of the backgrounds, in 0..1."""
    image, _, behind, alpha = (torch.cat(part) for part in zip(*map(truth_of, scenes), strict=True))
    decoded = []
    for number, (some, cut) in enumerate(zip(image.split(AT_ONCE), alpha.split(AT_ONCE), strict=True)):
        latent = family.vae.encode(some.movedim(1, -1))
        clone = decomposer.denoiser(model, loaded, "background", latent, layering.alpha_cells(cut))
        prompt, noise = [[loaded.null, {}]], comfy.sample.prepare_noise(latent, seed + number)
        drawn = comfy.sample.sample(
            clone, noise, steps, 1.0, "ddim", "ddim_uniform", prompt, prompt, torch.zeros_like(latent), seed=seed
        )
        decoded.append(family.vae.decode(drawn)[..., :3].movedim(-1, 1).clamp(0, 1))
    return image, behind, alpha, torch.cat(decoded)


def trained(parts: tuple[torch.Tensor, ...]) -> dict[str, Alignment]:
    """A network for each loss; all begin alike and see the same cuts in the same order."""
    networks = {}
    for name in (PLAIN, REGIONS, PAPER):
        torch.manual_seed(0)
        network = networks[name] = Alignment(WIDTHS)
        optimizer = torch.optim.Adam(network.parameters(), RATE)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.02, STEPS)
        for _ in range(STEPS):
            rows = torch.randint(PAIRS, (BATCH,))
            top, left = torch.randint(SIDE - CROP + 1, (2,)).tolist()
            image, truth, alpha, decoded = (
                part[rows][..., top : top + CROP, left : left + CROP].float() for part in parts
            )
            loss = loss_of(name, network(image, alpha, decoded), truth, decoded, alpha)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"{name}: trained, last loss {loss.item():.5f}", flush=True)
    return networks


def figures_of(judge, made, truth, alpha) -> dict[str, torch.Tensor]:
    """[B] each."""
    hidden = (alpha > 0.95).float()
    within = (torch.nn.functional.avg_pool2d(hidden, 2) == 1).float()
    own, true = (layering.haar_bands(one, 1)[0].abs().mean((1, 2))[:, None] for one in (made, truth))
    details = [(one * within).flatten(1).sum(1) for one in (own, true)]
    return {
        "hidden background": 1000 * metrics.mask_error(made, truth, hidden),
        "seam where hidden begins": 1000 * metrics.seam_error(made, truth, hidden),
        "details where hidden, percent of the true": 100 * details[0] / details[1],
        "perceptual distance": 1000 * judge.distance(made, truth),
    }
