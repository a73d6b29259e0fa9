"""BFS's figures: a sample of the shipped file's against the table of docs/figures.json."""

import figures
import figures_back_to_front


def test_a_sample_agrees_with_the_table():
    figures.check("back_to_front", figures_back_to_front.measure(figures.sample(figures_back_to_front)))
