"""The mini family for ComfyUI's stock loaders: how its checkpoints are told from all others, and where this pack's
model files lie.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import comfy.latent_formats
import comfy.model_base
import comfy.supported_models
import folder_paths
import torch
from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer, SDClipModel, SDTokenizer
from comfy.supported_models_base import ClipTarget
from torch import Tensor

from .notes import tell

PACK = Path(__file__).parent.parent
CONFIG, TRAINED = (
    json.loads((PACK / "models_config" / "mini" / f"{name}.json").read_text(encoding="utf-8"))
    for name in ("sd", "diffusion")
)
UNET, FLUX, TEXT, LATENT = CONFIG["unet"], CONFIG["flux"], CONFIG["text"], CONFIG["latent"]
KINDS = ("checkpoints", "diffusion_models", "layer_model", "strata", "vae")
TOKEN_IDS = "cond_stage_model.token_ids"
TOKEN_ROWS = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"


class StrataMiniLatent(comfy.latent_formats.LatentFormat):
    """Latents as the autoencoder makes them, which trains it to about unit deviation; previews need rgb_factors [4,3]
    and rgb_bias [3].
    """

    latent_channels = LATENT["channels"]
    scale_factor = LATENT["scale_factor"]
    latent_rgb_factors = LATENT["rgb_factors"]
    latent_rgb_factors_bias = LATENT["rgb_bias"]


class TokenizerOfFewWords(SD1Tokenizer):
    """ComfyUI's, which says on the node which words of a prompt the family does not know. known: the numbers of its
    tokens, None where the checkpoint does not tell.
    """

    def __init__(self, known: frozenset[int] | None, **kwargs):
        super().__init__(**kwargs)
        self.known = known

    def tokenize_with_weights(self, text: str, *args, **kwargs):
        if words := self.unknown(text):
            tell(
                f"The mini family does not know {', '.join(words[:5])}{' …' * (len(words) > 5)}; use objects that "
                "Render a layered scene lists, and places such as a beach or a street."
            )
        return super().tokenize_with_weights(text, *args, **kwargs)

    def unknown(self, text: str) -> list[str]:
        """The words of a text that have a token without a row of its own."""
        if self.known is None:
            return []
        encode = getattr(self, self.clip).tokenizer
        words = dict.fromkeys(re.findall(r"[^\W\d_]+", re.sub(r"embedding:\S+", "", text)))
        return [word for word in words if not self.known.issuperset(encode(word)["input_ids"])]


def tell_size(noise: Tensor | None, sides: Sequence[int] = (TRAINED["side"],)) -> None:
    """A note for latents [B,C,h,w] of images of other sizes than the model was trained at, squares of these sides."""
    if noise is not None and tuple(noise.shape[-2:]) not in [(side // 8, side // 8) for side in sides]:
        height, width = (8 * length for length in noise.shape[-2:])
        known = " and ".join(f"{side}×{side}" for side in sides)
        tell(
            f"The mini family was trained at {known} pixels and does not know {width}×{height}; things may come in "
            "pieces or twice."
        )


class UNetOfOneSize(comfy.model_base.BaseModel):
    """ComfyUI's model, which says on the node when it gets a size that the family does not know."""

    def extra_conds(self, **kwargs):
        tell_size(kwargs.get("noise"))
        return super().extra_conds(**kwargs)


class StrataMini(comfy.supported_models.SD15):
    """Matched by everything that ComfyUI reads from a UNet's weights; the number of heads cannot be read and is set."""

    unet_config = {
        **{key: value for key, value in UNET.items() if key != "num_heads"},
        "use_linear_in_transformer": False,
        "adm_in_channels": None,
        "use_temporal_attention": False,
    }
    unet_extra_config = {"num_heads": UNET["num_heads"], "num_head_channels": -1}
    latent_format = StrataMiniLatent

    def get_model(self, state_dict, prefix="", device=None):
        model = UNetOfOneSize(self, self.model_type(state_dict, prefix), device=device)
        if self.inpaint_model():
            model.set_inpaint()
        model.blank_inpaint_image_like = gray_latent  # ComfyUI has set SD1.5's numbers
        return model

    def process_clip_state_dict(self, state_dict):
        if TOKEN_IDS in state_dict:
            state_dict[TOKEN_ROWS] = all_token_rows(state_dict[TOKEN_ROWS], state_dict.pop(TOKEN_IDS))
        return super().process_clip_state_dict(state_dict)

    def clip_target(self, state_dict=None):
        text_model = partial(SDClipModel, textmodel_json_config=dict(TEXT), return_projected_pooled=False)
        ids = (state_dict or {}).get(TOKEN_IDS)
        tokenizer = partial(
            TokenizerOfFewWords,
            None if ids is None else frozenset(ids.tolist()),
            tokenizer=partial(SDTokenizer, embedding_size=TEXT["hidden_size"]),
        )
        return ClipTarget(tokenizer, partial(SD1ClipModel, clip_model=text_model))


class StrataMiniInpaint(StrataMini):
    unet_config = {**StrataMini.unet_config, **CONFIG["inpaint"]}


class FluxOfFewTokens(comfy.model_base.Flux):
    """ComfyUI's Flux that sees the first tokens of a prompt alone, as it was trained; the text encoder is causal, so
    they say the same as in the whole prompt.
    """

    def extra_conds(self, **kwargs):
        tell_size(kwargs.get("noise"), CONFIG["flux_sides"])
        if kwargs.get("cross_attn") is not None:
            kwargs["cross_attn"] = kwargs["cross_attn"][:, : CONFIG["flux_tokens"]]
        return super().extra_conds(**kwargs)


class StrataMiniFlux(comfy.supported_models.Flux):
    """The mini Flux-Fill: Flux's structure in the family's latents. Heads, their axes and the output's channels cannot
    be read from weights and are set.
    """

    unet_config = {
        "image_model": "flux",
        "guidance_embed": False,
        **{key: value for key, value in FLUX.items() if key not in ("num_heads", "axes_dim", "out_channels")},
    }
    unet_extra_config = {key: FLUX[key] for key in ("num_heads", "axes_dim", "out_channels")}
    sampling_settings = {"shift": CONFIG["flux_shift"]}
    latent_format = StrataMiniLatent
    supported_inference_dtypes = [torch.bfloat16, torch.float32]

    def get_model(self, state_dict, prefix="", device=None):
        return FluxOfFewTokens(self, device=device)


def gray_latent(like: Tensor) -> Tensor:
    """What an inpainting model gets as its masked picture when the graph gives none: mid gray, encoded."""
    gray = LATENT["gray"] or [0.0] * LATENT["channels"]
    return like.new_tensor(gray).view(1, -1, 1, 1).expand_as(like).clone()


def all_token_rows(rows: Tensor, ids: Tensor) -> Tensor:
    """CLIP's whole embedding table from the rows [N,C] of the tokens `ids` [N].

    Every other token gets the row of id -1, which a trainer can train for words it does not know, or else the mean of
    the words' rows: an unknown word then says the average of all known ones, while a row of zeros would leave its
    position alone, which no training has seen.
    """
    unknown = ids == -1
    words = unknown if unknown.any() else ids < TEXT["bos_token_id"]
    table = rows[words].float().mean(0).to(rows.dtype).repeat(TEXT["vocab_size"], 1)
    table[ids[~unknown].long()] = rows[~unknown]
    return table


def register(further: Sequence[type] = ()) -> None:
    """Put the family, and further models of this pack, before ComfyUI's own, once, and this pack's models folder behind
    the user's own, where nothing is downloaded to.
    """
    ours = [StrataMini, StrataMiniInpaint, StrataMiniFlux, *further]
    names = [model.__name__ for model in ours]  # by name: another copy of the pack, or a reload, has classes of its own
    known = comfy.supported_models.models
    known[:] = [*ours, *(model for model in known if model.__name__ not in names)]
    for kind in KINDS:
        folder_paths.folder_names_and_paths.setdefault(kind, ([], folder_paths.supported_pt_extensions))
        for root in (Path(folder_paths.models_dir), PACK / "models"):
            folder_paths.add_model_folder_path(kind, str(root / kind))
