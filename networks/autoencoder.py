"""The small autoencoder in TAESD's layout, with the key names that ComfyUI's VAE loader knows."""

import torch
from torch import Tensor, nn

LAST = 19  # the decoder's last layer


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x / 3).tanh() * 3


class Block(nn.Module):
    def __init__(self, channels: int, operations=nn):
        super().__init__()
        layers = [operations.Conv2d(channels, channels, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
        self.fuse = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.fuse(self.conv(x) + x)


class Autoencoder(nn.Module):
    """encode: [B,3,H,W] in 0..1, sides multiples of 8 -> [B,4,H/8,W/8], of about unit variance.
    decode: the way back. image_channels: 3, or 4 for colour with straight alpha.
    """

    def __init__(self, channels: int = 64, latent_channels: int = 4, operations=nn, image_channels: int = 3):
        super().__init__()

        def blocks(count: int):
            return [Block(channels, operations) for _ in range(count)]

        def conv(inputs: int, outputs: int, **options):
            return operations.Conv2d(inputs, outputs, 3, padding=1, **options)

        down = [layer for _ in range(3) for layer in (conv(channels, channels, stride=2, bias=False), *blocks(3))]
        up = [
            layer
            for _ in range(3)
            for layer in (*blocks(3), nn.Upsample(scale_factor=2), conv(channels, channels, bias=False))
        ]
        self.taesd_encoder = nn.Sequential(
            conv(image_channels, channels), *blocks(1), *down, conv(channels, latent_channels)
        )
        self.taesd_decoder = nn.Sequential(
            Clamp(), conv(latent_channels, channels), nn.ReLU(), *up, *blocks(1), conv(channels, image_channels)
        )

    def encode(self, image: Tensor) -> Tensor:
        return self.taesd_encoder(image)

    def decode(self, latent: Tensor) -> Tensor:
        return self.taesd_decoder(latent)


@torch.no_grad()
def with_alpha(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an autoencoder of colours with a fourth channel that it does not see, and that it decodes as
    opaque.

    Source: alphavae, the start from an autoencoder of colours: new input 0, new output 0 with bias 1
    """
    first, last = "taesd_encoder.0.weight", f"taesd_decoder.{LAST}"
    state = dict(state)
    state[first] = torch.nn.functional.pad(state[first], (0, 0, 0, 0, 0, 1))
    state[f"{last}.weight"] = torch.nn.functional.pad(state[f"{last}.weight"], (0, 0, 0, 0, 0, 0, 0, 1))
    state[f"{last}.bias"] = torch.nn.functional.pad(state[f"{last}.bias"], (0, 1), value=1.0)
    return state
