"""The trained classifier as a judge: does a picture show what was asked for, is it the same thing, are two sets of
pictures alike.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..networks.classifier import HEIGHT, Classifier
from ..scenes import renderer
from .settings import MODELS

FILE = MODELS / "strata" / "mini_classifier.safetensors"
PART = 64  # pictures at a time


class Oracle:
    """Pictures are [B,3,H,W] in 0..1 of any size; they are looked at 128 pixels high."""

    def __init__(self, model: Classifier, places: Sequence[str] = renderer.KINDS, objects: Sequence[str] | None = None):
        self.model, self.places, self.objects = model.eval(), list(places), list(objects or renderer.catalogue())

    @torch.no_grad()
    def features(self, image: Tensor) -> Tensor:
        """[B,F], to be compared by cosine, frechet_distance or kernel_distance."""
        device = next(self.model.parameters()).device
        return torch.cat([self.model.features(part.to(device).float()).cpu() for part in image.split(PART)])

    @torch.no_grad()
    def logits(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Places [B,10] for a softmax, and objects [B,60], each for a sigmoid of its own."""
        features = self.features(image).to(next(self.model.parameters()).device)
        return self.model.place(features).cpu(), self.model.objects(features).cpu()

    def text_agreement(
        self, image: Tensor, places: Sequence[str | None], objects: Sequence[Sequence[str]]
    ) -> tuple[Tensor, Tensor]:
        """Per picture, [B] each: 1 where the place is the one asked for, and the share of the n objects asked for that
        are among the n likeliest.

        A place of None counts as right. Where no object was asked for, 1 stands for a picture in which none is more
        likely there than not.
        """
        unknown = {*places, *(name for names in objects for name in names)} - {None, *self.places, *self.objects}
        if unknown:
            raise ValueError(
                f"text_agreement: the classifier does not know {', '.join(sorted(unknown))}; ask for what the scene "
                "renderer knows."
            )
        place_logits, object_logits = self.logits(image)
        place = [
            float(place is None or self.places[int(row.argmax())] == place)
            for place, row in zip(places, place_logits, strict=True)
        ]
        share = []
        for names, row in zip(objects, object_logits, strict=True):
            likeliest = {self.objects[i] for i in row.topk(len(names)).indices}
            share.append(len(likeliest.intersection(names)) / len(names) if names else float(row.max() < 0))
        return torch.tensor(place), torch.tensor(share)

    @torch.no_grad()
    def distance(self, first: Tensor, second: Tensor) -> Tensor:
        """How differently two batches of equal size look to the classifier, [B], 0 = the same: squared differences of
        its layers' activations, each pixel's brought to length one, their means over layers and pixels.

        Source: ours, a perceptual distance as LPIPS is one, by a network that knows the scenes and without its weights
        """
        total = torch.zeros(len(first))
        one, other = (image.float() * 4 - 2 for image in (first, second))
        layers = 0
        for layer in self.model.body:
            one, other = layer(one), layer(other)
            if isinstance(layer, torch.nn.ReLU):
                total += (F.normalize(one, dim=1) - F.normalize(other, dim=1)).square().sum(1).mean((1, 2))
                layers += 1
        return total / layers

    def similarity(self, first: Tensor, second: Tensor) -> Tensor:
        """Cosine of the features of two batches of cut_out pictures, [B] in 0..1; 1 = the same to the classifier."""
        return F.cosine_similarity(self.features(first), self.features(second))


def load(path: Path = FILE) -> Oracle:
    """The shipped classifier, or another one written by its trainer. Raises FileNotFoundError or ValueError with what
    to do.
    """
    from safetensors import safe_open

    if not path.exists():
        raise FileNotFoundError(
            f"{path}: the classifier's weights are not there; python -m training classifier makes them."
        )
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        state = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 (not a dictionary)
    if "objects" not in metadata:
        raise ValueError(f"{path}: not a file of this classifier; give one that python -m training classifier wrote.")
    places, objects, config = (json.loads(metadata[key]) for key in ("places", "objects", "config"))
    model = Classifier(len(places), len(objects), config["widths"], config["features"])
    model.load_state_dict(state, strict=False)  # all but the counts of batches, which only training reads
    return Oracle(model, places, objects)


def cut_out(image: Tensor, alpha: Tensor) -> Tensor:
    """The thing in the alpha [B,1,H,W] of pictures [B,3,H,W], on mid gray in the middle of [B,3,128,128], its longer
    side 64 pixels.

    Where and how large it was does not change the cut-out. Raises ValueError when an alpha is empty.
    """
    cut = []
    for picture, mask in zip(image.float(), alpha.float(), strict=True):
        if mask.max() <= 0.05:
            raise ValueError("cut_out: an alpha is empty, so there is nothing to cut out; leave that picture out.")
        rows, columns = ((mask[0] > 0.05).any(dim).nonzero()[:, 0] for dim in (1, 0))
        box = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
        premultiplied = torch.cat([picture * mask, mask])[:, box[0], box[1]]
        scale = HEIGHT / 2 / max(premultiplied.shape[1:])
        size = [max(1, round(side * scale)) for side in premultiplied.shape[1:]]
        small = F.interpolate(premultiplied[None], size, mode="bilinear", antialias=True)[0]
        top, left = ((HEIGHT - side) // 2 for side in size)
        canvas = torch.full((3, HEIGHT, HEIGHT), 0.5)
        canvas[:, top : top + size[0], left : left + size[1]] = small[:3] + 0.5 * (1 - small[3:])
        cut.append(canvas)
    return torch.stack(cut)
