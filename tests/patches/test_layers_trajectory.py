"""The trajectory that Layers sampler retains, on the trained mini family, whose predictions leave noise of the level
beside the result.
"""

import comfy.samplers
import pytest
import torch
from mini_models import CHECKPOINT, Family
from strata.nodes.shared_layers import LayersSampler
from strata.patches.layer_prompts import encode_layers
from strata.patches.shared_layers import Maps, Sharing, map_context, share_layers

pytestmark = pytest.mark.skipif(not CHECKPOINT.exists(), reason="no trained weights: make mini")


@pytest.fixture(scope="module")
def mini():
    with torch.inference_mode():
        return Family()


@torch.inference_mode()
def trained_run(mini, **changed):
    settings = {
        "seed": 1,
        "steps": 6,
        "cfg": 1.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "denoise": 1.0,
        "harmonize": False,
        **changed,
    }
    return LayersSampler.execute(
        map_context(share_layers(mini.model, Sharing()), Maps()),
        mini.vae,
        encode_layers(mini.clip, "a beach", ["a dog"]),
        "same for all layers",
        harmonize_start=0.4,
        harmonize_end=0.6,
        negative=mini.negative,
        latent_image={"samples": torch.zeros(1, 4, 16, 16)},
        **settings,
    ).result


@pytest.mark.parametrize("sampler", comfy.samplers.KSampler.SAMPLERS)
def test_the_trajectory_is_at_the_levels_that_it_claims_with_every_sampler(mini, sampler):
    """Its noise is what is left beside the result; DEIS hands its callback the initial latent at every step."""
    *_, latent, (trajectory,) = trained_run(mini, sampler_name=sampler, harmonize=False)
    sigmas = trajectory.sigmas
    assert (sigmas.diff() < 0).all() and sigmas[-1] == 0 and len(trajectory.latents) == len(sigmas) > 4
    final = mini.model.model.latent_format.process_in(latent["samples"][:2].cpu())
    assert torch.allclose(trajectory.latents[-1], final, rtol=0, atol=1e-6)
    noisy = sigmas > 1.5  # below, a prediction takes some of the noise for texture
    noise = (trajectory.latents[noisy] - final).flatten(1).std(1) / sigmas[noisy]
    assert noise[0] == pytest.approx(1, abs=0.2) and (noise > 0.6).all() and (noise < 1.6).all()


@pytest.mark.parametrize("denoise", [0.3, 1.0])
def test_harmonising_starts_at_its_own_noise_level_whatever_the_run_had(mini, denoise):
    *_, latent, (trajectory,) = trained_run(mini, denoise=denoise)
    final = mini.model.model.latent_format.process_in(latent["samples"][:2].cpu())
    sigma = float(mini.model.get_model_object("model_sampling").percent_to_sigma(0.4))
    assert (trajectory.sigmas[0] < sigma) == (denoise < 1)
    assert (trajectory.at(sigma) - final).std() / sigma == pytest.approx(1, abs=0.35)
