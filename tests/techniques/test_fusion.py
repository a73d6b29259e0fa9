"""LayerFusion's formulas against plain loops over whole attention matrices in float64."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from strata.techniques import fusion
from torch.utils._python_dispatch import TorchDispatchMode

from .attention_helpers import HEADS, WIDTH, naive_probabilities, tokens


def minmax(x):
    return (x - x.min(1, keepdims=True)) / (x.max(1, keepdims=True) - x.min(1, keepdims=True))


def test_normalised_rows_span_their_range_and_flat_ones_are_zeros():
    values = torch.cat([tokens(5, 3)[:, :9], torch.full((1, 9), 0.3, dtype=torch.float64)])
    assert (
        np.abs(fusion.min_max_normalise(values)[:3].numpy() - minmax(values[:3].numpy())).max() < 1e-12
        and (fusion.min_max_normalise(values)[3] == 0).all()
    )


@pytest.mark.parametrize("rows", [1, 7, 10**6])
def test_what_is_reduced_in_chunks_is_reduced_of_all_attention(monkeypatch, rows):
    q, k, most = tokens(0, 2, 30), tokens(1, 2, 14), []
    monkeypatch.setattr(fusion, "MOST_PROBABILITIES", rows * HEADS * 14)

    def heads_apart(part):
        most.append(part.shape[1])
        return part.transpose(0, 1)

    found = fusion.reduce_attention(q, k, HEADS, heads_apart)
    assert np.abs(found.numpy() - naive_probabilities(q, k).transpose(0, 2, 1, 3)).max() < 1e-12 and max(most) == min(
        rows, 30
    )


@pytest.mark.parametrize("rows", [1, 7, 10**6])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.float16, 1e-5), (torch.bfloat16, 1e-5)]
)
def test_structure_prior_is_algorithm_1(monkeypatch, rows, dtype, tolerance):
    q, k = tokens(0, 2, 30).to(dtype), tokens(1, 2, 30).to(dtype)
    monkeypatch.setattr(fusion, "MOST_PROBABILITIES", rows * HEADS * 30)
    mean = naive_probabilities(q, k).mean(1)
    expected = 1 - minmax(1 / (mean**2).sum(2))
    found = fusion.structure_prior(q, k, HEADS)
    assert np.abs(found.double().numpy() - expected).max() < tolerance
    assert found.amin(1).tolist() == [0, 0] and found.amax(1).tolist() == [1, 1]


def test_structure_prior_is_high_where_attention_is_concentrated():
    k = tokens(2, 1, 20, size=1)
    q = k.clone()
    q[:, :10] *= 20  # the first ten attend to themselves alone, the others widely
    q[:, 10:] *= 0.01
    prior = fusion.structure_prior(q, k, HEADS)[0]
    assert prior[:10].min() > 0.7 and prior[10:].max() < 0.1


@pytest.mark.parametrize("ends", [[5], [4, 12]])
@pytest.mark.parametrize("rows", [1, 4, 10**6])
def test_content_prior_is_algorithm_2(monkeypatch, ends, rows):
    q, k = tokens(3, 2, 30), tokens(4, 2, 14)
    monkeypatch.setattr(fusion, "MOST_PROBABILITIES", rows * HEADS * 14)
    expected = sum(naive_probabilities(q, k)[..., end].mean(1) for end in ends)
    assert np.abs(fusion.content_prior(q, k, HEADS, ends).numpy() - expected).max() < 1e-12


def test_a_prompt_repeated_along_its_tokens_gives_the_same_content_prior():
    q, k = tokens(3, 1, 9), tokens(4, 1, 7)
    once, twice = fusion.content_prior(q, k, HEADS, [5]), fusion.content_prior(q, k.repeat(1, 2, 1), HEADS, [5, 12])
    assert torch.allclose(once, twice, rtol=0, atol=1e-14)


@pytest.mark.parametrize("tokens_count", [600, 1200])
def test_no_tensor_grows_with_the_square_of_the_tokens(monkeypatch, tokens_count):
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            largest = max(
                [
                    largest,
                    *(
                        value.numel()
                        for value in torch.utils._pytree.tree_leaves(out)
                        if isinstance(value, torch.Tensor)
                    ),
                ]
            )
            return out

    monkeypatch.setattr(fusion, "MOST_PROBABILITIES", 8 * HEADS * tokens_count)  # eight rows at a time
    q, k = tokens(5, 1, tokens_count).float(), tokens(6, 1, tokens_count).float()
    with Watch():
        fusion.structure_prior(q, k, HEADS)
    assert 8 * tokens_count <= largest <= HEADS * tokens_count * WIDTH


def test_blending_masks_are_those_of_algorithm_3():
    structure, content = torch.rand(2, 50, dtype=torch.float64), torch.rand(2, 50, dtype=torch.float64)
    for d in (1.0, 10.0, 40.0):
        soft, hard = fusion.blending_masks(structure, content, d)
        expected = minmax((structure * content).numpy())
        assert np.abs(soft.numpy() - expected).max() < 1e-12
        assert np.abs(hard.numpy() - 1 / (1 + np.exp(-d * (expected - 0.5)))).max() < 1e-12


def test_wide_mask_is_around_the_level_that_parts_object_and_surroundings():
    generator = torch.Generator().manual_seed(3)
    soft = torch.rand(4, 200, generator=generator, dtype=torch.float64) * 0.2
    soft[:, :60] += torch.tensor([[0.1], [0.3], [0.5], [0.8]])
    for d in (1.0, 10.0):
        levels = (soft - torch.logit(fusion.wide_mask(soft, d)) / d).numpy()
        for row, level in zip(soft.numpy(), levels, strict=True):
            sides = [(row[row <= cut], row[row > cut]) for cut in np.sort(row)[:-1]]
            low, high = min(sides, key=lambda pair: sum(side.var() * len(side) for side in pair))
            assert np.abs(level - (low.mean() + high.mean()) / 2).max() < 1e-9
    assert abs(levels[3, 0] - 0.5) < 0.05


def test_flat_priors_give_finite_masks():
    soft, hard = fusion.blending_masks(torch.ones(1, 6), torch.full((1, 6), 0.2), 10.0)
    assert torch.equal(soft, torch.zeros(1, 6)) and torch.isfinite(hard).all()
    for size in (1, 6):
        flat = torch.tensor([0.0, 0.25, 0.5, 1.0]).double()[:, None].expand(-1, size)  # their sums are exact
        expected = 1 / (1 + np.exp(-10 * (flat.numpy() - 0.5)))
        assert np.allclose(fusion.wide_mask(flat, 10.0), expected, rtol=0, atol=1e-12), "parted at a half"
    flat = fusion.structure_prior(torch.zeros(1, 6, HEADS * WIDTH), torch.zeros(1, 6, HEADS * WIDTH), HEADS)
    assert torch.equal(flat, torch.ones(1, 6))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float16, 4e-3)])
def test_blend_foreground_in_and_return_to_foreground_are_equations_1_and_2(dtype, tolerance):
    fg, bl = tokens(7, 2, 11).to(dtype), tokens(8, 2, 11).to(dtype)
    soft, hard = torch.rand(2, 2, 11, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    a, b, s, h = fg.double(), bl.double(), soft[..., None], hard[..., None]
    blended = fusion.blend_foreground_in(fg, bl, soft)
    assert blended.dtype == dtype and (blended.double() - (a * s + b * (1 - s))).abs().max() < tolerance
    expected = blended.double() * h + a * (1 - h)
    assert (fusion.return_to_foreground(fg, blended, hard).double() - expected).abs().max() < tolerance
    assert torch.equal(fusion.blend_foreground_in(fg, bl, torch.zeros(2, 11)), bl)
    assert torch.equal(fusion.return_to_foreground(fg, bl, torch.zeros(2, 11)), fg)


def test_shared_tokens_and_shared_prompt_by_hand():
    k = tokens(9, 2, 3, 4)
    joint = fusion.shared_tokens(k)
    assert torch.equal(joint, torch.stack([torch.cat([one[1], one[2]]) for one in k]))
    prompts = fusion.shared_prompt(k)
    expected = [k[0, 0], k[0, 1], k[0, 1], k[1, 0], k[1, 1], k[1, 1]]
    assert torch.equal(prompts, torch.stack(expected))


def test_resize_prior_takes_the_mean_of_each_area():
    prior = torch.rand(2, 8 * 12)
    small = fusion.resize_prior(prior, (8, 12), (4, 6)).view(2, 4, 6)
    assert torch.allclose(small, prior.view(2, 4, 2, 6, 2).mean((2, 4)), rtol=0, atol=1e-6)
    assert fusion.resize_prior(prior, (8, 12), (8, 12)) is prior
    assert fusion.resize_prior(torch.rand(1, 35), (5, 7), (3, 4)).shape == (1, 12)


def test_strips_show_each_map_of_each_step_in_its_own_range():
    steps = [torch.rand(2, 3, 5, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    strips = fusion.map_strips(steps)
    assert strips.shape == (2 * 2, 4 * 5, 4 * 3 * 4, 3)
    for row, maps in enumerate(torch.cat(steps)):
        for number, one in enumerate(maps):
            shown = strips[row, :, 16 * number : 16 * number + 16]
            assert torch.equal(shown[..., 0], shown[..., 2]) and torch.equal(shown[::4, ::4], shown[3::4, 3::4])
            assert np.allclose(shown[::4, ::4, 0].flatten(), minmax(one.reshape(1, -1).numpy())[0], atol=1e-6)
    assert torch.equal(fusion.map_strips([]), torch.zeros(1, 1, 1, 3))
    assert not fusion.map_strips([torch.full((1, 1, 2, 2), 0.7)]).any()


MEASURED = """
import conftest  # makes the pack importable
import resource, torch
from strata.techniques import fusion
torch.set_num_threads(1)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def make(tokens):
    q, k = torch.randn(1, tokens, 8), torch.randn(1, tokens, 8)
    fusion.structure_prior(q, k, 2)
    fusion.content_prior(q, k[:, :77], 2, [70])
make(256)
before = peak()
make(12288)
print((peak() - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is counted in KiB on Linux")
def test_the_structure_prior_never_holds_all_its_attention():
    """Peak of a process of its own: the probabilities of 12288 tokens would be 1152 MiB, and small results between
    large parts would keep the heap.
    """
    tests = Path(__file__).resolve().parent.parent
    found = subprocess.run(
        [sys.executable, "-c", MEASURED],
        cwd=tests,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), *sys.path])},
    )
    assert int(found.stdout) < 200
