"""The words that prompts of rendered scenes are made of, as CLIP's tokens."""
from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from . import scenes

LENGTH = 77
PLAIN = "{what} on a plain gray background"  # what the transparency adapter is trained with


@lru_cache(maxsize=1)
def tokenizer():
    """CLIP's tokenizer, from the files that ComfyUI ships."""
    import host
    from transformers import CLIPTokenizer
    return CLIPTokenizer.from_pretrained(str(host.find_or_install().root / "comfy" / "sd1_tokenizer"))


@lru_cache(maxsize=1)
def token_ids() -> list[int]:
    """CLIP's numbers of every token that a prompt can hold, rising; row i of the trained embedding belongs to number i of this list."""
    words = [prompt for entry in scenes.catalogue().values() for prompt in (entry.name, *entry.prompts)]
    words += [where for places in scenes.PLACE_WORDS.values() for where in places]
    words += [text.format(what="", where="") for text in (*scenes.ARRANGEMENTS, PLAIN)] + [scenes.EMPTY, ", and"]
    return sorted({number for row in tokenizer()(words)["input_ids"] for number in row})


def rows(prompts: list[str]) -> Tensor:
    """[B,77] rows of the embedding, filled up with the end token as ComfyUI does. Raises ValueError for a word that was not trained."""
    place = {number: row for row, number in enumerate(token_ids())}
    numbers = tokenizer()(prompts, padding="max_length", max_length=LENGTH, truncation=True)["input_ids"]
    try:
        return torch.tensor([[place[number] for number in row] for row in numbers])
    except KeyError as error:
        raise ValueError(f"prompts: {tokenizer().decode([error.args[0]])!r} is in none of the prompts that scenes are described with.") from error
