"""What tests of sampling share: conditionings, noise, one model call taken apart, a ControlNet, and little memory."""

import copy

import comfy.controlnet
import comfy.model_base
import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import torch
from strata.patches import shared_layers
from strata.patches.layer_prompts import END_TOKENS, LAYERS

from . import fusion_reference

SIGMA = 3.0
EARLY, LATE = 12.0, 3.0  # noise levels before and after the published T_G
ENDS = [4]  # of the foreground's prompt
WORDS = [("a place", [1]), ("an apple", [2, 3]), ("a dog", [4])]  # four rows a scene: place, apple, dog, whole picture


def conditioning(model, seed, rows=3, tokens=7, **extra):
    generator = torch.Generator().manual_seed(seed)
    width = model.model.model_config.unet_config["context_dim"]
    return [
        [
            torch.randn(rows, tokens, width, generator=generator),
            {"pooled_output": torch.randn(rows, 1280, generator=generator), **extra},
        ]
    ]


def layered(model, seed=1, **extra):
    return conditioning(model, seed, **{END_TOKENS: ENDS, **extra})


def noise(count=3, side=16, seed=5):
    return torch.randn(count, 4, side, side, generator=torch.Generator().manual_seed(seed))


def estimates(model, positive, negative, x, sigma=SIGMA):
    """The conditional and the unconditional denoised picture of one model call at sigma, and the batch that the sampler
    had.
    """
    found = {}

    def keep(args):
        found.update(
            cond=args["cond_denoised"].clone(), uncond=args["uncond_denoised"].clone(), input=args["input"].clone()
        )
        return args["denoised"]

    model = model.clone()
    model.set_model_sampler_post_cfg_function(keep, disable_cfg1_optimization=True)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(2.0)
    with torch.no_grad():
        guider.sample(
            x,
            torch.zeros_like(x),
            comfy.samplers.sampler_object("euler"),
            torch.tensor([sigma, 0.0]),
            disable_pbar=True,
            seed=1,
        )
    return found


def terms_for(model, rank=3, size=0.3):
    generator = torch.Generator().manual_seed(11)
    named = model.model.diffusion_model.named_modules()
    shapes = {
        name: module.weight.shape
        for name, module in named
        if name.rsplit(".", 1)[-1] in ("to_q", "to_k", "to_v") or name.endswith("to_out.0")
    }
    return {
        f"diffusion_model.{name}.weight": (
            torch.randn(out, rank, generator=generator) * size / rank,
            torch.randn(rank, width, generator=generator) * size,
        )
        for name, (out, width) in shapes.items()
    }


def merged(unet, terms, strength=1.0):
    unet = copy.deepcopy(unet)
    for key, (up, down) in terms.items():
        unet.get_submodule(key.removeprefix("diffusion_model.").removesuffix(".weight")).weight.data += (
            strength * up @ down
        )
    return unet


def expected(model, found, positive, negative, terms=None, foreground=None, **settings):
    """The reference's two denoised pictures for the batch that the sampler had. foreground: a UNet instead of one with
    terms.
    """
    unet = model.model.diffusion_model
    place = 2 if type(model.model.model_config).__name__ == "StrataMini" else 1  # models_config/fusion.json
    reference = fusion_reference.Reference(
        unet, foreground or merged(unet, terms or {}), ENDS, structure_at=place, **settings
    )
    sampling, x = model.model.model_sampling, found["input"]
    sigma = torch.full((len(x),), SIGMA)
    scaled = sampling.calculate_input(sigma, x).double()
    times = sampling.timestep(sigma).float()
    out = []
    with torch.no_grad():
        for conditional, cond in ((True, positive), (False, negative)):
            rows = cond[0][0].double().repeat(-(-len(x) // len(cond[0][0])), 1, 1)[: len(x)]
            y = model.model.encode_adm(
                pooled_output=cond[0][1]["pooled_output"],
                width=128,
                height=128,
                prompt_type="",
                noise=x,
                device=x.device,
            )
            extra = (
                {}
                if model.model.model_config.unet_config.get("adm_in_channels") is None
                else {"y": comfy.utils.repeat_to_batch_size(y, len(x)).double()}
            )
            if conditional:
                reference.prior(scaled, times[::3], context=rows[::3], **({"y": extra["y"][::3]} if extra else {}))
            eps = reference(scaled, times, context=rows, conditional=conditional, **extra)
            out.append(sampling.calculate_denoised(sigma, eps, x.double()))
    return out


def close(found, wanted, tolerance=1e-4):
    difference = (found.double() - wanted.double()).abs().max().item()
    assert wanted.std() > 0.1
    return difference < tolerance * wanted.abs().max().item()


def watching(calls):
    """A wrapper that notes which estimates the model makes, and of how many rows."""

    def watch(apply, args):
        calls.append((args["cond_or_uncond"], len(args["input"])))
        return apply(args["input"], args["timestep"], **args["c"])

    return watch


def low_memory(monkeypatch, free):
    monkeypatch.setattr(
        comfy.model_management,
        "get_free_memory",
        lambda device=None, torch_free_too=False: (free, free) if torch_free_too else free,
    )


def sample(model, positive, negative, steps=3, x=None, sampler="euler", denoise=1.0):
    x = noise() if x is None else x
    with torch.no_grad():
        return comfy.sample.sample(
            model, x, steps, 3.0, sampler, "normal", positive, negative, torch.zeros_like(x), seed=1, disable_pbar=True
        )


class Hints(comfy.controlnet.ControlBase):
    """Stands in a conditioning as a ControlNet does: a hint for each row of the batch, kept in the size that was asked
    for last.
    """

    def __init__(self, hints):
        super().__init__()
        self.hints = hints

    def get_control(self, x, timestep, cond, chunks, options):
        self.hints = comfy.utils.repeat_to_batch_size(self.hints, len(x))
        return {"output": [], "input": [], "middle": [self.hints.clone()]}


class Everywhere(Hints):
    """Hints behind every block of a UNet, as a ControlNet gives them."""

    def get_control(self, x, timestep, cond, chunks, options):
        hints = [self.hints.to(x.dtype) * (number + 1) for number in range(12)]
        return {"output": hints[:], "input": hints[:], "middle": hints[:1]}


def calm(model):
    """Random weights answer to every change of their input with a large one of their own, which no trained model does:
    a weaker last layer.
    """
    with torch.no_grad():
        model.model.diffusion_model.out[2].weight *= 0.1
    return model


def sigmas_of(model, steps=8, scheduler="ddim_uniform"):
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)


def picture(seed=3, batch=1, side=8):
    return torch.randn(batch, 4, side, side, generator=torch.Generator().manual_seed(seed))


def with_layers(model, seed=1, words=WORDS, **extra):
    return conditioning(model, seed, rows=shared_layers.layer_count(words), **{LAYERS: words, **extra})
