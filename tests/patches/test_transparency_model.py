"""LayerDiffuse's weights on ComfyUI's own UNets at reduced width: equal to the same network with the weights added by
hand.
"""

import re

import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_base
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.supported_models
import pytest
import torch
from strata.patches import transparency, transparency_model

from . import random_family
from . import random_transparency as random_files
from .random_autoencoders import conditioning
from .sampling_helpers import estimates
from .small_models import Small, SmallXL, sample, shapes, small, small_flux


def recognised(weights, families=("SD1.5",)):
    found = transparency.recognise("weights.safetensors", weights)
    assert found.families == families
    return found


def merged(weights, strength, kind=Small):
    """A second model with up @ down, or the difference, added to each weight."""
    other = small(
        kind=kind,
        in_channels=weights[f"{random_files.FIRST}::diff::0"].shape[1]
        if f"{random_files.FIRST}::diff::0" in weights
        else 4,
    )
    state = {key: value.clone() for key, value in small(kind=kind).model.state_dict().items()}
    for key, value in weights.items():
        name, kind, index = key.split("::")
        if (kind, index) == ("lora", "0"):
            state[name] += strength * (value.float() @ weights[f"{name}::lora::1"].float()).view(state[name].shape)
        elif kind == "diff":
            if value.shape != state[name].shape:
                state[name] = torch.nn.functional.pad(
                    state[name], (0, 0, 0, 0, 0, value.shape[1] - state[name].shape[1])
                )
            state[name] = state[name] + strength * value.float()
    other.model.load_state_dict(state)
    return other


def test_low_rank_terms_and_differences_equal_merged_weights_and_leave_the_model():
    model = small()
    weights = random_files.adapter(
        shapes(model), lora=("to_q", "to_v", "to_out.0"), diff=("in_layers.2", "time_embed"), scale=0.3
    )
    before = sample(model)
    found = sample(transparency_model.apply(model, recognised(weights), 0.7))
    expected = sample(merged(weights, 0.7))
    assert (found - before).abs().max() > 0.1 and (found - expected).abs().max() < 2e-3 * expected.abs().max()
    assert torch.equal(sample(model), before)
    assert torch.equal(sample(transparency_model.apply(model, recognised(weights), 0.0)), before)


@pytest.mark.parametrize("extra", [0, 4])
def test_sdxls_files_equal_merged_weights_too(extra):
    model = small(kind=SmallXL)
    weights = random_files.adapter(shapes(model), scale=0.2, extra=extra)
    assert len(weights) == 70 * 2 * 4 * 2 + (extra > 0)  # q, k, v and out of both attentions of 70 blocks
    files, given = recognised(weights, ("SDXL",)), [torch.randn(1, 4, 8, 16)] if extra else []
    found = sample(transparency_model.apply(model, files, 0.8, *given), steps=1)
    wide = merged(weights, 0.8, SmallXL)
    if extra:
        joined = wide.model.process_latent_in(given[0])
        wide.set_model_unet_function_wrapper(
            lambda apply, one: apply(
                one["input"], one["timestep"], **{**one["c"], "c_concat": joined.expand(len(one["input"]), -1, -1, -1)}
            )
        )
    expected = sample(wide, steps=1)
    assert (found - expected).abs().max() < 2e-3 * expected.abs().max() and (
        found - sample(model, steps=1)
    ).abs().max() > 0.05


def test_two_files_stack_with_each_other_and_a_lora_in_any_order():
    model = small()
    one, two = (recognised(random_files.adapter(shapes(model), lora=(name,), scale=0.3)) for name in ("to_q", "to_v"))
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_k"
    lora = {f"{key}.lora_up.weight": torch.randn(128, 4), f"{key}.lora_down.weight": torch.randn(4, 128) * 0.3}

    def with_lora(model):
        return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0)[0]

    first = sample(with_lora(transparency_model.apply(transparency_model.apply(model, one, 1.0), two, 0.5)))
    second = sample(transparency_model.apply(transparency_model.apply(with_lora(model), two, 0.5), one, 1.0))
    assert torch.allclose(first, second, rtol=1e-5, atol=1e-3 * first.abs().max().item())
    assert not torch.allclose(first, sample(transparency_model.apply(model, one, 1.0)), rtol=1e-5, atol=1e-2)
    assert not torch.allclose(first, sample(with_lora(model)), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("count", [1, 2])
def test_given_layers_enter_as_further_channels(count):
    """Against a UNet that is built with the wider input and gets the latents in one tensor with the noisy one."""
    model = small()
    weights = random_files.adapter(shapes(model), lora=("to_q",), extra=4 * count, scale=0.2)
    torch.manual_seed(3)
    given = [torch.randn(1, 4, 8, 16) for _ in range(count)]
    found = sample(transparency_model.apply(model, recognised(weights), 1.0, *given))
    wide = merged(weights, 1.0)
    joined = torch.cat([wide.model.process_latent_in(one) for one in given], 1)

    def plain(apply, arguments):
        x = arguments["input"]
        return apply(x, arguments["timestep"], **{**arguments["c"], "c_concat": joined.expand(len(x), -1, -1, -1)})

    wide.set_model_unet_function_wrapper(plain)
    expected = sample(wide)
    assert (found - expected).abs().max() < 2e-3 * expected.abs().max()
    other = sample(transparency_model.apply(model, recognised(weights), 1.0, *[-one for one in given]))
    assert (found - other).abs().max() > 0.05
    large = [torch.nn.functional.interpolate(one, scale_factor=2) for one in given]
    resized = sample(transparency_model.apply(model, recognised(weights), 1.0, *large), batch=2)
    assert resized.shape == (2, 4, 8, 16) and resized.isfinite().all()
    assert sample(model).shape == (1, 4, 8, 16)  # the input convolution is back


def test_a_model_keeps_its_prediction_type():
    model = small(comfy.model_base.ModelType.V_PREDICTION)
    weights = recognised(random_files.adapter(shapes(model), scale=0.1))
    patched = transparency_model.apply(model, weights, 1.0)
    assert patched.get_model_object("model_sampling") is model.get_model_object("model_sampling")
    sampling = type(model.model.model_sampling)
    sample(patched)
    assert (
        isinstance(model.model.model_sampling, sampling)
        and model.model.model_type is comfy.model_base.ModelType.V_PREDICTION
    )


def test_an_inpainting_models_further_channels_stay():
    model = small(in_channels=9)
    plain = {**shapes(model), random_files.FIRST: (32, 4, 3, 3)}
    weights = random_files.adapter(plain, lora=(), diff=("input_blocks.0.0.weight", "input_blocks.11.0.in_layers.2"))
    patched = transparency_model.apply(model, recognised(weights), 1.0)
    key = random_files.FIRST
    patched.patch_model()
    try:
        weight = patched.model.state_dict()[key].clone()
    finally:
        patched.unpatch_model()
    before = model.model.state_dict()[key]
    assert torch.equal(weight[:, 4:], before[:, 4:]) and not torch.equal(weight[:, :4], before[:, :4])


def test_what_does_not_go_together_is_said_in_one_sentence():
    model = small()
    fits = recognised(random_files.adapter(shapes(model)))
    wide = recognised(random_files.adapter(shapes(model), lora=("to_q",), extra=8))

    def refused(*arguments, **given):
        with pytest.raises(ValueError) as raised:
            transparency_model.apply(*arguments, **given)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    xl = transparency.recognise("xl.safetensors", random_files.adapter(transparency.structure("SDXL"), rank=2))
    assert "xl.safetensors is for SDXL and the model is Small" in refused(model, xl, 1.0)
    with torch.device("meta"):
        real = comfy.model_base.BaseModel(
            comfy.supported_models.SD15(
                {
                    **transparency.FAMILIES["SD1.5"]["unet"],
                    "image_size": 32,
                    "legacy": False,
                    "use_spatial_transformer": True,
                    "dtype": torch.half,
                }
            )
        )
    real = comfy.model_patcher.ModelPatcher(real, torch.device("cpu"), torch.device("cpu"), size=1)
    assert "is for SDXL and the model is SD1.5;" in refused(real, xl, 1.0)
    narrow = recognised(
        random_files.adapter({key: tuple(2 * side for side in shape) for key, shape in shapes(model).items()}, rank=2)
    )
    assert "is for SD1.5" in refused(model, narrow, 1.0)
    assert refused(model, wide, 1.0).startswith("layer: ") and refused(
        model, wide, 1.0, torch.zeros(1, 4, 8, 8)
    ).startswith("blended: ")
    latents = [torch.zeros(1, 4, 8, 8)] * 2
    assert "on it already" in refused(transparency_model.apply(model, wide, 1.0, *latents), wide, 1.0, *latents)
    assert "has 16 channels" in refused(model, wide, 1.0, latents[0], torch.zeros(1, 16, 8, 8))
    assert "disconnect" in refused(model, fits, 1.0, layer=torch.zeros(1, 4, 8, 8))
    assert re.match("blended: .*disconnect", refused(model, fits, 1.0, blended=torch.zeros(1, 4, 8, 8)))
    nine = small(in_channels=9)
    wide = random_files.adapter({**shapes(nine), random_files.FIRST: (32, 4, 3, 3)}, lora=("to_q",), extra=4)
    assert "9 input channels already" in refused(nine, recognised(wide), 1.0, torch.zeros(1, 4, 8, 8))


@pytest.mark.parametrize(
    "apply", [lambda *given: transparency_model.apply(*given, 1.0), transparency_model.apply_to_foreground]
)
def test_sd2_is_told_from_sd15_whose_structure_it_has(apply):
    shape = {**transparency.FAMILIES["SD1.5"]["unet"], "context_dim": 1024, "use_linear_in_transformer": True}
    with torch.device("meta"):
        model = comfy.model_base.BaseModel(
            comfy.supported_models.SD20(
                {**shape, "image_size": 32, "legacy": False, "use_spatial_transformer": True, "dtype": torch.half}
            ),
            comfy.model_base.ModelType.V_PREDICTION,
        )
    model = comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"), size=1)
    shared = random_files.sharing([(8, 8, 8)] * 32, 1)
    for weights in (random_files.adapter(transparency.structure("SD1.5"), rank=1), shared):
        with pytest.raises(
            ValueError,
            match="^transparency: weights.safetensors is for SD1.5 and the model is SD20; connect a model of its "
            "family, or load the file for the model's.$",
        ):
            apply(model, recognised(weights))


def test_fluxs_layer_lora_reaches_its_place_in_the_joined_weights():
    model, (weights, expected) = small_flux(), random_files.flux_lora()
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    for name, (place, start) in expected.items():
        up, down = weights[f"{name}.lora_B.weight"], weights[f"{name}.lora_A.weight"]
        before[place][start : start + len(up)] += 0.5 * up @ down
    patched = transparency_model.apply(model, recognised(weights, ("Flux",)), 0.5)
    patched.patch_model()
    try:
        for key, value in patched.model.state_dict().items():
            assert torch.allclose(value, before[key], rtol=1e-5, atol=1e-5), key
    finally:
        patched.unpatch_model()
    files = recognised(weights, ("Flux",))
    with pytest.raises(ValueError, match="weights.safetensors is for Flux and the model is Small"):
        transparency_model.apply(small(), files, 1.0)
    with pytest.raises(ValueError, match="is for SD1.5 and the model is Flux"):
        transparency_model.apply(model, recognised(random_files.adapter(shapes(small()))), 1.0)
    deeper = {key.replace("blocks.1.", "blocks.7."): value for key, value in weights.items()}
    with pytest.raises(
        ValueError, match="weights that this Flux model has no place for, such as transformer.*blocks.7"
    ):
        transparency_model.apply(model, recognised(deeper, ("Flux",)), 1.0)
    wide = {key: torch.zeros(4, 64) if "lora_A" in key else value for key, value in weights.items()}
    with pytest.raises(ValueError, match="is for Flux and the model is Flux with weights of other sizes"):
        transparency_model.apply(model, recognised(wide, ("Flux",)), 1.0)


def test_other_packs_attention_patches_and_two_different_files_in_one_graph_work():
    model = small()
    one, two = (recognised(random_files.adapter(shapes(model), lora=(name,), scale=0.4)) for name in ("to_q", "to_k"))
    first, second = (transparency_model.apply(model, files, 1.0) for files in (one, two))
    apart = [sample(first), sample(second)]
    assert (
        torch.equal(sample(first), apart[0])
        and torch.equal(sample(second), apart[1])
        and not torch.allclose(*apart, rtol=1e-5, atol=1e-2)
    )
    blocks = []

    def patch(n, context, value, options):
        blocks.append(options["block"])
        return n, context * 0.5, value * 0.5

    first.set_model_attn2_patch(patch)
    assert not torch.allclose(sample(first), apart[0], rtol=1e-5, atol=1e-2) and len(set(blocks)) == 16


def test_a_controlnet_acts_as_on_merged_weights():
    model = small()
    weights = random_files.adapter(shapes(model), scale=0.2)
    files = recognised(weights)
    config = {
        key: value
        for key, value in Small.unet_config.items()
        if key not in ("out_channels", "transformer_depth_output")
    }
    network = comfy.cldm.cldm.ControlNet(
        **config, hint_channels=3, dtype=torch.float32, device="cpu", operations=random_family.OPS
    )
    network.load_state_dict({key: value.float() for key, value in random_family.randomised(network).items()})
    control = comfy.controlnet.ControlNet(network, load_device=torch.device("cpu"))
    hint = control.set_cond_hint(torch.rand(1, 3, 64, 128), 0.5, (0.0, 1.0))
    patched = transparency_model.apply(model, files, 1.0)
    found = sample(patched, control=hint, control_apply_to_uncond=True)
    expected = sample(merged(weights, 1.0), control=hint, control_apply_to_uncond=True)
    assert (found - expected).abs().max() < 2e-3 * expected.abs().max() and (found - sample(patched)).abs().max() > 0.05


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_fluxs_layer_lora_on_the_foreground_equals_a_merged_model_and_leaves_the_rest(alpha):
    model, files = small_flux(), recognised(random_files.flux_lora(alpha=alpha)[0], ("Flux",))
    positive, negative = conditioning("Flux", 3), conditioning("Flux", 1, seed=2)
    x = torch.randn(6, 16, 6, 10, generator=torch.Generator().manual_seed(5))

    def found(patched):
        return estimates(patched, positive, negative, x, sigma=0.7)

    plain, whole = found(model), found(transparency_model.apply(model, files, 1.0))
    layered = found(transparency_model.apply_to_foreground(model, files))
    for name in ("cond", "uncond"):
        assert torch.allclose(layered[name][::3], whole[name][::3], rtol=1e-4, atol=1e-4)
        assert (whole[name][::3] - plain[name][::3]).abs().max() > 0.05
        for other in (1, 2):
            assert torch.allclose(layered[name][other::3], plain[name][other::3], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="weights.safetensors is for Flux and the model is Small"):
        transparency_model.apply_to_foreground(small(), files)
