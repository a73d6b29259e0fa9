"""ComfyUI's autoencoders of today's families with random weights, a quarter or less as wide, through its own loader and
Load RGBA VAE's, and a small model for the latents of each.
"""

import comfy.model_base
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import pytest
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL, AutoencodingEngine
from comfy.ldm.wan.vae import WanVAE
from strata.networks.autoencoder import Autoencoder
from strata.patches import rgba_vae

from . import fusion_reference, random_family, small_models

WIDTH = 32  # of 128
KL = {
    "double_z": True,
    "resolution": 256,
    "ch": WIDTH,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}
DIAGONAL = {"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"}
WAN = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": [], "temperal_downsample": [False, True, True]}
# (channels of the image, model of the latents)
KINDS = {
    "SD": (3, "SD1.5"),
    "Flux": (3, "Flux"),
    "Qwen-Image": (3, "Qwen-Image"),
    "mini RGBA": (4, "SD1.5"),
    "Flux RGBA": (4, "Flux"),
    "Qwen-Image-Layered": (4, "Qwen-Image"),
}


def parts(config: dict) -> dict:
    """What AutoencodingEngine is made of."""
    names = {"encoder_config": "Encoder", "decoder_config": "Decoder"}
    where = "comfy.ldm.modules.diffusionmodules.model"
    return {key: {"target": f"{where}.{name}", "params": config} for key, name in names.items()}


def weights(kind: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    channels = KINDS[kind][0]
    image = {"in_channels": channels, "out_ch": channels}
    if kind == "SD":
        network = AutoencoderKL(ddconfig={**KL, **image, "z_channels": 4}, embed_dim=4)
    elif kind in ("Flux", "Flux RGBA"):
        network = AutoencodingEngine(regularizer_config=DIAGONAL, **parts({**KL, **image, "z_channels": 16}))
    elif kind == "mini RGBA":
        network = Autoencoder(image_channels=4)
    else:
        network = WanVAE(dim=8, z_dim=16, **WAN)
        if channels == 4:  # ComfyUI 0.3.75 makes three alone
            for name, side in (("encoder.conv1", 1), ("decoder.head.2", 0)):
                layer = network.get_submodule(name)
                wide = layer.weight.data.repeat_interleave(2, side).narrow(side, 0, 4)
                layer.weight = torch.nn.Parameter(wide)
            layer.bias = torch.nn.Parameter(torch.zeros(4))
    found = {key: value.float() for key, value in random_family.randomised(network).items()}
    if kind == "mini RGBA":
        found |= {"vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)}
    return found


def autoencoder(kind: str) -> comfy.sd.VAE:
    with pytest.MonkeyPatch.context() as patch:
        # ComfyUI knows these two in one width alone.
        patch.setattr(comfy.sd, "AutoencoderKL", narrow_kl)
        patch.setattr(comfy.sd, "AutoencodingEngine", narrow_engine)
        state = weights(kind)
        if KINDS[kind][0] == 3:
            return comfy.sd.VAE(sd=state)
        return rgba_vae.RGBAVAE(state, rgba_vae._ends(state))


def narrow_kl(ddconfig: dict, **rest) -> AutoencoderKL:
    return AutoencoderKL(ddconfig={**ddconfig, "ch": WIDTH}, **rest)


def narrow_engine(encoder_config: dict, decoder_config: dict, **rest) -> AutoencodingEngine:
    return AutoencodingEngine(**parts({**encoder_config["params"], "ch": WIDTH}), **rest)


def model(name: str) -> comfy.model_patcher.ModelPatcher:
    if name == "Flux":
        return small_models.small_flux()
    return small_qwen() if name == "Qwen-Image" else fusion_reference.patcher(name)


def small_qwen() -> comfy.model_patcher.ModelPatcher:
    shape = {
        "image_model": "qwen_image",
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "axes_dims_rope": (8, 12, 12),
        "dtype": torch.float32,
    }
    config = comfy.supported_models.QwenImage({**comfy.supported_models.QwenImage.unet_config, **shape})
    config.manual_cast_dtype = config.custom_operations = None
    network = comfy.model_base.QwenImage(config).eval()
    draw = torch.Generator().manual_seed(0)
    for key, value in network.named_parameters():
        scale = value.shape[-1] ** -0.5 if value.ndim > 1 else 0.1
        value.data = (value.ndim == 1) * ("norm" in key) + scale * torch.randn(value.shape, generator=draw)
    network.diffusion_model.dtype = torch.float32
    return comfy.model_patcher.ModelPatcher(network, torch.device("cpu"), torch.device("cpu"))


def conditioning(name: str, rows: int = 1, seed: int = 1, **extra) -> list:
    """For the model of this name."""
    draw = torch.Generator().manual_seed(seed)
    width, pooled = {"SD1.5": (48, 1280), "Flux": (16, 8), "Qwen-Image": (24, 1280)}[name]
    text = torch.randn(rows, 7, width, generator=draw)
    return [[text, {"pooled_output": torch.randn(rows, pooled, generator=draw), **extra}]]
