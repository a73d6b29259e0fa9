"""For custom_nodes of a ComfyUI that tests start: its own loaders build the published structures at another width.

They read the depth of a network from a file's keys, but take most families' widths as they were published, at which
one file is many gigabytes. narrow_host.json beside this file says the widths.
"""

import functools
import json
from pathlib import Path

import comfy.clip_vision
import comfy.ldm.flux.redux
import comfy.model_detection
import comfy.sd
import comfy.supported_models
import comfy.text_encoders.qwen_vl
import torch

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


def narrow_texts_of_checkpoint(load):
    def narrow(*args, **kwargs):
        return load(*args, **kwargs, te_model_options=WIDTHS["texts"])

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


def narrow_kl(build):
    def narrow(ddconfig, **kwargs):
        return build(ddconfig={**ddconfig, "ch": WIDTHS["autoencoder"]}, **kwargs)

    return narrow


def narrow_control(detect):
    """Of a ControlNet in diffusers' form, which is known by its three published widths."""

    def narrow(state_dict, *args, **kwargs):
        keys = "conv_in.weight", "add_embedding.linear_1.weight", "transformer_blocks.0.attn2.to_k.weight"
        known = dict(state_dict)
        for key, value in state_dict.items():
            if key in keys[:2] or key.endswith(keys[2]):
                shape = (320, *value.shape[1:]) if key == keys[0] else (1, 2816 if key == keys[1] else 2048)
                known[key] = torch.empty(shape, device="meta")
        config = detect(known, *args, **kwargs)
        return config and {**config, **WIDTHS["unets"]["SDXL"]}

    return narrow


class NarrowVision(comfy.clip_vision.ClipVisionModel):
    """SigLIP is known by the width of its first norm, of which a narrow file has the beginning."""

    def __init__(self, json_config):
        own = Path(__file__).with_name("vision.json")
        own.write_text(json.dumps(json.loads(Path(json_config).read_text()) | WIDTHS["vision"]))
        super().__init__(own)

    def load_sd(self, sd):
        first = "vision_model.encoder.layers.0.layer_norm1.weight"
        return super().load_sd(sd | {first: sd[first][: WIDTHS["vision"]["hidden_size"]]})


def narrow_eye(build):
    """Qwen's, which no prompt of words alone looks through."""

    def narrow(hidden_size, **options):
        return build(hidden_size=32, num_heads=2, num_layers=1, intermediate_size=32, **options)

    return narrow


comfy.model_detection.detect_unet_config = narrow_networks(comfy.model_detection.detect_unet_config)
comfy.sd.load_clip = narrow_texts(comfy.sd.load_clip)
comfy.sd.detect_te_model = known_texts(comfy.sd.detect_te_model)
comfy.sd.load_checkpoint_guess_config = narrow_texts_of_checkpoint(comfy.sd.load_checkpoint_guess_config)
comfy.sd.AutoencodingEngine = narrow_autoencoder(comfy.sd.AutoencodingEngine)
comfy.sd.AutoencoderKL = narrow_kl(comfy.sd.AutoencoderKL)
comfy.model_detection.unet_config_from_diffusers_unet = narrow_control(
    comfy.model_detection.unet_config_from_diffusers_unet
)
comfy.clip_vision.ClipVisionModel = NarrowVision
comfy.ldm.flux.redux.ReduxImageEncoder = functools.partial(comfy.ldm.flux.redux.ReduxImageEncoder, *WIDTHS["redux"])
for name, widths in WIDTHS["unets"].items():
    family = getattr(comfy.supported_models, name)
    family.unet_config = {**family.unet_config, **widths}
comfy.text_encoders.qwen_vl.Qwen2VLVisionTransformer = narrow_eye(comfy.text_encoders.qwen_vl.Qwen2VLVisionTransformer)
# By its width ComfyUI tells Z-Image from Lumina 2.
comfy.supported_models.ZImage.unet_config = {
    **comfy.supported_models.ZImage.unet_config,
    "dim": WIDTHS["networks"]["lumina2"]["dim"],
}
