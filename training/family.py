"""The finished family: trained parts put together into the files that ComfyUI loads, and how well they do what prompts
say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor

from ..networks import flux, layered_denoiser
from ..networks.transparency import published_adapter
from ..scenes import renderer
from . import (
    back_to_front,
    base,
    data,
    diffusion,
    export,
    flux_adapter,
    latents,
    layeringdiff,
    loop,
    oracle,
    published,
    settings,
    text,
)

UNET = "model.diffusion_model."
TOKEN_IDS = "cond_stage_model.token_ids"


def checkpoint(root: Path) -> dict[str, Tensor]:
    """Denoiser, text encoder with the numbers of its tokens, and autoencoder, under a checkpoint's keys."""
    state = _trained(root / "diffusion")
    state[TOKEN_IDS] = torch.tensor(text.token_ids(), dtype=torch.int32)
    for key, value in latents.load_autoencoder(root).state_dict().items():
        state[f"first_stage_model.{key}"] = value
    return state | _latents_as_they_are("first_stage_model.")


def inpainting_unet(root: Path) -> dict[str, Tensor]:
    """The denoiser alone: text encoder and autoencoder are the checkpoint's."""
    return {key.removeprefix(UNET): value for key, value in _trained(root / "inpaint").items() if key.startswith(UNET)}


def half_of_pair(part: str, run: str) -> Callable[[Path], dict[str, Tensor]]:
    def take(root: Path) -> dict[str, Tensor]:
        return {
            key.removeprefix(part + "."): value for key, value in _trained(root / run).items() if key.startswith(part)
        }

    return take


def classifier(root: Path) -> dict[str, Tensor]:
    """Without the counters of its batch norms, which only training uses."""
    return {key: value for key, value in _trained(root / "classifier").items() if value.is_floating_point()}


def rgba_autoencoder(root: Path) -> dict[str, Tensor]:
    return _trained(root / "rgba_autoencoder") | _latents_as_they_are("")


def _latents_as_they_are(prefix: str) -> dict[str, Tensor]:
    """Scale and shift that ComfyUI's VAE expects beside the weights of TAESD's layout."""
    return {f"{prefix}vae_scale": torch.tensor(1.0), f"{prefix}vae_shift": torch.tensor(0.0)}


# See export.save.
FP8 = {
    published.CHECKPOINT: UNET,
    published.INPAINT: "",
    published.FLUX_FILL: "",
}
FILES = {  # trainer, file, weights
    published.CHECKPOINT: ("diffusion", checkpoint),
    published.INPAINT: ("inpaint", inpainting_unet),
    published.RGBA: ("rgba_autoencoder", rgba_autoencoder),
    published.FLUX_FILL: (
        "flux_fill_large",
        lambda root: flux.host_form(_trained(_finished(root, "flux_fill_large", published.FLUX_FILL))),
    ),
    "layer_model/strata_mini_transparent_attn.safetensors": (
        "adapter",
        lambda root: published_adapter(_trained(root / "adapter")),
    ),
    published.FLUX_ADAPTER: (
        "flux_adapter",
        lambda root: flux_adapter.published_form(_trained(root / "flux_adapter")),
    ),
    "layer_model/strata_mini_transparent_decoder.safetensors": (
        "transparent_decoder",
        half_of_pair("decoder", "transparent_decoder"),
    ),
    "layer_model/strata_mini_transparent_encoder.safetensors": (
        "transparency",
        half_of_pair("encoder", "transparency"),
    ),
    "layer_model/strata_mini_dreamlayer.safetensors": (
        "dreamlayer_apart",
        lambda root: layered_denoiser.published_form(_trained(root / "dreamlayer_apart")),
    ),
    published.BACK_TO_FRONT: (
        "back_to_front_real",
        lambda root: back_to_front.published_form(_trained(root / "back_to_front_real")),
    ),
    published.LAYERINGDIFF: (
        "layeringdiff",
        lambda root: layeringdiff.weights(root / "layeringdiff", base.load(None).null),
    ),
    "strata/mini_classifier.safetensors": ("classifier", classifier),
}
EARLIER = {published.FLUX_FILL: "flux_fill"}  # whose weights are written while the trainer has not run
# What loading needs to know beside the weights.
FURTHER = {
    published.BACK_TO_FRONT: {"pairing": "paper"},
    published.LAYERINGDIFF: layeringdiff.metadata_of(base.MINI),
    "strata/mini_classifier.safetensors": {
        "places": json.dumps(renderer.KINDS),
        "objects": json.dumps(list(renderer.catalogue())),
    },
}


def publish(root: Path, models: Path = settings.MODELS) -> None:
    """Write every file whose trainers have run; name those that are missing. For the pack's own models, previews in
    models_config are fitted to them.
    """
    for name, (what, weights) in FILES.items():
        folder = _finished(root, what, name)
        if folder is None:
            print(f"{name}: not written, python -m training {what} has not run", flush=True)
            continue
        config = json.loads((folder / "config.json").read_text())
        metadata = export.describe(folder.name, folder, config, export.SCENES) | FURTHER.get(name, {})
        export.save(models / name, weights(root), metadata, FP8.get(name))
        print(f"{name}: {(models / name).stat().st_size / 2**20:.1f} MiB", flush=True)
    if models.resolve() == settings.MODELS and (root / "autoencoder" / "model.safetensors").exists():
        _fit_preview(latents.load_autoencoder(root), settings.CONFIGS / "sd.json")


def _finished(root: Path, what: str, name: str) -> Path | None:
    """The folder of the trainer, or of an earlier one that can stand in."""
    folders = [root / one for one in (what, EARLIER.get(name)) if one]
    return next((folder for folder in folders if (folder / "metrics.csv").exists()), None)  # what is written last


@torch.no_grad()
def _fit_preview(autoencoder, path: Path) -> None:
    """Least squares from a latent pixel to the mean colour under it in -1..1, and what mid gray is as a latent."""
    pictures = data.held_out(64, 128)
    small = torch.nn.functional.avg_pool2d(pictures * 2 - 1, latents.FACTOR)
    latent, colour = (rearrange(part, "b c h w -> (b h w) c") for part in (autoencoder.encode(pictures), small))
    factors = torch.linalg.lstsq(torch.cat([latent, torch.ones(len(latent), 1)], 1), colour).solution
    gray = autoencoder.encode(torch.full((1, 3, 128, 128), 0.5))[0, :, 4:-4, 4:-4].mean((1, 2))
    config = json.loads(path.read_text())
    config["latent"].update(rgb_factors=_rounded(factors[:4]), rgb_bias=_rounded(factors[4]), gray=_rounded(gray))
    short = re.sub(
        r"\[\s+([^\[\]]*?)\s+\]", lambda found: "[" + " ".join(found[1].split()) + "]", json.dumps(config, indent=2)
    )
    path.write_text(short + "\n")


def _rounded(values: Tensor) -> list:
    return np.round(values.double().numpy(), 4).tolist()


def _trained(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def agreement(models: Path, guidance: float, steps: int, side: int, report: Path, seed: int) -> dict[str, Tensor]:
    """Per generated picture, 1 where the classifier sees the place and the object of the prompt, over every pair of the
    two.

    Asks the checkpoint in models, as it is shipped. Picture i of the pairs is drawn from noise of seed + i // 50.
    """
    judge = oracle.load()
    model, autoencoder = published.checkpoint(models)
    known = [entry for entry in renderer.catalogue().values() if not entry.held_out]
    pairs = [(entry, kind) for entry in known for kind in renderer.KINDS]
    pictures = []
    for start in range(0, len(pairs), 50):
        prompts = [f"{entry.prompts[0]} {renderer.PLACE_WORDS[kind][0]}" for entry, kind in pairs[start : start + 50]]
        latent = diffusion.sample(model, prompts, side, steps=steps, guidance=guidance, seed=seed + start // 50)
        with torch.no_grad():
            pictures.append(autoencoder.decode(latent).clamp(0, 1))
        print(f"{start + len(prompts)} of {len(pairs)} pictures", flush=True)
    pictures = torch.cat(pictures)
    place, shown = judge.text_agreement(pictures, [kind for _, kind in pairs], [[entry.name] for entry, _ in pairs])
    unseen = torch.tensor([renderer.is_held_out(entry.name, kind) for entry, kind in pairs])
    loop.save_grid(report, torch.nn.functional.interpolate(pictures, size=96, mode="area"), len(renderer.KINDS))
    return {
        "place": place,
        "object": shown,
        "place of pairs not trained": place[unseen],
        "object of pairs not trained": shown[unseen],
    }
