"""Weight differences that act on the foregrounds alone, in a batch that has other rows too: one model and one call
serve all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import comfy.model_patcher
import comfy.ops
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from .layer_rows import LAYERFUSION, Rows

KEY = "strata_foreground"
LAYERS = comfy.ops.manual_cast  # cast and moved by ComfyUI like the model's own
SUPPORTED = (nn.Conv2d, nn.GroupNorm, nn.LayerNorm)


def apply_to_foreground(
    model: ModelPatcher,
    terms: dict[str, tuple[Tensor, Tensor] | Tensor],
    strength: float = 1.0,
    rows: Rows = LAYERFUSION,
) -> ModelPatcher:
    """A clone of the model whose foreground rows see `weight + strength * difference` in the named weights, and whose
    other rows do not.

    terms: {weight key such as "diffusion_model.….to_q.weight": (up [out,rank], down [rank,in], of a convolution
    [out,rank,1,1] and [rank,in,k,k]), or a full difference of the weight's or bias's shape}.
    """
    added = differences(model, terms)
    if strength == 0:
        return model
    model = model.clone()
    load_with(model, list(added.values()))
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, partial(_denoise, added, strength, rows))
    return model


def differences(model: ModelPatcher, terms: dict[str, tuple[Tensor, Tensor] | Tensor]) -> dict[str, nn.Module]:
    """By the name of the UNet's module, what the terms add to its output. Raises ValueError for weights that the model
    does not have.
    """
    unet, parts = model.model.diffusion_model, {}
    for key, term in terms.items():
        name, _, kind = key.removeprefix("diffusion_model.").rpartition(".")
        module = _submodule(unet, name)
        shape = (len(term[0]), *term[1].shape[1:]) if isinstance(term, tuple) else tuple(term.shape)
        there = tuple(getattr(getattr(module, kind, None), "shape", ()))
        if isinstance(term, tuple) and len(shape) == 2 and there[2:] == (1, 1):  # a convolution pixel by pixel
            there = there[:2]
        if not (_is_linear(module) or isinstance(module, SUPPORTED)) or there != shape:
            raise ValueError(
                f"model: the difference of {key} ({'×'.join(map(str, shape))}) does not fit this model; load the file "
                "of the model's family."
            )
        parts.setdefault(name, {})[kind] = term
    return {name: _difference(unet.get_submodule(name), **own) for name, own in parts.items()}


def load_with(model: ModelPatcher, networks: list[nn.Module]) -> None:
    """Have ComfyUI load these networks with this clone from now on, and unload them with it."""
    helper = comfy.model_patcher.ModelPatcher(
        nn.ModuleList(networks), load_device=model.load_device, offload_device=model.offload_device
    )
    model.set_additional_models(KEY, [*model.get_additional_models_with_key(KEY), helper])


def _submodule(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def _is_linear(module: nn.Module | None) -> bool:
    """Also true of ComfyUI's linear layers of quantised models, which are not nn.Linear."""
    return isinstance(module, nn.Linear) or (hasattr(module, "in_features") and hasattr(module, "out_features"))


def _difference(
    module: nn.Module, weight: tuple[Tensor, Tensor] | Tensor | None = None, bias: Tensor | None = None
) -> nn.Module:
    """What the terms add to the module's output, which is linear in weight and bias: the same layer with the
    differences for weights.
    """
    if isinstance(weight, tuple):
        up, down = weight
        rank, width = down.shape[:2]
        if isinstance(module, nn.Conv2d):
            down, up = (part if part.ndim == 4 else part[..., None, None] for part in (down, up))
            first = LAYERS.Conv2d(width, rank, module.kernel_size, module.stride, module.padding)
            return nn.Sequential(_filled(first, down), _filled(LAYERS.Conv2d(rank, len(up), 1), up, bias))
        return nn.Sequential(_filled(LAYERS.Linear(width, rank), down), _filled(LAYERS.Linear(rank, len(up)), up, bias))
    weight = torch.zeros_like(module.weight) if weight is None else weight
    if _is_linear(module):
        layer = LAYERS.Linear(module.in_features, module.out_features)
    elif isinstance(module, nn.Conv2d):
        layer = LAYERS.Conv2d(
            module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding
        )
    elif isinstance(module, nn.GroupNorm):
        layer = LAYERS.GroupNorm(module.num_groups, module.num_channels, module.eps)
    else:
        layer = LAYERS.LayerNorm(module.normalized_shape, module.eps)
    return _filled(layer, weight, bias)


def _filled(layer: nn.Module, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    layer.weight, layer.bias = (
        None if value is None else nn.Parameter(value, requires_grad=False) for value in (weight, bias)
    )
    return layer


def _denoise(added: dict[str, nn.Module], strength: float, rows: Rows, executor, x: Tensor, *args, **kwargs):
    rows.check(x)
    with acting(executor.class_obj, added, strength, rows):
        return executor(x, *args, **kwargs)


@contextmanager
def acting(unet: nn.Module, added: dict[str, nn.Module], strength: float, rows: Rows) -> Iterator[None]:
    """Hooks for one call only: nothing is left in the model, which its other patchers share."""
    hooks = [
        unet.get_submodule(name).register_forward_hook(partial(_add, term, strength, rows))
        for name, term in added.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _add(term: nn.Module, strength: float, rows: Rows, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    rows.add(output, term(rows.of(args[0])), strength)
    return output
