"""Models whose weights are bytes, in ComfyUI's three forms, with the same weights widened to compare them with."""

import json

import comfy.sd
import torch


def rounded(weights: dict, scale_name: str, block: str = "") -> tuple[dict, dict]:
    """The matrices below a block as fp8 with a scale each, by these names, and what they are to the digit."""
    state, exact = dict(weights), dict(weights)
    for key, value in weights.items():
        if value.ndim == 2 and key.endswith(".weight") and block in key:
            scale = value.abs().max() / 448
            state[key] = (value / scale).to(torch.float8_e4m3fn)
            state[key.replace(".weight", scale_name)], exact[key] = scale, state[key].float() * scale
    return state, exact


def cast(weights: dict):
    """As Load diffusion model does with weight_dtype fp8_e4m3fn."""
    exact = {key: value.to(torch.float8_e4m3fn).float() for key, value in weights.items()}
    return comfy.sd.load_diffusion_model_state_dict(dict(weights), {"dtype": torch.float8_e4m3fn}), exact


def scaled(weights: dict):
    """A file of scaled fp8."""
    state, exact = rounded(weights, ".scale_weight")
    marked = {"scaled_fp8": torch.tensor([], dtype=torch.float8_e4m3fn)}
    return comfy.sd.load_diffusion_model_state_dict(state | marked), exact


def quantised(weights: dict):
    """A file of layers that ComfyUI holds as quantised tensors."""
    state, exact = rounded(weights, ".weight_scale", "_blocks")
    names = [key.removesuffix("_scale").removesuffix(".weight") for key in state if key.endswith("_scale")]
    layers = {"layers": {name: {"format": "float8_e4m3fn"} for name in names}}
    metadata = {"_quantization_metadata": json.dumps(layers)}
    return comfy.sd.load_diffusion_model_state_dict(state, metadata=metadata), exact


FORMS = [cast, scaled, quantised]
