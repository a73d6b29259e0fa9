"""BFS's information sharing: what couples the composite's and the foreground's branch of a Flux-Fill, and the files
that hold it, under the released key names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from . import flux

PROJECTIONS, OUT = ("to_q", "to_k", "to_v"), "to_out.0"
SOURCES = ("xy_lora", "yx_lora")  # from the composite to the foreground, and back
CONTENT = ("x_lora", "y_lora")  # what the composite's and the foreground's branch learnt for itself
BLOCKS = {"double": "transformer_blocks", "single": "single_transformer_blocks"}
PAIRINGS = ("paper", "released")

SHARED = re.compile(
    r"(?P<kind>single_transformer_blocks|transformer_blocks)\.(?P<number>\d+)\."
    r"(?:attn1n\.(?P<layer>to_q|to_k|to_v|to_out\.0)\.lora_(?P<part>[AB])\.(?P<source>xy_lora|yx_lora)\.weight"
    r"|attn1n\.(?P<norm>norm_[qk])\.weight|attn1n\.(?P<copy>to_q|to_k|to_v|to_out\.0)\.base_layer\.(?P<end>weight|bias)"
    r"|(?P<mix>conv1n)\.weight)"
)
OWN = re.compile(r"(?P<layer>.+)\.lora_(?P<part>[AB])\.(?P<branch>x_lora|y_lora)\.weight")

Place = tuple[str, int]  # "double" or "single", and the block's number


class LowRank(nn.Module):
    """up(down(x)); zero at first."""

    def __init__(self, width: int, rank: int, operations: Any = nn):
        super().__init__()
        self.down = operations.Linear(width, rank, bias=False)
        self.up = operations.Linear(rank, width, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


class Sharing(nn.Module):
    """The sharing of one block: low-rank terms for each direction on the block's own projections, and the layer that
    turns what was read into what is added. Rows come in pairs, composite and foreground one after the other.

    fused: the last layer sees both branches' messages at once (Eq. 3), not each alone. out: a projection of the
    messages goes before it, with terms of its own, as in the released double blocks.
    Source: bfs, Eq. 2-4
    """

    def __init__(self, width: int, rank: int, fused: bool, out: bool, operations: Any = nn):
        super().__init__()
        names = [*PROJECTIONS, *([OUT] if out else [])]
        self.terms = nn.ModuleDict(
            {
                name.partition(".")[0]: nn.ModuleDict({source: LowRank(width, rank, operations) for source in SOURCES})
                for name in names
            }
        )
        self.mix = operations.Linear(width * (1 + fused), width * (1 + fused), bias=False)
        nn.init.zeros_(self.mix.weight)  # at first nothing is added
        self.fused = fused
        self.norm_q: Tensor | None = None  # [width of a head], where a file has others than the block
        self.norm_k: Tensor | None = None

    def forward(self, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor, pairing: str) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of each row, and keys and values that the row reads: those of its partner. hidden, q, k, v: [2N,T,D],
        the input of the block's projections and what they make of it.

        pairing: whose terms the queries get. "paper": those of the direction that they read along. "released": those of
        the row's own direction, as keys and values do.
        """
        reading = SOURCES[::-1] if pairing == "paper" else SOURCES
        q = q + self._term("to_q", hidden, reading)
        k, v = (rows + self._term(name, hidden, SOURCES) for name, rows in (("to_k", k), ("to_v", v)))
        return q, swapped(k), swapped(v)

    def added(self, messages: Tensor, out: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """What goes to the attention's output [2N,T,D]. out: the block's own projection of it, where there is one."""
        if out is not None:
            messages = out(messages) + self._term("to_out", messages, SOURCES)
        if not self.fused:
            return self.mix(messages)
        both = rearrange(messages, "(n pair) t c -> n t (pair c)", pair=2)
        return rearrange(self.mix(both), "n t (pair c) -> (n pair) t c", pair=2)

    def term(self, name: str, source: str) -> LowRank:
        pairs: Any = self.terms[name.partition(".")[0]]
        return pairs[source]

    def _term(self, name: str, rows: Tensor, sources: tuple[str, ...]) -> Tensor:
        parts = [self.term(name, source)(rows[branch::2]) for branch, source in enumerate(sources)]
        return rearrange(torch.stack(parts), "pair n t c -> (n pair) t c")


def swapped(rows: Tensor) -> Tensor:
    """[2N,T,C]: each row's partner in its place."""
    return rearrange(rearrange(rows, "(n pair) t c -> n pair t c", pair=2).flip(1), "n pair t c -> (n pair) t c")


class Term(NamedTuple):
    """Low-rank terms of a layer's rows from `row` on: up [rows,rank], down [rank,width]."""

    row: int
    up: Tensor
    down: Tensor


@dataclass(frozen=True)
class BackToFront:
    """One file. sharing: by block. content: by branch, then by the host's name of a layer. copies: weights of the base
    that the file repeats, by diffusers' names, to be compared. unknown: keys that nothing here reads.
    """

    name: str
    width: int
    sharing: dict[Place, Sharing]
    content: dict[str, dict[str, list[Term]]]
    pairing: str
    copies: dict[str, Tensor] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()

    def describe(self) -> str:
        counts = [f"{sum(place[0] == kind for place in self.sharing)} {kind}" for kind in BLOCKS]
        one = next(iter(self.sharing.values()))
        ranks = sorted({len(one.term(name, source).down.weight) for name in PROJECTIONS for source in SOURCES})
        own = [f"{len(self.content[branch])} layers" if self.content[branch] else "nothing" for branch in CONTENT]
        return (
            f"BFS for a Flux-Fill of width {self.width}: information is shared in {' and '.join(counts)} blocks (rank "
            f"{', '.join(map(str, ranks))}, {'both messages mixed' if one.fused else 'each message apart'}, queries "
            f"paired as {'in the paper' if self.pairing == 'paper' else 'released'}); the composite's branch has "
            f"{own[0]} of its own, the foreground's {own[1]}"
        )


def is_back_to_front(weights: Mapping[str, Tensor]) -> bool:
    return any(key.endswith("conv1n.weight") and SHARED.fullmatch(_plain(key)) for key in weights)


def recognise(
    name: str, weights: Mapping[str, Tensor], metadata: Mapping[str, str], operations: Any = nn
) -> BackToFront:
    """Raises ValueError for a file that lacks a part of what it has.

    Source: bfs, the released code's key names
    """
    shared: dict[Place, dict[str, Tensor]] = {}
    content: dict[str, dict[str, dict[str, Tensor]]] = {branch: {} for branch in CONTENT}
    copies, unknown = {}, []
    for key, value in weights.items():
        plain = _plain(key)
        if match := SHARED.fullmatch(plain):
            kind = "single" if match["kind"].startswith("single") else "double"
            if match["copy"]:
                copies[f"{match['kind']}.{match['number']}.attn.{match['copy']}.{match['end']}"] = value
            else:
                end = plain.partition(f"{match['number']}.")[2]
                shared.setdefault((kind, int(match["number"])), {})[end] = value
        elif match := OWN.fullmatch(plain):
            content[match["branch"]].setdefault(match["layer"], {})[match["part"]] = value
        else:
            unknown.append(key)
    sharing = {place: _filled(name, place, parts, operations) for place, parts in sorted(shared.items())}
    first = next(iter(sharing.values()))
    width = first.mix.weight.shape[0] // (1 + first.fused)
    alone = all(kind == "single" for kind, _ in sharing) and first.fused
    return BackToFront(
        name,
        width,
        sharing,
        {branch: _hosts(name, layers, width) for branch, layers in content.items()},
        metadata.get("pairing", PAIRINGS[0] if alone else PAIRINGS[1]),
        copies,
        tuple(unknown),
    )


def _plain(key: str) -> str:
    return key.removeprefix("transformer.")


def _filled(name: str, place: Place, parts: dict[str, Tensor], operations: Any) -> Sharing:
    """Raises ValueError."""
    kind, number = place
    block = f"{kind} block {number}"
    layers = [*PROJECTIONS, *([OUT] if any(OUT in end for end in parts) else [])]
    wanted = [f"attn1n.{layer}.lora_{part}.{source}.weight" for layer in layers for part in "AB" for source in SOURCES]
    if missing := [end for end in ["conv1n.weight", *wanted] if end not in parts]:
        raise ValueError(
            f"file: {name} has no {missing[0]} in its {block}; it is damaged or was saved in part, so get it again."
        )
    mix, down = parts["conv1n.weight"], parts["attn1n.to_q.lora_A.xy_lora.weight"]
    width = down.shape[1]
    with torch.device("meta"):  # the file's weights take the place of all
        sharing = Sharing(width, len(down), len(mix) == 2 * width, len(layers) > len(PROJECTIONS), operations)
    sharing.mix.weight = nn.Parameter(mix, requires_grad=False)
    for layer in layers:
        for source in SOURCES:
            term = sharing.term(layer, source)
            for linear, part in ((term.down, "A"), (term.up, "B")):
                linear.weight = nn.Parameter(parts[f"attn1n.{layer}.lora_{part}.{source}.weight"], requires_grad=False)
    sharing.norm_q, sharing.norm_k = (parts.get(f"attn1n.{norm}.weight") for norm in ("norm_q", "norm_k"))
    return sharing


def _hosts(name: str, layers: dict[str, dict[str, Tensor]], width: int) -> dict[str, list[Term]]:
    """Terms by the host's name of a layer, from {diffusers' name: {"A": down, "B": up}}. Raises ValueError."""
    terms: dict[str, list[Term]] = {}
    for layer, parts in layers.items():
        if set(parts) != {"A", "B"}:
            raise ValueError(
                f"file: {name} has one half of {layer}'s low-rank terms; it is damaged or was saved in part, so get it "
                "again."
            )
        host, place = _host_layer(layer)
        terms.setdefault(host, []).append(Term(place * width, parts["B"], parts["A"]))
    return terms


def _host_layer(layer: str) -> tuple[str, int]:
    """The host's layer that holds diffusers' one, and which of its parts that is; all but the last are as wide as the
    model.
    """
    for host, (theirs, table) in flux.BLOCKS.items():
        if match := re.fullmatch(rf"{theirs}\.(\d+)\.(.+)", layer):
            for name, parts in table.items():
                if match[2] in parts:
                    return f"{host}.{match[1]}.{name}", parts.index(match[2])
    for host, parts in flux.LAYERS.items():
        if layer in parts:
            return host, parts.index(layer)
    return layer, 0


def joined(terms: list[Term], rows: int) -> tuple[Tensor, Tensor]:
    """(up, down) of a layer of so many rows, of the terms on some of them."""
    up, column = terms[0].up.new_zeros(rows, sum(term.up.shape[1] for term in terms)), 0
    for term in terms:
        rank = term.up.shape[1]
        up[term.row : term.row + len(term.up), column : column + rank] = term.up
        column += rank
    return up, torch.cat([term.down for term in terms])
