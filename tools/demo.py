"""Run the bundled workflows through ComfyUI's API and lay what they made out on one contact sheet.

make demo
make demo IMAGE=photo.jpg                      # one's own image, by a depth model in ComfyUI's models/depth_estimation
make demo IMAGE=photo.jpg DEPTH=depth.png      # by a depth image; DEPTH_IS=black when near is dark (sensor depth)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import host
import requests
import run
from PIL import Image, ImageDraw, ImageOps

SLICE, ESTIMATE = "depth_slice_to_psd", "photo_to_psd_depth_anything"
MATTED = ["Strata_SliceByDepth.refine_edges=matting", "Strata_SliceByDepth.refine_width=12"]
PHOTOGRAPH = [
    "LoadImage.image=motorcycle_left.png",
    "Strata_LoadDepth.file=motorcycle_disp.npz",
    "Strata_SliceByDepth.near_is=white",
    "Strata_SliceByDepth.thresholds=0.42, 0.72",
    "Strata_SliceByDepth.refine_edges=matting",
    "Strata_SliceByDepth.refine_width=10",
    "Strata_SliceByDepth.fill_holes=blurred",
]
PHOTOGRAPHS = [
    "Foreground.image=strata_astronaut.jpg",
    "Depth of the foreground.file=strata_astronaut_depth.png",
    "Background.image=strata_rocket.jpg",
    "Depth of the background.file=strata_rocket_depth.png",
    "Strata_ComposeByDepth.threshold=0.5",
    "Strata_ComposeByDepth.soft_edge=2",
]
# (name of the run, workflow, settings)
RUNS = [
    ("photo", "photo_to_psd", MATTED),
    ("photo_rearranged", "photo_rearranged", MATTED),
    ("photograph_with_measured_depth", SLICE, PHOTOGRAPH),
    ("scene", SLICE, []),
    ("swap_background", "depth_swap_background", []),
    ("swap_photographs", "depth_swap_background", PHOTOGRAPHS),
    ("layers_roundtrip", "layers_roundtrip", []),
    ("text_to_image", "mini_text_to_image", []),
    ("transparent_object", "mini_transparent_object", []),
    ("layerfusion", "layerfusion_mini", []),
    ("layers_from_text", "layers_from_text_mini", []),
    ("image_to_layers", "image_to_layers_mini", []),
    ("inpaint", "mini_inpaint", []),
    ("flux_text_to_image", "mini_flux_text_to_image", []),
    ("flux_inpaint", "mini_flux_inpaint", []),
    ("decompose", "decompose_scene_mini", []),
    ("decompose_several", "decompose_several_mini", []),
    ("decompose_photograph", "decompose_photo_mini", []),
    ("foreground_on_background", "foreground_on_background_mini", []),
    ("extract_foreground", "extract_foreground_mini", []),
    ("object_insertion", "object_insertion_mini", []),
    ("scene_composition", "scene_composition_mini", []),
    ("harmonize_layers", "harmonize_layers_mini", []),
    ("layered_files", "layered_files_mini", []),
    ("redraw_layer", "redraw_layer_mini", []),
    ("chain", "chain_mini", []),
    ("chain_photograph", "chain_photo_mini", []),
]
OUT = host.PACK / "output" / "demo"
CELL = (300, 240)
LABEL = 22


def checkerboard(size: tuple[int, int], square: int = 12) -> Image.Image:
    board = Image.new("L", ((size[0] + square - 1) // square, (size[1] + square - 1) // square))
    board.putdata([225 if (i % board.width + i // board.width) % 2 else 170 for i in range(board.width * board.height)])
    return (
        board.resize((board.width * square, board.height * square), Image.NEAREST).crop((0, 0, *size)).convert("RGBA")
    )


def pictures(path: Path) -> list[tuple[str, Image.Image]]:
    """(caption, picture) of a file: every layer of a PSD or OpenRaster file on its canvas, or the picture itself."""
    if path.suffix == ".psd":
        from psd_tools import PSDImage

        psd = PSDImage.open(path)
        options = {"viewport": psd.viewbox, "layer_filter": _shows_alone}
        return [(layer.name, layer.composite(**options).convert("RGBA")) for layer in psd]
    if path.suffix in (".png", ".webp"):
        with Image.open(path) as image:
            return [(path.name, image.convert("RGBA"))]
    return []


def _shows_alone(layer) -> bool:
    """Not so an effect in a group, which darkens or brightens what lies behind the group."""
    from psd_tools.constants import BlendMode

    return layer.visible and (layer.is_group() or not _grouped(layer) or layer.blend_mode == BlendMode.NORMAL)


def _grouped(layer) -> bool:
    return layer.parent is not None and layer.parent.parent is not None


def cell(caption: str, image: Image.Image) -> Image.Image:
    image = ImageOps.contain(image, (CELL[0] - 8, CELL[1] - LABEL - 8), Image.LANCZOS)
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


def own(options: argparse.Namespace) -> list[tuple[str, str, list[str]]]:
    """The one run of `make demo IMAGE=…`."""
    image = f"LoadImage.image={options.image}"
    if not options.depth:
        return [(options.image.stem, ESTIMATE, [image])]
    depth = [f"Strata_LoadDepth.file={options.depth}", f"Strata_SliceByDepth.near_is={options.depth_is}"]
    return [(options.image.stem, SLICE, [image, *depth])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path)
    parser.add_argument("--depth", type=Path)
    parser.add_argument("--depth-is", choices=("white", "black"), default="white", help="what near pixels are in DEPTH")
    options = parser.parse_args()
    if options.depth and not options.image:
        parser.error("give IMAGE as well: DEPTH alone is nothing to cut")
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
            for name, workflow, settings in own(options) if options.image else RUNS:
                print(f"{name} ...", flush=True)
                files = run.run_file(
                    client, host.PACK / "workflows" / f"{workflow}.json", settings, OUT / name, sys.stderr.isatty()
                )
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
