"""The attention blocks of a UNet: where they are, what a patch inside them is told, and our patches put around those of
others.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import comfy.ldm.modules.attention as attention
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

Place = tuple[str, int, int]  # block, its number, transformer inside it
# By ComfyUI's name of a model's family: the layer that shows structure, and those that context maps are taken from.
TABLES = json.loads((Path(__file__).parent.parent / "models_config" / "fusion.json").read_text(encoding="utf-8"))


def chosen(table: dict[str, list], model: ModelPatcher) -> list | None:
    """What a table has for a model, by ComfyUI's name of its family or of one that this comes from."""
    config = getattr(model.model, "model_config", None)
    return next((table[kind.__name__] for kind in type(config).__mro__ if kind.__name__ in table), None)


def transformers(unet: nn.Module) -> dict[Place, nn.Module]:
    """Every transformer block by its place, in the order of the model; empty for a model that is no UNet."""
    parts = [
        *(("input", i, part) for i, part in enumerate(getattr(unet, "input_blocks", ()))),
        ("middle", 0, getattr(unet, "middle_block", None) or ()),
        *(("output", i, part) for i, part in enumerate(getattr(unet, "output_blocks", ()))),
    ]
    return {
        (name, number, index): block
        for name, number, part in parts
        for layer in part
        if isinstance(layer, attention.SpatialTransformer)
        for index, block in enumerate(layer.transformer_blocks)
    }


def attend(q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
    """The host's own attention, as a block without a replacing patch calls it."""
    return attention.optimized_attention(
        q, k, v, options["n_heads"], attn_precision=options.get("attn_precision"), transformer_options=options
    )


def with_patches(
    options: dict, replacing: dict[str, tuple[list[Place], Callable]], others: dict[str, Callable] | None = None
) -> dict:
    """Transformer options with our patches around those that are there already, whichever node came first in the graph.

    replacing: {"attn1" or "attn2": (places, own)}, where own(there, q, k, v, options) calls `there`, the patch that
    another node has put there, or the attention. others: {"attn1_patch", "attn1_output_patch" and so on: patch}.
    """
    replace, patches = {**options.get("patches_replace", {})}, {**options.get("patches", {})}
    for name, (places, own) in replacing.items():
        there = replace.get(name, {})
        around = {place: partial(_checked, own, there.get(place, there.get(place[:2], attend))) for place in places}
        replace[name] = {**there, **around}
    for name, own in (others or {}).items():
        patches[name] = [*patches.get(name, []), own]
    return {**options, "patches": patches, "patches_replace": replace}


def _checked(own: Callable, there: Callable, q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
    check_tokens(q, options)
    return own(there, q, k, v, options)


def check_tokens(rows: Tensor, options: dict) -> None:
    """Raises ValueError for queries [B,T,C] that are no longer one row a picture and one token a place: their layers
    could not be told apart.
    """
    shape = options.get("activations_shape")
    if shape is not None and rows.shape[:2] != (shape[0], shape[2] * shape[3]):
        raise ValueError(
            "model: another patch on it (HyperTile, Token merging or one like them) cuts or merges what the attention "
            "works on, so layers cannot be told apart any more; remove that patch."
        )


def place_of(options: dict) -> Place:
    """Where the attention that calls with these options is."""
    return (*options["block"], options["block_index"])


def size_of(options: dict) -> tuple[int, int]:
    """Rows and columns of the tokens."""
    return tuple(options["activations_shape"][2:4])
