"""LayeringDiff in ComfyUI: files of FBDD and HFA told by their content, the denoiser of a layer, and the layers of an
image.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import comfy.model_management
import comfy.model_sampling
import comfy.ops
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.weight_adapter.lora import LoRAAdapter
from torch import Tensor

from ..networks import decomposer as networks
from ..networks.alignment import Alignment
from ..techniques import layering
from .transparency_model import further_channels, unpatched

KEY = "strata_decomposer"
FIRST = "diffusion_model.input_blocks.0.0.weight"
NULL, LORA = "null_prompt", ".lora_A.weight"
ALIGNMENT = "alignment"
MULTIPLE = 64  # sides of what the networks see: three halvings of an eighth


@dataclass(frozen=True)
class Decomposer:
    """What one or more files hold. layers: weights of each layer's denoiser by diffusers' names. alignment: networks by
    layer, each in a ModelPatcher. null: [1,77,D], the empty prompt. family: the inpainting model that it is made of.
    """

    name: str
    family: str
    prediction: str
    layers: dict[str, dict[str, Tensor]]
    null: Tensor
    alignment: dict[str, ModelPatcher] = field(default_factory=dict)

    def describe(self) -> str:
        parts = [*self.layers, *(["alignment"] if self.alignment else [])]
        return f"a decomposer for {self.family} ({', '.join(parts)})"


def is_decomposer(weights: dict[str, Tensor]) -> bool:
    return any(key.startswith(tuple(f"{layer}.conv_in." for layer in networks.LAYERS)) for key in weights)


def recognise(name: str, weights: dict[str, Tensor], metadata: dict[str, str]) -> Decomposer:
    """Raises ValueError with one sentence for a file that lacks a part."""
    layers = {
        layer: {key.removeprefix(f"{layer}."): value for key, value in weights.items() if key.startswith(f"{layer}.")}
        for layer in networks.LAYERS
    }
    lacking = [layer for layer, own in layers.items() if "conv_in.weight" not in own]
    if lacking or NULL not in weights:
        what = f"weights of the {lacking[0]}" if lacking else "empty prompt"
        raise ValueError(f"file: {name} lacks the {what}; write it again by python -m training publish.")
    alignment = {}
    for layer in networks.LAYERS:
        prefix = f"{ALIGNMENT}.{layer}."
        own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        if own:
            alignment[layer] = _alignment(own)
    return Decomposer(
        name,
        metadata.get("base", "an inpainting model"),
        metadata.get("prediction_type", "v_prediction"),
        layers,
        weights[NULL].float(),
        alignment,
    )


def _alignment(weights: dict[str, Tensor]) -> ModelPatcher:
    levels = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("down."))
    widths = [weights[f"down.{level}.0.weight"].shape[0] for level in range(levels)]
    network = Alignment(widths, operations=comfy.ops.manual_cast)
    network.load_state_dict(weights)
    device, offload = comfy.model_management.vae_device(), comfy.model_management.vae_offload_device()
    return ModelPatcher(network.eval().requires_grad_(False).float(), device, offload)


def denoiser(model: ModelPatcher, decomposer: Decomposer, layer: str, condition: Tensor) -> ModelPatcher:
    """A clone of the inpainting model that draws a layer for condition [B,68,h,w]. Raises ValueError for a model of
    another family.
    """
    names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    state, own = unpatched(model), decomposer.layers[layer]
    first = own["conv_in.weight"].float()
    if FIRST not in state or state[FIRST].shape[0] != first.shape[0] or state[FIRST].shape[1] != 9:
        raise ValueError(
            f"model: {decomposer.name} is {decomposer.describe()}, and this is another model; connect the inpainting "
            f"model of {decomposer.family}."
        )
    patches: dict = {}
    for key, down in own.items():
        if not key.endswith(LORA):
            continue
        module = key.removesuffix(LORA)
        target = f"diffusion_model.{names.get(f'{module}.weight')}"
        up = own[f"{module}.lora_B.weight"]
        if target not in state or up.shape[0] != state[target].shape[0]:
            raise ValueError(
                f"model: {decomposer.name} changes {module}, which this model lacks or has in another size; connect "
                f"the inpainting model of {decomposer.family}."
            )
        patches[target] = LoRAAdapter(set(), (up, down, None, None, None, None))
    difference = first.clone()
    difference[:, :9] -= state[FIRST].to(first)
    patches[FIRST] = ("diff", (difference, {"pad_weight": True}))
    bias = FIRST.replace("weight", "bias")
    patches[bias] = ("diff", (own["conv_in.bias"].float() - state[bias].to(first),))
    clone = model.clone()
    clone.add_patches(patches)
    clone.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, further_channels([condition]))
    if decomposer.prediction == "v_prediction":
        clone.add_object_patch("model_sampling", _v_sampling(model))
    return clone


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


def decompose(
    model: ModelPatcher, vae, decomposer: Decomposer, image: Tensor, alpha: Tensor, run: Run, align: bool, exact: bool
) -> tuple[Tensor, Tensor]:
    """Foreground and background [B,3,H,W] of images [B,3,H,W] with alphas [B,1,H,W], both in 0..1.

    Source: layeringdiff, Sec. 3.3 (layering stage)
    Differs: the layers are brought to add up to the image, unless exact is off.
    """
    height, width = image.shape[-2:]
    padding = (0, -width % MULTIPLE, 0, -height % MULTIPLE)
    # An image that is smaller than what is added cannot be mirrored so far.
    mode = "reflect" if padding[1] < width and padding[3] < height else "replicate"
    whole, behind = F.pad(image, padding, mode=mode), F.pad(alpha, padding)
    latent = vae.encode(whole.movedim(1, -1))
    cells = layering.alpha_cells(behind)
    given = model.model.process_latent_in(latent)
    layers = []
    for layer in networks.LAYERS:
        clone = denoiser(model, decomposer, layer, networks.condition(given, cells.to(given), layer))
        found = _sample(clone, decomposer.null, latent, run)
        made = vae.decode(found).movedim(-1, 1)
        if align and layer in decomposer.alignment:
            made = _aligned(decomposer.alignment[layer], whole, behind, made).clamp(0, 1)
        layers.append(made[..., :height, :width].to(image))
    layers = layering.copy_visible(image, alpha, *layers)
    return layering.exact_layers(image, alpha, *layers) if exact else layers


def _sample(model: ModelPatcher, null: Tensor, latent: Tensor, run: Run) -> Tensor:
    start = latent if run.from_image else torch.zeros_like(latent)
    noise = comfy.sample.prepare_noise(latent, run.seed)
    prompt = [[null, {}]]
    callback = latent_preview.prepare_callback(model, run.steps)
    return comfy.sample.sample(
        model,
        noise,
        run.steps,
        1.0,
        run.sampler,
        run.scheduler,
        prompt,
        prompt,
        start,
        callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=run.seed,
    )


def _aligned(network: ModelPatcher, image: Tensor, alpha: Tensor, layer: Tensor) -> Tensor:
    comfy.model_management.load_models_gpu([network], memory_required=image[:1].numel() * 64 * 4)
    parts = zip(image.split(1), alpha.split(1), layer.split(1), strict=True)
    device = network.load_device
    return torch.cat([network.model(*(part.to(device).float() for part in one)).to(layer) for one in parts])


def _v_sampling(model: ModelPatcher):
    class Sampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.V_PREDICTION):
        pass

    return Sampling(model.model.model_config)
