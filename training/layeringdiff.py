"""Trains LayeringDiff on an inpainting model: FBDD's two denoisers as low-rank adapters with a new first convolution,
then the networks that align high frequencies, on samples of the finished FBDD.

Runs of FBDD lie in the folders background and foreground below the given one, the alignment's in itself. They are
trained one after another, and written into one file.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import Tensor, nn

from ..networks import decomposer
from ..networks.alignment import Alignment
from ..scenes import renderer
from ..techniques import diffusion as formulas
from ..techniques import layering
from ..techniques.transparency import extend_colours
from . import base as bases
from . import data, export, image_folders, loop, sampling, settings

CHECK = 32  # the last pairs are kept for validation
FACTOR = 8
FILE = "layeringdiff.safetensors"
AT_ONCE = 8


@dataclass(frozen=True)
class Batch:
    """image, foreground, background: latents [B,4,h,w]; alpha: [B,1,H,W]."""

    image: Tensor
    foreground: Tensor
    background: Tensor
    alpha: Tensor


class Pairs(data.ScenePool):
    """Pair i of a foreground without its shadow and everything behind it, with their composite: latents of the three
    and alpha [S,S] as bytes, kept on disk when first asked for.
    """

    def __init__(self, folder: Path, base: bases.Base, count: int, side: int, kind: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.base, self.count, self.side = base, count, side
        name = f"pairs-{data.RENDERER}-{kind}-{side}-{count}"
        size = side // FACTOR
        self.latents = self._open(folder / f"{name}.latents", (count, 3, 4, size, size), np.float16)
        self.alphas = self._open(folder / f"{name}.alphas", (count, side, side))
        self.ready = self._open(folder / f"{name}.ready", (count,))

    def images(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Foreground and background [S,S,3], and alpha [S,S]; colours run on where the foreground is transparent."""
        scene = renderer.render(renderer.Request(train=True), self.side, self.side, index)
        front = scene.objects[-1]
        return front.rgba[..., :3], renderer.over(front.shadow, scene.behind_nearest), front.rgba[..., 3]

    def batch(self, indices: np.ndarray) -> Batch:
        missing = [int(i) for i in np.unique(indices) if not self.ready[i]]
        for start in range(0, len(missing), AT_ONCE):
            self._make(missing[start : start + AT_ONCE])
        latents = torch.from_numpy(self.latents[indices]).float().unbind(1)
        return Batch(*latents, data.to_tensor(self.alphas[indices][..., None]))

    def pictures(self, indices: np.ndarray) -> tuple[Tensor, ...]:
        """Composite, foreground and background [B,3,S,S] and alpha [B,1,S,S]: whole numbers of 255ths."""
        front, behind, alpha = (
            torch.from_numpy(np.stack(part)) for part in zip(*(self.images(int(i)) for i in indices), strict=True)
        )
        front, behind = (rearrange(part, "b h w c -> b c h w") for part in (front, behind))
        alpha = _bytes(alpha[:, None])
        front = extend_colours(front, alpha)
        return (*map(_bytes, (layering.composite(front, behind, alpha), front, behind)), alpha)

    @torch.no_grad()
    def _make(self, indices: list[int]) -> None:
        *parts, alpha = self.pictures(np.array(indices))
        for place, part in enumerate(parts):
            self.latents[indices, place] = self.base.encode(part).cpu().numpy()
        self.alphas[indices] = (alpha[:, 0] * 255).round().byte().numpy()
        self.ready[indices] = 1


def _bytes(values: Tensor) -> Tensor:
    """Values cut to 0..1 and rounded to 255ths, as files hold them."""
    return (values.clamp(0, 1) * 255).round() / 255


class FolderPairs(Pairs):
    """Random pairs of a user's own files: RGBA images over images, short side to `side` and cut in the middle."""

    def __init__(self, folder: Path, base: bases.Base, count: int, side: int, foregrounds: Path, backgrounds: Path):
        folders = (foregrounds, "foregrounds"), (backgrounds, "backgrounds")
        self.files = [list(image_folders.images(*one).values()) for one in folders]
        super().__init__(folder, base, count, side, f"{foregrounds.name}-{backgrounds.name}-{base.family}")

    def images(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = np.random.default_rng(index)
        front, behind = (self._read(files[rng.integers(len(files))]) for files in self.files)
        return front[..., :3], behind[..., :3], front[..., 3]

    def _read(self, path: Path) -> np.ndarray:
        image = ImageOps.fit(image_folders.read(path, "RGBA"), (self.side,) * 2, Image.Resampling.BICUBIC)
        return np.asarray(image, np.float32) / 255


class Denoiser(nn.Module):
    """FBDD's network of one layer: the base, frozen, with low-rank terms and a first convolution of 72 channels; all of
    the base learns for rank 0.
    """

    def __init__(self, base: bases.Base, layer: str, rank: int, checkpointing: bool = False):
        from peft import LoraConfig, inject_adapter_in_model

        super().__init__()
        self.layer = layer
        unet = copy.deepcopy(base.unet, loop.shared(base.unet) if rank else None).requires_grad_(rank == 0)
        old = unet.conv_in
        if rank:
            targets = [
                name
                for name, module in unet.named_modules()
                if isinstance(module, nn.Linear | nn.Conv2d) and module is not old
            ]
            inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), unet)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet.conv_in = nn.Conv2d(decomposer.CHANNELS, old.out_channels, 3, padding=1)
        with torch.no_grad():
            unet.conv_in.weight.copy_(decomposer.first_weight(old.weight))
            unet.conv_in.bias.copy_(old.bias)
        self.unet = unet
        self.register_buffer("null", base.null, persistent=False)

    def forward(self, noisy: Tensor, timesteps: Tensor, image: Tensor, alpha: Tensor) -> Tensor:
        """What the network says of noisy latents [B,4,h,w], given the image's [B,4,h,w] and alpha [B,1,H,W]."""
        given = decomposer.condition(image, layering.alpha_cells(alpha), self.layer)
        text = self.null.expand(len(noisy), -1, -1)
        return self.unet(torch.cat([noisy, given], 1), timesteps, encoder_hidden_states=text).sample


def loss_of(model: nn.Module, batch: Batch, layer: str, levels: Tensor, rng: np.random.Generator) -> dict[str, Tensor]:
    """Squared error of the predicted v over all latents; a scalar.

    levels: [timesteps], the share of variance left at each.
    Source: layeringdiff, Sec. 3.4 (v-prediction loss)
    """
    device, clean = next(model.parameters()).device, getattr(batch, layer)
    timesteps = torch.from_numpy(rng.integers(0, len(levels), len(clean)))
    noise = torch.from_numpy(rng.standard_normal(clean.shape, np.float32))
    noisy = formulas.add_noise(clean, noise, levels[timesteps])
    predicted = model(*(part.to(device) for part in (noisy, timesteps, batch.image, batch.alpha)))
    error = (predicted - formulas.v_target(clean, noise, levels[timesteps]).to(device)).square().mean()
    return {"loss": error}


@torch.no_grad()
def sample(model: nn.Module, image: Tensor, alpha: Tensor, steps: int = 10, seed: int = 0) -> Tensor:
    """A layer's latents [B,4,h,w] for images [B,4,h,w] and alphas [B,1,H,W]."""
    levels = formulas.noise_levels()
    device = next(model.parameters()).device
    image, alpha = image.to(device), alpha.to(device)

    def noise(latent: Tensor, timestep: int) -> tuple[Tensor, Tensor]:
        v = model(latent, torch.full((len(latent),), timestep, device=device), image, alpha)
        found = formulas.noise_of_v(latent, v, levels[timestep])
        return found, found

    start = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed)).to(device)
    return sampling.ddim(noise, start, steps, guidance=1.0)


class Aligned(nn.Module):
    """FAN and BAN in one module, as one run trains them."""

    def __init__(self, widths: list[int]):
        super().__init__()
        self.foreground, self.background = Alignment(widths), Alignment(widths)

    def forward(self, image: Tensor, alpha: Tensor, foreground: Tensor, background: Tensor) -> tuple[Tensor, Tensor]:
        return self.foreground(image, alpha, foreground), self.background(image, alpha, background)


def losses(config: dict, found: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor], decoded: Tensor, alpha: Tensor):
    """What trains both alignments, and its parts. found, truth: foreground and background [B,3,H,W]; decoded: what
    FBDD made of the background; alpha: [B,1,H,W].

    Source: layeringdiff, Eq. 2
    Source: layeringdiff, Sec. 3.4 (L_FAN)
    """
    terms = {
        "foreground": layering.foreground_loss(found[0], truth[0], alpha),
        "background": layering.background_loss(found[1], truth[1], decoded, config["detail_weight"]),
    }
    return {"loss": sum(terms.values()), **terms}


def train(config: dict, folder: Path, minutes: float | None, save_every: float) -> nn.Module:
    base = bases.load(Path(config["base"]) if config["base"] else None)
    root = folder.parent / "scenes"
    if config["foregrounds"] or config["backgrounds"]:
        if not (config["foregrounds"] and config["backgrounds"]):
            raise settings.TrainingError("--foregrounds and --backgrounds belong together; give both.")
        pairs: Pairs = FolderPairs(
            root, base, config["pairs"], config["side"], Path(config["foregrounds"]), Path(config["backgrounds"])
        )
    else:
        pairs = Pairs(root, base, config["pairs"], config["side"], base.family.replace(" ", "-"))
    trained = {
        layer: _denoiser(config, base, pairs, layer, folder / layer, minutes, save_every)
        for layer in reversed(decomposer.LAYERS)
    }
    aligned = _alignment(config, base, pairs, trained, folder, minutes, save_every)
    metadata = metadata_of(base.family) | {"licence": base.licence}
    path = folder / FILE
    export.save(
        path, weights(folder, base.null), export.describe("layeringdiff", folder, config, data_of(config)) | metadata
    )
    print(f"{path}: put it into ComfyUI's models/layer_model.", flush=True)
    return aligned


def weights(folder: Path, null: Tensor) -> dict[str, Tensor]:
    """What users load, of the runs in a folder: both denoisers, both alignments, and the empty prompt."""
    found = {decomposer.NULL: null}
    for layer in decomposer.LAYERS:
        own = decomposer.published_form(load_file(folder / layer / "model.safetensors"))
        found |= {f"{layer}.{key}": value for key, value in own.items()}
    aligned = load_file(folder / "model.safetensors")
    return found | {f"{decomposer.ALIGNMENT}.{key}": value for key, value in aligned.items()}


def metadata_of(family: str) -> dict[str, str]:
    return {"base": family, "prediction_type": "v_prediction"}


def data_of(config: dict) -> str:
    if config["foregrounds"]:
        return f"pairs of {Path(config['foregrounds']).name} over {Path(config['backgrounds']).name}"
    return export.SCENES


def _denoiser(config, base, pairs, layer, folder, minutes, save_every) -> Denoiser:
    levels, last = formulas.noise_levels(), np.arange(config["pairs"] - CHECK, config["pairs"])
    run = {key: value for key, value in config.items() if not key.startswith("alignment")} | {"layer": layer}

    def loss(model, step, rank):
        rng = np.random.default_rng((config["seed"], step, rank))
        known = data.known_at(step, config["pairs"] - CHECK, config["pairs_per_step"])
        return loss_of(model, pairs.batch(rng.integers(0, known, config["batch"])), layer, levels, rng)

    @torch.no_grad()
    def validate(model, step):
        batch = pairs.batch(last)
        report = {"error": loss_of(model, batch, layer, levels, np.random.default_rng(0))["loss"].item()}
        truth = dict(zip(("image", "foreground", "background", "alpha"), pairs.pictures(last), strict=True))
        made = base.decode(sample(model, batch.image, batch.alpha, config["sampling_steps"])).cpu().clamp(0, 1)
        seen = truth["alpha"] if layer == "foreground" else 1 - truth["alpha"]
        wrong = (made - truth[layer]).abs().mean(1, keepdim=True)
        for name, part in (("seen", seen > 0.95), ("hidden", seen < 0.05)):
            report[name] = (wrong * part).sum().item() / max(1, part.sum().item())
        loop.save_grid(folder / "grid.png", torch.cat([truth["image"][:8], made[:8], truth[layer][:8]]), 8)
        print(f"step {step}: " + "  ".join(f"{key} {value:.4g}" for key, value in report.items()), flush=True)
        return report

    torch.manual_seed(config["seed"])
    model = Denoiser(base, layer, config["rank"], config["gradient_checkpointing"])
    return loop.fit(model, loss, validate, run, folder, minutes, save_every)


class Samples:
    """Some pairs and what the finished FBDD makes of them, decoded, as bytes; made once. numbers: [N], of the pairs."""

    def __init__(self, folder: Path, base: bases.Base, pairs: Pairs, numbers: np.ndarray, trained: dict, steps: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.base, self.pairs, self.numbers, self.trained, self.steps = base, pairs, numbers, trained, steps
        self.pixels = pairs._open(folder / "samples.pixels", (len(numbers), pairs.side, pairs.side, 16))
        self.ready = pairs._open(folder / "samples.ready", (len(numbers),))

    def batch(self, rows: np.ndarray) -> tuple[Tensor, ...]:
        """Composite, foreground, background [B,3,S,S] and alpha [B,1,S,S], then what FBDD makes of foreground and
        background, in 0..1. rows: [B], in 0..N - 1.
        """
        missing = np.array([int(i) for i in np.unique(rows) if not self.ready[i]])
        for part in np.split(missing, range(AT_ONCE, len(missing), AT_ONCE)) if len(missing) else []:
            numbers = self.numbers[part]
            batch = self.pairs.batch(numbers)
            made = [
                self.base.decode(sample(self.trained[name], batch.image, batch.alpha, self.steps, int(part[0]))).cpu()
                for name in decomposer.LAYERS
            ]
            values = torch.cat([*self.pairs.pictures(numbers), *made], 1).clamp(0, 1) * 255
            self.pixels[part] = rearrange(values, "b c h w -> b h w c").round().byte().numpy()
            self.ready[part] = 1
        return data.to_tensor(self.pixels[rows]).split([3, 3, 3, 1, 3, 3], 1)


def _alignment(config, base, pairs, trained, folder, minutes, save_every) -> nn.Module:
    trained = {layer: model.to(bases.device()) for layer, model in trained.items()}
    count, crop = config["alignment_pairs"], config["alignment_crop"]
    numbers = np.r_[:count, config["pairs"] - CHECK : config["pairs"]]
    samples = Samples(folder, base, pairs, numbers, trained, config["sampling_steps"])
    run = {**config, "steps": config["alignment_steps"], "learning_rate": config["alignment_learning_rate"]}
    run["fbdd_steps"] = config["steps"]

    def loss(model, step, rank):
        rng = np.random.default_rng((config["seed"], step, rank))
        device = next(model.parameters()).device
        parts = samples.batch(rng.integers(0, count, config["alignment_batch"]))
        top, left = rng.integers(0, config["side"] - crop + 1, 2)
        cut = [part[..., top : top + crop, left : left + crop].to(device) for part in parts]
        image, *truth, alpha = cut[:4]
        return losses(config, model(image, alpha, *cut[4:]), truth, cut[5], alpha)

    @torch.no_grad()
    def validate(model, step):
        image, front, behind, alpha, *decoded = samples.batch(np.arange(count, len(numbers)))
        device = next(model.parameters()).device
        found = [part.cpu().clamp(0, 1) for part in model(*(one.to(device) for one in (image, alpha, *decoded)))]
        report = {}
        for name, made, raw, true, seen in zip(
            decomposer.LAYERS, found, decoded, (front, behind), (alpha, 1 - alpha), strict=True
        ):
            for which, one in (("decoded", raw), ("aligned", made)):
                report[f"{name} {which}"] = (((one - true).abs() * seen).mean() / seen.mean()).item()
        loop.save_grid(folder / "grid.png", torch.cat([image[:8], *(part[:8] for part in found)]), 8)
        print(f"step {step}: " + "  ".join(f"{key} {value:.4g}" for key, value in report.items()), flush=True)
        return report

    torch.manual_seed(config["seed"])
    return loop.fit(Aligned(config["alignment_widths"]), loss, validate, run, folder, minutes, save_every)
