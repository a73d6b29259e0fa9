"""Attention blend on transformers, in ComfyUI's sampling, against LayerFusion's algorithm written out."""

import pytest
import torch
from strata.patches.fusion import BLOCKS, METHOD, Settings, blend_attention
from strata.patches.joint_attention import TEXT_LENGTHS
from strata.patches.layer_prompts import END_TOKENS

from . import joint_reference, small_transformers
from .sampling_helpers import close
from .small_transformers import NAMES, conditioning, latents
from .test_joint_layers import BLOCKS as COUNTS
from .test_joint_layers import SIZE, calls, lengths, run

ENDS = [1, 2, 4]  # the foreground's words and their end
LENGTHS = [5, 10, 9]


@pytest.fixture(scope="module")
def models():
    """SD3.5's in float64: with these weights its masks make a rounding of float32 10,000 times as large."""
    made = {}
    types = {"SD3.5": torch.float64}
    return lambda kind: made.setdefault(kind, small_transformers.patcher(kind, types.get(kind, torch.float32)))


def layered(seed=1, tokens=10, **extra):
    return conditioning(seed, 3, tokens, **{END_TOKENS: ENDS, **extra})


def check(model, kind, found, own, parts=(0, 1, 2), **settings):
    """Every call of a run with one step: prior, conditional, unconditional."""
    structure = masks = None
    for number, (args, result) in enumerate(found):
        prior = number == 0
        of = lengths(args, own[:1] if prior else own)
        assert args["cond_or_uncond"] == [int(number == 2)]
        reference = joint_reference.Blending(
            kind,
            of,
            args["c"]["c_crossattn"].shape[1],
            SIZE,
            COUNTS[kind],
            ends=ENDS,
            prior=prior,
            structure=structure,
            masks=masks,
            parts=parts,
            **settings,
        )
        assert close(result, joint_reference.expected(model, args, reference))
        structure = reference.structure
        masks = reference.masks if number == 1 else None
    return structure


@pytest.mark.parametrize("kind", [*NAMES])
def test_one_call_is_the_papers_algorithm(models, kind):
    """Two scenes, prompts of several lengths."""
    model, x = models(kind), latents(kind, 6)
    ours = blend_attention(model, Settings())
    found, _ = calls(ours, layered(**{TEXT_LENGTHS: LENGTHS}), conditioning(2, 1, 7), x)
    assert [len(args["input"]) for args, _ in found] == [2, 6, 6]
    assert check(model, kind, found, LENGTHS).shape == (2, SIZE[0] * SIZE[1])


@pytest.mark.parametrize(
    "kind, parts, settings",
    [
        ("Flux", "all", {"boundary": 3.0, "strength": 0.4}),
        ("Qwen-Image", "middle and up", {"own_prompt": True}),
        ("Z-Image", "down", {"wide": True}),
    ],
)
def test_the_settings_mean_what_the_reference_says(models, kind, parts, settings):
    model, x = models(kind), latents(kind, 3)
    ours = blend_attention(model, Settings(blocks=BLOCKS[parts], **settings))
    found, _ = calls(ours, layered(), conditioning(2, 1, 10), x)
    thirds = [("input", "middle", "output").index(part) for part in BLOCKS[parts]]
    check(model, kind, found, [10] * 3, thirds, **settings)


@pytest.mark.parametrize("kind", NAMES)
def test_off_is_bit_equal_to_stock(models, kind):
    model, x = models(kind), latents(kind, 3)
    positive, negative = layered(), conditioning(2, 1, 7)
    stock = run(model, positive, negative, x)
    assert torch.equal(run(blend_attention(model, Settings(strength=0.0)), positive, negative, x), stock)
    late = blend_attention(model, Settings(start_percent=0.9))
    assert torch.equal(run(late, positive, negative, x), stock)
    assert not close(run(blend_attention(model, Settings()), positive, negative, x), stock, 1e-2)
    assert torch.equal(run(model, positive, negative, x), stock)


def test_the_structure_of_the_step_before_saves_all_prior_passes_but_the_first(models):
    model, x, sigmas = models("Flux"), latents("Flux", 3), (0.9, 0.6, 0.3, 0.0)
    counts = []
    for reuse in (False, True):
        found, _ = calls(
            blend_attention(model, Settings(reuse=reuse)), layered(), conditioning(2, 1, 7), x, sigmas=sigmas
        )
        counts.append([len(args["input"]) for args, _ in found])
    assert counts == [[1, 3, 3] * 3, [1, 3, 3, 3, 3, 3, 3]]


def test_the_masks_are_recorded_at_the_block_that_shows_the_structure(models):
    model = blend_attention(models("Qwen-Image"), Settings())
    record = METHOD.record(model)
    run(model, layered(), conditioning(2, 1, 7), latents("Qwen-Image", 6), cfg=1.0, sigmas=(0.9, 0.6, 0.0))
    assert [maps.shape for maps in record.steps] == [(2, 4, *SIZE)] * 2
    assert all(maps.min() >= 0 and maps.max() <= 1 for maps in record.steps)


def test_a_fill_model_and_reference_latents_go_into_the_prior_pass_with_their_own_row(models):
    """Each row's background and mask, and a reference image for each row."""
    for kind, extra in (
        ("Flux-Fill", {"concat_latent_image": latents("Flux", 3, seed=8), "concat_mask": torch.rand(3, 1, 10, 6)}),
        ("Flux", {"reference_latents": [latents("Flux", 3, (4, 6), seed=9)]}),
    ):
        model = blend_attention(models(kind), Settings())
        found, _ = calls(model, layered(**extra), conditioning(2, 1, 7), latents(kind, 3), cfg=1.0)
        (prior, _), (whole, _) = found
        for name in ("c_concat", "c_crossattn", "y"):
            if name in whole["c"]:
                assert torch.equal(prior["c"][name], whole["c"][name][:1])
        assert "c_concat" in whole["c"] or torch.equal(prior["c"]["ref_latents"][0], whole["c"]["ref_latents"][0][:1])


@pytest.mark.parametrize("node", ["before", "behind"])
def test_another_packs_override_is_kept(models, node):
    model, x, seen = models("Flux").clone(), latents("Flux", 3), []

    def theirs(func, q, *args, **kwargs):
        seen.append(len(q))
        return func(q, *args, **kwargs)

    theirs_on = [("before", models("Flux")), ("behind", blend_attention(model, Settings()))]
    patched = dict(theirs_on)[node].clone()
    patched.model_options["transformer_options"]["optimized_attention_override"] = theirs
    patched = blend_attention(patched, Settings()) if node == "before" else patched
    result = run(patched, layered(), conditioning(2, 1, 7), x, cfg=1.0)
    assert torch.equal(result, run(blend_attention(model, Settings()), layered(), conditioning(2, 1, 7), x, cfg=1.0))
    assert len(seen) == 6 + 6 * 2 * 3  # the prior pass, and prompt and image of each row
