"""CLIP's text encoder at any size, with the key names of ComfyUI's CLIPTextModel, over a vocabulary of chosen
tokens.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            rearrange(layer(x), "b token (head c) -> b head token c", head=self.heads)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(rearrange(h, "b head token c -> b token (head c)"))


class FeedForward(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))  # CLIP's quick GELU


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, inner: int):
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn, self.mlp = Attention(width, heads), FeedForward(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    def __init__(self, width: int, words: int, positions: int):
        super().__init__()
        self.token_embedding, self.position_embedding = nn.Embedding(words, width), nn.Embedding(positions, width)
        for table in (self.token_embedding, self.position_embedding):
            nn.init.normal_(table.weight, std=0.1)


class Encoder(nn.Module):
    def __init__(self, width: int, heads: int, inner: int, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, heads, inner) for _ in range(layers))


class TextEncoder(nn.Module):
    """words: how many tokens have an embedding; the checkpoint lists them as cond_stage_model.token_ids."""

    def __init__(
        self,
        words: int,
        hidden_size: int,
        num_hidden_layers: int,
        num_attention_heads: int,
        intermediate_size: int,
        max_position_embeddings: int = 77,
    ):
        super().__init__()
        self.embeddings = Embeddings(hidden_size, words, max_position_embeddings)
        self.encoder = Encoder(hidden_size, num_attention_heads, intermediate_size, num_hidden_layers)
        self.final_layer_norm = nn.LayerNorm(hidden_size)

    def forward(self, rows: Tensor) -> Tensor:
        """rows: [B,77] int, rows of the embedding table -> [B,77,hidden_size]."""
        x = self.embeddings.token_embedding(rows) + self.embeddings.position_embedding.weight[: rows.shape[1]]
        for layer in self.encoder.layers:
            x = layer(x)
        return self.final_layer_norm(x)
