"""Two inverted pictures composed half and half, for tests of feature guidance, and a patch as IPAdapter's."""

import comfy.model_management
import comfy.samplers
import torch
from strata.patches import feature_guidance
from strata.patches.feature_guidance import Plane, Planes, Settings
from strata.patches.inversion import invert

from . import fusion_reference
from .sampling_helpers import calm, conditioning, picture, sigmas_of

STEPS, SIDE = 4, 8


def half_mask(side=SIDE):
    mask = torch.zeros(side, side)
    mask[:, side // 2 :] = 1
    return mask


class Case:
    """A model with two inverted pictures, composed half and half."""

    def __init__(self, kind="mini", dtype=None, **changes):
        self.model = calm(fusion_reference.patcher(kind, **changes))
        if dtype is not None:
            self.model.model.diffusion_model.to(dtype)
            self.model.model.diffusion_model.dtype = dtype
        self.sigmas = sigmas_of(self.model, STEPS)
        self.positive, self.negative = conditioning(self.model, 1, rows=1), conditioning(self.model, 2, rows=1)
        self.inversions = [
            invert(self.model, picture(seed), conditioning(self.model, 10 + seed, rows=1), None, self.sigmas)
            for seed in (3, 4, 5)
        ]
        self.planes = Planes((Plane(self.inversions[0]), Plane(self.inversions[1], half_mask())))

    def guider(self, planes=None, model=None, positive=None, cfg=3.0, **settings):
        settings = {"step_size": 0.001, "iterations": 3, **settings}
        return feature_guidance.guider(
            model or self.model,
            positive or self.positive,
            self.negative,
            cfg,
            planes or self.planes,
            Settings(**settings),
        )

    def sample(self, guider, noise=None, latent=None, sampler="euler", mask=None, **more):
        noise = picture(9) if noise is None else noise
        latent = torch.zeros(len(noise), 4, *noise.shape[2:]) if latent is None else latent
        return guider.sample(
            noise,
            latent,
            comfy.samplers.sampler_object(sampler),
            self.sigmas,
            denoise_mask=mask,
            disable_pbar=True,
            seed=1,
            **more,
        )

    def plain(self, **more):
        guider = comfy.samplers.CFGGuider(self.model)
        guider.set_conds(self.positive, self.negative)
        guider.set_cfg(3.0)
        return self.sample(guider, **more)


def with_adapter(model):
    """As IPAdapter does it: more attention in chosen blocks, which are known by transformer_options."""
    generator = torch.Generator().manual_seed(1)
    weights = {}

    def adapted(q, k, v, options):
        out = comfy.ldm.modules.attention.optimized_attention(q, k, v, options["n_heads"])
        assert options["block"] in (("output", 3), ("middle", 0))
        key = (options["block"], q.shape[-1])
        weights.setdefault(key, torch.randn(q.shape[-1], generator=generator))
        extra = weights[key].to(q).expand(len(q), 2, -1) * torch.tensor([1.0, -1.0]).view(2, 1)
        return out + comfy.ldm.modules.attention.optimized_attention(q, extra, extra, options["n_heads"])

    model = model.clone()
    model.set_model_attn2_replace(adapted, "output", 3)
    model.set_model_attn2_replace(adapted, "middle", 0)
    return model
