"""The words that prompts of rendered scenes are made of, as CLIP's tokens."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..scenes import renderer
from . import settings

LENGTH = 77
PLAIN = "{what} on a plain gray background"


@lru_cache(maxsize=1)
def tokenizer():
    """CLIP's tokenizer, from the files that ComfyUI ships."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(str(settings.clip_tokenizer()))


@lru_cache(maxsize=1)
def token_ids() -> list[int]:
    """CLIP's numbers of every token that a prompt can hold, rising; row i of the trained embedding belongs to number i
    of this list.

    The first is -1: its row stands for every word that training has not seen.
    """
    words = [prompt for entry in renderer.catalogue().values() for prompt in (entry.name, *entry.prompts)]
    words += [where for places in renderer.PLACE_WORDS.values() for where in places]
    words += [text.format(what="", where="") for text in (*renderer.ARRANGEMENTS, PLAIN)] + [renderer.EMPTY, ", and"]
    return sorted({-1} | {number for row in tokenizer()(words)["input_ids"] for number in row})


def clip_ids(prompts: list[str]) -> Tensor:
    """[B,77] of CLIP's numbers, cut after 75 words and filled up with the end token as ComfyUI does."""
    found = tokenizer()(prompts, padding="max_length", max_length=LENGTH, truncation=True)
    return torch.tensor(found["input_ids"])


def rows(prompts: list[str]) -> Tensor:
    """[B,77] rows of the embedding, filled up with the end token as ComfyUI does; 0 for a word that was not trained."""
    place = {number: row for row, number in enumerate(token_ids())}
    return torch.tensor([[place.get(number, 0) for number in row] for row in clip_ids(prompts).tolist()])


def with_unknown(rows: Tensor, share: float, rng: np.random.Generator) -> Tensor:
    """The same rows with a share of the words made unknown, so that training meets row 0."""
    first_special = len(token_ids()) - 2  # start and end have the highest numbers
    hidden = torch.from_numpy(rng.random(rows.shape) < share) & (rows < first_special)
    return rows.masked_fill(hidden, 0)
