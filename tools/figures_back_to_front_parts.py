"""BFS's ablations that need no other training, in the spirit of its Fig. 5: the shipped file without one of its parts,
or sampled in another way. figures_back_to_front.py has it without information sharing, and the figures' meaning.

The pictures go to output/back_to_front_parts.png, one row a scene: background, each way's layer over it, truth.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from figures_back_to_front import FILE, NOISE, SIDE, Models, case_of, figures_of, over
from mini_models import OUTPUT
from strata.networks.back_to_front import CONTENT, PAIRINGS
from strata.patches import back_to_front as method
from strata.patches import layer_files
from strata.training import loop

COUNT, SAMPLE = 11, 0  # figures_back_to_front.py has the sample
FROM = 2200  # behind its seeds
WHOLE, SAME = "as shipped", "same noise for both"
BARE, HALF = "without content terms", "strength 0.5"
CLAIMS = [
    (WHOLE, other, figure)
    for other in (SAME, BARE, HALF, "other pairing of queries")
    for figure in (
        "named object",
        "alpha and what changed, IoU",
        "recomposed against its composite",
        "darkness of the shadow, error",
    )
]


def ways(models: Models) -> dict[str, tuple[object, str]]:
    """Model and noise of each column."""
    file = layer_files.load(FILE, layer_files.BackToFront)
    (other,) = set(PAIRINGS) - {file.pairing}
    bare = replace(file, content={branch: {} for branch in CONTENT})
    return {
        WHOLE: (models.coupled, NOISE),
        SAME: (models.coupled, "same for both"),
        BARE: (method.apply(models.fill, bare), NOISE),
        HALF: (method.apply(models.fill, file, 0.5), NOISE),
        "other pairing of queries": (method.apply(models.fill, file, layout=other), NOISE),
    }


def measure(seeds: range) -> dict[str, dict[str, list[float]]]:
    models = Models()
    return drawn(models, ways(models), seeds, "back_to_front_parts")


@torch.inference_mode()
def drawn(
    models: Models, columns: dict[str, tuple[object, str]], seeds: range, grid: str, side: int = SIDE
) -> dict[str, dict]:
    """Figures of each column's model and noise; pictures of the first twelve seeds go to output/<grid>.png."""
    shown, found = [], {}
    for seed in seeds:
        case, row = case_of(seed, side), []
        for column, (model, noise) in columns.items():
            pair = models.foreground(model, case, noise=noise)
            for figure, value in figures_of(models, case, *pair).items():
                found.setdefault(column, {}).setdefault(figure, []).append(value)
            row.append(over(pair[1], case.background))
        shown += [case.background, *row, case.image] if seed < seeds.start + 12 else []
    loop.save_grid(OUTPUT / f"{grid}.png", torch.cat(shown), 2 + len(columns))
    return found
