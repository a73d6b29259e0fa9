"""BFS's figures: a sample of the shipped file's against the table of docs/figures.json."""

import json

import figures
import figures_back_to_front
import pytest

pytestmark = pytest.mark.skipif(
    "back_to_front" not in json.loads(figures.TABLE.read_text()), reason="still learning, and not measured"
)


def test_a_sample_agrees_with_the_table():
    figures.check("back_to_front", figures_back_to_front.measure(figures.sample(figures_back_to_front)))
