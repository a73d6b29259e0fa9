"""FeatGLaC in ComfyUI's sampling: before each step the latent is moved until the network's features are those of the
scenes that it is composed of. They are the decoder's of a UNet, and what chosen blocks of Flux make of the image's
tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from weakref import WeakKeyDictionary

import comfy.k_diffusion.sampling
import comfy.model_management
import comfy.patcher_extension
import comfy.samplers
import torch
from comfy.ldm.flux.model import Flux
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel, Upsample
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from einops import rearrange
from torch import Tensor, nn
from tqdm.auto import trange

from ..techniques import feature_guidance as featglac
from .gradients import call_unet, differentiable
from .inversion import Inversion, is_flow, with_embedding

STARTS = ("background inversion", "given latent")
SAMPLERS = ("euler", "ddim")
KEY, ROOM = "strata_feature_guidance", 2
UNCONDITIONAL = ("negative", "null-text of the background")
INPAINTING = ("concat_latent_image", "concat_mask")  # what InpaintModelConditioning leaves in a conditioning
FLUX = json.loads((Path(__file__).parent.parent / "models_config" / "feature_guidance.json").read_text())["flux"]
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


def flux_blocks(flux: Flux) -> dict[str, nn.Module]:
    """By name, in the order in which they run; numbers are ComfyUI's own, from 0."""
    return {f"double {number}": block for number, block in enumerate(flux.double_blocks)} | {
        f"single {number}": block for number, block in enumerate(flux.single_blocks)
    }


def levels_of(network: UNetModel | Flux) -> dict[featglac.Level, nn.Module]:
    """What gives features, in the order in which it runs."""
    return flux_blocks(network) if isinstance(network, Flux) else dict(enumerate(decoder_levels(network)))


def level_weights(network: UNetModel | Flux, text: str) -> dict[featglac.Level, float]:
    """{level: weight} from what a user writes, see parse_level_weights and parse_block_weights. Raises ValueError."""
    names = list(levels_of(network))
    if not isinstance(network, Flux):
        return featglac.parse_level_weights(text, len(names))
    usual = [names[round(share * len(names))] for share in FLUX["levels"]]
    return featglac.parse_block_weights(text, names, usual)


def is_supported(model: ModelPatcher) -> bool:
    network = model.model.diffusion_model
    if isinstance(network, Flux):
        return not network.params.global_modulation
    return isinstance(network, UNetModel) and not is_flow(model)


def guider(
    model: ModelPatcher, positive: list, negative: list, cfg: float, planes: Planes, settings: Settings
) -> FeatureGuider:
    """The guider that composes these planes. Raises ValueError for a model that is not supported, and for level weights
    that do not fit it.
    """
    if not is_supported(model):
        raise ValueError(
            "model: feature guidance works with SD1.5, SD2, SDXL, Flux.1 and the Strata mini family; load one of them."
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
    result = FeatureGuider(model)
    result.set_conds(positive, negative)
    result.set_cfg(cfg)
    result.planes, result.settings = planes, settings
    result.flow = is_flow(model)
    result.level_weights = level_weights(model.model.diffusion_model, settings.level_weights)
    return result


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
    level_weights: dict[featglac.Level, float]
    flow: bool
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

    def outer_sample(self, *args, **kwargs):
        if isinstance(self.model_patcher.model.diffusion_model, Flux) and self.guides():
            comfy.patcher_extension.add_wrapper_with_key(
                WrappersMP.PREPARE_SAMPLING, KEY, _with_room, self.model_options, is_model_options=True
            )
        return super().outer_sample(*args, **kwargs)

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
            if plane.inversion.flow != self.flow:
                kind = "flow matching" if plane.inversion.flow else "noise prediction"
                raise ValueError(
                    f"planes: an inversion was made with a {kind} model; invert the image with the model that samples."
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
        network, energies = self.inner_model.diffusion_model, []
        units = self._units(sources)
        with differentiable(network, settings.checkpointing):
            for iteration in range(settings.iterations):
                comfy.model_management.throw_exception_if_processing_interrupted()
                probe = Probe(network, self.level_weights, gradient=True)
                call_unet(probe, self.inner_model, self.conds["positive"], x, sigma, options)
                probe.check(len(x), "positive")
                with torch.inference_mode(False), torch.enable_grad():
                    energy = featglac.composition_energy(
                        probe.features,
                        sources,
                        self.level_masks[used].clone(),
                        self.level_weights,
                        [self.weights[number] for number in used],
                        settings.norm,
                        units,
                    ) * featglac.iteration_factor(iteration, settings.norm)
                    (gradient,) = torch.autograd.grad(energy.sum(), probe.latent)
                energies.append(energy.sum().item())
                if not torch.isfinite(gradient).all():
                    raise ValueError(
                        "step_size: the guidance grew beyond all numbers at this size of step; lower step_size or "
                        "level_weights."
                    )
                x = featglac.guided_update(x, gradient, sigma, settings.step_size, self.flow)
        self.energies.append(energies)
        return x

    def _units(self, sources: dict[featglac.Level, Tensor]) -> dict[featglac.Level, Tensor]:
        """Of Flux's channels; none of a UNet's, whose features count as they are."""
        if not isinstance(self.inner_model.diffusion_model, Flux):
            return {}
        with torch.inference_mode(False):  # autograd keeps them
            return {level: featglac.channel_units(values) for level, values in sources.items()}

    def _sources(self, used: list[int], x: Tensor, sigma: Tensor, options: dict) -> dict[featglac.Level, Tensor]:
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

    def _record(self, used: list[int], x: Tensor, sigma: Tensor, options: dict) -> dict[featglac.Level, Tensor]:
        """In one batch where the scenes' conditionings allow it, else one scene after the other."""
        latents = [self._scene(number, sigma, x) for number in used]
        joined = _join([self.plane_conds[number] for number in used], len(x))
        calls = (
            [(torch.cat(latents), joined)]
            if joined
            else [(one, self.plane_conds[number]) for one, number in zip(latents, used, strict=True)]
        )
        features = []
        for rows, conds in calls:
            probe = Probe(self.inner_model.diffusion_model, self.level_weights, gradient=False)
            call_unet(probe, self.inner_model, conds, rows, sigma, options)
            probe.check(len(rows), "the positive of an inversion")
            features.append(probe.features)
        return {
            level: rearrange(torch.cat([one[level] for one in features]), "(plane b) c h w -> plane b c h w", b=len(x))
            for level in self.level_weights
        }


class Probe:
    """Around one call of the network: keeps the features of the levels that have a weight, and stops behind the last of
    them.
    """

    def __init__(self, network: UNetModel | Flux, levels: Collection, gradient: bool):
        self.network, self.gradient, self.calls = network, gradient, 0
        self.modules = {level: module for level, module in levels_of(network).items() if level in levels}
        self.features: dict[featglac.Level, Tensor] = {}
        self.latent: Tensor | None = None  # the network's input, which the features are a function of

    def __call__(self, executor, x: Tensor, *args, **kwargs) -> Tensor:
        self.calls += 1
        hooks = [module.register_forward_hook(partial(self._keep, level)) for level, module in self.modules.items()]
        channels = self.network.out_channels
        if isinstance(self.network, Flux):
            patch = self.network.patch_size
            channels //= patch**2
            self.size = [-(-side // patch) for side in x.shape[2:]]
            first = self.network.double_blocks[0]
            hooks.append(first.register_forward_pre_hook(self._count_text, with_kwargs=True))
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

    def _count_text(self, block: nn.Module, args: tuple, given: dict) -> None:
        self.text = given["txt"].shape[1]

    def _keep(self, level: featglac.Level, module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        self.features[level] = self._grid(output) if isinstance(self.network, Flux) else output
        if level == list(self.modules)[-1]:
            raise _Enough

    def _grid(self, output: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """[B,C,h,w] of a block's tokens, the image's own alone; a copy, since the next block adds to them in place."""
        tokens = output[0] if isinstance(output, tuple) else output[:, self.text :]
        height, width = self.size
        return rearrange(tokens[:, : height * width], "b (h w) c -> b c h w", h=height).clone()

    def check(self, rows: int, socket: str) -> None:
        if self.calls != 1 or any(len(values) != rows for values in self.features.values()):
            raise ValueError(
                f"{socket}: several conditionings are combined, or none is for this step; feature guidance needs one "
                "for the whole image."
            )
        missing = self.modules.keys() - self.features.keys()
        if missing:
            raise ValueError(
                f"model: a patch on it skips or replaces the block {min(missing)}, whose features guide; remove that "
                "patch, or name another block in level_weights."
            )


class _Enough(Exception):
    """The features are there; the rest of the network need not run."""


def _with_room(executor, model: ModelPatcher, shape: tuple, *args, **kwargs):
    """Have ComfyUI keep as much memory free as twice the batch would take: what waits for the backward pass, the
    blocks' inputs and one block's activations, takes about as much as it counts for a plain step (estimated for 1024
    pixels, not measured).
    """
    return executor(model, (ROOM * shape[0], *shape[1:]), *args, **kwargs)


def _join(scenes: list[list[dict]], batch: int) -> list[dict] | None:
    """One conditioning for the scenes' latents one after the other; None when they cannot share a batch."""
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
    """Raises ValueError for samplers other than Euler's without churn, which DDIM in ComfyUI is too."""
    euler = (
        isinstance(sampler, comfy.samplers.KSAMPLER)
        and sampler.sampler_function is comfy.k_diffusion.sampling.sample_euler
    )
    if not euler or sampler.extra_options.get("s_churn"):
        raise ValueError(
            "sampler: feature guidance moves the latent between two steps, which only samplers without memory and "
            f"noise of their own allow; choose one of {', '.join(SAMPLERS)}."
        )
