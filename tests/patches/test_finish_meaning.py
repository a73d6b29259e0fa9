"""Redraw layer's and Complete layers' figures: a sample against the table of docs/figures.json."""

import importlib

import figures
import pytest
from mini_models import CHECKPOINT

pytestmark = pytest.mark.skipif(not CHECKPOINT.exists(), reason="no trained weights: make mini")


@pytest.mark.parametrize("name", ["redraw", "complete"])
def test_a_sample_agrees_with_the_table(name):
    module = importlib.import_module(f"figures_{name}")
    figures.check(name, module.measure(figures.sample(module)))
