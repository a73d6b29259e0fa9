"""The mini family's denoiser and text encoder in one module, under a checkpoint's keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .text_encoder import TextEncoder
from .unet import UNet


class TextToImage(nn.Module):
    """Keys as in the checkpoint: model.diffusion_model.* and cond_stage_model.transformer.text_model.*

    family: models_config/mini/sd.json. tokens: rows of the trained embedding. Residual branches start at zero.
    """

    def __init__(self, family: dict, in_channels: int, tokens: int):
        super().__init__()
        shape, words = family["unet"], family["text"]
        unet = UNet(
            in_channels,
            shape["out_channels"],
            shape["model_channels"],
            shape["channel_mult"],
            shape["num_res_blocks"][0],
            shape["transformer_depth"],
            shape["context_dim"],
            shape["num_heads"],
        )
        encoder = TextEncoder(
            tokens,
            words["hidden_size"],
            words["num_hidden_layers"],
            words["num_attention_heads"],
            words["intermediate_size"],
        )
        self.model = nn.ModuleDict({"diffusion_model": unet})
        self.cond_stage_model = nn.ModuleDict({"transformer": nn.ModuleDict({"text_model": encoder})})
        with torch.no_grad():
            for name, module in unet.named_modules():
                if name.endswith(("out_layers.3", "proj_out")) or name == "out.2":
                    module.weight.zero_()
                    module.bias.zero_()

    def forward(self, latent: Tensor, timesteps: Tensor, rows: Tensor) -> Tensor:
        """latent: [B,C,h,w]; timesteps: [B]; rows: [B,77] of the embedding -> predicted noise [B,4,h,w]."""
        return self.model["diffusion_model"](latent, timesteps, self.encode(rows))

    def encode(self, rows: Tensor) -> Tensor:
        """rows: [B,77] -> [B,77,D]. Equal prompts are encoded once."""
        unique, place = rows.unique(dim=0, return_inverse=True)
        return self.cond_stage_model.get_submodule("transformer.text_model")(unique)[place]
