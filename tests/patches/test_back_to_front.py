"""BFS's branches on ComfyUI's Flux against diffusers' class in float64, whose processors read the other branch with
merged weights, row by row; and what a branch has of its own against merged models.
"""

from contextlib import ExitStack

import comfy.model_management
import comfy.ops
import comfy.sample
import comfy.sd
import pytest
import torch
from safetensors.torch import save_file
from strata.networks import back_to_front as networks
from strata.networks import flux
from strata.patches import back_to_front, mini_family
from strata.techniques import layering

from . import byte_weights, test_mini_flux
from .random_flux import HEADS, LAYOUTS, RANK, SHAPE, WIDTH, random_file

registered, trained = test_mini_flux.registered, test_mini_flux.trained


def read(weights, metadata=None):
    return networks.recognise("bfs.safetensors", weights, metadata or {}, comfy.ops.manual_cast)


@pytest.fixture
def model(registered, trained, tmp_path):
    save_file(flux.host_form(trained.state_dict()), tmp_path / "flux.safetensors")
    return comfy.sd.load_diffusion_model(str(tmp_path / "flux.safetensors"))


@pytest.fixture
def call():
    """Two pairs, of 4×6 latents."""
    draw = torch.Generator().manual_seed(1)
    latent, image = (torch.randn(4, 4, 4, 6, generator=draw) for _ in range(2))
    cells = layering.alpha_cells(torch.rand(4, 1, 32, 48, generator=draw).round())
    return {
        "latent": latent,
        "condition": torch.cat([image, cells], 1),
        "sigma": torch.tensor([0.9, 0.9, 0.3, 0.0]),
        "text": torch.randn(4, 24, 128, generator=draw),
        "pooled": torch.randn(4, 128, generator=draw),
    }


@torch.no_grad()
def velocity(model, call, control=None):
    """What the host's model predicts, by the clean latents that it returns."""
    model.pre_run()
    found = model.model.apply_model(
        call["latent"],
        call["sigma"],
        c_concat=call["condition"],
        c_crossattn=call["text"],
        y=call["pooled"],
        control=control,
        transformer_options={**model.model_options["transformer_options"], "wrappers": model.wrappers},
    )
    return (call["latent"] - found) / call["sigma"].clamp(min=1e-9).view(-1, 1, 1, 1)


class Reading:
    """The released way: projections of their own, of merged weights, and one row at a time."""

    def __init__(self, plain, weights, block, kind, fused, pairing):
        self.plain, self.kind, self.fused, self.pairing = plain, kind, fused, pairing
        own = {key.removeprefix(f"{block}."): value.double() for key, value in weights.items() if f"{block}." in key}
        self.own = {key: value for key, value in own.items() if key.startswith(("attn1n", "conv1n"))}

    def merged(self, attention, layer, source):
        base = attention.to_out[0] if layer == "to_out.0" else getattr(attention, layer)
        up, down = (self.own[f"attn1n.{layer}.lora_{part}.{source}.weight"] for part in "BA")
        return lambda rows: rows @ (base.weight + up @ down).T + base.bias

    def __call__(
        self, attention, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
    ):
        from diffusers.models.embeddings import apply_rotary_emb

        found = self.plain(attention, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        output = found[0] if self.kind == "double" else found
        positions = image_rotary_emb
        if self.kind == "double":
            positions = tuple(part[encoder_hidden_states.shape[1] :] for part in image_rotary_emb)
        messages = []
        for row, hidden in enumerate(hidden_states):
            other = hidden_states[row ^ 1]
            mine, theirs = ("xy_lora", "yx_lora") if row % 2 == 0 else ("yx_lora", "xy_lora")
            of_queries = theirs if self.pairing == "paper" else mine
            heads = [
                self.merged(attention, layer, source)(rows).unflatten(-1, (HEADS, -1))
                for layer, source, rows in (
                    ("to_q", of_queries, hidden),
                    ("to_k", theirs, other),
                    ("to_v", theirs, other),
                )
            ]
            q, k = attention.norm_q(heads[0]), attention.norm_k(heads[1])
            q, k = (apply_rotary_emb(rows[None], positions, sequence_dim=1)[0].double() for rows in (q, k))
            shares = torch.einsum("thc,shc->hts", q, k).div((WIDTH // HEADS) ** 0.5).softmax(-1)
            message = torch.einsum("hts,shc->thc", shares, heads[2]).flatten(1)
            messages.append(self.merged(attention, "to_out.0", mine)(message) if self.kind == "double" else message)
        mix = self.own["conv1n.weight"]
        for row in range(0, len(messages), 2):
            if self.fused:
                both = torch.cat(messages[row : row + 2], -1) @ mix.T
                added = both[:, :WIDTH], both[:, WIDTH:]
            else:
                added = [message @ mix.T for message in messages[row : row + 2]]
            output[row] += added[0]
            output[row + 1] += added[1]
        return found


@torch.no_grad()
def expected(trained, weights, call, layout, pairing):
    """In float64."""
    import copy

    reference = copy.deepcopy(trained).double()
    blocks, fused = LAYOUTS[layout]
    for kind, numbers in blocks.items():
        for number in numbers:
            name = f"{networks.BLOCKS[kind]}.{number}"
            attention = reference.get_submodule(name).attn
            attention.set_processor(Reading(attention.processor, weights, name, kind, fused, pairing))
    given = {key: value.double() for key, value in call.items()}
    return flux.predict(reference, *(given[key] for key in ("latent", "condition", "sigma", "text", "pooled")))


@pytest.mark.parametrize("pairing", networks.PAIRINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_branches_read_each_other_as_in_float64(layout, pairing, model, trained, call):
    weights = random_file(layout)
    file = read(weights)
    assert file.pairing == ("paper" if layout == "paper" else "released") and not file.unknown
    found = velocity(back_to_front.apply(model, file, 1.0, pairing), call)
    wanted = expected(trained, weights, call, layout, pairing).float()
    moving = call["sigma"] > 0  # where there is no noise, the clean latent does not tell the velocity
    plain = velocity(model, call)
    assert (wanted - plain)[moving].std() > 0.02 * plain[moving].std(), "the branches do read each other"
    assert torch.allclose(found[moving], wanted[moving], rtol=1e-3, atol=1e-4)


def test_off_is_two_plain_branches_to_the_bit(model, call):
    plain = velocity(model, call)
    assert torch.equal(velocity(back_to_front.apply(model, read(random_file("released")), 0.0), call), plain)
    for layout in LAYOUTS:
        silent = back_to_front.apply(model, read(random_file(layout, mixed=False)))
        assert torch.equal(velocity(silent, call), plain)
    unet = model.model.diffusion_model
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())


def test_what_a_branch_learnt_acts_on_its_own_rows_alone(model, trained, call):
    """Each row against a model into which its branch's terms are merged, by diffusers' names."""
    import copy

    weights = random_file("released", own=True, mixed=False)
    found = velocity(back_to_front.apply(model, read(weights)), call)
    given = [call[key] for key in ("latent", "condition", "sigma", "text", "pooled")]
    for row, branch in enumerate(networks.CONTENT):
        merged = copy.deepcopy(trained)
        state = merged.state_dict()
        for key, up in weights.items():
            if f"lora_B.{branch}" in key:
                layer = key.partition(".lora_B")[0]
                state[f"{layer}.weight"] += up @ weights[key.replace("lora_B", "lora_A")]
        merged.load_state_dict(state)
        with torch.no_grad():
            wanted = flux.predict(merged, *(part[row::2] for part in given))
        assert torch.allclose(found[row::2][:1], wanted[:1], rtol=1e-3, atol=1e-4), branch


def test_the_node_predicts_what_the_trainers_class_does(model, trained, call):
    """Random weights in the trainer's class, written as it writes them, read as the node reads them."""
    from strata.training import back_to_front as trainer

    branches = trainer.Branches(trained, RANK, 2)
    torch.manual_seed(4)
    with torch.no_grad():
        for value in branches.parameters():
            if value.requires_grad:
                value.add_(0.1 * torch.randn_like(value))
        expected = branches(*(call[key] for key in ("latent", "condition", "sigma", "text", "pooled")))
    file = read(trainer.published_form(branches.state_dict()))
    found = velocity(back_to_front.apply(model, file), call)
    moving = call["sigma"] > 0
    plain = velocity(model, call)
    assert (expected - plain)[moving].std() > 0.1 * plain[moving].std()
    assert torch.allclose(found[moving], expected[moving], rtol=1e-3, atol=1e-4)


def test_swapped_branches_swap_their_outputs(model, call):
    weights = random_file("released", own=True)
    turned = {}
    for key, value in weights.items():
        for one, other in (networks.SOURCES, networks.CONTENT):
            if one in key.split("."):
                key = key.replace(one, other)
            elif other in key.split("."):
                key = key.replace(other, one)
        turned[key] = value
    other = {name: torch.stack([value[1], value[0], value[3], value[2]]) for name, value in call.items()}
    found = velocity(back_to_front.apply(model, read(weights)), call)
    again = velocity(back_to_front.apply(model, read(turned)), other)
    assert torch.allclose(found[:2], again[:2].flip(0), rtol=1e-4, atol=1e-5)


def test_each_row_has_its_own_noise_level(model, trained, call):
    """One call with two levels is each pair's call; inside a pair as in float64 (above)."""
    patched = back_to_front.apply(model, read(random_file("paper")))
    both = velocity(patched, call)
    for pair in (slice(0, 2), slice(2, 4)):
        alone = velocity(patched, {key: value[pair] for key, value in call.items()})
        moving = call["sigma"][pair] > 0
        assert torch.allclose(both[pair][moving], alone[moving], rtol=1e-4, atol=1e-5)


def test_what_other_packs_do_to_a_block_stays(model, call):
    """A replacement that calls the block acts as without BFS; one that does not is told."""
    seen = []

    def around(args, extra):
        seen.append(args["transformer_options"]["block_index"])
        out = extra["original_block"](args)
        return {**out, "img": out["img"] * 1.01}

    def instead(args, extra):
        return {"img": args["img"]}

    file = read(random_file("paper"))
    alone = velocity(back_to_front.apply(model, file), call)
    other = model.clone()
    other.set_model_patch_replace(around, "dit", "single_block", 2)
    found = velocity(back_to_front.apply(other, file), call)
    assert seen == [2] and not torch.allclose(found, alone, rtol=1e-3, atol=1e-3)
    other.set_model_patch_replace(instead, "dit", "single_block", 2)
    with pytest.raises(ValueError, match="^model: another patch on it replaces"):
        velocity(back_to_front.apply(other, file), call)
    assert not any(module._forward_hooks for module in model.model.diffusion_model.modules())


def test_an_attention_of_another_pack_is_called_for_the_messages_too(model, call):
    calls = []
    other = model.clone()

    def attention(function, *args, **kwargs):
        calls.append(args[0].shape[2])
        return function(*args, **kwargs)

    other.model_options["transformer_options"]["optimized_attention_override"] = attention
    velocity(back_to_front.apply(other, read(random_file("released"))), call)
    text, image = 24, 2 * 3
    double, single = SHAPE["depth"], SHAPE["depth_single_blocks"]
    assert sorted(calls) == sorted([image] * double + [text + image] * (double + 2 * single))


def test_wrong_models_and_files_are_told(model, registered, tmp_path):
    weights = random_file("paper")
    narrow = {key: value[..., : WIDTH // 2].contiguous() for key, value in weights.items() if "lora_A" in key}
    rest = {
        key: value[: len(value) // 2, : value.shape[1] // 2] if "conv1n" in key else value[: WIDTH // 2]
        for key, value in weights.items()
        if "lora_A" not in key
    }
    with pytest.raises(
        ValueError, match=r"^model: bfs.safetensors is for a Flux-Fill of width 80, and this one has 160"
    ):
        back_to_front.apply(model, read(narrow | rest))
    deep = {key.replace("blocks.0.", "blocks.9."): value for key, value in weights.items()}
    with pytest.raises(ValueError, match="^model: bfs.safetensors shares information in more blocks than this"):
        back_to_front.apply(model, read(deep))
    patched = back_to_front.apply(model, read(weights))
    with pytest.raises(ValueError, match="^model: Back to front is on it already"):
        back_to_front.apply(patched, read(weights))
    del weights["single_transformer_blocks.1.conv1n.weight"]
    with pytest.raises(ValueError, match=r"^file: bfs.safetensors has no conv1n.weight in its single block 1"):
        read(weights)
    lacking = random_file("paper", own=True)
    del lacking["transformer_blocks.0.attn.to_k.lora_B.x_lora.weight"]
    with pytest.raises(ValueError, match=r"^file: bfs.safetensors has one half of transformer_blocks.0.attn.to_k's"):
        read(lacking)
    odd = comfy.sample.prepare_noise(torch.zeros(3, 4, 4, 6), 0)
    with pytest.raises(ValueError, match="^latent: a batch of 3 cannot be split into pairs of composite"):
        velocity(
            patched,
            {
                "latent": odd,
                "condition": torch.zeros(3, 68, 4, 6),
                "sigma": torch.ones(3),
                "text": torch.zeros(3, 24, 128),
                "pooled": torch.zeros(3, 128),
            },
        )


def test_copies_of_the_base_are_compared_and_unknown_keys_named(model, trained):
    weights = random_file("released")
    state = trained.state_dict()
    own, copy = (f"transformer_blocks.1.{end}.weight" for end in ("attn.to_q", "attn1n.to_q.base_layer"))
    weights[copy] = state[own].half()
    weights["what.is.this"] = torch.zeros(1)
    file = read({f"transformer.{key}": value for key, value in weights.items()})
    assert file.unknown == ("transformer.what.is.this",) and "2 double and 6 single blocks (rank 3" in file.describe()
    back_to_front.apply(model, file)
    weights["transformer_blocks.1.attn1n.to_q.base_layer.weight"] = torch.zeros(WIDTH, WIDTH)
    with pytest.raises(ValueError, match="^model: bfs.safetensors was trained on another base"):
        back_to_front.apply(model, read(weights))


def test_norms_of_the_file_are_used_where_it_has_them(model, call):
    """A file with the block's own norms gives the same; with others, something else."""
    weights = random_file("paper")
    plain = velocity(back_to_front.apply(model, read(weights)), call)
    blocks = model.model.diffusion_model.single_blocks
    for factor in (1.0, 2.0):
        for number in LAYOUTS["paper"][0]["single"]:
            for norm, host in (("norm_q", "query_norm"), ("norm_k", "key_norm")):
                (scale,) = getattr(blocks[number].norm, host).parameters()
                weights[f"single_transformer_blocks.{number}.attn1n.{norm}.weight"] = factor * scale
        found = velocity(back_to_front.apply(model, read(weights)), call)
        assert torch.allclose(found, plain, rtol=1e-4, atol=1e-5) == (factor == 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_the_exact_result(dtype, model, trained, call, tmp_path):
    exact = velocity(back_to_front.apply(model, read(random_file("released", own=True))), call)
    state = {key: value.to(dtype) for key, value in flux.host_form(trained.state_dict()).items()}
    save_file(state, tmp_path / "half.safetensors")
    half = comfy.sd.load_diffusion_model(str(tmp_path / "half.safetensors"), model_options={"dtype": dtype})
    assert half.model.diffusion_model.img_in.weight.dtype == dtype
    found = velocity(back_to_front.apply(half, read(random_file("released", own=True))), call)
    moving = call["sigma"] > 0
    assert (found - exact)[moving].square().mean().sqrt() < 0.05 * exact[moving].std()


@pytest.mark.parametrize("form", byte_weights.FORMS)
def test_a_base_of_a_byte_gives_what_its_widened_weights_give(form, registered, trained, call):
    coarse, exact = form(flux.host_form(trained.state_dict()))
    before = {key: value.clone() for key, value in coarse.model.diffusion_model.state_dict().items()}
    assert torch.float8_e4m3fn in {value.dtype for value in before.values()}
    file, moving = read(random_file("released", own=True)), call["sigma"] > 0
    widened = comfy.sd.load_diffusion_model_state_dict(exact)
    found, wanted = (velocity(back_to_front.apply(base, file), call)[moving] for base in (coarse, widened))
    plain = [velocity(base, call)[moving] for base in (coarse, widened)]
    assert (wanted - plain[1]).std() > 0.1 * wanted.std()
    host = (plain[0] - plain[1]).square().mean().sqrt()  # ComfyUI rounds more than the weights where they are scaled
    assert (found - wanted).square().mean().sqrt() < 1e-4 + 2 * host and host < 0.01
    after = coarse.model.diffusion_model.state_dict()
    assert all(torch.equal(after[key].float(), value.float()) for key, value in before.items())


def test_a_controlnet_acts_on_both_branches(model, call):
    """What it adds to the blocks reaches each row as in a plain model, and goes into the messages."""
    size, width = 2 * 3, SHAPE["hidden_size"]
    torch.manual_seed(6)
    adds = [torch.randn(4, size, width) for _ in range(SHAPE["depth"])]
    control = {"input": adds, "output": [torch.randn(4, size, width) for _ in range(SHAPE["depth_single_blocks"])]}
    off = back_to_front.apply(model, read(random_file("paper", mixed=False)))
    on = back_to_front.apply(model, read(random_file("paper")))
    assert torch.equal(velocity(off, call, control), velocity(model, call, control))
    assert not torch.allclose(velocity(model, call, control), velocity(model, call), rtol=1e-2, atol=1e-2)
    given = velocity(on, call, control)
    assert not torch.allclose(given, velocity(off, call, control), rtol=1e-3, atol=1e-3)
    lone = [add * torch.tensor([1.0, 0, 1, 0]).view(4, 1, 1) for add in adds]
    own = {"input": lone, "output": []}  # on the composites alone
    one, none = velocity(on, call, own), velocity(on, call)
    assert not torch.allclose(one[1], none[1], rtol=1e-3, atol=1e-3), "the foreground reads what it did to its partner"


def test_a_lora_on_the_model_is_as_if_merged_into_its_file(model, trained, call, tmp_path):
    """Of a single block, whose projections the branches use for what they read of each other."""
    name = "single_blocks.1.linear1.weight"
    state = flux.host_form(trained.state_dict())
    torch.manual_seed(7)
    up, down = torch.randn(len(state[name]), 2), 0.1 * torch.randn(2, WIDTH)
    file, lora = read(random_file("paper")), model.clone()
    lora.add_patches({f"diffusion_model.{name}": ("diff", (up @ down,))})
    save_file({**state, name: state[name] + up @ down}, tmp_path / "merged.safetensors")
    merged = comfy.sd.load_diffusion_model(str(tmp_path / "merged.safetensors"))
    found = back_to_front.apply(lora, file)
    comfy.model_management.load_models_gpu([found])
    given, wanted = velocity(found, call), velocity(back_to_front.apply(merged, file), call)
    comfy.model_management.unload_all_models()
    plain = velocity(back_to_front.apply(model, file), call)
    moving = call["sigma"] > 0
    assert not torch.allclose(plain[moving], wanted[moving], rtol=1e-2, atol=1e-2)
    assert torch.allclose(given[moving], wanted[moving], rtol=1e-3, atol=1e-4)


def test_the_released_key_list_is_read_whole_at_fluxs_size():
    """19 double and 38 single blocks of width 3072, on the meta device."""
    width, rank = 3072, 4
    weights = {}
    with torch.device("meta"):
        for kind, count in (("double", 19), ("single", 38)):
            for number in range(count):
                block = f"{networks.BLOCKS[kind]}.{number}"
                for layer in (*networks.PROJECTIONS, *([networks.OUT] if kind == "double" else [])):
                    for source in networks.SOURCES:
                        weights[f"{block}.attn1n.{layer}.lora_A.{source}.weight"] = torch.empty(rank, width)
                        weights[f"{block}.attn1n.{layer}.lora_B.{source}.weight"] = torch.empty(width, rank)
                weights[f"{block}.conv1n.weight"] = torch.empty(width, width)
        file = read(weights)
    assert networks.is_back_to_front(weights) and file.width == width and not file.unknown
    assert len(file.sharing) == 57 and file.pairing == "released"
    assert mini_family.CONFIG["flux"]["in_channels"] == 72
    count = sum(value.numel() for sharing in file.sharing.values() for value in sharing.parameters())
    assert count == sum(value.numel() for value in weights.values())
    assert count == 57 * width**2 + (19 * 8 + 38 * 6) * 2 * rank * width


@pytest.mark.parametrize(
    ("kinds", "fused", "most"),
    [(("single",), True, 1.16), (("single",), False, 1.12), (("double", "single"), False, 1.17)],
    ids=["paper", "paper, messages apart", "released"],
)
def test_reading_costs_little_at_fluxs_widths(kinds, fused, most):
    """Operations counted on the meta device, at 512 pixels and 512 text tokens, over those of two plain branches; one
    double block and two single ones, which are to each other as Flux's 19 and 38.
    """
    from comfy.ldm.flux.model import Flux
    from comfy.ldm.modules.attention import attention_pytorch
    from torch.utils.flop_counter import FlopCounterMode

    counts = {"double": 1, "single": 2}
    with torch.device("meta"):
        unet = Flux(
            in_channels=96,
            out_channels=16,
            patch_size=2,
            hidden_size=3072,
            num_heads=24,
            depth=counts["double"],
            depth_single_blocks=counts["single"],
            mlp_ratio=4.0,
            context_in_dim=4096,
            vec_in_dim=768,
            axes_dim=[16, 56, 56],
            theta=10_000,
            qkv_bias=True,
            guidance_embed=True,
            operations=comfy.ops.manual_cast,
        )
        terms = {
            (kind, number): networks.Sharing(3072, 4, fused, out=kind == "double")
            for kind in kinds
            for number in range(counts[kind])
        }
        given = torch.empty(2, 96, 64, 64), torch.empty(2), torch.empty(2, 512, 4096), torch.empty(2, 768)
        guidance = torch.empty(2)
    # others ask how much memory is free, which this device cannot say
    options = {"optimized_attention_override": lambda _, *args, **kwargs: attention_pytorch(*args, **kwargs)}

    def counted(pairs) -> int:
        with torch.no_grad(), ExitStack() as stack, FlopCounterMode(display=False) as counter:
            calls = [
                stack.enter_context(back_to_front._coupled(unet, place, sharing, networks.PAIRINGS[0], 1.0))
                for place, sharing in pairs
            ]
            unet(*given, guidance, transformer_options=options)
            assert all(call.done for call in calls)
        return counter.get_total_flops()

    ratio = counted(terms.items()) / counted(())
    print(f"{ratio:.4f}")
    assert 1.05 < ratio <= most
