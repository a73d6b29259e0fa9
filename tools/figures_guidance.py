"""FeatGLaC's ablations of its guidance (Fig. 12) on other pairs of figures_composition.py's kind: until when it guides,
by which levels of the decoder (the mini family's has three; the last one is the finest), and how strongly the object's
scene counts.

The pictures go to output/guidance.png, one row a pair: photo, new place, the settings in their order, truth.
"""

from __future__ import annotations

import torch
from figures_composition import CFG, decoded, figures_of, guided, inverted
from mini_models import OUTPUT, Family
from strata.patches.feature_guidance import Plane, Planes, Settings
from strata.training import loop, oracle

COUNT, SAMPLE = 8, 0  # figures_composition.py has the sample
FROM = 1300  # behind its seeds
PUBLISHED = "as published"
COLUMNS = {
    PUBLISHED: Settings(),
    "steps 0 to 20": Settings(end_percent=0.4),
    "all steps": Settings(end_percent=1.0),
    "last level but one alone": Settings(level_weights="0.2, 0"),
    "last level alone": Settings(level_weights="8.5"),
    "all levels": Settings(level_weights="8.5, 8.5, 8.5"),
    "lambda 0.2": Settings(foreground=0.2),
}
CLAIMS = [(PUBLISHED, other, figure) for other in list(COLUMNS)[1:] for figure in ("features", "object", "shadow band")]


@torch.inference_mode()
def measure(seeds: range) -> dict[str, dict[str, list[float]]]:
    """{setting: {figure: one value a seed}}, as in figures_composition.py."""
    judge, family, rows, found = oracle.load(), Family(), [], {column: {} for column in COLUMNS}
    for seed in seeds:
        shown, (back, front), positive = inverted(family, seed)
        planes = Planes((Plane(back), Plane(front, (shown["alpha"][0, 0] > 0.5).float())))
        made = decoded(family, [guided(family, planes, positive, CFG, settings) for settings in COLUMNS.values()])
        for figure, one in figures_of(judge, made, shown).items():
            for column, value in zip(COLUMNS, one.tolist(), strict=True):
                found[column].setdefault(figure, []).append(value)
        rows.append(torch.cat([shown["photo"], shown["place"], made, shown["truth"]]))
    loop.save_grid(OUTPUT / "guidance.png", torch.cat(rows), len(rows[0]))
    return found
