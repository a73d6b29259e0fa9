"""One conditioning of three prompts, which knows where the foreground's text ends."""
from __future__ import annotations

import math

import torch
from torch import Tensor

END_TOKENS = "strata_end_tokens"


def encode_prompts(clip, prompts: tuple[str, str, str]) -> list:
    """CONDITIONING whose rows are foreground, background and blended. Raises ValueError for text encoders that are not CLIP alone."""
    tokens = [clip.tokenize(prompt) for prompt in prompts]
    encoded = [clip.encode_from_tokens_scheduled(one) for one in tokens]
    ends = end_tokens(tokens[0], clip.tokenizer)
    return [_join([list(entry) for entry in entries], ends) for entries in zip(*encoded, strict=True)]


def end_tokens(tokens: dict[str, list], tokenizer) -> list[int]:
    """Positions of the end-of-text tokens in the encoded prompt: one for each chunk, of every encoder (SDXL's two agree but for embeddings)."""
    found, start = set(), 0
    for name, chunks in tokens.items():
        end = getattr(getattr(tokenizer, f"clip_{name}", None), "end_token", None)
        if end is None:
            raise ValueError(f"clip: the text encoder {name} has no end token of CLIP's kind; LayerFusion works with those of SD1.5, SD2 and SDXL.")
        start = 0
        for chunk in chunks:
            ids = [token[0] for token in chunk]
            found.add(start + next(i for i, token in enumerate(ids) if not isinstance(token, Tensor | dict) and token == end))
            start += len(chunk)
    return sorted(found)


def _join(entries: list[list], ends: list[int]) -> list:
    """Prompts of different length are repeated to the same one, which changes no attention's result."""
    conds, extras = [entry[0] for entry in entries], [entry[1] for entry in entries]
    length = math.lcm(*(cond.shape[1] for cond in conds))
    own = conds[0].shape[1]
    positions = [start + end for start in range(0, length, own) for end in ends if end < own]
    values = {**extras[0], END_TOKENS: positions}
    pooled = [extra.get("pooled_output") for extra in extras]
    if all(one is not None for one in pooled):
        values["pooled_output"] = torch.cat(pooled)
    return [torch.cat([cond.repeat(1, length // cond.shape[1], 1) for cond in conds]), values]
