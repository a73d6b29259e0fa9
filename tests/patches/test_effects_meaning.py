"""Effect layers' figures: a sample against the table of docs/figures.json."""

import figures
import figures_effects
import pytest
from mini_models import CHECKPOINT

pytestmark = pytest.mark.skipif(not CHECKPOINT.exists(), reason="no trained weights: make mini")


def test_a_sample_agrees_with_the_table():
    figures.check("effects", figures_effects.measure(figures.sample(figures_effects)))
