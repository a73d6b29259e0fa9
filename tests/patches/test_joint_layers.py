"""Shared layers and context maps on transformers, in ComfyUI's sampling, against the same equations written out."""

import comfy.samplers
import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP
from strata.patches.joint_attention import TEXT_LENGTHS
from strata.patches.layer_prompts import LAYERS
from strata.patches.shared_layers import Maps, Sharing, map_context, share_layers

from . import joint_reference, small_transformers
from .sampling_helpers import close, low_memory
from .small_transformers import NAMES, conditioning, latents

COUNT = 4
WORDS = [
    ("a place", [0, 1]),
    ("an apple", [2, 3]),
    ("a dog", [5]),
]  # four rows a scene: place, apple, dog, whole picture
LENGTHS = [5, 7, 4, 6]
BLOCKS = {"Flux": (3, 3), "Flux-Fill": (3, 3), "Qwen-Image": (6,), "Z-Image": (6,), "SD3.5": (6,)}
SIZE = (5, 3)


@pytest.fixture(scope="module")
def models():
    made = {}
    return lambda kind: made.setdefault(kind, small_transformers.patcher(kind))


def layered(seed=1, **extra):
    return conditioning(seed, COUNT, **{LAYERS: WORDS, **extra})


def calls(model, positive, negative, x, cfg=2.0, sigmas=(0.9, 0.0)):
    """The arguments and the result of every call of the model in a run, and the run's result."""
    found = []

    def watch(apply, args):
        found.append((args, apply(args["input"], args["timestep"], **args["c"])))
        return found[-1][1]

    model = model.clone()
    model.set_model_unet_function_wrapper(watch)
    return found, run(model, positive, negative, x, cfg, sigmas)


def run(model, positive, negative, x, cfg=2.0, sigmas=(0.9, 0.0)):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    euler = comfy.samplers.sampler_object("euler")
    with torch.no_grad():
        return guider.sample(x, torch.zeros_like(x), euler, torch.tensor(sigmas), disable_pbar=True, seed=1)


def lengths(args, own):
    """Of each row of a call, by what is in it."""
    chunk = len(args["input"]) // len(args["cond_or_uncond"])
    text = args["c"]["c_crossattn"].shape[1]
    of = {0: (own * chunk)[:chunk], 1: [text] * chunk}  # 0 is the conditional estimate in ComfyUI's own samplers
    return [length for number in args["cond_or_uncond"] for length in of[number]]


@pytest.mark.parametrize("kind", [*NAMES])
@pytest.mark.parametrize("count, sharing, own", [(4, 1.0, [7] * 4), (8, 0.4, [5, 10, 4, 9])])
def test_sharing_is_the_papers_equations(models, kind, count, sharing, own):
    """own: the prompts' lengths."""
    model, x, text = models(kind), latents(kind, count), max(own)
    extra = {} if own == [text] * 4 else {TEXT_LENGTHS: own}
    found, _ = calls(share_layers(model, Sharing(sharing)), layered(tokens=text, **extra), conditioning(2, 1, 7), x)
    assert sum(len(args["input"]) for args, _ in found) == 2 * count
    for args, result in found:
        text = args["c"]["c_crossattn"].shape[1]
        reference = joint_reference.Layers(
            kind, lengths(args, own), text, SIZE, BLOCKS[kind], count=COUNT, sharing=sharing
        )
        wanted = joint_reference.expected(model, args, reference)
        assert reference.number == sum(BLOCKS[kind]) - 1
        assert close(result, wanted)
        plain = joint_reference.expected(
            model, args, joint_reference.Layers(kind, lengths(args, own), text, SIZE, BLOCKS[kind], count=1)
        )
        assert not close(plain, wanted, 1e-3)


@pytest.mark.parametrize("kind", ["Flux", "Qwen-Image", "Z-Image", "SD3.5"])
@pytest.mark.parametrize("sharing, mixing, own", [(1.0, 1.0, LENGTHS), (0.0, 0.5, [7] * 4)])
def test_maps_and_mixing_are_the_papers_equations(models, kind, sharing, mixing, own):
    """Two scenes; the unconditional estimate has the conditional one's maps."""
    model, x = models(kind), latents(kind, 2 * COUNT)
    extra = {} if own == [7] * 4 else {TEXT_LENGTHS: own}
    ours = map_context(share_layers(model, Sharing(sharing)), Maps(mixing, end_percent=1.0))
    found, _ = calls(ours, layered(**extra), conditioning(2, 1, 7), x)
    assert [args["cond_or_uncond"] for args, _ in found] == [[0], [1]]
    maps = None
    for args, result in found:
        conditional = args["cond_or_uncond"] == [0]
        reference = joint_reference.Layers(
            kind,
            lengths(args, own),
            7,
            SIZE,
            BLOCKS[kind],
            count=COUNT,
            sharing=sharing,
            mixing=mixing,
            words=[places for _, places in WORDS[1:]],
            maps_of=[3, 7] if conditional else [],
            maps=maps,
        )
        wanted = joint_reference.expected(model, args, reference)
        maps = reference.maps
        assert maps.shape == (2, 2, SIZE[0] * SIZE[1]) and maps.min() == 0 and maps.max() == 1
        assert close(result, wanted)


@pytest.mark.parametrize("kind", NAMES)
def test_off_is_bit_equal_to_stock(models, kind):
    model, x = models(kind), latents(kind, COUNT)
    positive, negative = layered(), conditioning(2, 1, 9)
    stock = run(model, positive, negative, x)
    off = map_context(share_layers(model, Sharing(0.0)), Maps(0.0))
    assert torch.equal(run(off, positive, negative, x), stock)
    outside = map_context(share_layers(model, Sharing(1.0, 0.9, 1.0)), Maps(1.0, end_percent=0.01))
    assert torch.equal(run(outside, positive, negative, x), stock)
    assert not torch.equal(run(share_layers(model, Sharing()), positive, negative, x), stock)
    assert torch.equal(run(model, positive, negative, x), stock)  # nothing was left in the network


@pytest.mark.parametrize("kind", NAMES)
def test_a_shorter_prompt_in_a_longer_batch_is_what_it_is_alone(models, kind):
    """Sampled side by side, with nothing shared: what fills up a prompt is read by nobody."""
    model, x = models(kind), latents(kind, COUNT)
    positive = layered(**{TEXT_LENGTHS: LENGTHS})
    negative = conditioning(2, 1, 9)
    together = run(share_layers(model, Sharing(1.0, 0.9, 1.0)), positive, negative, x, cfg=1.0)
    for row, length in enumerate(LENGTHS):
        tokens, values = positive[0]
        alone = [[tokens[row : row + 1, :length], {"pooled_output": values["pooled_output"][row : row + 1]}]]
        wanted = run(model, alone, negative, x[row : row + 1], cfg=1.0)
        assert close(together[row : row + 1], wanted)
    padded = positive[0][0].clone()
    padded[0, 5:], padded[2, 4:] = 7.0, -3.0
    other, shared = [[padded, positive[0][1]]], share_layers(model, Sharing())
    assert close(run(shared, other, negative, x), run(shared, positive, negative, x))


def test_cond_and_uncond_together_or_apart_and_cfg_1_are_the_same(models, monkeypatch):
    model, x = share_layers(models("Flux"), Sharing()), latents("Flux", COUNT)
    positive, negative = layered(), conditioning(2, 1, 7)
    low_memory(monkeypatch, 2**40)
    together, result = calls(model, positive, negative, x)
    alone, _ = calls(model, positive, negative, x, cfg=1.0)
    low_memory(monkeypatch, 0)
    apart, other = calls(model, positive, negative, x)
    estimates = [[sorted(args["cond_or_uncond"]) for args, _ in found] for found in (together, apart, alone)]
    assert estimates == [[[0, 1]], [[1], [0]], [[0]]]
    assert close(result, other, 1e-5)
    assert close(alone[0][1], apart[1][1], 1e-5)


def test_another_packs_override_is_called_for_every_attention(models):
    """Sage and flash packs put one into the model's options; ours works around it, whichever node came first."""
    model, x, seen = models("Flux"), latents("Flux", COUNT), []

    def theirs(func, q, k, v, heads, mask=None, **kwargs):
        seen.append((tuple(q.shape), tuple(k.shape), mask))
        return func(q, k, v, heads, mask=mask, **kwargs) * 1.5

    def patched(model):
        model = model.clone()
        model.model_options["transformer_options"]["optimized_attention_override"] = theirs
        return model

    before = run(share_layers(patched(model), Sharing()), layered(), conditioning(2, 1, 7), x, cfg=1.0)
    count = len(seen)
    behind = run(patched(share_layers(model, Sharing())), layered(), conditioning(2, 1, 7), x, cfg=1.0)
    assert torch.equal(before, behind) and len(seen) == 2 * count
    # Three blocks as they are, and in three others the prompt and the image of each row.
    assert count == 3 + 3 * 2 * COUNT and all(mask is None for *_, mask in seen)
    assert {k[2] - q[2] for q, k, _ in seen} == {0, 15, 15 * 3 + 7}
    assert not close(before, run(share_layers(model, Sharing()), layered(), conditioning(2, 1, 7), x, cfg=1.0), 1e-2)


def test_what_cannot_be_told_apart_is_refused(models):
    model, x = models("Flux"), latents("Flux", COUNT)
    ours = share_layers(model, Sharing())

    def dropped(args, rest):
        args["transformer_options"] = {}
        return rest["original_block"](args)

    replaced = ours.clone()
    for number in range(3):
        for kind in ("double_block", "single_block"):
            replaced.set_model_patch_replace(dropped, "dit", kind, number)
    with pytest.raises(ValueError, match=r"^model: another patch on it replaces its attention"):
        run(replaced, layered(), conditioning(2, 1, 7), x)

    def halved(args, rest):
        names, parts = ("img", "txt", "vec", "pe"), (slice(2), slice(2, 4))
        halves = [{**args, **{name: args[name][part] for name in names}} for part in parts]
        outs = [rest["original_block"](half) for half in halves]
        return {name: torch.cat([out[name] for out in outs]) for name in ("img", "txt")}

    cut = ours.clone()
    cut.set_model_patch_replace(halved, "dit", "double_block", 1)
    with pytest.raises(ValueError, match=r"^model: another patch or a cache on it cuts, merges or keeps"):
        run(cut, layered(), conditioning(2, 1, 7), x, cfg=1.0)

    def with_keys_kept(args, rest):
        """As a cache of the prompt's keys does it: the queries are the image's alone."""
        image = torch.zeros(4, 2, 15, 16)
        optimized_attention(image, *[torch.zeros(4, 2, 22, 16)] * 2, 2, skip_reshape=True, **options(args))

    def options(args):
        return {"transformer_options": args["transformer_options"]}

    kept = ours.clone()
    kept.set_model_patch_replace(with_keys_kept, "dit", "double_block", 1)
    with pytest.raises(ValueError, match=r"^model: another patch or a cache on it cuts, merges or keeps"):
        run(kept, layered(), conditioning(2, 1, 7), x, cfg=1.0)
    with pytest.raises(ValueError, match=r"^latent: a batch of 3 cannot be split"):
        run(ours, layered(), conditioning(2, 1, 7), x[:3])


def test_reference_latents_behind_the_image_are_read_by_their_row_alone(models):
    """Kontext's and Qwen-Image-Edit's: another one changes the rows that share with its row, and nothing breaks."""
    for kind in ("Flux", "Qwen-Image"):
        model, x = models(kind), latents(kind, COUNT)
        positive = layered(reference_latents=[latents(kind, 1, (4, 6), seed=9)])
        own = [7] * COUNT
        found, _ = calls(share_layers(model, Sharing()), positive, conditioning(2, 1, 7), x, cfg=1.0)
        args, result = found[0]
        reference = joint_reference.Layers(kind, own, 7, SIZE, BLOCKS[kind], count=COUNT)
        reference.total += 2 * 3
        assert close(result, joint_reference.expected(model, args, reference))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_weights_of_few_bits_are_left_alone(dtype):
    """Stored so, and cast in each layer, as ComfyUI does where it cannot compute in them."""
    model = small_transformers.patcher("Flux", dtype)
    before = {name: value.clone() for name, value in model.model.diffusion_model.state_dict().items()}
    x = latents("Flux", COUNT)
    shared = run(share_layers(model, Sharing()), layered(), conditioning(2, 1, 7), x)
    after = model.model.diffusion_model.state_dict()
    assert all(after[name].dtype == value.dtype == dtype for name, value in before.items())
    assert all(torch.equal(after[name].view(torch.uint8), value.view(torch.uint8)) for name, value in before.items())
    exact = small_transformers.patcher("Flux")
    exact.model.diffusion_model.load_state_dict({name: value.float() for name, value in before.items()})
    assert close(shared, run(share_layers(exact, Sharing()), layered(), conditioning(2, 1, 7), x), 1e-5)


def test_runs_leave_nothing_behind_and_are_equal(models):
    ours = map_context(share_layers(models("Z-Image"), Sharing()), Maps(1.0, 1.0))
    x, sigmas = latents("Z-Image", COUNT), (0.9, 0.6, 0.3, 0.0)
    first, again = (run(ours, layered(), conditioning(2, 1, 7), x, sigmas=sigmas) for _ in range(2))
    assert torch.equal(first, again)
    assert not models("Z-Image").model.diffusion_model._forward_hooks


def test_words_beyond_what_the_model_reads_do_not_count(models):
    """The mini Flux reads the first tokens of a prompt alone."""
    ours, x = map_context(share_layers(models("Flux"), Sharing()), Maps(1.0, 1.0)), latents("Flux", COUNT)
    further = [(prompt, [*places, 7, 60]) for prompt, places in WORDS]
    found = [run(ours, layered(**{LAYERS: words}), conditioning(2, 1, 7), x) for words in (WORDS, further)]
    assert torch.equal(*found)


def test_more_memory_is_asked_for(models):
    """A tenth more than for a plain batch; test_joint_memory.py counts what is taken."""
    shapes, x = [], latents("Flux", COUNT, (10, 15))

    def watch(executor, model, shape, *args, **kwargs):
        shapes.append(list(shape))
        return executor(model, shape, *args, **kwargs)

    ours = share_layers(models("Flux"), Sharing())
    ours.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, "watch", watch)
    run(ours, layered(), conditioning(2, 1, 7), x)
    assert shapes == [[COUNT, 16, 10, 17]]
