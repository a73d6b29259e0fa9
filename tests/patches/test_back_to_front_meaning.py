"""BFS's figures: a sample of the shipped file's against the table of docs/figures.json."""

import figures
import figures_back_to_front
import pytest
from mini_models import LAYER_MODEL

pytestmark = pytest.mark.skipif(
    not (LAYER_MODEL / figures_back_to_front.FILE).exists(), reason="not trained: make mini"
)


def test_a_sample_agrees_with_the_table():
    figures.check("back_to_front", figures_back_to_front.measure(figures.sample(figures_back_to_front)))
