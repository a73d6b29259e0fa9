"""DreamLayer's Tab. 4: the range (T_H', T_H) in which layers are put back while their composite is denoised, as the
paper's own pixels (detail 0) and with the background's own texture (detail 10).

A range of timesteps of 1000; the mini family's noise levels are SD1.5's. The pictures go to output/harmonize_range.png,
one row a scene: plain stacking, the columns in their order, truth.
"""

from __future__ import annotations

import torch
from figures_harmonize import band, harmonised, scene_of, stacked
from mini_models import OUTPUT, Family, picture
from strata.techniques import metrics
from strata.training import loop

COUNT, SAMPLE = 10, 0  # figures_harmonize.py has the sample
FROM = 1100  # behind its seeds
RANGES = ((200, 0), (400, 200), (600, 400), (800, 600))
COLUMNS = {
    f"{high}, {low}; detail {detail}": {
        "start_percent": 1 - high / 1000,
        "end_percent": 1 - low / 1000,
        "detail": float(detail),
    }
    for detail in (0, 10)
    for high, low in RANGES
}
STACKED = "0, 0: plain stacking"
CLAIMS = [(column, STACKED, "shadow band") for column in COLUMNS]


@torch.inference_mode()
def measure(seeds: range) -> dict[str, dict[str, list[float]]]:
    """{range: {figure: one value a seed}}"""
    family, rows, found = Family(), [], {column: {} for column in (STACKED, *COLUMNS)}
    for seed in seeds:
        scene = scene_of(seed, 1 + seed % 3)
        truth, ground = picture(scene.composite), torch.from_numpy(scene.masks[:1])[None]
        images = {STACKED: stacked(scene)[1]}
        for column, settings in COLUMNS.items():
            images[column] = harmonised(family, scene, **settings)[0]
        for column, image in images.items():
            for figure, value in {
                "shadow band": metrics.mask_error(image, truth, band(scene)),
                "background elsewhere": metrics.mask_error(image, truth, ground * (1 - band(scene))),
            }.items():
                found[column].setdefault(figure, []).append(value.item())
        rows.append(torch.cat([*images.values(), truth]))
    loop.save_grid(OUTPUT / "harmonize_range.png", torch.cat(rows[:12]), len(rows[0]))
    return found
