"""Trains DreamLayer's modules: layer embedding, keys and values of every attention, context-aware layers (Eq. 2 and 5
to 8); the mini family's on rendered scenes, those of a model of the user's own on layered files.

Its second run, `dreamlayer_apart`, gives each layer noise that is in part its own. With one noise for all, the
difference of two noisy layers shows where their things are, however noisy they are, and sampling begins without any
difference; that is thought to be why things collide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..networks import layered_denoiser, layered_unet
from ..networks.autoencoder import Autoencoder
from ..networks.layered_denoiser import LayeredDenoiser
from ..networks.transparency import OffsetEncoder, published_adapter
from ..scenes import renderer
from ..techniques import diffusion as formulas
from ..techniques.shared_layers import map_distance, resize_maps, share_noise
from ..techniques.transparency import extend_colours
from . import data, diffusion, export, image_folders, latents, loop, sampling, settings, text, text_base
from .cutouts import checkerboard, hidden, load_pair
from .layered_files import LayeredFiles
from .transparent_images import load_encoder

MOST = 3  # objects of a scene
CHECK = 63  # the last scenes of the pool are kept for validation
EARLY = 850  # the published T_G: from there on objects take over the whole picture's layout
GUIDANCE, SAMPLING_STEPS, SHOWN = 4.0, 20, 3
FILE = "dreamlayer.safetensors"


@dataclass(frozen=True)
class Batch:
    """latent: [B,L,4,h,w] of background, objects back to front and whole picture; alphas: [B,L-2,h,w]; prompts: of all
    but the whole picture.
    """

    latent: Tensor
    alphas: Tensor
    prompts: list[list[str]]


class SceneLayers:
    """Scene i has 1 + i % MOST objects. Its layers are encoded when first asked for and kept on disk, under a digest of
    the encoders.
    """

    def __init__(self, folder: Path, autoencoder: Autoencoder, encoder: OffsetEncoder, count: int, side: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.autoencoder, self.encoder, self.side = autoencoder, encoder, side
        path = folder / f"layers-{data.RENDERER}-{side}-{count}-{latents.digest(autoencoder.taesd_encoder, encoder)}"
        size = side // latents.FACTOR
        self.values = data.ScenePool._open(path, (count, MOST + 2, 5, size, size), np.float16)

    def request(self, index: int) -> renderer.Request:
        return renderer.Request(train=True, count=1 + index % MOST)

    def batch(self, indices: np.ndarray, draw: int) -> Batch:
        """Scenes of one number of objects; `draw` chooses among the prompts that fit."""
        for index in np.unique(indices):
            if not self.values[index].any():
                self.values[index] = self._encode(int(index))
        layers = 3 + int(indices[0]) % MOST
        values = torch.from_numpy(self.values[indices]).float()[:, :layers]
        return Batch(values[:, :, :4], values[:, 1:-1, 4], [self.words(int(index), draw) for index in indices])

    def words(self, index: int, draw: int) -> list[str]:
        rng = np.random.default_rng((index, draw))
        kind, names = renderer.choose(self.request(index), np.random.default_rng(index))
        where = str(rng.choice(renderer.PLACE_WORDS[kind]))
        place = where if rng.random() < 0.3 else f"{renderer.EMPTY} {where}"
        return [place, *(str(rng.choice(renderer.catalogue()[name].prompts)) for name in names)]

    @torch.no_grad()
    def _encode(self, index: int) -> np.ndarray:
        """[MOST+2,5,h,w]: latents and alphas of the layers, then nothing."""
        scene = renderer.render(self.request(index), self.side, self.side, index)
        background, composite = self.autoencoder.encode(_tensor([scene.background, scene.composite]))
        rgba = _tensor([one.rgba for one in scene.objects])
        rgba = torch.cat([extend_colours(rgba[:, :3], rgba[:, 3:]), rgba[:, 3:]], 1)
        objects = sum(hidden(rgba, self.autoencoder, self.encoder))
        values = torch.zeros(self.values.shape[1:])
        layers = torch.stack([background, *objects, composite])
        values[: len(layers), :4] = layers
        values[1 : len(layers) - 1, 4:] = resize_maps(rgba[:, 3:], layers.shape[-2:])
        return values.numpy()


def _tensor(pictures: list[np.ndarray]) -> Tensor:
    return rearrange(torch.from_numpy(np.stack(pictures).astype(np.float32)), "b h w c -> b c h w")


def object_count(step: int, config: dict, rng: np.random.Generator, most: int = MOST) -> int:
    """How many objects the scenes of a step have, `most` at most: the shares go evenly from those of the first step to
    those of the last.
    """
    first, last = (np.array(shares, float) for shares in config["shares"])
    shares = (first + (last - first) * min(1.0, step / config["steps"]))[:most]
    shares = shares if shares.any() else np.ones(most)
    return 1 + int(rng.choice(most, p=shares / shares.sum()))


def prompt_rows(prompts: list[list[str]]) -> Tensor:
    """[B,L-1,77]: rows of the embedding for the prompts of B scenes, L-1 each."""
    return torch.stack([text.rows(scene) for scene in prompts])


Words = Callable[[list[list[str]]], tuple[Tensor, ...]]  # prompts of scenes to what LayeredUNet takes for them


def said(words: Words | None, prompts: list[list[str]], device: torch.device) -> Tensor | tuple[Tensor, ...]:
    """What a model takes for the prompts of scenes; the mini family's rows of tokens when there are no words."""
    if words is None:
        return prompt_rows(prompts).to(device)
    return tuple(part.to(device) for part in words(prompts))


def loss_of(
    model: nn.Module,
    batch: Batch,
    config: dict,
    levels: Tensor,
    rng: np.random.Generator,
    words: Words | None = None,
) -> dict[str, Tensor]:
    """Noise, context and layout loss of scenes of L layers. All layers of a scene have one timestep and, but for the
    share `own_noise`, the same noise; the share `empty_prompt` of the scenes has no words, and its alphas for maps.

    levels: [timesteps], the share of variance left at each. Scalars: what is minimised, and its parts.
    Source: dreamlayer, Eq. 2 (its first term) and Eq. 8 (the sum of the terms)
    Differs: Eq. 2 is weighted by min-SNR, and a step at a low signal-to-noise ratio, where layouts form, counts up to
    `early_weight` times as much.
    Differs: objects are encoded with their transparency hidden in the latent, as LayerDiffuse's encoder does it, since
    its decoder is to find it again; the paper speaks of a solid gray background alone.
    """
    device, size = next(model.parameters()).device, len(batch.prompts)
    timesteps = torch.from_numpy(rng.integers(0, len(levels), size))
    noise = torch.from_numpy(rng.standard_normal((size, 1, *batch.latent.shape[2:]), np.float32)).expand_as(
        batch.latent
    )
    if config["own_noise"]:
        noise = share_noise(
            noise, torch.from_numpy(rng.standard_normal(batch.latent.shape, np.float32)), config["own_noise"]
        )
    kept = rng.random(size) >= config["empty_prompt"]
    prompts = [own if keep else [""] * len(own) for own, keep in zip(batch.prompts, kept, strict=True)]
    level, alphas = levels[timesteps], batch.alphas.to(device)
    given = formulas.add_noise(batch.latent, noise, level)
    predicted, maps, own = model(
        given.to(device),
        timesteps.to(device),
        said(words, prompts, device),
        (timesteps >= EARLY).float().to(device),
        alphas,
    )
    error = (predicted - noise.to(device)).square().mean((1, 2, 3, 4))
    weight = formulas.noise_loss_weight(level, config["snr_gamma"]) * ((1 - level) / level).clamp(
        1, config["early_weight"]
    )
    weight = weight.float().to(device)
    has_words = torch.from_numpy(kept).float().to(device)
    wanted = resize_maps(alphas, maps.shape[-2:])
    wanted, maps, own = (rearrange(part, "b object h w -> b object (h w)") for part in (wanted, maps, own))
    context = (map_distance(maps, wanted) * has_words).mean()
    layout = (map_distance(maps.detach(), own) * has_words).mean()  # the composite guides the objects, not they it
    total = (weight * error).mean() + config["context_weight"] * context + config["layout_weight"] * layout
    return {"loss": total, "error": error.mean().detach(), "context": context.detach(), "layout": layout.detach()}


def build(config: dict, root: Path) -> LayeredDenoiser:
    """The trained denoiser, on the objects' rows with the trained adapter, and what learns: at zero, or as the run
    `start` left it.
    """
    torch.manual_seed(config["seed"])
    plain = diffusion.build({**config, "in_channels": 4})
    loop.start_from(plain, root / "diffusion" / "model.safetensors")
    model = LayeredDenoiser(
        plain,
        adapter_terms(root / config["adapter"]) if config["adapter"] else {},
        MOST,
        config["context_layers"],
        len(text.token_ids()) - 1,
    )
    if config["start"]:
        learns = {name for name, value in model.named_parameters() if value.requires_grad}
        loop.start_from(model, root / config["start"] / "model.safetensors", learns)
    return model


def adapter_terms(folder: Path) -> dict[str, Tensor]:
    """What the trained adapter adds to each projection. Raises TrainingError when it is not there."""
    path = folder / "model.safetensors"
    if not path.exists():
        raise settings.TrainingError(
            f"{path} is missing; train it first: python -m training adapter, or set adapter to null."
        )
    return _terms(published_adapter(load_file(path)))


def _terms(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Differences of weights by the UNet's modules, from an adapter in LayerDiffuse's form."""
    end = ".weight::lora::1"
    return {
        key.removeprefix("diffusion_model.").removesuffix(end): parts[key.replace("::lora::1", "::lora::0")] @ down
        for key, down in parts.items()
        if key.endswith(end)
    }


def own_adapter(config: dict, base: text_base.Base) -> dict[str, Tensor]:
    """What the adapter of the user's own model adds to each projection, by diffusers' names. Raises TrainingError."""
    if not config["adapter"]:
        return {}
    path = settings.given(config, "adapter")
    try:
        terms = _terms({key: value.float() for key, value in load_file(path).items()})
        host = {name.removeprefix("diffusion_model."): own for own, name in base.names.items()}
        found = {host[name]: term for name, term in terms.items()}
        fits = all(base.unet.get_submodule(name).weight.shape == term.shape for name, term in found.items())
    except (OSError, SafetensorError, KeyError, RuntimeError):
        fits = False
    if not (fits and found):
        raise settings.TrainingError(
            f"--adapter: {path} is no low-rank adapter for {base.family}; give layer_xl_transparent_attn.safetensors "
            "or a file of python -m training adapter."
        )
    return found


@torch.no_grad()
def sample(
    model: nn.Module,
    prompts: list[list[str]],
    side: int,
    own_noise: float,
    seed: int = 0,
    words: Words | None = None,
    steps: int | None = None,
) -> Tensor:
    """[B,L,4,h,w]: deterministic sampling with classifier-free guidance, the layers from noise as in training, as
    Layers sampler does it.
    """
    device, size = next(model.parameters()).device, side // latents.FACTOR
    generator, layers = torch.Generator().manual_seed(seed), len(prompts[0]) + 1
    latent = torch.randn(len(prompts), 1, 4, size, size, generator=generator).repeat(1, layers, 1, 1, 1)
    latent = share_noise(latent, torch.randn(latent.shape, generator=generator), own_noise).to(device)
    rows, nothing = (said(words, one, device) for one in (prompts, [[""] * len(prompts[0])] * len(prompts)))

    def noise(latent, timestep):
        timesteps, early = (
            torch.full((len(prompts),), value, device=device) for value in (timestep, float(timestep >= EARLY))
        )
        wanted, maps, _ = model(latent, timesteps, rows, early)
        return wanted, model(latent, timesteps, nothing, early, maps)[0]

    return sampling.ddim(noise, latent, steps or SAMPLING_STEPS, GUIDANCE)


@dataclass(frozen=True)
class Task:
    """batch: makes a batch of scenes of so many objects from their numbers and a draw. known, check: by the count of
    objects, the numbers that are learnt from, and those that are kept for validation. words: as loss_of takes them.
    show: the images of a grid [N,3,S,S], and how many are in a row.
    """

    model: nn.Module
    batch: Callable[[int, np.ndarray, int], Batch]
    known: dict[int, np.ndarray]
    check: dict[int, np.ndarray]
    words: Words | None
    show: Callable[[nn.Module], tuple[Tensor, int]]


def _mini(config: dict, root: Path) -> Task:
    autoencoder = latents.load_autoencoder(root)
    encoder, decoder = load_pair(root / "transparency")
    pool = SceneLayers(root / "scenes", autoencoder, encoder, config["scenes"], config["side"])
    first = (config["scenes"] - CHECK) // MOST
    check = {
        count: np.arange(first, (config["scenes"] - count) // MOST + 1)[: CHECK // MOST] for count in range(1, MOST + 1)
    }

    def batch(count: int, numbers: np.ndarray, draw: int) -> Batch:
        return pool.batch(count - 1 + MOST * numbers, draw)

    def show(model: nn.Module) -> tuple[Tensor, int]:
        found = [_shown(model, pool, count, autoencoder, decoder, config["own_noise"]) for count in check]
        return torch.cat(found), MOST + 2

    return Task(build(config, root), batch, {count: np.arange(first) for count in check}, check, None, show)


def _own(config: dict, root: Path, base: text_base.Base) -> Task:
    """Of a user's own model and layered files. Raises TrainingError."""
    encoder, terms = load_encoder(config), own_adapter(config, base)
    pool = LayeredFiles(root / "scenes", base, encoder, settings.given(config, "scenes"), config["side"], MOST)
    first = image_folders.learnt(len(pool.paths), config["held_out"], "layered files")
    files = {count: pool.of(count) for count in range(1, MOST + 1)}
    known, check = (
        {count: part for count, own in files.items() if len(part := own[(own < first) == learns])}
        for learns in (True, False)
    )
    check = {count: part[: max(1, config["rows"] // (count + 2))] for count, part in check.items()}  # as many as a step
    scenes = [names[: 1 + count] for names in pool.names for count in range(1, len(names))]
    prompts = [prompt for scene in scenes for prompt in (*scene, layered_unet.joined_prompt(scene))]
    encoded = base.words(prompts, root / "scenes")

    def words(scenes: list[list[str]]) -> tuple[Tensor, ...]:
        rows = [prompt for scene in scenes for prompt in (*scene, layered_unet.joined_prompt(scene))]
        states, pooled, ends = (
            rearrange(part, "(scene layer) ... -> scene layer ...", scene=len(scenes)) for part in encoded(rows)
        )
        return states[:, :-1], ends[:, :-1, 0], pooled

    def batch(count: int, numbers: np.ndarray, draw: int) -> Batch:
        return Batch(*pool.layers(count, numbers), [pool.names[number][: 1 + count] for number in numbers])

    def show(model: nn.Module) -> tuple[Tensor, int]:
        shown = []
        for count, numbers in check.items():
            own = [pool.names[numbers[0]][: 1 + count]]
            found = sample(model, own, config["side"], config["own_noise"], 0, words, config["sampling_steps"])
            images = [base.decode(one[None]).cpu() for one in found[0]]
            empty = [torch.ones_like(images[0])] * (MOST - count)
            shown += [*images[:-1], *empty, images[-1]]
        return torch.cat(shown), MOST + 2

    torch.manual_seed(config["seed"])
    model = layered_unet.LayeredUNet(base.unet, terms, MOST, config["context_layers"])
    if config["gradient_checkpointing"]:
        model.unet.enable_gradient_checkpointing()
    loop.save_what_learns(model)
    return Task(model, batch, known, check, words, show)


def train(config: dict, folder: Path, minutes: float | None, save_every: float) -> nn.Module:
    from accelerate import PartialState

    base = text_base.load(config) if "base" in config else None
    task = _mini(config, folder.parent) if base is None else _own(config, folder.parent, base)
    levels = formulas.noise_levels()

    def loss(model, step, rank):
        rng = np.random.default_rng((config["seed"], step, rank))
        count = object_count(step, config, rng, max(task.known))
        picked = rng.integers(0, len(task.known[count]), max(1, config["rows"] // (count + 2)))
        batch = task.batch(count, task.known[count][picked], step)
        return loss_of(model, batch, config, levels, rng, task.words)

    @torch.no_grad()
    def validate(model, step):
        plain, found = {**config, "empty_prompt": 0}, []
        for count, numbers in task.check.items():
            batch = task.batch(count, numbers, 0)
            found.append(loss_of(model, batch, plain, levels, np.random.default_rng(0), task.words))
        loop.save_grid(folder / "grid.png", *task.show(model))
        return {key: float(np.mean([one[key].item() for one in found])) for key in found[0]}

    trained = loop.fit(task.model, loss, validate, config, folder, minutes, save_every)
    if base is not None and PartialState().is_main_process:  # `publish` writes the mini family's
        write(folder, trained, config, base)
    return trained


def write(folder: Path, model: nn.Module, config: dict, base: text_base.Base) -> None:
    """The file that users load."""
    about = export.describe("dreamlayer", folder, config, f"layered files of {Path(config['scenes']).name}")
    state = layered_denoiser.published_form(model.state_dict(), "unet.", base.names.__getitem__)
    export.save(folder / FILE, state, about | {"base": base.family, "licence": base.licence})
    print(f"{folder / FILE}: put it into ComfyUI's models/layer_model.", flush=True)


def _shown(
    model: nn.Module, pool: SceneLayers, count: int, autoencoder: Autoencoder, decoder: nn.Module, own_noise: float
) -> Tensor:
    """[SHOWN·(MOST+2),3,S,S]: background, objects on a checkerboard, empty places, whole picture of a few scenes, by
    the prompts of the pool's first.
    """
    layers = sample(model, [pool.words(count - 1 + MOST * i, 0) for i in range(SHOWN)], pool.side, own_noise).cpu()
    rows = rearrange(layers, "scene layer c h w -> (scene layer) c h w")
    pictures = autoencoder.decode(rows).clamp(0, 1)
    decoded = decoder(pictures, rows).clamp(0, 1)
    board = checkerboard(pool.side)
    cut = decoded[:, 1:] * decoded[:, :1] + board * (1 - decoded[:, :1])
    pictures, cut = (
        rearrange(rows, "(scene layer) c h w -> scene layer c h w", scene=SHOWN) for rows in (pictures, cut)
    )
    empty = torch.ones(SHOWN, MOST - count, *pictures.shape[2:])
    shown = torch.cat([pictures[:, :1], cut[:, 1:-1], empty, pictures[:, -1:]], 1)
    return rearrange(shown, "scene layer c h w -> (scene layer) c h w")
