"""The trainers' command as a user types it, in an installed copy of the pack without tools and tests."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

PACK = Path(__file__).resolve().parents[2]
KEPT = ("__init__.py", "training", "networks", "techniques", "scenes", "models_config", "formats", "nodes", "patches")


def train(root: Path, *arguments) -> None:
    """By a copy below root, as below a ComfyUI."""
    pack = root / "custom_nodes" / "ComfyUI-Strata"
    for name in KEPT if not pack.exists() else ():
        source = PACK / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        pack.mkdir(parents=True, exist_ok=True)
        copy(source, pack / name)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("STRATA_")}
    command = [sys.executable, "-m", "training", *map(str, arguments)]
    done = subprocess.run(command, cwd=pack, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
