"""Run the graphs of the first version (commit d2e9312) with a checkout's code, and write what tests compare with.

    git worktree add ../first d2e9312 && rm -r ../first/models && cp -r models ../first/ python tools/host.py exec
    tools/old_graphs.py ../first

With today's models/, so that new weights alone are no difference. The graphs, in tests/old_graphs, are never written.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import tempfile
import zipfile
from pathlib import Path

import host
import numpy as np
import run
from PIL import Image

GRAPHS = host.PACK / "tests" / "old_graphs"
NAMES = sorted(path.stem for path in GRAPHS.glob("*.json"))
EXACT = ("depth_slice_to_psd", "depth_swap_background", "layers_roundtrip")  # without a model: equal bits
MINI = [name for name in NAMES if name.endswith("_mini") or name.startswith("mini_")]  # whose weights are in models/
HASHES, SMALL, SIDE = GRAPHS / "pictures" / "hashes.json", "{}.png", 16


def read_graph(name: str) -> dict:
    """As the editor saved it."""
    return json.loads((GRAPHS / f"{name}.json").read_text(encoding="utf-8"))


def read_prompt(name: str) -> dict:
    """In API format, as the first version's ComfyUI had converted it."""
    return json.loads((GRAPHS / "api" / f"{name}.json").read_text(encoding="utf-8"))


def pictures(client: run.Client, entry: dict) -> dict[str, list[Image.Image]]:
    """By node id, every picture of a run, in the order of its outputs; of a layer file its layers. All RGBA."""
    found = {}
    for node, output in sorted(entry["outputs"].items(), key=lambda pair: int(pair[0])):
        # Preview layers shows one sheet of the pictures that it showed one by one in the first version
        output = {"images": output["strata_pictures"]} if "strata_pictures" in output else output
        files = [
            item
            for _, items in sorted(output.items())
            for item in items
            if isinstance(item, dict) and "filename" in item
        ]
        data = [client.download({key: file[key] for key in ("filename", "subfolder", "type")}) for file in files]
        found[node] = [
            picture for file, content in zip(files, data, strict=True) for picture in _read(file["filename"], content)
        ]
    return found


def _read(name: str, data: bytes) -> list[Image.Image]:
    if name.endswith(".psd"):
        from psd_tools import PSDImage

        layers = PSDImage.open(io.BytesIO(data)).descendants()
        return [layer.topil().convert("RGBA") for layer in layers if layer.has_pixels()]
    if name.endswith(".ora"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            parts = [name for name in sorted(archive.namelist()) if name.endswith(".png")]
            return [Image.open(io.BytesIO(archive.read(part))).convert("RGBA") for part in parts]
    return [Image.open(io.BytesIO(data)).convert("RGBA")]


def digest(picture: Image.Image) -> str:
    return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()[:16]


def small(found: dict[str, list[Image.Image]]) -> dict[str, np.ndarray]:
    """By node id, its pictures side by side, each SIDE × SIDE; what cannot be seen does not count, for colours are
    multiplied by alpha.
    """

    def one(picture: Image.Image) -> np.ndarray:
        values = np.asarray(picture, np.float32)
        values = np.concatenate([values[..., :3] * values[..., 3:] / 255, values[..., 3:]], -1).round().astype(np.uint8)
        return np.asarray(Image.fromarray(values).resize((SIDE, SIDE), Image.BOX))

    return {node: np.concatenate([one(picture) for picture in items], 1) for node, items in found.items() if items}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    host.PACK = parser.parse_args().checkout.resolve()  # what the server loads, and whose input pictures it gets
    HASHES.parent.mkdir(exist_ok=True)
    inputs = sorted((host.PACK / "workflows" / "input").glob("strata_*"))
    hashes = {"inputs": {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in inputs}}
    with tempfile.TemporaryDirectory() as base:
        server = host.Server(host.find_or_install(), Path(base))
        host.copy_inputs(server.host, server.base)
        with server:
            client = run.Client(server.url)
            for name in (*EXACT, *MINI):
                found = pictures(client, client.run(read_prompt(name)))
                if name in EXACT:
                    hashes[name] = {node: [digest(item) for item in items] for node, items in found.items() if items}
                else:
                    strip = np.concatenate(list(small(found).values()), 1)
                    Image.fromarray(strip).save(HASHES.parent / SMALL.format(name), optimize=True)
                print(name, flush=True)
    HASHES.write_text(json.dumps(hashes, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
