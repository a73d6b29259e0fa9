"""LayerDiffuse's transparent decoder and offset encoder at any width, with the key names of the published files."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

GROUPS = 4
HEAD = 8
LATENT_BLOCK = 3  # the latent joins before this block, where the picture has been halved three times


class Resnet(nn.Module):
    def __init__(self, inputs: int, outputs: int, operations):
        super().__init__()
        self.norm1, self.conv1 = (
            operations.GroupNorm(GROUPS, inputs, eps=1e-5),
            operations.Conv2d(inputs, outputs, 3, padding=1),
        )
        self.norm2, self.conv2 = (
            operations.GroupNorm(GROUPS, outputs, eps=1e-5),
            operations.Conv2d(outputs, outputs, 3, padding=1),
        )
        self.conv_shortcut = nn.Identity() if inputs == outputs else operations.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        return self.conv2(F.silu(self.norm2(h), inplace=True)).add_(self.conv_shortcut(x))


class Attention(nn.Module):
    """Over all pixels, eight channels per head."""

    def __init__(self, width: int, operations):
        super().__init__()
        self.group_norm = operations.GroupNorm(GROUPS, width, eps=1e-5)
        self.to_q, self.to_k, self.to_v = (operations.Linear(width, width) for _ in range(3))
        self.to_out = nn.Sequential(operations.Linear(width, width), nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        h = rearrange(self.group_norm(x), "b c h w -> b (h w) c")
        q, k, v = (
            rearrange(layer(h), "b token (head c) -> b head token c", c=HEAD)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        h = self.to_out(rearrange(F.scaled_dot_product_attention(q, k, v), "b head token c -> b token (head c)"))
        return rearrange(h.transpose(1, 2), "b c (h w) -> b c h w", h=x.shape[2]).add_(x)


class Resample(nn.Module):
    """Half or twice the size."""

    def __init__(self, width: int, operations, up: bool):
        super().__init__()
        self.up = up
        self.conv = operations.Conv2d(width, width, 3, padding=1, stride=1 if up else 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2) if self.up else x)


class Stage(nn.Module):
    """Residual blocks, each followed by attention where there is any."""

    def __init__(self, widths: Sequence[tuple[int, int]], attention: bool, operations):
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(inputs, outputs, operations) for inputs, outputs in widths)
        if attention:
            self.attentions = nn.ModuleList(Attention(outputs, operations) for _, outputs in widths)

    def layers(self):
        attentions = getattr(self, "attentions", [nn.Identity()] * len(self.resnets))
        return zip(self.resnets, attentions, strict=True)


class DownStage(Stage):
    def __init__(self, inputs: int, outputs: int, count: int, attention: bool, last: bool, operations):
        super().__init__([(inputs if i == 0 else outputs, outputs) for i in range(count)], attention, operations)
        self.downsamplers = nn.ModuleList([] if last else [Resample(outputs, operations, up=False)])

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        kept = []
        for resnet, attention in self.layers():
            x = attention(resnet(x))
            kept.append(x)
        for layer in self.downsamplers:
            x = layer(x)
            kept.append(x)
        return x, kept


class UpStage(Stage):
    def __init__(self, inputs: int, skips: Sequence[int], outputs: int, attention: bool, last: bool, operations):
        super().__init__(
            [((inputs if i == 0 else outputs) + skip, outputs) for i, skip in enumerate(skips)], attention, operations
        )
        self.upsamplers = nn.ModuleList([] if last else [Resample(outputs, operations, up=True)])

    def forward(self, x: Tensor, kept: list[Tensor]) -> Tensor:
        for resnet, attention in self.layers():
            x = attention(resnet(torch.cat([x, kept.pop()], 1)))
        for layer in self.upsamplers:
            x = layer(x)
        return x


class MiddleStage(Stage):
    def __init__(self, width: int, operations):
        super().__init__([(width, width)] * 2, False, operations)
        self.attentions = nn.ModuleList([Attention(width, operations)])

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.resnets
        return second(self.attentions[0](first(x)))


class TransparentDecoder(nn.Module):
    """A picture from the autoencoder and the latent it came from -> alpha and straight colours.

    widths: channels per level, at least four; attention in the last `attention_levels` of them. Published: 32, 32, 64,
    128, 256, 512, 512.
    Source: layerdiffuse, Sec. 3.1 (the latent transparency decoder), layers as in the released code
    """

    def __init__(
        self,
        widths: Sequence[int] = (32, 32, 64, 128, 256, 512, 512),
        attention_levels: int = 3,
        latent_channels: int = 4,
        layers: int = 2,
        operations=nn,
    ):
        super().__init__()
        levels = len(widths)
        self.multiple = 2 ** (levels - 1)
        self.conv_in = operations.Conv2d(3, widths[0], 3, padding=1)
        self.latent_conv_in = operations.Conv2d(latent_channels, widths[LATENT_BLOCK - 1], 1)
        self.down_blocks, self.up_blocks, skips, width = nn.ModuleList(), nn.ModuleList(), [widths[0]], widths[0]
        for level, outputs in enumerate(widths):
            last = level == levels - 1
            self.down_blocks.append(
                DownStage(width, outputs, layers, level >= levels - attention_levels, last, operations)
            )
            skips += [outputs] * (layers + (not last))
            width = outputs
        self.mid_block = MiddleStage(width, operations)
        for level, outputs in reversed(list(enumerate(widths))):
            taken = [skips.pop() for _ in range(layers + 1)]
            self.up_blocks.append(
                UpStage(width, taken, outputs, level >= levels - attention_levels, level == 0, operations)
            )
            width = outputs
        self.conv_norm_out = operations.GroupNorm(GROUPS, width, eps=1e-5)
        self.conv_out = operations.Conv2d(width, 4, 3, padding=1)

    def forward(self, image: Tensor, latent: Tensor) -> Tensor:
        """image: [B,3,H,W] in 0..1, sides multiples of `multiple`; latent: [B,C,H/8,W/8] -> [B,4,H,W], the alpha first
        in SD's files.
        """
        x = self.conv_in(image)
        kept = [x]
        for level, block in enumerate(self.down_blocks):
            if level == LATENT_BLOCK:
                x = x + self.latent_conv_in(latent)
            x, more = block(x)
            kept += more
        x = self.mid_block(x)
        for block in self.up_blocks:
            x = block(x, kept)
        return self.conv_out(F.silu(self.conv_norm_out(x), inplace=True))


class OffsetEncoder(nn.Module):
    """What transparency adds to a latent. widths: channels at full, half, quarter and eighth size; published: 32, 64,
    128, 256.

    Source: layerdiffuse, Sec. 3.1 (the latent transparency encoder), layers as in the released code
    """

    def __init__(self, widths: Sequence[int] = (32, 64, 128, 256), latent_channels: int = 4, operations=nn):
        super().__init__()
        first, layers = widths[0], []

        def conv(inputs: int, outputs: int, stride: int = 1):
            layers.extend([operations.Conv2d(inputs, outputs, 3, padding=1, stride=stride), nn.SiLU()])

        conv(4, first)
        conv(first, first)
        for inputs, outputs in zip(widths, widths[1:], strict=False):
            conv(inputs, outputs, 2)
            conv(outputs, outputs)
        layers.append(operations.Conv2d(widths[-1], latent_channels, 3, padding=1))
        nn.init.zeros_(layers[-1].weight)
        nn.init.zeros_(layers[-1].bias)
        self.blocks = nn.Sequential(*layers)

    def forward(self, rgba: Tensor) -> Tensor:
        """[B,4,H,W], channels as the family orders them -> [B,C,H/8,W/8]."""
        return self.blocks(rgba)


def decoder_shape(weights: dict[str, Tensor]) -> dict:
    """The options of TransparentDecoder for a file's weights. Raises KeyError or ValueError for others."""
    levels = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("down_blocks."))
    return {
        "widths": [weights[f"down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(levels)],
        "attention_levels": len(
            {key.split(".")[1] for key in weights if re.match(r"down_blocks\.\d+\.attentions\.", key)}
        ),
        "layers": len({key.split(".")[3] for key in weights if key.startswith("down_blocks.0.resnets.")}),
        "latent_channels": weights["latent_conv_in.weight"].shape[1],
    }


def encoder_shape(weights: dict[str, Tensor]) -> dict:
    """The options of OffsetEncoder for a file's weights. Raises KeyError or ValueError for others."""
    last = max(int(key.split(".")[1]) for key in weights if key.startswith("blocks."))
    return {
        "widths": [weights[f"blocks.{i}.weight"].shape[0] for i in range(0, last, 4)],
        "latent_channels": weights[f"blocks.{last}.weight"].shape[0],
    }


def published_adapter(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The trained terms under LayerDiffuse's keys: `<weight>::lora::0` is up [out,rank], `::1` is down [rank,in]."""
    published = {}
    for key, value in state.items():
        for part, index in (("lora_B", 0), ("lora_A", 1)):
            if f".{part}.default.weight" in key:
                name = key.removeprefix("model.").replace(f".{part}.default.weight", ".weight")
                published[f"{name}::lora::{index}"] = value
    return published
