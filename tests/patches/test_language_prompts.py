"""Layer prompts of T5 and Qwen, with the tokenizers that ComfyUI ships and their chat templates."""

import pytest
import torch
from strata.patches.joint_attention import TEXT_LENGTHS
from strata.patches.layer_prompts import END_TOKENS, LAYERS, composite_prompt, encode_layers, encode_prompts

from . import small_encoders

NAMES = {"Flux": "t5xxl", "Qwen-Image": "qwen25_7b", "Z-Image": "qwen3_4b"}
BEHIND = {
    "Flux": "</s>",
    "Qwen-Image": "<|im_end|>\n<|im_start|>assistant\n",
    "Z-Image": "<|im_end|>\n<|im_start|>assistant\n",
}
LAST = {"Flux": "</s>", "Qwen-Image": "<|im_end|>", "Z-Image": "<|im_end|>"}
SCENES = [
    ("an empty street", ["a red apple", "two dogs"]),
    ("a street, at night!", ["apple", "an apple, green", "(a very big:1.3) dog"]),
    ("", ["straße und café", "a street, at night!"]),
    ("a dog a dog", ["a dog", "a dog"]),
    ("ein Haus\nam See", [" ".join(["a long tale of an apple"] * 60), "x"]),
]


@pytest.fixture(scope="module")
def clips():
    made = {}
    return lambda kind: made.setdefault(kind, small_encoders.encoder(kind))


def seen(clip, kind, text):
    """(the ids of the tokens that are in the encoding of a text, their tokenizer): behind the chat template's
    beginning of Qwen-Image, which its encoder leaves out.
    """
    ids = [token for token, _ in clip.tokenize(text)[NAMES[kind]][0]]
    tokenizer = getattr(clip.tokenizer, NAMES[kind]).tokenizer
    if kind == "Qwen-Image":
        user = tokenizer("<|im_start|>user\n")["input_ids"]
        start = next(i for i in range(len(ids)) if ids[i : i + len(user)] == user)
        ids = ids[start + len(user) :]
    return ids, tokenizer


def read(tokenizer, ids):
    return tokenizer.decode(ids).strip(" ,!")  # Qwen has "!," as one token, which is nobody's


def plain(kind, text):
    """Weights are T5's alone; Qwen reads them as words."""
    return (text.replace("(a very big:1.3)", "a very big") if kind == "Flux" else text).strip(" ,!")


@pytest.mark.parametrize("kind", list(NAMES))
@pytest.mark.parametrize("background, objects", SCENES)
def test_the_words_of_each_layer_are_found_in_the_whole_pictures_prompt(clips, kind, background, objects):
    clip = clips(kind)
    ((tokens, values),) = encode_layers(clip, background, objects)
    whole = ", ".join(part for part in [*objects[::-1], background] if part)
    ids, tokenizer = seen(clip, kind, whole)
    assert [prompt for prompt, _ in values[LAYERS]] == [background, *objects]
    for prompt, places in values[LAYERS]:
        words = (
            " ".join(plain(kind, prompt).split()) if kind == "Flux" else plain(kind, prompt)
        )  # T5 knows no line breaks
        assert read(tokenizer, [ids[place] for place in places]) == words
    every = [place for _, places in values[LAYERS] for place in places]
    assert len(every) == len(set(every)) and max(every) < len(ids)
    lengths = values.get(TEXT_LENGTHS, [tokens.shape[1]] * (len(objects) + 2))
    texts = [background, *objects, whole]
    assert len(tokens) == len(texts)
    for row, text, length in zip(tokens, texts, lengths, strict=True):
        alone, extra = clip.encode_from_tokens_scheduled(clip.tokenize(text))[0]
        assert torch.equal(row[:length], alone[0]) and not row[length:].any()
    if kind == "Flux":
        assert torch.equal(values["pooled_output"][-1:], extra["pooled_output"])
    ((single, rest),) = composite_prompt([[tokens, values]])
    assert torch.equal(single, alone) and LAYERS not in rest and TEXT_LENGTHS not in rest


@pytest.mark.parametrize("kind", list(NAMES))
@pytest.mark.parametrize("foreground", ["a red apple", "", "two dogs, running!", " ".join(["a long tale"] * 150)])
def test_the_foregrounds_words_and_their_end_are_found(clips, kind, foreground):
    clip = clips(kind)
    ((tokens, values),) = encode_prompts(clip, (foreground, "a beach", "a red apple on a beach"))
    ids, tokenizer = seen(clip, kind, foreground)
    *words, end = values[END_TOKENS]
    assert tokenizer.decode([ids[place] for place in words]).strip() == foreground
    assert tokenizer.decode([ids[end]]) == LAST[kind]
    behind = tokenizer.decode([token for token in ids[end:] if token or kind != "Flux"])
    assert behind == BEHIND[kind]
    if kind == "Flux":  # all prompts are filled up to 256 tokens, and longer ones are as long as they are
        assert (TEXT_LENGTHS in values) == (len(ids) > 256)
    else:
        assert values[TEXT_LENGTHS][0] == len(ids)
    assert len(tokens) == 3 and "attention_mask" not in values


def test_a_background_alone_is_its_ordinary_encoding(clips):
    for kind in NAMES:
        clip = clips(kind)
        ((tokens, values),) = encode_layers(clip, "a beach", [])
        assert torch.equal(tokens, clip.encode_from_tokens_scheduled(clip.tokenize("a beach"))[0][0])
        assert values[LAYERS] == [("a beach", [])]


def test_sd35_has_clips_tokens_in_front_of_t5s():
    clip = small_encoders.encoder("SD3.5")
    ((tokens, values),) = encode_layers(clip, "an empty street", ["a red apple", "two dogs"])
    text = clip.tokenize("two dogs, a red apple, an empty street")
    ids, front = [token for token, _ in text["t5xxl"][0]], len(text["l"][0])
    assert tokens.shape[1] == front + len(ids)
    for prompt, places in values[LAYERS]:
        assert read(clip.tokenizer.t5xxl.tokenizer, [ids[place - front] for place in places]) == prompt
    clip.cond_stage_model.t5xxl = None
    with pytest.raises(ValueError, match=r"^clip: this text encoder was loaded without T5"):
        encode_layers(clip, "an empty street", ["a red apple"])
