"""FeatGLaC in ComfyUI's sampling: before each step the latent is moved until the decoder's features are those of the
scenes that it is composed of.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from weakref import WeakKeyDictionary

import comfy.k_diffusion.sampling
import comfy.model_management
import comfy.samplers
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel, Upsample
from comfy.model_patcher import ModelPatcher
from einops import rearrange
from torch import Tensor, nn
from tqdm.auto import trange

from ..techniques import feature_guidance as featglac
from .gradients import call_unet, differentiable
from .inversion import Inversion, is_flow, with_embedding

STARTS = ("background inversion", "given latent")
SAMPLERS = ("euler", "ddim")
UNCONDITIONAL = ("negative", "null-text of the background")
INPAINTING = ("concat_latent_image", "concat_mask")  # what InpaintModelConditioning leaves in a conditioning
# Keys of a conditioning that no batch can share.
APART = {"area", "mask", "control", "gligen", "hooks", "default", "timestep_start", "timestep_end"}


@dataclass(frozen=True)
class Plane:
    """mask [H,W], 1 = in the plane, None = everywhere; weight: of its energy."""

    inversion: Inversion
    mask: Tensor | None = None
    weight: float = 1.0


@dataclass(frozen=True, eq=False)
class Planes:
    """Back to front. recorded: features of earlier runs, by model and by (levels, sigma, planes in use), in half
    precision on the CPU.
    """

    planes: tuple[Plane, ...]
    recorded: WeakKeyDictionary = field(default_factory=WeakKeyDictionary)


@dataclass(frozen=True)
class Settings:
    """level_weights: as techniques.feature_guidance.parse_level_weights takes them; foreground: lambda, of all planes
    but the first.
    """

    level_weights: str = "0.2, 8.5"
    foreground: float = 1.0
    iterations: int = 5
    step_size: float = 0.1
    start_percent: float = 0.0
    end_percent: float = 0.76
    norm: str = "l2"
    start: str = STARTS[0]
    cache: bool = False
    checkpointing: bool = False
    unconditional: str = UNCONDITIONAL[0]
    paste_percent: float | None = None  # from here on the first plane's latent lies in the composite, once


def decoder_levels(unet: nn.Module) -> list[nn.Module]:
    """The last module of each level of the decoder, deepest level first: what it returns are the paper's features."""
    last = [block[-1] for block in unet.output_blocks]
    return [module for module in last[:-1] if isinstance(module, Upsample)] + last[-1:]


def guider(
    model: ModelPatcher, positive: list, negative: list, cfg: float, planes: Planes, settings: Settings
) -> FeatureGuider:
    """Raises ValueError for a model that has no decoder of this kind, and for level weights that do not fit it."""
    if not isinstance(model.model.diffusion_model, UNetModel) or is_flow(model):
        raise ValueError(
            "model: feature guidance works with SD1.5, SD2, SDXL and the Strata mini family; load a checkpoint of one "
            "of them."
        )
    if settings.unconditional == UNCONDITIONAL[1]:
        if planes.planes[0].inversion.null is None:
            raise ValueError(
                "unconditional: the first plane's inversion has no embeddings; invert the background with the method "
                f"null-text, or choose {UNCONDITIONAL[0]}."
            )
        if len(negative) != 1:
            raise ValueError(
                "negative: it combines several conditionings, and the embeddings of null-text can replace only one; "
                "connect one text encoding."
            )
    found = FeatureGuider(model)
    found.set_conds(positive, negative)
    found.set_cfg(cfg)
    found.planes, found.settings = planes, settings
    found.level_weights = featglac.parse_level_weights(
        settings.level_weights, len(decoder_levels(model.model.diffusion_model))
    )
    return found


def insertion_guider(
    model: ModelPatcher, positive: list, negative: list, cfg: float, nearer: Plane, **settings
) -> FeatureGuider:
    """The guider of an inpainting that holds what is nearer than its object late in the sampling, after its latent was
    put in once. Raises ValueError as guider does.
    """
    settings = Settings(start_percent=0.62, end_percent=0.96, paste_percent=0.6, start=STARTS[1], **settings)
    return guider(model, positive, negative, cfg, Planes((nearer,)), settings)


class FeatureGuider(comfy.samplers.CFGGuider):
    """A CFG guider whose sampler moves the latent before each step. energies: per guided step of the latest run, one
    value per iteration.
    """

    planes: Planes
    settings: Settings
    level_weights: dict[int, float]
    energies: list[list[float]]

    def sample(self, noise, latent_image, sampler, sigmas, *args, **kwargs):
        check_sampler(sampler)
        self.energies = []
        self.masks = self._check_planes(latent_image)
        self.weights = self._plane_weights()
        # a run that goes on where another one ended (SplitSigmas, DisableNoise) has its latent already
        self.goes_on = not noise.any() and float(sigmas[0]) < (1 - 1e-4) * float(
            self.planes.planes[0].inversion.sigmas[0]
        )
        plain, conds = sampler, self.original_conds
        if self.guides():
            self.original_conds = {
                **conds,
                **{
                    f"plane {i}": comfy.sampler_helpers.convert_cond(plane.inversion.positive)
                    for i, plane in enumerate(self.planes.planes)
                },
            }
        elif (
            self.settings.start == STARTS[1]
            and self.settings.paste_percent is None
            and self.settings.unconditional == UNCONDITIONAL[0]
        ):
            return super().sample(noise, latent_image, plain, sigmas, *args, **kwargs)
        sampler = comfy.samplers.KSAMPLER(
            partial(self._walk, plain.sampler_function), plain.extra_options, plain.inpaint_options
        )
        try:
            return super().sample(noise, latent_image, sampler, sigmas, *args, **kwargs)
        finally:
            self.original_conds = conds
            self.plane_conds = self.level_masks = None

    def guides(self) -> bool:
        """Whether anything moves the latent at all. Without a foreground there is nothing to compose, and the sampling
        is the plain one.
        """
        settings = self.settings
        return bool(
            settings.iterations and settings.step_size and self.level_weights and any(self.weights[1:] or self.weights)
        )

    def inner_sample(self, noise, latent_image, device, sampler, sigmas, denoise_mask, *args, **kwargs):
        """The scenes' conditionings are prepared apart: ComfyUI would hand them the composite's ControlNets.

        An inpainting model sees the same mask and picture with all of them, so that a scene's own latent has the
        scene's own features.
        """
        keys = [key for key in self.conds if key.startswith("plane ")]
        shown = {name: value for name, value in self.conds["positive"][0].items() if name in INPAINTING}
        scenes = [[{**entry, **shown} for entry in self.conds.pop(key)] for key in keys]
        latent = self.inner_model.process_latent_in(latent_image) if latent_image.any() else latent_image
        self.plane_conds = [
            comfy.samplers.process_conds(self.inner_model, noise, {"positive": conds}, device, latent, denoise_mask)[
                "positive"
            ]
            for conds in scenes
        ]
        return super().inner_sample(noise, latent_image, device, sampler, sigmas, denoise_mask, *args, **kwargs)

    def _check_planes(self, latent: Tensor) -> Tensor:
        for plane in self.planes.planes:
            shape = plane.inversion.latents.shape[1:]
            if shape[1:] != latent.shape[1:]:
                raise ValueError(
                    f"planes: an inversion is of {shape[3] * 8}×{shape[2] * 8} pixels and {shape[1]} latent channels, "
                    f"the latent of {latent.shape[3] * 8}×{latent.shape[2] * 8} and {latent.shape[1]}; resize the "
                    "images to one size before inverting them."
                )
            if len(latent) % shape[0]:
                raise ValueError(
                    f"planes: an inversion of {shape[0]} images does not go with {len(latent)} latents; invert one "
                    "image, or one for each."
                )
            if plane.inversion.flow:
                raise ValueError(
                    "planes: an inversion was made with a flow matching model; invert the image with the model that "
                    "samples."
                )
        return featglac.visible_masks([plane.mask for plane in self.planes.planes], *latent.shape[2:])

    def _plane_weights(self) -> list[float]:
        weights = []
        for number, (plane, mask) in enumerate(zip(self.planes.planes, self.masks, strict=True)):
            share = self.settings.foreground if number or len(self.planes.planes) == 1 else 1.0
            weights.append(plane.weight * share if mask.any() else 0.0)
        return weights

    def _walk(
        self, step: Callable, model, x: Tensor, sigmas: Tensor, extra_args=None, callback=None, disable=None, **options
    ) -> Tensor:
        """The sampler, one step of it at a time: it has no memory of its own."""
        settings, sampling = self.settings, self.inner_model.model_sampling
        if settings.start == STARTS[0] and not self.goes_on:
            x = self._scene(0, sigmas[0], x)
        highest, lowest = (
            sampling.percent_to_sigma(percent) for percent in (settings.start_percent, settings.end_percent)
        )
        paste = None if settings.paste_percent is None else sampling.percent_to_sigma(settings.paste_percent)
        self.level_masks = self.masks.to(x.device)
        self._forget_other_levels(sigmas)
        for number in trange(len(sigmas) - 1, disable=disable):
            sigma = sigmas[number]
            if paste is not None and float(sigma) <= paste:
                x, paste = featglac.composite_latent(self._scene(0, sigma, x), x, self.level_masks[0]), None
            if self.guides() and lowest <= float(sigma) <= highest:
                x = self._guide(x, sigma, extra_args["model_options"])
            if settings.unconditional == UNCONDITIONAL[1]:
                embedding = self.planes.planes[0].inversion.null_at(float(sigma)).to(x)
                self.conds["negative"] = [
                    with_embedding(self.conds["negative"][0], embedding.repeat(len(x) // len(embedding), 1, 1))
                ]
            numbered = None if callback is None else lambda values, number=number: callback({**values, "i": number})
            x = step(
                model, x, sigmas[number : number + 2], extra_args=extra_args, callback=numbered, disable=True, **options
            )
        return x

    def _scene(self, number: int, sigma: Tensor, like: Tensor) -> Tensor:
        latent = self.planes.planes[number].inversion.at(float(sigma)).to(like)
        return latent.repeat(len(like) // len(latent), 1, 1, 1)

    def _guide(self, x: Tensor, sigma: Tensor, options: dict) -> Tensor:
        """K iterations at one noise level."""
        settings, used = self.settings, [number for number, weight in enumerate(self.weights) if weight]
        sources = self._sources(used, x, sigma, options)
        unet, energies = self.inner_model.diffusion_model, []
        with differentiable(unet, settings.checkpointing):
            for iteration in range(settings.iterations):
                comfy.model_management.throw_exception_if_processing_interrupted()
                probe = Probe(unet, self.level_weights, gradient=True)
                call_unet(probe, self.inner_model, self.conds["positive"], x, sigma, options)
                probe.check(len(x), "positive")
                with torch.inference_mode(False), torch.enable_grad():
                    masks = self.level_masks[used].clone()
                    energy = featglac.composition_energy(
                        probe.features,
                        sources,
                        masks,
                        self.level_weights,
                        [self.weights[number] for number in used],
                        settings.norm,
                    ) * featglac.iteration_factor(iteration, settings.norm)
                    (gradient,) = torch.autograd.grad(energy.sum(), probe.latent)
                energies.append(energy.sum().item())
                if not torch.isfinite(gradient).all():
                    raise ValueError(
                        "step_size: the guidance grew beyond all numbers at this size of step; lower step_size or "
                        "level_weights."
                    )
                x = featglac.guided_update(x, gradient, sigma, settings.step_size)
        self.energies.append(energies)
        return x

    def _sources(self, used: list[int], x: Tensor, sigma: Tensor, options: dict) -> dict[int, Tensor]:
        """Features [P,B,C,h,w] of the scenes at this noise level, for each level."""
        if not self.settings.cache:
            return self._record(used, x, sigma, options)
        recorded = self.planes.recorded.setdefault(self.model_patcher, {})
        key = tuple(self.level_weights), float(sigma), tuple(used), len(x)
        if key not in recorded:
            half = torch.bfloat16 if self.inner_model.get_dtype() == torch.bfloat16 else torch.float16
            recorded[key] = {
                level: values.to("cpu", half) for level, values in self._record(used, x, sigma, options).items()
            }
        return {level: values.to(x.device) for level, values in recorded[key].items()}

    def _forget_other_levels(self, sigmas: Tensor) -> None:
        """The cache holds one schedule: with SDXL at 1024 pixels, every other one would take 2.4 GB more, for as long
        as the planes live.
        """
        recorded, levels = self.planes.recorded.get(self.model_patcher, {}), set(sigmas.tolist())
        for key in [key for key in recorded if key[1] not in levels]:
            del recorded[key]

    def _record(self, used: list[int], x: Tensor, sigma: Tensor, options: dict) -> dict[int, Tensor]:
        """In one batch where the scenes' conditionings allow it, else one scene after the other."""
        latents = [self._scene(number, sigma, x) for number in used]
        joined = _join([self.plane_conds[number] for number in used], len(x))
        calls = (
            [(torch.cat(latents), joined)]
            if joined
            else [(one, self.plane_conds[number]) for one, number in zip(latents, used, strict=True)]
        )
        found = []
        for rows, conds in calls:
            probe = Probe(self.inner_model.diffusion_model, self.level_weights, gradient=False)
            call_unet(probe, self.inner_model, conds, rows, sigma, options)
            probe.check(len(rows), "the positive of an inversion")
            found.append(probe.features)
        return {
            level: rearrange(torch.cat([one[level] for one in found]), "(plane b) c h w -> plane b c h w", b=len(x))
            for level in self.level_weights
        }


class Probe:
    """Around one call of the UNet: keeps the features of the levels that have a weight, and stops behind the last of
    them.
    """

    def __init__(self, unet: nn.Module, levels, gradient: bool):
        modules = decoder_levels(unet)
        self.modules = {level: modules[level] for level in levels}
        self.gradient, self.calls = gradient, 0
        self.features: dict[int, Tensor] = {}
        self.latent: Tensor | None = None  # the network's input, which the features are a function of

    def __call__(self, executor, x: Tensor, *args, **kwargs) -> Tensor:
        self.calls += 1
        hooks = [module.register_forward_hook(partial(self._keep, level)) for level, module in self.modules.items()]
        channels = executor.class_obj.out_channels
        try:
            with torch.inference_mode(False) if self.gradient else nullcontext(), torch.set_grad_enabled(self.gradient):
                network_input = x
                if self.gradient:
                    self.latent = x[:, :channels].detach().clone().requires_grad_()
                    network_input = torch.cat([self.latent, x[:, channels:].clone()], 1)
                executor(network_input, *args, **kwargs)
        except _Enough:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return torch.zeros_like(x[:, :channels])

    def _keep(self, level: int, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.features[level] = output
        if level == max(self.modules):
            raise _Enough

    def check(self, rows: int, socket: str) -> None:
        if self.calls != 1 or any(len(values) != rows for values in self.features.values()):
            raise ValueError(
                f"{socket}: several conditionings are combined, or none is for this step; feature guidance needs one "
                "for the whole image."
            )


class _Enough(Exception):
    """The features are there; the rest of the UNet need not run."""


def _join(scenes: list[list[dict]], batch: int) -> list[dict] | None:
    """One conditioning for the scenes' latents one behind the other; None when they cannot share a batch."""
    entries = [conds[0] for conds in scenes if len(conds) == 1 and not APART & conds[0].keys()]
    if len(entries) < len(scenes) or len({frozenset(entry["model_conds"]) for entry in entries}) > 1:
        return None
    together = {}
    for name in entries[0]["model_conds"]:
        first, *others = (entry["model_conds"][name].process_cond(batch_size=batch, area=None) for entry in entries)
        if not all(first.can_concat(other) for other in others):
            return None
        together[name] = first._copy_with(first.concat(others))
    return [{**entries[0], "model_conds": together}]


def check_sampler(sampler) -> None:
    euler = (
        isinstance(sampler, comfy.samplers.KSAMPLER)
        and sampler.sampler_function is comfy.k_diffusion.sampling.sample_euler
    )
    if not euler or sampler.extra_options.get("s_churn"):
        raise ValueError(
            "sampler: feature guidance moves the latent between two steps, which only samplers without memory and "
            f"noise of their own allow; choose one of {', '.join(SAMPLERS)}."
        )
