"""FeatGLaC's figures: a sample of the shipped family's against the table of docs/figures.json."""

import figures
import figures_composition
import pytest
from mini_models import CHECKPOINT

pytestmark = pytest.mark.skipif(not CHECKPOINT.exists(), reason="no trained weights: make mini")


def test_a_sample_agrees_with_the_table():
    figures.check("composition", figures_composition.measure(figures.sample(figures_composition)))
