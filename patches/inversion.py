"""A picture's path to noise through a model, recorded while ComfyUI samples: DDIM inversion, null-text inversion, or
plain noising.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..techniques import inversion
from .gradients import call_unet, differentiable
from .kept import Kept

# Keys of a conditioning that is not plain.
LIMITS = {"start_percent", "end_percent", "area", "mask", "control", "gligen", "hooks"}
METHODS = ("ddim", "null-text", "noise only")


@dataclass(frozen=True, eq=False)
class Inversion(Kept):
    """latents [N,B,C,...,H,W] at descending sigmas [N], in the model's scale, on the CPU; the last is the picture.

    positive: the CONDITIONING that the path was taken with. null: one unconditional embedding per step [N-1,B,T,D], of
    null-text.
    reconstruction: the latent, in the VAE's scale, that sampling from latents[0] gives back; None for noise only.
    """

    latents: Tensor
    sigmas: Tensor
    positive: list
    method: str
    flow: bool = False
    null: Tensor | None = None
    reconstruction: Tensor | None = None

    def at(self, sigma: float) -> Tensor:
        return inversion.trajectory_at(self.latents, self.sigmas, sigma)

    def null_at(self, sigma: float) -> Tensor:
        """[B,T,D]: the unconditional embedding of the step that sigma lies in."""
        return self.null[max(0, int((self.sigmas[:-1] >= sigma).sum()) - 1)]


def noise_levels(model: ModelPatcher, steps: int, scheduler: str, sampler_name: str = "euler") -> Tensor:
    """[steps+1]: the sigmas of a whole denoising, as KSampler takes them for this sampler and scheduler."""
    device, options = torch.device("cpu"), model.model_options
    return comfy.samplers.KSampler(
        model, steps, device, sampler_name, scheduler, denoise=1.0, model_options=options
    ).sigmas


def is_flow(model: ModelPatcher) -> bool:
    """Whether the model does flow matching. Raises ValueError for parametrisations whose path is neither DDIM's nor
    that of flow matching.
    """
    sampling = model.get_model_object("model_sampling")
    if isinstance(sampling, comfy.model_sampling.CONST):
        return True
    if isinstance(sampling, comfy.model_sampling.EPS) and getattr(sampling, "sigma_data", 1.0) == 1.0:
        return False
    raise ValueError(
        "model: its kind of prediction cannot be inverted; noise prediction, v prediction and flow matching can "
        "(SD1.5, SD2, SDXL, Flux, …)."
    )


def invert(
    model: ModelPatcher,
    latent: Tensor,
    positive: list,
    negative: list | None,
    sigmas: Tensor,
    method: str = "ddim",
    cfg: float = 7.5,
    inner_steps: int = 5,
    seed: int = 0,
    callback: Callable | None = None,
    checkpointing: bool = False,
) -> Inversion:
    """The path of a latent [B,C,...,H,W] from the VAE to noise and back, at sigmas [N] that fall to 0.

    negative, cfg, inner_steps and checkpointing (see patches.gradients.differentiable) are for the method null-text
    alone, seed for noise only.
    """
    flow = is_flow(model)
    latent = comfy.sample.fix_empty_latent_channels(model, latent)
    if len(sigmas) < 2 or sigmas[-1] != 0 or (sigmas.diff() >= 0).any():
        raise ValueError("steps: the noise levels must fall to 0 in at least one step; take another scheduler.")
    if method == "noise only":
        clean = model.model.process_latent_in(latent.float().cpu())
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
        return Inversion(
            inversion.noised_trajectory(clean, noise, sigmas.cpu().float(), flow), sigmas.cpu(), positive, method, flow
        )
    if method == "null-text":
        _check_null_text(model, negative, cfg)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative if method == "null-text" else positive)
    walk = _Walk(flow, cfg if method == "null-text" else None, inner_steps, checkpointing)
    reconstruction = guider.sample(
        torch.zeros_like(latent), latent, walk, sigmas, callback=callback, disable_pbar=True, seed=seed
    )
    null = torch.stack(walk.null) if walk.null else None
    return Inversion(
        torch.stack(walk.trajectory[::-1]), sigmas.cpu(), positive, method, flow, null, reconstruction.cpu()
    )


def _check_null_text(model: ModelPatcher, negative: list | None, cfg: float) -> None:
    if not isinstance(model.model.diffusion_model, UNetModel):
        raise ValueError(
            "model: null-text inversion works with SD1.5, SD2, SDXL and the Strata mini family; take the method ddim "
            "for this one."
        )
    if negative is None or len(negative) != 1:
        raise ValueError(
            "negative: null-text starts from one plain conditioning; connect the text encoding of an empty prompt."
        )
    limits = sorted(LIMITS & negative[0][1].keys())
    if limits:
        raise ValueError(
            f"negative: it carries {', '.join(limits)}, and null-text takes one plain conditioning for the whole "
            "image and the whole way; connect the text encoding of an empty prompt."
        )
    if cfg == 1:
        raise ValueError(
            "cfg: at 1 there is no unconditional embedding to optimise; raise it, or take the method ddim."
        )


@dataclass
class _Walk(comfy.samplers.Sampler):
    """One run: up from the picture to noise, then down again to see what comes back. cfg None goes down with the
    conditional prediction.
    """

    flow: bool
    cfg: float | None
    inner_steps: int
    checkpointing: bool = False
    trajectory: list[Tensor] = field(default_factory=list)  # from the picture to noise
    null: list[Tensor] = field(default_factory=list)  # from noise to the picture

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ) -> Tensor:
        self.model, self.conds, self.options = model_wrap.inner_model, model_wrap.conds, extra_args["model_options"]
        steps = len(sigmas) - 1

        def report(step: int, denoised: Tensor, x: Tensor) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            if callback is not None:
                callback(step, denoised, x, 2 * steps)

        x = latent_image.float()
        self.trajectory.append(x.cpu())
        for step, (sigma, above) in enumerate(zip(sigmas.flip(0)[:-1], sigmas.flip(0)[1:], strict=True)):
            evaluated = x * inversion.scale_between(sigma, above, self.flow)
            denoised = self.predict(self.conds["positive"], evaluated, above)
            x = inversion.ode_step(x, evaluated, denoised, above, sigma, above)
            self.trajectory.append(x.cpu())
            report(step, denoised, x)
        embedding = None
        for step, (sigma, below) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
            denoised = self.predict(self.conds["positive"], x, sigma)
            if self.cfg is not None:
                target = self.trajectory[-2 - step].to(x)
                embedding = self.optimise(embedding, x, denoised, sigma, below, target, step, steps)
                self.null.append(embedding.cpu())
                unconditional = self.predict([self.unconditional(embedding)], x, sigma)
                denoised = unconditional + (denoised - unconditional) * self.cfg
            x = inversion.ode_step(x, x, denoised, sigma, sigma, below)
            report(steps + step, denoised, x)
        return x

    def predict(self, conds: list[dict], x: Tensor, sigma: Tensor) -> Tensor:
        return comfy.samplers.calc_cond_batch(self.model, [conds], x, sigma.expand(len(x)).contiguous(), self.options)[
            0
        ]

    def unconditional(self, embedding: Tensor) -> dict:
        return with_embedding(self.conds["negative"][0], embedding)

    def optimise(
        self,
        embedding: Tensor | None,
        x: Tensor,
        conditional: Tensor,
        sigma: Tensor,
        below: Tensor,
        target: Tensor,
        step: int,
        steps: int,
    ) -> Tensor:
        """The embedding [B,T,D] with which one step of guided sampling from x comes closest to target."""
        if embedding is None:
            embedding = self.conds["negative"][0]["model_conds"]["c_crossattn"].cond.float().expand(len(x), -1, -1)
        with torch.inference_mode(False), torch.enable_grad():
            x, conditional, target, sigma, below = (
                value.detach().clone() for value in (x, conditional, target, sigma, below)
            )
            leaf = embedding.detach().to(x.device).clone().requires_grad_()
            adam = torch.optim.Adam([leaf], inversion.null_text_learning_rate(step, steps))
            with differentiable(self.model.diffusion_model, self.checkpointing):
                for _ in range(self.inner_steps):
                    unconditional = self.predict_from(leaf, x, sigma)
                    stepped = inversion.ode_step(
                        x, x, unconditional + (conditional - unconditional) * self.cfg, sigma, sigma, below
                    )
                    loss = inversion.null_text_loss(stepped, target, below, self.flow)
                    (leaf.grad,) = torch.autograd.grad(loss.sum(), leaf)
                    adam.step()
                    if loss.max().item() < inversion.null_text_tolerance(step, steps):
                        break
            return leaf.detach()

    def predict_from(self, leaf: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """The denoised latent as a function of the unconditional embedding: only the UNet and what follows it are in
        the graph.
        """
        kept = []

        def around(executor, x, timesteps, context, *args, **kwargs):
            if len(context) != len(leaf) or context.shape[2] != leaf.shape[2]:
                raise ValueError(
                    "negative: null-text takes one plain conditioning for the whole image; connect the text "
                    "encoding of an empty prompt."
                )
            with torch.inference_mode(False), torch.enable_grad():
                kept.append(executor(x, timesteps, leaf.to(context.dtype), *args, **kwargs))
            return kept[-1].detach()

        call_unet(around, self.model, [self.unconditional(leaf.detach())], x, sigma, self.options)
        return self.model.model_sampling.calculate_denoised(sigma, kept[0].float(), x)


def with_embedding(entry: dict, embedding: Tensor) -> dict:
    """A processed conditioning with another text embedding [B,T,D]."""
    text = entry["model_conds"]["c_crossattn"]
    return {**entry, "model_conds": {**entry["model_conds"], "c_crossattn": text._copy_with(embedding)}}
