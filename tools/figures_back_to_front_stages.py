"""Fig. 5 of BFS: short trainings of the mini family without one of its stages or losses, all of as many steps as the
whole one, and what they then draw on scenes of other seeds. figures_back_to_front.py has the figures' meaning.

The pictures go to output/back_to_front_stages.png, one row a scene: background, each one's layer over it, truth.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from figures_back_to_front import NOISE, Models
from figures_back_to_front_parts import drawn
from safetensors.torch import load_file
from strata.networks.back_to_front import PAIRINGS
from strata.patches import back_to_front as method
from strata.patches import layer_files
from strata.training import back_to_front, command, latent_composition, settings

COUNT, SAMPLE = 32, 0  # it trains, so that there is no quick sample
FROM = 2300  # behind the seeds of figures_back_to_front_parts.py
STEPS = 300  # of each stage; the shipped file had thousands
SHORT = {"scenes": 800, "batch": 6, "warmup": 20, "ema": 0.98}
WHOLE, FIRST = "both stages", "stage 1 of the whole"
# What each starts from, its stage, and what of its settings is other
RUNS = {
    FIRST: (None, 1, {}),
    WHOLE: (FIRST, 2, {}),
    "without stage 1": (None, 2, {"steps": 2 * STEPS}),
    "without stage 2": (None, 1, {"steps": 2 * STEPS}),
    "stage 1 without composition loss": (None, 1, {"composition_weight": 0.0}),
    "without composition loss": ("stage 1 without composition loss", 2, {"composition_weight": 0.0}),
    "without regularisation": (FIRST, 2, {"regularise": False}),
}
SHOWN = [name for name in RUNS if not name.startswith("stage 1")]
CLAIMS = [
    (WHOLE, other, figure)
    for other in SHOWN
    if other != WHOLE
    for figure in (
        "named object",
        "alpha and what changed, IoU",
        "alpha outside",
        "recomposed against its composite",
        "darkness of the shadow, error",
    )
]


def trained(root: Path) -> dict[str, layer_files.BackToFront]:
    """The files of all runs that are shown."""
    composing = command.read_config(settings.CONFIGS / "latent_composition.json", [])
    latent_composition.train(composing | SHORT | {"steps": STEPS}, root / "latent_composition", None, 1e9)
    found = {}
    for number, (name, (start, stage, changes)) in enumerate(RUNS.items()):
        kind = "back_to_front" if stage == 1 else "back_to_front_real"
        config = command.read_config(settings.CONFIGS / f"{kind}.json", []) | SHORT | {"steps": STEPS} | changes
        config["start"] = None if start is None else str(list(RUNS).index(start))
        back_to_front.train(config, root / str(number), None, 1e9)
        weights = back_to_front.published_form(load_file(root / str(number) / "model.safetensors"))
        found[name] = layer_files.recognise(name, weights, {"pairing": PAIRINGS[0]})
        print(f"{name}: trained", flush=True)
    return {name: found[name] for name in SHOWN}


def measure(seeds: range) -> dict[str, dict[str, list[float]]]:
    with tempfile.TemporaryDirectory() as root:
        files = trained(Path(root))
    models = Models()
    columns = {name: (method.apply(models.fill, file), NOISE) for name, file in files.items()}
    return drawn(models, columns, seeds, "back_to_front_stages")
