"""Weight differences that act on the foreground alone, in a batch of foreground, background and blended: one model and one call serve all three."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import comfy.model_patcher
import comfy.ops
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

KEY = "strata_foreground"
BRANCHES = 3  # foreground, background, blended, in this order, once for every picture
_row_step = ContextVar("strata_row_step", default=BRANCHES)  # every how many rows of the batch there is a foreground


@contextmanager
def foregrounds_only() -> Iterator[None]:
    """While this is open, every row that the model gets is a foreground."""
    token = _row_step.set(1)
    try:
        yield
    finally:
        _row_step.reset(token)


def foreground_rows(rows: Tensor) -> Tensor:
    return rows[::_row_step.get()]


def apply_to_foreground(model: ModelPatcher, terms: dict[str, tuple[Tensor, Tensor] | Tensor], strength: float = 1.0) -> ModelPatcher:
    """A clone of the model whose foreground rows see `weight + strength * difference` in the named weights, and whose other rows do not.

    terms: {weight key such as "diffusion_model.….to_q.weight": (up [out,rank], down [rank,in]), or the full difference of a linear or convolution}.
    """
    names = {key: key.removesuffix(".weight").removeprefix("diffusion_model.") for key in terms}
    modules = {key: _submodule(model.model.diffusion_model, name) for key, name in names.items()}
    for key, term in terms.items():
        shape = (term[0].shape[0], term[1].shape[1]) if isinstance(term, tuple) else tuple(term.shape)
        if not isinstance(modules[key], nn.Linear | nn.Conv2d) or tuple(modules[key].weight.shape) != shape:
            raise ValueError(f"model: the difference of {key} ({'×'.join(map(str, shape))}) does not fit this model; load the file of the model's family.")
    if strength == 0:
        return model
    model = model.clone()
    added = nn.ModuleList(_difference(modules[key], term) for key, term in terms.items())
    helper = comfy.model_patcher.ModelPatcher(added, load_device=model.load_device, offload_device=model.offload_device)
    model.set_additional_models(KEY, [*model.get_additional_models_with_key(KEY), helper])
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, partial(_denoise, dict(zip(names.values(), added, strict=True)), strength))
    return model


def _submodule(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def _difference(module: nn.Linear | nn.Conv2d, term: tuple[Tensor, Tensor] | Tensor) -> nn.Module:
    """What the term adds to the module's output, in ComfyUI's layers, which are cast and moved like the model's own."""
    if isinstance(term, tuple):
        up, down = term
        return nn.Sequential(_linear(down), _linear(up))
    if isinstance(module, nn.Linear):
        return _linear(term)
    layer = comfy.ops.manual_cast.Conv2d(module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding, bias=False)
    layer.weight = nn.Parameter(term, requires_grad=False)
    return layer


def _linear(weight: Tensor) -> nn.Module:
    layer = comfy.ops.manual_cast.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _denoise(added: dict[str, nn.Module], strength: float, executor, x: Tensor, *args, **kwargs):
    """Hooks for one call only: nothing is left in the model, which its other patchers share."""
    check_batch(x)
    hooks = [executor.class_obj.get_submodule(name).register_forward_hook(partial(_add, term, strength)) for name, term in added.items()]
    try:
        return executor(x, *args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()


def _add(term: nn.Module, strength: float, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    foreground_rows(output).add_(term(foreground_rows(args[0])), alpha=strength)
    return output


def check_batch(x: Tensor) -> None:
    if len(x) % _row_step.get():
        raise ValueError(f"latent: a batch of {len(x)} cannot be split into foreground, background and blended; "
                         "use Strata's LayerFusion sampler, or a latent batch that is a multiple of three.")


def split_branches(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[3N,...] -> foreground, background and blended, [N,...] each."""
    return torch.unbind(rows.unflatten(0, (-1, BRANCHES)), 1)
