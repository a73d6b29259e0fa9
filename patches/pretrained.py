"""Models of the transformers library in folders below ComfyUI's models folder: which there are, and where."""

from __future__ import annotations

import json
from pathlib import Path

import comfy.model_management
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

CONFIG = Path(__file__).parent.parent / "models_config"


class Folders:
    """kinds: ComfyUI's names of the folders that are looked into. types: model_type of the models that count; None for
    all. known: name, url and folder of models that can be had. socket: the input that sentences name.
    """

    def __init__(self, kinds: list[str], types: list[str] | None, known: list[dict], socket: str):
        self.kinds, self.types, self.known, self.socket = kinds, types, known, socket
        for kind in kinds:
            folder_paths.add_model_folder_path(kind, str(Path(folder_paths.models_dir) / kind))

    def choices(self) -> list[str]:
        """Names of folders that hold such a model, and of those that can be had."""
        names = [
            path.parent.name
            for kind in self.kinds
            for root in folder_paths.get_folder_paths(kind)
            for path in sorted(Path(root).glob("*/config.json"))
            if self.types is None or model_type(path.parent) in self.types
        ]
        return list(dict.fromkeys([*names, *(model["name"] for model in self.known)]))

    def find(self, name: str) -> Path:
        """Raises ValueError that says where to get it."""
        for kind in self.kinds:
            for root in folder_paths.get_folder_paths(kind):
                folder = Path(root) / name
                if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
                    return folder
        model = next((model for model in self.known if model["name"] == name), self.known[0])
        raise ValueError(
            f"{self.socket}: config.json and model.safetensors of {name} are not in "
            f"{Path(folder_paths.get_folder_paths(model.get('folder', self.kinds[0]))[0]) / name}; download them from "
            f"{model['url']} into that folder."
        )


def model_type(folder: Path) -> str:
    """What transformers calls a model's class; empty for a folder that says nothing of it."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type", "")
    except (OSError, ValueError, AttributeError):
        return ""


class _Holder(nn.Module):
    """ComfyUI writes the device on what it manages, and transformers' models do not let it."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network


def on_card(network: nn.Module) -> nn.Module:
    """The network where ComfyUI computes, with its memory told to ComfyUI, which makes room for it."""
    device = comfy.model_management.get_torch_device()
    holder = _Holder(network.eval().requires_grad_(False))
    comfy.model_management.load_models_gpu([ModelPatcher(holder, device, torch.device("cpu"))])
    return network.to(device)
