"""LayerFusion's figures: every step of the way to them on random weights, and a sample of the shipped family's against
the table.
"""

import figures
import figures_layerfusion
import pytest
import torch
from figures_layerfusion import COLUMNS, FILES, OBJECTS, drawn, family_of, measured
from strata.networks.transparency import TransparentDecoder
from strata.patches import transparency
from strata.training import oracle

from . import random_transparency


def test_all_is_measured_on_random_weights(family, tmp_path):
    """Figures without a meaning, but every step of the way to them is gone."""
    torch.manual_seed(0)
    adapter = random_transparency.adapter(transparency.structure("Strata mini"), scale=0.1)
    decoder = random_transparency.network(TransparentDecoder((16, 16, 32, 64, 96), 2))
    shown, names = drawn(family_of(family["sd"], adapter, decoder), range(2), COLUMNS["wide"], steps=2)
    found = measured(shown, names, oracle.load(), tmp_path / "grid.png")
    assert names == list(OBJECTS[:2]) and (tmp_path / "grid.png").stat().st_size > 1000
    assert all(
        value.shape == (2,) and value.isfinite().all() and (value >= 0).all() and (value <= 1).all()
        for value in found.values()
    ), found
    assert found["layers to blended"].min() > 0 and found["change by the place"].min() > 0


@pytest.mark.skipif(not all(path.exists() for path in FILES), reason="the mini family is not trained: make mini")
def test_a_sample_agrees_with_the_table():
    wide = {"wide": COLUMNS["wide"]}
    figures.check("layerfusion", figures_layerfusion.measure(figures.sample(figures_layerfusion), wide))
