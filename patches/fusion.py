"""LayerFusion: the attention of foreground, background and blended, three rows of one batch, blended in every block
while sampling.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ..techniques import fusion
from . import attention_blocks
from .attention_blocks import Place, around, place_of, size_of, transformers
from .foreground import BRANCHES, check_batch, foreground_rows, foregrounds_only, split_branches
from .kept import Record
from .layer_prompts import END_TOKENS

STRUCTURE_LAYER = json.loads(
    (Path(__file__).parent.parent / "models_config" / "fusion.json").read_text(encoding="utf-8")
)["structure_layer"]
KEY, RUN, RECORD = "strata_fusion", "strata_fusion_run", "strata_fusion_record"
BLOCKS = {
    "all": ("input", "middle", "output"),
    "down": ("input",),
    "middle": ("middle",),
    "up": ("output",),
    "middle and up": ("middle", "output"),
}


@dataclass(frozen=True)
class Settings:
    """strength 0..1; boundary: the paper's d; percents of the sampling; reuse: structure of the step before instead of
    a prior pass.

    wide: after Eq. 2 the blended branch goes on with the foreground through the wide mask instead of the soft one.
    """

    strength: float = 1.0
    boundary: float = 10.0
    start_percent: float = 0.0
    end_percent: float = 1.0
    blocks: tuple[str, ...] = BLOCKS["all"]
    reuse: bool = False
    own_prompt: bool = False
    wide: bool = False

    def active(self, sampling, timestep: Tensor) -> bool:
        start, end = (sampling.percent_to_sigma(percent) for percent in (self.start_percent, self.end_percent))
        return self.strength > 0 and end <= float(timestep.max()) <= start


@dataclass
class Run:
    """One sampling run: the structure prior in use with its size, and the masks of the latest conditional estimate:
    soft, hard and, where used, wide.
    """

    record: Record | None = None
    structure: tuple[Tensor, tuple[int, int]] | None = None
    masks: dict[tuple[str, Place], tuple[Tensor, ...]] = field(default_factory=dict)


@dataclass
class Call:
    """One call of the model, on its way to the patches in transformer_options. phase: prior, conditional or other."""

    settings: Settings
    run: Run
    phase: str
    structure_place: Place
    ends: list[int]
    seen: tuple[Tensor, tuple[int, int]] | None = None
    entered: tuple[nn.Module, Tensor, Tensor] | None = None


def blend_attention(model: ModelPatcher, settings: Settings) -> ModelPatcher:
    """The model with LayerFusion's blending; with strength 0 the model as it is. Raises ValueError for a family that is
    not known.
    """
    place = structure_place(model)
    if settings.strength == 0:
        return model
    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _start_run)
    model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, partial(_calculate, settings, place))
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, _denoise)
    return model


def structure_place(model: ModelPatcher) -> Place:
    """The self-attention that shows the structure, by models_config/fusion.json. Raises ValueError for other families.

    Source: layerfusion, Appendix A.3 (the last self-attention)
    Differs: the mini family's last but one, which shows the object's outline (docs/layerfusion.md).
    """
    config = getattr(model.model, "model_config", None)
    place = next(
        (tuple(STRUCTURE_LAYER[kind.__name__]) for kind in type(config).__mro__ if kind.__name__ in STRUCTURE_LAYER),
        None,
    )
    if place is None or place not in transformers(model.model.diffusion_model):
        raise ValueError(
            f"model: {type(config).__name__} is not supported; LayerFusion works with SD1.5, SD2, SDXL and the Strata "
            "mini family."
        )
    return place


def _start_run(executor, *args, **kwargs):
    options = executor.class_obj.model_options["transformer_options"]  # this run's own copy
    options[RUN] = Run(options.get(RECORD))
    return executor(*args, **kwargs)


def _calculate(
    settings: Settings, place: Place, executor, model, conds: list, x: Tensor, timestep: Tensor, model_options: dict
):
    """The foreground's prior pass, then the conditional estimate, then the others with its masks.

    ComfyUI would put conditional and unconditional into one batch, or, short of memory, run the unconditional first,
    which has no masks to use yet.
    """
    check_batch(x)
    if not settings.active(model.model_sampling, timestep):
        return executor(model, conds, x, timestep, model_options)
    options = model_options.get("transformer_options", {})
    if KEY in options:
        raise ValueError(
            "model: two Attention blend nodes act on it at the same time; remove one of them, or give them other "
            "start and end percents."
        )
    run = options.get(RUN) or Run()
    lead = next(
        (i for i, entries in enumerate(conds) if entries and any(END_TOKENS in entry for entry in entries)), None
    )
    _check_conds(conds, lead, run)
    ends = [] if lead is None else conds[lead][0][END_TOKENS]

    def calculate(phase: str, conds: list, x: Tensor = x, timestep: Tensor = timestep):
        call = Call(settings, run, phase, place, ends)
        found = executor(model, conds, x, timestep, {**model_options, "transformer_options": {**options, KEY: call}})
        if call.seen is not None:
            run.structure = call.seen
        return found

    found = [None] * len(conds)
    if lead is not None:
        if run.structure is None or not settings.reuse:
            if "control" in conds[lead][0]:  # a ControlNet keeps its hints for one size of batch
                calculate("prior", [conds[lead]])
            else:
                with foregrounds_only():
                    calculate("prior", [[_foreground(conds[lead][0], len(x))]], x[::BRANCHES], timestep[::BRANCHES])
        found = calculate("conditional", [entries if i == lead else None for i, entries in enumerate(conds)])
    others = [None if i == lead else entries for i, entries in enumerate(conds)]
    if any(others):
        rest = calculate("other", others)
        found = [found[i] if i == lead else rest[i] for i in range(len(conds))]
    return found


def _check_conds(conds: list, lead: int | None, run: Run) -> None:
    if lead is None and not run.masks:
        raise ValueError(
            "positive: this conditioning does not say where the foreground's prompt ends; make it with Encode layer "
            "prompts."
        )
    if any("area" in entry for entries in conds if entries for entry in entries):
        raise ValueError(
            "positive or negative: a conditioning is limited to an area; LayerFusion needs conditionings of the whole "
            "picture."
        )
    if lead is not None and len(conds[lead]) > 1:
        raise ValueError(
            "positive: several conditionings are combined; LayerFusion needs the one of Encode layer prompts alone."
        )


def _foreground(entry: dict, batch: int) -> dict:
    """The conditioning with the foreground's rows alone."""

    def rows(cond):
        cond = cond.process_cond(batch_size=batch, area=None)
        if isinstance(cond.cond, Tensor) and len(cond.cond) == batch:
            cond.cond = cond.cond[::BRANCHES]
        return cond

    return {**entry, "model_conds": {name: rows(cond) for name, cond in entry["model_conds"].items()}}


def _denoise(executor, x: Tensor, timesteps: Tensor, context: Tensor, y, control, options: dict, **kwargs):
    call: Call | None = options.get(KEY)
    if call is None:
        return executor(x, timesteps, context, y, control, options, **kwargs)
    blocks = transformers(executor.class_obj)
    hooks = []
    if call.phase == "conditional":
        hooks = [block.register_forward_pre_hook(partial(_enter, call), with_kwargs=True) for block in blocks.values()]
    try:
        return executor(x, timesteps, context, y, control, _with_patches(options, call, blocks), **kwargs)
    finally:
        for hook in hooks:
            hook.remove()


def _enter(call: Call, block: nn.Module, args: tuple, kwargs: dict) -> None:
    context = kwargs["context"] if "context" in kwargs else args[1]
    call.entered = block, args[0][::BRANCHES], context[::BRANCHES]


def _with_patches(options: dict, call: Call, blocks: dict[Place, nn.Module]) -> dict:
    """The options with our patches around those that are there already, whichever node came first in the graph."""
    if call.phase == "prior":
        replaced, outputs = {"attn1": [call.structure_place]}, {}
    else:
        places = [place for place in blocks if place[0] in call.settings.blocks]
        replaced = {"attn1": list(dict.fromkeys([*places, call.structure_place])), "attn2": places}
        outputs = {f"{name}_output_patch": partial(_blend, name, call) for name in replaced}
    replace, patches = {**options.get("patches_replace", {})}, {**options.get("patches", {})}
    for name, own in replaced.items():
        replace[name] = around(options, name, own, partial(_attend_self if name == "attn1" else _attend_cross, call))
    for name, blend in outputs.items():
        patches[name] = [*patches.get(name, []), blend]
    return {**options, "patches": patches, "patches_replace": replace}


def _attend_self(call: Call, attend: Callable, q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
    place = place_of(options)
    if place == call.structure_place and (call.phase == "prior" or call.settings.reuse and call.phase == "conditional"):
        call.seen = fusion.structure_prior(foreground_rows(q), foreground_rows(k), options["n_heads"]), size_of(options)
    if call.phase == "prior" or place[0] not in call.settings.blocks:
        return attend(q, k, v, options)
    if call.phase == "conditional":  # by Alg. 3 the content prior is that of the block's cross-attention here too
        block, hidden, context = call.entered
        with foregrounds_only():
            _remember(call, "attn1", block.attn2.to_q(block.norm2(hidden)), block.attn2.to_k(context), options)
    branches = [values.unflatten(0, (-1, BRANCHES)) for values in (q, k, v)]
    own = attend(q[::BRANCHES], k[::BRANCHES], v[::BRANCHES], options)
    pair = attend(*map(fusion.shared_tokens, branches), options)
    shared = torch.cat([own, pair], 1).unflatten(1, (BRANCHES, -1)).flatten(0, 1)
    if attend is not attention_blocks.attend and call.settings.strength == 1:
        # Patches that record what they see, as Self-Attention Guidance does, see all rows last.
        attend(q, k, v, options)
    return _mix(call, shared, lambda: attend(q, k, v, options))


def _attend_cross(call: Call, attend: Callable, q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
    if call.phase == "conditional":
        _remember(call, "attn2", q[::BRANCHES], k[::BRANCHES], options)
    if call.settings.own_prompt:
        return attend(q, k, v, options)
    shared = attend(q, *(fusion.shared_prompt(values.unflatten(0, (-1, BRANCHES))) for values in (k, v)), options)
    return _mix(call, shared, lambda: attend(q, k, v, options))


def _mix(call: Call, shared: Tensor, apart: Callable[[], Tensor]) -> Tensor:
    return shared if call.settings.strength == 1 else torch.lerp(apart(), shared, call.settings.strength)


def _remember(call: Call, name: str, q: Tensor, k: Tensor, options: dict) -> None:
    """The masks of an attention layer, from its foreground's queries and the keys of the foreground's prompt."""
    place, size = place_of(options), size_of(options)
    structure = fusion.resize_prior(*call.run.structure, size)
    content = fusion.content_prior(q, k, options["n_heads"], call.ends)
    masks = fusion.blending_masks(structure, content, call.settings.boundary)
    wide = [fusion.wide_mask(masks[0], call.settings.boundary)] if call.settings.wide else []
    call.run.masks[name, place] = *masks, *wide
    if call.run.record is not None and name == "attn2" and place == call.structure_place:
        # The paper's Fig. 3.
        call.run.record.add(torch.stack([structure, content, *masks], 1).unflatten(2, size), options)


def _blend(name: str, call: Call, hidden: Tensor, options: dict) -> Tensor:
    masks = call.run.masks.get((name, place_of(options)))
    if masks is None or place_of(options)[0] not in call.settings.blocks:
        return hidden
    foreground, background, blended = split_branches(hidden)
    soft, hard, *wide = (mask.repeat(len(background) // len(mask), 1) * call.settings.strength for mask in masks)
    entered = fusion.blend_foreground_in(foreground, blended, soft)
    returned = fusion.return_to_foreground(foreground, entered, hard)
    if wide:
        entered = fusion.blend_foreground_in(foreground, blended, *wide)
    return torch.stack([returned, background, entered], 1).flatten(0, 1)
