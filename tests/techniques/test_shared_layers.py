"""DreamLayer's formulas against plain loops over whole attention matrices in float64."""

import numpy as np
import pytest
import torch
from strata.networks.context_layers import ContextLayers
from strata.techniques import fusion, shared_layers

from .attention_helpers import HEADS, WIDTH, naive_probabilities, tokens


def soft_attention(q, k, v):
    """[B,M,C] of numpy's, from naive_probabilities."""
    parts = v.double().unflatten(-1, (HEADS, WIDTH)).permute(0, 2, 1, 3).numpy()
    return torch.from_numpy(naive_probabilities(q, k) @ parts).permute(0, 2, 1, 3).flatten(2)


@pytest.mark.parametrize("rows", [1, 7, 10**6])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
def test_shares_and_maps_are_equations_3_and_4(monkeypatch, rows, dtype, tolerance):
    words = [[1, 2], [3], [5, 6, 7]]
    layers = [(tokens(2 * j, 2, 30).to(dtype), tokens(2 * j + 1, 2, 11).to(dtype)) for j in range(3)]
    monkeypatch.setattr(fusion, "MOST_PROBABILITIES", rows * HEADS * 11)
    expected = np.zeros((2, 3, 30))
    for q, k in layers:
        attention = naive_probabilities(q, k).mean(1)
        for b in range(2):
            for f, own in enumerate(words):
                for m in range(30):
                    expected[b, f, m] += sum(attention[b, m, token] for token in own)
    shares = torch.stack([shared_layers.token_shares(q, k, HEADS, words) for q, k in layers]).sum(0)
    assert np.abs(shares.numpy() - expected).max() < tolerance
    low, high = expected.min(2, keepdims=True), expected.max(2, keepdims=True)
    assert np.abs(shared_layers.context_maps(shares).numpy() - (expected - low) / (high - low)).max() < 10 * tolerance


def test_a_map_without_words_is_empty():
    shares = shared_layers.token_shares(tokens(0, 1, 6), tokens(1, 1, 4), HEADS, [[], [1]])
    assert (shared_layers.context_maps(shares)[0, 0] == 0).all() and shared_layers.context_maps(shares)[0, 1].max() == 1


def test_mixing_is_equation_9():
    layers, maps = (
        tokens(0, 2, 4, 5),
        torch.rand(2, 2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
    )
    found = shared_layers.mix_global_in(layers, maps)
    for b in range(2):
        for i in range(4):
            for m in range(5):
                share = maps[b, i - 1, m] if i in (1, 2) else 0
                assert torch.allclose(
                    found[b, i, m], layers[b, 3, m] * share + layers[b, i, m] * (1 - share), rtol=0, atol=1e-12
                )


@pytest.mark.parametrize("keys", [6, 9])
def test_joint_attention_is_equations_10_and_11(keys):
    """keys: more keys than queries is what other nodes' patches make."""
    q, k, v = tokens(0, 8, 6), tokens(1, 8, keys), tokens(2, 8, keys)
    calls = []

    def attend(*parts):
        calls.append([part.shape for part in parts])
        return soft_attention(*parts)

    found = shared_layers.joint_attention(q, k, v, 4, attend)
    for b in range(2):
        all_keys, all_values = (torch.cat([values[4 * b + i] for i in range(4)])[None] for values in (k, v))
        for i in range(4):
            assert torch.allclose(
                found[4 * b + i], soft_attention(q[4 * b + i][None], all_keys, all_values)[0], rtol=0, atol=1e-12
            )
    assert calls == [[(2, 24, HEADS * WIDTH), (2, 4 * keys, HEADS * WIDTH), (2, 4 * keys, HEADS * WIDTH)]], (
        "keys are not repeated for every layer"
    )


def test_one_layer_attends_to_itself():
    q, k, v = (tokens(seed, 3, 6) for seed in range(3))
    assert torch.equal(shared_layers.joint_attention(q, k, v, 1, soft_attention), soft_attention(q, k, v))


def test_the_global_embedding_has_the_words_of_all_in_order():
    layers = [tokens(seed, 8) for seed in range(3)]
    ends = [[3], [4], [2]]  # start, words, end, padding
    found, positions = shared_layers.global_embedding(layers, ends, chunk=8)
    assert positions == [[1, 2], [3, 4, 5], [6]] and found.shape == (8, HEADS * WIDTH)
    for layer, own, end in zip(layers, positions, ends, strict=True):
        assert torch.equal(found[own], layer[1 : end[0]])
    assert torch.allclose(found[0], sum(layer[0] for layer in layers) / 3, rtol=0, atol=1e-12)
    assert torch.allclose(
        found[7], sum(layer[end[0]] for layer, end in zip(layers, ends, strict=True)) / 3, rtol=0, atol=1e-12
    )


def test_what_does_not_fit_into_a_chunk_goes_into_the_next():
    """A prompt of two chunks, and words that need a third of their own; padding that a prompt lacks repeats
    its last.
    """
    layers, ends = [tokens(0, 16), tokens(1, 8), tokens(2, 8)], [[7, 11], [7], [5]]
    found, positions = shared_layers.global_embedding(layers, ends, chunk=8)
    assert [len(own) for own in positions] == [8, 6, 4] and len(found) == 24
    assert torch.equal(found[positions[0]], torch.cat([layers[0][1:7], layers[0][9:11]]))
    for place in range(19, 24):
        tails = [layers[0][11:], layers[1][7:], layers[2][5:]]
        assert torch.allclose(
            found[place], sum(tail[min(place - 19, len(tail) - 1)] for tail in tails) / 3, rtol=0, atol=1e-12
        )


def test_maps_at_other_sizes():
    maps = torch.arange(8.0).reshape(1, 1, 2, 4) / 7
    assert shared_layers.resize_maps(maps, (2, 4)) is maps
    assert torch.allclose(
        shared_layers.resize_maps(maps, (1, 2)), torch.tensor([[[[2.5, 4.5]]]]) / 7, rtol=1e-6, atol=1e-8
    )
    larger = shared_layers.resize_maps(maps, (4, 8))
    assert larger[0, 0, 0, 0] == 0 and torch.allclose(
        larger[0, 0, 0, :4], torch.tensor([0, 0.25, 0.75, 1.25]) / 7, rtol=1e-6, atol=1e-8
    )
    wider = shared_layers.resize_maps(maps, (2, 8))[0, 0]
    expected = [np.interp(np.arange(8) / 2 - 0.25, np.arange(4), row) for row in maps[0, 0].numpy()]
    assert np.allclose(wider, expected, rtol=0, atol=1e-6), "linear where one side alone is larger"
    alphas = shared_layers.map_alphas(maps, (2, 4), low=1 / 7, high=3 / 7)
    assert torch.allclose(alphas.flatten(), torch.tensor([0, 0, 0.5, 1, 1, 1, 1, 1]), rtol=1e-6, atol=1e-8)
    # A straight line between the two, where nothing else is asked for.
    level = torch.tensor([0.2, 0.3, 0.35, 0.45, 0.6, 0.7])
    alphas = shared_layers.map_alphas(level.view(1, 1, 2, 3), (2, 3)).flatten()
    assert np.allclose(alphas, np.interp(level, [0.3, 0.6], [0, 1]), rtol=0, atol=1e-6)


def test_the_layer_embedding_is_that_of_layers_embedded_before_they_are_joined():
    layers, ends = [tokens(seed, 8) for seed in range(4)], [[3], [4], [2], [2]]
    embedding = tokens(9, 3)  # of three layers: the fourth has the third's
    _, positions = shared_layers.global_embedding(layers, ends, chunk=8)
    found = shared_layers.layer_offsets(embedding, positions, 16)
    embedded = [layer + embedding[min(i, 2)] for i, layer in enumerate(layers)]
    for number, (layer, plain) in enumerate(zip(embedded, layers, strict=True)):
        assert torch.allclose(plain + found[number, :8], layer, rtol=0, atol=1e-12)
    composite, wanted = (shared_layers.global_embedding(given, ends, chunk=8)[0] for given in (layers, embedded))
    assert torch.allclose(composite + found[4, : len(composite)], wanted, rtol=0, atol=1e-12) and found.shape == (
        5,
        16,
        HEADS * WIDTH,
    )


def test_the_distance_of_maps_is_equations_6_and_7():
    maps, others = torch.rand(2, 2, 3, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = shared_layers.map_distance(maps, others)
    for b in range(2):
        norms = [sum((maps[b, f, m] - others[b, f, m]) ** 2 for m in range(20)) ** 0.5 for f in range(3)]
        assert abs(found[b] - sum(norms) / 20**0.5) < 1e-12
    same = maps.requires_grad_(True)
    shared_layers.map_distance(same, maps.detach()).sum().backward()
    assert (same.grad == 0).all(), "equal maps pull nowhere"


def test_a_context_layer_is_equation_5():
    """Attention over the places of each object's map, then the gated feed-forward network, place by place; two layers
    are one after the other.
    """
    width, heads, places = 64, 2, 6
    torch.manual_seed(0)
    layers = ContextLayers(2, width).double()
    maps, hidden = torch.rand(2, 3, places, dtype=torch.float64), torch.randn(2, places, width, dtype=torch.float64)
    assert torch.equal(layers(maps, hidden), maps), "fresh ones leave the maps"
    for value in layers.parameters():
        value.data += 0.2 * torch.randn_like(value)

    def norm(module, x):
        return (x - x.mean()) / (x.var(unbiased=False) + module.eps) ** 0.5 * module.weight + module.bias

    def layer_by_hand(layer, plain, state):
        x = [
            norm(layer.norm, state[m]) + layer.map_in.weight[:, 0] * plain[m] + layer.map_in.bias for m in range(places)
        ]
        n = [norm(layer.norm1, one) for one in x]
        q, k, v = (
            [(module.weight @ one).view(heads, -1) for one in n]
            for module in (layer.attn.to_q, layer.attn.to_k, layer.attn.to_v)
        )
        found = []
        for m in range(places):
            heard = torch.zeros(heads, width // heads, dtype=torch.float64)
            for h in range(heads):
                weights = torch.stack(
                    [(q[m][h] * k[other][h]).sum() / (width / heads) ** 0.5 for other in range(places)]
                ).exp()
                heard[h] = sum(weights[other] / weights.sum() * v[other][h] for other in range(places))
            y = x[m] + layer.attn.to_out[0].weight @ heard.flatten() + layer.attn.to_out[0].bias
            value, gate = (layer.ff.net[0].proj.weight @ norm(layer.norm2, y) + layer.ff.net[0].proj.bias).chunk(2)
            y = (
                y
                + layer.ff.net[2].weight @ (value * gate * 0.5 * (1 + torch.erf(gate / 2**0.5)))
                + layer.ff.net[2].bias
            )
            found.append((plain[m] + layer.map_out.weight[0] @ y + layer.map_out.bias[0]).clamp(0, 1))
        return torch.stack(found)

    with torch.no_grad():
        found = layers(maps, hidden)
        for b in range(2):
            for f in range(3):
                wanted = layer_by_hand(layers[1], layer_by_hand(layers[0], maps[b, f], hidden[b]), hidden[b])
                assert torch.allclose(found[b, f], wanted, rtol=0, atol=1e-12)
    assert ((found > 0) & (found < 1)).double().mean() > 0


@pytest.mark.parametrize("own", [0.0, 0.2, 0.5, 1.0])
def test_noise_keeps_its_variance_and_shares_what_is_not_its_own(own):
    shared, first, second = torch.eye(3, dtype=torch.float64)  # independent and of one length, as noise is on average
    one, other = (shared_layers.share_noise(shared, each, own) for each in (first, second))
    assert one @ one == pytest.approx(1) and one @ other == pytest.approx(1 - own)
    assert one @ first == pytest.approx(own**0.5) and one @ shared == pytest.approx((1 - own) ** 0.5)
