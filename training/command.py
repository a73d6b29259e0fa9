"""The command line of the trainers."""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path

from .settings import CONFIGS, MODELS, TrainingError, cache

TRAINERS = {
    "autoencoder": "Pictures to latents of an eighth of their size and back; everything else needs it first.",
    "decoder": "The autoencoder's second half alone, longer: sharper pictures from the same latents.",
    "classifier": "Which place and which objects a picture shows; judges what the other models draw.",
    "diffusion": "Denoiser and text encoder: pictures from prompts, in the autoencoder's latents.",
    "transparency": "LayerDiffuse's pair: hides the alpha of an object in its latent, and finds it again.",
    "transparent_decoder": "The pair's second half alone, longer: closer alphas from the same latents.",
    "adapter": "Low-rank adapter with which the denoiser draws single objects with hidden transparency.",
    "dreamlayer": "What makes the denoiser draw several layers of a scene together: keys, values, layer embedding and "
    "context-aware layers.",
    "dreamlayer_apart": "The same, longer, with noise that is in part each layer's own: objects that stand apart.",
    "inpaint": "The denoiser with nine input channels, which paints inside a mask; starts from the one before.",
    "rgba_autoencoder": "The autoencoder with a fourth channel: colour and alpha in the same latents; needs the "
    "published checkpoint.",
    "flux_fill": "A model in Flux's structure that paints an object with its shadow into a box, or a whole image, "
    "from words; needs the published checkpoint.",
    "flux_fill_large": "The same, longer, at 256 pixels and at 128 in turns.",
    "flux_adapter": "Low-rank adapter with which the Flux-Fill draws single objects in the RGBA autoencoder's latents; "
    "starts from BFS's terms for the foreground.",
    "latent_composition": "Lays a foreground's latent over a background's; BFS's loss asks it.",
    "back_to_front": "BFS, stage 1: a composite and its foreground with its shadow, drawn together by the Flux-Fill; "
    "needs latent_composition and the published Flux-Fill.",
    "back_to_front_real": "BFS, stage 2: composites with true shadows, foregrounds that follow them.",
    "shadow": "BFS's shadow network: draws the shadow of an object on white; needs the published Flux-Fill.",
    "triplets": "Makes data for BFS's stage 1, foregrounds with a drawn shadow, out of composites, clean "
    "backgrounds and masks; needs shadow.",
    "layeringdiff": "What takes an image apart into foreground and background: two adapters of an inpainting model, "
    "and networks that align details.",
}
# Trainers that are another one's code with another config.
MODULES = {
    "decoder": "autoencoder",
    "inpaint": "diffusion",
    "transparent_decoder": "transparency",
    "dreamlayer_apart": "dreamlayer",
    "flux_fill_large": "flux_fill",
    "back_to_front_real": "back_to_front",
}
# What users give of their own, as values of the config.
FILL = {
    "base": "flux1-fill-dev as one .safetensors file; the mini family's Flux-Fill when there is none. Sizes and rates "
    "are then those of models_config, not of models_config/mini, and the next options are needed",
    "vae": "Flux's autoencoder, ae.safetensors",
    "rgba_vae": "an autoencoder with alpha in its latents: AlphaVAE's diffusion_pytorch_model.safetensors",
    "foregrounds": "folder of RGBA images; for BFS each in its place, over the background of the same name",
    "backgrounds": "folder of images without the objects",
}
TEXT = {
    "text_encoders": "folder of FLUX.1-Fill-dev in diffusers' form, for its text_encoder, text_encoder_2, tokenizer "
    "and tokenizer_2; captions lie beside the images, in .txt files of the same name"
}
REAL = {
    "composites": "folder of images with the objects, each with a background of the same name",
    "masks": "folder of masks of the same names, white where the object is; found by comparison when there is none",
}
LAYERS = {
    "base": "text-to-image checkpoint of Stable Diffusion 1.5 or SDXL, one .safetensors or .ckpt file; the mini "
    "family's when there is none. Sizes and rates are then those of models_config, not of models_config/mini, and the "
    "next options are needed",
    "transparent_encoder": "LayerDiffuse's transparent encoder for that model: layer_sd15_vae_transparent_encoder or "
    "vae_transparent_encoder.safetensors",
}
OPTIONS = {
    "adapter": LAYERS
    | {
        "foregrounds": "folder of RGBA images, one object each; captions lie beside them in .txt files of the same "
        "name, or are the images' own names"
    },
    "dreamlayer": LAYERS
    | {
        "scenes": "folder of layered files, PSD or OpenRaster: the lowest layer is the background, the layers' names "
        "are their prompts",
        "adapter": "file that makes the objects transparent, of python -m training adapter or "
        "layer_xl_transparent_attn.safetensors; objects on gray when there is none",
    },
    "latent_composition": FILL,
    "back_to_front": FILL | TEXT,
    "back_to_front_real": FILL | TEXT | REAL,
    "layeringdiff": {
        "base": "inpainting checkpoint of Stable Diffusion 1.5 or 2, one .safetensors or .ckpt file; the mini family's "
        "when there is none. Sizes and rates are then those of models_config/layeringdiff.json",
        "foregrounds": "folder of images with alpha; rendered scenes when there is none",
        "backgrounds": "folder of images to lay them over",
    },
    "triplets": {
        "composites": "folder of images with an object, captions in .txt files beside them; rendered scenes when there "
        "is none",
        "backgrounds": "folder of the same images without the object and its shadow",
        "masks": "folder of masks of the same names, white where the object roughly is",
        "segmenter": "SAM 2 as a model folder of transformers, which finds the object in the mask's box; without it "
        "the masks are taken as they are",
        "shadow": "folder of the trained shadow network; the one beside --folder when there is none",
    },
}
FOR_BASES = CONFIGS.parent
NEED_A_BASE = ("adapter", "dreamlayer")  # before they take anything else of a user's own
# With its default settings glibc gives memory back and takes it again on every step, which costs seconds at random.
# mallopt's numbers of M_MMAP_MAX, M_TRIM_THRESHOLD (-1 is never) and M_TOP_PAD.
ALLOCATOR = {-4: 0, -1: -1, -2: 2**28}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training",
        description="Train the mini models on rendered scenes. A run that was stopped "
        "continues where its last checkpoint left off when the same command is given again.",
    )
    verbs = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, text in TRAINERS.items():
        verb = verbs.add_parser(
            name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        verb.add_argument("--config", type=Path, default=CONFIGS / f"{name}.json", help="sizes, rates and seeds")
        for option, text in OPTIONS.get(name, {}).items():
            verb.add_argument(f"--{option.replace('_', '-')}", type=Path, help=text)
        verb.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="change one value of the config; may be repeated",
        )
        verb.add_argument("--folder", type=Path, default=cache() / name, help="checkpoints, grids and losses go there")
        verb.add_argument(
            "--minutes",
            type=float,
            default=None,
            help="stop with a checkpoint after so long (the schedule is not shortened)",
        )
        verb.add_argument("--save-every", type=float, default=180, metavar="SECONDS", help="time between checkpoints")
    verb = verbs.add_parser(
        "publish",
        help="Write the trained weights as the files in models/ that ComfyUI loads.",
        description=publish.__doc__,
    )
    verb.add_argument("--folder", type=Path, default=cache(), help="where the trainers' folders are")
    verb.add_argument("--models", type=Path, default=MODELS, help="where the files go")
    verb = verbs.add_parser(
        "judge",
        help="Ask the classifier whether generated pictures show what their prompts say.",
        description=judge.__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    verb.add_argument("--folder", type=Path, default=cache(), help="judge.png goes there")
    verb.add_argument("--models", type=Path, default=MODELS, help="where the checkpoint to judge is")
    verb.add_argument("--cfg", type=float, default=4.0, help="strength of the classifier-free guidance")
    verb.add_argument("--steps", type=int, default=20, help="sampling steps")
    verb.add_argument("--side", type=int, default=128, help="pixels of the pictures")
    verb.add_argument("--seed", type=int, default=1000, help="first seed; the settings were chosen on seeds below 1000")
    return parser.parse_args(arguments)


def publish(options: argparse.Namespace) -> int:
    """Write the trained weights as the files in models/ that ComfyUI loads."""
    from . import family  # torch, which takes seconds

    family.publish(options.folder, options.models)
    return 0


def judge(options: argparse.Namespace) -> int:
    """Generate one picture of every object in every place and print in how many the classifier sees what the prompt
    says.
    """
    from . import family

    found = family.agreement(
        options.models, options.cfg, options.steps, options.side, options.folder / "judge.png", options.seed
    )
    for key, value in found.items():
        print(f"{key}: {value.mean():.1%} ± {value.std(correction=1) / len(value) ** 0.5:.1%} ({len(value)} pictures)")
    return 0


OTHERS = {"publish": publish, "judge": judge}


def read_config(path: Path, changes: list[str]) -> dict:
    """The config with the changes of the command line. Raises SystemExit with what to do."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SystemExit(
            f"error: cannot read the config {path} ({error.strerror}); give an existing file with --config."
        ) from error
    except ValueError as error:
        raise SystemExit(f"error: the config {path} is not JSON ({error}).") from error
    for change in changes:
        key, _, value = change.partition("=")
        if key not in config:
            raise SystemExit(f"error: --set {change}: the config has no {key!r}; it has {', '.join(config)}.")
        try:
            config[key] = json.loads(value)
        except ValueError as error:
            raise SystemExit(
                f"error: --set {change}: {value!r} is not a number, true, false or quoted text."
            ) from error
    return config


def keep_memory() -> bool:
    """Have glibc keep the memory that is freed, for this process; False where the C library has no such setting."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and all(mallopt(setting, value) for setting, value in ALLOCATOR.items())


def main(arguments: list[str] | None = None) -> int:
    try:
        return run(arguments)
    except TrainingError as error:
        raise SystemExit(f"error: {error}") from error


def run(arguments: list[str] | None) -> int:
    options = parse(arguments)
    if importlib.util.find_spec("accelerate") is None:
        raise SystemExit(
            f'error: the trainers need the package accelerate: {sys.executable} -m pip install "accelerate>=1.0"'
        )
    if "MALLOC_MMAP_MAX_" not in os.environ:
        keep_memory()
    if options.what in OTHERS:
        return OTHERS[options.what](options)
    given = {key: getattr(options, key) for key in OPTIONS.get(options.what, {}) if getattr(options, key)}
    if options.what in NEED_A_BASE and given and "base" not in given:
        raise TrainingError(f"--{next(iter(given)).replace('_', '-')} goes with a model of your own; give --base too.")
    standard = options.config == CONFIGS / f"{options.what}.json"
    config = read_config(
        FOR_BASES / f"{options.what}.json" if standard and "base" in given else options.config, options.set
    )
    config |= {key: str(path.resolve()) for key, path in given.items()}
    trainer = importlib.import_module(f".{MODULES.get(options.what, options.what)}", __package__)
    least = 2 * getattr(trainer, "CHECK", 0)  # scenes kept for validation
    if isinstance(config.get("scenes"), int) and config["scenes"] < least:
        raise SystemExit(
            f"error: scenes is {config['scenes']}, and {trainer.CHECK} of them are kept for validation; set it to "
            f"{least} or more."
        )
    try:
        trainer.train(config, options.folder, options.minutes, options.save_every)
    except KeyboardInterrupt:
        print(
            f"Stopped; give the same command again to go on from the last checkpoint in {options.folder}.",
            file=sys.stderr,
        )
        return 130
    except OSError as error:
        raise SystemExit(
            f"error: {error.strerror or error} ({error.filename or options.folder}); free some space or choose another "
            "--folder, then give the same command again."
        ) from error
    return 0
