"""Several prompts as the rows of one conditioning, which knows where in it the words of a layer are.

CLIP gives chunks with a start and an end, whose rows are brought to one length. T5 and Qwen give one sequence of any
length: rows are filled up with zeros, and the conditioning knows each one's length, since in a transformer's attention
every token counts.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor

from ..networks.layered_unet import joined_prompt
from ..techniques.shared_layers import global_embedding
from .joint_attention import TEXT_LENGTHS

MARKER = re.compile(r"\s*(?:[-*•]|\d+[.)])\s+")
BACKGROUND = re.compile(r"background\s*:\s*(.*)", re.IGNORECASE)
END_TOKENS = "strata_end_tokens"  # positions of the ends of the foreground's prompt
# (prompt, indices of its tokens in the whole picture's embedding) for each layer, back to front
LAYERS = "strata_layers"
# What ends a prompt, of text encoders whose tokens a transformer reads (beside CLIP's, of which Flux takes the pooled
# form alone, and which stand in front with SD3.5): T5's end, and the end of Qwen's turn in its chat template.
ENDS = {"t5xxl": 1, "qwen25_7b": 151645, "qwen3_4b": 151645}


def split_prompts(background: str, objects: str) -> tuple[str, list[str]]:
    """The background's prompt and the objects', back to front, of texts as people and language models write them: one
    object a line, a number or a dash in front of it does not count, and a line `background: …` may stand among them.

    Raises ValueError for two backgrounds.
    Source: dreamlayer, Appendix A (a language model splits a sentence into the layers' prompts)
    """
    prompts, backgrounds = [], [background.strip()] if background.strip() else []
    for line in objects.splitlines():
        words = MARKER.sub("", line).strip()
        if named := BACKGROUND.match(words):
            backgrounds += [named[1]] if named[1] else []
        elif words:
            prompts.append(words)
    if len(backgrounds) > 1:
        raise ValueError(
            f"background: there are several, {' and '.join(map(repr, backgrounds))}; leave one of them, the input or a "
            "line of objects."
        )
    return (backgrounds or [""])[0], prompts


def encode_prompts(clip, prompts: tuple[str, str, str]) -> list:
    """CONDITIONING whose rows are foreground, background and blended. Raises ValueError for text encoders that are not
    known.
    """
    tokens = [clip.tokenize(prompt) for prompt in prompts]
    encoded = [clip.encode_from_tokens_scheduled(one) for one in tokens]
    if name := _language(tokens[0], clip):
        (words,), end, count = _words(clip, name, [prompts[0]])
        conditioning = []
        for entries in zip(*encoded, strict=True):
            cond, values = _filled(entries)
            conditioning.append([cond, {**values, END_TOKENS: _shifted([*words, end], count, entries[0][0])}])
        return conditioning
    ends = end_tokens(tokens[0], clip.tokenizer)
    conditioning = []
    for entries in zip(*encoded, strict=True):
        cond, values = _join(entries, clip)
        conditioning.append([cond, {**values, END_TOKENS: _repeated(ends, entries[0][0].shape[1], cond.shape[1])}])
    return conditioning


def encode_layers(clip, background: str, objects: list[str]) -> list:
    """CONDITIONING whose rows are background, objects back to front, and the whole picture; with no object the
    background's alone.

    The whole picture's embedding has the words of all; its pooled form (SDXL, Flux) is that of the prompts with commas
    between them. Raises ValueError for text encoders that are not known.
    """
    prompts = [background, *objects]
    tokens = [clip.tokenize(prompt) for prompt in prompts]
    encoded = [clip.encode_from_tokens_scheduled(one) for one in tokens]
    name = _language(tokens[0], clip)
    ends = [] if name else [end_tokens(one, clip.tokenizer) for one in tokens]
    if not objects:
        return [[cond, {**values, LAYERS: [(background, [])]}] for cond, values in encoded[0]]
    parts = [prompt for prompt in [*objects[::-1], background] if prompt]
    together = clip.encode_from_tokens_scheduled(clip.tokenize(joined_prompt(prompts)))
    rows = zip(*encoded, together, strict=True)
    if name:
        words, _, count = _words(clip, name, parts)
        words = [*([] if background else [[]]), *words[::-1]]  # back to front
        found = [(*_filled(entries), [_shifted(own, count, entries[-1][0]) for own in words]) for entries in rows]
    else:
        chunk = len(next(iter(tokens[0].values()))[0])
        found = [
            _with_words_of_all(entries, [_chunk_ends(own, chunk) for own in ends], chunk, clip) for entries in rows
        ]
    return [[cond, {**values, LAYERS: list(zip(prompts, places, strict=True))}] for cond, values, places in found]


def _with_words_of_all(entries: list, ends: list[list[int]], chunk: int, clip) -> tuple[Tensor, dict, list[list[int]]]:
    """CLIP's rows of the layers and, with the words of all, of the whole picture, which has the last entry's rest."""
    *entries, (_, joined) = entries
    embedding, token_indices = global_embedding([cond[0] for cond, _ in entries], ends, chunk)
    cond, values = _join([*entries, [embedding[None], joined]], clip)
    return cond, values, [_repeated(own, len(embedding), cond.shape[1]) for own in token_indices]


def composite_prompt(positive: list) -> list:
    """The whole picture's conditioning alone, of one of encode_layers."""
    cond, values = positive[0]
    length = values.get(TEXT_LENGTHS, [cond.shape[1]])[-1]
    values = {key: value for key, value in values.items() if key not in (LAYERS, TEXT_LENGTHS)}
    if values.get("pooled_output") is not None:
        values["pooled_output"] = values["pooled_output"][-1:]
    return [[cond[-1:, :length], values]]


def end_tokens(tokens: dict[str, list], tokenizer) -> list[int]:
    """Positions of the end-of-text tokens in the encoded prompt: one for each chunk, of every encoder (SDXL's two agree
    but for embeddings).
    """
    positions = set()
    for name, chunks in tokens.items():
        end = getattr(getattr(tokenizer, f"clip_{name}", None), "end_token", None)
        if end is None:
            raise ValueError(
                f"clip: the text encoder {name} has no end token of CLIP's kind; layer prompts work with those of "
                "SD1.5, SD2, SDXL, Flux, Qwen-Image, Z-Image and SD3.5."
            )
        start = 0
        for chunk in chunks:
            ids = [token[0] for token in chunk]
            positions.add(
                start + next(i for i, token in enumerate(ids) if not isinstance(token, Tensor | dict) and token == end)
            )
            start += len(chunk)
    return sorted(positions)


def _chunk_ends(ends: list[int], chunk: int) -> list[int]:
    """One end a chunk, the later one where two encoders differ."""
    return list({end // chunk: end for end in ends}.values())


def _join(entries: list[list], clip) -> tuple[Tensor, dict]:
    """Prompts brought to the length of the longest: repeated where that comes out even, which changes no attention's
    result, and otherwise filled up with chunks of the empty prompt. The least common multiple of lengths would be tens
    of thousands of tokens for long prompts.
    """
    conds, extras = [entry[0] for entry in entries], [entry[1] for entry in entries]
    length = max(cond.shape[1] for cond in conds)
    values = {**extras[0]}
    pooled = [extra.get("pooled_output") for extra in extras]
    if all(one is not None for one in pooled):
        values["pooled_output"] = torch.cat(pooled)
    if any(length % cond.shape[1] for cond in conds):
        empty = clip.encode_from_tokens_scheduled(clip.tokenize(""))[0][0]
        conds = [
            torch.cat([cond, empty.repeat(1, (length - cond.shape[1]) // empty.shape[1], 1)], 1)
            if length % cond.shape[1]
            else cond
            for cond in conds
        ]
    return torch.cat([cond.repeat(1, length // cond.shape[1], 1) for cond in conds]), values


def _repeated(places: list[int], own: int, length: int) -> list[int]:
    """Positions in the first `own` tokens, in all repetitions up to `length`; those alone when it is no multiple of
    `own`.
    """
    return [
        start + place for start in range(0, own if length % own else length, own) for place in places if place < own
    ]


def _language(tokens: dict[str, list], clip) -> str | None:
    """The name of the tokens that a transformer reads; None for CLIP, and for what is not known. Raises ValueError."""
    name = next((name for name in ENDS if {name} == set(tokens) - {"l", "g"}), None)
    if name == "t5xxl" and getattr(clip.cond_stage_model, name, None) is None:
        raise ValueError("clip: this text encoder was loaded without T5, whose words layers need; load it with T5.")
    return name


def _words(clip, name: str, parts: list[str]) -> tuple[list[list[int]], int, int]:
    """Where the words of each part are in the tokens of all parts with commas between them, the place of their end, and
    the number of all tokens. Found by how far the tokens of longer and longer beginnings agree: a chat template's own
    words are the same in all of them.

    Source: layerfusion, Alg. 2, what the content prior is the attention to
    Differs: for T5 and Qwen the foreground's words count with the end: T5's end sums nothing up, as CLIP's does.
    Source: dreamlayer, Sec. 3 Overview, the whole picture's embedding
    Differs: for T5 and Qwen it is the embedding of the prompts with commas between them, the nearest object first, in
    which each layer's tokens are found; these encoders were trained on whole prompts, Qwen's in one chat template.
    """

    def encode(text: str) -> list:
        return [token[0] for chunk in clip.tokenize(text)[name] for token in chunk]

    tokens = encode(", ".join(parts))
    end = max(place for place, token in enumerate(tokens) if not isinstance(token, Tensor) and token == ENDS[name])
    positions = []
    for number in range(len(parts)):
        before = "".join(f"{part}, " for part in parts[:number])
        first, last = (_agreement(encode(text), tokens) for text in (before, before + parts[number]))
        positions.append(list(range(first, min(last, end))))
    return positions, end, len(tokens)


def _agreement(tokens: list, others: list) -> int:
    """How many tokens are the same from the start; an embedding's are vectors."""
    pairs = enumerate(zip(tokens, others, strict=False))
    differ = (place for place, (one, other) in pairs if type(one) is not type(other) or not _same(one, other))
    return next(differ, min(len(tokens), len(others)))


def _same(one: Tensor | int, other: Tensor | int) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


def _shifted(places: list[int], count: int, cond: Tensor) -> list[int]:
    """Places among `count` tokens in the encoded prompt: a chat template's beginning is left out of it, and SD3.5 puts
    CLIP's tokens in front.
    """
    shift = cond.shape[1] - count
    return [place + shift for place in places if place + shift >= 0]


def _filled(entries: list[list]) -> tuple[Tensor, dict]:
    """Prompts of one sequence each, filled up to the longest. Masks of single ones would say nothing of the rows."""
    conds, extras = [entry[0] for entry in entries], [entry[1] for entry in entries]
    lengths = [cond.shape[1] for cond in conds]
    values = {key: value for key, value in extras[0].items() if key != "attention_mask"}
    pooled = [extra.get("pooled_output") for extra in extras]
    if all(one is not None for one in pooled):
        values["pooled_output"] = torch.cat(pooled)
    if len(set(lengths)) > 1:
        values[TEXT_LENGTHS] = lengths
    return torch.cat([F.pad(cond, (0, 0, 0, max(lengths) - cond.shape[1])) for cond in conds]), values
