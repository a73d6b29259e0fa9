"""Attention over prompt and image of several rows, against one masked matrix over all tokens of the batch."""

import math

import numpy as np
import pytest
import torch
from strata.techniques.joint_attention import Reads, attend_rows, mix_layers, of_blending, of_layers

HEADS, WIDTH = 2, 4


def tokens(seed, rows, count):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, HEADS, count, WIDTH, generator=generator, dtype=torch.float64)


def attend(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def masked(q, k, v, seen):
    """[T,C] of one row's queries [H,T,D] to the tokens of the whole batch, seen [T,B,T] where they are read."""
    keys, values = (rows.permute(1, 0, 2, 3).flatten(1, 2).numpy() for rows in (k, v))
    logits = np.where(seen.reshape(len(seen), -1), q.numpy() @ keys.transpose(0, 2, 1) / math.sqrt(WIDTH), -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    found = weights / weights.sum(-1, keepdims=True) @ values
    return torch.from_numpy(found.transpose(1, 0, 2).reshape(len(seen), -1))


@pytest.mark.parametrize("image, count", [((3, 8), 8), ((3, 8), 10), ((0, 5), 9)])
@pytest.mark.parametrize("mix", [False, True])
def test_rows_read_what_they_are_told_and_nothing_else(image, count, mix):
    """Prompt first, with reference tokens behind, or image first; the second row's prompt is one token shorter."""
    q, k, v = (tokens(seed, 3, count) for seed in (1, 2, 3))
    start, stop = image
    beside = [[part for part in (slice(0, start), slice(stop, count)) if part.start < part.stop] for _ in range(3)]
    beside[1] = [slice(1, start), slice(stop, count)] if start else [slice(stop + 1, count)]
    reads = [Reads(0, [0]), Reads(1, [1, 2]), Reads(1, [2, 0])]
    mixed = tuple(tokens(seed, 3, stop - start) for seed in (4, 5, 6)) if mix else None
    found = attend_rows(q, k, v, slice(*image), beside, reads, attend, mixed)

    inside = np.zeros(count, bool)
    inside[start:stop] = True
    own = np.zeros((3, count), bool)
    for row, parts in enumerate(beside):
        for part in parts:
            own[row, part] = True
    images = [rows.clone() for rows in (q, k, v)]
    for new, given in zip(images, mixed or (), strict=False):
        new[:, :, start:stop] = given
    for row, (prompt, others) in enumerate(reads):
        plain, joined = (np.zeros((count, 3, count), bool) for _ in range(2))
        plain[:, row] = own[row] | inside
        joined[:, prompt] |= own[prompt] & ~inside
        for other in others:
            joined[:, other] |= inside
        wanted = masked(q[row], k, v, plain)
        wanted[inside] = masked(images[0][row], images[1], images[2], joined)[inside]
        assert (found[row] - wanted).abs().max() < 1e-12


def test_rows_that_read_themselves_are_a_plain_batch():
    q, k, v = (tokens(seed, 4, 9) for seed in (1, 2, 3))
    found = attend_rows(q, k, v, slice(2, 9), [[slice(2)]] * 4, of_layers(4, 1), attend)
    assert (found - attend(q, k, v)).abs().max() < 1e-12


def test_layers_of_a_scene_read_each_other_and_an_isolated_whole_picture_itself():
    pairs = [(row, list(images)) for row, images in of_layers(4, 2)]
    assert pairs == [(0, [0, 1]), (1, [0, 1]), (2, [2, 3]), (3, [2, 3])]
    assert [list(images) for _, images in of_layers(3, 3, isolated=True)] == [[0, 1, 2], [0, 1, 2], [2]]


def test_background_and_blended_read_both_of_their_images_by_the_backgrounds_prompt():
    found = [(beside, list(images)) for beside, images in of_blending(6)]
    assert found == [(0, [0]), (1, [1, 2]), (1, [1, 2]), (3, [3]), (4, [4, 5]), (4, [4, 5])]
    assert [beside for beside, _ in of_blending(3, own_prompt=True)] == [0, 1, 2]


def test_mixing_is_equation_9_in_every_head():
    """Two scenes of a background, two objects and the whole picture."""
    rows = tokens(1, 8, 5)
    maps = torch.rand(2, 2, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = mix_layers(rows, maps)
    for scene in range(2):
        for layer in range(4):
            row, whole = scene * 4 + layer, rows[scene * 4 + 3]
            weight = maps[scene, layer - 1][None, :, None] if layer in (1, 2) else 0
            assert (found[row] - (whole * weight + rows[row] * (1 - weight))).abs().max() < 1e-15
