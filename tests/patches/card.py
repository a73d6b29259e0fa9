"""A second device without having one: tensors that say they lie on a card, hold their numbers in the processor's
memory, and refuse to meet others as a card's kernels do.

Unlike PyTorch's fake tensors they have values, so that what looks at values (checks, thresholds, loops) takes the way
it takes with real ones, and the result can be compared with the processor's.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CARD = torch.device("meta")  # a PyTorch without CUDA has no tensors of that name, not even empty ones
HERE = torch.device("cpu")
aten = torch.ops.aten
CROSSING = (aten.copy_.default, aten._to_copy.default)
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


class CardTensor(torch.Tensor):
    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=CARD,
        )
        made.held = held
        return made

    def __repr__(self, **_) -> str:
        return f"on the card: {self.held!r}"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


@contextmanager
def card():
    """While it is on, tensors can be made on the card and brought there and back."""
    with Literals(), Operations():
        yield


class Literals(TorchFunctionMode):
    """Tensors of numbers that Python holds: PyTorch makes them without telling the other mode."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func == torch.Tensor.new_tensor and isinstance(args[0], CardTensor) and not kwargs.get("device"):
            return to_card(args[0].held.new_tensor(*args[1:], **kwargs))
        if func in (torch.tensor, torch.Tensor.new_tensor, torch.as_tensor) and _is_card(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": HERE}).to(CARD)
        return func(*args, **kwargs)


class Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


def to_card(values):
    """Every tensor in nested lists, tuples and dictionaries."""
    return tree_map(lambda one: CardTensor(one) if _is_here(one) else one, values)


def from_card(values):
    return tree_map(lambda one: one.held if isinstance(one, CardTensor) else one, values)


def computed(func, args: tuple, kwargs: dict):
    given = tree_leaves((args, kwargs))
    if not any(isinstance(one, CardTensor) or _is_card(one) for one in given):
        return func(*args, **kwargs)
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        with Operations():  # made of other operations, each of which is looked at
            return func.decompose(*args, **kwargs)
    _check_devices(func, args, given)
    if any(one.is_meta for one in given if _is_here(one)):
        raise NotImplementedError(f"{func} got a tensor of the device that stands for the card, without numbers")
    device = _asked_for(func, args, kwargs)
    if _is_card(device) and any(isinstance(one, torch.Generator) for one in given):
        raise RuntimeError(f"Expected a generator of the card, and {func} got one of the processor")
    found = func(*(_here(one) for one in args), **{name: _here(one) for name, one in kwargs.items()})
    written = _written(func, args, kwargs)
    if written is not None:
        return written
    return to_card(found) if _is_card(device) else found


def _is_card(value) -> bool:
    return isinstance(value, torch.device) and value.type == CARD.type


def _is_here(value) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(value, CardTensor)


def _here(value):
    """Arguments as the processor's kernel is to have them."""
    return tree_map(lambda one: HERE if isinstance(one, torch.device) else one, from_card(value))


def _check_devices(func, args: tuple, given: list) -> None:
    """Raises RuntimeError where a card's kernel would. Single numbers, indices and copies may come from the
    processor.
    """
    if func in INDEXING:
        if isinstance(args[0], CardTensor):
            given = [args[0], *args[2:]]
        elif not any(isinstance(one, CardTensor) for one in tree_leaves(args[1])):
            given = list(args)
    here = [one for one in given if _is_here(one) and one.ndim > 0]
    if here and any(isinstance(one, CardTensor) for one in given) and func not in CROSSING:
        raise RuntimeError(f"{func} got tensors of two devices")


def _asked_for(func, args: tuple, kwargs: dict) -> torch.device:
    """The device of the result: what is asked for by name, or the card."""
    named = dict(zip((one.name for one in func._schema.arguments), args, strict=False)) | kwargs
    return named.get("device") or CARD


def _written(func, args: tuple, kwargs: dict):
    """The argument that an operation in place has changed and returns, or None."""
    returned = func._schema.returns
    if len(returned) != 1 or returned[0].alias_info is None or not returned[0].alias_info.is_write:
        return None
    named = dict(zip((one.name for one in func._schema.arguments), args, strict=False)) | kwargs
    return next(
        named[one.name]
        for one in func._schema.arguments
        if one.alias_info is not None and one.alias_info.is_write and one.name in named
    )
