"""Write the files that follow from the nodes' schemas: the English locale, from which tools/languages.py says what has
to be translated, the record of ids that old graphs depend on, and the main workflows in API format, for scripts.

python tools/host.py exec tools/node_files.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import host
import run

LOCALE = host.PACK / "locales" / "en" / "nodeDefs.json"
MENU = host.PACK / "locales" / "en" / "main.json"
GOLDEN = host.PACK / "tests" / "server" / "object_info.json"
WORKFLOWS = host.PACK / "workflows"
SCRIPTED = (
    "photo_to_psd",
    "photo_rearranged",
    "layers_roundtrip",
    "edit_and_harmonize_sdxl",
    "layerdiffuse_foreground_sdxl",
    "layerfusion_sdxl",
    "layers_from_text_sdxl",
    "decompose_sd15",
    "object_insertion_inpaint",
    "foreground_flux_fill",
    "score_gate_api",
    "layered_files_from_photos",
)
# Inputs whose choices are what lies in a folder, or what this ComfyUI has.
FROM_DISK = {
    "file",
    "background_file",
    "alignment_file",
    "model",
    "detector",
    "segmenter",
    "matting_model",
    "transparent_things",
    "sampler_name",
    "scheduler",
}


def ours(object_info: dict) -> dict:
    return {name: info for name, info in sorted(object_info.items()) if name.startswith("Strata_")}


def inputs(info: dict):
    """(name, type, options, required) of every input in the order of the node's widgets."""
    for kind in ("required", "optional"):
        for name, spec in info["input"].get(kind, {}).items():
            yield name, spec[0], spec[1] if len(spec) > 1 else {}, kind == "required"


def locale(object_info: dict) -> dict:
    """ComfyUI's nodeDefs.json: what a translator starts from."""
    return {
        name: {
            "display_name": info["display_name"],
            "description": info["description"],
            "inputs": {
                key: {"name": options.get("display_name", key), "tooltip": options.get("tooltip", "")}
                for key, _, options, _ in inputs(info)
            },
            "outputs": {
                str(index): {"name": label, "tooltip": tooltip or ""}
                for index, (label, tooltip) in enumerate(zip(info["output_name"], info["output_tooltips"], strict=True))
            },
        }
        for name, info in ours(object_info).items()
    }


def menu(object_info: dict) -> dict:
    """ComfyUI's main.json: the parts of the menu that our nodes lie in. Strata is a name."""
    parts = {part for info in ours(object_info).values() for part in info["category"].split("/")} - {"Strata"}
    return {"nodeCategories": {part: part for part in sorted(parts)}}


def golden(object_info: dict) -> dict:
    """What a saved graph relies on: ids, the order of inputs and outputs, their types, defaults and choices."""

    def describe(key, kind, options, required):
        entry = {
            "id": key,
            "type": kind,
            "required": required,
            "default": None if key in FROM_DISK else options.get("default"),
        }
        if kind == "COMBO" and key not in FROM_DISK:
            entry["choices"] = options["options"]
        return entry

    return {
        name: {
            "category": info["category"],
            "inputs": [describe(*item) for item in inputs(info)],
            "outputs": [
                {"name": label, "type": kind, "list": many}
                for label, kind, many in zip(info["output_name"], info["output"], info["output_is_list"], strict=True)
            ],
            "output_node": info["output_node"],
        }
        for name, info in ours(object_info).items()
    }


def scripted(client: run.Client) -> dict[Path, dict]:
    """The workflows that scripts take as they are, in API format."""
    return {
        WORKFLOWS / "api" / f"{name}.json": client.to_api(run.read_workflow(WORKFLOWS / f"{name}.json"))
        for name in SCRIPTED
    }


def text(content: dict) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as base, host.Server(host.find_or_install(), Path(base)) as server:
        client = run.Client(server.url)
        object_info, graphs = client.object_info(), scripted(client)
    written = {LOCALE: locale(object_info), MENU: menu(object_info), GOLDEN: golden(object_info)}
    for path, content in (written | graphs).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text(content), encoding="utf-8")
        print(path)
