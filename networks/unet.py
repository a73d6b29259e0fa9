"""The UNet of Stable Diffusion 1.x at any size, with the key names of ComfyUI's UNetModel."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

GROUPS = 32


def timestep_embedding(timesteps: Tensor, width: int) -> Tensor:
    """[B] -> [B,width]: cosines, then sines, of frequencies from 1 to 1/10000. Computed in float32.

    Source: ddpm, Appendix B (sinusoidal embedding of the timestep), cosines first as in Stable Diffusion
    """
    frequencies = torch.exp(-math.log(10000) * torch.arange(width // 2, device=timesteps.device) / (width // 2))
    angles = timesteps[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


class ResBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, embedding: int, operations):
        super().__init__()
        self.in_layers = nn.Sequential(
            operations.GroupNorm(GROUPS, inputs), nn.SiLU(), operations.Conv2d(inputs, outputs, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), operations.Linear(embedding, outputs))
        self.out_layers = nn.Sequential(
            operations.GroupNorm(GROUPS, outputs),
            nn.SiLU(),
            nn.Identity(),
            operations.Conv2d(outputs, outputs, 3, padding=1),
        )
        self.skip_connection = nn.Identity() if inputs == outputs else operations.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(embedding)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Attention(nn.Module):
    def __init__(self, width: int, context: int, heads: int, operations):
        super().__init__()
        self.heads = heads
        self.to_q = operations.Linear(width, width, bias=False)
        self.to_k = operations.Linear(context, width, bias=False)
        self.to_v = operations.Linear(context, width, bias=False)
        self.to_out = nn.Sequential(operations.Linear(width, width), nn.Identity())

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            rearrange(part, "b token (head c) -> b head token c", head=self.heads)
            for part in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out(rearrange(F.scaled_dot_product_attention(q, k, v), "b head token c -> b token (head c)"))


class GatedLinear(nn.Module):
    def __init__(self, inputs: int, outputs: int, operations):
        super().__init__()
        self.proj = operations.Linear(inputs, outputs * 2)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, -1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int, operations):
        super().__init__()
        self.net = nn.Sequential(
            GatedLinear(width, width * 4, operations), nn.Identity(), operations.Linear(width * 4, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    def __init__(self, width: int, context: int, heads: int, operations):
        super().__init__()
        self.attn1 = Attention(width, width, heads, operations)
        self.ff = FeedForward(width, operations)
        self.attn2 = Attention(width, context, heads, operations)
        self.norm1, self.norm2, self.norm3 = (operations.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        n = self.norm1(x)
        x = x + self.attn1(n, n)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    def __init__(self, width: int, context: int, heads: int, operations):
        super().__init__()
        self.norm = operations.GroupNorm(GROUPS, width, eps=1e-6)
        self.proj_in = operations.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, context, heads, operations)])
        self.proj_out = operations.Conv2d(width, width, 1)

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor) -> Tensor:
        h = rearrange(self.proj_in(self.norm(x)), "b c h w -> b (h w) c")
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(rearrange(h.transpose(1, 2), "b c (h w) -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    def __init__(self, width: int, operations):
        super().__init__()
        self.op = operations.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, width: int, operations):
        super().__init__()
        self.conv = operations.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2))


class Stem(nn.Module):
    """The first convolution, under the name that a list of blocks gives it."""

    def __init__(self, inputs: int, outputs: int, operations):
        super().__init__()
        self.add_module("0", operations.Conv2d(inputs, outputs, 3, padding=1))

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor) -> Tensor:
        return self.get_submodule("0")(x)


class Blocks(nn.ModuleList):
    def forward(self, x: Tensor, embedding: Tensor, context: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, embedding, context)
        return x


class UNet(nn.Module):
    """Predicts the noise of a latent.

    channel_mult: widths of the levels in model_channels; transformer_depth: 0 or 1 per level (and
    `transformer_depth_middle`). Level widths are multiples of 32, sides of the latent multiples of 2 ** (levels - 1).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        model_channels: int,
        channel_mult: list[int],
        num_res_blocks: int,
        transformer_depth: list[int],
        context_dim: int,
        num_heads: int,
        operations=nn,
    ):
        super().__init__()
        self.model_channels = model_channels
        embedding = model_channels * 4
        self.time_embed = nn.Sequential(
            operations.Linear(model_channels, embedding), nn.SiLU(), operations.Linear(embedding, embedding)
        )

        def stage(inputs: int, outputs: int, depth: int) -> list[nn.Module]:
            attention = [SpatialTransformer(outputs, context_dim, num_heads, operations) for _ in range(depth)]
            return [ResBlock(inputs, outputs, embedding, operations), *attention]

        widths = [model_channels * factor for factor in channel_mult]
        width, skips = model_channels, [model_channels]
        self.input_blocks = nn.ModuleList([Stem(in_channels, width, operations)])
        for level, (level_width, depth) in enumerate(zip(widths, transformer_depth, strict=True)):
            for _ in range(num_res_blocks):
                self.input_blocks.append(Blocks(stage(width, level_width, depth)))
                width = level_width
                skips.append(width)
            if level < len(widths) - 1:
                self.input_blocks.append(Blocks([Downsample(width, operations)]))
                skips.append(width)
        self.middle_block = Blocks([*stage(width, width, 1), ResBlock(width, width, embedding, operations)])
        self.output_blocks = nn.ModuleList()
        for level, (level_width, depth) in reversed(list(enumerate(zip(widths, transformer_depth, strict=True)))):
            for index in range(num_res_blocks + 1):
                layers = stage(width + skips.pop(), level_width, depth)
                width = level_width
                if level and index == num_res_blocks:
                    layers.append(Upsample(width, operations))
                self.output_blocks.append(Blocks(layers))
        self.out = nn.Sequential(
            operations.GroupNorm(GROUPS, width), nn.SiLU(), operations.Conv2d(width, out_channels, 3, padding=1)
        )

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """x: [B,in_channels,h,w]; timesteps: [B], 0..999; context: [B,tokens,context_dim] -> [B,out_channels,h,w]."""
        embedding = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(x.dtype))
        kept = []
        for block in self.input_blocks:
            x = block(x, embedding, context)
            kept.append(x)
        x = self.middle_block(x, embedding, context)
        for block in self.output_blocks:
            x = block(torch.cat([x, kept.pop()], 1), embedding, context)
        return self.out(x)
