"""Redraw layer's figures: a sample against the table of docs/figures.json."""

import figures
import figures_redraw
import pytest
from mini_models import CHECKPOINT

pytestmark = pytest.mark.skipif(not CHECKPOINT.exists(), reason="no trained weights: make mini")


def test_a_sample_agrees_with_the_table():
    figures.check("redraw", figures_redraw.measure(figures.sample(figures_redraw)))
