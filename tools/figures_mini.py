"""The shipped mini model: does the classifier see the place and the object of the prompt, for every object in every
place?
"""

from __future__ import annotations

from mini_models import MODELS, OUTPUT
from strata.training import family

COUNT, SAMPLE = 1, 0  # every pair once: 550 pictures; make test asks ComfyUI's own KSampler instead
CLAIMS = []


def measure(seeds: range) -> dict[str, dict[str, list[float]]]:
    found = family.agreement(MODELS, guidance=4.0, steps=20, side=128, report=OUTPUT / "mini.png", seed=seeds.start)
    return {"mini": {figure: values.tolist() for figure, values in found.items()}}
