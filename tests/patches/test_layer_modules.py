"""DreamLayer's trained modules in ComfyUI: what the trainer predicts is what the nodes make of its file, and the file
is told from others.
"""

import copy
from dataclasses import replace

import comfy.sd
import folder_paths
import pytest
import torch
from safetensors.torch import save_file
from strata.networks.layered_denoiser import LayeredDenoiser, published_form
from strata.networks.transparency import OffsetEncoder
from strata.nodes.shared_layers import ContextMaps, LoadLayerModules, SharedLayers
from strata.nodes.transparency import LoadTransparency
from strata.patches import foreground, layer_modules, mini_family, shared_layers
from strata.patches.layer_prompts import encode_layers
from strata.patches.shared_layers import Maps, Sharing, map_context, object_rows, share_layers
from strata.training import diffusion, text

from . import fusion_reference, random_family
from .sampling_helpers import EARLY, LATE, conditioning, estimates, low_memory, noise, terms_for, with_layers

PROMPTS = ["an empty place on a beach", "a red apple", "a dog"]
COUNT = 4


def fill(module, size):
    """What learns at random, so that every part of it counts."""
    generator = torch.Generator().manual_seed(3)
    for value in module.parameters():
        if value.requires_grad:
            value.data = (
                torch.randn(value.shape, generator=generator) * size * value[0].numel() ** -0.5
                if value.ndim > 1
                else value.data
            )
    module.layer_embedding.data = torch.randn(module.layer_embedding.shape, generator=generator) * size


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """The same random weights as the trainer's model and as ComfyUI's: (TextToImage, model, clip)."""
    plain = diffusion.build({"seed": 1, "in_channels": 4})
    random_family.randomised(plain.model)
    state = {**plain.state_dict(), "cond_stage_model.token_ids": torch.tensor(text.token_ids(), dtype=torch.int32)}
    state |= {f"first_stage_model.{key}": value for key, value in random_family.autoencoder().items()}
    path = tmp_path_factory.mktemp("layers") / "layers.safetensors"
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    mini_family.register()
    in_float32 = {"te_model_options": {"dtype": torch.float32}}  # ComfyUI would take fp16, the trainer does not
    model, clip = comfy.sd.load_checkpoint_guess_config(str(path), **in_float32)[:2]
    return plain, model, clip


def denoiser(plain, adapter=None, size=0.5):
    made = LayeredDenoiser(copy.deepcopy(plain), adapter or {}, 3, 2, len(text.token_ids()) - 1)
    if size:
        fill(made, size)
    return made.eval()


def fresh():
    """The trainer's model before its first step."""
    return denoiser(diffusion.build({"seed": 1, "in_channels": 4}), size=0)


def file_of(made, name="mine.safetensors"):
    return layer_modules.recognise(name, published_form(made.state_dict()))


def both(model, modules=None, sharing=1.0, mixing=1.0):
    return map_context(share_layers(model, Sharing(sharing), modules), Maps(mixing), modules)


@pytest.mark.parametrize("sigma", [EARLY, LATE])
def test_the_trainers_prediction_is_that_of_the_nodes(family, sigma):
    plain, model, clip = family
    terms = terms_for(model)
    trained = denoiser(
        plain,
        {key.removeprefix("diffusion_model.").removesuffix(".weight"): up @ down for key, (up, down) in terms.items()},
    )
    modules = file_of(trained)
    assert modules.describe() == "layer modules for Strata mini, trained with up to 3 objects, 2 context-aware layers"
    positive, negative = (
        encode_layers(clip, PROMPTS[0], PROMPTS[1:]),
        clip.encode_from_tokens_scheduled(clip.tokenize("")),
    )
    adapted = foreground.apply_to_foreground(model, terms, rows=object_rows(COUNT))
    found = estimates(both(adapted, modules), positive, negative, noise(8), sigma)
    sampling, x = model.model.model_sampling, found["input"]
    sigmas = torch.full((len(x),), sigma)
    times = sampling.timestep(sigmas)[::COUNT]
    assert (times >= 850).all() == (sigma == EARLY)
    given = sampling.calculate_input(sigmas, x).unflatten(0, (-1, COUNT)), times.float()
    early = (times >= 850).float()
    with torch.no_grad():
        cond, maps, _ = trained(*given, text.rows(PROMPTS).repeat(2, 1, 1), early)
        uncond = trained(*given, text.rows([""] * 3).repeat(2, 1, 1), early, maps)[0]
    without = estimates(both(adapted), positive, negative, noise(8), sigma)
    for name, wanted in (("cond", cond), ("uncond", uncond)):
        predicted = (x - found[name]) / sigma
        assert wanted.std() > 0.1 and (predicted - wanted.flatten(0, 1)).abs().max() < 1e-4
        changed = ((without[name] - found[name]) / sigma).abs().flatten(1).amax(1)
        assert (changed > 1e-2).all(), "every row has something of the file"


def test_a_file_of_zeros_changes_nothing(family):
    """Bit-equal: zeros are added to keys, values, tokens and maps, and a fresh context-aware layer adds nothing to a
    map.
    """
    _, model, clip = family
    positive, negative = encode_layers(clip, PROMPTS[0], PROMPTS[1:]), conditioning(model, 2, rows=1)
    found, plain = (
        estimates(both(model, modules), positive, negative, noise(4), EARLY) for modules in (file_of(fresh()), None)
    )
    assert all(torch.equal(found[name], plain[name]) for name in plain)


@pytest.mark.parametrize(
    ("make", "sigma"),
    [
        (lambda model, file: both(model, file, 0.0, 0.0), EARLY),
        (lambda model, file: share_layers(model, Sharing(1.0, 0.0, 0.2), file), LATE),
        (lambda model, file: map_context(model, Maps(1.0), file), LATE),
    ],
)
def test_off_and_outside_of_its_percents_it_is_bit_equal_to_stock_and_leaves_the_model(family, make, sigma):
    plain, model, _ = family
    modules = file_of(denoiser(plain))
    positive, negative = with_layers(model), conditioning(model, 2, rows=1)
    before = estimates(model, positive, negative, noise(4), sigma)
    estimates(both(model, modules), positive, negative, noise(4), sigma)
    for found in (
        estimates(make(model, modules), positive, negative, noise(4), sigma),
        estimates(model, positive, negative, noise(4), sigma),
    ):
        assert all(torch.equal(before[name], found[name]) for name in before)


def test_a_network_that_runs_twice_in_a_call_takes_each_times_maps_alone(family):
    """As other packs' wrappers do it: what the run before found in other latents is in no map of this one."""
    plain, model, _ = family
    modules = file_of(denoiser(plain))
    positive, negative = with_layers(model), conditioning(model, 2, rows=1)
    once, twice = both(model, modules), both(model, modules)

    def run_twice(apply, args):
        apply(args["input"].flip(-1, -2), args["timestep"], **args["c"])
        return apply(args["input"], args["timestep"], **args["c"])

    twice.set_model_unet_function_wrapper(run_twice)
    wanted, found = (estimates(one, positive, negative, noise(8), EARLY) for one in (once, twice))
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_together_or_apart_and_beside_a_longer_negative_it_is_the_same(family, monkeypatch):
    """ComfyUI repeats the shorter prompt when the two are one batch: the layer embedding then has to repeat with it."""
    plain, model, _ = family
    modules = file_of(denoiser(plain))
    positive, negative = with_layers(model), conditioning(model, 2, rows=1, tokens=14)
    results = []
    for free in (1e18, 1.0):
        low_memory(monkeypatch, free)
        results.append(estimates(share_layers(model, Sharing(), modules), positive, negative, noise(4), LATE))
    assert all(torch.allclose(results[0][name], results[1][name], rtol=1e-5, atol=1e-4) for name in ("cond", "uncond"))
    half = estimates(share_layers(model, Sharing(0.5), modules), positive, negative, noise(4), LATE)
    assert not torch.allclose(half["cond"], results[0]["cond"], rtol=1e-5, atol=1e-3)


def test_more_objects_than_were_trained_have_the_last_ones_row(family):
    plain, model, clip = family
    modules = file_of(denoiser(plain))
    positive = encode_layers(clip, "a beach", ["a dog", "a cat", "an apple", "a cup", "a frog"])
    negative = conditioning(model, 2, rows=1)
    found = estimates(both(model, modules), positive, negative, noise(7), EARLY)
    embedding = modules.embedding
    assert len(embedding) == 4
    for rows, same in (([0, 1, 2, 3, 3, 3], True), ([0, 1, 2, 3, 2, 1], False)):
        longer = estimates(
            both(model, replace(modules, embedding=embedding[rows])), positive, negative, noise(7), EARLY
        )
        assert torch.equal(longer["cond"], found["cond"]) == same


def test_another_family_and_another_file_are_named(family):
    modules = file_of(fresh())
    other = fusion_reference.patcher("SDXL")
    for make in (lambda: share_layers(other, Sharing(), modules), lambda: map_context(other, Maps(), modules)):
        with pytest.raises(
            ValueError,
            match="modules: mine.safetensors is for Strata mini and the model is SDXL.*load the file for the model's",
        ):
            make()
    broken = {
        key: value
        for key, value in published_form(fresh().state_dict()).items()
        if "context_layers.0.map_out" not in key
    }
    with pytest.raises(ValueError, match="file: broken.safetensors does not have the weights of ContextLayers"):
        layer_modules.recognise("broken.safetensors", broken)


def test_from_the_file_to_the_model_by_the_nodes(family, tmp_path, monkeypatch):
    plain, model, _ = family
    monkeypatch.setattr(
        folder_paths,
        "folder_names_and_paths",
        {**folder_paths.folder_names_and_paths, "layer_model": ([str(tmp_path)], {".safetensors"})},
    )
    assert "mine.safetensors is not there" in LoadLayerModules.validate_inputs("mine.safetensors")
    save_file(published_form(denoiser(plain).state_dict()), tmp_path / "mine.safetensors")
    assert LoadLayerModules.validate_inputs("mine.safetensors") is True
    save_file(OffsetEncoder().state_dict(), tmp_path / "encoder.safetensors")
    with pytest.raises(ValueError, match="file: encoder.safetensors is an encoder for .* takes layer modules of Dream"):
        LoadLayerModules.execute("encoder.safetensors")
    with pytest.raises(ValueError, match="mine.safetensors is layer modules for Strata mini.* takes weights of Layer"):
        LoadTransparency.execute("mine.safetensors")
    modules, found = LoadLayerModules.execute("mine.safetensors").result
    assert found == f"mine.safetensors: {modules.describe()}"
    shared = SharedLayers.execute(model, 1.0, 0.0, 1.0, modules).result[0]
    made = ContextMaps.execute(shared, 1.0, 0.15, modules).result[0]
    options = made.model_options["transformer_options"]
    assert options[shared_layers.SHARING].terms is not None and options[shared_layers.MAPS].refine is modules.context
    positive, negative = with_layers(model), conditioning(model, 2, rows=1)
    with torch.inference_mode():
        again, same = (estimates(one, positive, negative, noise(4), EARLY) for one in (made, both(model, modules)))
    assert torch.equal(again["cond"], same["cond"])


def test_clones_use_the_modules_that_comfyui_manages_and_copy_none(family):
    """A deep copy with every clone cost 168 MiB on SD1.5's structure, of which ComfyUI knew nothing."""
    plain, model, _clip = family
    made = both(model, file_of(denoiser(plain)))
    clone = made.clone().clone()
    managed = {value.data_ptr() for patcher in clone.get_additional_models() for value in patcher.model.parameters()}
    for patcher in (made, clone):
        options = patcher.model_options["transformer_options"]
        terms, refine = options[shared_layers.SHARING].terms, options[shared_layers.MAPS].refine
        used = [
            value
            for module in (*terms.shared.values(), *terms.foreground.values(), refine)
            for value in module.parameters()
        ]
        assert len(used) > 20 and {value.data_ptr() for value in used} <= managed
