"""DreamLayer's trained modules, one file: what they add to keys and values, the layer embedding, and the context-aware
layers.

Keys, by ComfyUI's names of the model's weights, for SD1.5, SDXL and the mini family alike:

    layer_embedding                                      [layers, width of the tokens], the background's first
    shared.diffusion_model.<…>.attn1.to_k.weight         difference, for background and whole picture
    foreground.diffusion_model.<…>.attn1.to_k.weight     difference, for the objects instead
    context_layers.0.attn.to_q.weight                    networks/context_layers.py

Differences, so that LoRAs, adapters and other checkpoints of the family go with them. `python -m training dreamlayer`
makes such files.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import comfy.ops
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ..networks.context_layers import ContextLayers
from . import foreground, transparency, transparency_model
from .kept import Kept
from .layer_rows import Rows

EMBEDDING, CONTEXT = "layer_embedding", "context_layers."


@dataclass(frozen=True)
class LayerModules:
    """One file. families: the models it is for. shared, foreground: differences by the weight's key."""

    name: str
    families: tuple[str, ...]
    embedding: Tensor
    shared: dict[str, Tensor]
    foreground: dict[str, Tensor]
    context: ContextLayers

    @property
    def family(self) -> str:
        return " or ".join(self.families) or "a model of another structure"

    def describe(self) -> str:
        count = len(self.context)
        return (
            f"layer modules for {self.family}, trained with up to {len(self.embedding) - 1} objects, {count} "
            f"context-aware layer{'s' * (count != 1)}"
        )


@dataclass(frozen=True)
class Terms(Kept):
    """A file's part for one model: by the name of the UNet's module, what goes to the output of keys and values."""

    embedding: Tensor
    shared: dict[str, nn.Module]
    foreground: dict[str, nn.Module]

    @contextmanager
    def acting(self, unet: nn.Module, strength: float, layers: int) -> Iterator[None]:
        """For one call on scenes of so many rows: background, objects, whole picture."""
        parts = (self.shared, 0, 1), (self.foreground, 1, layers - 2), (self.shared, layers - 1, 1)
        with ExitStack() as stack:
            for added, first, number in parts:
                stack.enter_context(foreground.acting(unet, added, strength, Rows(layers, first, number)))
            yield


def recognise(name: str, weights: dict[str, Tensor]) -> LayerModules:
    """A file's content from its weights. Raises ValueError for a damaged file."""
    shared, objects, context = (
        {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        for prefix in ("shared.", "foreground.", CONTEXT)
    )
    differences = [*shared.items(), *objects.items()]
    families = tuple(
        family
        for family in transparency.FAMILIES
        if all(transparency.structure(family).get(key) == tuple(value.shape) for key, value in differences)
    )
    width = context["0.norm.weight"].shape[0] if "0.norm.weight" in context else 0
    layers = ContextLayers(len({key.split(".")[0] for key in context}) if width else 0, width, comfy.ops.manual_cast)
    return LayerModules(name, families, weights[EMBEDDING], shared, objects, transparency.filled(name, layers, context))


def terms(model: ModelPatcher, modules: LayerModules) -> Terms:
    """A file's part for this model. Raises ValueError for a model that the file is not for."""
    weights = transparency_model.unpatched(model)
    for key, value in [*modules.shared.items(), *modules.foreground.items()]:
        if key not in weights or weights[key].shape != value.shape:
            raise ValueError(transparency_model.wrong_family(model, modules, "modules"))
    return Terms(
        modules.embedding, *(foreground.differences(model, part) for part in (modules.shared, modules.foreground))
    )
