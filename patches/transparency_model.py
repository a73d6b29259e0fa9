"""LayerDiffuse's weights on a model: adapters merged on a clone, given layers as further input channels, Flux's layer
LoRA.
"""

from __future__ import annotations

import comfy.lora
import comfy.lora_convert
import comfy.utils
import torch
from comfy.conds import CONDNoiseShape
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.weight_adapter.lora import LoRAAdapter
from torch import Tensor

from . import attention_sharing, foreground
from .layer_rows import LAYERFUSION, Rows
from .transparency import FAMILIES, FIRST, Transparency, fits, structure

KEY = "strata_transparency"
SHARING = {1: "layer_sd15_transparent_attn", 2: "layer_sd15_fg2bg or layer_sd15_bg2fg", 3: "layer_sd15_joint"}
NEEDS = "an adapter such as layer_xl_transparent_attn.safetensors, or the mini family's strata_mini_transparent_attn"


def apply(
    model: ModelPatcher,
    transparency: Transparency,
    strength: float,
    layer: Tensor | None = None,
    blended: Tensor | None = None,
) -> ModelPatcher:
    """A clone with the file's weights at that strength; 0 changes nothing. layer, blended: latents [B,C,h,w] for files
    with more input channels.
    """
    given = _given(transparency, layer, blended)
    if "sharing" in transparency.parts:
        return share(model, transparency, 1, strength)
    patches = _flux(model, transparency) if "flux" in transparency.parts else _adapter(model, transparency)
    clone = model.clone()
    if strength:
        clone.add_patches(patches, strength)
        if given:
            clone.add_wrapper_with_key(
                WrappersMP.CALC_COND_BATCH, KEY, further_channels([model.model.process_latent_in(one) for one in given])
            )
    return clone


def apply_to_foreground(model: ModelPatcher, transparency: Transparency, rows: Rows = LAYERFUSION) -> ModelPatcher:
    """A clone whose foreground rows have the adapter's weights, while the others have the model's own; rows:
    LayerFusion's, or those of more layers.
    """
    if "sharing" in transparency.parts:
        return attention_sharing.attach_to_foreground(model, _sharing(model, transparency, 1), rows)
    if transparency.extra_channels:
        raise ValueError(
            f"transparency: {transparency.name} is {transparency.describe()}; layers need {NEEDS}, which draws single "
            "objects."
        )
    if "flux" in transparency.parts:
        return foreground.apply_to_foreground(model, _flux_terms(model, transparency), rows=rows)
    _adapter(model, transparency)  # for its sentences about another family
    terms = {
        key: parts["diff::0"] if "diff::0" in parts else (parts["lora::0"], parts["lora::1"])
        for key, parts in transparency.parts["adapter"].items()
    }
    return foreground.apply_to_foreground(model, terms, rows=rows)


def further_channels(latents: list[Tensor]):
    """Wrapper of one evaluation: the latents go into the UNet behind the noisy one, at its size, and cropped as it is
    for area conditionings.
    """

    def wrapper(executor, model, conds, x_in, *args, **kwargs):
        fitted = [
            comfy.utils.common_upscale(one.to(x_in), x_in.shape[-1], x_in.shape[-2], "bilinear", "center")
            for one in latents
        ]
        joined = torch.cat([comfy.utils.repeat_to_batch_size(one, len(x_in)) for one in fitted], 1)
        conds = [
            group
            and [{**one, "model_conds": {**one["model_conds"], "c_concat": CONDNoiseShape(joined)}} for one in group]
            for group in conds
        ]
        return executor(model, conds, x_in, *args, **kwargs)

    return wrapper


def _given(transparency: Transparency, layer: Tensor | None, blended: Tensor | None) -> list[Tensor]:
    count = transparency.extra_channels // 4
    if count and layer is None:
        raise ValueError(
            f"layer: {transparency.name} is {transparency.describe()}; connect the latent of the foreground or "
            "background that is given."
        )
    if count > 1 and blended is None:
        raise ValueError(
            f"blended: {transparency.name} is {transparency.describe()}; connect the latent of the blended image too."
        )
    if (layer is not None and not count) or (blended is not None and count < 2):
        unused = "layer" if layer is not None and not count else "blended"
        raise ValueError(
            f"{unused}: {transparency.name} is {transparency.describe()} and takes no such latent; disconnect it."
        )
    given = {"layer": layer, "blended": blended}
    for socket in list(given)[:count]:
        if given[socket].ndim != 4 or given[socket].shape[1] != 4:
            raise ValueError(
                f"{socket}: the latent has {given[socket].shape[1]} channels and {transparency.family} has 4; encode "
                "it with the model's VAE."
            )
    return list(given.values())[:count]


def _adapter(model: ModelPatcher, transparency: Transparency) -> dict:
    adapter = transparency.part("adapter", NEEDS)
    weights = unpatched(model)
    for key, parts in adapter.items():
        # Quantised: its shape is not that of the layer.
        packed = key in weights and not weights[key].is_floating_point()
        if key not in weights or not (packed or fits(key, parts, tuple(weights[key].shape))):
            raise ValueError(wrong_family(model, transparency))
    if transparency.extra_channels and model.get_wrappers(WrappersMP.CALC_COND_BATCH, KEY):
        raise ValueError(
            f"model: a file with more input channels is on it already, and {transparency.name} is another; apply one "
            "of them."
        )
    if (
        transparency.extra_channels
        and weights[FIRST].shape[1] != adapter[FIRST]["diff::0"].shape[1] - transparency.extra_channels
    ):
        raise ValueError(
            f"model: it has {weights[FIRST].shape[1]} input channels already and {transparency.name} would put its "
            "own there; use a plain model."
        )
    return {key: _patch(parts, weights[key]) for key, parts in adapter.items()}


def _patch(parts: dict[str, Tensor], weight: Tensor):
    if "diff::0" not in parts:
        return LoRAAdapter(set(), (parts["lora::0"], parts["lora::1"], None, None, None, None))
    difference = parts["diff::0"]
    # An inpainting model's further channels stay as they are.
    if difference.ndim == 4 and difference.shape[1] < weight.shape[1]:
        difference = torch.nn.functional.pad(difference, (0, 0, 0, 0, 0, weight.shape[1] - difference.shape[1]))
    return "diff", (difference, {"pad_weight": True})


def _flux(model: ModelPatcher, transparency: Transparency) -> dict:
    weights = transparency.part("flux", NEEDS)
    kind = model.model.model_config.unet_config.get("image_model")
    if not any(FAMILIES[family].get("image_model") == kind for family in transparency.families):
        raise ValueError(wrong_family(model, transparency))
    weights = comfy.lora_convert.convert_lora(weights)
    patches = comfy.lora.load_lora(weights, comfy.lora.model_lora_keys_unet(model.model, {}), log_missing=False)
    state = unpatched(model)
    used = {name for patch in patches.values() for name in getattr(patch, "loaded_keys", ())}
    for key, patch in patches.items():
        weight = state[key if isinstance(key, str) else key[0]]
        if weight.is_floating_point() and patch.weights[1].shape[1] != weight.shape[1]:
            raise ValueError(wrong_family(model, transparency))
    if unused := [key for key in weights if key not in used]:
        raise ValueError(
            f"transparency: {transparency.name} has {len(unused)} weights that this Flux model has no place for, such "
            f"as {unused[0]}; it is for another version of Flux."
        )
    return patches


def _flux_terms(model: ModelPatcher, transparency: Transparency) -> dict[str, tuple[Tensor, Tensor]]:
    """Flux's layer LoRA as one pair (up, down) for each weight: q, k and v, which have pairs of their own, are parts of
    one weight in ComfyUI.
    """
    state, parts = unpatched(model), {}
    for key, patch in _flux(model, transparency).items():
        name, place, *change = key if isinstance(key, tuple) else (key, None)
        up, down, alpha = patch.weights[:3]
        up = up if alpha is None else up * (alpha / len(down))
        for turn in change:
            up = turn(up)
        _, start, length = place or (0, 0, len(up))
        padded_up = up.new_zeros(len(state[name]), up.shape[1])
        padded_up[start : start + length] = up
        parts.setdefault(name, []).append((padded_up, down))
    return {
        name: (torch.cat([up for up, _ in own], 1), torch.cat([down for _, down in own])) for name, own in parts.items()
    }


def unpatched(model: ModelPatcher) -> dict[str, Tensor]:
    """The model's own weights, also while another copy of it has patches on them."""
    return {key: patches[0][0] for key, patches in model.get_key_patches("diffusion_model.").items()}


def share(
    model: ModelPatcher, transparency: Transparency, frames: int, strength: float = 1.0, picture: Tensor | None = None
) -> ModelPatcher:
    """A clone that draws `frames` pictures of a batch together. picture: [B,3,H,W] in -1..1, the layer that is given.
    Raises ValueError.
    """
    return attention_sharing.attach(
        model, _sharing(model, transparency, frames, picture is not None), strength, picture
    )


def _sharing(model: ModelPatcher, transparency: Transparency, frames: int, given: bool = False) -> ModelPatcher:
    sharing = transparency.part("sharing", f"attention sharing such as {SHARING[frames]}")
    if transparency.frames != frames or hasattr(sharing.model, "kwargs_encoder") != given:
        raise ValueError(
            f"transparency: {transparency.name} is {transparency.describe()}; this node needs one such as "
            f"{SHARING[frames]}."
        )
    if attention_sharing.widths(model) != sharing.model.attentions:
        raise ValueError(wrong_family(model, transparency))
    if any(name.startswith(attention_sharing.KEY) for name in model.additional_models):
        raise ValueError(
            f"model: attention sharing is on it already, and {transparency.name} is another; connect the model "
            "without Apply transparency."
        )
    return sharing


def family_of(model: ModelPatcher) -> str:
    """The family that a model's weights have the names and shapes of, or what ComfyUI calls it."""
    weights = {key: tuple(value.shape) for key, value in unpatched(model).items()}
    for family in FAMILIES:
        shapes = {key: shape for key, shape in structure(family).items() if key != FIRST}
        if shapes and shapes.items() <= weights.items():
            return family
    return type(model.model.model_config).__name__


def wrong_family(model: ModelPatcher, file, socket: str = "transparency") -> str:
    """file: what is loaded at that socket, with its name and its families."""
    family = family_of(model)
    sizes = " with weights of other sizes" if family in file.families else ""
    return (
        f"{socket}: {file.name} is for {file.family} and the model is {family}{sizes}; connect a model of its family, "
        "or load the file for the model's."
    )
