"""Where trainers find and leave files, and the one error with which they stop."""

from __future__ import annotations

import json
import os
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent
CONFIGS = PACK / "models_config" / "mini"
MODELS = PACK / "models"


class TrainingError(RuntimeError):
    """One sentence for the person who trains: what is missing or wrong, and what to do."""


def given(config: dict, name: str) -> Path:
    """What a user names for a base of their own. Raises TrainingError when it is not named or not there."""
    option = name.replace("_", "-")
    if not config.get(name):
        raise TrainingError(f"--{option} is needed for a base of your own; docs/training.md says what it is.")
    path = Path(config[name])
    if not path.exists():
        raise TrainingError(f"--{option}: {path} is not there; give another path.")
    return path


def family() -> dict:
    """The sizes that all models of the family share."""
    return json.loads((CONFIGS / "sd.json").read_text())


def cache() -> Path:
    """The folder for checkpoints and rendered scenes: below STRATA_CACHE, or the user's cache folder."""
    if os.environ.get("STRATA_CACHE"):
        return Path(os.environ["STRATA_CACHE"]) / "training"
    base = os.environ.get("LOCALAPPDATA") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "comfyui-strata" / "training"


def clip_tokenizer() -> Path:
    """The folder with CLIP's vocabulary, which ComfyUI ships: of STRATA_HOST, or of the ComfyUI that the pack lies in.
    Raises TrainingError.
    """
    host = Path(os.environ["STRATA_HOST"]) if os.environ.get("STRATA_HOST") else PACK.parent.parent
    folder = host / "comfy" / "sd1_tokenizer"
    if not folder.is_dir():
        raise TrainingError(
            f"there is no ComfyUI at {host}; put the pack into its custom_nodes folder, set STRATA_HOST to ComfyUI's, "
            "or start the trainers by: python tools/host.py exec -m training."
        )
    return folder
