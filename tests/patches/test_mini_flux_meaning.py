"""The mini Flux-Fill at both its sizes, and layers on it: samples against the table of docs/figures.json."""

import importlib

import figures
import pytest


@pytest.mark.parametrize("name", ["flux", "flux_large", "flux_words", "blocks_flux", "layerfusion_flux", "layers_flux"])
def test_a_sample_agrees_with_the_table(name):
    module = importlib.import_module(f"figures_{name}")
    figures.check(name, module.measure(figures.sample(module)))
