"""DreamLayer's figures, and which blocks show a thing: samples of the shipped family against docs/figures.json."""

import figures
import figures_blocks
import figures_layers
import pytest
import torch
from mini_models import CHECKPOINT

pytestmark = pytest.mark.skipif(not CHECKPOINT.exists(), reason="no trained weights: make mini")


def test_a_sample_agrees_with_the_table():
    methods = {name: figures_layers.METHODS[name] for name in ("none", "both, trained")}
    figures.check("layers", figures_layers.measure(figures.sample(figures_layers), methods))


def test_a_sample_of_the_blocks_agrees_with_the_table():
    figures.check("blocks", figures_blocks.measure(figures.sample(figures_blocks)))


def test_a_layer_that_came_out_empty_is_a_miss_and_not_a_perfect_separation():
    left, right = torch.zeros(2, 1, 4, 4)
    left[..., :2], right[..., 1:] = 1, 1
    both = figures_layers.overlap(torch.stack([left, right]))
    assert both == 0.25 and figures_layers.overlap(torch.stack([left, torch.zeros_like(left)])) == 1
    assert figures_layers.overlap(left[None]).isnan()
