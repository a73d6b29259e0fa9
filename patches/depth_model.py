"""Depth estimation models of the transformers library, loaded from ComfyUI's models folder."""

from __future__ import annotations

import json
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

CONFIG = json.loads(
    (Path(__file__).parent.parent / "models_config" / "depth_estimation.json").read_text(encoding="utf-8")
)
KIND = CONFIG["folder"]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

folder_paths.add_model_folder_path(KIND, str(Path(folder_paths.models_dir) / KIND))


def choices() -> list[str]:
    """Folders that hold a model, and the names of those that can be had."""
    found = [
        path.parent.name
        for root in folder_paths.get_folder_paths(KIND)
        for path in sorted(Path(root).glob("*/config.json"))
    ]
    return list(dict.fromkeys([*found, *(model["name"] for model in CONFIG["models"])]))


def find(name: str) -> Path:
    for root in folder_paths.get_folder_paths(KIND):
        folder = Path(root) / name
        if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
            return folder
    url = next((model["url"] for model in CONFIG["models"] if model["name"] == name), CONFIG["models"][0]["url"])
    raise ValueError(
        f"model: config.json and model.safetensors of {name} are not in "
        f"{Path(folder_paths.get_folder_paths(KIND)[0]) / name}; download them from {url} into that folder."
    )


def estimate(image: Tensor, name: str) -> Tensor:
    """Relative depth [B,H,W,3] of images [B,H,W,3] in 0..1, white = near, each stretched to its own range.

    Source: depthanything, its released weights; inputs of about 518 pixels a side, multiples of 14, as published
    """
    from transformers import AutoModelForDepthEstimation

    folder = find(name)
    device = comfy.model_management.get_torch_device()
    model = (
        AutoModelForDepthEstimation.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        .eval()
        .to(device)
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
