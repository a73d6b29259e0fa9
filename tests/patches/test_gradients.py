"""The gradient of feature guidance against central differences of its energy in float64, on every kind of host and
behind other packs' patches.
"""

import comfy.ops
import comfy.samplers
import pytest
import torch
from comfy.ldm.modules.attention import attention_pytorch, optimized_attention
from comfy_extras import nodes_freelunch

from .guidance_helpers import Case, with_adapter
from .sampling_helpers import calm, conditioning, picture, sigmas_of

STEP = 1e-3


def free_u(name):
    node = getattr(nodes_freelunch, name)
    run = node.execute if hasattr(node, "execute") else getattr(node(), node.FUNCTION)
    return lambda model: run(model, 1.3, 1.4, 0.9, 0.2)[0]


def writing_patches(model):
    """Patches at every place between blocks, all of which write into their arguments."""
    model = model.clone()

    def doubled(h, options):
        h[:, ::2] = h[:, ::2] * (1 + 0.1 * h.mean(1, keepdim=True))
        return h

    def skip(h, skipped, options):
        h[:, :2] = h[:, :2] * (1 + 0.1 * h.mean(1, keepdim=True))
        skipped *= 1 + 0.1 * skipped.mean()
        return h, skipped

    model.set_model_input_block_patch(doubled)
    model.set_model_input_block_patch_after_skip(doubled)
    model.set_model_output_block_patch(skip)
    model.set_model_emb_patch(lambda emb, channels, options: emb.mul_(emb.sigmoid()))
    return model


def overridden(replacement):
    def patched(model):
        model = model.clone()
        model.model_options["transformer_options"]["optimized_attention_override"] = replacement
        return model

    return patched


def sage_like(func, q, k, v, heads, **kwargs):
    """A kernel without autograd: right values, no gradient."""
    with torch.no_grad():
        return func(q, k, v, heads, **kwargs).detach()


def sharper(func, q, k, v, heads, **kwargs):
    return func(q * 1.1, k, v, heads, **kwargs)


PATCHES = {
    "none": lambda model: model,
    "FreeU": free_u("FreeU"),
    "FreeU V2": free_u("FreeU_V2"),
    "writing patches": writing_patches,
    "attention without autograd": overridden(sage_like),
    "attention of another pack": overridden(sharper),
    "IPAdapter-like": with_adapter,
}


def gradient_and_differences(case, model, **settings):
    """(gradient · direction from one update, the same from two energies), three directions; and the gradient's norm.

    FreeU computes in single precision, which the steps of 1e-4 and a tolerance by the norm leave room for.
    """
    sigma, recorded = case.sigmas[1], {}
    model = model.clone()
    model.set_model_sampler_post_cfg_function(
        lambda args: recorded.update(x=args["input"].clone()) or args["denoised"], disable_cfg1_optimization=True
    )
    scale = case.scale(sigma)
    sigmas, euler = torch.stack([sigma, torch.tensor(0.0)]), comfy.samplers.sampler_object("euler")

    def energy(start, step_size=STEP):
        guider = case.guider(
            model=model, iterations=1, step_size=step_size, start="given latent", end_percent=1.0, **settings
        )
        guider.sample(start / sigma.double(), torch.zeros_like(start), euler, sigmas, disable_pbar=True)
        return guider.energies[0][0]

    start = case.picture(9).double() * float(sigma)
    energy(start)
    gradient = (start - recorded["x"]) / STEP / scale
    pairs = []
    for seed in range(3):
        direction = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        ahead, behind = (energy(start + sign * 1e-4 * scale * direction, 1e-30) for sign in (1, -1))
        pairs.append((float((gradient * direction).sum()), (ahead - behind) / 2e-4))
    return pairs, float(gradient.norm())


def holds(pairs, norm):
    assert norm > 1
    for found, expected in pairs:
        assert found == pytest.approx(expected, abs=1e-3 * norm)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("patch", PATCHES)
def test_behind_patches_of_others(patch, checkpointing):
    case = Case(dtype=torch.float64)
    holds(*gradient_and_differences(case, PATCHES[patch](case.model), checkpointing=checkpointing))


def cast(case, dtype):
    """As a host holds a model that computes in another precision, or in low memory."""
    for module in case.model.model.diffusion_model.modules():
        if hasattr(module, "comfy_cast_weights"):
            module.comfy_cast_weights = True
            module.to(dtype)


@pytest.mark.parametrize(
    "held", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, "lent memory", "LoRA at each call"], ids=str
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_on_hosts_that_cast_lend_or_patch_weights_at_each_call(held, checkpointing, monkeypatch):
    """lent memory: resident weights lie outside of the parameters, are inference tensors, and one buffer serves every
    layer.
    """
    with torch.inference_mode():
        case = Case(dtype=torch.float64)
        cast(case, held if isinstance(held, torch.dtype) else torch.float64)
        if held == "lent memory":
            lend(case, monkeypatch)
        if held == "LoRA at each call":
            for module in case.model.model.diffusion_model.modules():
                if getattr(module, "comfy_cast_weights", False) and module.weight is not None:
                    module.weight_function = [lambda weight: weight * 1.01]
        modules = list(case.model.model.diffusion_model.modules())
        before = [(module, dict(vars(module)), dict(module._parameters), dict(module._modules)) for module in modules]
        holds(*gradient_and_differences(case, case.model, checkpointing=checkpointing))
        for module, own, parameters, children in before:
            assert vars(module).keys() == own.keys() and all(vars(module)[name] is value for name, value in own.items())
            assert all(module._parameters[name] is value for name, value in parameters.items())
            assert all(module._modules[name] is child for name, child in children.items())


def lend(case, monkeypatch):
    buffers, original = {}, comfy.ops.cast_bias_weight

    def lent(module, *args, **kwargs):
        weight, bias, *rest = original(module, *args, **kwargs)
        if not module.weight_function:
            key = weight.shape
            if key not in buffers:
                buffers[key] = torch.empty_like(weight)
            weight = buffers[key].copy_(weight)
        return weight, bias, *rest

    def from_buffer(module, *args, **kwargs):
        functions = module.weight_function
        module.__dict__["weight_function"] = []
        try:
            with torch.inference_mode():
                weight, bias, *rest = lent(module, *args, **kwargs)
        finally:
            if functions is type(module).weight_function:
                del module.__dict__["weight_function"]
            else:
                module.__dict__["weight_function"] = functions
        for function in functions:
            weight = function(weight)
        if bias is not None and module.bias_function and bias.is_inference():
            bias = bias.clone()
        return weight, bias, *rest

    monkeypatch.setattr(comfy.ops, "cast_bias_weight", from_buffer)


@pytest.mark.parametrize("override", [False, True])
def test_a_patch_whose_attention_has_no_gradient_is_named(override):
    case = Case()
    model = case.model.clone()
    model.set_model_attn2_replace(
        lambda q, k, v, options: optimized_attention(q, k, v, options["n_heads"]).detach(), "middle", 0
    )
    with pytest.raises(ValueError, match="model: a patch on it replaces an attention block by one without gradients"):
        case.sample(case.guider(model=overridden(sage_like)(model) if override else model))


def test_the_hosts_attention_is_torchs_own_while_differentiating():
    case, calls = Case(), []

    def count(func, *args, **kwargs):
        calls.append(func)
        return func(*args, **kwargs)

    case.sample(case.guider(model=overridden(count)(case.model)))
    assert attention_pytorch in calls


@pytest.mark.parametrize("patch", ["FreeU V2", "attention without autograd"])
def test_null_text_behind_patches_and_with_checkpointing(patch):
    from strata.patches.inversion import invert

    case = Case()
    model = PATCHES[patch](calm(case.model))
    negative = conditioning(case.model, 2, rows=1)
    found = [
        invert(
            model,
            picture(3),
            case.positive,
            negative,
            sigmas_of(model, 2),
            "null-text",
            3.0,
            checkpointing=checkpointing,
        )
        for checkpointing in (False, True)
    ]
    assert torch.allclose(found[0].null, found[1].null, rtol=1e-5, atol=1e-5) and not torch.allclose(
        found[0].null[0], found[0].null[-1], rtol=1e-5, atol=1e-3
    )
