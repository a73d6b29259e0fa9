"""The measures of tools/evaluate.py: samples of layered images, and what can be told of them.

Pictures are [3,H,W] or [B,3,H,W] in 0..1. What networks judge is asked of judges by name, see judges.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import figures
import numpy as np
import torch
from judges import IMAGES, LAYERED, Missing
from PIL import Image, ImageOps
from strata.formats import files
from strata.formats.raster import to_bytes
from strata.techniques import layering, losses, metrics, scoring
from strata.techniques.compositing import flatten
from strata.techniques.fitting import resized
from strata.techniques.geometry import rasterise
from strata.techniques.layers import LayerStack, effect_of
from torch import Tensor

WHOLE, FOREGROUND, BACKGROUND = "composite", "foreground", "background"
GRAY = 0.5  # behind a foreground that a network looks at
PLACES = ("occupancy %", "longest span %", "vertical centre %", "horizontal centre %")
SETS = "FID and KID"
THRESHOLDS = (0.35, 0.25)  # of boxes and words, as Detect foreground's defaults
NOT_CHOSEN = {"find": "Choose --detector and --segmenter.", "depth": "Choose --depth."}
REACH = 1 / 16  # of the image's longer side, around a shadow
Figures = dict[str, dict[str, float]]  # of a column, by the measure's name


@dataclass(frozen=True)
class Sample:
    """image: [3,H,W]. objects: [N,4,H,W] back to front, without hidden layers and without the background [3,H,W].
    names: of the background and of the objects. shadows: [S,1,H,W], alphas of the layers that are effects of objects.
    layers: [4,H,W] of all but those. recomposed: mean difference of the flattened layers and an image of its own file.
    """

    name: str
    image: Tensor
    words: str | None = None
    objects: Tensor | None = None
    background: Tensor | None = None
    names: tuple[str, ...] = ()
    shadows: Tensor | None = None
    layers: Sequence[Tensor] = ()
    recomposed: float | None = None

    @property
    def fronts(self) -> Tensor:
        """[N,3,H,W]: the objects over gray."""
        return layering.composite(self.objects[:, :3], torch.tensor(GRAY), self.objects[:, 3:])


def read(folder: Path) -> Iterator[Sample]:
    """The samples of a folder in the order of their names. Raises ValueError naming the file that cannot be read."""
    names = sorted({path.stem for path in folder.iterdir() if path.suffix.lower() in IMAGES + LAYERED})
    if not names:
        raise ValueError(
            f"{folder}: there is no image and no PSD or OpenRaster file in it; give the folder of results."
        )
    for name in names:
        of_name = [path for path in sorted(folder.iterdir()) if path.stem == name]
        image = next((path for path in of_name if path.suffix.lower() in IMAGES), None)
        layered = next((path for path in of_name if path.suffix.lower() in LAYERED), None)
        words = folder / f"{name}.txt"
        yield sample_of(
            name,
            None if image is None else opened(image),
            None if layered is None else files.load(layered),
            words.read_text(encoding="utf-8").strip() if words.exists() else None,
        )


def opened(path: Path) -> Tensor:
    """[3,H,W]; what is transparent becomes black."""
    try:
        with Image.open(path) as image:
            rgba = np.asarray(ImageOps.exif_transpose(image).convert("RGBA"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read as an image ({error}); save it again.") from error
    pixels = torch.from_numpy(rgba.copy()).movedim(-1, 0) / 255
    return pixels[:3] * pixels[3:]


def sample_of(name: str, image: Tensor | None, stack: LayerStack | None, words: str | None) -> Sample:
    if stack is None:
        return Sample(name, image, words)
    drawn = image is None
    stack = stack if drawn else resized(stack, (image.shape[2], image.shape[1]))
    colour, alpha = flatten(stack)
    whole = (colour * alpha[..., None]).movedim(-1, 0)
    shown = [layer for layer in stack.layers if layer.visible and layer.opacity > 0]
    plain, effects = ([layer for layer in shown if (effect_of(layer) is None) == kind] for kind in (True, False))
    rasters, shadows = ([rasterise(layer, stack.canvas).movedim(-1, 0) for layer in part] for part in (plain, effects))
    return Sample(
        name,
        whole if drawn else image,
        words,
        torch.stack(rasters[1:]) if len(rasters) > 1 else None,
        rasters[0][:3] * rasters[0][3:] if rasters else None,
        tuple(layer.name for layer in plain),
        torch.stack(shadows)[:, 3:] if shadows else None,
        rasters,
        None if drawn else metrics.mask_error(whole[None], image[None], torch.ones(1, 1, *image.shape[1:])).item(),
    )


class Table:
    """Values of each figure by column, and what could not be measured and why."""

    def __init__(self, networks: dict[str, object]):
        self.networks, self.values, self.missing = networks, {}, {}
        self.features: dict[tuple[str, bool, str], list[Tensor]] = {}

    def ask(self, name: str, *given):
        judge = self.networks.get(name)
        if judge is None:
            raise Missing(NOT_CHOSEN.get(name, f"No judge of {name} was given."))
        if isinstance(judge, Missing):
            raise judge
        return judge(*given)

    def add(self, column: str, figures: dict[str, Callable[[], object]]) -> None:
        for figure, measured in figures.items():
            try:
                self.values.setdefault(figure, {}).setdefault(column, []).append(float(measured()))
            except Missing as error:
                self.missing[figure] = str(error)

    def keep(self, column: str, true: bool, pictures: Tensor) -> None:
        """Features for the distances of sets."""
        try:
            for name, rows in self.ask("features", pictures).items():
                self.features.setdefault((column, true, name), []).append(rows)
        except Missing as error:
            self.missing[SETS] = str(error)

    def sets(self) -> None:
        """FID and KID where there are at least two of each."""
        for column, true, name in list(self.features):
            pair = [self.features.get((column, one, name), []) for one in (False, True)]
            found, wanted = (torch.cat(rows) if rows else torch.empty(0, 1) for rows in pair)
            if true or min(len(found), len(wanted)) < 2:
                continue
            kinds = {
                "FID": lambda found=found, wanted=wanted: metrics.frechet_distance(found, wanted),
                "KID": lambda found=found, wanted=wanted: metrics.kernel_distance(found, wanted),
            }
            self.add(column, {f"{kind} ({name})": measured for kind, measured in kinds.items()})

    def summaries(self) -> dict[str, Figures]:
        """Of what is known of one sample at least."""
        return {
            figure: {
                column: figures.summary(values) for column, values in columns.items() if not np.isnan(values).all()
            }
            for figure, columns in self.values.items()
        }


def measure(
    results: Iterable[Sample], truths: Iterable[Sample], depths: dict[str, float], networks: dict[str, object]
) -> Table:
    """Of the samples one by one, then of the sets. Raises ValueError where a result and its truth differ in size."""
    table, known = Table(networks), {}
    for truth in truths:
        known[truth.name] = truth
        keep(table, truth, True)
    for sample in results:
        keep(table, sample, False)
        truth = known.get(sample.name)
        if truth is not None and truth.image.shape != sample.image.shape:
            sizes = [f"{one.image.shape[2]}×{one.image.shape[1]}" for one in (sample, truth)]
            raise ValueError(
                f"{sample.name}: the result is {sizes[0]} and the truth {sizes[1]}; give both at one size."
            )
        of_whole(table, sample, truth)
        if sample.objects is not None:
            of_objects(table, sample, truth)
        if sample.background is not None:
            of_background(table, sample, truth)
        if sample.name in depths:
            table.add(WHOLE, {"depth error": lambda s=sample: depth_error(table, s, depths[s.name])})
    table.sets()
    return table


def keep(table: Table, sample: Sample, true: bool) -> None:
    table.keep(WHOLE, true, sample.image[None])
    if sample.objects is not None:
        table.keep(FOREGROUND, true, sample.fronts)
        table.keep(BACKGROUND, true, sample.background[None])


def of_whole(table: Table, sample: Sample, truth: Sample | None) -> None:
    image = sample.image[None]
    found = {"aesthetic score": lambda: table.ask("aesthetic", image)}
    if sample.words:
        found["CLIP score"] = lambda: table.ask("agreement", image, [sample.words])
    if sample.recomposed is not None:
        found["layers against image"] = lambda: sample.recomposed
    if truth is not None:
        true = truth.image[None]
        found |= {
            "PSNR": lambda: losses.psnr(image, true),
            "SSIM": lambda: metrics.ssim(image, true),
            **compared(table, image, true),
        }
    if truth is not None and truth.objects is not None:
        inside = (truth.objects[:, 3:].amax(0, keepdim=True) > 0.5).float()
        found["seam error"] = lambda: metrics.seam_error(image, true, inside)
        if truth.shadows is not None:
            reach = round(REACH * max(image.shape[2:]))
            alphas = [alpha.movedim(0, 1) for alpha in (truth.shadows, truth.objects[:, 3:])]
            found["shadow band error"] = lambda: metrics.mask_error(image, true, metrics.shadow_band(*alphas, reach))
        if sample.layers:
            pair = [[to_bytes(rgba.movedim(0, -1)) for rgba in one.layers] for one in (sample, truth)]
            rows = scoring.layerd_scores(*pair, scoring.MOST_MERGES)
            for row, merges in ((rows[0], "no merges"), (rows[-1], f"up to {scoring.MOST_MERGES} merges")):
                found[f"layers' RGB L1, {merges}"] = lambda row=row: row["rgb_l1"]
                found[f"layers' alpha soft IoU, {merges}"] = lambda row=row: row["alpha_iou"]
    table.add(WHOLE, found)


def of_objects(table: Table, sample: Sample, truth: Sample | None) -> None:
    paired = truth is not None and truth.objects is not None and len(truth.objects) == len(sample.objects)
    for index, words in enumerate(sample.names[1:]):
        both = [sample, truth] if paired else [sample]
        of_object(table, words, *((one.objects[index, None], one.fronts[index, None]) for one in both))


def of_object(table: Table, words: str, own: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor] | None = None) -> None:
    """Of RGBA [1,4,H,W] and the same over gray [1,3,H,W]."""
    (rgba, picture), alpha = own, own[0][:, 3:]
    found: dict[str, Callable[[], object]] = {
        "CLIP score": lambda: table.ask("agreement", picture, [words]),
        "FG-MIoU": lambda: metrics.alpha_iou(table.ask("find", picture, [words]), (alpha > 0.5).float()),
    }
    for name, value in zip(PLACES, (100 * metrics.placement(alpha)[0]).tolist(), strict=True):
        found[name] = lambda value=value: value
    if truth is not None:
        true, true_picture = truth
        found |= {
            "alpha SAD / 1000": lambda: metrics.alpha_sad(alpha, true[:, 3:]) / 1000,
            "alpha MAD": lambda: (alpha - true[:, 3:]).abs().mean(),
            "alpha MSE": lambda: metrics.alpha_mse(alpha, true[:, 3:]),
            "alpha IoU": lambda: metrics.alpha_iou(alpha, true[:, 3:]),
            "RGB L1": lambda: metrics.layer_rgb_l1(rgba, true),
            **compared(table, picture, true_picture),
        }
    table.add(FOREGROUND, found)


def of_background(table: Table, sample: Sample, truth: Sample | None) -> None:
    image, found = sample.background[None], {}
    if sample.names[0]:
        found["CLIP score"] = lambda: table.ask("agreement", image, [sample.names[0]])
    if sample.objects is not None:
        inside = (sample.objects[:, 3:].amax(0, keepdim=True) > 0.5).float()
        found["FG-MIoU"] = lambda: metrics.alpha_iou(table.ask("find", image, list(sample.names[1:])), inside)
    if truth is not None and truth.background is not None:
        true = truth.background[None]
        found |= {
            "MAD": lambda: (image - true).abs().mean(),
            "MSE": lambda: (image - true).square().mean(),
            "SAD / 1000": lambda: (image - true).abs().mean(1).sum() / 1000,
            **compared(table, image, true),
        }
    table.add(BACKGROUND, found)


def compared(table: Table, image: Tensor, true: Tensor) -> dict[str, Callable[[], object]]:
    return {
        "DINO likeness": lambda: table.ask("likeness", image, true),
        "LPIPS": lambda: table.ask("distance", image, true),
    }


def depth_error(table: Table, sample: Sample, wanted: float) -> float:
    """How far the mean depth of the front object is from the depth that was asked for, 0..1.

    Source: featglac, section 5 (∆ depth)
    Differs: inside the front layer's alpha where there are layers, and not in SAM's mask.
    """
    depth = table.ask("depth", sample.image[None])
    if sample.objects is None:
        inside = table.ask("find", sample.image[None], [sample.words or ""])
    else:
        inside = (sample.objects[-1:, 3:] > 0.5).float()
    return abs(float((depth * inside).sum() / inside.sum()) - wanted)


def own_models(models: Path, detector: str | None, segmenter: str | None, depth: str | None) -> dict[str, Callable]:
    """The pack's detector and depth model as judges, by the names that Detect foreground and Estimate depth list, from
    ComfyUI's folder of models.
    """
    if not (detector or depth):
        return {}
    import folder_paths
    from strata.patches import depth_model, detection

    for folders in (detection.DETECTORS, detection.SEGMENTERS, depth_model.FOLDERS):
        for kind in folders.kinds:
            folder_paths.add_model_folder_path(kind, str(models / kind))

    def find(pictures: Tensor, words: list[str]) -> Tensor:
        images = pictures.movedim(1, -1)
        try:
            (found,) = detection.detect(images, words, detector, *THRESHOLDS)
            if not len(found.boxes):
                return torch.zeros_like(pictures[:, :1])
            (masks,) = detection.segment(images, [found.boxes], segmenter) if found.masks is None else (found.masks,)
        except ValueError as error:
            raise Missing(str(error)) from error
        return masks.amax(0)[None, None]

    def far(pictures: Tensor) -> Tensor:
        try:
            return 1 - depth_model.estimate(pictures.movedim(1, -1), depth)[..., :1].movedim(-1, 1)
        except ValueError as error:
            raise Missing(str(error)) from error

    return ({"find": find} if detector and segmenter else {}) | ({"depth": far} if depth else {})
