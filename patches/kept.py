"""Objects that travel in a model's options and are shared by all clones of the model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

LEVEL = 1e-4  # noise levels that differ less, relatively, are one: samplers compute them again through logarithms


class Kept:
    """An object that is not copied. ComfyUI deep-copies the options whenever a model is cloned: weights would be copied
    that it does not manage, and a record would be lost.
    """

    def __deepcopy__(self, memo: dict):
        return self


@dataclass
class Record(Kept):
    """Maps of a run by noise level, the first of each: samplers that call the model twice a step, and patches that call
    it once more (PAG, say), add nothing to what one entry a step shows.
    """

    levels: dict[float, Tensor] = field(default_factory=dict)
    schedule: Tensor | None = None

    def add(self, maps: Tensor, options: dict) -> None:
        """options: the transformer options of the call."""
        self.schedule = options.get("sample_sigmas")
        self.levels.setdefault(float(options["sigmas"].max()), maps.cpu())

    @property
    def steps(self) -> list[Tensor]:
        """One entry a step; of a sampler that chooses its own noise levels (dpm_adaptive), one a level."""
        if self.schedule is None:
            return list(self.levels.values())
        nearest = [min(self.levels, key=lambda level: abs(level - sigma)) for sigma in self.schedule.tolist()]
        planned = [
            self.levels[level]
            for level, sigma in zip(nearest, self.schedule.tolist(), strict=True)
            if math.isclose(level, sigma, rel_tol=LEVEL)
        ]
        return planned if len(planned) > 1 else list(self.levels.values())
