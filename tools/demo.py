"""Run the bundled workflows through ComfyUI's API and lay what they made out on one contact sheet.

    make demo
    make demo IMAGE=photo.jpg DEPTH=depth.png      # one's own picture; DEPTH_IS=black when near is dark (sensor depth)
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

import host
import requests
import run
from PIL import Image, ImageDraw

WORKFLOWS = ("depth_slice_to_psd", "depth_swap_background", "layers_roundtrip")
OUT = host.PACK / "output" / "demo"
CELL = (300, 240)
LABEL = 22


def checkerboard(size: tuple[int, int], square: int = 12) -> Image.Image:
    board = Image.new("L", ((size[0] + square - 1) // square, (size[1] + square - 1) // square))
    board.putdata([225 if (i % board.width + i // board.width) % 2 else 170 for i in range(board.width * board.height)])
    return board.resize((board.width * square, board.height * square), Image.NEAREST).crop((0, 0, *size)).convert("RGBA")


def pictures(path: Path) -> list[tuple[str, Image.Image]]:
    """(caption, picture) of a file: every layer of a PSD or OpenRaster file on its canvas, or the picture itself."""
    if path.suffix == ".psd":
        from psd_tools import PSDImage
        psd = PSDImage.open(path)
        return [(layer.name, layer.composite(viewport=psd.viewbox).convert("RGBA")) for layer in psd]
    if path.suffix in (".png", ".webp"):
        with Image.open(path) as image:
            return [(path.name, image.convert("RGBA"))]
    return []


def cell(caption: str, image: Image.Image) -> Image.Image:
    image = image.copy()
    image.thumbnail((CELL[0] - 8, CELL[1] - LABEL - 8), Image.LANCZOS)
    tile = Image.new("RGBA", CELL, "#202024")
    tile.paste(Image.alpha_composite(checkerboard(image.size), image), ((CELL[0] - image.width) // 2, 4))
    ImageDraw.Draw(tile).text((6, CELL[1] - LABEL + 3), caption[:46], fill="#d8d8dc")
    return tile


def contact_sheet(rows: list[tuple[str, list[tuple[str, Image.Image]]]]) -> Image.Image:
    columns = max(len(items) for _, items in rows)
    sheet = Image.new("RGB", (columns * CELL[0], len(rows) * (CELL[1] + LABEL)), "#151518")
    for row, (title, items) in enumerate(rows):
        top = row * (CELL[1] + LABEL)
        ImageDraw.Draw(sheet).text((6, top + 5), title, fill="#ffffff")
        for column, (caption, image) in enumerate(items):
            sheet.paste(cell(caption, image).convert("RGB"), (column * CELL[0], top + LABEL))
    return sheet


def settings(options: argparse.Namespace, name: str) -> list[str]:
    """What `make demo IMAGE=… DEPTH=…` changes in the slicing workflow."""
    if name != "depth_slice_to_psd" or not options.image:
        return []
    return [f"LoadImage.image={options.image}", f"Strata_LoadDepth.file={options.depth}", f"Strata_SliceByDepth.near_is={options.depth_is}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path)
    parser.add_argument("--depth", type=Path)
    parser.add_argument("--depth-is", choices=("white", "black"), default="white", help="what near pixels are in DEPTH")
    options = parser.parse_args()
    if bool(options.image) != bool(options.depth):
        parser.error("give IMAGE and DEPTH together: the depth is what the picture is sliced by")
    for path in filter(None, (options.image, options.depth)):
        if not path.is_file():
            parser.error(f"there is no file {path}")
    base = host.PACK / "output" / "comfyui"
    rows, made = [], []
    try:
        found = host.find_or_install()
        host.copy_inputs(found, base)
        with host.Server(found, base) as server:
            print(f"ComfyUI {server.host.version} is running; its log is {server.log}", flush=True)
            client = run.Client(server.url)
            for name in ("depth_slice_to_psd",) if options.image else WORKFLOWS:
                print(f"{name} ...", flush=True)
                files = run.run_file(client, host.PACK / "workflows" / f"{name}.json", settings(options, name), OUT / name)
                made += files
                rows.append((name, [picture for path in files for picture in pictures(Path(path))]))
    except (run.RunError, host.HostError, requests.RequestException) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    OUT.mkdir(parents=True, exist_ok=True)
    contact_sheet(rows).save(OUT / "contact_sheet.png")
    print("\n".join(map(str, made)))
    print(f"\nLook at {OUT / 'contact_sheet.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
