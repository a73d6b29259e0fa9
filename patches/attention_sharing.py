"""Attention over several pictures of a batch, as LayerDiffuse's SD1.5 files do it: added to the UNet's own attentions
while the model is in use.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from functools import partial
from math import lcm

import comfy.utils
import torch
from comfy.controlnet import ControlBase
from comfy.ldm.modules.attention import optimized_attention
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import PatcherInjection, WrappersMP
from torch import Tensor, nn

from ..networks.attention_sharing import PROJECTIONS, AttentionSharing
from .attention_blocks import check_tokens
from .layer_rows import LAYERFUSION, Rows

NAME = re.compile(r"(input_blocks|output_blocks|middle_block)\..*\.attn[12]")
KEY = "strata_sharing_"
MOST_REPEATED = 4  # common length of the prompts over the longest one's, at most; ComfyUI has such a limit too
# A ControlNet's fields that its run sets.
OF_A_RUN = ("cond_hint", "timestep_range", "extra_concat", "model_sampling_current")
# Key in the transformer options of one evaluation: the picture's features by number of pixels.
CONTROL = "strata_sharing_picture"


def attentions(unet: nn.Module) -> list[nn.Module]:
    """In the order of the files: input blocks, output blocks, the middle block last."""
    matching = [(name, module) for name, module in unet.named_modules() if NAME.fullmatch(name)]
    return [module for name, module in sorted(matching, key=lambda item: item[0].startswith("middle"))]


def widths(model: ModelPatcher) -> list[dict[str, tuple[int, int]]]:
    """(inputs, outputs) of each attention's projections; empty for a model that is no UNet."""

    def of(module: nn.Module, name: str) -> tuple[int, int]:
        layer = module.to_out[0] if name == "to_out" else getattr(module, name)
        return layer.in_features, layer.out_features

    return [{name: of(module, name) for name in PROJECTIONS} for module in attentions(model.model.diffusion_model)]


def attach(model: ModelPatcher, sharing: ModelPatcher, strength: float, picture: Tensor | None = None) -> ModelPatcher:
    """A clone whose attentions are shared; strength 0 is the model itself. picture: the given layer, [B,3,H,W] in
    -1..1, for files that take one.
    """
    clone = model.clone()
    if not strength:
        return clone
    name = f"{KEY}{uuid.uuid4().hex}"  # the host tells two clones apart by such names
    clone.set_additional_models(name, [sharing])
    injection = Injection(sharing.model, strength)
    clone.set_injections(name, [PatcherInjection(injection.inject, injection.eject)])
    if picture is not None:
        clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, name, with_features(sharing.model, picture))
    return clone


def attach_to_foreground(model: ModelPatcher, sharing: ModelPatcher, rows: Rows = LAYERFUSION) -> ModelPatcher:
    """A clone in which a file of one frame acts on the foregrounds among the rows, and the others have the model's own
    attention.
    """
    clone = model.clone()
    clone.set_additional_models(f"{KEY}foreground", [sharing])
    clone.add_wrapper_with_key(
        WrappersMP.DIFFUSION_MODEL, f"{KEY}foreground", partial(_with_foreground, sharing.model, rows)
    )
    return clone


def _with_foreground(sharing: AttentionSharing, rows: Rows, executor, x: Tensor, *args, **kwargs):
    """Hooks on the projections, since a replaced attention calls those and not the attention itself; for one
    call only.
    """
    rows.check(x)
    layers = zip(attentions(executor.class_obj), sharing.hookers.layers, strict=True)
    hooks = [hook for module, layer in layers for hook in _on_foreground(module, layer, rows)]
    try:
        return executor(x, *args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()


def _on_foreground(module: nn.Module, layer: nn.Module, rows: Rows) -> list:
    entered = {}

    def enter(projection: nn.Module, args: tuple) -> None:
        entered["x"] = args[0]

    def add(lora: nn.Module, projection: nn.Module, args: tuple, output: Tensor) -> None:
        rows.add(output, lora(rows.of(args[0])))

    def leave(projection: nn.Module, args: tuple, output: Tensor) -> None:
        """Each foreground is its own only frame."""
        frames = (rows.of(entered.pop("x")) + rows.of(output))[:, None]
        rows.add(output, layer.over_frames(frames, module.heads)[:, 0])

    projections = {name: getattr(module, name) for name in PROJECTIONS}
    projections["to_out"] = module.to_out[0]
    added = [
        projections[name].register_forward_hook(partial(add, getattr(layer, f"{name}_lora")[0])) for name in PROJECTIONS
    ]
    return [module.to_q.register_forward_pre_hook(enter), *added, projections["to_out"].register_forward_hook(leave)]


class Injection:
    """Puts the shared forward on each attention, and takes it off again; what was there (another pack's, say) is called
    inside.
    """

    def __init__(self, sharing: AttentionSharing, strength: float):
        self.sharing, self.strength = sharing, strength
        self.before: list[tuple[nn.Module, Callable | None]] = []

    def inject(self, patcher: ModelPatcher) -> None:
        for module, layer in zip(attentions(patcher.model.diffusion_model), self.sharing.hookers.layers, strict=True):
            self.before.append((module, module.__dict__.get("forward")))
            module.forward = shared(module, module.forward, layer, self.strength)

    def eject(self, patcher: ModelPatcher) -> None:
        for module, forward in self.before:
            if forward is None:
                del module.forward
            else:
                module.forward = forward
        self.before.clear()


def shared(module: nn.Module, plain: Callable, layer: nn.Module, strength: float) -> Callable:
    """An attention's forward with the shared layer. plain: the forward that was there, for strengths other than 1."""

    def forward(x, context=None, value=None, mask=None, transformer_options={}):  # noqa: B006 the host's own signature
        if layer.frames > 1:
            check_tokens(x, transformer_options)

        def attention(q, k, v):
            return optimized_attention(
                q,
                k,
                v,
                module.heads,
                mask=mask,
                attn_precision=module.attn_precision,
                transformer_options=transformer_options,
            )

        features = transformer_options.get(CONTROL, {}).get(x.shape[1]) if hasattr(layer, "control_convs") else None
        out = layer(module, attention, x, context, value, features)
        return (
            out
            if strength == 1
            else out * strength + plain(x, context, value, mask, transformer_options) * (1 - strength)
        )

    return forward


def with_features(sharing: AttentionSharing, picture: Tensor) -> Callable:
    """Wrapper of the UNet that puts the features of the picture [B,3,H,W] in -1..1, at the size of the call's latent,
    into its options. Pictures repeat over the batch.
    """

    def wrapper(executor, x, timesteps=None, context=None, y=None, control=None, transformer_options={}, **kwargs):  # noqa: B006
        fitted = comfy.utils.common_upscale(picture, x.shape[-1] * 8, x.shape[-2] * 8, "bilinear", "center")
        features = sharing.kwargs_encoder(fitted.to(x))
        if len(picture) > 1:
            features = {
                count: comfy.utils.repeat_to_batch_size(one, len(x) // sharing.frames)
                for count, one in features.items()
            }
        return executor(x, timesteps, context, y, control, {**transformer_options, CONTROL: features}, **kwargs)

    return wrapper


def together(prompts: list[tuple[str, list]]) -> list:
    """One conditioning from those of the frames: a row of tokens per frame, which the host repeats over the batch.
    Raises ValueError.
    """
    for name, prompt in prompts:
        if len(prompt) != 1:
            raise ValueError(
                f"{name}: it is {len(prompt)} conditionings in one (combined, or of areas), and each frame takes one; "
                "connect a plain one."
            )
    carried = [{key: value for key, value in prompt[0][1].items() if key != "pooled_output"} for _, prompt in prompts]
    for key in sorted(set().union(*carried)):
        holders = [name for (name, _), own in zip(prompts, carried, strict=True) if key in own]
        if len(holders) < len(prompts) or not all(_same(carried[0][key], own[key]) for own in carried):
            raise ValueError(
                f"{holders[0]}: it carries {key!r}, which the other prompts lack or have otherwise, and the frames are "
                "sampled as one; connect plain prompts here, and put what shall act on all of them on the model or on "
                "negative."
            )
    tokens = [prompt[0][0][:1] for _, prompt in prompts]
    longest = lcm(*(one.shape[1] for one in tokens))  # repeated tokens change nothing in attention
    if longest > MOST_REPEATED * max(one.shape[1] for one in tokens):
        raise ValueError(
            f"{', '.join(name for name, _ in prompts)}: their {', '.join(str(one.shape[1]) for one in tokens)} tokens "
            "have no common length that is not many times as long; shorten the longer prompts."
        )
    return [[torch.cat([one.repeat(1, longest // one.shape[1], 1) for one in tokens]), prompts[-1][1][0][1]]]


def _same(one, other) -> bool:
    """ControlNets are the same when all but what a run leaves on them is: Apply ControlNet makes a copy for each
    conditioning.
    """
    if one is other or type(one) is not type(other):
        return one is other
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, ControlBase):
        one, other = (
            {key: value for key, value in vars(control).items() if key not in OF_A_RUN} for control in (one, other)
        )
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, str | int | float) and one == other
