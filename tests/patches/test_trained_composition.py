"""What inversion and guidance do on the trained mini family; skipped until its weights are there."""

import comfy.samplers
import pytest
import torch
from mini_models import CHECKPOINT, Family
from strata.patches.feature_guidance import Plane, Planes, Settings, guider
from strata.patches.inversion import invert
from strata.techniques.losses import psnr

pytestmark = pytest.mark.skipif(not CHECKPOINT.exists(), reason="no trained weights: make mini")


@pytest.fixture(scope="module")
def family():
    with torch.inference_mode():
        return Family()


@pytest.mark.slow
@torch.inference_mode()
def test_null_text_comes_back_within_35_db_at_cfg_7_5_and_ddim_does_not(family):
    _scene, latent, positive = family.scene("meadow", ("dog",), 3)
    sigmas = family.sigmas(50)
    found = invert(family.model, latent, positive, family.negative, sigmas, "null-text", cfg=7.5, inner_steps=10)
    plain = comfy.samplers.CFGGuider(family.model)
    plain.set_conds(positive, family.negative)
    plain.set_cfg(7.5)
    ddim = plain.sample(
        found.latents[0] / sigmas[0],
        torch.zeros_like(latent),
        comfy.samplers.sampler_object("euler"),
        sigmas,
        disable_pbar=True,
    )
    assert (
        psnr(found.reconstruction, latent, None) >= 35
        and psnr(found.reconstruction, latent, None) > psnr(ddim, latent, None) + 6
    )


@torch.inference_mode()
def test_the_default_step_size_lowers_the_energy_in_every_guided_step(family):
    sigmas = family.sigmas(10)
    (front, *foreground), (_back, *background) = family.scene("meadow", ("dog",), 3), family.scene("snow", (), 5)
    inversions = [invert(family.model, latent, positive, None, sigmas) for latent, positive in (background, foreground)]
    planes = Planes((Plane(inversions[0]), Plane(inversions[1], torch.from_numpy(front.masks[-1]))))
    found = guider(family.model, family.text("a puppy on a snowy field"), family.negative, 4.0, planes, Settings())
    found.sample(
        torch.zeros_like(background[0]),
        torch.zeros_like(background[0]),
        comfy.samplers.sampler_object("euler"),
        sigmas,
        disable_pbar=True,
    )
    assert len(found.energies) == 7 and all(
        later < earlier for step in found.energies for earlier, later in zip(step, step[1:], strict=False)
    )
