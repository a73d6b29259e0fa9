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
from einops import rearrange, repeat
from torch import Tensor

from ..networks.context_layers import ContextLayers
from ..techniques import joint_attention as joint_rows
from ..techniques import shared_layers as dreamlayer
from . import foreground, joint_attention, layer_modules
from .attention_blocks import TABLES, Place, check_tokens, chosen, place_of, size_of, transformers, with_patches
from .joint_attention import Joint
from .kept import Kept, Record
from .layer_prompts import LAYERS
from .layer_rows import Method, Rows, conditional_first, is_between

METHOD = Method(
    key="strata_layers",
    marker=LAYERS,
    needs="layers need",
    tells="which words belong to which layer",
    node="Layer prompts",
)
MAP_LAYERS = TABLES["map_layers"]
SHARING, MAPS, TRAJECTORY = (f"strata_layers_{name}" for name in ("sharing", "maps", "trajectory"))


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
    """One sampling run: the indices of each layer's tokens, back to front, in so many tokens, and the maps of the
    latest conditional estimate.

    trajectory: the whole picture at each noise level, when it is a given one. No layer then changes it, and it sees
    itself alone.
    """

    token_indices: list[list[int]]
    tokens: int
    record: Record | None = None
    trajectory: Callable[[float], Tensor] | None = None
    maps: Tensor | None = None

    @property
    def layers(self) -> int:
        return layer_count(self.token_indices)

    @property
    def rows(self) -> Rows:
        return object_rows(self.layers)


@dataclass
class Call:
    """One call of the model. sharing, mixing: strengths; map_places: where maps are taken from; conditional: the number
    of that estimate.

    shares, hidden: of each of those places so far in this run of the network, the attention to the objects' words, and
    what came in.
    """

    run: Run
    sharing: float
    mixing: float
    map_places: list[Place] | list[int]
    conditional: int | None
    terms: layer_modules.Terms | None = None
    refine: ContextLayers | None = None
    shares: list[Tensor] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)

    def of_composite(self, values: Tensor, options: dict) -> Tensor:
        """The whole picture's rows of the conditional estimate."""
        chunks = options["cond_or_uncond"]
        return values.chunk(len(chunks))[chunks.index(self.conditional)][self.run.layers - 1 :: self.run.layers]


def layer_count(layers: list) -> int:
    """Rows of one scene: background, objects and whole picture; a background alone is the whole picture."""
    return len(layers) + 1 if len(layers) > 1 else 1


def object_rows(count: int) -> Rows:
    """The objects among the rows of scenes of `count` rows."""
    return Rows(
        count,
        1,
        count - 2,
        f"scenes of {count} layers (background, {count - 2} objects and the whole image), as many as there are "
        "prompts; use Layers sampler, or a latent batch that is a multiple of it.",
    )


def share_layers(
    model: ModelPatcher, settings: Sharing, modules: layer_modules.LayerModules | None = None
) -> ModelPatcher:
    """The model with layer-shared self-attention in its up blocks, or in the later joint attention of a transformer;
    with strength 0 the model as it is. Raises ValueError for models without them.
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
    METHOD.detach(model)
    return model


def map_places(model: ModelPatcher) -> list[Place] | list[int]:
    """The cross-attentions of the down blocks at their lowest resolution, which is the published one on SD1.5: 16×16
    for 512 pixels. Of a transformer the numbers of the blocks that models_config/fusion.json has for the model,
    or else those of its family. Raises ValueError.
    """
    if family := joint_attention.family_of(model.model.diffusion_model):
        return chosen(MAP_LAYERS, model) or list(family.maps(model.model.diffusion_model))
    blocks = [place for place in transformers(model.model.diffusion_model) if place[0] == "input"]
    if not blocks:
        raise ValueError(
            f"model: {type(model.model.model_config).__name__} has neither cross-attention in down and up blocks nor a "
            "joint attention that is known; layers that share attention work with SD1.5, SD2, SDXL, "
            f"{joint_attention.NAMES} and the Strata mini family."
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
    if METHOD.is_on(model):
        return model
    if joint_attention.family_of(model.model.diffusion_model):
        joint_attention.prepare(model)
        act = joint_attention.around(METHOD.key, _attend_joint)
        METHOD.attach(model, _start, _calculate, act, WrappersMP.APPLY_MODEL)
    else:
        METHOD.attach(model, _start, _calculate, _denoise)
    return model


def _start(entry: dict, options: dict) -> Run:
    token_indices = [indices for _, indices in entry[LAYERS]]
    return Run(token_indices, entry["cross_attn"].shape[1], options.get(METHOD.record_key), options.get(TRAJECTORY))


def _calculate(executor, model, conds: list, x: Tensor, timestep: Tensor, model_options: dict):
    """While maps are mixed in, the conditional estimate comes before the others, which use its maps."""
    options = model_options["transformer_options"]
    run: Run = options[METHOD.run_key]
    if run.layers == 1:
        return executor(model, conds, x, timestep, model_options)
    if run.trajectory is not None:
        x = x.clone()
        x[run.layers - 1 :: run.layers] = run.trajectory(float(timestep.max())).to(x)

    def strength(settings, start: float = 0.0) -> float:
        acts = settings is not None and is_between(start, settings.end_percent, model.model_sampling, timestep)
        return settings.strength if acts else 0.0

    sharing, maps = options.get(SHARING), options.get(MAPS)
    mixing = strength(maps)
    call = Call(
        run,
        strength(sharing, sharing.start_percent) if sharing else 0.0,
        mixing,
        map_places(model.current_patcher) if maps is not None and (mixing or run.record is not None) else [],
        METHOD.conditional(conds),
        sharing and sharing.terms,
        maps and maps.refine,
    )
    if not (call.sharing or call.map_places):
        return executor(model, conds, x, timestep, model_options)

    def calculate(conds: list, conditional: bool = False):
        call_options = {**model_options, "transformer_options": {**options, METHOD.key: call}}
        return executor(model, conds, x, timestep, call_options)

    return conditional_first(conds, call.conditional, calculate) if mixing else calculate(conds)


def _denoise(executor, x: Tensor, timesteps: Tensor, context: Tensor, y, control, options: dict, **kwargs):
    call: Call | None = options.get(METHOD.key)
    if call is not None:
        # Other packs may run the network more than once in a call: each time's maps are its own.
        call.shares.clear()
        call.hidden.clear()
        up = [place for place in transformers(executor.class_obj) if place[0] == "output"]
        options = _patched(options, call, up)
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
    if call.conditional not in chunks:
        return context
    parts = list(context.chunk(len(chunks)))
    rows = parts[chunks.index(call.conditional)]
    offsets = (
        dreamlayer.layer_offsets(call.terms.embedding.to(rows), call.run.token_indices, call.run.tokens) * call.sharing
    )
    scenes, times = len(rows) // len(offsets), rows.shape[1] // call.run.tokens
    parts[chunks.index(call.conditional)] = rows + repeat(
        offsets, "layer token c -> (scene layer) (time token) c", scene=scenes, time=times
    )
    return torch.cat(parts)


def _patched(options: dict, call: Call, up: list[Place]) -> dict:
    replacing, others = {}, {}
    if call.sharing:
        replacing["attn1"] = up, partial(_attend_jointly, call)
    if call.conditional in options["cond_or_uncond"] and call.map_places:
        replacing["attn2"] = call.map_places, partial(_take_maps, call)
        if call.refine is not None:
            others["attn2_patch"] = partial(_take_hidden, call)
    if call.mixing:
        others["attn1_patch"] = partial(_mix, call)
    return with_patches(options, replacing, others)


def _attend_jointly(call: Call, attend: Callable, q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
    joint = dreamlayer.joint_attention(
        q, k, v, call.run.layers, lambda *joined: attend(*joined, options), call.run.trajectory is not None
    )
    return joint if call.sharing == 1 else torch.lerp(attend(q, k, v, options), joint, call.sharing)


def _take_hidden(call: Call, n: Tensor, context: Tensor, value: Tensor, options: dict) -> tuple[Tensor, Tensor, Tensor]:
    if place_of(options) in call.map_places:
        call.hidden.append(call.of_composite(n, options))
    return n, context, value


def _take_maps(call: Call, attend: Callable, q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
    """Takes the maps from the whole picture's rows of the conditional estimate; the last place makes the run's maps of
    the sum.
    """
    call.shares.append(
        dreamlayer.token_shares(
            call.of_composite(q, options),
            call.of_composite(k, options),
            options["n_heads"],
            call.run.token_indices[1:],
        )
    )
    if place_of(options) == call.map_places[-1]:
        _make_maps(call, size_of(options)[0], options)
    return attend(q, k, v, options)


def _make_maps(call: Call, height: int, options: dict) -> None:
    maps = dreamlayer.context_maps(torch.stack(call.shares).sum(0))
    if call.refine is not None:
        maps = call.refine(maps, torch.stack(call.hidden).sum(0).to(maps))
    call.run.maps = rearrange(maps, "b object (h w) -> b object h w", h=height)
    if call.run.record is not None:
        call.run.record.add(call.run.maps, options)


def _mix(call: Call, n: Tensor, context: Tensor, value: Tensor, options: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 9 on what goes into the self-attention: queries, keys and values. Tokens that another patch has added to the
    keys stay as they are.
    """
    if options["block"][0] != "output" or call.run.maps is None:
        return n, context, value
    check_tokens(n, options)
    maps = dreamlayer.resize_maps(call.run.maps, size_of(options))
    maps = (rearrange(maps, "b object h w -> b object (h w)") * call.mixing).to(n)

    def mixed(rows: Tensor) -> Tensor:
        count = maps.shape[-1]
        layers = rearrange(rows, "(scene layer) token c -> scene layer token c", layer=call.run.layers)
        found = dreamlayer.mix_global_in(layers[:, :, :count], maps.repeat(len(layers) // len(maps), 1, 1))
        return rearrange(torch.cat([found, layers[:, :, count:]], 2), "scene layer token c -> (scene layer) token c")

    same = {id(rows): mixed(rows) for rows in (n, context, value)}  # most often all three are one
    return same[id(n)], same[id(context)], same[id(value)]


def _attend_joint(
    call: Call, options: dict, joint: Joint, q: Tensor, k: Tensor, v: Tensor, attend: Callable
) -> Tensor | None:
    """A transformer's joint attention, which is self- and cross-attention in one: the maps are taken from it, and in
    the later blocks maps are mixed in and layers shared.
    """
    if joint.seen == 1:
        call.shares.clear()
    if joint.number in call.map_places and call.conditional in joint.chunks:
        _take_joint_maps(call, options, joint, q, k)
    later = joint.number in joint.family.later(joint.network)
    sharing, mixing = (call.sharing, call.mixing) if later else (0.0, 0.0)
    mixed = _mixed(call, joint, q, k, v) if mixing and call.run.maps is not None else None
    if not (sharing or mixed or joint.padded):
        return None

    def read(reads: list) -> Tensor:
        return joint_rows.attend_rows(q, k, v, joint.image, joint.beside, reads, attend, mixed)

    layers = joint_rows.of_layers(joint.rows, call.run.layers, call.run.trajectory is not None)
    if sharing == 1:
        return read(layers)
    apart = read(joint_rows.of_layers(joint.rows, 1))
    return torch.lerp(apart, read(layers), sharing) if sharing else apart


def _mixed(call: Call, joint: Joint, *rows: Tensor) -> tuple[Tensor, ...]:
    """Eq. 9 on the queries, keys and values of the image tokens."""
    maps = (rearrange(call.run.maps, "b object h w -> b object (h w)") * call.mixing).to(rows[0])
    maps = maps.repeat(joint.rows // call.run.layers // len(maps), 1, 1)
    return tuple(joint_rows.mix_layers(one[:, :, joint.image], maps) for one in rows)


def _take_joint_maps(call: Call, options: dict, joint: Joint, q: Tensor, k: Tensor) -> None:
    """As _take_maps, from the rows of the image and the columns of the prompt in a joint attention.

    Source: dreamlayer, Eq. 3, on joint attention
    Differs: the attention is over prompt and image together, and the prompt's part of it is taken as it is.
    """
    rows = joint.of_estimate(list(range(joint.rows)), call.conditional)[call.run.layers - 1 :: call.run.layers]
    own, length = joint.beside[rows[0]], joint.lengths[rows[0]]
    keys = torch.cat([k[rows, :, part] for part in [*own, joint.image]], 2)
    tokens = [[place for place in places if place < length] for places in call.run.token_indices[1:]]
    asking, keys = joint_attention.flat(q[rows, :, joint.image]), joint_attention.flat(keys)
    call.shares.append(dreamlayer.token_shares(asking, keys, q.shape[1], tokens))
    if joint.number == call.map_places[-1]:
        _make_maps(call, joint.size[0], options)
