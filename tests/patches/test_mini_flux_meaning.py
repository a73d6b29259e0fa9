"""The mini Flux-Fill's figures: a sample of the shipped file's against the table of docs/figures.json."""

import figures
import figures_flux


def test_a_sample_agrees_with_the_table():
    figures.check("flux", figures_flux.measure(figures.sample(figures_flux)))
