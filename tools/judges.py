"""For tools/evaluate.py: the networks that judge pictures in the papers' tables, from weights on this disk. Pictures
are [B,3,H,W] in 0..1.

A judge whose files are not there is a Missing, which says what to get and where to put it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONFIG = json.loads((Path(__file__).parent.parent / "models_config" / "evaluation.json").read_text(encoding="utf-8"))
IMAGES, LAYERED = (".png", ".jpg", ".jpeg", ".webp"), (".psd", ".psb", ".ora")
PART = 16  # pictures at a time


class Missing(RuntimeError):
    """What a measure lacks, as one sentence."""


def available(folder: Path) -> dict[str, object]:
    """The judges by name; see their functions for what each gives."""
    kinds = {
        "features": inception,
        "agreement": clip_score,
        "likeness": dino,
        "distance": lpips,
        "aesthetic": aesthetic,
    }
    made: dict[str, object] = {}
    for name, make in kinds.items():
        try:
            made[name] = make(folder)
        except Missing as error:
            made[name] = error
    return made


def mini() -> dict[str, object]:
    """The mini family's classifier in the networks' places. Agreement is the percentage of the things named in the
    words that it sees.
    """
    from strata.scenes import renderer
    from strata.training import oracle

    judge = oracle.load()

    def agreement(pictures: Tensor, words: list[str]) -> Tensor:
        named = [
            [name for name, thing in renderer.catalogue().items() if _named(thing.prompts, line)] for line in words
        ]
        return 100 * judge.text_agreement(pictures, [None] * len(words), named)[1]

    def likeness(one: Tensor, other: Tensor) -> Tensor:
        return F.cosine_similarity(judge.features(one), judge.features(other))

    return {
        "features": lambda pictures: {"classifier": judge.features(pictures)},
        "agreement": agreement,
        "likeness": likeness,
        "distance": judge.distance,
        "aesthetic": Missing("The mini family has no such judge."),
    }


def inception(folder: Path) -> Callable[[Tensor], dict[str, Tensor]]:
    """Features [B,F] of the Inception network that FID is measured by: its first and its last pooling layer's, under
    the names "64" and "2048".
    """
    weights = _file(folder, "inception")
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise Missing(_package("torch-fidelity")) from error
    _state(weights)  # the package itself would run what a pickle says
    names = ["64", "2048"]
    network = FeatureExtractorInceptionV3("inception-v3-compat", names, feature_extractor_weights_path=str(weights))

    def features(pictures: Tensor) -> dict[str, Tensor]:
        found = [network(to_bytes(part)) for part in pictures.split(PART)]
        return {name: torch.cat(rows).float() for name, rows in zip(names, zip(*found, strict=True), strict=True)}

    return features


class Clip:
    """CLIP's vectors of pictures and of words, each of length one."""

    def __init__(self, folder: Path):
        from transformers import AutoModel, AutoProcessor

        self.model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
        self.processor = AutoProcessor.from_pretrained(folder, local_files_only=True)

    @torch.no_grad()
    def pictures(self, pictures: Tensor) -> Tensor:
        pixels = self.processor(images=list(to_bytes(pictures)), return_tensors="pt")["pixel_values"]
        return F.normalize(_vector(self.model.get_image_features(pixel_values=pixels)), dim=1)

    @torch.no_grad()
    def words(self, words: list[str]) -> Tensor:
        given = self.processor(text=words, return_tensors="pt", padding=True, truncation=True)
        return F.normalize(_vector(self.model.get_text_features(**given)), dim=1)


def clip_score(folder: Path) -> Callable[[Tensor, list[str]], Tensor]:
    """[B]: 100 times the cosine of a picture and its words, at least 0."""
    clip = Clip(_file(folder, "clip"))
    return lambda pictures, words: 100 * (clip.pictures(pictures) * clip.words(words)).sum(1).clamp_min(0)


def aesthetic(folder: Path) -> Callable[[Tensor], Tensor]:
    """[B], about 1 to 10: LAION's aesthetic score, five linear layers on CLIP ViT-L/14's vector."""
    state = _state(_file(folder, "aesthetic"))
    clip = Clip(_file(folder, "clip"))
    layers = [(state[key].float(), state[key[:-6] + "bias"].float()) for key in state if key.endswith("weight")]

    def score(pictures: Tensor) -> Tensor:
        vector = clip.pictures(pictures)
        if vector.shape[1] != layers[0][0].shape[1]:
            raise Missing(
                f"aesthetic: its file is for CLIP ViT-L/14; put that one into {folder / CONFIG['clip']['file']}."
            )
        for weight, bias in layers:
            vector = vector @ weight.T + bias
        return vector[:, 0]

    return score


def dino(folder: Path) -> Callable[[Tensor, Tensor], Tensor]:
    """[B]: the cosine of two pictures' class tokens."""
    from transformers import AutoImageProcessor, AutoModel

    path = _file(folder, "dino")
    model = AutoModel.from_pretrained(path, local_files_only=True).eval()
    processor = AutoImageProcessor.from_pretrained(path, local_files_only=True)

    @torch.no_grad()
    def token(pictures: Tensor) -> Tensor:
        pixels = processor(images=list(to_bytes(pictures)), return_tensors="pt")["pixel_values"]
        return model(pixel_values=pixels).last_hidden_state[:, 0]

    return lambda one, other: F.cosine_similarity(token(one), token(other))


def lpips(folder: Path) -> Callable[[Tensor, Tensor], Tensor]:
    """[B]: LPIPS by AlexNet; the weights of its linear layers come with torchmetrics."""
    weights = _file(folder, "alexnet")
    try:
        from torchmetrics.functional.image.lpips import _LPIPS
    except ImportError as error:
        raise Missing(_package("torchmetrics")) from error
    network = _LPIPS(pretrained=True, net="alex", pnet_rand=True).eval()
    state = _state(weights)
    parts = [part for name, part in network.net.named_children() if name.startswith("slice")]
    learnt = nn.ModuleList(layer for part in parts for layer in part if isinstance(layer, nn.Conv2d))
    keys = [key.removesuffix(".weight") for key in state if key.startswith("features.") and key.endswith(".weight")]
    for layer, key in zip(learnt, keys, strict=True):
        layer.load_state_dict({name: state[f"{key}.{name}"] for name in ("weight", "bias")})

    @torch.no_grad()
    def distance(one: Tensor, other: Tensor) -> Tensor:
        return torch.cat([network(a[None] * 2 - 1, b[None] * 2 - 1).flatten() for a, b in zip(one, other, strict=True)])

    return distance


def _named(prompts: Sequence[str], line: str) -> bool:
    return any(re.search(rf"\b{re.escape(prompt)}\b", line) for prompt in prompts)


def to_bytes(pictures: Tensor) -> Tensor:
    return (pictures.clamp(0, 1) * 255).round().to(torch.uint8)


def _vector(found) -> Tensor:
    """Newer versions of transformers wrap it."""
    return found if isinstance(found, Tensor) else found.pooler_output


def _file(folder: Path, name: str) -> Path:
    path = folder / CONFIG[name]["file"]
    if not path.exists():
        raise Missing(f"{path} is not there; get it from {CONFIG[name]['url']}.")
    return path


def _state(path: Path) -> dict[str, Tensor]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged pickle raises
        raise Missing(f"{path} is not a file of weights alone; get it again.") from error


def _package(name: str) -> str:
    return f"The Python package {name} is not installed; pip install {name}."
