"""LayerFusion: the attention of foreground, background and blended, three rows of one batch, blended in every block
while sampling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from einops import rearrange
from torch import Tensor, nn

from ..techniques import fusion
from ..techniques.joint_attention import attend_rows, of_blending, of_layers
from . import attention_blocks, joint_attention
from .attention_blocks import Place, chosen, place_of, size_of, transformers, with_patches
from .joint_attention import Joint, flat
from .kept import Record
from .layer_prompts import END_TOKENS
from .layer_rows import LAYERFUSION, Method, Rows, conditional_first, is_between, selected_rows_only

STRUCTURE_LAYER = attention_blocks.TABLES["structure_layer"]
METHOD = Method(
    key="strata_fusion",
    marker=END_TOKENS,
    needs="LayerFusion needs",
    tells="where the foreground's prompt ends",
    node="Encode layer prompts",
)
ROWS = LAYERFUSION
BLOCKS = {
    "all": ("input", "middle", "output"),
    "down": ("input",),
    "middle": ("middle",),
    "up": ("output",),
    "middle and up": ("middle", "output"),
}


@dataclass(frozen=True)
class Settings:
    """strength: 0..1. boundary: the paper's d. start_percent, end_percent: 0..1 of the sampling. blocks: the parts of
    the model that blend, see BLOCKS. reuse: the structure of the step before instead of a prior pass. own_prompt: the
    blended branch reads its own prompt instead of the background's.

    wide: after Eq. 2 the blended branch goes on with the foreground through the wide mask instead of the soft one.
    priors: what the masks are made of, one of fusion.PRIORS.
    """

    strength: float = 1.0
    boundary: float = 10.0
    start_percent: float = 0.0
    end_percent: float = 1.0
    blocks: tuple[str, ...] = BLOCKS["all"]
    reuse: bool = False
    own_prompt: bool = False
    wide: bool = False
    priors: str = fusion.BOTH

    def active(self, sampling, timestep: Tensor) -> bool:
        return self.strength > 0 and is_between(self.start_percent, self.end_percent, sampling, timestep)


@dataclass
class Run:
    """One sampling run: the positions of the ends of the foreground's prompt, the structure prior in use with its size,
    and the masks of the latest conditional estimate: soft, hard and, where used, wide.
    """

    ends: list[int]
    record: Record | None = None
    rows: Rows = ROWS
    structure: tuple[Tensor, tuple[int, int]] | None = None
    masks: dict[tuple[str, Place | int], tuple[Tensor, ...]] = field(default_factory=dict)


@dataclass
class Call:
    """One call of the model, on its way to the patches in transformer_options. phase: prior, conditional or other."""

    settings: Settings
    run: Run
    phase: str
    structure_place: Place | int
    structure: tuple[Tensor, tuple[int, int]] | None = None
    entered: tuple[nn.Module, Tensor, Tensor] | None = None


def blend_attention(model: ModelPatcher, settings: Settings) -> ModelPatcher:
    """The model with LayerFusion's blending; with strength 0 the model as it is. Raises ValueError for a family that is
    not known.
    """
    place = structure_place(model)
    if settings.strength == 0:
        return model
    model = model.clone()
    calculate = partial(_calculate, settings, place)
    if joint_attention.family_of(model.model.diffusion_model):
        joint_attention.prepare(model)
        act = joint_attention.around(METHOD.key, _attend_joint)
        METHOD.attach(model, _start, calculate, act, WrappersMP.APPLY_MODEL)
    else:
        METHOD.attach(model, _start, calculate, _denoise)
    return model


def structure_place(model: ModelPatcher) -> Place | int:
    """The self-attention that shows the structure, by models_config/fusion.json; of a transformer the number of a
    block, the last one where the table has none. Raises ValueError for other families.

    Source: layerfusion, Appendix A.3 (the last self-attention)
    Differs: the mini family's last but one, as its Flux-Fill's, which shows the outline (docs/layerfusion.md).
    """
    network, own = model.model.diffusion_model, chosen(STRUCTURE_LAYER, model)
    if family := joint_attention.family_of(network):
        return own[0] if own else sum(family.counts(network)) - 1
    place = tuple(own or ())
    if place not in transformers(network):
        raise ValueError(
            f"model: this is {type(model.model.model_config).__name__}, and LayerFusion works with SD1.5, SD2, SDXL, "
            f"{joint_attention.NAMES} and the Strata mini family; connect one of these."
        )
    return place


def _start(entry: dict, options: dict) -> Run:
    return Run(entry[END_TOKENS], options.get(METHOD.record_key))


def _calculate(
    settings: Settings, place: Place, executor, model, conds: list, x: Tensor, timestep: Tensor, model_options: dict
):
    """The foreground's prior pass, then the conditional estimate, then the others with its masks."""
    if not settings.active(model.model_sampling, timestep):
        return executor(model, conds, x, timestep, model_options)
    options = model_options["transformer_options"]
    if METHOD.key in options:
        raise ValueError(
            "model: two Attention blend nodes act on it at the same time; remove one of them, or give them other "
            "start and end percents."
        )
    run: Run = options[METHOD.run_key]
    number = METHOD.conditional(conds)

    def calculate(phase: str, conds: list, x: Tensor = x, timestep: Tensor = timestep, options: dict = options):
        call = Call(settings, run, phase, place)
        call_options = {**model_options, "transformer_options": {**options, METHOD.key: call}}
        estimates = executor(model, conds, x, timestep, call_options)
        if call.structure is not None:
            run.structure = call.structure
        return estimates

    if number is not None and (run.structure is None or not settings.reuse):
        if "control" in conds[number][0]:  # a ControlNet keeps its hints for one size of batch
            calculate("prior", [conds[number]])
        else:
            with selected_rows_only():
                foreground = [[_foreground(conds[number][0], len(x))]]
                own = joint_attention.of_rows(options, slice(0, None, ROWS.count))
                calculate("prior", foreground, x[:: ROWS.count], timestep[:: ROWS.count], own)
    return conditional_first(
        conds, number, lambda conds, conditional: calculate("conditional" if conditional else "other", conds)
    )


def _foreground(entry: dict, batch: int) -> dict:
    """The conditioning with the foreground's rows alone."""

    def of(value):
        return value[:: ROWS.count] if isinstance(value, Tensor) and len(value) == batch else value

    def rows(cond):
        cond = cond.process_cond(batch_size=batch, area=None)
        cond.cond = [of(one) for one in cond.cond] if isinstance(cond.cond, list) else of(cond.cond)
        return cond

    return {**entry, "model_conds": {name: rows(cond) for name, cond in entry["model_conds"].items()}}


def _denoise(executor, x: Tensor, timesteps: Tensor, context: Tensor, y, control, options: dict, **kwargs):
    call: Call | None = options.get(METHOD.key)
    if call is None:
        return executor(x, timesteps, context, y, control, options, **kwargs)
    blocks = transformers(executor.class_obj)
    hooks = []
    if call.phase == "conditional":
        hooks = [block.register_forward_pre_hook(partial(_enter, call), with_kwargs=True) for block in blocks.values()]
    try:
        return executor(x, timesteps, context, y, control, _patched(options, call, blocks), **kwargs)
    finally:
        for hook in hooks:
            hook.remove()


def _enter(call: Call, block: nn.Module, args: tuple, kwargs: dict) -> None:
    context = kwargs["context"] if "context" in kwargs else args[1]
    call.entered = block, args[0][:: ROWS.count], context[:: ROWS.count]


def _patched(options: dict, call: Call, blocks: dict[Place, nn.Module]) -> dict:
    if call.phase == "prior":
        return with_patches(options, {"attn1": ([call.structure_place], partial(_attend_self, call))})
    places = [place for place in blocks if place[0] in call.settings.blocks]
    own = {
        "attn1": (list(dict.fromkeys([*places, call.structure_place])), partial(_attend_self, call)),
        "attn2": (places, partial(_attend_cross, call)),
    }
    return with_patches(options, own, {f"{name}_output_patch": partial(_blend, name, call) for name in own})


def _attend_self(call: Call, attend: Callable, q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
    place = place_of(options)
    if place == call.structure_place and (call.phase == "prior" or call.settings.reuse and call.phase == "conditional"):
        call.structure = fusion.structure_prior(ROWS.of(q), ROWS.of(k), options["n_heads"]), size_of(options)
    if call.phase == "prior" or place[0] not in call.settings.blocks:
        return attend(q, k, v, options)
    if call.phase == "conditional":  # by Alg. 3 the content prior is that of the block's cross-attention here too
        block, hidden, context = call.entered
        with selected_rows_only():
            rows = block.attn2.to_q(block.norm2(hidden)), block.attn2.to_k(context)
        _remember(call, ("attn1", place), *rows, options["n_heads"], call.run.ends, size_of(options))
    branches = [_branches(values) for values in (q, k, v)]
    own = attend(q[:: ROWS.count], k[:: ROWS.count], v[:: ROWS.count], options)
    pair = attend(*map(fusion.shared_tokens, branches), options)
    shared = rearrange(torch.cat([own, pair], 1), "scene (branch token) c -> (scene branch) token c", branch=ROWS.count)
    if attend is not attention_blocks.attend and call.settings.strength == 1:
        # Patches that record what they see, as Self-Attention Guidance does, see all rows last.
        attend(q, k, v, options)
    return _mix(call, shared, lambda: attend(q, k, v, options))


def _attend_cross(call: Call, attend: Callable, q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
    if call.phase == "conditional":
        place, rows = place_of(options), (q[:: ROWS.count], k[:: ROWS.count])
        maps = _remember(call, ("attn2", place), *rows, options["n_heads"], call.run.ends, size_of(options))
        _show(call, place, maps, options)
    if call.settings.own_prompt:
        return attend(q, k, v, options)
    shared = attend(q, *(fusion.shared_prompt(_branches(values)) for values in (k, v)), options)
    return _mix(call, shared, lambda: attend(q, k, v, options))


def _branches(rows: Tensor) -> Tensor:
    return rearrange(rows, "(scene branch) token c -> scene branch token c", branch=ROWS.count)


def _mix(call: Call, shared: Tensor, apart: Callable[[], Tensor]) -> Tensor:
    return shared if call.settings.strength == 1 else torch.lerp(apart(), shared, call.settings.strength)


def _remember(
    call: Call,
    key: tuple[str, Place | int],
    q: Tensor,
    k: Tensor,
    heads: int,
    ends: list[int],
    size: tuple[int, int],
) -> Tensor:
    """Keep the masks of an attention layer, from its foreground's queries [B,M,C] and the keys [B,T,C] of the
    foreground's prompt. Returns what the paper's Fig. 3 shows of them, [B,4,H,W].
    """
    structure = fusion.resize_prior(*call.run.structure, size)
    content = fusion.content_prior(q, k, heads, ends)
    masks = fusion.blending_masks(structure, content, call.settings.boundary, call.settings.priors)
    wide = [fusion.wide_mask(masks[0], call.settings.boundary)] if call.settings.wide else []
    call.run.masks[key] = *masks, *wide
    return rearrange(torch.stack([structure, content, *masks], 1), "b kind (h w) -> b kind h w", h=size[0])


def _show(call: Call, place: Place | int, maps: Tensor, options: dict) -> None:
    if call.run.record is not None and place == call.structure_place:
        call.run.record.add(maps, options)


def _blend(name: str, call: Call, hidden: Tensor, options: dict) -> Tensor:
    place = place_of(options)
    if (name, place) not in call.run.masks or place[0] not in call.settings.blocks:
        return hidden
    return _exchange(call, hidden, call.run.masks[name, place])


def _exchange(call: Call, hidden: Tensor, masks: tuple[Tensor, ...]) -> Tensor:
    """Eq. 1 and 2 on attention outputs [B,M,C]."""
    foreground, background, blended = _branches(hidden).unbind(1)
    soft, hard, *wide = (mask.repeat(len(background) // len(mask), 1) * call.settings.strength for mask in masks)
    entered = fusion.blend_foreground_in(foreground, blended, soft)
    returned = fusion.return_to_foreground(foreground, entered, hard)
    if wide:
        entered = fusion.blend_foreground_in(foreground, blended, *wide)
    return rearrange(torch.stack([returned, background, entered], 1), "scene branch token c -> (scene branch) token c")


def _attend_joint(
    call: Call, options: dict, joint: Joint, q: Tensor, k: Tensor, v: Tensor, attend: Callable
) -> Tensor | None:
    """A transformer's attention, self- and cross-attention in one: both exchanges are one.

    Source: layerfusion, Alg. 1 to 3, on joint attention
    Differs: the structure prior is of the image tokens' attention among themselves alone; the content prior is the
    prompt's part of the whole attention.
    Differs: outputs are blended before their projection, which is linear and the same for all three; an adapter's part
    in it is each branch's own.
    """
    asking, image = ROWS.of(q[:, :, joint.image]), joint.image
    if joint.number == call.structure_place and (
        call.phase == "prior" or call.settings.reuse and call.phase == "conditional"
    ):
        keys = ROWS.of(k[:, :, image])
        call.structure = fusion.structure_prior(flat(asking), flat(keys), q.shape[1]), joint.size
    if call.phase == "prior" or joint.family.part(joint.network, joint.number) not in call.settings.blocks:
        return joint_attention.apart(joint, q, k, v, attend)
    if call.phase == "conditional":
        keys = torch.cat([ROWS.of(k)[:, :, part] for part in [*joint.beside[0], image]], 2)
        ends = [place for place in call.run.ends if place < joint.lengths[0]]
        maps = _remember(call, ("joint", joint.number), flat(asking), flat(keys), q.shape[1], ends, joint.size)
        _show(call, joint.number, maps, options)

    def read(reads: list) -> Tensor:
        return attend_rows(q, k, v, image, joint.beside, reads, attend)

    shared = read(of_blending(joint.rows, call.settings.own_prompt))
    shared = _mix(call, shared, lambda: read(of_layers(joint.rows, 1)))
    if ("joint", joint.number) in call.run.masks:
        shared[:, image] = _exchange(call, shared[:, image], call.run.masks["joint", joint.number])
    return shared
