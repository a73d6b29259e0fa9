"""Text encoders of the transformer families: the host's own classes at reduced width with random weights, and its real
tokenizers.
"""

import comfy.sd
import comfy.text_encoders.flux
import comfy.text_encoders.qwen_image
import comfy.text_encoders.sd3_clip
import comfy.text_encoders.z_image
import torch
from comfy.supported_models_base import ClipTarget

WIDTH = 16
QWEN = {
    "hidden_size": WIDTH,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
CLIP = {"hidden_size": WIDTH, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
CONFIGS = {
    "t5xxl_model_config": {"d_model": WIDTH, "d_kv": 8, "num_heads": 2, "d_ff": 16, "num_layers": 2},
    "clip_l_model_config": CLIP,
    "clip_g_model_config": CLIP,
    # ComfyUI knows Qwen2.5 7B by the width of its keys, 4 heads of 128.
    "qwen25_7b_model_config": {**QWEN, "num_attention_heads": 4, "num_key_value_heads": 4},
    "qwen3_4b_model_config": QWEN,
}
MODULES = {
    "Flux": (comfy.text_encoders.flux.FluxTokenizer, comfy.text_encoders.flux.FluxClipModel),
    "Qwen-Image": (comfy.text_encoders.qwen_image.QwenImageTokenizer, comfy.text_encoders.qwen_image.QwenImageTEModel),
    "SD3.5": (comfy.text_encoders.sd3_clip.SD3Tokenizer, comfy.text_encoders.sd3_clip.SD3ClipModel),
    "Z-Image": (comfy.text_encoders.z_image.ZImageTokenizer, comfy.text_encoders.z_image.ZImageTEModel),
}


# It joins T5's tokens with CLIP's at T5's published width; a part of the vocabulary keeps it small.
SD35 = {"t5xxl_model_config": {**CONFIGS["t5xxl_model_config"], "d_model": 4096, "vocab_size": 10000}}


def encoder(kind):
    tokenizer, network = MODULES[kind]
    configs = CONFIGS | (SD35 if kind == "SD3.5" else {})

    def small(device, dtype, model_options):
        with torch.device("meta"):  # Qwen's eye alone would be 2 GB
            model = network(device="meta", dtype=torch.float32, model_options={**model_options, **configs})
        for part in model.children():
            if hasattr(part.transformer, "visual"):
                del part.transformer.visual
        generator = torch.Generator().manual_seed(3)
        model.to_empty(device="cpu")
        for weight in model.parameters():
            weight.data = torch.randn(weight.shape, generator=generator) * 0.3
        return model

    return comfy.sd.CLIP(ClipTarget(tokenizer, small))
