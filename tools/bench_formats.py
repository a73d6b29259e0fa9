"""Saving ten 4K layers, against plain scripts with NumPy, Pillow and psd-tools' public calls that write files with the
same content.
"""

from __future__ import annotations

import io
import sys
import tempfile
import zipfile
from functools import partial
from pathlib import Path

import host
import numpy as np
import torch
from PIL import Image
from turns import compared, in_turns, rows_of

sys.path.insert(0, str(host.PACK / "tests"))
import conftest  # noqa: E402, F401  registers the pack as `strata`
from strata.formats import files  # noqa: E402
from strata.formats.raster import picture  # noqa: E402
from strata.techniques.layers import Layer, LayerStack  # noqa: E402

WIDTH, HEIGHT, LAYERS = 3840, 2160, 10


def scene() -> LayerStack:
    """A smooth picture with grain, cut into ten full-canvas layers of a tenth each, as slicing by depth leaves it."""
    random = np.random.default_rng(0)
    small = Image.fromarray(random.integers(0, 256, (54, 96, 3), np.uint8)).resize(
        (WIDTH, HEIGHT), Image.Resampling.BICUBIC
    )
    grain = random.integers(-3, 4, (HEIGHT, WIDTH, 3))
    colour = torch.from_numpy(np.clip(np.asarray(small) + grain, 0, 255).astype(np.float32) / 255)
    depth = torch.from_numpy(np.asarray(small.convert("L"), np.float32) / 256 * LAYERS).int()
    alphas = [(depth == number).float()[..., None] for number in range(LAYERS)]
    return LayerStack(
        (WIDTH, HEIGHT),
        tuple(Layer(torch.cat([colour * alpha, alpha], -1), f"Layer {n}") for n, alpha in enumerate(alphas)),
    )


def plain_pixels(stack: LayerStack) -> list[Image.Image]:
    return [Image.fromarray((layer.image.numpy() * 255).round().astype(np.uint8)) for layer in stack.layers]


def plain_merged(images: list[Image.Image]) -> Image.Image:
    merged = Image.new("RGBA", images[0].size)
    for image in images:
        merged.alpha_composite(image)
    return merged


def plain_psd(stack: LayerStack, folder: Path) -> None:
    from psd_tools import PSDImage

    images = plain_pixels(stack)
    merged = PSDImage.frompil(plain_merged(images).convert("RGB"))
    for image, layer in zip(images, stack.layers, strict=True):
        merged.create_pixel_layer(image, name=layer.name)
    merged._updated = False  # the flattened picture is there: spare psd-tools its own much slower one
    merged.save(folder / "plain.psd")


def plain_openraster(stack: LayerStack, folder: Path) -> None:
    images = plain_pixels(stack)
    with zipfile.ZipFile(folder / "plain.ora", "w") as archive:
        for number, image in enumerate([*images, plain_merged(images)]):
            file = io.BytesIO()
            image.save(file, "PNG", compress_level=1)
            archive.writestr(f"{number}.png", file.getvalue())


def plain_pictures(stack: LayerStack, folder: Path, suffix: str, **options) -> None:
    images = plain_pixels(stack)
    for number, image in enumerate([*images, plain_merged(images)]):
        image.save(folder / f"plain{number}.{suffix}", **options)


PLAIN = {
    "PSD": plain_psd,
    "OpenRaster": plain_openraster,
    "PNG layers": lambda stack, folder: plain_pictures(stack, folder, "png", compress_level=4),
    "WebP layers": lambda stack, folder: plain_pictures(
        stack, folder, "webp", lossless=True, exact=True, quality=0, method=0
    ),
}


def rows(formats=files.FORMATS):
    """As tools/turns.py gives them; ours includes the flattened picture and the workflow, as the node does it."""
    stack = scene()
    picture(stack.with_layers(stack.layers[:1]))  # imports and first use are not part of it
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for format in formats:
            own, other = folder / f"own {format}", folder / f"plain {format}"
            own.mkdir()
            other.mkdir()
            ours, plain = in_turns(partial(saved, own, stack, format), partial(PLAIN[format], stack, other))
            megabytes = [sum(path.stat().st_size for path in made.glob("*")) / 1e6 for made in (own, other)]
            sizes = f"{megabytes[0]:.0f} MB, plain {megabytes[1]:.0f} MB"
            yield from rows_of(
                f"{LAYERS} layers {WIDTH}×{HEIGHT} flattened and saved as {format} ({sizes})", ours, plain
            )
        if "PSD" in formats:
            merged = picture(stack)
            yield from compared(
                "the PSD alone, the flattened picture being there",
                partial(saved, own, stack, "PSD", merged),
                partial(plain_psd, stack, folder),
            )
            (path,) = saved(folder, stack, "PSD", merged)
            yield from compared("the PSD loaded again", partial(files.load, path), partial(plain_load, path))


def saved(folder: Path, stack: LayerStack, format: str, merged: Image.Image | None = None) -> list[Path]:
    """In place of what the turn before has saved."""
    for path in folder.glob("ours_*"):
        path.unlink()
    return files.save(folder, "ours_", stack, picture(stack) if merged is None else merged, format, {"prompt": {}})


def plain_load(path: Path) -> list[np.ndarray]:
    from psd_tools import PSDImage

    return [np.asarray(layer.topil(), np.float32) / 255 for layer in PSDImage.open(path)]


if __name__ == "__main__":
    for row in rows(sys.argv[1:] or files.FORMATS):
        print(*row, flush=True)
