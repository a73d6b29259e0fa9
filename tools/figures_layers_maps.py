"""DreamLayer's ablation of its context maps (D.1): until when objects take over the whole picture's layout, T_G, with
the trained modules. Figures and rows of pictures are those of figures_layers.py, in output/layers_maps.png.
"""

from __future__ import annotations

import figures_layers
from figures_layers import SAME
from strata.patches.shared_layers import Maps

COUNT, SAMPLE = 16, 0  # figures_layers.py has the sample
FROM = 1100  # behind its seeds
PUBLISHED = "trained, T_G 850"
METHODS = {
    "trained, no maps": (1, Maps(0), SAME),
    **{f"trained, T_G {moment}": (1, Maps(end_percent=1 - moment / 1000), SAME) for moment in (950, 850, 700, 500)},
}
CLAIMS = [
    (PUBLISHED, other, figure)
    for other in METHODS
    if other != PUBLISHED
    for figure in ("layers to whole", "objects seen in the layers", "overlap")
]


def measure(seeds: range) -> dict[str, dict[str, list[float]]]:
    return figures_layers.measure(seeds, METHODS, grid="layers_maps")
