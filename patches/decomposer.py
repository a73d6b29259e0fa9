"""LayeringDiff in ComfyUI: files of FBDD and HFA told by their content, the denoiser of a layer, and the layers of an
image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import comfy.model_management
import comfy.model_sampling
import comfy.ops
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.supported_models
import comfy.utils
import latent_preview
import torch
import torch.nn.functional as F
from comfy.model_base import ModelType
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.weight_adapter.lora import LoRAAdapter
from torch import Tensor

from ..networks import decomposer as networks
from ..networks.alignment import Alignment
from ..networks.decomposer import ALIGNMENT, NULL
from ..techniques import layering
from ..techniques.geometry import filled_up
from . import autoencoder, foreground
from .layer_rows import Rows
from .mini_family import UNET, StrataMini
from .transparency_model import further_channels, unpatched

KEY = "strata_decomposer"
FIRST, LORA = "conv_in.weight", ".lora_A.weight"
ALL = Rows(1, 0, 1)  # every row of a batch
HOSTS_FIRST = "input_blocks.0.0.weight"
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
MULTIPLE = 64  # sides of what the networks see: three halvings of an eighth
PREDICTIONS = {
    "v_prediction": comfy.model_sampling.V_PREDICTION,
    "epsilon": comfy.model_sampling.EPS,
}
STABLE_DIFFUSION = {  # ComfyUI's words for the shape of Stable Diffusion 1.5 and 2
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
}


class LayerUNet:
    """A whole UNet of FBDD in place of its family's: its further channels are not those of an inpainting model."""

    def inpaint_model(self):
        return False

    def model_type(self, state_dict, prefix=""):
        return ModelType.V_PREDICTION


def _layer_unet(family: type) -> type:
    config = {**family.unet_config, "in_channels": networks.CHANNELS}
    return type(f"{family.__name__}Layer", (LayerUNet, family), {"unet_config": config})


UNETS = [_layer_unet(family) for family in (StrataMini, comfy.supported_models.SD15, comfy.supported_models.SD20)]
FAMILIES = dict(zip((one.__name__ for one in UNETS), ("Strata mini", "SD1.5", "SD2"), strict=True))


@dataclass(frozen=True)
class Decomposer:
    """What one or more files hold. layers: each layer's denoiser, a whole model, or what is added to an inpainting
    model, by diffusers' names. alignment: networks by layer, each in a ModelPatcher. null: [1,T,D], the empty prompt.
    family: the inpainting model that it is made of.
    """

    name: str
    family: str
    prediction: str
    layers: dict[str, dict[str, Tensor] | ModelPatcher]
    null: Tensor | None
    alignment: dict[str, ModelPatcher] = field(default_factory=dict)

    def describe(self) -> str:
        parts = [*self.layers, *(["alignment"] if self.alignment else [])]
        return f"a decomposer for {self.family} ({', '.join(parts)})"

    @property
    def adapters(self) -> bool:
        """Whether an inpainting model is needed beside it."""
        return any(isinstance(own, dict) for own in self.layers.values())


def is_decomposer(weights: dict[str, Tensor]) -> bool:
    """Whether these are LayeringDiff's: a first convolution of 72 channels, or networks that align details."""
    return any(
        key.endswith((FIRST, HOSTS_FIRST)) and value.ndim == 4 and value.shape[1] == networks.CHANNELS
        for key, value in weights.items()
    ) or any(key.startswith(f"{ALIGNMENT}.") for key in weights)


def recognise(name: str, weights: dict[str, Tensor], metadata: dict[str, str], layer: str = "foreground") -> Decomposer:
    """A file's content from its weights. layer: what a file with one UNet of neither name is taken for. Raises
    ValueError with one sentence.
    """
    layers, alignment = {}, {}
    for one in networks.LAYERS:
        if own := _below(weights, f"{one}."):
            layers[one] = own
        if own := _below(weights, f"{ALIGNMENT}.{one}."):
            alignment[one] = _alignment(name, own)
    if not layers and not alignment:
        layers[layer] = weights
    prediction = metadata.get("prediction_type", "v_prediction")
    if prediction not in PREDICTIONS:
        raise ValueError(
            f"file: {name} says that it predicts {prediction!r}, and this pack knows {' and '.join(PREDICTIONS)}; "
            "correct prediction_type in its metadata."
        )
    layers = {one: _denoiser(name, one, own) for one, own in layers.items()}
    models = [own for own in layers.values() if not isinstance(own, dict)]
    family = FAMILIES[type(models[0].model.model_config).__name__] if models else metadata.get("base")
    null = weights[NULL].float() if NULL in weights else None
    return Decomposer(name, family or "an inpainting model", prediction, layers, null, alignment)


def _below(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def _denoiser(name: str, layer: str, weights: dict[str, Tensor]) -> dict[str, Tensor] | ModelPatcher:
    """What is added to an inpainting model as it is, a whole UNet as a model."""
    if any(key.endswith(LORA) for key in weights) and FIRST in weights:
        return weights
    state = host_form(weights)
    model = comfy.sd.load_diffusion_model_state_dict(state) if HOSTS_FIRST in state else None
    if model is None or not isinstance(model.model.model_config, LayerUNet):
        raise ValueError(
            f"file: {name} has no whole denoiser of the {layer} for Stable Diffusion 1.5 or 2 in it; choose a file "
            "that python -m training layeringdiff has written."
        )
    return model


def host_form(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A UNet's weights by ComfyUI's names without prefix, of those or of diffusers'."""
    if FIRST not in weights:
        prefix = next((one for one in PREFIXES if f"{one}{HOSTS_FIRST}" in weights), None)
        return {} if prefix is None else _below(weights, prefix)
    shape = UNET if weights[FIRST].shape[0] == UNET["model_channels"] else STABLE_DIFFUSION
    names = comfy.utils.unet_to_diffusers(shape)
    return {names[key]: value for key, value in weights.items() if key in names}


def join(parts: list[Decomposer]) -> Decomposer:
    """One decomposer of several files; a later one's parts take the place of an earlier one's. Raises ValueError for
    files of different families, and while a part is missing.
    """
    first, *further = parts
    for other in further:
        if other.layers and other.family != first.family:
            raise ValueError(
                f"background_file: {other.name} is for {other.family} and {first.name} is for {first.family}; choose "
                "files of the same family."
            )
    layers = {one: own for part in parts for one, own in part.layers.items()}
    if lacking := [one for one in networks.LAYERS if one not in layers]:
        socket = "background_file" if lacking == ["background"] else "file"
        raise ValueError(
            f"{socket}: there is no denoiser of the {lacking[0]} in {' and '.join(part.name for part in parts)}; "
            "choose the file that has it."
        )
    alignment = {one: own for part in parts for one, own in part.alignment.items()}
    null = next((part.null for part in parts if part.null is not None), None)
    return replace(first, layers=layers, alignment=alignment, null=null)


def _alignment(name: str, weights: dict[str, Tensor]) -> ModelPatcher:
    levels = [int(key.split(".")[1]) for key in weights if key.startswith("down.")]
    try:
        widths = [weights[f"down.{level}.0.weight"].shape[0] for level in range(1 + max(levels, default=-1))]
        network = Alignment(widths, operations=comfy.ops.manual_cast)
        network.load_state_dict(weights)
    except (KeyError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"file: {name} does not have all weights of the networks that align details; download it again, or write "
            "it again by python -m training publish."
        ) from error
    device, offload = comfy.model_management.vae_device(), comfy.model_management.vae_offload_device()
    return ModelPatcher(network.eval().requires_grad_(False).float(), device, offload)


def denoiser(
    model: ModelPatcher | None, decomposer: Decomposer, layer: str, latent: Tensor, cells: Tensor
) -> ModelPatcher:
    """A clone of the layer's own model, or of the inpainting model with what is added to it, that draws the layer of an
    image's latent [B,4,h,w], with cells [B,64,h,w] of its alpha. Raises ValueError for a model of another family.
    """
    own = decomposer.layers[layer]
    if not isinstance(own, dict):
        clone = own.clone()
    else:
        _check(model, decomposer, own)
        terms = _terms(model, decomposer, own)
        clone = _beside(model, own, terms) if _is_coarse(model, terms) else _merged(model, own, terms)
    given = clone.model.process_latent_in(latent)
    condition = networks.condition(given, cells.to(given), layer)
    clone.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, further_channels([condition]))
    clone.add_object_patch("model_sampling", _sampling(clone, decomposer.prediction))
    return clone


def _check(model: ModelPatcher, decomposer: Decomposer, own: dict[str, Tensor]) -> None:
    """Raises ValueError for a model of another family."""
    state, target = unpatched(model), f"diffusion_model.{HOSTS_FIRST}"
    if target not in state or state[target].shape[:2] != (own[FIRST].shape[0], 9):
        raise ValueError(
            f"model: {decomposer.name} is {decomposer.describe()}, and this is another model; connect the inpainting "
            f"model of {decomposer.family}."
        )


def _terms(
    model: ModelPatcher, decomposer: Decomposer, own: dict[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor] | Tensor]:
    """(up, down) by the host's key of the weight. Raises ValueError for a model of another family."""
    names, state = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config), unpatched(model)
    terms: dict[str, tuple[Tensor, Tensor] | Tensor] = {}
    for key, down in own.items():
        if not key.endswith(LORA):
            continue
        module = key.removesuffix(LORA)
        target, up = f"diffusion_model.{names.get(f'{module}.weight')}", own[f"{module}.lora_B.weight"]
        if target not in state or up.shape[0] != state[target].shape[0]:
            raise ValueError(
                f"model: {decomposer.name} changes {module}, which this model lacks or has in another size; connect "
                f"the inpainting model of {decomposer.family}."
            )
        terms[target] = up, down
    return terms


def _is_coarse(model: ModelPatcher, terms: dict) -> bool:
    """Whether the weights would lose what is merged into them: those of a byte or less."""
    state = unpatched(model)
    return any(not state[key].is_floating_point() or state[key].dtype.itemsize < 2 for key in terms)


def _merged(model: ModelPatcher, own: dict[str, Tensor], terms: dict) -> ModelPatcher:
    """Merged as ComfyUI's LoRAs are, so that other patches on these weights act too."""
    state, first, target = unpatched(model), own[FIRST].float(), f"diffusion_model.{HOSTS_FIRST}"
    difference, bias = first.clone(), target.replace("weight", "bias")
    difference[:, :9] -= state[target].to(first)
    patches: dict = {
        target: ("diff", (difference, {"pad_weight": True})),
        bias: ("diff", (own["conv_in.bias"].float() - state[bias].to(first),)),
    }
    for key, (up, down) in terms.items():
        patches[key] = LoRAAdapter(set(), (up, down, None, None, None, None))
    clone = model.clone()
    clone.add_patches(patches)
    return clone


def _beside(model: ModelPatcher, own: dict[str, Tensor], terms: dict) -> ModelPatcher:
    """The terms beside the model's own layers, whose weights stay as they are."""
    clone = foreground.apply_to_foreground(model, terms, rows=ALL).clone()
    first = own[FIRST]
    layer = comfy.ops.manual_cast.Conv2d(first.shape[1], len(first), first.shape[2:], padding=first.shape[-1] // 2)
    for end in ("weight", "bias"):
        setattr(layer, end, torch.nn.Parameter(own[f"conv_in.{end}"], requires_grad=False))
    clone.add_object_patch(f"diffusion_model.{HOSTS_FIRST.removesuffix('.weight')}", layer)
    return clone


def _sampling(model: ModelPatcher, prediction: str):
    class Sampling(comfy.model_sampling.ModelSamplingDiscrete, PREDICTIONS[prediction]):
        pass

    return Sampling(model.model.model_config)


@dataclass(frozen=True)
class Run:
    """How a layer is sampled: as in KSampler. from_image: start from the image's latent under noise in place of noise
    alone.
    """

    seed: int
    steps: int
    sampler: str
    scheduler: str
    from_image: bool = False


def take_apart(
    model: ModelPatcher | None,
    vae,
    decomposer: Decomposer,
    image: Tensor,
    alphas: Tensor,
    run: Run,
    align: bool = True,
    exact: bool = True,
) -> tuple[Tensor, Tensor]:
    """Foregrounds [K,B,3,H,W] and the background [B,3,H,W] of images [B,3,H,W] with alphas [K,B,1,H,W], front to back,
    in 0..1. An empty alpha leaves everything as it is, and its foreground is black.

    Source: layeringdiff, Sec. 4.3 (several layers: what is left of one is the next one's image)
    """
    passes = sum(len(networks.LAYERS) for alpha in alphas if alpha.any())
    progress = Progress(passes * run.steps)
    foregrounds, behind = [], image
    for alpha in alphas:
        if not alpha.any():
            foregrounds.append(torch.zeros_like(image))
            continue
        drawn = draw(model, vae, decomposer, behind, alpha, run, progress)
        front, behind = finish(decomposer, behind, alpha, drawn, align, exact)
        foregrounds.append(front)
    return torch.stack(foregrounds), behind


class Progress:
    """One bar over all passes, with previews of what is being drawn."""

    def __init__(self, total: int):
        self.bar, self.done = comfy.utils.ProgressBar(total), 0

    def callback(self, model: ModelPatcher, steps: int) -> Callable:
        previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
        start = self.done
        self.done += steps

        def callback(step: int, x0: Tensor, x: Tensor, total: int) -> None:
            shown = previewer.decode_latent_to_preview_image("JPEG", x0) if previewer else None
            self.bar.update_absolute(start + min(step + 1, steps), self.bar.total, shown)

        return callback


def draw(
    model: ModelPatcher | None,
    vae,
    decomposer: Decomposer,
    image: Tensor,
    alpha: Tensor,
    run: Run,
    progress: Progress,
    wanted: tuple[str, ...] = networks.LAYERS,
) -> list[Tensor]:
    """What FBDD draws of the wanted layers of images [B,3,H,W] with alphas [B,1,H,W], decoded [B,3,H,W].

    Source: layeringdiff, Sec. 3.3 (FBDD)
    """
    height, width = image.shape[-2:]
    padded, padded_alpha = filled_up(image, MULTIPLE), F.pad(alpha, _padding(alpha))
    latent, cells = autoencoder.encode(vae, padded.movedim(1, -1)), layering.alpha_cells(padded_alpha)
    layers = []
    for layer in wanted:
        clone = denoiser(model, decomposer, layer, latent, cells)
        sampled = _sample(clone, decomposer.null, latent, run, progress)
        made = autoencoder.decode(vae, sampled)[..., :3].movedim(-1, 1)
        layers.append(made[..., :height, :width].to(image))
    return layers


def finish(
    decomposer: Decomposer, image: Tensor, alpha: Tensor, drawn: list[Tensor], align: bool, exact: bool
) -> tuple[Tensor, Tensor]:
    """Foreground and background [B,3,H,W] in 0..1 of what was drawn of them, with the details and the visible pixels of
    the image [B,3,H,W].

    Source: layeringdiff, Sec. 3.3 (HFA, copying)
    Differs: what is seen of the layers corrects the rest, and they are brought to add up to the image, unless exact is
    off.
    """
    if align:
        drawn = [
            _aligned(decomposer.alignment[layer], image, alpha, made) if layer in decomposer.alignment else made
            for layer, made in zip(networks.LAYERS, drawn, strict=True)
        ]
    layers = [made.clamp(0, 1) for made in drawn]
    if exact:
        layers = [made.clamp(0, 1) for made in layering.spread_residual(image, alpha, *layers)]
    layers = layering.copy_visible(image, alpha, *layers)
    return layering.exact_layers(image, alpha, *layers) if exact else layers


def _padding(image: Tensor) -> tuple[int, ...]:
    """For F.pad: up to multiples of MULTIPLE, at the right and below."""
    return (0, -image.shape[-1] % MULTIPLE, 0, -image.shape[-2] % MULTIPLE)


def _sample(model: ModelPatcher, null: Tensor, latent: Tensor, run: Run, progress: Progress) -> Tensor:
    prompt = [[null, {}]]
    return comfy.sample.sample(
        model,
        comfy.sample.prepare_noise(latent, run.seed),
        run.steps,
        1.0,
        run.sampler,
        run.scheduler,
        prompt,
        prompt,
        latent if run.from_image else torch.zeros_like(latent),
        callback=progress.callback(model, run.steps),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=run.seed,
    )


def _aligned(network: ModelPatcher, image: Tensor, alpha: Tensor, layer: Tensor) -> Tensor:
    comfy.model_management.load_models_gpu([network], memory_required=image[:1].numel() * 64 * 4)
    parts = zip(image.split(1), alpha.split(1), layer.split(1), strict=True)
    device = network.load_device
    return torch.cat([network.model(*(part.to(device).float() for part in one)).to(layer) for one in parts])


def ready(
    decomposer: Decomposer, vae, model: ModelPatcher | None, empty: list | None, socket: str = "empty_prompt"
) -> Decomposer:
    """The decomposer with an empty prompt in it, from the given conditioning where the file has none. Raises ValueError
    while something that it needs is missing, before any work is done.

    socket: that the conditioning comes in by.
    """
    if decomposer.adapters and model is None:
        raise ValueError(
            f"model: nothing is connected and {decomposer.name} needs it; connect the inpainting model of "
            f"{decomposer.family}."
        )
    if vae.latent_channels != 4 or vae.spacial_compression_encode() != 8:
        raise ValueError(
            f"vae: it makes latents of {vae.latent_channels} channels at 1/{vae.spacial_compression_encode()} of the "
            f"size; connect the VAE of {decomposer.family}."
        )
    if decomposer.null is not None:
        return decomposer
    if not empty:
        raise ValueError(
            f"{socket}: {decomposer.name} has no empty prompt in it; connect a text encoding of no words, from the "
            f"text encoder of {decomposer.family}."
        )
    null, unets = empty[0][0], [own.model for own in decomposer.layers.values() if not isinstance(own, dict)]
    for width in {unet.model_config.unet_config["context_dim"] for unet in unets} - {null.shape[-1]}:
        raise ValueError(
            f"{socket}: its embeddings have {null.shape[-1]} numbers a token and {decomposer.name} takes {width}; "
            f"encode it with the text encoder of {decomposer.family}."
        )
    return replace(decomposer, null=null)
