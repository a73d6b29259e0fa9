"""LayerFusion in ComfyUI's sampling, against the same algorithm written out block by block in float64."""

import copy

import comfy.controlnet
import comfy.model_base
import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import pytest
import torch
from strata.patches import foreground as low_rank
from strata.patches import fusion
from strata.patches.attention_blocks import attend
from strata.patches.fusion import Settings, blend_attention
from strata.patches.layer_prompts import END_TOKENS, encode_prompts

from . import fusion_reference
from .sampling_helpers import (
    SIGMA,
    Hints,
    close,
    conditioning,
    estimates,
    expected,
    layered,
    low_memory,
    noise,
    sample,
    terms_for,
    watching,
)


@pytest.mark.parametrize("kind", list(fusion_reference.UNETS))
@pytest.mark.parametrize("count", [3, 6])
def test_one_call_is_the_papers_algorithm(models, kind, count):
    model = models(kind)
    assert (model.model.model_type is comfy.model_base.ModelType.V_PREDICTION) == (kind == "SD2")
    positive, negative = layered(model), conditioning(model, 2, rows=1)
    found = estimates(blend_attention(model, Settings()), positive, negative, noise(count))
    cond, uncond = expected(model, found, positive, negative)
    assert close(found["cond"], cond) and close(found["uncond"], uncond)
    plain = estimates(model, positive, negative, noise(count))
    assert not close(plain["cond"], cond, 1e-2) and not close(plain["uncond"], uncond, 1e-2)


@pytest.mark.parametrize(
    "settings",
    [
        {"boundary": 3.0},
        {"own_prompt": True},
        {"wide": True},
        {"priors": "structure alone"},
        {"priors": "content alone"},
    ],
)
def test_the_settings_mean_what_the_reference_says(models, settings):
    model = models("mini")
    positive, negative = layered(model), conditioning(model, 2, rows=1)
    found = estimates(blend_attention(model, Settings(**settings)), positive, negative, noise())
    cond, uncond = expected(model, found, positive, negative, **settings)
    assert close(found["cond"], cond) and close(found["uncond"], uncond)


@pytest.mark.parametrize("kind", ["mini", "SDXL"])
def test_the_foregrounds_weights_take_part_in_blending(models, kind):
    model = models(kind)
    positive, negative, terms = layered(model), conditioning(model, 2, rows=1), terms_for(models(kind))
    patched = blend_attention(low_rank.apply_to_foreground(model, terms), Settings())
    found = estimates(patched, positive, negative, noise())
    cond, uncond = expected(model, found, positive, negative, terms)
    assert close(found["cond"], cond) and close(found["uncond"], uncond)


def test_cond_and_uncond_in_one_batch_or_apart_are_the_same(models, monkeypatch):
    model = models("mini")
    positive, negative = layered(model), conditioning(model, 2, rows=1)
    calls, results = [], {}
    for free in (1e18, 1.0):
        low_memory(monkeypatch, free)
        patched = blend_attention(model, Settings())
        patched.set_model_unet_function_wrapper(watching(calls))
        results[free] = estimates(patched, positive, negative, noise())
    # ComfyUI's attention on the CPU cuts its matrices by the free memory: not bit by bit the same. Values reach 13 and
    # differ by about 1e-5 on one thread.
    assert all(
        torch.allclose(results[1e18][name], results[1.0][name], rtol=0, atol=1e-4) for name in ("cond", "uncond")
    )
    assert calls == [([0], 1), ([0], 3), ([1], 3)] * 2  # the prior pass, the conditional estimate first, then the other


def test_strength_0_is_bit_equal_and_small_strengths_are_near(models):
    model = models("mini")
    positive, negative = layered(model), conditioning(model, 2, rows=1)
    plain = estimates(model, positive, negative, noise())
    off = estimates(blend_attention(model, Settings(strength=0.0)), positive, negative, noise())
    assert all(torch.equal(plain[name], off[name]) for name in plain)
    distances = [
        (estimates(blend_attention(model, Settings(strength=s)), positive, negative, noise())["cond"] - plain["cond"])
        .abs()
        .mean()
        for s in (1e-5, 0.5, 1.0)
    ]
    assert distances[0] < 1e-3 < distances[1] < distances[2]


@pytest.mark.parametrize("window", [(0.0, 0.2), (0.9, 1.0)])
def test_outside_its_percents_it_is_bit_equal_to_the_stock_graph(models, window):
    model = models("mini")
    positive, negative = layered(model), conditioning(model, 2, rows=1)
    sigmas = [model.model.model_sampling.percent_to_sigma(percent) for percent in window]
    assert not sigmas[1] <= SIGMA <= sigmas[0]
    plain = estimates(model, positive, negative, noise())
    off = estimates(
        blend_attention(model, Settings(start_percent=window[0], end_percent=window[1])), positive, negative, noise()
    )
    assert all(torch.equal(plain[name], off[name]) for name in plain)


def test_runs_leave_nothing_behind(models):
    model = models("mini")
    positive, negative, terms = layered(model), conditioning(model, 2, rows=1), terms_for(models("mini"))
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    plain = sample(model, positive, negative)
    patched = blend_attention(low_rank.apply_to_foreground(model, terms), Settings(reuse=True))
    first, second = sample(patched, positive, negative), sample(patched, positive, negative)
    assert torch.equal(first, second) and not torch.allclose(first, plain, rtol=1e-5, atol=1e-2)

    class Interrupted(Exception):
        pass

    def stop(apply, args):
        raise Interrupted

    broken = patched.clone()
    broken.set_model_attn2_patch(stop)
    with pytest.raises(Exception):  # noqa: B017
        sample(broken, positive, negative)
    assert torch.equal(sample(model, positive, negative), plain)
    assert torch.equal(sample(patched, positive, negative), first)
    assert not any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
        for module in model.model.modules()
    )
    after = model.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_reusing_the_structure_saves_all_prior_passes_but_the_first(models):
    model = models("mini")
    positive, negative = layered(model), conditioning(model, 2, rows=1)
    counts = {}
    for reuse in (False, True):
        calls = []
        patched = blend_attention(model, Settings(reuse=reuse))
        patched.set_model_unet_function_wrapper(watching(calls))
        counts[reuse] = sample(patched, positive, negative, steps=4), calls
    rows = [[number for _which, number in calls] for _result, calls in counts.values()]
    assert rows == [[1, 3, 3] * 4, [1, 3, 3] + [3, 3] * 3]
    assert not torch.equal(counts[False][0], counts[True][0])


def test_the_reused_structure_is_that_of_the_step_before(models):
    model = models("mini")
    patched, options = blend_attention(model, Settings(reuse=True)), {}
    record = fusion.METHOD.record(patched)

    def keep(q, k, v, extra):
        call = extra[fusion.METHOD.key]
        options.setdefault(call.phase, []).append(
            (q[:: 1 if call.phase == "prior" else 3].clone(), k[:: 1 if call.phase == "prior" else 3].clone())
        )
        return attend(q, k, v, extra)

    patched.set_model_attn1_replace(keep, *fusion.structure_place(model))
    sample(patched, layered(model), conditioning(model, 2, rows=1))
    # The foreground's own call, then the pair's and all three's.
    own = [pair for pair in options["conditional"] if len(pair[0]) == 1][::3]
    expected = [fusion.fusion.structure_prior(*pair, 4) for pair in [options["prior"][0], *own[:2]]]
    assert len(record.steps) == 3
    for step, prior in zip(record.steps, expected, strict=True):
        assert torch.allclose(step[:, 0].flatten(1), prior, rtol=0, atol=1e-6)
        assert torch.allclose(step[:, 2].flatten(1).amax(1), torch.ones(1), rtol=0, atol=1e-6) and step.shape == (
            1,
            4,
            16,
            16,
        )


@pytest.mark.parametrize("ours_first", [True, False])
def test_other_patches_are_chained_whatever_the_order(models, ours_first):
    """Replacing patches of another pack that scale an attention's values: the same as that weight scaled in
    the model.
    """
    model = models("mini")
    positive, negative = layered(model), conditioning(model, 2, rows=1)

    def scaled(q, k, v, extra):
        return attend(q, k, v * 1.7, extra)

    def shifted(hidden, extra):
        return hidden + 0.1 * (extra["block"] == ("middle", 0))

    def theirs(model):
        model = model.clone()
        model.set_model_attn1_replace(scaled, "input", 1)
        model.set_model_attn2_replace(scaled, "output", 4, 0)
        model.set_model_attn1_output_patch(shifted)
        return model

    patched = theirs(blend_attention(model, Settings())) if ours_first else blend_attention(theirs(model), Settings())
    found = estimates(patched, positive, negative, noise())
    altered = copy.deepcopy(model.model.diffusion_model)
    altered.input_blocks[1][1].transformer_blocks[0].attn1.to_v.weight.data *= 1.7
    altered.output_blocks[4][1].transformer_blocks[0].attn2.to_v.weight.data *= 1.7
    altered.middle_block[1].transformer_blocks[0].attn1.to_out[0].bias.data += 0.1
    twin = model.clone()
    real = model.model.diffusion_model
    try:
        twin.model.diffusion_model = altered
        cond, uncond = expected(twin, found, positive, negative)
    finally:
        twin.model.diffusion_model = real
    assert close(found["cond"], cond) and close(found["uncond"], uncond)


@pytest.mark.parametrize("size", [1, 3])
def test_a_control_of_each_branch_stays_with_it(models, size):
    model = models("mini")
    hints = torch.randn(size, 192, 1, 1, generator=torch.Generator().manual_seed(4))
    controlled, negative = layered(model, control=Hints(hints)), conditioning(model, 2, rows=1)
    found = estimates(blend_attention(model, Settings()), controlled, negative, noise())
    unet = model.model.diffusion_model

    def with_hint(module, args, output):
        return output + hints.to(output).expand(3, -1, -1, -1)[: len(output)]

    altered = copy.deepcopy(unet)
    altered.middle_block[-1].register_forward_hook(with_hint)
    try:
        model.model.diffusion_model = altered
        cond, _uncond = expected(model, found, layered(model), negative)
    finally:
        model.model.diffusion_model = unet
    assert close(found["cond"], cond)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_near_the_exact_one(models, dtype):
    model = models("mini")
    positive, negative = layered(model), conditioning(model, 2, rows=1)
    wanted = estimates(blend_attention(model, Settings()), positive, negative, noise())["cond"]
    half = fusion_reference.patcher("mini")
    half.model.diffusion_model.to(dtype)
    half.model.diffusion_model.dtype = dtype
    terms = {key: (up.half() * 0, down.half()) for key, (up, down) in terms_for(model).items()}
    found = estimates(
        blend_attention(low_rank.apply_to_foreground(half, terms), Settings()), positive, negative, noise()
    )["cond"]
    plain = estimates(model, positive, negative, noise())["cond"]
    assert (found - wanted).abs().mean() < 0.1 * (plain - wanted).abs().mean()


def test_only_the_chosen_blocks_blend(models):
    model = models("mini")
    positive, negative = layered(model), conditioning(model, 2, rows=1)
    everything = estimates(blend_attention(model, Settings()), positive, negative, noise())["cond"]
    found = {
        name: estimates(blend_attention(model, Settings(blocks=blocks)), positive, negative, noise())["cond"]
        for name, blocks in fusion.BLOCKS.items()
    }
    assert torch.equal(found.pop("all"), everything)
    values = [everything, *found.values()]
    assert all(
        not torch.allclose(one, other, rtol=1e-5, atol=1e-3) for i, one in enumerate(values) for other in values[:i]
    )


@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize("kind", ["mini", "SDXL"])
def test_a_term_on_the_foreground_equals_a_merged_model_and_leaves_the_rest(models, kind, strength):
    model, terms = models(kind), terms_for(models(kind))
    positive, negative = conditioning(model, 1), conditioning(model, 2, rows=1)
    found = estimates(low_rank.apply_to_foreground(model, terms, strength), positive, negative, noise(6))
    plain = estimates(model, positive, negative, noise(6))
    full = model.clone()
    full.add_patches({key: ("diff", (up @ down,)) for key, (up, down) in terms.items()}, strength)
    one = estimates(full, positive, negative, noise(6))
    for name in ("cond", "uncond"):
        assert (found[name][::3] - one[name][::3]).abs().max() < 1e-4 * max(1, one[name].abs().max())
        assert not torch.allclose(one[name][::3], plain[name][::3], rtol=1e-5, atol=1e-2)
        for i in (1, 2):
            assert torch.allclose(found[name][i::3], plain[name][i::3], rtol=1e-5, atol=1e-5)


def test_full_differences_of_every_weight_equal_a_merged_model_too(models):
    model = models("mini")
    generator = torch.Generator().manual_seed(3)
    weights = model.model.diffusion_model.state_dict()
    terms = {
        f"diffusion_model.{name}": torch.randn(value.shape, generator=generator) * 0.2 * value.std()
        for name, value in weights.items()
    }
    positive, negative = conditioning(model, 1), conditioning(model, 2, rows=1)
    for chosen in (terms, {key: value for key, value in terms.items() if key.endswith("bias")}):
        full = model.clone()
        full.add_patches({key: ("diff", (value,)) for key, value in chosen.items()})
        found, one, plain = (
            estimates(made, positive, negative, noise())
            for made in (low_rank.apply_to_foreground(model, chosen), full, model)
        )
        assert (found["cond"][0] - one["cond"][0]).abs().max() < 1e-4 * one["cond"].abs().max()
        assert not torch.allclose(one["cond"][0], plain["cond"][0], rtol=1e-5, atol=1e-2) and torch.allclose(
            found["cond"][1:], plain["cond"][1:], rtol=1e-5, atol=1e-5
        )


def test_two_terms_add_up_and_a_clone_keeps_them(models):
    model, terms = models("mini"), terms_for(models("mini"))
    half = {key: (up / 2, down) for key, (up, down) in terms.items()}
    positive, negative = conditioning(model, 1), conditioning(model, 2, rows=1)
    once = estimates(low_rank.apply_to_foreground(model, terms), positive, negative, noise())
    twice = estimates(
        low_rank.apply_to_foreground(low_rank.apply_to_foreground(model, half), half).clone(),
        positive,
        negative,
        noise(),
    )
    assert torch.allclose(once["cond"], twice["cond"], rtol=1e-5, atol=1e-4)


def test_wrong_terms_are_refused(models):
    model, (key, (up, down)) = models("mini"), next(iter(terms_for(models("mini")).items()))
    for wrong in (
        {key.replace("attn1", "attn7"): (up, down)},
        {key: (up[1:], down)},
        {key.replace("weight", "bias"): up[:, 0]},
        {"conv": up},
    ):
        with pytest.raises(ValueError, match="does not fit this model"):
            low_rank.apply_to_foreground(model, wrong)


@pytest.mark.parametrize(
    "positive, negative, count, words",
    [
        ({}, {}, 4, "batch of 4"),
        ({END_TOKENS: None}, {}, 3, "Encode layer prompts"),
        ({"area": (8, 8, 0, 0)}, {}, 3, "area"),
        ({}, {"area": (8, 8, 0, 0)}, 3, "area"),
    ],
)
def test_wrong_inputs_are_named(models, positive, negative, count, words):
    model = models("mini")
    cond = layered(model, **positive)
    if END_TOKENS in positive:
        del cond[0][1][END_TOKENS]
    with pytest.raises(ValueError, match=words):
        estimates(blend_attention(model, Settings()), cond, conditioning(model, 2, rows=1, **negative), noise(count))
    with pytest.raises(ValueError, match="several conditionings"):
        estimates(blend_attention(model, Settings()), layered(model) * 2, conditioning(model, 2, rows=1), noise())
    twice = blend_attention(blend_attention(model, Settings()), Settings())
    with pytest.raises(ValueError, match="model: two Attention blend nodes"):
        estimates(twice, layered(model), conditioning(model, 2, rows=1), noise())


def test_an_unknown_family_is_refused(models, monkeypatch):
    model = models("mini").clone()
    monkeypatch.setattr(fusion, "STRUCTURE_LAYER", {"SDXL": ["output", 5, 1]})
    with pytest.raises(ValueError, match="this is StrataMini, and LayerFusion works with"):
        blend_attention(model, Settings())


@pytest.fixture(scope="module")
def clip(family):
    from strata.patches import mini_family

    mini_family.register()
    return comfy.sd.load_checkpoint_guess_config(str(family["sd"]), output_vae=False, output_clip=True)[1]


def test_prompts_are_encoded_row_by_row_with_the_end_of_the_first(clip):
    prompts = ("a red apple", "on the beach in snow", "a red apple on the beach")
    cond, values = encode_prompts(clip, prompts)[0]
    for row, pooled, prompt in zip(cond, values["pooled_output"], prompts, strict=True):
        alone, own = clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)
        assert torch.equal(row, alone[0]) and torch.equal(pooled, own[0])
    assert values[END_TOKENS] == [4]  # start, a, red, apple, end
    assert encode_prompts(clip, ("", "a", "b"))[0][1][END_TOKENS] == [1]


def test_long_prompts_have_one_end_a_chunk_and_are_brought_to_the_longest(clip):
    words = " ".join(["dog"] * 100)
    cond, values = encode_prompts(clip, (words, "a beach", " ".join(["cat"] * 160)))[0]
    assert cond.shape[:2] == (3, 231) and values[END_TOKENS] == [76, 77 + 26]
    empty, own = (clip.encode_from_tokens(clip.tokenize(text))[0] for text in ("", words))
    assert torch.equal(cond[0], torch.cat([own, empty])), "two chunks do not go into three"
    assert torch.equal(cond[1], clip.encode_from_tokens(clip.tokenize("a beach"))[0].repeat(3, 1))
    cond, values = encode_prompts(clip, (words, "a beach", " ".join(["cat"] * 260)))[0]
    assert cond.shape[1] == 308 and values[END_TOKENS] == [76, 77 + 26, 154 + 76, 154 + 77 + 26], (
        "two chunks go into four"
    )


def test_both_encoders_of_sdxl_and_its_padding_are_understood():
    from comfy.sdxl_clip import SDXLTokenizer
    from strata.patches.layer_prompts import end_tokens

    tokenizer = SDXLTokenizer()
    assert end_tokens(tokenizer.tokenize_with_weights("a red apple"), tokenizer) == [4]
    assert end_tokens(tokenizer.tokenize_with_weights("(a red:1.3) apple " + "dog " * 100), tokenizer) == [76, 77 + 29]


def test_where_an_embedding_makes_one_encoders_prompt_longer_a_chunk_ends_with_the_longer():
    from comfy.sdxl_clip import SDXLTokenizer
    from strata.patches.layer_prompts import _chunk_ends, end_tokens

    tokenizer = SDXLTokenizer()
    for longer in "lg":
        tokens = tokenizer.tokenize_with_weights("a red apple " + "dog " * 100)
        second = tokens[longer][1]
        second[1:1] = [(torch.zeros(8), 1.0)] * 2  # an embedding of two vectors, in one encoder's file alone
        ends = end_tokens(tokens, tokenizer)
        assert ends == [76, 77 + 29, 77 + 31] and _chunk_ends(ends, 77) == [76, 77 + 31]
    assert _chunk_ends([4, 6, 77, 154 + 3, 154 + 9], 77) == [6, 77, 154 + 9]


def test_encoders_without_an_end_token_are_refused():
    from strata.patches.layer_prompts import end_tokens

    with pytest.raises(ValueError, match="t5xxl"):
        end_tokens({"t5xxl": [[(1, 1.0)]]}, object())
