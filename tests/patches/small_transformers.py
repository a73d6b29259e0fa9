"""Random models of every transformer family's structure at reduced width, of ComfyUI's own classes."""

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.supported_models
import torch
from comfy.ldm.flux.model import FluxParams

CONTEXT, POOLED = 24, 10
FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": POOLED,
    "context_in_dim": CONTEXT,
    "hidden_size": 32,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 3,
    "depth_single_blocks": 3,
    "axes_dim": [4, 6, 6],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": True,
    **({"txt_ids_dims": []} if "txt_ids_dims" in FluxParams.__dataclass_fields__ else {}),  # newer ComfyUI's
}
KINDS = {
    "Flux": (comfy.supported_models.Flux, FLUX),
    "Flux-Fill": (comfy.supported_models.FluxInpaint, {**FLUX, "in_channels": 96, "guidance_embed": False}),
    "Qwen-Image": (
        comfy.supported_models.QwenImage,
        {
            "image_model": "qwen_image",
            "in_channels": 64,
            "out_channels": 16,
            "num_layers": 6,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": CONTEXT,
            "axes_dims_rope": (4, 6, 6),
        },
    ),
    "Z-Image": (
        comfy.supported_models.ZImage,
        {
            "image_model": "lumina2",
            "patch_size": 2,
            "in_channels": 16,
            "dim": 256,  # at least, for its modulation
            "n_layers": 6,
            "n_refiner_layers": 1,
            "n_heads": 8,
            "n_kv_heads": 8,
            "multiple_of": 16,
            "ffn_dim_multiplier": 1.0,
            "qk_norm": True,
            "cap_feat_dim": CONTEXT,
            "axes_dims": [8, 12, 12],
            "axes_lens": [64, 64, 64],
            "rope_theta": 256.0,
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "pad_tokens_multiple": 8,
        },
    ),
    "SD3.5": (
        comfy.supported_models.SD3,
        {
            "in_channels": 16,
            "patch_size": 2,
            "depth": 1,  # 64 wide
            "num_blocks": 6,
            "pos_embed_scaling_factor": None,
            "pos_embed_max_size": 16,
            "num_patches": 256,
            "adm_in_channels": POOLED,
            "qk_norm": "rms",
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": CONTEXT, "out_features": 64},
            },
        },
    ),
}
NAMES = list(KINDS)


def patcher(kind, dtype=torch.float32, **changes):
    """In a ModelPatcher, as a loader node returns it; every weight is random, so that each part counts."""
    family, shape = KINDS[kind]
    config = family({**shape, **changes, "dtype": dtype})
    config.manual_cast_dtype = torch.float32 if dtype.itemsize < 4 else None
    config.custom_operations = comfy.ops.manual_cast
    torch.manual_seed(7)
    model = config.get_model({}, "", "cpu")
    for name, weight in model.diffusion_model.named_parameters():
        value = torch.randn(weight.shape) * (weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.1)
        norm = weight.ndim == 1 and ("norm" in name or name.endswith("scale")) and not name.endswith("bias")
        weight.data = (value + norm).to(dtype)
    for buffer in model.diffusion_model.buffers():
        buffer.data.normal_()
    return comfy.model_patcher.ModelPatcher(model, comfy.model_management.get_torch_device(), torch.device("cpu"))


def unknown():
    """A transformer that is in no table: AuraFlow's."""
    shape = {
        "n_double_layers": 1,
        "n_layers": 1,
        "n_heads": 2,
        "dim": 32,
        "cond_seq_dim": CONTEXT,
        "global_conddim": 32,
        "dtype": torch.float32,
    }
    model = comfy.supported_models.AuraFlow({**shape, "max_seq": 64}).get_model({}, "", "cpu")
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def conditioning(seed, rows, tokens=7, **extra):
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(rows, POOLED, generator=generator)
    return [[torch.randn(rows, tokens, CONTEXT, generator=generator), {"pooled_output": pooled, **extra}]]


def latents(kind, count=3, side=(10, 6), seed=5):
    shape = (count, 16, 1, *side) if kind == "Qwen-Image" else (count, 16, *side)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
