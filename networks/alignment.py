"""LayeringDiff's high-frequency alignment: a small UNet on pixels that brings the image's details into a decoded
layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Stage(nn.Sequential):
    def __init__(self, inputs: int, width: int, operations=nn):
        super().__init__(
            operations.Conv2d(inputs, width, 3, padding=1),
            nn.SiLU(),
            operations.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
        )


class Alignment(nn.Module):
    """FAN or BAN: image [B,3,H,W], alpha [B,1,H,W] and the decoded layer [B,3,H,W] -> the layer [B,3,H,W]; any size.

    widths: channels of the levels, each half as large as the one before. A fresh network changes nothing.
    Source: layeringdiff, Sec. 3.3 (HFA: FAN and BAN)
    Differs: the paper does not give widths; the result is added to the decoded layer, and nothing is normalised.
    """

    def __init__(self, widths: tuple[int, ...] | list[int], operations=nn):
        super().__init__()
        self.multiple = 2 ** (len(widths) - 1)
        before = [7, *widths[:-1]]
        self.down = nn.ModuleList(
            Stage(inputs, width, operations) for inputs, width in zip(before, widths, strict=True)
        )
        self.up = nn.ModuleList(
            Stage(low + high, high, operations) for low, high in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.last = operations.Conv2d(widths[0], 3, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, image: Tensor, alpha: Tensor, layer: Tensor) -> Tensor:
        height, width = layer.shape[-2:]
        padding = (0, -width % self.multiple, 0, -height % self.multiple)
        x = F.pad(torch.cat([image, alpha, layer], 1), padding, mode="replicate")
        kept: list[Tensor] = []
        for stage in self.down:
            x = stage(x if not kept else F.avg_pool2d(x, 2))
            kept.append(x)
        x = kept.pop()
        for stage in self.up:
            x = stage(torch.cat([F.interpolate(x, scale_factor=2.0, mode="nearest"), kept.pop()], 1))
        return layer + self.last(x)[..., :height, :width]
