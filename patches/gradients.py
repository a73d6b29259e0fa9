"""Gradients through a UNet or Flux in ComfyUI's executor, which runs in inference mode and loads weights that autograd
refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import comfy.model_management
import comfy.samplers
import torch
from comfy.ldm.flux.layers import DoubleStreamBlock, SingleStreamBlock
from comfy.ldm.modules.attention import SpatialTransformer, attention_pytorch
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

KEY = "strata_gradients"
OVERRIDE = "optimized_attention_override"
BLOCK_PATCHES = (
    "emb_patch",
    "input_block_patch",
    "input_block_patch_after_skip",
    "middle_block_patch",
    "output_block_patch",
)
CONTROL = {"input", "middle", "output"}  # what a ControlNet gives, each a list
MISSING = object()
ADDING = (DoubleStreamBlock, SingleStreamBlock)  # blocks that add to what they are given, in place


@contextmanager
def differentiable(unet: nn.Module, checkpointing: bool = False) -> Iterator[None]:
    """While open, autograd accepts the parameters, wherever the host keeps them.

    Parameters that layers use as they lie are views of the same memory, made outside of inference mode, so nothing is
    copied. Layers that cast or fetch theirs (manual cast, fp8, offloading, dynamic VRAM) get them as copies, because
    the host may use that memory again.
    checkpointing: blocks compute their activations again in the backward pass in place of keeping them. Flux's always
    do: all that they keep would be tens of GB at 1024 pixels, and a second copy of all weights that are cast.
    Afterwards, also after an exception, the module holds the very objects that it held before.
    """
    with ExitStack() as undo:
        with torch.inference_mode(False):
            for module in unet.modules():
                fetched = ("weight", "bias") if _casts(module) else ()
                if fetched:
                    for name in ("weight_function", "bias_function"):
                        _swap(undo, module.__dict__, name, [*getattr(module, name), _copied])
                    _swap(undo, module.__dict__, "training", True)  # fp8 layers multiply without autograd otherwise
                for table in (module._parameters, module._buffers):
                    for name, value in table.items():
                        if (
                            name not in fetched
                            and type(value) in (Tensor, nn.Parameter)
                            and (value.is_inference() or value.requires_grad)
                        ):
                            view = _view(value)
                            own = nn.Parameter(view, requires_grad=False) if isinstance(value, nn.Parameter) else view
                            _swap(undo, table, name, own)
        if hasattr(comfy.model_management, "in_training"):  # newer hosts: a switch to positions that have a gradient
            _swap(undo, vars(comfy.model_management), "in_training", True)
        recomputed = (*ADDING, ResBlock, SpatialTransformer) if checkpointing else ADDING
        for table, name, block in [
            (parent._modules, name, block)
            for parent in unet.modules()
            for name, block in parent._modules.items()
            if isinstance(block, recomputed)
        ]:
            _swap(undo, table, name, _checkpointed(block))
        yield


def _swap(undo: ExitStack, table: dict, name: str, value) -> None:
    before = table.get(name, MISSING)
    table[name] = value
    undo.callback(*((table.pop, name) if before is MISSING else (table.__setitem__, name, before)))


def _casts(module: nn.Module) -> bool:
    """Whether a layer asks the host for its parameters at each call, in place of using them as they are."""
    return hasattr(module, "weight_function") and bool(
        getattr(module, "comfy_cast_weights", False)
        or module.weight_function
        or module.bias_function
        or any(type(value) not in (Tensor, nn.Parameter, type(None)) for value in module._parameters.values())
    )


def _copied(value: Tensor) -> Tensor:
    return value.detach().clone()


def _view(value: Tensor) -> Tensor:
    empty = torch.empty(0, dtype=value.dtype, device=value.device)
    return empty.set_(value.untyped_storage(), value.storage_offset(), value.shape, value.stride())


def _checkpointed(block: nn.Module) -> nn.Module:
    """The same block, hooks and all, under another forward. The host's own object is not touched."""
    kind, parents = type(block), (_Adding,) if isinstance(block, ADDING) else ()
    alias = object.__new__(type(f"Checkpointed{kind.__name__}", (_Recomputing, *parents, kind), {}))
    object.__setattr__(alias, "__dict__", block.__dict__)
    return alias


class _Recomputing:
    def forward(self, *args, **kwargs):
        forward = super().forward
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(
            forward, *map(_kept, args), use_reentrant=False, **{name: _kept(value) for name, value in kwargs.items()}
        )


class _Adding:
    """A block of Flux whose sums are new tensors: autograd and the backward pass need the old ones, too."""

    def forward(self, *args, **kwargs):
        named = {name: _summing(value) if name in ("img", "txt", "x") else value for name, value in kwargs.items()}
        sums = super().forward(*map(_summing, args), **named)
        return tuple(map(_plain, sums)) if isinstance(sums, tuple) else _plain(sums)


class _Sum(Tensor):
    """`+=` gives a new one; everything else with it gives plain tensors."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __iadd__(self, other):
        return _summing(self + other)


def _summing(value):
    return value.as_subclass(_Sum) if isinstance(value, Tensor) else value


def _plain(value: Tensor) -> Tensor:
    return value.as_subclass(Tensor)


def _kept(value):
    """What can wait for the backward pass: autograd keeps no inference tensors, and transformer_options name another
    block by then.
    """
    if isinstance(value, Tensor) and value.is_inference():
        return value.clone()
    return dict(value) if isinstance(value, dict) else value


def call_unet(around: Callable, model, conds: list[dict], x: Tensor, sigma: Tensor, model_options: dict) -> Tensor:
    """The denoised latent for conditionings, as ComfyUI computes it, with `around(executor, x, timesteps, context, …)`
    closest to the UNet.

    Attention is torch's own: the faster ones that ComfyUI and other packs put in its place (Sage, Flash) have no
    gradient.
    """
    options = model_options.get("transformer_options", {})
    wrappers = options.get("wrappers", {})
    unet_wrappers = {**wrappers.get(WrappersMP.DIFFUSION_MODEL, {}), KEY: [partial(_with_control, around)]}
    replaced = {
        name: {place: partial(_checked, patch) for place, patch in patches.items()}
        if name == "dit" or name.startswith("attn")
        else patches
        for name, patches in options.get("patches_replace", {}).items()
    }
    patches = {
        name: [partial(_OnCopies.run, patch) for patch in there] if name in BLOCK_PATCHES else there
        for name, there in options.get("patches", {}).items()
    }
    options = {
        **options,
        "wrappers": {**wrappers, WrappersMP.DIFFUSION_MODEL: unet_wrappers},
        "patches": patches,
        "patches_replace": replaced,
        OVERRIDE: partial(_attention, options.get(OVERRIDE)),
    }
    # A ControlNet changes tensors that it made in it, so autograd is switched on within `around` alone.
    with torch.inference_mode():
        timestep = sigma.expand(len(x)).contiguous()
        return comfy.samplers.calc_cond_batch(
            model, [conds], x, timestep, {**model_options, "transformer_options": options}
        )[0]


def _with_control(around: Callable, executor, x: Tensor, *args, **kwargs) -> Tensor:
    """`around`, where what a ControlNet gives is added to copies."""
    args = [
        {name: [one if one is None else one.as_subclass(_Hint) for one in hints] for name, hints in value.items()}
        if isinstance(value, dict) and value and value.keys() <= CONTROL
        else value
        for value in args
    ]
    return around(executor, x, *args, **kwargs)


class _Hint(Tensor):
    """`h += it` gives a new tensor, as everything else with it gives plain ones: ComfyUI adds it to what the encoder
    keeps for the decoder, and the backward pass needs that as it was.
    """

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            plain = [_plain(value) if isinstance(value, cls) else value for value in args]
            return (torch.add if func in (Tensor.__iadd__, Tensor.add_) else func)(*plain, **(kwargs or {}))


def _attention(override: Callable | None, own: Callable, q: Tensor, *args, **kwargs) -> Tensor:
    """What another pack put in the place of ComfyUI's attention stays, as long as it lets the gradient through."""
    if torch.is_grad_enabled():  # a mask comes from outside
        args, kwargs = list(map(_kept, args)), {name: _kept(value) for name, value in kwargs.items()}
    if override is None:
        return attention_pytorch(q, *args, **kwargs)
    out = override(attention_pytorch, q, *args, **kwargs)
    return attention_pytorch(q, *args, **kwargs) if _cut(out, q, *args) else out


def _cut(result: Tensor, *inputs) -> bool:
    """Whether a result lacks the gradient that its inputs carry."""
    return not result.requires_grad and any(isinstance(value, Tensor) and value.requires_grad for value in inputs)


def _checked(patch: Callable, *args, **kwargs):
    """The patch's result; those of Flux's blocks take and give dicts."""
    inputs = list(args[0].values()) if isinstance(args[0], dict) else args
    result = patch(*args, **kwargs)
    if _cut(result["img"] if isinstance(result, dict) else result, *inputs):
        raise ValueError(
            "model: a patch on it replaces an attention block by one without gradients, which guidance and null-text "
            "need; remove that patch, or start ComfyUI with --use-pytorch-cross-attention."
        )
    return result


class _OnCopies(torch.autograd.Function):
    """A patch between blocks, which may write into what it is given, as FreeU does: called with copies, and once more
    for the backward pass.
    """

    @classmethod
    def run(cls, patch: Callable, *args):
        if not any(isinstance(value, Tensor) and value.requires_grad for value in args):
            return patch(*args)
        return cls.apply(
            patch, *(value.clone() if isinstance(value, Tensor) and value.is_inference() else value for value in args)
        )

    @staticmethod
    def forward(ctx, patch: Callable, *args):
        ctx.call = partial(
            _with_tensors, patch, [MISSING if isinstance(value, Tensor) else _kept(value) for value in args]
        )
        ctx.save_for_backward(*(value for value in args if isinstance(value, Tensor)))
        ctx.tensors = [isinstance(value, Tensor) for value in args]
        return ctx.call([value.clone() for value in args if isinstance(value, Tensor)])

    @staticmethod
    def backward(ctx, *gradients):
        with torch.enable_grad(), torch.autograd.graph.allow_mutation_on_saved_tensors():
            leaves = [value.detach().clone().requires_grad_(value.is_floating_point()) for value in ctx.saved_tensors]
            outputs = ctx.call([value.clone() for value in leaves])
            pairs = [
                (value, gradient)
                for value, gradient in zip(
                    outputs if isinstance(outputs, tuple) else (outputs,), gradients, strict=True
                )
                if isinstance(value, Tensor) and value.requires_grad
            ]
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            by = iter(
                torch.autograd.grad(
                    [value for value, _ in pairs], wanted, [gradient for _, gradient in pairs], allow_unused=True
                )
            )
        own = iter([next(by) if leaf.requires_grad else None for leaf in leaves])
        return None, *(next(own) if tensor else None for tensor in ctx.tensors)


def _with_tensors(patch: Callable, args: list, tensors: list[Tensor]):
    tensors = iter(tensors)
    return patch(*(next(tensors) if value is MISSING else value for value in args))
