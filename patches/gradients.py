"""Gradients through a UNet in ComfyUI's executor, which runs in inference mode and loads weights that autograd refuses."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import comfy.samplers
import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

KEY = "strata_gradients"


@contextmanager
def differentiable(unet: nn.Module, checkpointing: bool = False) -> Iterator[None]:
    """While open, autograd accepts the parameters: each is a view of the same memory, made outside of inference mode, so nothing is copied.

    checkpointing: blocks compute their activations again in the backward pass in place of keeping them.
    Afterwards, also after an exception, the module holds the very objects that it held before.
    """
    parameters, forwards = [], []
    try:
        with torch.inference_mode(False):
            for module in unet.modules():
                for table in (module._parameters, module._buffers):
                    for name, value in table.items():
                        if type(value) in (Tensor, nn.Parameter) and (value.is_inference() or value.requires_grad):
                            parameters.append((table, name, value))
                            table[name] = nn.Parameter(_view(value), requires_grad=False) if isinstance(value, nn.Parameter) else _view(value)
        for module in unet.modules() if checkpointing else ():
            if isinstance(module, ResBlock | SpatialTransformer):
                forwards.append((module, module.__dict__.get("forward")))
                module.forward = _checkpointed(module.forward)
        yield
    finally:
        for module, forward in forwards:
            if forward is None:
                del module.forward
            else:
                module.forward = forward
        for table, name, value in parameters:
            table[name] = value


def _view(value: Tensor) -> Tensor:
    empty = torch.empty(0, dtype=value.dtype, device=value.device)
    return empty.set_(value.untyped_storage(), value.storage_offset(), value.shape, value.stride())


def _checkpointed(forward: Callable) -> Callable:
    """transformer_options say which block runs, and say something else by the time of the backward pass: each block gets its own copy."""
    def kept(value):
        if isinstance(value, Tensor) and value.is_inference():  # the checkpoint keeps its inputs as autograd does
            return value.clone()
        return dict(value) if isinstance(value, dict) else value

    def run(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *map(kept, args), use_reentrant=False, **{name: kept(value) for name, value in kwargs.items()})
    return run


def call_unet(around: Callable, model, conds: list[dict], x: Tensor, sigma: Tensor, model_options: dict) -> Tensor:
    """The denoised latent for conditionings, as ComfyUI computes it, with `around(executor, x, timesteps, context, …)` closest to the UNet."""
    options = model_options.get("transformer_options", {})
    wrappers = options.get("wrappers", {})
    unet_wrappers = {**wrappers.get(WrappersMP.DIFFUSION_MODEL, {}), KEY: [around]}
    options = {**options, "wrappers": {**wrappers, WrappersMP.DIFFUSION_MODEL: unet_wrappers}}
    with torch.inference_mode():  # a ControlNet changes tensors that it made in it, so autograd is switched on within `around` alone
        timestep = sigma.expand(len(x)).contiguous()
        return comfy.samplers.calc_cond_batch(model, [conds], x, timestep, {**model_options, "transformer_options": options})[0]
