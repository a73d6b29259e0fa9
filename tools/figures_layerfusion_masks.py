"""LayerFusion's ablations of its masks on the mini family: both priors or one alone (Fig. 8c), and the coefficient of
the soft decision boundary (Fig. 8d), with the paper's soft entry. The pictures go to output/layerfusion_*.png.
"""

from __future__ import annotations

import figures_layerfusion
from strata.patches.fusion import Settings
from strata.techniques.fusion import CONTENT, STRUCTURE

COUNT, SAMPLE = 16, 0  # figures_layerfusion.py has the sample that shows that the files are the measured ones
FROM = 1200  # behind its seeds
COLUMNS = {
    "both priors, d 10": Settings(),
    STRUCTURE: Settings(priors=STRUCTURE),
    CONTENT: Settings(priors=CONTENT),
    "d 1": Settings(boundary=1.0),
    "d 20": Settings(boundary=20.0),
}
CLAIMS = [
    ("both priors, d 10", other, figure)
    for other in list(COLUMNS)[1:]
    for figure in ("iou", "layers to blended", "change by the place")
]


def measure(seeds: range) -> dict[str, dict[str, list[float]]]:
    return figures_layerfusion.measure(seeds, COLUMNS)
