"""LayerDiffuse's attention sharing for SD1.5: what every attention of the UNet gets per frame, with the key names of
the published files.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out")


class LowRank(nn.Module):
    def __init__(self, inputs: int, outputs: int, rank: int, operations):
        super().__init__()
        self.down, self.up = operations.Linear(inputs, rank, bias=False), operations.Linear(rank, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


class SharedAttention(nn.Module):
    """Beside one attention of the UNet: low-rank terms per frame, then attention over the frames of every token.

    Source: layerdiffuse, released code (attention sharing of SD1.5)
    """

    to_out_lora: nn.ModuleList

    def __init__(self, widths: dict[str, tuple[int, int]], frames: int, rank: int, control: int, operations):
        """widths: (inputs, outputs) of each projection; control: channels of the picture's features, 0 for none."""
        super().__init__()
        self.frames = frames
        for name in PROJECTIONS:
            self.add_module(
                f"{name}_lora", nn.ModuleList(LowRank(*widths[name], rank, operations) for _ in range(frames))
            )
        width = widths["to_k"][1]
        self.temporal_n = operations.LayerNorm(width, eps=1e-6)
        self.temporal_i, self.temporal_q, self.temporal_k, self.temporal_v, self.temporal_o = (
            operations.Linear(width, width) for _ in range(5)
        )
        if control:
            self.control_convs = nn.ModuleList(
                nn.Sequential(
                    operations.Conv2d(control, control, 3, padding=1), nn.SiLU(), operations.Conv2d(control, width, 1)
                )
                for _ in range(frames)
            )

    def forward(
        self,
        original,
        attention: Callable,
        x: Tensor,
        context: Tensor | None,
        value: Tensor | None,
        control: Tensor | None,
    ) -> Tensor:
        """x: [B·frames,T,C], frame by frame of each picture; control: features [1 or B,·,h,w] with h·w = T. original:
        the UNet's own attention.
        """
        split = partial(rearrange, pattern="(b frame) token c -> frame b token c", frame=self.frames)
        parts = list(split(x))
        if control is not None:
            parts = [
                part + rearrange(conv(control), "b c h w -> b (h w) c")
                for part, conv in zip(parts, self.control_convs, strict=True)
            ]
        keys = parts if context is None else split(context)
        values = keys if value is None else split(value)
        added = [
            self._attend(original, attention, frame, *inputs)
            for frame, inputs in enumerate(zip(parts, keys, values, strict=True))
        ]
        h = torch.stack(parts, 1) + torch.stack(added, 1)
        h = h + self.over_frames(h, original.heads)
        return rearrange(h, "b frame token c -> (b frame) token c") - x

    def _attend(self, original, attention: Callable, frame: int, x: Tensor, context: Tensor, value: Tensor) -> Tensor:
        q, k, v = (
            getattr(original, name)(part) + getattr(self, f"{name}_lora")[frame](part)
            for name, part in (("to_q", x), ("to_k", context), ("to_v", value))
        )
        out = attention(q, k, v)
        return original.to_out(out) + self.to_out_lora[frame](out)

    def over_frames(self, h: Tensor, heads: int) -> Tensor:
        """[B,frames,T,C]; at most three frames, so the products are written out: attention kernels choke on B·T
        pictures of three tokens.
        """
        h = self.temporal_i(self.temporal_n(h))
        q, k, v = (
            rearrange(layer(h), "b frame token (head c) -> b frame token head c", head=heads)
            for layer in (self.temporal_q, self.temporal_k, self.temporal_v)
        )
        scores = torch.einsum("bfthc,bgthc->bthfg", q, k).float() * q.shape[-1] ** -0.5
        attended = torch.einsum("bthfg,bgthc->bfthc", scores.softmax(-1).to(v), v)
        return self.temporal_o(rearrange(attended, "b frame token head c -> b frame token (head c)"))


class PictureFeatures(nn.Module):
    """Features of the given layer's picture at an eighth, a sixteenth, a 32nd and a 64th of its size.

    Source: layerdiffuse, released code (the encoder of SD1.5's conditional files)
    """

    def __init__(self, width: int, operations):
        super().__init__()
        eighth = width // 8

        def block(*widths: tuple[int, int, int]) -> nn.Sequential:
            return nn.Sequential(
                *(
                    layer
                    for inputs, outputs, stride in widths
                    for layer in (operations.Conv2d(inputs, outputs, 3, padding=1, stride=stride), nn.SiLU())
                )
            )

        self.blocks_0 = block(
            (3, eighth, 1),
            (eighth, eighth, 1),
            (eighth, 2 * eighth, 2),
            (2 * eighth, 2 * eighth, 1),
            (2 * eighth, 4 * eighth, 2),
            (4 * eighth, 4 * eighth, 1),
            (4 * eighth, width, 2),
            (width, width, 1),
        )
        self.blocks_1, self.blocks_2, self.blocks_3 = (block((width, width, 2), (width, width, 1)) for _ in range(3))

    def forward(self, picture: Tensor) -> dict[int, Tensor]:
        """picture: [B,3,H,W] in -1..1 -> {number of pixels: features [B,C,h,w]}."""
        features = {}
        for block in (self.blocks_0, self.blocks_1, self.blocks_2, self.blocks_3):
            picture = block(picture)
            features[picture.shape[-2] * picture.shape[-1]] = picture
        return features


class Hookers(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)


class AttentionSharing(nn.Module):
    """A whole published file: keys hookers.layers.N.* and, where a picture is given, kwargs_encoder.*."""

    def __init__(self, attentions: list[dict[str, tuple[int, int]]], frames: int, rank: int, control: int, operations):
        """attentions: widths of the projections of each attention of the UNet, the middle block's last; frames and the
        rest as for one of them.
        """
        super().__init__()
        self.attentions, self.frames = attentions, frames
        self.hookers = Hookers(SharedAttention(widths, frames, rank, control, operations) for widths in attentions)
        if control:
            self.kwargs_encoder = PictureFeatures(control, operations)


def read_shape(weights: dict[str, Tensor]) -> dict:
    """A file's weights -> what AttentionSharing is built from: attentions, frames, rank and control."""
    count = 1 + max(int(key.split(".")[2]) for key in weights if key.startswith("hookers.layers."))
    prefixes = [f"hookers.layers.{i}" for i in range(count)]
    attentions = [
        {
            name: (
                weights[f"{prefix}.{name}_lora.0.down.weight"].shape[1],
                weights[f"{prefix}.{name}_lora.0.up.weight"].shape[0],
            )
            for name in PROJECTIONS
        }
        for prefix in prefixes
    ]
    frames = 1 + max(int(key.split(".")[4]) for key in weights if key.startswith("hookers.layers.0.to_q_lora."))
    encoder = weights.get("kwargs_encoder.blocks_1.0.weight")
    return {
        "attentions": attentions,
        "frames": frames,
        "rank": weights["hookers.layers.0.to_q_lora.0.down.weight"].shape[0],
        "control": 0 if encoder is None else encoder.shape[0],
    }
