"""Checkpoints of the mini family with random weights, made of ComfyUI's own classes: what the trainers ship, but for
the training.
"""

from pathlib import Path

import comfy.clip_model
import comfy.ops
import comfy.taesd.taesd
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from safetensors.torch import save_file
from strata.patches.mini_family import CONFIG, TOKEN_IDS, TOKEN_ROWS

OPS = comfy.ops.disable_weight_init
WORDS = ("a", "picture", "of", "dog", "cat", "red", "apple", "on", "the", "beach", "in", "snow")


def unet(channels: int, device: str = "cpu") -> UNetModel:
    config = {**CONFIG["unet"], "in_channels": channels}
    return UNetModel(
        image_size=32,
        use_spatial_transformer=True,
        legacy=False,
        num_head_channels=-1,
        dtype=torch.float32,
        device=device,
        operations=OPS,
        **config,
    )


def randomised(module: torch.nn.Module) -> dict:
    """Weights that keep a signal's size from layer to layer, in half precision as shipped."""
    for name, weight in module.named_parameters():
        if name.endswith("bias") or weight.ndim == 0:
            continue
        elif weight.ndim == 1:
            weight.data.fill_(1).add_(torch.randn_like(weight), alpha=0.1)
        else:
            weight.data.normal_(0, weight[0].numel() ** -0.5)
    for name, weight in module.named_parameters():
        if name.endswith("bias"):
            weight.data.normal_(0, 0.1)
    return {key: value.half().contiguous() for key, value in module.state_dict().items()}


def autoencoder(channels: int = 4) -> dict:
    """Weak residual branches, wide latents and mid gray, so that pictures differ and are neither black nor white."""
    model = comfy.taesd.taesd.TAESD(latent_channels=channels)
    weights = randomised(model)
    for key in weights:
        if ".conv.4." in key:
            weights[key] *= 0.2
    weights[f"taesd_encoder.{len(model.taesd_encoder) - 1}.weight"] *= 8
    weights[f"taesd_decoder.{len(model.taesd_decoder) - 1}.bias"] += 0.5
    return weights


def token_ids() -> list[int]:
    from transformers import CLIPTokenizer

    folder = Path(comfy.clip_model.__file__).parent / "sd1_tokenizer"
    return sorted({token for word in WORDS for token in CLIPTokenizer.from_pretrained(folder)(word)["input_ids"]})


def write(path: Path, channels: int) -> Path:
    torch.manual_seed(channels)
    weights = {f"model.diffusion_model.{key}": value for key, value in randomised(unet(channels)).items()}
    weights |= {f"first_stage_model.{key}": value for key, value in autoencoder().items()}
    text = randomised(comfy.clip_model.CLIPTextModel(dict(CONFIG["text"]), torch.float32, "cpu", OPS))
    weights |= {
        f"cond_stage_model.transformer.{key}": value
        for key, value in text.items()
        if not key.startswith("text_projection")
    }
    ids = token_ids()
    weights[TOKEN_IDS] = torch.tensor(ids, dtype=torch.int32)
    weights[TOKEN_ROWS] = weights[TOKEN_ROWS][ids].contiguous()
    save_file(weights, path)
    return path
