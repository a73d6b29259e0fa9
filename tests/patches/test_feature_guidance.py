"""FeatGLaC in ComfyUI's sampling: gradients against finite differences, and all that must stay as it was."""

import copy
from dataclasses import replace

import comfy.conds
import comfy.model_management
import comfy.samplers
import pytest
import torch
from strata.patches import feature_guidance
from strata.patches.feature_guidance import UNCONDITIONAL, Plane, Planes, Settings, decoder_levels
from strata.patches.inversion import invert

from .guidance_helpers import SIDE, STEPS, Case, half_mask, with_adapter
from .sampling_helpers import Everywhere, Hints, conditioning, picture, sigmas_of


@pytest.fixture(scope="module")
def case():
    return Case()


def features_written_out(case, z, sigma, context):
    """Every decoder level's output, by a whole forward pass."""
    unet, found = case.model.model.diffusion_model, {}
    ends = [number for number, block in enumerate(unet.output_blocks) if type(block[-1]).__name__ == "Upsample"] + [
        len(unet.output_blocks) - 1
    ]
    hooks = [
        unet.output_blocks[end][-1].register_forward_hook(
            lambda module, args, output, level=level: found.__setitem__(level, output)
        )
        for level, end in enumerate(ends)
    ]
    try:
        with torch.no_grad():
            unet(z, case.model.model.model_sampling.timestep(sigma[None]).float(), context=context)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def energy_written_out(case, z, sources, sigma, norm, iteration=0):
    """Eq. 4, or the released code's, over the two planes and the last two levels."""
    total, found = 0.0, features_written_out(case, z, sigma, case.positive[0][0].double())
    for level, weight in ((1, 0.2), (2, 8.5)):
        side = found[level].shape[-1]
        front = torch.zeros(side, side, dtype=torch.float64)
        front[:, side // 2 :] = 1
        for mask, source in zip((1 - front, front), sources, strict=True):
            difference = mask * (source[level] - found[level])
            if norm == "l2":
                total += weight * float(difference.square().sum()) / difference.shape[1]
            else:
                total += (
                    weight
                    * float(difference.abs().sum())
                    / difference.shape[1]
                    / float(mask.sum())
                    * 45
                    * (3.5, 1.25, 2.5, 2.5, 1.5)[iteration]
                )
    return total


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_the_gradient_is_that_of_central_finite_differences_in_float64(norm):
    case = Case(dtype=torch.float64)
    sigma, recorded, step_size = case.sigmas[1], {}, 1e-3
    model = case.model.clone()
    model.set_model_sampler_post_cfg_function(
        lambda args: recorded.update(x=args["input"].clone()) or args["denoised"], disable_cfg1_optimization=True
    )
    start = picture(9).double() * float(sigma)
    guider = case.guider(
        model=model, norm=norm, iterations=1, step_size=step_size, start="given latent", end_percent=1.0
    )
    guider.sample(
        start / sigma.double(),
        torch.zeros_like(start),
        comfy.samplers.sampler_object("euler"),
        torch.stack([sigma, torch.tensor(0.0)]),
        disable_pbar=True,
    )
    scale = float((1 + sigma.double() ** 2).sqrt())
    gradient = (start - recorded["x"]) / step_size / scale
    sources = [
        features_written_out(
            case, inversion.at(float(sigma)).double() / scale, sigma, inversion.positive[0][0].double()
        )
        for inversion in case.inversions[:2]
    ]
    z = start / scale
    assert guider.energies[0][0] == pytest.approx(energy_written_out(case, z, sources, sigma, norm), rel=1e-5)
    for seed in range(3):
        direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        ahead, behind = (
            energy_written_out(case, z + sign * 1e-6 * direction, sources, sigma, norm) for sign in (1, -1)
        )
        assert float((gradient * direction).sum()) == pytest.approx((ahead - behind) / 2e-6, rel=1e-3)


def test_the_energy_falls_over_the_iterations(case):
    guider = case.guider(iterations=4)
    case.sample(guider)
    assert len(guider.energies) == 3 and all(len(energies) == 4 for energies in guider.energies)  # 0.76 of four steps
    assert all(
        later < earlier for energies in guider.energies for earlier, later in zip(energies, energies[1:], strict=False)
    )


OFF = [
    {"foreground": 0.0},
    {"iterations": 0},
    {"step_size": 0.0},
    {"level_weights": "0, 0"},
    {"level_weights": ""},
    {"start_percent": 0.8, "end_percent": 0.9},
]


@pytest.mark.parametrize("settings", OFF, ids=str)
def test_off_is_bit_equal_to_plain_sampling(case, settings):
    assert torch.equal(case.sample(case.guider(start="given latent", **settings)), case.plain())


@pytest.mark.parametrize("masks", [(None, torch.zeros(SIDE, SIDE)), (torch.zeros(5, 7), torch.zeros(64, 64))])
def test_empty_masks_are_bit_equal_to_plain_sampling(case, masks):
    planes = Planes(tuple(Plane(inversion, mask) for inversion, mask in zip(case.inversions, masks, strict=False)))
    assert torch.equal(case.sample(case.guider(planes, start="given latent")), case.plain())
    from_background = case.sample(case.guider(planes))
    assert torch.allclose(
        from_background, case.plain(noise=case.inversions[0].latents[0] / case.sigmas[0]), rtol=1e-5, atol=1e-4
    )


def test_on_composes_what_the_masks_say(case):
    """The features are those of the scenes: the result is nearer to each scene in its half than plain sampling from the
    same noise.
    """
    found = case.sample(case.guider(iterations=10, end_percent=1.0, step_size=0.002))
    plain = case.sample(case.guider(iterations=0))
    front, back = (case.inversions[number].latents[-1] for number in (1, 0))
    assert not torch.allclose(found, plain, rtol=1e-5, atol=1e-2)
    assert (found - front)[..., 4:].abs().mean() < 0.9 * (plain - front)[..., 4:].abs().mean()
    assert torch.equal(found, case.sample(case.guider(iterations=10, end_percent=1.0, step_size=0.002))), (
        "two runs are equal"
    )
    assert (found - back)[..., :4].abs().mean() < (found - front)[..., :4].abs().mean()


def test_ddim_is_allowed_and_other_samplers_are_refused_with_the_list(case):
    assert torch.equal(case.sample(case.guider(), sampler="ddim"), case.sample(case.guider()))
    churned = comfy.samplers.ksampler("euler", {"s_churn": 1.0})
    for sampler in (
        *map(comfy.samplers.sampler_object, ("heun", "dpmpp_2m", "euler_ancestral", "uni_pc", "lcm")),
        churned,
    ):
        with pytest.raises(ValueError, match="sampler: .* choose one of euler, ddim"):
            case.guider().sample(picture(9), torch.zeros(1, 4, SIDE, SIDE), sampler, case.sigmas, disable_pbar=True)


def test_a_run_in_two_parts_is_the_run_in_one(case):
    """SplitSigmas: the second part goes on from the first one's latent, without noise."""
    full = case.sample(case.guider())
    euler, nothing = comfy.samplers.sampler_object("euler"), torch.zeros(1, 4, SIDE, SIDE)
    half = case.guider().sample(picture(9), nothing, euler, case.sigmas[:3], disable_pbar=True, seed=1)
    rest = case.guider()
    found = rest.sample(nothing, half, euler, case.sigmas[2:], disable_pbar=True, seed=1)
    assert torch.allclose(found, full, rtol=1e-5, atol=1e-4) and len(rest.energies) == 1
    # With noise: a run of its own.
    late = case.guider().sample(picture(9), nothing, euler, case.sigmas[2:], disable_pbar=True, seed=1)
    assert not torch.allclose(late, full, rtol=1e-5, atol=1e-3)


def test_three_planes_and_any_other_schedule(case):
    left = torch.zeros(SIDE, SIDE)
    left[:, :2] = 1
    three = Planes((*case.planes.planes, Plane(case.inversions[2], left, 2.0)))
    other = case.guider(three, step_size=0.0002)
    euler, sigmas = comfy.samplers.sampler_object("euler"), sigmas_of(case.model, 3, "karras")
    other.sample(picture(9), torch.zeros(1, 4, SIDE, SIDE), euler, sigmas, disable_pbar=True)
    assert len(other.energies) == 2 and all(energies[-1] < energies[0] for energies in other.energies)
    sources = [
        features_written_out(
            case,
            plane.inversion.at(float(sigmas[0])) / (1 + sigmas[0] ** 2).sqrt(),
            sigmas[0],
            plane.inversion.positive[0][0],
        )
        for plane in three.planes
    ]
    x = case.inversions[0].at(float(sigmas[0]))  # where the run begins
    features = features_written_out(case, x / (1 + sigmas[0] ** 2).sqrt(), sigmas[0], case.positive[0][0])
    energy = 0.0
    for level, weight in ((1, 0.2), (2, 8.5)):
        side = features[level].shape[-1]
        for columns, share, source in zip(
            (slice(side // 4, side // 2), slice(side // 2, side), slice(0, side // 4)), (1, 1, 2), sources, strict=True
        ):
            difference = (source[level] - features[level])[..., columns]
            energy += share * weight * float(difference.square().sum()) / difference.shape[1]
    assert other.energies[0][0] == pytest.approx(energy, rel=1e-3)
    assert [mask.sum().item() for mask in other.masks] == [16, 32, 16] and other.weights == [1.0, 1.0, 2.0]


def test_scenes_in_one_batch_are_the_scenes_one_by_one(case, monkeypatch):
    together = case.sample(case.guider())
    monkeypatch.setattr(feature_guidance, "_join", lambda scenes, batch: None)
    assert torch.allclose(case.sample(case.guider()), together, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("tokens", "together"), [(21, True), (11, False)])
def test_prompts_of_other_lengths_share_the_batch_where_the_host_can_repeat_them(case, monkeypatch, tokens, together):
    """Seven tokens three times over are 21; with 11 their common length is too long."""
    longer = invert(case.model, picture(4), conditioning(case.model, 14, rows=1, tokens=tokens), None, case.sigmas)
    planes = Planes((case.planes.planes[0], Plane(longer, half_mask())))
    found, calls = case.sample(case.guider(planes)), calls_of(case, planes=planes)["calls"]
    # Three iterations and the scenes' passes in three guided steps; four steps.
    assert calls == 3 * (3 + (1 if together else 2)) + 4
    monkeypatch.setattr(feature_guidance, "_join", lambda scenes, batch: None)
    assert torch.allclose(case.sample(case.guider(planes)), found, rtol=1e-5, atol=1e-4)


def test_scenes_share_a_batch_only_where_all_of_their_conditionings_can():
    text = comfy.conds.CONDCrossAttn(torch.arange(7.0).view(1, 7, 1))
    plain = [{"model_conds": {"c_crossattn": text}}]
    joined = feature_guidance._join([plain, plain], 2)
    assert torch.equal(joined[0]["model_conds"]["c_crossattn"].cond, text.cond.repeat(4, 1, 1))
    more = {"c_crossattn": text, "c_concat": comfy.conds.CONDRegular(torch.zeros(1, 4, 8, 8))}
    keys = ("area", "mask", "control", "gligen", "hooks", "default", "timestep_start", "timestep_end")
    for other in ([*plain, *plain], [{"model_conds": more}], *([{**plain[0], key: object()}] for key in keys)):
        assert feature_guidance._join([plain, other], 2) is None and feature_guidance._join([other, plain], 2) is None


def calls_of(case, **settings):
    """How many UNet calls there are, and how often each decoder block's last module and the output layer run."""
    unet, counts = case.model.model.diffusion_model, {}
    modules = {"out": unet.out, **{level: module for level, module in enumerate(decoder_levels(unet))}, "calls": unet}
    hooks = [
        module.register_forward_hook(
            lambda module, args, output, name=name: counts.__setitem__(name, counts.get(name, 0) + 1), always_call=True
        )
        for name, module in modules.items()
    ]
    try:
        case.sample(case.guider(**settings))
    finally:
        for hook in hooks:
            hook.remove()
    return counts


def test_a_guided_step_costs_one_pass_for_the_scenes_and_one_per_iteration_up_to_the_deepest_level_with_a_weight(case):
    found = calls_of(case, iterations=3)
    assert found["calls"] == 3 * (1 + 3) + 4 and found["out"] == 4  # cond and uncond of a step are one call
    found = calls_of(case, iterations=3, level_weights="1, 0")
    assert found[0] == found[1] == 3 * (1 + 3) + 4 and found[2] == found["out"] == 4


def test_the_cache_saves_the_scenes_pass_of_later_runs_and_changes_next_to_nothing(case):
    planes = Planes(case.planes.planes)
    first = case.sample(case.guider(planes, cache=True))
    assert torch.allclose(first, case.sample(case.guider()), rtol=1e-5, atol=1e-2)
    assert calls_of(case, planes=planes, cache=True, iterations=3)["calls"] == 3 * 3 + 4
    assert torch.equal(first, case.sample(case.guider(planes, cache=True)))
    kept = next(iter(planes.recorded.values()))
    assert all(
        values.dtype == torch.float16 and values.device.type == "cpu"
        for features in kept.values()
        for values in features.values()
    )


def test_the_cache_holds_one_schedule(case):
    planes, sizes = Planes(case.planes.planes), []
    for _ in range(2):
        for factor in (1.0, 0.98, 0.96):
            noise = picture(9)
            case.guider(planes, cache=True).sample(
                noise,
                torch.zeros_like(noise),
                comfy.samplers.sampler_object("euler"),
                case.sigmas * factor,
                disable_pbar=True,
                seed=1,
            )
            sizes.append(len(next(iter(planes.recorded.values()))))
    assert len(set(sizes)) == 1 and sizes[0] > 0


@pytest.mark.parametrize("adapter", [False, True])
def test_checkpointing_changes_nothing(case, adapter):
    model = with_adapter(case.model) if adapter else case.model
    kept = case.sample(case.guider(model=model))
    assert torch.allclose(case.sample(case.guider(model=model, checkpointing=True)), kept, rtol=1e-5, atol=1e-5)
    assert torch.equal(case.sample(case.guider()), kept) != adapter
    assert not any("forward" in module.__dict__ for module in case.model.model.modules())


def test_checkpointed_blocks_are_computed_again_in_the_backward_pass(case):
    unet, counts = case.model.model.diffusion_model, []
    hooks = [part.register_forward_hook(lambda *_: counts.append(1)) for part in (unet.middle_block[0].in_layers[0],)]
    try:
        passes = []
        for checkpointing in (False, True):
            counts.clear()
            case.sample(case.guider(iterations=2, checkpointing=checkpointing))
            passes.append(len(counts))
    finally:
        hooks[0].remove()
    # Three guided steps: one pass of the scenes, two iterations, and with checkpointing these once more; four steps.
    assert passes == [3 * (1 + 2) + 4, 3 * (1 + 2 + 2) + 4]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_inside_the_executors_inference_mode_with_inference_weights(case, checkpointing):
    expected = case.sample(case.guider())
    with torch.inference_mode():
        inside = Case()
        held = dict(inside.model.model.named_parameters())
        before = {name: value.clone() for name, value in held.items()}
        assert torch.allclose(inside.sample(inside.guider(checkpointing=checkpointing)), expected, rtol=1e-5, atol=1e-4)
        same(inside, held, before)


def same(case, held, before):
    after = dict(case.model.model.named_parameters())
    assert all(after[name] is value and torch.equal(value, before[name]) for name, value in held.items())
    assert not any(module._forward_hooks or "forward" in module.__dict__ for module in case.model.model.modules())


@pytest.mark.parametrize("how", ["interruption", "exception in the gradient", "exception in a block"])
def test_the_model_is_as_it_was_after_a_run_that_ended_early(case, how, monkeypatch):
    held = dict(case.model.model.named_parameters())
    before = {name: value.clone() for name, value in held.items()}
    plain, model, settings = case.plain(), case.model, {"checkpointing": True}
    if how == "interruption":
        expected = comfy.model_management.InterruptProcessingException
        model = case.model.clone()
        count = []

        def interrupt(q, k, v, options):
            count.append(1)
            if len(count) == 20:
                comfy.model_management.interrupt_current_processing()
            return q, k, v

        model.set_model_attn2_patch(interrupt)
    elif how == "exception in a block":
        expected, model = ZeroDivisionError, case.model.clone()
        model.set_model_attn2_patch(lambda q, k, v, options: (q, k, v) if not q.requires_grad else 1 // 0)
    else:
        expected = RuntimeError

        def fail(*args, **kwargs):
            raise RuntimeError("backward")

        monkeypatch.setattr(torch.autograd, "grad", fail)
    guider = case.guider(model=model, **settings)
    with pytest.raises(expected):
        case.sample(guider)
    monkeypatch.undo()
    same(case, held, before)
    assert torch.equal(case.plain(), plain)


def test_a_step_that_is_too_large_says_so(case):
    with pytest.raises(ValueError, match="step_size: the guidance grew beyond all numbers"):
        case.sample(case.guider(step_size=1e30))


@pytest.mark.parametrize("kind", ["SD1.5", "SD2", "SDXL"])
def test_other_families(kind):
    case = Case(kind)
    levels = decoder_levels(case.model.model.diffusion_model)
    assert len(levels) == {"SD1.5": 4, "SD2": 4, "SDXL": 3}[kind]
    guider = case.guider(step_size=0.0001)
    found = case.sample(guider)
    assert found.isfinite().all() and all(energies[-1] < energies[0] for energies in guider.energies)
    assert torch.equal(case.sample(case.guider(foreground=0.0, start="given latent")), case.plain())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_the_exact_result(case, dtype):
    half = Case(dtype=dtype)
    found, expected = half.sample(half.guider()), case.sample(case.guider())
    assert (found - expected).abs().mean() < 0.1 * (expected - case.plain()).abs().mean()


def test_a_batch_is_its_elements_one_by_one(case):
    noise = picture(9, batch=2)
    together = case.sample(case.guider(start="given latent"), noise=noise)
    for number in range(2):
        assert torch.allclose(
            together[number : number + 1],
            case.sample(case.guider(start="given latent"), noise=noise[number : number + 1]),
            rtol=0,
            atol=1e-4,
        )


@pytest.mark.parametrize("side", [(9, 13), (10, 6)])
def test_sizes_that_no_level_divides(case, side):
    pictures = [torch.randn(1, 4, *side, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    inversions = [invert(case.model, one, case.positive, None, case.sigmas) for one in pictures]
    planes = Planes((Plane(inversions[0]), Plane(inversions[1], torch.ones(50, 70).tril())))
    guider = case.guider(planes, step_size=0.0002, iterations=5)
    found = case.sample(guider, noise=torch.randn(1, 4, *side))
    assert found.shape == (1, 4, *side) and all(energies[-1] < energies[0] for energies in guider.energies)


def test_the_composites_control_stays_its_own(case):
    """A ControlNet on positive acts in the guided passes and not on the scenes, which keep the features of their own
    conditionings.
    """
    hints = torch.randn(1, 192, 1, 1, generator=torch.Generator().manual_seed(4))
    controlled = [
        [case.positive[0][0], {**case.positive[0][1], "control": Hints(hints), "control_apply_to_uncond": True}]
    ]
    calls = []

    def watch(apply, args):
        calls.append((len(args["input"]), args["c"].get("control") is not None))
        return apply(args["input"], args["timestep"], **args["c"])

    model = case.model.clone()
    model.set_model_unet_function_wrapper(watch)
    guider = case.guider(model=model, positive=controlled, iterations=2, step_size=0.0002)
    case.sample(guider)
    guided = [(2, False), (1, True), (1, True), (2, True)]  # two scenes; two iterations; cond and uncond
    assert calls == guided * 3 + [(2, True)]
    assert all(energies[-1] < energies[0] for energies in guider.energies)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_behind_a_controlnet_of_every_block(checkpointing):
    """ComfyUI adds a ControlNet's outputs in place to what the encoder keeps for the decoder."""
    case = Case(dtype=torch.float64)
    sigma, step_size, size = case.sigmas[1], 1e-3, 1e-5
    control = {"control": Everywhere(torch.full((1, 1, 1, 1), 0.05)), "control_apply_to_uncond": True}
    controlled = [[case.positive[0][0], {**case.positive[0][1], **control}]]
    start = picture(9).double() * float(sigma)

    def run(x, **settings):
        recorded, model = {}, case.model.clone()
        model.set_model_sampler_post_cfg_function(
            lambda args: recorded.update(x=args["input"].clone()) or args["denoised"], disable_cfg1_optimization=True
        )
        guider = case.guider(
            model=model, iterations=1, start="given latent", end_percent=1.0, checkpointing=checkpointing, **settings
        )
        sampler = comfy.samplers.sampler_object("euler")
        steps = torch.stack([sigma, torch.tensor(0.0)])
        guider.sample(x / sigma.double(), torch.zeros_like(x), sampler, steps, disable_pbar=True)
        return guider.energies[0][0], recorded["x"]

    energy, moved = run(start, positive=controlled, step_size=step_size)
    assert abs(energy - run(start, step_size=step_size)[0]) > 1e-3 * energy
    gradient = (start - moved) / step_size
    direction = torch.randn(start.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ahead, behind = (
        run(start + sign * size * direction, positive=controlled, step_size=step_size)[0] for sign in (1, -1)
    )
    scale = float((1 + sigma.double() ** 2).sqrt())
    assert float((gradient * direction).sum()) == pytest.approx((ahead - behind) / (2 * size) * scale**2, rel=1e-3)


@pytest.mark.parametrize("how", ["InpaintModelConditioning", "the sampler's own mask"])
def test_on_an_inpainting_model_a_scenes_own_latent_has_the_scenes_features(how):
    """The composite's box and picture are channels of the model's input: the scenes are seen with the same ones."""
    case = Case(in_channels=9)
    picture_in = picture(6)
    mask = torch.zeros(1, 1, SIDE, SIDE)
    mask[..., 2:6, 2:6] = 1
    shown = {"concat_latent_image": picture_in, "concat_mask": mask} if how == "InpaintModelConditioning" else {}
    positive = [[text, {**more, **shown}] for text, more in case.inversions[0].positive]
    noise = case.inversions[0].latents[0] / case.sigmas[0]
    planes = Planes((Plane(case.inversions[0]), Plane(case.inversions[0], half_mask())))
    for number, start in enumerate((noise, picture(9))):
        guider = case.guider(
            planes, positive=positive, iterations=1, start="given latent" if number else "background inversion"
        )
        case.sample(guider, noise=start, latent=picture_in, mask=mask)
        assert (guider.energies[0][0] < 1e-6) == (number == 0)


def test_null_texts_embeddings_stand_in_the_place_of_the_negative():
    """Without any guidance the background comes back along its own path at the inversion's cfg."""
    case = Case()
    found = invert(case.model, picture(3), case.positive, case.negative, case.sigmas, "null-text", 3.0, 3)
    planes = Planes((Plane(found), Plane(case.inversions[1], half_mask())))
    unguided = {"planes": planes, "iterations": 0, "unconditional": UNCONDITIONAL[1]}
    back = case.sample(case.guider(**unguided))
    assert torch.allclose(back, found.reconstruction, rtol=1e-5, atol=1e-3)
    assert not torch.allclose(back, case.sample(case.guider(planes, iterations=0)), rtol=1e-5, atol=1e-3)
    two = case.sample(case.guider(**unguided), noise=torch.zeros(2, 4, SIDE, SIDE))
    assert torch.allclose(two, back.repeat(2, 1, 1, 1), rtol=1e-5, atol=1e-3)
    given = case.guider(**unguided, start="given latent")
    assert not torch.allclose(case.sample(given), case.plain(), rtol=1e-5, atol=1e-3)
    with pytest.raises(ValueError, match="unconditional: the first plane's inversion has no embeddings"):
        case.guider(unconditional=UNCONDITIONAL[1])
    with pytest.raises(ValueError, match="negative: it combines several"):
        feature_guidance.guider(
            case.model, case.positive, case.negative * 2, 3.0, planes, Settings(unconditional=UNCONDITIONAL[1])
        )


def test_what_does_not_fit_is_refused_in_words(case):
    with pytest.raises(ValueError, match="planes: an inversion is of 64×64 pixels .* the latent of 128×64"):
        case.sample(case.guider(), noise=torch.zeros(1, 4, 8, 16))
    with pytest.raises(ValueError, match="positive: several conditionings are combined"):
        case.sample(case.guider(positive=[*case.positive, *case.negative]))
    late = [[text, {**more, "start_percent": 0.99}] for text, more in case.positive]
    with pytest.raises(ValueError, match="positive: .* or none is for this step"):
        case.sample(case.guider(positive=late))
    pair, front = (invert(case.model, picture(seed, batch=2), case.positive, None, case.sigmas) for seed in (3, 4))
    with pytest.raises(ValueError, match="planes: an inversion of 2 images does not go with 3 latents"):
        case.sample(case.guider(Planes((Plane(pair), Plane(front, half_mask())))), noise=picture(9, batch=3))
    flow = Planes((case.planes.planes[0], Plane(replace(case.inversions[1], flow=True), half_mask())))
    with pytest.raises(ValueError, match="planes: an inversion was made with a flow matching model"):
        case.sample(case.guider(flow))
    with pytest.raises(ValueError, match="decoder has 3 levels"):
        case.guider(level_weights="1, 1, 1, 1")
    model = case.model.clone()
    model.model = copy.copy(model.model)
    model.model._modules = {**model.model._modules, "diffusion_model": torch.nn.Linear(1, 1)}
    with pytest.raises(ValueError, match="model: feature guidance works with SD1.5"):
        feature_guidance.guider(model, case.positive, case.negative, 3.0, case.planes, Settings())


def test_the_paste_puts_the_pictures_latent_into_the_composite_once(case):
    """Insertion: plain sampling up to the paste, and from there on plain sampling of the pasted latent, when no
    guidance follows.
    """
    planes = Planes((Plane(case.inversions[0], half_mask()),))
    found = case.sample(case.guider(planes, start="given latent", iterations=0, paste_percent=0.5))
    percent = [case.model.model.model_sampling.percent_to_sigma(0.5), *map(float, case.sigmas)]
    place = next(number for number, sigma in enumerate(percent[1:]) if sigma <= percent[0])
    plain = comfy.samplers.CFGGuider(case.model)
    plain.set_conds(case.positive, case.negative)
    plain.set_cfg(3.0)
    x, euler = picture(9) * case.sigmas[0], comfy.samplers.sampler_object("euler")
    for number in range(STEPS):
        if number == place:
            x = torch.where(half_mask().bool(), case.inversions[0].latents[place], x)
        x = plain.sample(
            x / case.sigmas[number], torch.zeros_like(x), euler, case.sigmas[number : number + 2], disable_pbar=True
        )
    assert 0 < place < STEPS and torch.allclose(found, x, rtol=1e-5, atol=1e-3)
