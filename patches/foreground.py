"""Low-rank terms that act on the foreground alone, in a batch of foreground, background and blended: one model and one call serve all three."""
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


class LowRank(nn.Sequential):
    def __init__(self, up: Tensor, down: Tensor):
        linear = partial(comfy.ops.manual_cast.Linear, bias=False, dtype=down.dtype)
        super().__init__(linear(down.shape[1], down.shape[0]), linear(up.shape[1], up.shape[0]))
        self[0].weight = nn.Parameter(down, requires_grad=False)
        self[1].weight = nn.Parameter(up, requires_grad=False)


def apply_to_foreground(model: ModelPatcher, terms: dict[str, tuple[Tensor, Tensor]], strength: float = 1.0) -> ModelPatcher:
    """A clone of the model whose foreground rows see `weight + strength * up @ down` in the named weights, and whose other rows do not.

    terms: {weight key such as "diffusion_model.….to_q.weight": (up [out,rank], down [rank,in])}.
    """
    names = {key: key.removesuffix(".weight").removeprefix("diffusion_model.") for key in terms}
    for key, (up, down) in terms.items():
        weight = _weight(model.model.diffusion_model, names[key])
        if weight is None or tuple(weight.shape) != (up.shape[0], down.shape[1]):
            raise ValueError(f"model: the low-rank term of {key} ({up.shape[0]}×{down.shape[1]}) does not fit this model; load the file of the model's family.")
    if strength == 0:
        return model
    model = model.clone()
    added = nn.ModuleList(LowRank(up, down) for up, down in terms.values())
    helper = comfy.model_patcher.ModelPatcher(added, load_device=model.load_device, offload_device=model.offload_device)
    model.set_additional_models(KEY, [*model.get_additional_models_with_key(KEY), helper])
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, partial(_denoise, dict(zip(names.values(), added, strict=True)), strength))
    return model


def _weight(module: nn.Module, name: str) -> Tensor | None:
    try:
        return module.get_submodule(name).weight
    except AttributeError:
        return None


def _denoise(added: dict[str, LowRank], strength: float, executor, x: Tensor, *args, **kwargs):
    """Hooks for one call only: nothing is left in the model, which its other patchers share."""
    check_batch(x)
    hooks = [executor.class_obj.get_submodule(name).register_forward_hook(partial(_add, term, strength)) for name, term in added.items()]
    try:
        return executor(x, *args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()


def _add(term: LowRank, strength: float, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    step = _row_step.get()
    output[::step].add_(term(args[0][::step]), alpha=strength)
    return output


def check_batch(x: Tensor) -> None:
    if len(x) % _row_step.get():
        raise ValueError(f"latent: a batch of {len(x)} cannot be split into foreground, background and blended; "
                         "use Strata's LayerFusion sampler, or a latent batch that is a multiple of three.")


def split_branches(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[3N,...] -> foreground, background and blended, [N,...] each."""
    return torch.unbind(rows.unflatten(0, (-1, BRANCHES)), 1)
