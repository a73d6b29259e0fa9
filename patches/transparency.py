"""LayerDiffuse's weight files, told apart by what is in them, and the networks among them as ComfyUI holds models."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cache
from math import prod
from pathlib import Path

import comfy.model_management
import comfy.ops
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher
from torch import Tensor, channels_last, float16, nn

from ..networks.attention_sharing import AttentionSharing, read_shape
from ..networks.transparency import OffsetEncoder, TransparentDecoder, decoder_shape, encoder_shape

CONFIGS = Path(__file__).parent.parent / "models_config"
CONFIG = json.loads((CONFIGS / "transparency.json").read_text(encoding="utf-8"))
FAMILIES, LATENTS = CONFIG["families"], CONFIG["latents"]
FIRST = "diffusion_model.input_blocks.0.0.weight"  # the convolution that the latent enters by
SHARING = "hookers.layers.0.to_q_lora."
FLUX_LAYER = re.compile(r"(transformer_blocks|double_blocks|single_blocks)[._]\d+[._]")
WHAT = {
    "adapter": "an adapter",
    "flux": "an adapter",
    "sharing": "attention sharing",
    "decoder": "a decoder",
    "encoder": "an encoder",
}


@dataclass(frozen=True)
class Transparency:
    """One file. parts: "adapter" and "flux" are weights by key, "sharing", "decoder" and "encoder" networks in a
    ModelPatcher.

    families: the models it is for. extra_channels: what an adapter adds to the UNet's input. frames: pictures that
    share attention.
    latent: how a decoder or encoder sees latents, an entry of `latents` in models_config.
    """

    name: str
    families: tuple[str, ...]
    parts: dict = field(default_factory=dict)
    extra_channels: int = 0
    frames: int = 1
    latent: dict | None = None

    @property
    def family(self) -> str:
        return " or ".join(self.families)

    def describe(self) -> str:
        extra = f" with {self.extra_channels} more input channels" if self.extra_channels else ""
        frames = f" of {self.frames} images" if self.frames > 1 else ""
        return f"{' and '.join(WHAT[kind] for kind in self.parts)}{extra}{frames} for {self.family}"

    def part(self, kind: str, wanted: str):
        """Raises ValueError with one sentence when the file holds something else."""
        if kind not in self.parts:
            raise ValueError(f"transparency: {self.name} is {self.describe()}; this node needs {wanted}.")
        return self.parts[kind]


def is_transparency(weights: dict[str, Tensor]) -> bool:
    """Whether these may be LayerDiffuse's, by their names."""
    probes = [probe for kind, probe, _, _ in PAIR for probe in (probe, f"{kind}.{probe}")]
    return (
        any("::" in key or key.startswith(SHARING) for key in weights)
        or any(probe in weights for probe in probes)
        or _is_flux(weights)
    )


def _is_flux(weights: dict[str, Tensor]) -> bool:
    return "lora" in next(iter(weights), "") and any(FLUX_LAYER.search(key) for key in weights)


def recognise(name: str, weights: dict[str, Tensor], own: bool = False) -> Transparency:
    """Tell a file's kind and family from its keys and shapes, and build its networks; own: written by this pack's
    trainers. Raises ValueError.
    """
    if any("::" in key for key in weights):
        return _adapter(name, weights)
    if any(key.startswith(SHARING) for key in weights):
        return _sharing(name, weights)
    if _is_flux(weights):
        return Transparency(
            name, tuple(family for family in FAMILIES if "unet" not in FAMILIES[family]), {"flux": weights}
        )
    return _pair(name, weights, own)


def _adapter(name: str, weights: dict[str, Tensor]) -> Transparency:
    """`<weight>::lora::0` is up, `::1` down; `<weight>::diff::0` a full difference."""
    adapter: dict[str, dict[str, Tensor]] = {}
    for key, value in weights.items():
        weight, *form = key.split("::")
        adapter.setdefault(weight, {})["::".join(form)] = value
    for key, parts in adapter.items():
        if set(parts) not in ({"lora::0", "lora::1"}, {"diff::0"}):
            raise ValueError(
                f"file: {name} is incomplete or not LayerDiffuse's at {key} ({', '.join(parts)}); download it again."
            )
    named = tuple(family for family in FAMILIES if adapter.keys() <= structure(family).keys())
    if not named:
        raise ValueError(
            f"file: {name} changes weights that no model of {', '.join(FAMILIES)} has, such as {next(iter(adapter))}; "
            "it is for another kind of model."
        )
    exact = tuple(
        family for family in named if all(fits(key, parts, structure(family)[key]) for key, parts in adapter.items())
    )
    first = adapter.get(FIRST, {}).get("diff::0")
    extra = 0 if first is None else first.shape[1] - LATENTS[FAMILIES[named[0]]["latent"]]["channels"]
    return Transparency(name, exact or named, {"adapter": adapter}, extra)


def _sharing(name: str, weights: dict[str, Tensor]) -> Transparency:
    shape = read_shape(weights)
    count = {
        family: len([key for key in structure(family) if re.search(r"attn[12]\.to_q\.weight$", key)])
        for family in FAMILIES
    }
    families = tuple(family for family in FAMILIES if count[family] == len(shape["attentions"]))
    if not families:
        raise ValueError(
            f"file: {name} shares {len(shape['attentions'])} attentions, and no model of {', '.join(FAMILIES)} has so "
            "many; it is for another kind of model."
        )
    network = filled(name, AttentionSharing(**shape, operations=comfy.ops.manual_cast), weights)
    device, offload = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    return Transparency(name, families, {"sharing": ModelPatcher(network, device, offload)}, frames=shape["frames"])


def _pair(name: str, weights: dict[str, Tensor], trained_here: bool) -> Transparency:
    """A decoder, an encoder, or one file with both below `decoder.` and `encoder.` (beside them may be the whole
    autoencoder).
    """
    parts, space = {}, None
    for kind, probe, build, shape in PAIR:
        own = (
            weights
            if probe in weights
            else {key.removeprefix(f"{kind}."): value for key, value in weights.items() if key.startswith(f"{kind}.")}
        )
        if probe not in own:
            continue
        try:
            options = shape(own)
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"file: {name} is incomplete, {error} is missing; download it again.") from error
        space = space or _latent(kind, options, trained_here)
        network = filled(name, build(**options, operations=comfy.ops.disable_weight_init), own)
        device = comfy.model_management.vae_device()
        network.to(dtype=comfy.model_management.vae_dtype(device, [float16]), memory_format=channels_last)
        parts[kind] = ModelPatcher(network, device, comfy.model_management.vae_offload_device())
    if not parts:
        raise ValueError(
            f"file: {name} holds neither LayerDiffuse's weights nor layer modules; choose one that the help page names."
        )
    return Transparency(
        name, tuple(family for family in FAMILIES if FAMILIES[family]["latent"] == space), parts, latent=LATENTS[space]
    )


def filled(name: str, network: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """The network with these weights of the file `name`, frozen. Raises ValueError."""
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(
            f"file: {name} does not have the weights of {type(network).__name__} ({reason} …); download it again."
        ) from error
    return network.eval().requires_grad_(False)


def _latent(kind: str, options: dict, trained_here: bool) -> str:
    """The entry of `latents` that a network of this shape belongs to; widths that are not published are this pack's own
    as well.
    """
    same = [key for key, latent in LATENTS.items() if latent["channels"] == options["latent_channels"]]
    if not same:
        raise ValueError(
            f"file: it is for latents of {options['latent_channels']} channels, which no model of "
            f"{', '.join(FAMILIES)} has."
        )
    return next(
        (key for key in same if LATENTS[key].get(f"{kind}_widths") == options["widths"] and not trained_here), same[-1]
    )


# A pair's networks: name, a weight that only this one has, class, and the function that reads its shape
PAIR = (
    ("decoder", "latent_conv_in.weight", TransparentDecoder, decoder_shape),
    ("encoder", "blocks.0.weight", OffsetEncoder, encoder_shape),
)


@cache
def structure(family: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a family's weights, read from ComfyUI's own network without memory for it; empty for one that
    is no UNet.
    """
    unet = FAMILIES[family].get("unet")
    if unet is None:
        return {}
    if isinstance(unet, str):
        unet = json.loads((CONFIGS / unet).read_text(encoding="utf-8"))["unet"]
    network = UNetModel(
        image_size=32,
        use_spatial_transformer=True,
        legacy=False,
        **unet,
        device="meta",
        operations=comfy.ops.disable_weight_init,
    )
    return {f"diffusion_model.{key}": tuple(value.shape) for key, value in network.state_dict().items()}


def fits(key: str, parts: dict[str, Tensor], shape: tuple[int, ...]) -> bool:
    """Whether a low-rank term or difference is one of a weight of this shape. The input convolution may have more
    channels on either side.
    """
    if "diff::0" in parts:
        other = tuple(parts["diff::0"].shape)
        return other == shape or (key == FIRST and (other[0], *other[2:]) == (shape[0], *shape[2:]))
    up, down = parts["lora::0"], parts["lora::1"]
    return up.shape[0] == shape[0] and down.numel() == down.shape[0] * prod(shape[1:]) and up.shape[1] == down.shape[0]
