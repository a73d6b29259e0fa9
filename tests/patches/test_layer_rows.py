"""The noise of pictures that are sampled side by side."""

import comfy.sample
import pytest
import torch
from strata.patches.layer_rows import _noise

START = torch.zeros(2 * 3, 4, 64, 64)


@pytest.mark.parametrize(("own", "between"), [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)])
def test_branches_share_as_much_noise_as_asked(own, between):
    rows = _noise(START, 5, None, 3, own).flatten(1).double()
    # Latents among themselves share nothing.
    wanted = torch.block_diag(*[torch.full((3, 3), between)] * 2).double().fill_diagonal_(1)
    # 16384 samples: a correlation's deviation is 0.008.
    assert torch.allclose(rows @ rows.T / rows.shape[1], wanted, rtol=1e-5, atol=0.03)


@pytest.mark.parametrize("own", [0.0, 0.5, 1.0])
def test_a_latent_of_a_batch_has_the_noise_that_it_has_alone(own):
    batch = _noise(START, 5, [4, 7], 3, own)
    assert torch.equal(_noise(START[:3], 5, [7], 3, own), batch[3:])
    assert torch.equal(_noise(START, 5, None, 3, own), _noise(START, 5, [0, 1], 3, own))


def test_noise_of_its_own_is_what_a_plain_batch_has():
    assert torch.equal(_noise(START, 5, None, 3, 1.0), comfy.sample.prepare_noise(START, 5))
