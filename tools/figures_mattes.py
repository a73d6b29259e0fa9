"""The shipped LayeringDiff with alphas that are not exact: what a mask that is too small or too large costs, what one
of a quarter of the resolution does, as segmenters give them, and how much of it Matte foreground mends.

Errors are absolute differences times 1000, as in figures_decompose.py; `object left` is the share of the object's
colour that is still in the background, in percent: 0 is gone, 100 is all of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from figures_decompose import STEPS, opened, scene_of, truth_of
from mini_models import OUTPUT
from strata.nodes.decompose import METHODS, MatteForeground
from strata.patches import decomposer, detection
from strata.techniques import metrics
from strata.training import loop

COUNT, SAMPLE = 16, 0  # a quarter of an hour; figures_decompose.py has the sample of the same pipeline
FROM = 1100  # behind the seeds of figures_decompose.py
AT_ONCE = 8  # scenes
SEEN = 0.1  # alpha from which a person would mark a pixel
RIM = 4  # pixels around the object's outline, to either side
EXACT, OUTLINE, WIDE, COARSE = "exact", "outline", "outline, 2 px larger", "outline at a quarter of the resolution"
PAIRS = [(name, EXACT) for name in ("1 px smaller", "1 px larger", "2 px larger", OUTLINE)]
PAIRS += [(f"{OUTLINE}, matte", OUTLINE), (f"{COARSE}, matte", COARSE), (f"{WIDE}, matte", f"{OUTLINE}, matte")]
CLAIMS = [
    (*pair, figure)
    for pair in PAIRS
    for figure in ("hidden background", "object over gray at its edge", "object left at its edge, percent")
]


def larger(alpha: torch.Tensor, pixels: int) -> torch.Tensor:
    """[B,1,H,W], grown by so many pixels; below 0 shrunk."""
    if pixels < 0:
        return 1 - larger(1 - alpha, -pixels)
    return F.max_pool2d(alpha, 2 * pixels + 1, 1, pixels)


def coarse(mask: torch.Tensor) -> torch.Tensor:
    """As segmenters make them: found at a quarter of the resolution, enlarged and cut at a half."""
    enlarged = F.interpolate(F.avg_pool2d(mask, 4), scale_factor=4, mode="bilinear", align_corners=False)
    return (enlarged > 0.5).float()


def alphas_of(image: torch.Tensor, alpha: torch.Tensor) -> dict[str, torch.Tensor]:
    """Alphas [B,1,H,W] of images [B,3,H,W] by what was done to the exact one."""
    found = {EXACT: alpha}
    found |= {f"{pixels} px smaller": larger(alpha, -pixels) for pixels in (1, 2, 3)}
    found |= {f"{pixels} px larger": larger(alpha, pixels) for pixels in (1, 2, 3)}
    outline = (alpha > SEEN).float()
    masks = {OUTLINE: outline, COARSE: coarse(outline)}
    unused = detection.MATTING.choices()[0]
    mattes = {}
    for name, mask in {**masks, WIDE: larger(outline, 2)}.items():
        matte = MatteForeground.execute(image.movedim(1, -1), mask[:, 0], False, METHODS[0], unused, 2.5, 0, "off")
        mattes[f"{name}, matte"] = matte[0][:, None]
    return found | masks | mattes


@torch.inference_mode()
def measure(seeds: range) -> dict[str, dict[str, list[float]]]:
    family, judge, model, loaded = opened()
    found: dict[str, dict[str, list[float]]] = {}
    for start in range(seeds.start, seeds.stop, AT_ONCE):
        scenes = [scene_of(seed) for seed in range(start, min(start + AT_ONCE, seeds.stop))]
        image, front, behind, alpha = map(torch.cat, zip(*map(truth_of, scenes), strict=True))
        objects = [judge.objects.index(scene.objects[-1].name) for scene in scenes]
        run, shown = decomposer.Run(start, STEPS, "ddim", "ddim_uniform"), [image]
        for name, given in alphas_of(image, alpha).items():
            (made,), rest = decomposer.take_apart(model, family.vae, loaded, image, given[None], run, align=False)
            figures = figures_of(judge, objects, image, front, behind, alpha, given, made, rest)
            for figure, values in figures.items():
                found.setdefault(name, {}).setdefault(figure, []).extend(values.tolist())
            shown.append(rest)
        if start == seeds.start:
            rows = torch.stack(shown, 1).flatten(0, 1)
            loop.save_grid(OUTPUT / "mattes.png", rows, len(shown))
    return found


def figures_of(judge, objects, image, front, behind, alpha, given, made, rest) -> dict[str, torch.Tensor]:
    """[B] each: of the foreground `made` with its alpha `given` and the background `rest`."""
    hidden, partly = (alpha > 0.95).float(), ((alpha > 0.02) & (alpha <= 0.95)).float()
    outline = (alpha > SEEN).float()
    rim = larger(outline, RIM) - larger(outline, -RIM)
    around = rim * (alpha <= 0.02)
    thousand = {
        "alpha, around the edge": metrics.mask_error(given, alpha, rim),
        "hidden background": metrics.mask_error(rest, behind, hidden),
        "background partly covered": metrics.mask_error(rest, behind, partly * (1 - alpha)),
        "background just around the object": metrics.mask_error(rest, behind, around),
        "foreground partly covered": metrics.mask_error(made, front, partly * alpha),
        "object over gray at its edge": metrics.mask_error(given * (made - 0.5), alpha * (front - 0.5), rim),
        "perceptual distance": judge.distance(rest, behind),
    }
    _, logits = judge.logits(rest)
    return {
        **{name: 1000 * values for name, values in thousand.items()},
        "object left, percent": 100 * left(image, behind, rest, torch.ones_like(rim)),
        "object left at its edge, percent": 100 * left(image, behind, rest, rim),
        "object still seen": (logits[torch.arange(len(objects)), objects] > 0).float(),
    }


def left(image, behind, rest, where) -> torch.Tensor:
    """[B]: share of the image that best explains, by least squares, how the background differs from the true one."""
    whole = (image - behind) * where
    return ((rest - behind) * whole).flatten(1).sum(1) / whole.square().flatten(1).sum(1)
