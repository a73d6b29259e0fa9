"""FeatGLaC's figures: a sample of the shipped family's against the table of docs/figures.json."""

import figures
import figures_composition
import figures_composition_flux
import pytest
from mini_models import CHECKPOINT

pytestmark = pytest.mark.skipif(not CHECKPOINT.exists(), reason="no trained weights: make mini")


@pytest.mark.parametrize("module", [figures_composition, figures_composition_flux])
def test_a_sample_agrees_with_the_table(module):
    figures.check(module.__name__.removeprefix("figures_"), module.measure(figures.sample(module)))
