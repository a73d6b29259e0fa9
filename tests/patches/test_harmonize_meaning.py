"""What harmonising does on the trained mini family, against the rendered truth."""

import figures
import figures_harmonize
import numpy as np
import pytest
import torch
from mini_models import CHECKPOINT, Family

pytestmark = pytest.mark.skipif(not CHECKPOINT.exists(), reason="no trained weights: make mini")


def test_a_sample_agrees_with_the_table():
    figures.check("harmonize", figures_harmonize.measure(figures.sample(figures_harmonize)))


@torch.inference_mode()
def test_opaque_pixels_of_the_objects_stay():
    family = Family()
    for seed in range(3):
        scene = figures_harmonize.scene_of(seed, 1 + seed)
        made, plain = figures_harmonize.harmonised(family, scene)
        opaque = torch.from_numpy(np.max([item.rgba[..., 3] for item in scene.objects], 0) >= 1)
        assert ((made - plain).abs().amax(1)[0][opaque] <= 8 / 255).all()
