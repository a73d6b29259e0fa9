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


def family() -> dict:
    """The sizes that all models of the family share."""
    return json.loads((CONFIGS / "sd.json").read_text())


def cache() -> Path:
    """The folder for checkpoints and rendered scenes."""
    return _from_environment("STRATA_CACHE") / "training"


def clip_tokenizer() -> Path:
    """The folder with CLIP's vocabulary, which ComfyUI ships."""
    return _from_environment("STRATA_HOST") / "comfy" / "sd1_tokenizer"


def _from_environment(name: str) -> Path:
    if name not in os.environ:
        raise TrainingError(f"{name} is not set; start the trainers by: python tools/host.py exec -m training.")
    return Path(os.environ[name])
