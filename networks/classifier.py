"""A small judge of rendered and generated scenes: which place, which objects, and features to compare pictures by."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEIGHT = 128  # pictures are brought to this height, at which it was trained


class Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.conv(x)))


class Classifier(nn.Module):
    """[B,3,H,W] in 0..1, any size -> place logits [B,places] for a softmax, object logits [B,objects], each for a
    sigmoid of its own.
    """

    def __init__(self, places: int, objects: int, widths: list[int], features: int):
        super().__init__()

        def down(inputs: int, outputs: int):
            return nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()

        steps = [layer for pair in zip([3, *widths], widths, strict=False) for layer in down(*pair)]
        last = nn.Conv2d(widths[-1], features, 1, bias=False), nn.BatchNorm2d(features), nn.ReLU()
        self.body = nn.Sequential(*steps, Residual(widths[-1]), *last)
        self.place, self.objects = nn.Linear(2 * features, places), nn.Linear(2 * features, objects)

    def features(self, image: Tensor) -> Tensor:
        """[B,2F]: mean and maximum of the last layer over the picture, none below zero."""
        height, width = image.shape[-2:]
        if height != HEIGHT:
            image = F.interpolate(
                image, (HEIGHT, max(1, round(width * HEIGHT / height))), mode="bilinear", antialias=True
            )
        x = self.body(image * 4 - 2)
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(image)
        return self.place(features), self.objects(features)
