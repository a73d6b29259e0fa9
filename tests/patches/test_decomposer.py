"""LayeringDiff's files and denoisers in ComfyUI, against diffusers' own forward with the same file."""

import copy
import json

import comfy.model_detection
import comfy.model_sampling
import comfy.sample
import comfy.sd
import comfy.utils
import pytest
import torch
from mini_models import MODELS
from strata.networks import decomposer as networks
from strata.networks.alignment import Alignment
from strata.nodes.decompose import DecomposeImage
from strata.patches import decomposer, mini_family
from strata.techniques import layering
from strata.training import base as bases
from strata.training import layeringdiff

from . import byte_weights

INPAINT = MODELS / "diffusion_models" / "strata_mini_inpaint.safetensors"
METADATA = {"base": bases.MINI, "prediction_type": "v_prediction"}
pytestmark = pytest.mark.skipif(not INPAINT.exists(), reason="no trained weights: make mini")


@pytest.fixture(scope="module")
def base():
    return bases.load(None)


@pytest.fixture(scope="module")
def trained(base):
    return denoisers(base)


def denoisers(base):
    """Both layers' denoisers, random where they have learnt."""
    torch.manual_seed(0)
    models = {layer: layeringdiff.Denoiser(base, layer, 4).eval() for layer in networks.LAYERS}
    with torch.no_grad():
        for model in models.values():
            for key, value in model.named_parameters():
                if "lora_B" in key:
                    value.normal_(std=0.05)
                if "conv_in" in key:
                    value.add_(0.02 * torch.randn_like(value))
    return models


def published(base, models) -> dict:
    """As the trainer writes them into a file."""
    weights = {decomposer.NULL: base.null}
    for layer, model in models.items():
        own = networks.published_form(model.state_dict())
        weights |= {f"{layer}.{key}": value for key, value in own.items()}
    return weights


@pytest.fixture(scope="module")
def loaded(base, trained):
    weights = published(base, trained)
    for layer in trained:
        torch.manual_seed(1)
        network = Alignment((4, 8, 16))
        torch.nn.init.normal_(network.last.weight, std=0.2)
        weights |= {f"{decomposer.ALIGNMENT}.{layer}.{key}": value for key, value in network.state_dict().items()}
    assert decomposer.is_decomposer(weights)
    return decomposer.recognise("file.safetensors", weights, METADATA)


@pytest.fixture(scope="module")
def model():
    mini_family.register(decomposer.UNETS)
    return comfy.sd.load_diffusion_model(str(INPAINT))


@pytest.mark.parametrize("layer", networks.LAYERS)
@torch.no_grad()
def test_the_clean_estimate_is_diffusers_own(base, trained, loaded, model, layer):
    torch.manual_seed(2)
    noisy, image, alpha = torch.randn(2, 4, 8, 16), torch.randn(2, 4, 8, 16), torch.rand(2, 1, 64, 128)
    cells = layering.alpha_cells(alpha)
    clone = decomposer.denoiser(model, loaded, layer, image, cells)
    condition = networks.condition(image, cells, layer)
    comfy.model_management.load_models_gpu([clone])
    sampling = clone.get_model_object("model_sampling")
    sigma = sampling.sigma(torch.tensor([700.0, 200.0]))
    x = noisy * (1 + sigma.view(-1, 1, 1, 1) ** 2).sqrt()
    found = clone.model.apply_model(x, sigma, c_concat=condition, c_crossattn=loaded.null.expand(2, -1, -1))
    v = trained[layer](noisy, torch.tensor([700, 200]), image, alpha)
    level = (1 / (1 + sigma**2)).view(-1, 1, 1, 1)
    expected = level.sqrt() * noisy - (1 - level).sqrt() * v
    assert torch.allclose(found, expected, rtol=0, atol=1e-3) and expected.std() > 0.1


@pytest.mark.parametrize("form", byte_weights.FORMS)
@torch.no_grad()
def test_a_base_of_a_byte_gives_what_its_widened_weights_give(loaded, form):
    """ComfyUI rounds what it merges to the weights' own type, which would be half of what the adapters say."""
    layer = "foreground" if form is byte_weights.cast else "background"
    coarse, exact = form({key: value.float() for key, value in comfy.utils.load_torch_file(str(INPAINT)).items()})
    before = {key: value.clone() for key, value in coarse.model.diffusion_model.state_dict().items()}
    assert torch.float8_e4m3fn in {value.dtype for value in before.values()}
    torch.manual_seed(2)
    x, image, cells = torch.randn(2, 4, 8, 16), torch.randn(2, 4, 8, 16), torch.rand(2, 64, 8, 16)
    given = {"c_concat": networks.condition(image, cells, layer), "c_crossattn": loaded.null.expand(2, -1, -1)}

    def found(base):
        clone = decomposer.denoiser(base, loaded, layer, image, cells)
        comfy.model_management.load_models_gpu([clone])
        options = {"wrappers": clone.wrappers}
        return clone.model.apply_model(x, torch.tensor([5.0, 0.5]), **given, transformer_options=options)

    beside, merged = found(coarse), found(comfy.sd.load_diffusion_model_state_dict(exact))
    assert torch.allclose(beside, merged, rtol=0, atol=5e-3) and merged.std() > 0.1
    comfy.model_management.unload_all_models()  # the first convolution goes back
    after = coarse.model.diffusion_model.state_dict()
    assert all(torch.equal(after[key].float(), value.float()) for key, value in before.items())


@torch.no_grad()
def test_an_image_is_taken_apart_at_any_size_and_adds_up(loaded, model):
    vae = comfy.sd.load_checkpoint_guess_config(str(MODELS / "checkpoints" / "strata_mini_sd.safetensors"))[2]
    torch.manual_seed(3)
    image, alpha = torch.rand(2, 3, 77, 129), torch.rand(2, 1, 77, 129)
    alpha[..., :40], alpha[..., 90:] = 0, 1
    run = decomposer.Run(1, 2, "ddim", "normal")

    def apart(align: bool, exact: bool):
        (front,), behind = decomposer.take_apart(model, vae, loaded, image, alpha[None], run, align, exact)
        return front, behind

    front, behind = apart(align=True, exact=True)
    assert front.shape == behind.shape == image.shape
    assert (layering.composite(front, behind, alpha) - image).abs().max() < 1e-5
    again = apart(align=True, exact=True)
    assert torch.equal(front, again[0]) and torch.equal(behind, again[1])
    plain = apart(align=False, exact=False)
    assert not torch.allclose(plain[1], behind, rtol=0, atol=1e-2)
    assert torch.equal(plain[0][..., 90:], image[..., 90:]) and torch.equal(plain[1][..., :40], image[..., :40])


def test_a_model_of_another_kind_is_refused(loaded):
    other = comfy.sd.load_checkpoint_guess_config(str(MODELS / "checkpoints" / "strata_mini_sd.safetensors"))[0]
    with pytest.raises(ValueError, match="^model: file.safetensors is a decomposer for Strata mini .* this is another"):
        decomposer.denoiser(other, loaded, "background", torch.zeros(1, 4, 8, 8), torch.zeros(1, 64, 8, 8))


@pytest.fixture(scope="module")
def whole(base, trained, loaded):
    """The same as a whole UNet for each layer, by diffusers' names."""
    merged = {}
    for layer, model in trained.items():
        unet = copy.deepcopy(model.unet)
        for module in unet.modules():
            if hasattr(module, "lora_A"):
                module.merge()
        state = {key.replace(".base_layer.", "."): value for key, value in unet.state_dict().items()}
        merged[layer] = {key: value for key, value in state.items() if ".lora_" not in key}
    return merged


def prefixed(whole: dict, change=lambda state: state) -> dict:
    return {f"{layer}.{key}": value for layer, state in whole.items() for key, value in change(state).items()}


def hosts(state: dict) -> dict:
    return {f"model.diffusion_model.{key}": value for key, value in decomposer.host_form(state).items()}


@torch.no_grad()
@pytest.mark.parametrize("change", [lambda state: state, hosts], ids=["diffusers", "host"])
def test_whole_unets_give_what_adapters_give(whole, loaded, model, change):
    mini_family.register(decomposer.UNETS)
    found = decomposer.recognise("whole.safetensors", prefixed(whole, change), {})
    assert found.family == bases.MINI and not found.adapters and found.null is None
    torch.manual_seed(4)
    x, image, cells = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), torch.rand(1, 64, 8, 8)
    for layer in networks.LAYERS:
        made = []
        for given, one in ((None, found), (model, loaded)):
            clone = decomposer.denoiser(given, one, layer, image, cells)
            comfy.model_management.load_models_gpu([clone])
            sigma = clone.get_model_object("model_sampling").sigma(torch.tensor([500.0]))
            condition = networks.condition(image, cells, layer)
            made.append(clone.model.apply_model(x, sigma, c_concat=condition, c_crossattn=loaded.null))
        assert torch.allclose(*made, rtol=0, atol=1e-3) and made[0].std() > 0.1


def test_files_of_one_layer_each_are_joined_and_a_missing_one_is_named(whole, loaded):
    parts = [
        decomposer.recognise(f"{layer}.safetensors", state, {"prediction_type": "epsilon"}, layer)
        for layer, state in whole.items()
    ]
    joined = decomposer.join(parts)
    assert list(joined.layers) == ["foreground", "background"] and joined.prediction == "epsilon"
    assert not joined.alignment and list(decomposer.join([*parts, loaded]).alignment) == ["foreground", "background"]
    with pytest.raises(ValueError, match="^background_file: there is no denoiser of the background in foreground.saf"):
        decomposer.join(parts[:1])
    with pytest.raises(ValueError, match="^file: x says that it predicts 'x0', and this pack knows v_prediction and"):
        decomposer.recognise("x", whole["foreground"], {"prediction_type": "x0"})
    with pytest.raises(ValueError, match="^file: x does not have all weights of the networks that align"):
        decomposer.recognise("x", {"alignment.foreground.down.0.0.bias": torch.zeros(3)}, {})
    with pytest.raises(ValueError, match="^file: x has no whole denoiser of the foreground"):
        decomposer.recognise("x", {"conv_in.weight": torch.zeros(320, 72, 3, 3)}, {})


@pytest.mark.parametrize("family", ["SD1.5", "SD2"])
def test_names_of_the_large_unets_go_over_one_to_one(family):
    from diffusers import UNet2DConditionModel

    shape = json.loads(bases.CONFIG.read_text())[family]["unet"]
    with torch.device("meta"):
        unet = UNet2DConditionModel(**{**shape, "in_channels": 72})
    state = unet.state_dict()
    found = decomposer.host_form(state)
    assert len(found) == len(state)
    config = comfy.model_detection.model_config_from_unet(found, "")
    assert decomposer.FAMILIES[type(config).__name__] == family
    for channels in (4, 9):
        stock = dict(found)
        stock["input_blocks.0.0.weight"] = torch.empty(320, channels, 3, 3, device="meta")
        assert type(comfy.model_detection.model_config_from_unet(stock, "")).__name__ in ("SD15", "SD20")


@torch.no_grad()
def test_several_masks_give_several_layers_and_an_empty_one_nothing(loaded, model):
    vae = comfy.sd.load_checkpoint_guess_config(str(MODELS / "checkpoints" / "strata_mini_sd.safetensors"))[2]
    torch.manual_seed(5)
    image, alphas = torch.rand(1, 3, 64, 64), torch.zeros(3, 1, 1, 64, 64)
    alphas[0, ..., :20], alphas[2, ..., 10:40] = 1, 0.5
    run = decomposer.Run(1, 2, "ddim", "normal")
    fronts, behind = decomposer.take_apart(model, vae, loaded, image, alphas, run)
    assert torch.equal(fronts[1], torch.zeros_like(image))
    whole = behind
    for front, alpha in zip(fronts.flip(0), alphas.flip(0), strict=True):
        whole = layering.composite(front, whole, alpha)
    assert (whole - image).abs().max() < 1e-5


def test_what_is_missing_is_said_before_any_work(loaded, whole, model):
    vae = comfy.sd.load_checkpoint_guess_config(str(MODELS / "checkpoints" / "strata_mini_sd.safetensors"))[2]
    with pytest.raises(ValueError, match="^model: nothing is connected and file.safetensors needs it; "):
        decomposer.ready(loaded, vae, None, None)
    alone = decomposer.recognise("whole.safetensors", prefixed(whole), {})
    with pytest.raises(ValueError, match="^empty_prompt: whole.safetensors has no empty prompt in it"):
        decomposer.ready(alone, vae, None, None)
    with pytest.raises(ValueError, match="^negative: whole.safetensors has no empty prompt in it"):
        decomposer.ready(alone, vae, None, None, "negative")
    with pytest.raises(ValueError, match="^empty_prompt: its embeddings have 768 numbers a token and whole.safe.* 128"):
        decomposer.ready(alone, vae, None, [[torch.randn(1, 77, 768), {}]])
    null = torch.randn(1, 77, 128)
    assert torch.equal(decomposer.ready(alone, vae, None, [[null, {}]]).null, null)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["SD1.5", "SD2"])
@torch.inference_mode()
def test_the_node_takes_512_pixels_apart_on_a_large_base(family):
    """One step on every key of the inpainting model, whose deeper blocks are as narrow as its first: what diffusers
    says of the same noise, decoded and brought to add up.
    """
    from diffusers import UNet2DConditionModel

    shape = json.loads(bases.CONFIG.read_text())[family]["unet"]
    heads = {"SD1.5": 8, "SD2": 5}[family]
    unet = UNet2DConditionModel(**{**shape, "block_out_channels": (320,) * 4, "attention_head_dim": heads}).eval()
    names = comfy.utils.unet_to_diffusers(decomposer.STABLE_DIFFUSION)
    assert set(unet.state_dict()) <= set(names)
    state = {names[key]: value.clone() for key, value in unet.state_dict().items()}
    model = comfy.sd.load_diffusion_model_state_dict(state)
    torch.manual_seed(6)
    null = torch.randn(1, 77, shape["cross_attention_dim"])
    base = bases.Base(family, unet, None, None, null, "")
    models = denoisers(base)
    loaded = decomposer.recognise("large.safetensors", published(base, models), {"base": family})
    vae = comfy.sd.load_checkpoint_guess_config(str(MODELS / "checkpoints" / "strata_mini_sd.safetensors"))[2]
    image, mask = torch.rand(1, 512, 512, 3), torch.zeros(1, 512, 512)
    mask[:, 100:300, 200:400], mask[:, 300:320, 200:400] = 1, 0.4
    layers, front, behind, error = DecomposeImage.execute(
        image, mask, vae, loaded, False, True, "noise", 3, 1, "ddim", "normal", model=model
    ).args
    assert error < 1e-5 and len(layers[0]["layers"]) == 2
    assert torch.equal(front[..., 3], mask) and torch.equal(behind[mask == 0], image[mask == 0])

    pixels, alpha, latent = image.movedim(-1, 1), mask[:, None], vae.encode(image)
    noise, steps = comfy.sample.prepare_noise(latent, 3), torch.tensor([999])
    level = 1 / (1 + comfy.model_sampling.ModelSamplingDiscrete().sigma_max ** 2)
    drawn = []
    for layer in networks.LAYERS:
        v = models[layer](noise, steps, 0.18215 * latent, alpha)
        clean = (level.sqrt() * noise - (1 - level).sqrt() * v) / 0.18215
        drawn.append(vae.decode(clean).movedim(-1, 1))
    expected = decomposer.finish(loaded, pixels, alpha, drawn, align=False, exact=True)
    for found, wanted in zip((front[..., :3], behind), expected, strict=True):
        off = (found.movedim(-1, 1) - wanted).abs()
        assert off.mean() < 1e-4 and off.max() < 0.05 and wanted.std() > 0.05
