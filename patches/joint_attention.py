"""The joint attention of diffusion transformers, where prompt and image are one sequence: one table of families, and
one hook that gets every such attention of a call.

A row of the table says where the blocks are and where the image is in the sequence; with a test, that is a new family.
The hook is ComfyUI's optimized_attention_override, put there for one call of the model, innermost, around the one that
another pack has put there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from comfy.ldm.flux.model import Flux
from comfy.ldm.lumina.model import NextDiT
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from einops import rearrange
from torch import Tensor, nn

from ..techniques.joint_attention import attend_rows, of_layers
from .kept import Kept

KEY = "strata_joint_attention"
OVERRIDE = "optimized_attention_override"
TEXT_LENGTHS = "strata_text_lengths"  # of each row of a conditioning whose prompts are of several lengths
MEMORY = 1.1  # times a plain batch's: for the keys and values of all layers of a scene, joined for one row at a time


@dataclass(frozen=True)
class Family:
    """A row of the table. blocks: the network's lists of blocks with joint attention, in their order; the first one's
    middle shows best what a word is about.

    text_blocks: a list of blocks before them that the prompt goes through alone. multiple: the network's number that
    prompt and image are each filled up to a multiple of; filler: the module whose output the prompt is filled up in,
    and the network's token for it.
    """

    name: str
    network: type
    blocks: tuple[str, ...]
    text_blocks: str = ""
    multiple: str = ""
    filler: tuple[str, str] = ("", "")

    def counts(self, network: nn.Module) -> list[int]:
        return [len(getattr(network, name)) for name in self.blocks]

    def maps(self, network: nn.Module) -> range:
        """The numbers of the blocks that context maps are taken from: the middle third of the first list.

        Source: ours, in place of the down blocks of dreamlayer, Sec. 3.1
        """
        first = self.counts(network)[0]
        return range(first // 3, max(first // 3 + 1, 2 * first // 3))

    def later(self, network: nn.Module) -> range:
        """The numbers of the second half of all blocks, behind those with the maps.

        Source: ours, in place of the up blocks of dreamlayer, Sec. 3.2
        """
        count = sum(self.counts(network))
        return range(max(count // 2, self.maps(network).stop), count)

    def part(self, network: nn.Module, number: int) -> str:
        """The third of the network that a block is in, by the names that a UNet's parts have."""
        return ("input", "middle", "output")[3 * number // sum(self.counts(network))]


FAMILIES = (
    Family("Flux", Flux, ("double_blocks", "single_blocks")),
    Family("Qwen-Image", QwenImageTransformer2DModel, ("transformer_blocks",)),
    Family(
        "Z-Image",
        NextDiT,
        ("layers",),
        text_blocks="context_refiner",
        multiple="pad_tokens_multiple",
        filler=("cap_embedder", "cap_pad_token"),
    ),
    Family("SD3.5", MMDiT, ("joint_blocks",)),
)
NAMES = ", ".join(family.name for family in FAMILIES)


def family_of(network: nn.Module) -> Family | None:
    return next((family for family in FAMILIES if isinstance(network, family.network)), None)


@dataclass
class Run(Kept):
    """One sampling run. lengths: of the rows of a conditioning's prompts, by its uuid. seen: whether there was a joint
    attention yet; packs that skip calls of the model never skip the first.
    """

    lengths: dict[Any, list[int]]
    seen: bool = False


@dataclass
class Joint:
    """The joint attentions of one call of the model, and where in it the current one is.

    rows: of the batch. chunks: the numbers of the estimates in it. size: rows and columns of the image's tokens. text:
    tokens of the prompts with their padding. lengths: tokens of each row's prompt without padding.
    number: of the block that is attending, and beside: for each row the tokens that count beside the image, its
    prompt's first. seen, other: how many joint attentions and how many of the prompt alone there were so far.
    act(joint, q, k, v, attend) -> [B,T,C], or None for an attention as it would be without the hook; q, k and v are
    [B,H,T,D], attend as attend_rows takes it.
    """

    family: Family
    network: nn.Module
    chunks: list[int]
    rows: int
    size: tuple[int, int]
    text: int
    lengths: list[int]
    act: Callable[[Joint, Tensor, Tensor, Tensor, Callable], Tensor | None]
    number: int = -1
    beside: list[list[slice]] | None = None
    seen: int = 0
    other: int = 0

    @property
    def image(self) -> slice:
        start = self._filled(self.text)
        return slice(start, start + math.prod(self.size))

    @property
    def padded(self) -> bool:
        """Whether a prompt is shorter than the longest one."""
        return any(length < self.text for length in self.lengths)

    def of_estimate(self, rows: list | Tensor, number: int) -> list | Tensor:
        """The rows of one estimate of this call."""
        count, place = self.rows // len(self.chunks), self.chunks.index(number)
        return rows[place * count : (place + 1) * count]

    def _filled(self, tokens: int) -> int:
        multiple = getattr(self.network, self.family.multiple, None) if self.family.multiple else None
        return tokens if multiple is None else math.ceil(tokens / multiple) * multiple

    def __call__(
        self, there: Callable | None, func: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, *args, **kw
    ):
        """ComfyUI's attention `func` with its arguments. there: another pack's override."""
        run = partial(there, func) if there else func
        inside = bool(kw.get("skip_reshape"))
        tokens, keys = (rows.shape[2 if inside else 1] for rows in (q, k))
        if max(tokens, keys) < self.image.stop:
            return self._of_text(run, q, k, v, heads, *args, **kw)
        self._enter(tokens, len(q), keys, kw.get("transformer_options") or {})
        shaped = (
            [q, k, v] if inside else [rows.reshape(*rows.shape[:2], heads, -1).transpose(1, 2) for rows in (q, k, v)]
        )
        given = {name: value for name, value in kw.items() if name not in ("mask", "skip_reshape")}
        out = self.act(self, *shaped, lambda *qkv: run(*qkv, heads, mask=None, skip_reshape=True, **given))
        if out is None:
            return run(q, k, v, heads, *args, **kw)
        if (args[0] if args else kw.get("mask")) is not None:
            raise ValueError(
                "positive or negative: a conditioning has an attention mask, so layers cannot read each other; leave "
                "out the node that has made it (Apply Style Model with a strength, for one)."
            )
        return out

    def _enter(self, tokens: int, rows: int, keys: int, options: dict) -> None:
        """Note where this attention is. Raises ValueError for sequences that are not the family's own."""
        expected = self.image.start + self._filled(math.prod(self.size))
        if rows != self.rows or keys != tokens or (self.family.multiple and tokens != expected):
            raise ValueError(
                "model: another patch or a cache on it cuts, merges or keeps the tokens that its attention works on, "
                "or a conditioning has reference images that this family puts before the image, so layers cannot be "
                "told apart; remove that."
            )
        # Most networks say which block it is; the attentions of the others are counted.
        before = self.family.counts(self.network)[0] if options.get("block_type") == "single" else 0
        self.number = before + options.get("block_index", self.seen)
        self.seen += 1
        behind = [slice(self.image.stop, tokens)] if tokens > self.image.stop else []
        self.beside = [[slice(self._filled(length)), *behind] for length in self.lengths]

    def _of_text(self, run: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, *args, **kw):
        """Attention over the prompt alone, without what fills up the shorter ones."""
        blocks = getattr(self.network, self.family.text_blocks) if self.family.text_blocks else ()
        self.other += 1
        if self.other > len(blocks) or not self.padded:
            return run(q, k, v, heads, *args, **kw)
        given = {name: value for name, value in kw.items() if name != "mask"}
        ends = [self._filled(length) for length in self.lengths]
        parts = [
            run(q[row : row + 1], *(rows[row : row + 1, :, :end] for rows in (k, v)), heads, mask=None, **given)
            for row, end in enumerate(ends)
        ]
        return torch.cat(parts)

    def fill(self, _module: nn.Module, _args: tuple, output: Tensor) -> None:
        """A shorter prompt is filled up as it would be alone."""
        token = getattr(self.network, self.family.filler[1])
        for row, length in zip(output, self.lengths, strict=True):
            row[length:] = token.to(row)


def flat(tokens: Tensor) -> Tensor:
    """[B,H,T,D] -> [B,T,H·D]."""
    return rearrange(tokens, "b head token c -> b token (head c)")


@contextmanager
def hooked(network: nn.Module, x: Tensor, context: Tensor, options: dict, act: Callable) -> Iterator[dict]:
    """Transformer options for one call on latents x [B,C,…,h,w] and prompts [B,T,C], in which `act` gets the joint
    attentions. Raises ValueError when there was none.
    """
    family, patch = family_of(network), network.patch_size
    size = tuple(math.ceil(side / patch) for side in x.shape[-2:])
    lengths = _lengths(options, len(x), context.shape[1])
    joint = Joint(family, network, options["cond_or_uncond"], len(x), size, context.shape[1], lengths, act)
    there, module = options.get(OVERRIDE), getattr(network, family.filler[0], None)
    fills = joint.padded and module is not None and getattr(network, family.multiple) is not None
    hook = module.register_forward_hook(joint.fill) if fills else None
    try:
        yield {**options, OVERRIDE: _Override(joint, there.there if isinstance(there, _Override) else there)}
    finally:
        if hook is not None:
            hook.remove()
    run: Run = options[KEY]
    run.seen = run.seen or joint.seen > 0
    if not run.seen:
        raise ValueError(
            "model: another patch on it replaces its attention, so layers cannot read each other; remove that patch."
        )


class _Override:
    def __init__(self, joint: Joint, there: Callable | None):
        self.joint, self.there = joint, there

    def __call__(self, func: Callable, *args, **kwargs) -> Any:
        return self.joint(self.there, func, *args, **kwargs)


def _lengths(options: dict, rows: int, text: int) -> list[int]:
    """How many tokens of each row's prompt are its own."""
    lengths, chunk = [], rows // len(options["uuids"])
    for name in options["uuids"]:
        own = options[KEY].lengths.get(name, [text])
        lengths += (own * math.ceil(chunk / len(own)))[:chunk]
    return [min(length, text) for length in lengths]


def of_rows(options: dict, rows: slice) -> dict:
    """The options for a call with these rows of every prompt alone."""
    if KEY not in options:
        return options
    return {**options, KEY: Run({name: own[rows] for name, own in options[KEY].lengths.items()})}


def prepare(model: ModelPatcher) -> None:
    """Make this clone of a family in the table know the lengths of its prompts, and ask for the memory; once."""
    if model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY):
        return
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _start)
    model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, _more_memory)
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, _without_padding)


def _start(executor, noise: Tensor, *args, **kwargs):
    guider = executor.class_obj
    entries = [entry for own in guider.conds.values() for entry in own]
    lengths = {entry["uuid"]: entry[TEXT_LENGTHS] for entry in entries if TEXT_LENGTHS in entry}
    guider.model_options["transformer_options"][KEY] = Run(lengths)
    return executor(noise, *args, **kwargs)


def _more_memory(executor, model: ModelPatcher, noise_shape, *args, **kwargs):
    *shape, width = noise_shape
    return executor(model, [*shape, math.ceil(MEMORY * width)], *args, **kwargs)


def around(key: str, act: Callable) -> Callable:
    """The wrapper of a model's calls (APPLY_MODEL, since not every network lets itself be wrapped) whose options have
    a method's call under `key`: act(call, options, joint, q, k, v, attend) gets the joint attentions.
    """

    def apply(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):  # noqa: B006
        options = transformer_options
        if (call := options.get(key)) is None:
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        own = partial(act, call, options)
        with hooked(executor.class_obj.diffusion_model, x, c_crossattn, options, own) as options:
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    return apply


def _without_padding(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):  # noqa: B006
    """Where nothing else acts, each row still reads its own prompt alone."""
    options, run = transformer_options, transformer_options.get(KEY)
    if run is None or not run.lengths or isinstance(options.get(OVERRIDE), _Override):
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    with hooked(executor.class_obj.diffusion_model, x, c_crossattn, options, apart) as options:
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)


def apart(joint: Joint, q: Tensor, k: Tensor, v: Tensor, attend: Callable) -> Tensor | None:
    """Each row by itself; None where all prompts have one length, since that needs no hook."""
    return attend_rows(q, k, v, joint.image, joint.beside, of_layers(joint.rows, 1), attend) if joint.padded else None
