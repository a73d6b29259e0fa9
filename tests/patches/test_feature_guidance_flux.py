"""FeatGLaC on Flux.1 and Flux-Fill: gradients against finite differences, and all that must stay as it was."""

import comfy.model_management
import comfy.samplers
import comfy.sd
import pytest
import torch
from einops import rearrange
from strata.networks import flux
from strata.patches.feature_guidance import Plane, Planes, Settings, guider
from strata.patches.inversion import invert
from torch import nn

from . import byte_weights, test_mini_flux
from .guidance_helpers import SIDE, STEPS, Case, FluxCase, half_mask
from .sampling_helpers import Hints
from .test_feature_guidance import same
from .test_gradients import gradient_and_differences, holds

registered, trained = test_mini_flux.registered, test_mini_flux.trained

WEIGHTS = {"double 1": 0.2, "single 0": 8.5}
TEXT = "double 1: 0.2, single 0: 8.5"


@pytest.fixture(scope="module")
def case():
    return FluxCase()


def blocks_written_out(network, x, sigma, text):
    """{block: [B,N,C]}, the image's tokens behind each block, in the words of Flux's paper and not in place."""
    words, pooled = text[0][0].to(x), text[0][1]["pooled_output"].to(x)
    height, width = x.shape[2] // 2, x.shape[3] // 2
    image = network.img_in(rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2))
    time = [embedding(value.to(x)) for value in (sigma, torch.tensor(3.5, dtype=torch.float64))]
    vec = network.time_in(time[0]) + network.guidance_in(time[1]) + network.vector_in(pooled)
    text = network.txt_in(words)
    places = torch.zeros(text.shape[1] + height * width, 3)
    places[text.shape[1] :, 1] = torch.arange(height).repeat_interleave(width)
    places[text.shape[1] :, 2] = torch.arange(width).repeat(height)
    found = {}
    for number, block in enumerate(network.double_blocks):
        mods = [block.img_mod(vec), block.txt_mod(vec)]
        parts = [(image, block.img_attn, mods[0][0]), (text, block.txt_attn, mods[1][0])]
        rows = [heads(attn.qkv(modulated(part, mod)), attn.norm, network.num_heads) for part, attn, mod in parts]
        out = attention(*(torch.cat([rows[1][i], rows[0][i]], 2) for i in range(3)), places)
        shares = [out[:, text.shape[1] :], out[:, : text.shape[1]]]
        image, text = (
            part + attn.proj(share) * mod.gate for (part, attn, mod), share in zip(parts, shares, strict=True)
        )
        image = image + block.img_mlp(modulated(image, mods[0][1])) * mods[0][1].gate
        text = text + block.txt_mlp(modulated(text, mods[1][1])) * mods[1][1].gate
        found[f"double {number}"] = image
    tokens = torch.cat([text, image], 1)
    for number, block in enumerate(network.single_blocks):
        mod = block.modulation(vec)[0]
        qkv, inner = block.linear1(modulated(tokens, mod)).split([3 * network.hidden_size, 4 * network.hidden_size], -1)
        out = attention(*heads(qkv, block.norm, network.num_heads), places)
        tokens = tokens + block.linear2(torch.cat([out, nn.functional.gelu(inner, approximate="tanh")], -1)) * mod.gate
        found[f"single {number}"] = tokens[:, text.shape[1] :]
    return found


def embedding(value):
    frequencies = torch.exp(-torch.arange(128, dtype=torch.float32) / 128 * torch.tensor(10000.0).log())
    angles = (1000 * value.reshape(1, 1)).float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1).to(value)


def modulated(tokens, mod):
    return nn.functional.layer_norm(tokens, tokens.shape[-1:], eps=1e-6) * (1 + mod.scale) + mod.shift


def heads(qkv, norm, number):
    q, k, v = rearrange(qkv, "b t (three h c) -> three b h t c", three=3, h=number)
    return [
        row * (row.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * scale
        for row, scale in ((q, norm.query_norm.scale), (k, norm.key_norm.scale))
    ] + [v]


def attention(q, k, v, places):
    q, k = (turned(row, places) for row in (q, k))
    weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)
    return rearrange(weights @ v, "b h t c -> b t (h c)")


def turned(rows, places, axes=(4, 6, 6)):
    """Rotary positions: each pair of channels as a complex number."""
    angles = [
        places[:, axis : axis + 1].double() / 10000 ** (torch.arange(0, size, 2).double() / size)
        for axis, size in enumerate(axes)
    ]
    pairs = torch.view_as_complex(rows.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones(()).double(), torch.cat(angles, -1))).flatten(-2)


def energy_written_out(case, x, sigma):
    """Eq. 4 over two planes and two blocks, in units of each channel's deviation over the scenes' places."""
    network, total = case.model.model.diffusion_model, 0.0
    own = blocks_written_out(network, x, sigma, case.positive)
    scenes = [
        blocks_written_out(network, inversion.at(float(sigma)).double(), sigma, inversion.positive)
        for inversion in case.inversions[:2]
    ]
    front = torch.zeros(SIDE // 2, SIDE // 2, dtype=torch.float64)
    front[:, SIDE // 4 :] = 1
    for block, weight in WEIGHTS.items():
        deviation = torch.cat([scene[block] for scene in scenes], 1).std(1)
        unit = deviation.maximum(0.1 * deviation.mean())
        for mask, scene in zip((1 - front, front), scenes, strict=True):
            difference = (scene[block] - own[block]) / unit * mask.reshape(1, -1, 1)
            total += weight * float(difference.square().mean(-1).sum())
    return total


@pytest.mark.parametrize("override", [False, True])
def test_the_gradient_is_that_of_central_finite_differences_in_float64(override):
    case = FluxCase(torch.float64)
    sigma, recorded, step_size = case.sigmas[1], {}, 1e-3
    model = case.model.clone()
    model.set_model_sampler_post_cfg_function(
        lambda args: recorded.update(x=args["input"].clone()) or args["denoised"], disable_cfg1_optimization=True
    )
    if override:  # another pack's attention without a gradient
        model.model_options["transformer_options"]["optimized_attention_override"] = lambda func, q, *args, **kwargs: (
            func(q.detach(), *args, **kwargs).detach()
        )
    x = case.picture(9).double()
    guider = case.guider(
        model=model, level_weights=TEXT, iterations=1, step_size=step_size, start="given latent", end_percent=1.0
    )
    run = comfy.samplers.sampler_object("euler"), torch.stack([sigma, torch.tensor(0.0)])
    guider.sample(x / sigma.double(), torch.zeros_like(x), *run, disable_pbar=True)
    gradient = (x - recorded["x"]) / step_size
    with torch.no_grad():
        assert guider.energies[0][0] == pytest.approx(energy_written_out(case, x, sigma), rel=1e-5)
        for seed in range(3):
            direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            ahead, behind = (energy_written_out(case, x + sign * 1e-6 * direction, sigma) for sign in (1, -1))
            assert float((gradient * direction).sum()) == pytest.approx((ahead - behind) / 2e-6, rel=1e-3)


class Control(Hints):
    """A ControlNet of Flux: ComfyUI adds what it gives to the image's tokens in place, behind a block of each kind."""

    def get_control(self, x, timestep, cond, chunks, options):
        hints = self.hints.to(x.dtype)
        return {"input": [hints.clone()], "output": [hints.clone()], "middle": []}


def replaced(model):
    """Another pack's replacements of a block of each kind, which call the block itself."""
    model = model.clone()
    double = lambda args, extra: {**extra["original_block"]({**args, "img": args["img"] * 1.1})}  # noqa: E731
    model.set_model_patch_replace(double, "dit", "double_block", 0)
    model.set_model_patch_replace(double, "dit", "single_block", 0)
    return model


EXTRAS = {
    "ControlNet": {"control": Control(torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(4)))},
    "references": {
        "reference_latents": [torch.randn(1, 16, 6, 4, generator=torch.Generator().manual_seed(5)).double()]
    },
    "mask": {
        "attention_mask": torch.randn(1, 23, 23, generator=torch.Generator().manual_seed(6)).double(),
        "attention_mask_img_shape": (4, 4),
    },
}


@pytest.mark.parametrize("extra", [*EXTRAS, "replaced blocks"])
def test_the_gradient_behind_what_others_do(extra):
    with torch.inference_mode():
        case = FluxCase(torch.float64)
        model = replaced(case.model) if extra == "replaced blocks" else case.model
        settings = {"positive": case.text(1, **EXTRAS.get(extra, {})), "level_weights": "double 1: 1, single 1: 1"}
        holds(*gradient_and_differences(case, model, **settings))


@pytest.mark.parametrize("held", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_the_gradient_with_weights_that_are_cast_at_each_call(held):
    with torch.inference_mode():
        case = FluxCase(torch.float64)
        for module in case.model.model.diffusion_model.modules():
            if hasattr(module, "comfy_cast_weights"):
                module.comfy_cast_weights = True
                module.to(held)
        holds(*gradient_and_differences(case, case.model, level_weights=TEXT))


@pytest.mark.parametrize("form", byte_weights.FORMS, ids=lambda form: form.__name__)
@torch.inference_mode()
def test_weights_of_a_byte_guide_as_the_same_weights_widened(registered, trained, form):  # noqa: F811
    model, exact = form({key: value.float() for key, value in flux.host_form(trained.state_dict()).items()})
    draw = torch.Generator().manual_seed(1)
    words, pooled = torch.randn(1, 24, 128, generator=draw), torch.randn(1, 128, generator=draw)
    noise, scene = torch.randn(2, 1, 4, 4, 4, generator=draw)
    sigmas, found = torch.tensor([0.8, 0.0]), []
    for one in (model, comfy.sd.load_diffusion_model_state_dict(exact)):
        text = [[words, {"pooled_output": pooled}]]
        planes = Planes((Plane(invert(one, scene, text, None, sigmas, "noise only")),))
        guide = guider(one, text, text, 1.0, planes, Settings(level_weights=TEXT, start="given latent", iterations=2))
        guide.sample(noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True)
        found.append(guide.energies[0])
    assert found[0] == pytest.approx(found[1], rel=2e-2) and found[1][1] < found[1][0]


@pytest.mark.parametrize("fill", [False, True])
def test_a_scenes_own_latent_has_no_energy(fill):
    """On Flux-Fill the scenes are seen with the composite's mask and picture."""
    case = FluxCase(fill=fill)
    mask = torch.zeros(1, 1, SIDE, SIDE)
    mask[..., 2:6, 2:6] = 1
    shown = {"concat_latent_image": case.picture(6), "concat_mask": mask} if fill else {}
    positive = [[text, {**more, **shown}] for text, more in case.inversions[0].positive]
    planes = Planes((Plane(case.inversions[0]), Plane(case.inversions[0], half_mask())))
    for start in ("background inversion", "given latent"):
        guide = case.guider(planes, positive=positive, iterations=1, start=start)
        case.sample(guide)
        assert (guide.energies[0][0] < 1e-6) == (start == "background inversion")


@pytest.mark.parametrize(
    "settings", [{"foreground": 0.0}, {"iterations": 0}, {"level_weights": "double 1: 0"}], ids=str
)
def test_off_is_bit_equal_to_plain_sampling(case, settings):
    assert torch.equal(case.sample(case.guider(start="given latent", **settings)), case.plain())


def test_the_energy_falls_and_the_image_goes_to_the_scenes(case):
    guide = case.guider(iterations=8, step_size=0.1, end_percent=1.0, level_weights="double 0: 8.5")
    found, plain = case.sample(guide), case.sample(case.guider(iterations=0))
    assert len(guide.energies) == STEPS and all(
        later < earlier for energies in guide.energies for earlier, later in zip(energies, energies[1:], strict=False)
    )
    front = case.inversions[1].latents[-1]
    assert (found - front)[..., 4:].abs().mean() < 0.9 * (plain - front)[..., 4:].abs().mean()


@torch.inference_mode()
def test_inside_the_executors_inference_mode_the_model_stays_as_it_was(case):
    inside = FluxCase()
    held = dict(inside.model.model.named_parameters())
    before = {name: value.clone() for name, value in held.items()}
    assert torch.allclose(inside.sample(inside.guider()), case.sample(case.guider()), rtol=1e-5, atol=1e-4)
    same(inside, held, before)


def test_blocks_are_computed_again_in_the_backward_pass_and_none_behind_the_last_that_guides(case):
    network, counts = case.model.model.diffusion_model, {"double": 0, "single": 0}
    parts = {"double": network.double_blocks[1].img_mlp[0], "single": network.single_blocks[0].linear1}
    hooks = [
        part.register_forward_hook(lambda *_, name=name: counts.__setitem__(name, counts[name] + 1))
        for name, part in parts.items()
    ]
    try:
        case.sample(case.guider(iterations=2, level_weights="double 1: 1"))
    finally:
        for hook in hooks:
            hook.remove()
    # Four guided steps: one pass of the scenes, two iterations and these once more; four steps.
    assert counts == {"double": 4 * (1 + 2 + 2) + 4, "single": 4}


def test_comfyui_keeps_twice_the_memory_free(case, monkeypatch):
    asked = []
    load = comfy.model_management.load_models_gpu
    monkeypatch.setattr(
        comfy.model_management,
        "load_models_gpu",
        lambda *args, **kwargs: asked.append(kwargs["memory_required"]) or load(*args, **kwargs),
    )
    case.sample(case.guider())
    case.sample(case.guider(iterations=0))
    assert asked[0] == pytest.approx(2 * asked[1])


def test_a_batch_is_its_elements_one_by_one(case):
    noise = case.picture(9, batch=2)
    together = case.sample(case.guider(start="given latent"), noise=noise)
    for number in range(2):
        alone = case.sample(case.guider(start="given latent"), noise=noise[number : number + 1])
        assert torch.allclose(together[number : number + 1], alone, rtol=0, atol=1e-4)


def test_sides_that_no_token_divides():
    case = FluxCase()
    pictures = [torch.randn(1, 16, 9, 13, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2, 9)]
    inversions = [invert(case.model, one, case.positive, None, case.sigmas) for one in pictures[:2]]
    planes = Planes((Plane(inversions[0]), Plane(inversions[1], torch.ones(50, 70).tril())))
    guide = case.guider(planes)
    assert case.sample(guide, noise=pictures[2]).shape == (1, 16, 9, 13)
    assert all(energies[-1] < energies[0] for energies in guide.energies)


def test_what_does_not_fit_is_refused_in_words(case):
    with pytest.raises(ValueError, match="level_weights: 'single 2' is no block .* double 0 to single 1 "):
        case.guider(level_weights="single 2: 1")
    with pytest.raises(ValueError, match="planes: an inversion was made with a noise prediction model"):
        case.sample(case.guider(Planes(Case().planes.planes)), noise=torch.zeros(1, 4, SIDE, SIDE))
    model = case.model.clone()
    model.set_model_patch_replace(lambda args, extra: {"img": args["img"] * 1}, "dit", "single_block", 0)
    with pytest.raises(ValueError, match="model: a patch on it skips or replaces the block single 0"):
        case.sample(case.guider(model=model, level_weights="single 0: 1, single 1: 1"))
    model.set_model_patch_replace(lambda args, extra: {"img": args["img"].detach()}, "dit", "single_block", 0)
    with pytest.raises(ValueError, match="model: a patch on it .* without gradients"):
        case.sample(case.guider(model=model, level_weights="single 1: 1"))
