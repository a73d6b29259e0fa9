"""DreamLayer's context-aware layers, which make a clean map of an object's place out of what cross-attention tells (Eq.
5).
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from .unet import Attention, FeedForward

HEAD = 32  # width of an attention head; a file of weights does not tell their number


class ContextLayer(nn.Module):
    """Multi-head attention over the places of one map, then a feed-forward network; what they find is added to the map.

    A fresh layer adds nothing.
    Source: dreamlayer, Eq. 5
    Differs: the paper does not say how map and hidden state go in and how the map comes out; here a place is known by
    its value on the map and by the whole picture's hidden state there, and what is found is added to the map and
    clamped to 0..1.
    """

    def __init__(self, width: int, operations=nn):
        super().__init__()
        self.norm, self.map_in = operations.LayerNorm(width), operations.Linear(1, width)
        self.norm1, self.attn = operations.LayerNorm(width), Attention(width, width, width // HEAD, operations)
        self.norm2, self.ff = operations.LayerNorm(width), FeedForward(width, operations)
        self.map_out = operations.Linear(width, 1)
        nn.init.zeros_(self.map_out.weight)
        nn.init.zeros_(self.map_out.bias)

    def forward(self, maps: Tensor, hidden: Tensor) -> Tensor:
        """maps: [B,F,M] in 0..1 of F objects; hidden: [B,M,width], the whole picture's, added up over the layers of the
        model -> [B,F,M] in 0..1.
        """
        x = self.norm(hidden)[:, None] + self.map_in(maps[..., None])
        x = rearrange(x, "scene object token c -> (scene object) token c")
        n = self.norm1(x)
        x = x + self.attn(n, n)
        x = x + self.ff(self.norm2(x))
        return (maps + self.map_out(x).view_as(maps)).clamp(0, 1)


class ContextLayers(nn.ModuleList):
    """One after the other; none leave the maps as they are, which is the mode without training. Shapes: as one layer's.

    Source: dreamlayer, Eq. 5 for n = 1 to N
    """

    def __init__(self, count: int, width: int, operations=nn):
        super().__init__(ContextLayer(width, operations) for _ in range(count))

    def forward(self, maps: Tensor, hidden: Tensor) -> Tensor:
        for layer in self:
            maps = layer(maps, hidden)
        return maps
