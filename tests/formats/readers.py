"""`make test-readers`: PSD and OpenRaster files of random stacks, opened by the programs that people use.

GIMP 2.10 and Krita are used where they are on PATH, and psd-tools, which is always there; a program that is missing is
said and skipped. Names, order, groups, places, opacity, modes, visibility and masks have to be as written, pixels
within one 255th. STACKS is how many stacks there are (200). docs/readers.md has the recorded result.
"""

import base64
import json
import os
import re
import shutil
import subprocess
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from psd_tools import PSDImage
from strata.formats import files, openraster, psd
from strata.formats.groups import box_of
from strata.formats.raster import picture
from strata.techniques.layers import BLEND_MODES, parent_of

from .stacks import eight_bit, random_stack

COUNT = int(os.environ.get("STACKS", "200"))
PROGRAMS = Path(__file__).parent / "programs"
KINDS = {"PSD": {}, "PSD of 16 bits": {"bits": 16}, "OpenRaster": {}}
PSD_MODES = tuple(mode for mode in BLEND_MODES if mode not in psd.MISSING_MODES)
# GIMP's numbers of its layer modes. Hue, saturation, color and luminosity are its LCH ones, whose formulas are others.
GIMP_MODES = {28: "normal", 30: "multiply", 31: "screen", 23: "overlay", 35: "darken", 36: "lighten"}
GIMP_MODES |= {42: "color-dodge", 43: "color-burn", 44: "hard-light", 45: "soft-light", 32: "difference"}
GIMP_MODES |= {52: "exclusion", 33: "linear-dodge", 53: "linear-burn", 48: "vivid-light", 49: "pin-light"}
GIMP_MODES |= {50: "linear-light", 51: "hard-mix", 34: "subtract", 41: "divide", 24: "hue", 25: "saturation"}
GIMP_MODES |= {26: "color", 27: "luminosity", 61: "pass-through"}
# Krita's names that are not ours with a low line in place of the hyphen.
KRITA_MODES = {"dodge": "color-dodge", "burn": "color-burn", "soft_light_svg": "soft-light", "diff": "difference"}
KRITA_MODES |= {"add": "linear-dodge", "linear light": "linear-light", "hard_mix_photoshop": "hard-mix"}
KRITA_MODES |= {"luminize": "luminosity"}
ROOM = 80  # pixels on each side of the canvas: no layer of a random stack reaches further


@dataclass
class Seen:
    """A layer as a program has it. image: [H,W,4] in 0..255 with the mask applied; x, y: its corner."""

    groups: tuple[str, ...]
    name: str
    opacity: float
    mode: str
    visible: bool
    masked: bool
    image: np.ndarray
    x: int
    y: int


def differences(stack, format: str, found: list[Seen]) -> tuple[set[str], float]:
    """What a program has otherwise than it was written, and the largest difference of a pixel in 255ths."""
    if [layer.name for layer in stack.layers] != [layer.name for layer in found]:
        same = sorted(layer.name for layer in stack.layers) == sorted(layer.name for layer in found)
        return {"order" if same else "names"}, 0
    wrong, largest = set(), 0.0
    for ours, theirs in zip(stack.layers, found, strict=True):
        written = _on_canvas(eight_bit(ours.rgba()), ours, stack.canvas)
        shown = _on_canvas(theirs.image, theirs, stack.canvas)
        drawn = (written[..., 3:] > 0) & (shown[..., 3:] > 0)  # elsewhere there is no colour
        off = max((np.abs(written - shown)[..., :3] * drawn).max(), np.abs(written - shown)[..., 3].max())
        largest = max(largest, off)
        fields = {
            "groups": parent_of(ours) == theirs.groups,
            "opacity": abs(ours.opacity - theirs.opacity) <= 1 / 255,
            "modes": ours.blend_mode == theirs.mode,
            "visibility": ours.visible == theirs.visible,
            "masks": (ours.mask is not None and format != "OpenRaster") == theirs.masked,
            "pixels or places": off <= 1.01,
        }
        wrong |= {name for name, right in fields.items() if not right}
    return wrong, largest


def _on_canvas(pixels: np.ndarray, layer, canvas: tuple[int, int]) -> np.ndarray:
    """[H+2R,W+2R,4]: the canvas with room around it, zero where there is nothing."""
    whole = np.zeros((canvas[1] + 2 * ROOM, canvas[0] + 2 * ROOM, 4))
    x, y = layer.x + ROOM, layer.y + ROOM
    whole[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels
    return whole


def _alone(stack) -> np.ndarray:
    """[H,W]: where nothing lies over the lowest layer."""
    free = np.ones(stack.canvas[::-1], bool)
    for layer in stack.layers[1:]:
        left, top, right, bottom = (max(side, 0) for side in box_of(layer))
        free[top:bottom, left:right] = False
    return free


def _rgba(pixels: np.ndarray) -> np.ndarray:
    return np.concatenate([pixels, np.full_like(pixels[..., :1], 255)], -1) if pixels.shape[-1] == 3 else pixels


class PsdTools:
    """And Pillow for the PNGs of OpenRaster, found with a plain reader of zip and XML."""

    name = "psd-tools"

    def look(self, paths: list[Path], folder: Path) -> list[list[Seen]]:
        return [list(self.of_xml(path) if path.suffix == ".ora" else self.of_psd(path)) for path in paths]

    def version(self) -> str:
        from importlib.metadata import version

        return version("psd-tools")

    def of_psd(self, path: Path):
        for item in PSDImage.open(path).descendants():
            if item.is_group():
                assert item.blend_mode.name == "PASS_THROUGH" and item.opacity == 255
                continue
            groups, parent = [], item.parent
            while parent.parent is not None:
                groups, parent = [parent.name, *groups], parent.parent
            mode, image = item.blend_mode.name.lower().replace("_", "-"), _rgba(item.numpy() * 255)
            if item.has_mask():
                assert item.mask.bbox == item.bbox
                image[..., 3] *= item.numpy("mask")[..., 0]
            fields = item.opacity / 255, mode, item.visible, item.has_mask()
            yield Seen(tuple(groups), item.name, *fields, image, item.left, item.top)

    def of_xml(self, path: Path):
        with zipfile.ZipFile(path) as archive:
            root = ElementTree.fromstring(archive.read("stack.xml"))
            yield from reversed(list(self.of_stack(archive, root.find("stack"), ())))

    def of_stack(self, archive, stack, groups):
        for item in stack:
            if item.tag == "stack":
                yield from self.of_stack(archive, item, (*groups, item.get("name")))
                continue
            with Image.open(archive.open(item.get("src"))) as image:
                pixels = _rgba(np.asarray(image.convert("RGBA" if "A" in image.mode else "RGB"), np.float32))
            mode, shown = openraster.DOCUMENT_MODES[item.get("composite-op")], item.get("visibility") == "visible"
            fields = float(item.get("opacity")), mode, shown, False
            yield Seen(groups, item.get("name"), *fields, pixels, int(item.get("x")), int(item.get("y")))


class Gimp:
    name = "GIMP"

    def program(self) -> str:
        found = next(filter(None, map(shutil.which, ("gimp-console", "gimp"))), None)
        return found or pytest.skip("GIMP is not on PATH")

    def version(self) -> str:
        words = subprocess.run([self.program(), "--version"], text=True, capture_output=True).stdout
        return re.search(r"\d+\.\d+\.\d+", words)[0]

    def look(self, paths, folder):
        if not self.version().startswith("2."):
            pytest.skip(f"GIMP {self.version()} has another Script-Fu than 2.10, whose words gimp.scm has")
        self.run(paths, folder)
        if not self.beside(paths[0]).exists():
            pytest.skip(f"GIMP {self.version()} cannot open {paths[0].suffix} here: its plug-in is not installed")
        return [self.seen(path) for path in paths]

    def run(self, paths, folder) -> None:
        script = folder / "look.scm"
        calls = "".join(f'(look "{path}")\n' for path in paths)
        script.write_text((PROGRAMS / "gimp.scm").read_text(encoding="utf-8") + calls, encoding="utf-8")
        command = [self.program(), "-i", "-d", "-f", "-s", "-b", f'(load "{script}")', "-b", "(gimp-quit 0)"]
        own = {**os.environ, "GIMP2_DIRECTORY": str(folder / "gimp")}
        subprocess.run(command, env=own, capture_output=True, timeout=1800, check=False)

    def beside(self, path: Path) -> Path:
        return path.with_name(path.name + ".txt")

    def seen(self, path: Path) -> list[Seen]:
        found, opened = [], []
        for line in self.beside(path).read_text(encoding="utf-8").splitlines():
            depth, group, x, y, opacity, mode, visible, item, mask, name = line.split("\t")[:10]
            opened = opened[: int(depth)]
            if group == "1":
                assert GIMP_MODES[int(mode)] == "pass-through" and float(opacity) == 100
                opened.append(re.sub(r" #\d+$", "", name))  # GIMP numbers groups of one name
                continue
            fields = float(opacity) / 100, GIMP_MODES.get(int(mode), mode), visible == "1", int(mask) > 0
            found.append(Seen(tuple(opened), name, *fields, self.png(path, item), int(x), int(y)))
        return found[::-1]

    def png(self, path: Path, item: str) -> np.ndarray:
        with Image.open(path.with_name(f"{path.name}.{item}.png")) as image:
            return _rgba(np.asarray(image, np.float32))


class Krita:
    name = "Krita"

    def version(self) -> str:
        return self.found["version"]

    def look(self, paths, folder):
        runner = shutil.which("kritarunner") if shutil.which("krita") else None
        runner or pytest.skip("Krita and its kritarunner are not on PATH")
        home = {name: str(folder / "krita") for name in ("HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME")}
        listed = folder / "files.txt"
        listed.write_text("\n".join(map(str, paths)), encoding="utf-8")
        own = {"STRATA_FILES": str(listed), "PYTHONPATH": str(PROGRAMS), "QT_QPA_PLATFORM": "offscreen"}
        own["PATH"] = f"{Path(runner).parent}{os.pathsep}{os.environ['PATH']}"  # where Krita looks for its Python
        command = [runner, "-s", "krita_looks", "-f", "main"]
        done = subprocess.run(command, env={**os.environ, **home, **own}, capture_output=True, text=True, timeout=1800)
        if not self.beside(paths[0]).exists() and "PyQt5" in done.stdout + done.stderr:
            pytest.skip("Krita's Python needs PyQt5, which is not installed for it")
        self.found = json.loads(self.beside(paths[0]).read_text(encoding="utf-8"))
        return [list(self.seen(self.layers(path), ())) for path in paths]

    def beside(self, path: Path) -> Path:
        return path.with_name(path.name + ".json")

    def layers(self, path: Path) -> list[dict]:
        return json.loads(self.beside(path).read_text(encoding="utf-8")).get("layers", [])

    def shown(self, path: Path, canvas: tuple[int, int]) -> np.ndarray:
        """[H,W,4] of the whole image, as on a screen of sRGB."""
        found = json.loads(self.beside(path).read_text(encoding="utf-8"))["shown"]
        return np.frombuffer(base64.b64decode(found), np.uint8).reshape(canvas[1], canvas[0], 4).astype(int)

    def seen(self, layers: list[dict], groups):
        for layer in layers:
            name = layer["name"].rstrip("\0")
            if "layers" in layer:
                assert layer["passes"] and layer["opacity"] == 1
                yield from self.seen(layer["layers"], (*groups, name))
                continue
            x, y, *_ = layer["pixels"]["box"]
            image = self.pixels(layer["pixels"], layer["depth"], 4)[..., [2, 1, 0, 3]]
            for mask in layer["masks"]:
                assert mask["box"] == layer["pixels"]["box"]
                image[..., 3:] *= self.pixels(mask, "U8", 1) / 255
            mode = KRITA_MODES.get(layer["mode"], layer["mode"].replace("_", "-"))
            yield Seen(groups, name, layer["opacity"], mode, layer["visible"], bool(layer["masks"]), image, x, y)

    def pixels(self, found: dict, depth: str, channels: int) -> np.ndarray:
        _, _, width, height = found["box"]
        kind, top = (np.uint8, 255) if depth == "U8" else (np.dtype("<u2"), 65535)
        values = np.frombuffer(base64.b64decode(found["data"]), kind).reshape(height, width, channels)
        return values * (255 / top)


@pytest.fixture(scope="module", params=KINDS)
def written(request, tmp_path_factory):
    """(kind, stacks, their files)"""
    kind, format = request.param, request.param.split(" of ")[0]
    folder = tmp_path_factory.mktemp("stacks")
    modes = tuple(openraster.MODES) if format == "OpenRaster" else PSD_MODES
    stacks = [random_stack(seed, modes) for seed in range(COUNT)]
    paths = []
    for seed, stack in enumerate(stacks):
        paths += files.save(folder, f"stack{seed:03}", stack, picture(stack), format, {"seed": seed}, **KINDS[kind])
    return kind, stacks, paths


@pytest.mark.parametrize("reader", [PsdTools(), Gimp(), Krita()], ids=lambda reader: reader.name)
def test_a_program_sees_every_layer_as_it_was_written(written, reader, tmp_path, capsys):
    kind, stacks, paths = written
    found = reader.look(paths, tmp_path)
    looked = [differences(stack, kind, layers) for stack, layers in zip(stacks, found, strict=True)]
    wrong = Counter(name for names, _ in looked for name in names)
    with capsys.disabled():
        count = sum(len(stack.layers) for stack in stacks)
        told = ", ".join(f"{name} in {number}" for name, number in wrong.items()) or "nothing"
        print(
            f"\n{reader.name} {reader.version()}, {kind}: {len(paths)} files, {count} layers; otherwise than written: "
            f"{told}; largest difference of a pixel {max(off for _, off in looked):.2f} of 255"
        )
    if isinstance(reader, Krita):
        for stack, path in zip(stacks, paths, strict=True):
            shown, back = reader.shown(path, stack.canvas), eight_bit(stack.layers[0].image)
            off = np.abs(shown[..., :3] - back).max(-1)[_alone(stack)]
            assert off.size == 0 or off.max() <= 1, f"{path.name}: its colours are shown otherwise"
    assert not wrong, [path.name for path, (names, _) in zip(paths, looked, strict=True) if names][:5]
