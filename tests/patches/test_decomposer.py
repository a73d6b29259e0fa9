"""LayeringDiff's files and denoisers in ComfyUI, against diffusers' own forward with the same file."""

import comfy.sd
import pytest
import torch
from mini_models import MODELS
from strata.networks import decomposer as networks
from strata.networks.alignment import Alignment
from strata.patches import decomposer, mini_family
from strata.techniques import layering
from strata.training import base as bases
from strata.training import layeringdiff

INPAINT = MODELS / "diffusion_models" / "strata_mini_inpaint.safetensors"
pytestmark = pytest.mark.skipif(not INPAINT.exists(), reason="no trained weights: make mini")


@pytest.fixture(scope="module")
def base():
    return bases.load(None)


@pytest.fixture(scope="module")
def trained(base):
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


@pytest.fixture(scope="module")
def loaded(base, trained):
    weights = {decomposer.NULL: base.null}
    for layer, model in trained.items():
        own = networks.published_form(model.state_dict())
        weights |= {f"{layer}.{key}": value for key, value in own.items()}
        torch.manual_seed(1)
        network = Alignment((4, 8, 16))
        torch.nn.init.normal_(network.last.weight, std=0.2)
        weights |= {f"{decomposer.ALIGNMENT}.{layer}.{key}": value for key, value in network.state_dict().items()}
    assert decomposer.is_decomposer(weights)
    return decomposer.recognise("file.safetensors", weights, {"base": bases.MINI, "prediction_type": "v_prediction"})


@pytest.fixture(scope="module")
def model():
    mini_family.register()
    return comfy.sd.load_diffusion_model(str(INPAINT))


@pytest.mark.parametrize("layer", networks.LAYERS)
@torch.no_grad()
def test_the_clean_estimate_is_diffusers_own(base, trained, loaded, model, layer):
    torch.manual_seed(2)
    noisy, image, alpha = torch.randn(2, 4, 8, 16), torch.randn(2, 4, 8, 16), torch.rand(2, 1, 64, 128)
    condition = networks.condition(image, layering.alpha_cells(alpha), layer)
    clone = decomposer.denoiser(model, loaded, layer, condition)
    comfy.model_management.load_models_gpu([clone])
    sampling = clone.get_model_object("model_sampling")
    sigma = sampling.sigma(torch.tensor([700.0, 200.0]))
    x = noisy * (1 + sigma.view(-1, 1, 1, 1) ** 2).sqrt()
    found = clone.model.apply_model(x, sigma, c_concat=condition, c_crossattn=loaded.null.expand(2, -1, -1))
    v = trained[layer](noisy, torch.tensor([700, 200]), image, alpha)
    level = (1 / (1 + sigma**2)).view(-1, 1, 1, 1)
    expected = level.sqrt() * noisy - (1 - level).sqrt() * v
    assert torch.allclose(found, expected, rtol=0, atol=1e-3) and expected.std() > 0.1


@torch.no_grad()
def test_an_image_is_taken_apart_at_any_size_and_adds_up(loaded, model):
    vae = comfy.sd.load_checkpoint_guess_config(str(MODELS / "checkpoints" / "strata_mini_sd.safetensors"))[2]
    torch.manual_seed(3)
    image, alpha = torch.rand(2, 3, 77, 129), torch.rand(2, 1, 77, 129)
    alpha[..., :40], alpha[..., 90:] = 0, 1
    run = decomposer.Run(1, 2, "ddim", "normal")
    front, behind = decomposer.decompose(model, vae, loaded, image, alpha, run, align=True, exact=True)
    assert front.shape == behind.shape == image.shape
    assert (layering.composite(front, behind, alpha) - image).abs().max() < 1e-5
    again = decomposer.decompose(model, vae, loaded, image, alpha, run, align=True, exact=True)
    assert torch.equal(front, again[0]) and torch.equal(behind, again[1])
    plain = decomposer.decompose(model, vae, loaded, image, alpha, run, align=False, exact=False)
    assert not torch.allclose(plain[1], behind, rtol=0, atol=1e-2)
    assert torch.equal(plain[0][..., 90:], image[..., 90:]) and torch.equal(plain[1][..., :40], image[..., :40])


def test_a_model_of_another_kind_is_refused(loaded):
    other = comfy.sd.load_checkpoint_guess_config(str(MODELS / "checkpoints" / "strata_mini_sd.safetensors"))[0]
    with pytest.raises(ValueError, match="^model: file.safetensors is a decomposer for Strata mini .* this is another"):
        decomposer.denoiser(other, loaded, "background", torch.zeros(1, 68, 8, 8))
