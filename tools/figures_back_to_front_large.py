"""figures_back_to_front.py at 256 pixels, on fewer scenes: BFS alone, with and without its information sharing.

The pictures go to output/back_to_front_large.png, one row a scene: background, each one's layer over it, truth.
"""

from __future__ import annotations

from figures_back_to_front import APART, BFS, NOISE, Models
from figures_back_to_front_parts import drawn

COUNT, SAMPLE = 24, 0  # figures_back_to_front.py has the sample
FROM = 2400  # behind the seeds of figures_back_to_front_stages.py
CLAIMS = [
    (BFS, APART, figure)
    for figure in ("named object", "alpha and what changed, IoU", "recomposed against its composite")
]


def measure(seeds: range) -> dict[str, dict[str, list[float]]]:
    models = Models()
    columns = {BFS: (models.coupled, NOISE), APART: (models.apart, NOISE)}
    return drawn(models, columns, seeds, "back_to_front_large", 256)
