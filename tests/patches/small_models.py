"""Models of the whole structure of SD1.5, SDXL and Flux at a tenth of the width, random files for them, and a run."""

import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_base
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.supported_models
import torch
from comfy.ldm.flux.model import FluxParams
from strata.patches import transparency

from . import random_family, random_transparency

SD15 = {
    "channel_mult": [1, 2, 4, 4],
    "num_res_blocks": [2, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "context_dim": 24,
}


class Small(comfy.supported_models.SD15):
    """SD1.5's whole structure, a tenth as wide."""

    unet_config = {
        **SD15,
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "use_spatial_transformer": True,
        "legacy": False,
        "num_heads": 4,
    }

    def __init__(self, **changes):
        super().__init__({**self.unet_config, **changes})


class SmallXL(Small):
    """SDXL's, with its pooled text and sizes."""

    unet_config = {
        **Small.unet_config,
        "channel_mult": [1, 2, 4],
        "num_res_blocks": [2, 2, 2],
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "transformer_depth_middle": 10,
        "use_linear_in_transformer": True,
        "num_classes": "sequential",
        "adm_in_channels": 2816,
    }
    latent_format = comfy.supported_models.SDXL.latent_format


def small(prediction=comfy.model_base.ModelType.EPS, kind=Small, **changes):
    config = kind(**changes)
    config.unet_config["dtype"] = torch.float32
    torch.manual_seed(0)
    model = (comfy.model_base.SDXL if kind is SmallXL else comfy.model_base.BaseModel)(config, prediction)
    weights = {key: value.float() for key, value in random_family.randomised(model.diffusion_model).items()}
    weights["out.2.weight"] *= 0.3  # a mild network: two of them that differ by a rounding stay together over the steps
    model.diffusion_model.load_state_dict(weights)
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def shapes(model):
    return {
        key: tuple(value.shape) for key, value in model.model.state_dict().items() if key.startswith("diffusion_model.")
    }


def sample(model, batch=1, steps=2, positive=None, latent=None, cfg=3.0, seed=1, **extra):
    torch.manual_seed(5)
    width = model.model.model_config.unet_config["context_dim"]
    positive = torch.randn(1, 77, width) if positive is None else positive
    negative = torch.randn(1, 77, width)
    latent = torch.zeros(batch, 4, 8, 16) if latent is None else latent
    noise, pooled = comfy.sample.prepare_noise(latent, seed), {"pooled_output": torch.ones(1, 1280), **extra}
    return comfy.sample.sample(
        model,
        noise,
        steps,
        cfg,
        "euler",
        "normal",
        [[positive, pooled]],
        [[negative, pooled]],
        latent,
        disable_pbar=True,
        seed=seed,
    )


def small_flux(**changes):
    options = {
        "image_model": "flux",
        "in_channels": 16,
        "out_channels": 16,
        "vec_in_dim": 8,
        "context_in_dim": 16,
        "hidden_size": 32,
        "mlp_ratio": 4.0,
        "num_heads": 2,
        "depth": 2,
        "depth_single_blocks": 2,
        "axes_dim": [4, 6, 6],
        "theta": 10000,
        "patch_size": 2,
        "qkv_bias": True,
        "guidance_embed": True,
        "dtype": torch.float32,
        **changes,
        **({"txt_ids_dims": []} if "txt_ids_dims" in FluxParams.__dataclass_fields__ else {}),
    }
    model = comfy.model_base.Flux(comfy.supported_models.Flux(options))
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def attentions(unet):
    """(module, query, context, inner width), the middle block's last."""
    blocks = [block for part in (unet.input_blocks, unet.output_blocks, [unet.middle_block]) for block in part]
    transformers = [item for block in blocks for item in block if hasattr(item, "transformer_blocks")]
    found = [layer for item in transformers for one in item.transformer_blocks for layer in (one.attn1, one.attn2)]
    return [(layer, layer.to_q.in_features, layer.to_k.in_features, layer.to_q.out_features) for layer in found]


def sharing(model, frames, control=0):
    torch.manual_seed(7)
    weights = random_transparency.sharing(
        [widths for _, *widths in attentions(model.model.diffusion_model)], frames, control=control
    )
    weights = {key: value * (0.3 if "_lora" in key else 1) for key, value in weights.items()}
    return weights, transparency.recognise("sharing.safetensors", weights)


def file_for(kind, model):
    """What is published for a family, with random weights; there is nothing for SD2."""
    if kind == "SD1.5":
        return sharing(model, 1)[1]
    return (
        transparency.recognise("adapter", random_transparency.adapter(shapes(model), rank=4, scale=0.2))
        if kind == "SDXL"
        else None
    )
