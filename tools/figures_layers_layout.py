"""Fig. 8 of DreamLayer: its modules trained for the mini family with and without L_layout, shortly and from nothing,
both on the same scenes and steps, and the layers that they then draw. figures_layers.py has the figures' meaning.

The pictures go to output/layers_layout.png, as there.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import figures_layers
from mini_models import LAYER_MODEL
from safetensors.torch import load_file, save_file
from strata.networks.layered_denoiser import published_form
from strata.patches import layer_modules
from strata.training import command, dreamlayer, published, settings

COUNT, SAMPLE = 32, 0  # it trains, so that there is no quick sample
FROM = 1200  # behind the seeds of figures_layers_maps.py
STEPS = 400  # the shipped file had 3,300
# From the start as many objects as the shipped file's last steps had: with one alone nothing can overlap
SHORT = {"scenes": 363, "shares": [[0.1, 0.45, 0.45]] * 2, "warmup": 20, "ema": 0.99, "steps": STEPS}
WITH, WITHOUT = "with L_layout", "without L_layout"
RUNS = {WITH: {}, WITHOUT: {"layout_weight": 0.0}}
CLAIMS = [
    (WITH, WITHOUT, figure) for figure in ("overlap", "layers to whole", "objects seen in the whole", "empty layers")
]


def folders(root: Path) -> None:
    """The published files in the form in which the trainers leave them."""
    model, autoencoder = published.checkpoint()
    adapter = {}
    for key, value in load_file(LAYER_MODEL / "strata_mini_transparent_attn.safetensors").items():
        name, _, index = key.partition(".weight::lora::")
        adapter[f"model.{name}.lora_{'BA'[int(index)]}.default.weight"] = value
    pair = {
        f"{half}.{key}": value
        for half in ("encoder", "decoder")
        for key, value in load_file(LAYER_MODEL / f"strata_mini_transparent_{half}.safetensors").items()
    }
    states = {
        "diffusion": model.state_dict(),
        "autoencoder": autoencoder.state_dict(),
        "adapter": adapter,
        "transparency": pair,
    }
    for name, state in states.items():
        (root / name).mkdir()
        save_file({key: value.contiguous() for key, value in state.items()}, root / name / "model.safetensors")
    config = command.read_config(settings.CONFIGS / "transparent_decoder.json", [])
    (root / "transparency" / "config.json").write_text(json.dumps(config))


def trained(root: Path) -> dict[str, layer_modules.LayerModules]:
    folders(root)
    found = {}
    for name, changes in RUNS.items():
        config = command.read_config(settings.CONFIGS / "dreamlayer.json", []) | SHORT | changes
        model = dreamlayer.train(config, root / name, None, 1e9)
        found[name] = layer_modules.recognise(name, published_form(model.state_dict()))
        print(f"{name}: trained", flush=True)
    return found


def measure(seeds: range) -> dict[str, dict[str, list[float]]]:
    with tempfile.TemporaryDirectory() as root:
        terms = trained(Path(root))
    shared = (1, figures_layers.Maps(), figures_layers.SAME)
    return figures_layers.measure(
        seeds,
        terms,
        lambda family, seed, name, modules: figures_layers.sampled(family, seed, name, shared, modules),
        "layers_layout",
    )
