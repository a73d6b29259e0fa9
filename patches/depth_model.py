"""Depth estimation models of the transformers library, loaded from ComfyUI's models folder."""

from __future__ import annotations

import json
from pathlib import Path

import comfy.model_management
import comfy.utils
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from . import pretrained

CONFIG = json.loads((pretrained.CONFIG / "depth_estimation.json").read_text(encoding="utf-8"))
FOLDERS = pretrained.Folders([CONFIG["folder"]], None, CONFIG["models"], "model")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def estimate(image: Tensor, name: str) -> Tensor:
    """Relative depth [B,H,W,3] of images [B,H,W,3] in 0..1, white = near, each stretched to its own range.

    Source: depthanything, its released weights; inputs of about 518 pixels a side, multiples of 14, as published
    """
    from transformers import AutoModelForDepthEstimation

    folder = FOLDERS.find(name)
    device = comfy.model_management.get_torch_device()
    model = pretrained.on_card(
        AutoModelForDepthEstimation.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    )
    size = input_size(folder, *image.shape[1:3])
    progress = comfy.utils.ProgressBar(len(image))
    depths = []
    for one in image:
        pixels = rearrange(one, "h w c -> 1 c h w")
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1).to(device)
        pixels = (pixels - pixels.new_tensor(MEAN).view(3, 1, 1)) / pixels.new_tensor(STD).view(3, 1, 1)
        depth = F.interpolate(
            model(pixel_values=pixels).predicted_depth[:, None].float(), image.shape[1:3], mode="bilinear"
        )[0, 0]
        low, high = depth.amin(), depth.amax()
        depths.append(((depth - low) / (high - low).clamp_min(1e-6)).to(comfy.model_management.intermediate_device()))
        progress.update(1)
    return torch.stack(depths)[..., None].expand(-1, -1, -1, 3)


def input_size(folder: Path, height: int, width: int) -> tuple[int, int]:
    """The network's input: the shorter side as its preprocessor says (518 by default), the longer one at most four
    times that; multiples of 14.
    """
    file = folder / "preprocessor_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    side = settings.get("size", {}).get("height", 518)
    multiple = settings.get("ensure_multiple_of", 14)
    # A picture of 1×4096 would be two million wide.
    scale = min(side / min(height, width), 4 * side / max(height, width))
    return tuple(max(multiple, round(length * scale / multiple) * multiple) for length in (height, width))
