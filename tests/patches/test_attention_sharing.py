"""Attention sharing of SD1.5 against the published unit, written out plainly and put in the UNet's place by hand."""

import copy
from functools import partial

import comfy.controlnet
import comfy.sample
import pytest
import torch
from einops import rearrange
from strata.patches import attention_sharing, transparency_model
from strata.patches.fusion import Settings, blend_attention
from strata.patches.layer_rows import sample_rows

from . import fusion_reference
from .sampling_helpers import close, conditioning, estimates, expected, layered, noise
from .small_models import attentions, sample, sharing, small


def attend(q, k, v, heads):
    q, k, v = (rearrange(part, "b t (h c) -> b h t c", h=heads).double() for part in (q, k, v))
    out = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v
    return rearrange(out, "b h t c -> b t (h c)").float()


def published_forward(module, weights, prefix, frames, signals):
    """AttentionSharingUnit.forward, its weights merged into the attention's own."""

    def get(name):
        return weights[f"{prefix}.{name}"]

    def linear(name, x):
        return torch.nn.functional.linear(x, get(f"{name}.weight"), get(f"{name}.bias"))

    def projected(name, frame, x, layer):
        weight = layer.weight + get(f"{name}_lora.{frame}.up.weight") @ get(f"{name}_lora.{frame}.down.weight")
        return torch.nn.functional.linear(x, weight, layer.bias)

    def forward(h, context=None, value=None, mask=None, transformer_options=None):
        hidden = rearrange(h, "(b f) d c -> f b d c", f=frames)
        if signals is not None:
            signal = signals()[h.shape[1]]
            outs = []
            for frame in range(frames):
                conv = torch.nn.functional.conv2d(
                    signal, get(f"control_convs.{frame}.0.weight"), get(f"control_convs.{frame}.0.bias"), padding=1
                )
                conv = torch.nn.functional.conv2d(
                    torch.nn.functional.silu(conv),
                    get(f"control_convs.{frame}.2.weight"),
                    get(f"control_convs.{frame}.2.bias"),
                )
                outs.append(rearrange(conv, "b c h w -> b (h w) c"))
            hidden = hidden + torch.stack(outs)
        framed = hidden if context is None else rearrange(context, "(b f) d c -> f b d c", f=frames)
        outs = []
        for frame in range(frames):
            q = projected("to_q", frame, hidden[frame], module.to_q)
            k, v = (
                projected(name, frame, framed[frame], layer)
                for name, layer in (("to_k", module.to_k), ("to_v", module.to_v))
            )
            outs.append(projected("to_out", frame, attend(q, k, v, module.heads), module.to_out[0]))
        hidden = rearrange(hidden + torch.stack(outs), "f b d c -> (b f) d c")
        x = torch.nn.functional.layer_norm(
            hidden, hidden.shape[-1:], get("temporal_n.weight"), get("temporal_n.bias"), 1e-6
        )
        x = rearrange(linear("temporal_i", x), "(b f) d c -> (b d) f c", f=frames)
        x = linear(
            "temporal_o",
            attend(linear("temporal_q", x), linear("temporal_k", x), linear("temporal_v", x), module.heads),
        )
        return hidden + rearrange(x, "(b d) f c -> (b f) d c", d=h.shape[1]) - h

    return forward


def features(weights, picture):
    """AdditionalAttentionCondsEncoder: convolutions with silu behind each."""
    results = {}
    for block in range(4):
        for index in range(8 if block == 0 else 2):
            stride = 2 if (block == 0 and index in (2, 4, 6)) or (block and index == 0) else 1
            prefix = f"kwargs_encoder.blocks_{block}.{2 * index}"
            picture = torch.nn.functional.silu(
                torch.nn.functional.conv2d(picture, weights[f"{prefix}.weight"], weights[f"{prefix}.bias"], stride, 1)
            )
        results[picture.shape[2] * picture.shape[3]] = picture
    return results


def replaced(weights, frames, picture=None):
    """A model of its own whose attentions are the published units."""
    model = small()
    signals = None if picture is None else (lambda: features(weights, picture))
    for index, (module, *_) in enumerate(attentions(model.model.diffusion_model)):
        module.forward = published_forward(module, weights, f"hookers.layers.{index}", frames, signals)
    return model


@pytest.mark.parametrize("frames", [1, 3])
def test_shared_attention_is_the_published_one_and_leaves_nothing_behind(frames):
    model = small()
    weights, files = sharing(model, frames)
    before = sample(model, batch=2 * frames)
    shared = transparency_model.share(model, files, frames)
    found = sample(shared, batch=2 * frames)
    expected = sample(replaced(weights, frames), batch=2 * frames)
    assert (found - before).abs().max() > 0.1 and (found - expected).abs().max() < 1e-3 * expected.abs().max()
    assert torch.equal(sample(model, batch=2 * frames), before)
    assert not any("forward" in module.__dict__ for module in model.model.diffusion_model.modules())
    assert torch.equal(sample(shared, batch=2 * frames), found)
    assert torch.equal(sample(transparency_model.share(model, files, frames, strength=0), batch=2 * frames), before)


def test_a_given_layers_picture_acts_at_every_size():
    model = small()
    weights, files = sharing(model, 2, control=32)
    torch.manual_seed(2)
    picture = torch.rand(1, 3, 64, 128) * 2 - 1
    found = sample(transparency_model.share(model, files, 2, picture=picture), batch=4)
    expected = sample(replaced(weights, 2, picture), batch=4)
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()
    assert (found - sample(transparency_model.share(model, files, 2, picture=-picture), batch=4)).abs().max() > 0.01
    both = sample(transparency_model.share(model, files, 2, picture=torch.cat([picture, -picture])), batch=4)
    assert torch.allclose(both[:2], found[:2], rtol=1e-5, atol=1e-3 * found.abs().max().item()) and not torch.allclose(
        both[2:], found[2:], rtol=1e-5, atol=1e-2
    )


def test_every_frame_has_its_own_prompt_whatever_the_lengths():
    """Against the published way, which overwrites the conditional half of the tokens frame by frame, here made one
    batch by hand.
    """
    model = small()
    weights, files = sharing(model, 3)
    torch.manual_seed(4)
    tokens = [torch.randn(1, 77, 24), torch.randn(1, 154, 24), torch.randn(1, 77, 24)]
    negative = torch.randn(1, 77, 24)
    latent = {"samples": torch.zeros(2, 4, 8, 16)}
    prompts = [(name, [[one, {}]]) for name, one in zip(("foreground", "background", "blended"), tokens, strict=True)]
    settings = {"seed": 3, "steps": 2, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    found = sample_rows(
        transparency_model.share(model, files, 3),
        attention_sharing.together(prompts),
        3,
        [[negative, {}]],
        latent,
        **settings,
    )
    assert [one["samples"].shape for one in found] == [(2, 4, 8, 16)] * 3
    rows = torch.cat([one if one.shape[1] == 154 else torch.cat([one, one], 1) for one in tokens] * 2)
    zeros = torch.zeros(6, 4, 8, 16)
    expected = comfy.sample.sample(
        replaced(weights, 3),
        comfy.sample.prepare_noise(zeros, 3),
        2,
        3.0,
        "euler",
        "normal",
        [[rows, {}]],
        [[negative, {}]],
        zeros,
        disable_pbar=True,
        seed=3,
    )
    for frame in range(3):
        assert (found[frame]["samples"] - expected[frame::3]).abs().max() < 1e-3 * expected.abs().max()
    other = [prompts[0], prompts[2], prompts[1]]
    swapped = sample_rows(
        transparency_model.share(model, files, 3),
        attention_sharing.together(other),
        3,
        [[negative, {}]],
        latent,
        **settings,
    )
    assert not torch.allclose(swapped[1]["samples"], found[1]["samples"], rtol=1e-5, atol=1e-2)
    with pytest.raises(ValueError, match="background: it is 2 conditionings"):
        attention_sharing.together([prompts[0], ("background", prompts[1][1] * 2)])


def test_what_only_one_prompt_carries_is_refused_and_what_all_carry_is_kept():
    """ControlNets, time ranges and the like of a single frame cannot be kept in one batch; they were dropped silently,
    but for the last frame's.
    """
    text, control = torch.randn(1, 77, 24), object()
    for key, value in (
        ("control", control),
        ("start_percent", 0.5),
        ("gligen", ("position", control, [])),
        ("strength", 0.7),
    ):
        for frame in range(3):
            prompts = [
                (name, [[text, {"pooled_output": torch.randn(1, 4), **({key: value} if number == frame else {})}]])
                for number, name in enumerate(("foreground", "background", "blended"))
            ]
            with pytest.raises(
                ValueError, match=f"^{prompts[frame][0]}: it carries '{key}', which the other prompts lack"
            ):
                attention_sharing.together(prompts)
        joined = attention_sharing.together(
            [(name, [[text, {key: value}]]) for name in ("foreground", "background", "blended")]
        )
        assert joined[0][1][key] is value and joined[0][0].shape == (3, 77, 24)


def test_copies_of_one_controlnet_are_the_same():
    """Apply ControlNet copies it for each conditioning; another strength, picture, range or ControlNet before it is
    another.
    """
    text, hint = torch.randn(1, 77, 24), torch.rand(1, 3, 8, 8)
    control, before = (comfy.controlnet.ControlNet(torch.nn.Linear(1, 1)) for _ in range(2))

    def apply(picture=hint, strength=0.7, previous=None, source=control):
        return source.copy().set_cond_hint(picture.clone(), strength, (0.0, 0.5)).set_previous_controlnet(previous)

    def joined(*controls):
        return attention_sharing.together(
            [
                (name, [[text, {"control": one}]])
                for name, one in zip(("foreground", "background"), controls, strict=True)
            ]
        )

    used = apply()
    used.cond_hint, used.timestep_range = hint, (10.0, 5.0)  # as a run leaves them
    assert joined(used, last := apply())[0][1]["control"] is last
    assert joined(apply(previous=apply(source=before)), apply(previous=apply(source=before)))
    for other in (apply(hint + 0.1), apply(strength=0.6), apply(previous=apply(source=before)), apply(source=before)):
        with pytest.raises(ValueError, match="^foreground: it carries 'control'"):
            joined(apply(), other)


def test_prompts_do_not_grow_without_bound():
    long = [
        (name, [[torch.zeros(1, 77 * chunks, 24), {}]])
        for name, chunks in (("foreground", 3), ("background", 5), ("blended", 7))
    ]
    with pytest.raises(
        ValueError, match="foreground, background, blended: their 231, 385, 539 tokens have no common length"
    ):
        attention_sharing.together(long)
    assert attention_sharing.together(long[:1] + [("background", [[torch.zeros(1, 154, 24), {}]])])[0][0].shape == (
        2,
        462,
        24,
    )


def alone(unet, weights):
    """The UNet with a file of one frame in it: low-rank terms merged, and what comes behind an attention's output as
    its `after`.
    """
    unet = copy.deepcopy(unet)

    def after(get, h):
        x = torch.nn.functional.layer_norm(h, h.shape[-1:], get("n.weight"), get("n.bias"), 1e-6)
        for name in "ivo":  # attention to one frame is that frame
            x = torch.nn.functional.linear(x, get(f"{name}.weight"), get(f"{name}.bias"))
        return x

    for index, (module, *_) in enumerate(attentions(unet)):
        prefix = f"hookers.layers.{index}"
        for name in ("to_q", "to_k", "to_v", "to_out"):
            layer = module.to_out[0] if name == "to_out" else getattr(module, name)
            layer.weight.data += (
                weights[f"{prefix}.{name}_lora.0.up.weight"] @ weights[f"{prefix}.{name}_lora.0.down.weight"]
            )
        module.after = partial(after, lambda name, prefix=prefix: weights[f"{prefix}.temporal_{name}"].double())
    return unet


def test_layerfusions_foreground_alone_has_it():
    model = small()
    _, files = sharing(model, 1)
    on_foreground = transparency_model.apply_to_foreground(model, files)
    found, plain, shared = (
        sample(one, batch=3) for one in (on_foreground, model, transparency_model.share(model, files, 1))
    )
    tolerance = 1e-3 * shared.abs().max()
    assert (found[0] - shared[0]).abs().max() < tolerance and (found[1:] - plain[1:]).abs().max() < tolerance
    assert (found[0] - plain[0]).abs().max() > 0.1
    assert torch.equal(sample(model, batch=3), plain)
    with pytest.raises(ValueError, match="a batch of 4 cannot be split"):
        sample(on_foreground, batch=2)
    with pytest.raises(ValueError, match="model: attention sharing is on it already"):
        transparency_model.apply_to_foreground(on_foreground, files)


@pytest.mark.parametrize("blend_first", [True, False])
def test_it_takes_part_in_blending(blend_first):
    model = fusion_reference.patcher("SD1.5")
    weights, files = sharing(model, 1)
    positive, negative = layered(model), conditioning(model, 2, rows=1)
    if blend_first:
        patched = transparency_model.apply_to_foreground(blend_attention(model, Settings()), files)
    else:
        patched = blend_attention(transparency_model.apply_to_foreground(model, files), Settings())
    found = estimates(patched, positive, negative, noise())
    cond, uncond = expected(model, found, positive, negative, foreground=alone(model.model.diffusion_model, weights))
    assert close(found["cond"], cond) and close(found["uncond"], uncond)
    plain = estimates(blend_attention(model, Settings()), positive, negative, noise())
    assert not close(plain["cond"], cond, 1e-2) and not close(plain["uncond"], uncond, 1e-2)


def test_what_does_not_go_together_is_said_in_one_sentence():
    model = small()
    _, joint = sharing(model, 3)
    _, given = sharing(model, 2, control=32)
    with pytest.raises(
        ValueError,
        match="attention sharing of 3 images for SD1.5; this node needs one such as layer_sd15_transparent_attn",
    ):
        transparency_model.apply(model, joint, 1.0)
    with pytest.raises(ValueError, match="this node needs one such as layer_sd15_joint"):
        transparency_model.share(model, given, 3)
    with pytest.raises(ValueError, match="model: attention sharing is on it already"):
        transparency_model.share(transparency_model.share(model, joint, 3), joint, 3)
    with pytest.raises(ValueError, match="sharing.safetensors is for SD1.5 and the model is Small"):
        transparency_model.share(small(model_channels=64), joint, 3)
