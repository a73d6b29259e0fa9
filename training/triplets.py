"""Makes what BFS's first stage learns from: backgrounds, RGBA foregrounds with a drawn shadow, and their composites,
out of composites, clean backgrounds and masks of the objects.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

from ..networks.autoencoder import Autoencoder
from ..scenes import renderer
from ..techniques import back_to_front as formulas
from ..techniques import layering, matting, metrics
from ..techniques.transparency import clean_alpha
from . import base as bases
from . import image_folders, loop, published, settings, shadow

FOLDERS = "composites", "backgrounds", "masks"
WRITTEN = "foregrounds", "backgrounds", "composites"
ERRORS = "object", "with shadow", "shadow left out"  # mean absolute ones of alpha over the image
Segmenter = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Scene:
    """composite, background: [3,S,S]. mask: [1,S,S] of 0 or 1, of the object. truth: its alpha without and with its
    shadow, [1,S,S], where that is known.
    """

    composite: Tensor
    background: Tensor
    mask: Tensor
    caption: str | None
    truth: tuple[Tensor, Tensor] | None = None


class Rendered:
    """Scenes of one object in a place."""

    def __init__(self, first: int, count: int, side: int):
        self.side, self.names = side, [str(index) for index in range(first, first + count)]

    def __getitem__(self, name: str) -> Scene:
        scene = renderer.render(renderer.Request(train=True, count=1), self.side, self.side, int(name))
        (shown,) = scene.objects
        parts = scene.composite, scene.background, shown.mask[..., None], shown.rgba, shown.rgba_with_shadow
        composite, background, mask, rgba, both = (
            rearrange(torch.from_numpy(part), "h w c -> c h w").float() for part in parts
        )
        return Scene(composite, background, mask, shown.prompt, (rgba[3:], both[3:]))


class Folders:
    """A user's own: images of the same names, cut to squares about the object; captions lie beside the composites."""

    def __init__(self, config: dict):
        self.side, self.paths = config["side"], {name: _images(config, name) for name in FOLDERS}
        common = set.intersection(*(set(paths) for paths in self.paths.values()))
        if not common:
            raise settings.TrainingError(
                f"--composites: no image of {config['composites']} has a background in {config['backgrounds']} and a "
                f"mask in {config['masks']} of the same name; name the files alike."
            )
        self.names = sorted(common)
        for name in self.names:
            image_folders.check_sizes((paths[name] for paths in self.paths.values()), FOLDERS[0])

    def __getitem__(self, name: str) -> Scene:
        composite, background, mask = (
            image_folders.read(self.paths[kind][name], mode)
            for kind, mode in zip(FOLDERS, ("RGB", "RGB", "L"), strict=True)
        )
        mask = mask.point(lambda value: 255 * (value > 127))
        left, top, right, bottom = mask.getbbox() or (0, 0, *mask.size)
        middle = (left + right) / 2 / mask.width, (top + bottom) / 2 / mask.height

        def cut(image: Image.Image, resampling: Image.Resampling) -> Tensor:
            pixels = np.asarray(ImageOps.fit(image, (self.side,) * 2, resampling, centering=middle), np.float32) / 255
            return rearrange(torch.from_numpy(np.atleast_3d(pixels)), "h w c -> c h w")

        images = [cut(image, Image.Resampling.BICUBIC) for image in (composite, background)]
        caption = self.paths["composites"][name].with_suffix(".txt")
        return Scene(
            *images,
            cut(mask, Image.Resampling.NEAREST),
            caption.read_text(encoding="utf-8").strip() if caption.exists() else None,
        )


def _images(config: dict, option: str) -> dict[str, Path]:
    """Raises TrainingError."""
    if not config[option]:
        raise settings.TrainingError(f"--{option} is missing; --composites, --backgrounds and --masks belong together.")
    return image_folders.images(Path(config[option]), option)


def segmenter(folder: Path | None) -> Segmenter:
    """What finds an object's mask [1,S,S] in an image [3,S,S] from the box around a rough mask [1,S,S]: a model folder
    of the transformers library (SAM 2); without one the rough mask itself. Raises TrainingError.

    Source: bfs, A.3 (SAM2 on the box of the rough mask)
    """
    if folder is None:
        return lambda image, mask: mask
    from transformers import AutoModelForMaskGeneration, AutoProcessor

    try:
        network = AutoModelForMaskGeneration.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        network = network.to(bases.device())
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise settings.TrainingError(
            f"--segmenter: {folder} cannot be loaded ({str(error).splitlines()[0]}); give a model folder of the "
            "transformers library, such as that of facebook/sam2.1-hiera-large."
        ) from error

    @torch.no_grad()
    def find(image: Tensor, mask: Tensor) -> Tensor:
        rows, columns = mask[0].nonzero().T
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        given = processor(images=_image(image), input_boxes=[[[int(side) for side in box]]], return_tensors="pt")
        given = given.to(network.device)
        outputs = network(**given, multimask_output=False)
        sizes = [given[key].cpu() for key in ("original_sizes", "reshaped_input_sizes") if key in given]
        (found,) = processor.post_process_masks(outputs.pred_masks.cpu(), *sizes)
        return found.reshape(mask.shape).to(mask)

    return find


def cut_out(scene: Scene, mask: Tensor, band: float) -> tuple[Tensor, Tensor]:
    """The object's colours [3,S,S] and alpha [1,S,S], matted along the edge of its mask [1,S,S] in a band of this share
    of the side.

    Source: bfs, A.3 (dilation and erosion to a trimap, and matting)
    Differs: closed-form matting in place of ViTMatte, and the object's own colours along its edge, which the text does
    not tell apart from the scene's.
    """
    image = rearrange(scene.composite, "c h w -> h w c")
    reach = max(1, round(band * mask.shape[-1]))
    alpha = matting.matte(image, mask[0], 2 * reach)
    front, _ = matting.separate_colours(image, alpha)
    return rearrange(front, "h w c -> c h w").float(), alpha[None].float()


@torch.no_grad()
def with_shadow(
    colour: Tensor, alpha: Tensor, model: shadow.Shadow, autoencoder: Autoencoder, steps: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Straight colours [3,S,S] and opacity [1,S,S] of an object, its colours and its alpha, with a drawn shadow.

    Source: bfs, A.3 (the shadow network's place in the pipeline)
    Differs: of what is drawn the opacity alone is taken, and the object keeps its own pixels (by Eq. 11); what the
    autoencoder makes of the object without a shadow is no part of the shadow, and neither are faint veils and specks.
    """
    colour, alpha = colour[None], alpha[None]
    white = layering.composite(colour, torch.ones_like(colour), alpha)
    plain = autoencoder.encode(white.to(bases.device()))
    drawn = shadow.sample(model, plain.cpu(), alpha, steps, [seed])
    without, shadowed = autoencoder.decode(torch.cat([plain, drawn.to(plain)])).cpu().clamp(0, 1).chunk(2)
    opacity = clean_alpha(formulas.opacity_with_shadow(alpha * colour, white + shadowed - without, alpha))
    return formulas.colour_with_shadow(white - (opacity - alpha), opacity)[0], opacity[0]


def train(config: dict, folder: Path, minutes: float | None, save_every: float) -> dict[str, float]:
    """Folders foregrounds (RGBA, with captions), backgrounds and composites, and a table of what was kept and how far
    its alphas are from the truth, where that is known; goes on after the last row of the table. Returns report().

    Source: bfs, A.3
    """
    given = any(config[name] for name in FOLDERS)
    source = Folders(config) if given else Rendered(config["first"], config["count"], config["side"])
    find = segmenter(Path(config["segmenter"]) if config["segmenter"] else None)
    model = shadow.load(Path(config["shadow"] or folder.parent / "shadow")).to(bases.device())
    autoencoder = published.checkpoint()[1].to(bases.device())
    table, started = folder / "triplets.csv", time.monotonic()
    for kind in WRITTEN:
        (folder / kind).mkdir(parents=True, exist_ok=True)
    done = {row["name"] for row in _rows(table)}
    for number, name in enumerate(source.names):
        if minutes is not None and time.monotonic() - started > minutes * 60:
            break
        if name in done:
            continue
        scene = source[name]
        mask = find(scene.composite, scene.mask) if scene.mask.any() else scene.mask
        overlap = metrics.alpha_iou(mask[None], scene.mask[None]).item()
        kept = bool(mask.any()) and overlap >= config["overlap"]
        row = {"name": name, "overlap": overlap, "kept": int(kept)} | dict.fromkeys(ERRORS, "")
        if kept:
            colour, alpha = cut_out(scene, mask, config["band"])
            seed = config["seed"] + number
            layer = with_shadow(colour, alpha, model, autoencoder, config["sampling_steps"], seed)
            write(folder, name, scene, *layer)
            if scene.truth:
                pairs = (alpha, scene.truth[0]), (layer[1], scene.truth[1]), (alpha, scene.truth[1])
                row |= zip(ERRORS, [(one - other).abs().mean().item() for one, other in pairs], strict=True)
        loop.append_row(table, row)
        if number % 16 == 15:
            print(f"{number + 1} of {len(source.names)}", flush=True)
    return report(_rows(table))


def write(folder: Path, name: str, scene: Scene, colour: Tensor, opacity: Tensor) -> None:
    """One triplet, as python -m training back_to_front takes it: colours [3,S,S] and opacity [1,S,S] of the foreground,
    its background, and both together.

    Source: bfs, Eq. 13, 15
    """
    _image(torch.cat([colour, opacity])).save(folder / "foregrounds" / f"{name}.png")
    _image(scene.background).save(folder / "backgrounds" / f"{name}.png")
    composite = layering.composite(colour, scene.background, opacity)
    _image(composite).save(folder / "composites" / f"{name}.png")
    if scene.caption:
        (folder / "foregrounds" / f"{name}.txt").write_text(scene.caption, encoding="utf-8")


def _image(values: Tensor) -> Image.Image:
    return Image.fromarray((rearrange(values, "c h w -> h w c").clamp(0, 1) * 255).round().byte().numpy())


def _rows(table: Path) -> list[dict]:
    if not table.exists():
        return []
    with open(table, newline="") as file:
        return list(csv.DictReader(file))


def report(rows: list[dict]) -> dict[str, float]:
    """How many were kept and dropped, and the means of the errors with their standard errors; printed too."""
    kept = [row for row in rows if row["kept"] == "1"]
    found = {"kept": len(kept), "dropped": len(rows) - len(kept)}
    print(f"{found['kept']} triplets, {found['dropped']} dropped")
    for name in ERRORS:
        values = np.array([float(row[name]) for row in kept if row[name]])
        if len(values) > 1:
            found |= {name: values.mean(), f"{name} ±": values.std(ddof=1) / len(values) ** 0.5}
            print(f"alpha, {name}: {found[name]:.4f} ± {found[f'{name} ±']:.4f}")
    return found
