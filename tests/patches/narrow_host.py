"""For custom_nodes of a ComfyUI that tests start: its own loaders build the published structures at another width.

They read the depth of a network from a file's keys, but take most families' widths as they were published, at which
one file is many gigabytes. narrow_host.json beside this file says the widths.
"""

import json
from pathlib import Path

import comfy.model_detection
import comfy.sd
import comfy.supported_models
import comfy.text_encoders.qwen_vl

WIDTHS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
NODE_CLASS_MAPPINGS = {}


def narrow_networks(detect):
    def narrow(state_dict, *args, **kwargs):
        config = detect(state_dict, *args, **kwargs)
        return config and {**config, **WIDTHS["networks"].get(config.get("image_model"), {})}

    return narrow


def narrow_texts(load):
    def narrow(*args, model_options, **kwargs):
        return load(*args, model_options={**model_options, **WIDTHS["texts"]}, **kwargs)

    return narrow


def known_texts(detect):
    """Newer ComfyUI tells Qwen3 4B from others by its width."""

    def known(weights):
        qwen3 = "model.layers.0.self_attn.q_norm.weight" in weights
        return comfy.sd.TEModel.QWEN3_4B if qwen3 else detect(weights)

    return known


def narrow_autoencoder(build):
    def narrow(regularizer_config, **halves):
        for half in halves.values():
            half["params"]["ch"] = WIDTHS["autoencoder"]
        return build(regularizer_config=regularizer_config, **halves)

    return narrow


def narrow_eye(build):
    """Qwen's, which no prompt of words alone looks through."""

    def narrow(hidden_size, **options):
        return build(hidden_size=32, num_heads=2, num_layers=1, intermediate_size=32, **options)

    return narrow


comfy.model_detection.detect_unet_config = narrow_networks(comfy.model_detection.detect_unet_config)
comfy.sd.load_clip = narrow_texts(comfy.sd.load_clip)
comfy.sd.detect_te_model = known_texts(comfy.sd.detect_te_model)
comfy.sd.AutoencodingEngine = narrow_autoencoder(comfy.sd.AutoencodingEngine)
comfy.text_encoders.qwen_vl.Qwen2VLVisionTransformer = narrow_eye(comfy.text_encoders.qwen_vl.Qwen2VLVisionTransformer)
# By its width ComfyUI tells Z-Image from Lumina 2.
comfy.supported_models.ZImage.unet_config = {
    **comfy.supported_models.ZImage.unet_config,
    "dim": WIDTHS["networks"]["lumina2"]["dim"],
}
