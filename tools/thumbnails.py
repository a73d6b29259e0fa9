"""The picture beside each workflow, which ComfyUI's template browser shows: what the workflow made, or the graph itself
where it needs models that nobody has here (of those `make test` leaves screenshots in output/browser).

    python tools/host.py exec tools/thumbnails.py [NAME ...]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import demo
import host
import run
from PIL import Image, ImageOps
from psd_tools import PSDImage

WORKFLOWS = host.PACK / "workflows"
SCREENSHOTS = host.PACK / "output" / "browser"
SIDE, GAP = 384, 4
CANVAS, MAP = (60, 150, 1600, 1300), (1330, 1130, 1600, 1400)  # of a window of 1600 × 1400: without its bars; its map
QUALITY = 80


def shown(files: list[Path]) -> list[Image.Image]:
    """The images first, or what the layers make together where none is saved; then the layers."""
    layered = [path for path in files if path.suffix == ".psd"]
    images = [image for path in files if path not in layered for _, image in demo.pictures(path)]
    layers = [image for path in layered for _, image in demo.pictures(path)]
    return (images or [PSDImage.open(path).composite().convert("RGBA") for path in layered]) + layers


def collage(images: list[Image.Image]) -> Image.Image:
    """The first and the last ones, one, two or four of them; what is partly transparent lies on a checkerboard."""
    images = {3: [images[0], images[-1]]}.get(len(images), images[:1] + images[1:][-3:])
    across, down = {1: (1, 1), 2: (2, 1)}.get(len(images), (2, 2))
    side = (SIDE - GAP * (across - 1)) // across
    sheet = Image.new("RGB", (SIDE, side * down + GAP * (down - 1)), "white")
    for place, image in enumerate(images):
        image = ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)
        image = Image.alpha_composite(demo.checkerboard(image.size), image).convert("RGB")
        sheet.paste(image, (place % across * (side + GAP), place // across * (side + GAP)))
    return sheet


def graph_of(shot: Image.Image) -> Image.Image:
    """The nodes alone, of a screenshot of the whole window."""
    shot.paste("#151515", MAP)
    canvas = shot.crop(CANVAS)
    nodes = canvas.convert("L").point(lambda value: 255 * (value > 30)).getbbox()
    return ImageOps.pad(canvas.crop(nodes), (SIDE, SIDE * 2 // 3), Image.Resampling.LANCZOS, color="#151515")


def main(names: list[str]) -> int:
    found = host.find_or_install()
    base = host.PACK / "output" / "comfyui"
    host.copy_inputs(found, base)
    with host.Server(found, base) as server, tempfile.TemporaryDirectory() as out:
        client = run.Client(server.url)
        for path in sorted(WORKFLOWS.glob("*.json")):
            if names and path.stem not in names:
                continue
            try:
                files = run.run_file(client, path, [], Path(out) / path.stem, sys.stderr.isatty())
                image = collage(shown([Path(file) for file in files]))
            except run.RunError as error:
                print(f"{path.stem}: the graph itself ({str(error)[:100]})")
                with Image.open(SCREENSHOTS / f"{path.stem}_canvas.png") as shot:
                    image = graph_of(shot.convert("RGB"))
            image.save(path.with_suffix(".jpg"), quality=QUALITY, optimize=True)
            print(path.with_suffix(".jpg"), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
