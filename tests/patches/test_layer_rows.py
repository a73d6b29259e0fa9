"""Rows of one batch: which are chosen, the noise of pictures that are sampled side by side, one run and its calls, each
against the same by plain indices and stock sampling.
"""

from types import SimpleNamespace

import comfy.sample
import pytest
import torch
from strata.patches.layer_rows import (
    LAYERFUSION,
    Method,
    Rows,
    _noise,
    conditional_first,
    is_between,
    sample_rows,
    selected_rows_only,
)

from .sampling_helpers import conditioning, noise, picture, sample

START = torch.zeros(2 * 3, 4, 64, 64)
METHOD = Method("tests_rows", "marked", "rows need", "whose rows are whose", "this test")


@pytest.mark.parametrize(("own", "between"), [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)])
def test_branches_share_as_much_noise_as_asked(own, between):
    rows = _noise(START, 5, None, 3, own).flatten(1).double()
    # Latents among themselves share nothing.
    wanted = torch.block_diag(*[torch.full((3, 3), between)] * 2).double().fill_diagonal_(1)
    # 16384 samples: a correlation's deviation is 0.008.
    assert torch.allclose(rows @ rows.T / rows.shape[1], wanted, rtol=1e-5, atol=0.03)


@pytest.mark.parametrize("own", [0.0, 0.5, 1.0])
def test_a_latent_of_a_batch_has_the_noise_that_it_has_alone(own):
    start = START[..., :8, :8]
    batch = _noise(start, 5, [4, 7], 3, own)
    assert torch.equal(_noise(start[:3], 5, [7], 3, own), batch[3:])
    assert torch.equal(_noise(start, 5, None, 3, own), _noise(start, 5, [0, 1], 3, own))


def test_noise_of_its_own_is_what_a_plain_batch_has():
    start = START[..., :5, :7]  # torch draws 16 values at a time, so that 140 alone are others than those of a batch
    assert torch.equal(_noise(start, 5, None, 3, 1.0), comfy.sample.prepare_noise(start, 5))


@pytest.mark.parametrize(("count", "first", "number"), [(3, 0, 1), (4, 1, 2), (5, 2, 3), (2, 1, 1)])
def test_the_chosen_rows_are_those_places_of_every_group(count, first, number):
    rows = torch.arange(2.0 * count * 3).view(2 * count, 3)
    chosen, own = (
        [group * count + first + place for group in (0, 1) for place in range(number)],
        Rows(count, first, number, "groups of rows."),
    )
    assert torch.equal(own.of(rows), rows[chosen])
    term, wanted = torch.arange(2.0 * number * 3).view(2 * number, 3) - 4, rows.clone()
    for place, one in zip(chosen, term, strict=True):
        wanted[place] += 0.5 * one
    own.add(rows, term, 0.5)
    assert torch.equal(rows, wanted)
    own.check(rows)
    with pytest.raises(ValueError, match=f"^latent: a batch of {len(rows) - 1} cannot be split into groups of rows"):
        own.check(rows[1:])
    with selected_rows_only():
        assert torch.equal(own.of(rows), rows)
        own.check(rows[1:])
        own.add(rows, rows.clone())
        assert torch.equal(rows, 2 * wanted)
    assert torch.equal(own.of(rows), 2 * wanted[chosen])


@pytest.mark.parametrize(
    ("estimates", "conditional", "calls"),
    [
        (["a", "b"], None, [(["a", "b"], False)]),
        (["a", "b"], 0, [(["a", None], True), ([None, "b"], False)]),
        (["a", "b"], 1, [([None, "b"], True), (["a", None], False)]),
        (["a", "b", "c"], 1, [([None, "b", None], True), (["a", None, "c"], False)]),
        (["a", None], 0, [(["a", None], True)]),
    ],
)
def test_the_conditional_estimate_comes_first_and_all_come_back_in_their_order(estimates, conditional, calls):
    made = []

    def calculate(conds, first):
        made.append((conds, first))
        return [f"{cond} in call {len(made)}" for cond in conds]

    found = conditional_first(estimates, conditional, calculate)
    assert made == calls
    for place, cond in enumerate(estimates):
        if cond is not None:
            number = next(number for number, (conds, _) in enumerate(calls, 1) if conds[place] == cond)
            assert found[place] == f"{cond} in call {number}"


def test_a_noise_level_is_between_two_percents_with_both_ends(models):
    sampling = models("mini").get_model_object("model_sampling")
    start, end = float(sampling.percent_to_sigma(0.2)), float(sampling.percent_to_sigma(0.6))
    for sigma, inside in ((start, True), (end, True), ((start + end) / 2, True), (start + 1, False), (end - 1, False)):
        # Models are called with one noise level for each row; where they differ the highest counts.
        assert is_between(0.2, 0.6, sampling, torch.tensor([0.0, sigma], dtype=torch.float64)) == inside


def test_the_marked_entry_is_found_and_what_does_not_fit_is_named():
    marked, plain, area = {"marked": 1}, {}, {"area": (8, 8, 0, 0)}
    assert METHOD.entry({"positive": [marked], "negative": [plain, plain]}) is marked
    assert METHOD.conditional([[plain], [marked]]) == 1 and METHOD.conditional([[plain, marked], None]) == 0
    assert METHOD.conditional([None, [plain]]) is None
    for positive, negative, words in (
        ([plain], [plain], "^positive: this conditioning does not say whose rows are whose; make it with this test"),
        ([{**marked, **area}], [plain], "limited to an area; rows need conditionings of the whole image"),
        ([marked], [area], "limited to an area"),
        ([marked, plain], [plain], "^positive: several conditionings are combined; rows need the one of this test"),
    ):
        with pytest.raises(ValueError, match=words):
            METHOD.entry({"positive": positive, "negative": negative})


def test_a_run_starts_with_the_marked_entry_and_is_there_in_every_call(models):
    plain, seen = models("mini"), []
    model = plain.clone()
    positive, negative = conditioning(model, 1, marked=1), conditioning(model, 2, rows=1)

    def start(entry, options):
        seen.append(entry["marked"])
        assert options[METHOD.record_key] is record
        return SimpleNamespace(rows=LAYERFUSION)

    def calculate(executor, model, conds, x, timestep, model_options):
        seen.append(model_options["transformer_options"][METHOD.run_key].rows)
        return executor(model, conds, x, timestep, model_options)

    def denoise(executor, *args, **kwargs):
        seen.append("network")
        return executor(*args, **kwargs)

    METHOD.attach(model, start, calculate, denoise)
    record = METHOD.record(model)
    assert METHOD.is_on(model) and not METHOD.is_on(plain)
    found = sample(model, positive, negative, steps=2, x=noise(6, side=8))
    assert seen == [1, *[LAYERFUSION, "network"] * 2]
    assert torch.equal(found, sample(plain, positive, negative, steps=2, x=noise(6, side=8)))
    with pytest.raises(ValueError, match="a batch of 4 cannot be split into foreground, background and blended"):
        sample(model, positive, negative, steps=2, x=noise(4, side=8))
    METHOD.detach(model)
    seen.clear()
    sample(model, positive, negative, steps=2, x=noise(4, side=8))
    assert not METHOD.is_on(model) and not seen


SETTINGS = {"seed": 7, "steps": 3, "cfg": 2.0, "scheduler": "normal"}
ROW = [0, 0, 0, 1, 1, 1]  # of two latents


def stock(model, latents, sampler_name, denoise, mask=None, callback=None):
    start = latents[ROW]
    positive, negative = conditioning(model, 1), conditioning(model, 2, rows=1)
    return comfy.sample.sample(
        model,
        comfy.sample.prepare_noise(start, 7),
        3,
        2.0,
        sampler_name,
        "normal",
        positive,
        negative,
        start,
        denoise=denoise,
        noise_mask=mask,
        callback=callback,
        disable_pbar=True,
        seed=7,
    )


def ours(model, latent, sampler_name, denoise, recorded=None):
    positive, negative = conditioning(model, 1), conditioning(model, 2, rows=1)
    return sample_rows(
        model,
        positive,
        3,
        negative,
        latent,
        sampler_name=sampler_name,
        denoise=denoise,
        recorded=recorded,
        **SETTINGS,
    )


@pytest.mark.parametrize("masks", [0, 1, 2])
@torch.inference_mode()
def test_the_rows_of_every_latent_are_sampled_as_in_a_plain_batch_of_them(models, masks):
    latents, mask = picture(3, batch=2), torch.zeros(masks, 1, 8, 8)
    mask[:1, :, 2:6, 1:5] = mask[1:, :, :3] = 1
    latent = {"samples": latents, "kept": 1, **({"noise_mask": mask} if masks else {})}
    found = ours(models("mini"), latent, "euler", 0.7)
    wanted = stock(models("mini"), latents, "euler", 0.7, mask.expand(2, -1, -1, -1)[ROW] if masks else None)
    assert len(found) == 3 and all(one["kept"] == 1 for one in found)
    for row, one in enumerate(found):
        assert torch.equal(one["samples"], wanted[[row, row + 3]])


@pytest.mark.parametrize("sampler_name", ["euler", "heun"])
@torch.inference_mode()
def test_what_is_recorded_is_the_batch_of_each_step(models, sampler_name):
    """The stock sampler's callback has the same; Heun calls the model at most levels twice, first with a guess."""
    latents, recorded, steps = picture(3, batch=2), {}, []
    stock(models("mini"), latents, sampler_name, 1.0, callback=lambda step, clean, x, total: steps.append(x.clone()))
    ours(models("mini"), {"samples": latents}, sampler_name, 1.0, recorded)
    assert len(recorded) == len(steps) == 3 and list(recorded) == sorted(recorded, reverse=True)
    assert all(torch.equal(own, x) for own, x in zip(recorded.values(), steps, strict=True))
