"""Shared layers and context maps in ComfyUI's sampling, against the same equations written out block by block in
float64.
"""

import copy
from types import MethodType

import comfy.samplers
import comfy.sd
import comfy.utils
import pytest
import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import BasicTransformerBlock
from strata.patches import foreground, mini_family, shared_layers
from strata.patches.attention_blocks import attend
from strata.patches.layer_prompts import LAYERS, encode_layers, split_prompts
from strata.patches.shared_layers import Maps, Sharing, map_context, object_rows, share_layers
from strata.techniques.shared_layers import global_embedding

from .fusion_reference import attention, minmax
from .sampling_helpers import (
    EARLY,
    LATE,
    WORDS,
    close,
    conditioning,
    estimates,
    low_memory,
    merged,
    noise,
    sample,
    terms_for,
    watching,
    with_layers,
)
from .small_transformers import unknown

COUNT = 4
# Numbers of the attention blocks of the way down at its lowest resolution.
DEEPEST = {"mini": range(1, 99), "SD1.5": (4, 5), "SDXL": range(4, 99)}


def both(model, sharing=1.0, mixing=1.0):
    return map_context(share_layers(model, Sharing(sharing)), Maps(mixing))


class Reference:
    """unet: the model, copied; its blocks get the equations."""

    def __init__(self, model, kind, sharing, mixing):
        self.unet, self.sharing, self.mixing = copy.deepcopy(model.model.diffusion_model).double(), sharing, mixing
        self.unet.dtype = torch.float64
        for name, part in (
            ("input", self.unet.input_blocks),
            ("middle", self.unet.middle_block),
            ("output", self.unet.output_blocks),
        ):
            for number, block in enumerate(m for m in part.modules() if isinstance(m, BasicTransformerBlock)):
                mapped = name == "input" and number in DEEPEST[kind]
                block.forward = MethodType(
                    lambda block, x, context=None, transformer_options=None, up=name == "output", mapped=mapped: (
                        self.step(block, x, context, up, mapped)
                    ),
                    block,
                )

    def step(self, block, x, context, up, mapped):
        normed = entered = block.norm1(x)
        if up and self.mixing:
            side = int(normed.shape[1] ** 0.5)
            for scene in range(len(x) // COUNT):
                maps = minmax(sum(self.shares)[scene].double())  # [objects, places]
                small = int(maps.shape[1] ** 0.5)
                maps = (
                    F.interpolate(maps.view(1, -1, small, small), (side, side), mode="bilinear").flatten(2)[0]
                    * self.mixing
                )
                entered = entered.clone()
                for number in (1, 2):
                    share, row = maps[number - 1, :, None], scene * COUNT + number
                    entered[row] = normed[scene * COUNT + 3] * share + normed[row] * (1 - share)
        out = attention(block.attn1, entered, entered)[0]
        if up and self.sharing:
            joint = torch.cat(
                [entered.unflatten(0, (-1, COUNT)).flatten(1, 2)[row // COUNT][None] for row in range(len(x))]
            )
            out = torch.lerp(out, attention(block.attn1, entered, joint)[0], self.sharing)
        x = x + out
        out, probabilities = attention(block.attn2, block.norm2(x), context)
        if mapped and self.conditional:
            composite = probabilities.mean(1)[COUNT - 1 :: COUNT]
            self.shares.append(torch.stack([composite[..., own].sum(-1) for _, own in WORDS[1:]], 1))
        x = x + out
        return x + block.ff(block.norm3(x))

    def __call__(self, *args, conditional, **kwargs):
        self.conditional = conditional
        if conditional:
            self.shares = []
        return self.unet(*args, **kwargs)


def expected(model, kind, found, positive, negative, sigma, sharing=1.0, mixing=1.0, unet=None):
    """The two denoised batches by the reference, for the batch that the sampler had."""
    reference = Reference(model, kind, sharing, mixing)
    sampling, x = model.model.model_sampling, found["input"]
    sigmas = torch.full((len(x),), sigma)
    scaled, times = sampling.calculate_input(sigmas, x).double(), sampling.timestep(sigmas).float()
    out = []
    with torch.no_grad():
        for conditional, cond in ((True, positive), (False, negative)):
            rows = comfy.utils.repeat_to_batch_size(cond[0][0], len(x)).double()
            y = model.model.encode_adm(
                pooled_output=cond[0][1]["pooled_output"],
                width=128,
                height=128,
                prompt_type="",
                noise=x,
                device=x.device,
            )
            extra = {} if y is None else {"y": comfy.utils.repeat_to_batch_size(y, len(x)).double()}
            out.append(
                sampling.calculate_denoised(
                    sigmas, reference(scaled, times, context=rows, conditional=conditional, **extra), x.double()
                )
            )
    return out


@pytest.mark.parametrize(
    ("kind", "count", "sharing", "mixing", "sigma"),
    [
        *(
            (kind, *case)
            for kind in ("mini", "SD1.5")
            for case in ((8, 1.0, 1.0, EARLY), (4, 0.4, 0.7, EARLY), (4, 0.0, 1.0, EARLY), (4, 1.0, 1.0, LATE))
        ),
        ("SDXL", 8, 1.0, 1.0, EARLY),
    ],
)
def test_one_call_is_the_papers_equations(models, kind, count, sharing, mixing, sigma):
    model = models(kind)
    positive, negative = with_layers(model), conditioning(model, 2, rows=1)
    found = estimates(both(model, sharing, mixing), positive, negative, noise(count), sigma)
    cond, uncond = expected(model, kind, found, positive, negative, sigma, sharing, mixing if sigma == EARLY else 0)
    plain = estimates(model, positive, negative, noise(count), sigma)
    assert close(found["cond"], cond) and close(found["uncond"], uncond)
    assert not close(plain["cond"], cond, 3e-3) and not close(plain["uncond"], uncond, 3e-3)


def test_the_maps_are_a_quarter_of_the_latent_wide_as_published_16_tokens_at_512_pixels(models):
    assert shared_layers.map_places(models("SD1.5")) == [("input", 7, 0), ("input", 8, 0)]
    assert {place[1] for place in shared_layers.map_places(models("SDXL"))} == {7, 8} and len(
        shared_layers.map_places(models("SDXL"))
    ) == 20
    model = map_context(models("SD1.5"), Maps())
    record = shared_layers.METHOD.record(model)
    sample(model, with_layers(model), conditioning(model, 2, rows=1), steps=2, x=noise(4, side=32))
    assert [maps.shape for maps in record.steps] == [(1, 2, 8, 8)] * 2 and all(
        maps.min() == 0 and maps.max() == 1 for maps in record.steps
    )


def off(model):
    return both(model, 0.0, 0.0)


@pytest.mark.parametrize(
    "make",
    [off, lambda model: share_layers(model, Sharing(1.0, 0.0, 0.2)), lambda model: map_context(model, Maps(1.0))],
)
def test_off_and_outside_of_its_percents_it_is_bit_equal_to_stock(models, make):
    model = models("mini")
    positive, negative = with_layers(model), conditioning(model, 2, rows=1)
    plain, found = (estimates(one, positive, negative, noise(8), LATE) for one in (model, make(model)))
    assert all(torch.equal(plain[name], found[name]) for name in plain)


@pytest.mark.parametrize("kind", ["mini", "SDXL"])
def test_a_background_alone_is_bit_equal_to_stock(models, kind):
    model = models(kind)
    positive, negative = with_layers(model, words=WORDS[:1]), conditioning(model, 2, rows=1)
    plain, found = (sample(one, positive, negative, x=noise(2)) for one in (model, both(model)))
    assert torch.equal(plain, found)


@pytest.mark.parametrize(
    ("make", "words", "sigma", "acts"),
    [
        (lambda model: share_layers(model, Sharing(1.0, 0.0, 0.2)), WORDS, LATE, False),
        (lambda model: share_layers(model, Sharing(1.0, 0.0, 0.2)), WORDS, EARLY, True),
        (lambda model: map_context(model, Maps(1.0)), WORDS, LATE, False),
        (lambda model: map_context(model, Maps(1.0)), WORDS, EARLY, True),
        (both, WORDS[:1], EARLY, False),
    ],
)
def test_where_nothing_acts_the_network_is_told_of_nothing(models, make, words, sigma, acts):
    """Nothing of the call is in the options that other packs see, and no patch of ours is in the network's way."""
    model, seen = make(models("mini")), []

    def watch(apply, args):
        seen.append(shared_layers.METHOD.key in args["c"]["transformer_options"])
        return apply(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(watch)
    rows = shared_layers.layer_count(words)
    estimates(model, with_layers(model, words=words), conditioning(model, 2, rows=1), noise(rows), sigma)
    assert seen and set(seen) == {acts}


def test_the_given_model_is_unchanged_and_the_order_of_the_nodes_does_not_matter(models):
    model = models("mini")
    positive, negative = with_layers(model), conditioning(model, 2, rows=1)
    plain = sample(model, positive, negative, x=noise(4))
    patched, other = both(model), share_layers(map_context(model, Maps()), Sharing())
    first = sample(patched, positive, negative, x=noise(4))
    assert torch.equal(first, sample(patched, positive, negative, x=noise(4))) and torch.equal(
        first, sample(other, positive, negative, x=noise(4))
    )
    assert torch.equal(plain, sample(model, positive, negative, x=noise(4))) and not torch.allclose(
        plain, first, rtol=1e-5, atol=1e-2
    )
    assert torch.equal(plain, sample(shared_layers.without_layers(patched), positive, negative, x=noise(4)))


def permuted(positive, rows):
    cond, values = positive[0]
    words = [values[LAYERS][row] for row in rows[:-1]]
    return [[cond[rows], {**values, "pooled_output": values["pooled_output"][rows], LAYERS: words}]]


def test_layers_and_pictures_in_another_order_come_out_in_that_order(models):
    model = both(models("mini"))
    positive, negative = with_layers(model), conditioning(model, 2, rows=1)
    x = noise(8)
    found = sample(model, positive, negative, x=x).unflatten(0, (2, 4))
    rows = [0, 2, 1, 3]
    other = sample(
        model, permuted(positive, rows), negative, x=x.unflatten(0, (2, 4))[:, rows].flatten(0, 1)
    ).unflatten(0, (2, 4))
    # Latents of about 50: sums in another order differ by the last bits of single precision.
    assert torch.allclose(other, found[:, rows], rtol=1e-5, atol=1e-4)
    turned = sample(model, positive, negative, x=x.unflatten(0, (2, 4)).flip(0).flatten(0, 1)).unflatten(0, (2, 4))
    assert torch.allclose(turned, found.flip(0), rtol=1e-5, atol=1e-4) and not torch.allclose(
        found[0], found[1], rtol=1e-5, atol=0.1
    )


def test_cond_and_uncond_go_together_but_while_the_maps_are_mixed_in(models, monkeypatch):
    model = models("mini")
    positive, negative = with_layers(model), conditioning(model, 2, rows=1)
    calls, results = [], []
    for free in (1e18, 1.0):
        low_memory(monkeypatch, free)
        patched = both(model)
        patched.set_model_unet_function_wrapper(watching(calls))
        results.append([estimates(patched, positive, negative, noise(4), sigma) for sigma in (EARLY, LATE)])
    assert all(
        torch.allclose(results[0][i][name], results[1][i][name], rtol=1e-5, atol=1e-4)
        for i in (0, 1)
        for name in ("cond", "uncond")
    )
    assert [sorted(which) for which, _ in calls[:5]] == [[0], [1], [0, 1], [0], [1]]
    assert [rows for _, rows in calls] == [4, 4, 8, 4, 4, 4, 4]


@pytest.mark.parametrize("ours_first", [True, False])
def test_other_patches_are_kept(models, ours_first):
    """Replacing patches of another pack that scale an attention's values: the same as that weight scaled in
    the model.
    """
    model = models("mini")
    positive, negative = with_layers(model), conditioning(model, 2, rows=1)
    down = shared_layers.map_places(model)[0][1]

    def theirs(model):
        model = model.clone()
        for setter, block in (
            (model.set_model_attn1_replace, ("output", 4)),
            (model.set_model_attn2_replace, ("input", down)),
        ):
            setter(lambda q, k, v, extra: attend(q, k, v * 1.7, extra), *block)
        model.set_model_attn1_patch(lambda q, k, v, extra: (q, k, v * 1.3 if extra["block"] == ("output", 4) else v))
        return model

    found = estimates(theirs(both(model)) if ours_first else both(theirs(model)), positive, negative, noise(4), EARLY)
    altered = copy.deepcopy(model.model.diffusion_model)
    altered.output_blocks[4][1].transformer_blocks[0].attn1.to_v.weight.data *= 1.7 * 1.3
    altered.input_blocks[down][1].transformer_blocks[0].attn2.to_v.weight.data *= 1.7
    real = model.model.diffusion_model
    try:
        model.model.diffusion_model = altered
        cond, uncond = expected(model, "mini", found, positive, negative, EARLY)
    finally:
        model.model.diffusion_model = real
    assert close(found["cond"], cond) and close(found["uncond"], uncond)


def test_keys_that_another_patch_has_added_are_shared_and_not_mixed(models):
    model = models("mini").clone()
    model.set_model_attn1_patch(lambda q, k, v, extra: (q, torch.cat([k, k[:, :3]], 1), torch.cat([v, v[:, :3]], 1)))
    positive, negative = with_layers(model), conditioning(model, 2, rows=1)
    found = estimates(both(model), positive, negative, noise(4), EARLY)["cond"]
    assert found.isfinite().all() and not torch.allclose(
        found, estimates(both(models("mini")), positive, negative, noise(4), EARLY)["cond"], rtol=1e-5, atol=1e-3
    )


def test_an_adapter_on_the_objects_equals_a_merged_model_and_leaves_the_rest(models):
    model, terms = models("mini"), terms_for(models("mini"))
    positive, negative = with_layers(model), conditioning(model, 2, rows=1)
    found = estimates(
        foreground.apply_to_foreground(model, terms, rows=object_rows(COUNT)), positive, negative, noise(8)
    )
    twin = model.clone()
    real = model.model.diffusion_model
    plain = estimates(model, positive, negative, noise(8))
    try:
        twin.model.diffusion_model = merged(real, terms)
        one = estimates(twin, positive, negative, noise(8))
    finally:
        model.model.diffusion_model = real
    for name in ("cond", "uncond"):
        for row in range(8):
            wanted = (one if row % COUNT in (1, 2) else plain)[name][row]
            assert (found[name][row] - wanted).abs().max() < 1e-4 * max(1, wanted.abs().max())
        assert not torch.allclose(one[name][1], plain[name][1], rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize(
    ("positive", "negative", "count", "words"),
    [
        ({}, {}, 5, "a batch of 5 cannot be split into scenes of 4 layers"),
        ({LAYERS: None}, {}, 4, "make it with Layer prompts"),
        ({"area": (8, 8, 0, 0)}, {}, 4, "limited to an area"),
        ({}, {"area": (8, 8, 0, 0)}, 4, "limited to an area"),
    ],
)
def test_wrong_inputs_are_named(models, positive, negative, count, words):
    model = both(models("mini"))
    cond = with_layers(model, **positive)
    if LAYERS in positive:
        del cond[0][1][LAYERS]
    with pytest.raises(ValueError, match=words):
        estimates(model, cond, conditioning(model, 2, rows=1, **negative), noise(count))
    with pytest.raises(ValueError, match="several conditionings"):
        estimates(model, with_layers(model) * 2, conditioning(model, 2, rows=1), noise(4))


def test_a_model_without_cross_attention_is_refused():
    for make in (lambda model: share_layers(model, Sharing()), lambda model: map_context(model, Maps(0.0))):
        with pytest.raises(ValueError, match="model: AuraFlow has neither cross-attention in down and up blocks"):
            make(unknown())


@pytest.fixture(scope="module")
def clip(family):
    mini_family.register()
    return comfy.sd.load_checkpoint_guess_config(str(family["sd"]), output_vae=False, output_clip=True)[1]


def test_prompts_are_rows_and_the_last_has_the_words_of_all(clip):
    prompts = ["the beach", "a red apple", "a dog"]
    cond, values = encode_layers(clip, prompts[0], prompts[1:])[0]
    alone = [clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True) for prompt in prompts]
    assert cond.shape[:2] == (4, 77) and all(torch.equal(row, one[0][0]) for row, one in zip(cond, alone, strict=False))
    assert values[LAYERS] == [("the beach", [1, 2]), ("a red apple", [3, 4, 5]), ("a dog", [6, 7])]
    assert torch.equal(cond[3], global_embedding([one[0][0] for one in alone], [[3], [4], [3]])[0])
    assert torch.equal(
        values["pooled_output"][3:],
        clip.encode_from_tokens(clip.tokenize("a dog, a red apple, the beach"), return_pooled=True)[1],
    )


@pytest.mark.parametrize(
    ("background", "objects", "wanted"),
    [
        (" a beach ", "a dog\n\n  a cat ", ("a beach", ["a dog", "a cat"])),
        (
            "",
            "Background: a beach\n1. a dog\n2) a cat\n- an apple\n* 3 cups",
            ("a beach", ["a dog", "a cat", "an apple", "3 cups"]),
        ),
        ("a beach", "a dog\nbackground:", ("a beach", ["a dog"])),
        (
            "",
            "a dog on a background: blue\n3-legged cat\n1.5 litres",
            ("", ["a dog on a background: blue", "3-legged cat", "1.5 litres"]),
        ),
    ],
)
def test_a_list_of_a_language_model_is_read_as_its_prompts(background, objects, wanted):
    assert split_prompts(background, objects) == wanted


def test_two_backgrounds_are_refused():
    with pytest.raises(ValueError, match="background: there are several, 'a beach' and 'a street'"):
        split_prompts("a beach", "background: a street\na dog")


def test_a_background_alone_is_its_ordinary_encoding(clip):
    ((cond, values),) = encode_layers(clip, "the beach", [])
    assert torch.equal(cond, clip.encode_from_tokens(clip.tokenize("the beach"))) and values[LAYERS] == [
        ("the beach", [])
    ]


def test_long_prompts_go_into_chunks_and_rows_are_repeated_to_one_length(clip):
    long = " ".join(["dog"] * 100)
    cond, values = encode_layers(clip, "the beach", [long, "a cat"])[0]
    assert cond.shape[:2] == (4, 154) and [len(places) for _, places in values[LAYERS]] == [2, 100, 2]
    assert torch.equal(cond[0], clip.encode_from_tokens(clip.tokenize("the beach"))[0].repeat(2, 1))
    alone = clip.encode_from_tokens(clip.tokenize(long))[0]
    assert torch.equal(cond[3][values[LAYERS][1][1]], torch.cat([alone[1:76], alone[78:103]]))
    cond, values = encode_layers(clip, long, [" ".join(["cat"] * 160)])[0]  # 2, 3 and 4 chunks
    assert len(cond[0]) == 4 * 77 and [len(places) for _, places in values[LAYERS]] == [100, 160]
    alone, empty = (clip.encode_from_tokens(clip.tokenize(text))[0] for text in (" ".join(["cat"] * 160), ""))
    assert torch.equal(cond[0][:154], cond[0][154:]) and torch.equal(cond[1], torch.cat([alone, empty])), (
        "two chunks go into four, three do not"
    )
