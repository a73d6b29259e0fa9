"""DreamLayer: background, objects and whole picture, rows of one batch, share attention, and objects find their place
in the whole.

Settings and state travel in the transformer options, so that the order of the two nodes in a graph does not matter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..networks.context_layers import ContextLayers
from ..techniques import shared_layers as dreamlayer
from . import foreground, layer_modules
from .attention_blocks import Place, around, check_tokens, place_of, size_of, transformers
from .foreground import Rows
from .kept import Kept, Record
from .layer_prompts import LAYERS

KEY, SHARING, MAPS, RUN, RECORD, PATH = (
    f"strata_layers{name}" for name in ("", "_sharing", "_maps", "_run", "_record", "_path")
)


@dataclass(frozen=True)
class Sharing(Kept):
    """LSSA. strength 0..1 of the joint attention and of trained terms, between two percents of the sampling."""

    strength: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 1.0
    terms: layer_modules.Terms | None = None


@dataclass(frozen=True)
class Maps(Kept):
    """CACA. strength 0..1 of Eq. 9's mixing until that percent of the sampling; the published T_G of 850 is 0.15.
    refine: Eq. 5's layers.
    """

    strength: float = 1.0
    end_percent: float = 0.15
    refine: ContextLayers | None = None


@dataclass
class Run:
    """One sampling run: the positions of each layer's words, back to front, in so many tokens, and the maps of the
    latest conditional estimate.

    path: the whole picture at each noise level, when it is a given one. No layer then changes it, and it alone is what
    the others look at.
    """

    words: list[list[int]]
    tokens: int
    record: Record | None = None
    path: Callable[[float], Tensor] | None = None
    maps: Tensor | None = None

    @property
    def layers(self) -> int:
        return layer_count(self.words)


@dataclass
class Call:
    """One call of the model. sharing and mixing: strengths; looked_at: where maps are taken from; lead: number of the
    conditional estimate.
    """

    run: Run
    sharing: float
    mixing: float
    looked_at: list[Place]
    lead: int | None
    terms: layer_modules.Terms | None = None
    refine: ContextLayers | None = None
    shares: list[Tensor] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)

    def whole(self, values: Tensor, options: dict) -> Tensor:
        """The whole picture's rows of the conditional estimate."""
        chunks = options["cond_or_uncond"]
        return values.chunk(len(chunks))[chunks.index(self.lead)][self.run.layers - 1 :: self.run.layers]


def layer_count(words: list) -> int:
    """Rows of one scene: background, objects and whole picture; a background alone is the whole picture."""
    return len(words) + 1 if len(words) > 1 else 1


def object_rows(count: int) -> Rows:
    """The objects among the rows of scenes of `count` rows."""
    return Rows(
        count,
        1,
        count - 2,
        f"scenes of {count} layers (background, {count - 2} objects and the whole picture), as many as there are "
        "prompts; "
        "use Layers sampler, or a latent batch that is a multiple of it.",
    )


def share_layers(
    model: ModelPatcher, settings: Sharing, modules: layer_modules.LayerModules | None = None
) -> ModelPatcher:
    """The model with layer-shared self-attention in its up blocks; with strength 0 the model as it is. Raises
    ValueError for models without them.
    """
    if modules is None:
        return _attach(model, SHARING, settings)
    terms = layer_modules.terms(model, modules)
    return _attach(model, SHARING, replace(settings, terms=terms), [*terms.shared.values(), *terms.foreground.values()])


def map_context(model: ModelPatcher, settings: Maps, modules: layer_modules.LayerModules | None = None) -> ModelPatcher:
    """The model in which objects take over the whole picture's layout from its context maps; with strength 0 the model
    as it is. Raises ValueError.
    """
    if modules is None or not modules.context:
        return _attach(model, MAPS, settings)
    layer_modules.terms(model, modules)  # for its sentence about another family
    return _attach(model, MAPS, replace(settings, refine=modules.context), [modules.context])


def without_layers(model: ModelPatcher) -> ModelPatcher:
    """A clone without both, for a single picture."""
    model = model.clone()
    for kind in _WRAPPERS:
        model.remove_wrappers_with_key(kind, KEY)
    return model


def map_places(model: ModelPatcher) -> list[Place]:
    """The cross-attentions of the down blocks at their lowest resolution, which is the published one on SD1.5: 16×16
    for 512 pixels.
    """
    blocks = [place for place in transformers(model.model.diffusion_model) if place[0] == "input"]
    if not blocks:
        raise ValueError(
            f"model: {type(model.model.model_config).__name__} has no cross-attention in down and up blocks; layers "
            "that share attention "
            "work with SD1.5, SD2, SDXL and the Strata mini family."
        )
    parts, level, levels = model.model.diffusion_model.input_blocks, 0, []
    for part in parts:
        level += any(hasattr(layer, "op") for layer in part)
        levels.append(level)
    deepest = max(levels[number] for _, number, _ in blocks)
    return [place for place in blocks if levels[place[1]] == deepest]


def _attach(model: ModelPatcher, key: str, settings: Sharing | Maps, networks: list = ()) -> ModelPatcher:
    map_places(model)
    if settings.strength == 0:
        return model
    model = model.clone()
    if networks:
        foreground.load_with(model, networks)
    model.model_options["transformer_options"][key] = settings
    if not model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY):
        for kind, wrapper in _WRAPPERS.items():
            model.add_wrapper_with_key(kind, KEY, wrapper)
    return model


def _start_run(executor, noise: Tensor, *args, **kwargs):
    guider = executor.class_obj
    entries = [entry for entries in guider.conds.values() for entry in entries]
    layered = next((entry for entry in entries if LAYERS in entry), None)
    if layered is None:
        raise ValueError(
            "positive: this conditioning does not say which words belong to which layer; make it with Layer prompts."
        )
    if any("area" in entry for entry in entries):
        raise ValueError(
            "positive or negative: a conditioning is limited to an area; layers need conditionings of the whole "
            "picture."
        )
    if any(len(entries) > 1 and any(LAYERS in entry for entry in entries) for entries in guider.conds.values()):
        raise ValueError("positive: several conditionings are combined; layers need the one of Layer prompts alone.")
    options = guider.model_options["transformer_options"]  # this run's own copy
    words = [positions for _, positions in layered[LAYERS]]
    run = options[RUN] = Run(words, layered["cross_attn"].shape[1], options.get(RECORD), options.get(PATH))
    object_rows(run.layers).check(noise)
    return executor(noise, *args, **kwargs)


def _calculate(executor, model, conds: list, x: Tensor, timestep: Tensor, model_options: dict):
    """The conditional estimate before the others while its maps are mixed in: ComfyUI would put them into one batch, or
    the unconditional first.
    """
    options = model_options["transformer_options"]
    run: Run = options[RUN]
    if run.layers == 1:
        return executor(model, conds, x, timestep, model_options)
    if run.path is not None:
        x = x.clone()
        x[run.layers - 1 :: run.layers] = run.path(float(timestep.max())).to(x)
    sharing, maps = options.get(SHARING), options.get(MAPS)
    sampling, sigma = model.model_sampling, float(timestep.max())

    def strength(settings, start: float = 0.0) -> float:
        inside = settings is not None and sampling.percent_to_sigma(
            settings.end_percent
        ) <= sigma <= sampling.percent_to_sigma(start)
        return settings.strength if inside else 0.0

    lead = next((i for i, entries in enumerate(conds) if entries and any(LAYERS in entry for entry in entries)), None)
    mixing = strength(maps)
    places = map_places(model.current_patcher) if maps is not None and (mixing or run.record is not None) else []
    call = Call(
        run,
        strength(sharing, sharing.start_percent) if sharing else 0.0,
        mixing,
        places,
        lead,
        sharing and sharing.terms,
        maps and maps.refine,
    )
    if not (call.sharing or call.looked_at):
        return executor(model, conds, x, timestep, model_options)

    def calculate(conds: list):
        call.shares.clear()
        call.hidden.clear()
        return executor(model, conds, x, timestep, {**model_options, "transformer_options": {**options, KEY: call}})

    others = [None if i == lead else entries for i, entries in enumerate(conds)]
    if not mixing or lead is None or not any(others):
        return calculate(conds)
    first, rest = calculate([entries if i == lead else None for i, entries in enumerate(conds)]), calculate(others)
    return [first[i] if i == lead else rest[i] for i in range(len(conds))]


def _denoise(executor, x: Tensor, timesteps: Tensor, context: Tensor, y, control, options: dict, **kwargs):
    call: Call | None = options.get(KEY)
    if call is not None:
        options = _with_patches(
            options, call, [place for place in transformers(executor.class_obj) if place[0] == "output"]
        )
    if call is None or call.terms is None or not call.sharing:
        return executor(x, timesteps, context, y, control, options, **kwargs)
    with call.terms.acting(executor.class_obj, call.sharing, call.run.layers):
        return executor(
            x, timesteps, _labelled(call, context, options["cond_or_uncond"]), y, control, options, **kwargs
        )


def _labelled(call: Call, context: Tensor, chunks: list[int]) -> Tensor:
    """The tokens, those of the conditional estimate with the layer embedding. ComfyUI may have repeated them to another
    estimate's length.
    """
    if call.lead not in chunks:
        return context
    parts = list(context.chunk(len(chunks)))
    rows = parts[chunks.index(call.lead)]
    offsets = dreamlayer.layer_offsets(call.terms.embedding.to(rows), call.run.words, call.run.tokens) * call.sharing
    parts[chunks.index(call.lead)] = rows + offsets.repeat(
        len(rows) // len(offsets), rows.shape[1] // call.run.tokens, 1
    )
    return torch.cat(parts)


_WRAPPERS = {
    WrappersMP.OUTER_SAMPLE: _start_run,
    WrappersMP.CALC_COND_BATCH: _calculate,
    WrappersMP.DIFFUSION_MODEL: _denoise,
}


def _with_patches(options: dict, call: Call, up: list[Place]) -> dict:
    """The options with our patches around those that are there already, whichever node came first in the graph."""
    replaced, patches = {**options.get("patches_replace", {})}, {**options.get("patches", {})}
    if call.sharing:
        replaced["attn1"] = around(options, "attn1", up, partial(_attend_jointly, call))
    if call.lead in options["cond_or_uncond"] and call.looked_at:
        replaced["attn2"] = around(options, "attn2", call.looked_at, partial(_look, call))
        if call.refine is not None:
            patches["attn2_patch"] = [*patches.get("attn2_patch", []), partial(_see, call)]
    if call.mixing:
        patches["attn1_patch"] = [*patches.get("attn1_patch", []), partial(_mix, call)]
    return {**options, "patches": patches, "patches_replace": replaced}


def _attend_jointly(call: Call, attend: Callable, q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
    joint = dreamlayer.joint_attention(
        q, k, v, call.run.layers, lambda *joined: attend(*joined, options), call.run.path is not None
    )
    return joint if call.sharing == 1 else torch.lerp(attend(q, k, v, options), joint, call.sharing)


def _see(call: Call, n: Tensor, context: Tensor, value: Tensor, options: dict) -> tuple[Tensor, Tensor, Tensor]:
    if place_of(options) in call.looked_at:
        call.hidden.append(call.whole(n, options))
    return n, context, value


def _look(call: Call, attend: Callable, q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
    """Takes the maps from the whole picture's rows of the conditional estimate; the last place makes the run's maps of
    the sum.
    """
    call.shares.append(
        dreamlayer.token_shares(call.whole(q, options), call.whole(k, options), options["n_heads"], call.run.words[1:])
    )
    if place_of(options) == call.looked_at[-1]:
        maps = dreamlayer.context_maps(torch.stack(call.shares).sum(0))
        if call.refine is not None:
            maps = call.refine(maps, torch.stack(call.hidden).sum(0).to(maps))
        call.run.maps = maps.unflatten(2, size_of(options))
        if call.run.record is not None:
            call.run.record.add(call.run.maps, options)
    return attend(q, k, v, options)


def _mix(call: Call, n: Tensor, context: Tensor, value: Tensor, options: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 9 on what goes into the self-attention: queries, keys and values. Tokens that another patch has added to the
    keys stay as they are.
    """
    if options["block"][0] != "output" or call.run.maps is None:
        return n, context, value
    check_tokens(n, options)
    maps = (dreamlayer.resize_maps(call.run.maps, size_of(options)).flatten(2) * call.mixing).to(n)

    def mixed(rows: Tensor) -> Tensor:
        count, layers = maps.shape[-1], rows.unflatten(0, (-1, call.run.layers))
        found = dreamlayer.mix_global_in(layers[:, :, :count], maps.repeat(len(layers) // len(maps), 1, 1))
        return torch.cat([found, layers[:, :, count:]], 2).flatten(0, 1)

    same = {id(rows): mixed(rows) for rows in (n, context, value)}  # most often all three are one
    return same[id(n)], same[id(context)], same[id(value)]
