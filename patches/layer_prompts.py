"""Several prompts as the rows of one conditioning, which knows where in it the words of a layer are."""

from __future__ import annotations

import torch
from torch import Tensor

from ..networks.layered_unet import joined_prompt
from ..techniques.shared_layers import global_embedding

END_TOKENS = "strata_end_tokens"  # positions of the ends of the foreground's prompt
# (prompt, indices of its tokens in the whole picture's embedding) for each layer, back to front
LAYERS = "strata_layers"


def encode_prompts(clip, prompts: tuple[str, str, str]) -> list:
    """CONDITIONING whose rows are foreground, background and blended. Raises ValueError for text encoders that are not
    CLIP alone.
    """
    tokens = [clip.tokenize(prompt) for prompt in prompts]
    encoded = [clip.encode_from_tokens_scheduled(one) for one in tokens]
    ends = end_tokens(tokens[0], clip.tokenizer)
    found = []
    for entries in zip(*encoded, strict=True):
        cond, values = _join(entries, clip)
        found.append([cond, {**values, END_TOKENS: _repeated(ends, entries[0][0].shape[1], cond.shape[1])}])
    return found


def encode_layers(clip, background: str, objects: list[str]) -> list:
    """CONDITIONING whose rows are background, objects back to front, and the whole picture; with no object the
    background's alone.

    The whole picture's embedding has the words of all; its pooled form (SDXL) is that of the prompts with commas
    between them.
    Raises ValueError for text encoders that are not CLIP alone.
    """
    prompts = [background, *objects]
    tokens = [clip.tokenize(prompt) for prompt in prompts]
    encoded = [clip.encode_from_tokens_scheduled(one) for one in tokens]
    chunk = len(next(iter(tokens[0].values()))[0])
    ends = [_chunk_ends(end_tokens(one, clip.tokenizer), chunk) for one in tokens]
    if not objects:
        return [[cond, {**values, LAYERS: [(background, [])]}] for cond, values in encoded[0]]
    together = clip.encode_from_tokens_scheduled(clip.tokenize(joined_prompt(prompts)))
    found = []
    for *entries, (_, joined) in zip(*encoded, together, strict=True):
        embedding, token_indices = global_embedding([cond[0] for cond, _ in entries], ends, chunk)
        cond, values = _join([*entries, [embedding[None], joined]], clip)
        token_indices = [_repeated(own, len(embedding), cond.shape[1]) for own in token_indices]
        found.append([cond, {**values, LAYERS: list(zip(prompts, token_indices, strict=True))}])
    return found


def composite_prompt(positive: list) -> list:
    """The whole picture's conditioning alone, of one of encode_layers."""
    cond, values = positive[0]
    values = {key: value for key, value in values.items() if key != LAYERS}
    if values.get("pooled_output") is not None:
        values["pooled_output"] = values["pooled_output"][-1:]
    return [[cond[-1:], values]]


def end_tokens(tokens: dict[str, list], tokenizer) -> list[int]:
    """Positions of the end-of-text tokens in the encoded prompt: one for each chunk, of every encoder (SDXL's two agree
    but for embeddings).
    """
    found = set()
    for name, chunks in tokens.items():
        end = getattr(getattr(tokenizer, f"clip_{name}", None), "end_token", None)
        if end is None:
            raise ValueError(
                f"clip: the text encoder {name} has no end token of CLIP's kind; layer prompts work with those of "
                "SD1.5, SD2 and SDXL."
            )
        start = 0
        for chunk in chunks:
            ids = [token[0] for token in chunk]
            found.add(
                start + next(i for i, token in enumerate(ids) if not isinstance(token, Tensor | dict) and token == end)
            )
            start += len(chunk)
    return sorted(found)


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
