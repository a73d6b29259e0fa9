"""Attention of a few heads, computed the slow way in NumPy."""

import math

import numpy as np
import torch

HEADS, WIDTH = 3, 8


def tokens(seed, *shape, size=2.0):
    return torch.randn(*shape, HEADS * WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * size


def naive_probabilities(q, k):
    """[B,H,M,T] the slow way."""
    q, k = q.double().numpy(), k.double().numpy()
    out = np.empty((len(q), HEADS, q.shape[1], k.shape[1]))
    for b in range(len(q)):
        for h in range(HEADS):
            part = slice(h * WIDTH, (h + 1) * WIDTH)
            logits = q[b, :, part] @ k[b, :, part].T / math.sqrt(WIDTH)
            e = np.exp(logits - logits.max(1, keepdims=True))
            out[b, h] = e / e.sum(1, keepdims=True)
    return out
