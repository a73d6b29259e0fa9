"""Two inverted pictures composed half and half, for tests of feature guidance, and a patch as IPAdapter's."""

import comfy.model_management
import comfy.samplers
import torch
from strata.patches import feature_guidance
from strata.patches.feature_guidance import Plane, Planes, Settings
from strata.patches.inversion import invert

from . import fusion_reference, small_models
from .sampling_helpers import calm, conditioning, picture, sigmas_of

STEPS, SIDE = 4, 8


def half_mask(side=SIDE):
    mask = torch.zeros(side, side)
    mask[:, side // 2 :] = 1
    return mask


class Case:
    """A model with two inverted pictures, composed half and half."""

    channels = 4

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

    def scale(self, sigma):
        """What a latent is divided by for the network."""
        return float((1 + sigma.double() ** 2).sqrt())

    def picture(self, seed, batch=1, side=SIDE):
        return torch.randn(batch, self.channels, side, side, generator=torch.Generator().manual_seed(seed))

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
        noise = self.picture(9) if noise is None else noise
        latent = torch.zeros_like(noise) if latent is None else latent
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


class FluxCase(Case):
    """Flux's whole structure, small and random, or Flux-Fill's."""

    channels = 16

    def __init__(self, dtype=torch.float32, fill=False, **changes):
        self.model = small_models.small_flux(**({"in_channels": 96} if fill else {}), **changes)
        network = self.model.model.diffusion_model
        with torch.no_grad():
            network.final_layer.linear.weight *= 0.1  # as calm has it
        network.to(dtype)
        network.dtype = dtype
        self.sigmas = sigmas_of(self.model, STEPS, "simple")
        self.positive, self.negative = self.text(1), self.text(2)
        self.inversions = [
            invert(self.model, self.picture(seed), self.text(10 + seed), None, self.sigmas) for seed in (3, 4, 5)
        ]
        self.planes = Planes((Plane(self.inversions[0]), Plane(self.inversions[1], half_mask())))

    def scale(self, sigma):
        return 1.0

    def text(self, seed, tokens=7, **extra):
        generator = torch.Generator().manual_seed(seed)
        width, pooled = (self.model.model.model_config.unet_config[key] for key in ("context_in_dim", "vec_in_dim"))
        words = torch.randn(1, tokens, width, generator=generator)
        return [[words, {"pooled_output": torch.randn(1, pooled, generator=generator), **extra}]]


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
