"""LayeringDiff's figures: a sample of the shipped decomposer's against the table of docs/figures.json."""

import figures
import figures_decompose
import pytest
from mini_models import LAYER_MODEL

pytestmark = pytest.mark.skipif(not (LAYER_MODEL / figures_decompose.FILE).exists(), reason="not trained: make mini")


def test_a_sample_agrees_with_the_table():
    figures.check("decompose", figures_decompose.measure(figures.sample(figures_decompose)))
