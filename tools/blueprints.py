"""Write subgraphs/: parts of the bundled workflows as subgraphs, which ComfyUI's node library offers as blueprints.

    python tools/host.py exec tools/blueprints.py

What a part reads from outside becomes an input of the subgraph, what is read of it outside an output, and the widgets
that PARTS names are shown on it.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path

import host
import run

WORKFLOWS, FOLDER = host.PACK / "workflows", host.PACK / "subgraphs"
WIDGETS = ("COMBO", "INT", "FLOAT", "STRING", "BOOLEAN", "COMFY_DYNAMICCOMBO_V3")
INPUTS, OUTPUTS = -10, -20  # ids of a subgraph's own two nodes, in ComfyUI's format
NAMESPACE = uuid.UUID("b6a2a3a4-0a5e-4b0e-9d6a-6b6f1f0f5c11")


@dataclass(frozen=True)
class Part:
    name: str  # the file's, and what the node library shows
    workflow: str
    inside: tuple[int, ...]  # ids of nodes
    widgets: tuple[tuple[int, str, str], ...]  # (node, its widget, the name on the subgraph)
    about: str


PROMPTS = "what to show", "what to avoid"
PARTS = (
    Part(
        "Photo to PSD",
        "photo_to_psd",
        (4, 6),
        ((4, "thresholds", "thresholds"), (4, "near_is", "near_is"), (6, "filename_prefix", "filename_prefix")),
        "Cuts an image by its depth, and saves the layers as PSD.",
    ),
    Part(
        "New background by depth",
        "depth_swap_background",
        (5, 8),
        ((5, "threshold", "threshold"), (5, "near_is", "near_is"), (8, "filename_prefix", "filename_prefix")),
        "Puts what is near in one image over another, and saves both layers as PSD.",
    ),
    Part(
        "Layers to harmonised image",
        "edit_and_harmonize_sdxl",
        (4, 5, 6, 8),
        (
            (6, "select", "layer to move"),
            (6, "move_x", "move_x"),
            (6, "move_y", "move_y"),
            (5, "text", PROMPTS[1]),
            (8, "seed", "seed"),
        ),
        "Moves a layer, and draws shadow and light that fit.",
    ),
    Part(
        "Prompt to transparent object (SDXL)",
        "layerdiffuse_foreground_sdxl",
        (4, 5, 6, 7, 8, 9, 10, 11),
        (
            (7, "text", PROMPTS[0]),
            (8, "text", PROMPTS[1]),
            (6, "width", "width"),
            (6, "height", "height"),
            (10, "seed", "seed"),
        ),
        "An object with alpha from words (LayerDiffuse).",
    ),
    Part(
        "Prompt to foreground, background and both (SDXL)",
        "layerfusion_sdxl",
        (4, 5, 6, 7, 8, 9, 10, 11, 12, 13),
        (
            (7, "foreground", "foreground"),
            (7, "background", "background"),
            (8, "text", PROMPTS[1]),
            (6, "width", "width"),
            (6, "height", "height"),
            (10, "seed", "seed"),
        ),
        "Foreground with alpha, its background, and both blended, in one run (LayerFusion).",
    ),
    Part(
        "Prompt to layers (SDXL)",
        "layers_from_text_sdxl",
        (3, 4, 5, 6, 7, 8, 9, 10),
        (
            (6, "background", "background"),
            (6, "objects", "objects"),
            (7, "text", PROMPTS[1]),
            (5, "width", "width"),
            (5, "height", "height"),
            (10, "seed", "seed"),
        ),
        "A background and several objects, each in a layer of its own (DreamLayer).",
    ),
    Part(
        "Image to layers by words (SDXL)",
        "image_to_layers_sdxl",
        (3, 4, 6, 7, 8, 9, 10),
        ((6, "background", "background"), (6, "objects", "objects"), (7, "text", PROMPTS[1])),
        "Takes an image apart into what the words name (DreamLayer).",
    ),
    Part(
        "Object out of an image (mini family)",
        "decompose_photo_mini",
        (11, 12, 13, 14, 15),
        ((15, "steps", "steps"), (15, "seed", "seed")),
        "A masked object as a layer, and the background behind it (LayeringDiff).",
    ),
    Part(
        "Object behind nearer things (SD1.5)",
        "object_insertion_inpaint",
        (7, 8, 9, 10, 11, 12, 13, 14, 15, 16),
        (
            (7, "text", "what the image shows"),
            (8, "text", "what it shall show"),
            (11, "threshold", "threshold"),
            (11, "x", "x"),
            (11, "y", "y"),
            (11, "width", "width"),
            (11, "height", "height"),
            (12, "noise_seed", "seed"),
        ),
        "Inpaints an object into a box behind what is nearer.",
    ),
)


def read(name: str) -> dict:
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def ordered(node: dict, object_info: dict) -> dict:
    """The node with its inputs as the frontend orders them, sockets before widgets; optional ones may not be saved."""
    widgets = {slot["name"] for slot in node["inputs"] if "widget" in slot}
    inputs = object_info[node["type"]]["input"]
    sockets = [
        {"name": name, "type": spec[0], "link": None}
        for group in ("required", "optional")
        for name, spec in inputs.get(group, {}).items()
        if name not in widgets and spec[0] not in WIDGETS and isinstance(spec[0], str)
    ]
    saved = {slot["name"]: slot for slot in node["inputs"]}
    sockets = [saved.pop(slot["name"], slot) for slot in sockets]
    return {**copy.deepcopy(node), "inputs": copy.deepcopy([*sockets, *saved.values()])}


def values(node: dict) -> dict:
    """Widget values by name. ComfyUI keeps a list; seeds and uploads have one more entry, behind their own."""
    found, left = {}, list(node.get("widgets_values") or [])
    for slot in node["inputs"]:
        if "widget" in slot and left:
            found[slot["name"]] = left.pop(0)
            if left and left[0] in ("fixed", "randomize", "increment", "decrement"):
                left.pop(0)
    return found


def unique(name: str, taken: list[dict]) -> str:
    names = [slot["name"] for slot in taken]
    return next(each for each in (name, *(f"{name} {n}" for n in range(2, 99))) if each not in names)


def carve(part: Part, object_info: dict) -> tuple[dict, dict]:
    """(the blueprint, the workflow with the part as one subgraph node in its place)"""
    workflow = read(part.workflow)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    inner = [ordered(nodes[number], object_info) for number in part.inside]
    by_id = {node["id"]: node for node in inner}
    identity = str(uuid.uuid5(NAMESPACE, part.name))
    links, inputs, outputs, kept = [], [], [], []
    root = {
        "id": workflow["last_node_id"] + 1,
        "type": identity,
        "title": part.name,
        "pos": list(inner[0]["pos"]),
        "size": [360, 320],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "properties": {"proxyWidgets": [["-1", label] for *_, label in part.widgets]},
        "widgets_values": [],
    }
    last = workflow["last_link_id"]
    slots, sources = {}, {}  # of the outputs, of the inputs
    for number, start, out, end, into, kind in workflow["links"]:
        if end in by_id:
            into = next(place for place, slot in enumerate(by_id[end]["inputs"]) if slot["link"] == number)
        link = {"id": number, "origin_id": start, "origin_slot": out, "target_id": end, "target_slot": into, "type": kind}
        if start in by_id and end in by_id:
            links.append(link)
        elif end in by_id:
            if (start, out) not in sources:
                name = unique(by_id[end]["inputs"][into]["name"], inputs)
                sources[start, out] = len(inputs)
                inputs.append({"name": name, "type": kind, "linkIds": []})
                root["inputs"].append({"name": name, "type": kind, "link": number})
                kept.append([number, start, out, root["id"], sources[start, out], kind])
            place = sources[start, out]
            inputs[place]["linkIds"].append(number)
            links.append({**link, "origin_id": INPUTS, "origin_slot": place})
        elif start in by_id:
            if (start, out) not in slots:
                last += 1
                name = unique(nodes[start]["outputs"][out]["name"], outputs)
                slots[start, out] = len(outputs)
                outputs.append({"name": name, "type": kind, "linkIds": [last]})
                root["outputs"].append({"name": name, "type": kind, "links": []})
                by_id[start]["outputs"][out]["links"].append(last)
                to = {"target_id": OUTPUTS, "target_slot": slots[start, out]}
                links.append({**link, "id": last, **to})
            place = slots[start, out]
            by_id[start]["outputs"][out]["links"].remove(number)
            root["outputs"][place]["links"].append(number)
            kept.append([number, root["id"], place, end, into, kind])
        else:
            kept.append([number, start, out, end, into, kind])
    for number, widget, label in part.widgets:
        last += 1
        into, slot = next((i, s) for i, s in enumerate(by_id[number]["inputs"]) if s["name"] == widget)
        slot["link"] = last
        inputs.append({"name": label, "type": slot["type"], "linkIds": [last]})
        root["inputs"].append({"name": label, "type": slot["type"], "widget": {"name": label}, "link": None})
        root["widgets_values"].append(values(nodes[number])[widget])
        ends = {"origin_id": INPUTS, "origin_slot": len(inputs) - 1, "target_id": number, "target_slot": into}
        links.append({"id": last, **ends, "type": slot["type"]})
    left = min(node["pos"][0] for node in inner)
    right = max(node["pos"][0] + node["size"][0] for node in inner)
    top = min(node["pos"][1] for node in inner)
    for side, slots_of in (("in", inputs), ("out", outputs)):
        for row, slot in enumerate(slots_of):
            slot["id"] = str(uuid.uuid5(NAMESPACE, f"{part.name} {side} {slot['name']}"))
            slot["pos"] = [left - 120 if side == "in" else right + 120, top + 20 * row]
    definition = {
        "id": identity,
        "version": 1,
        "state": {"lastGroupId": 0, "lastNodeId": root["id"], "lastLinkId": last, "lastRerouteId": 0},
        "revision": 0,
        "config": {},
        "name": part.name,
        "inputNode": {"id": INPUTS, "bounding": [left - 260, top, 160, 40 + 20 * len(inputs)]},
        "outputNode": {"id": OUTPUTS, "bounding": [right + 100, top, 160, 40 + 20 * len(outputs)]},
        "inputs": inputs,
        "outputs": outputs,
        "widgets": [],
        "nodes": inner,
        "groups": [],
        "links": links,
        "extra": {},
        "description": part.about,
    }
    whole = {
        **workflow,
        "last_node_id": root["id"],
        "last_link_id": last,
        "nodes": [node for node in workflow["nodes"] if node["id"] not in by_id] + [root],
        "links": kept,
        "definitions": {"subgraphs": [definition]},
    }
    for node in whole["nodes"]:
        for place, slot in enumerate(node.get("outputs", [])):
            slot["links"] = [link[0] for link in kept if link[1:3] == [node["id"], place]] or None
    alone = copy.deepcopy(root)
    for slot in alone["inputs"]:
        slot["link"] = None
    for slot in alone["outputs"]:
        slot["links"] = None
    blueprint = {**whole, "nodes": [alone], "links": [], "groups": [], "extra": {"BlueprintDescription": part.about}}
    return copy.deepcopy(blueprint), whole


def text(blueprint: dict) -> str:
    return json.dumps(blueprint, indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    found = host.find_or_install()
    with tempfile.TemporaryDirectory() as base, host.Server(found, Path(base)) as server:
        object_info = run.Client(server.url).object_info()
    FOLDER.mkdir(exist_ok=True)
    for path in FOLDER.glob("*.json"):
        path.unlink()
    for part in PARTS:
        (FOLDER / f"{part.name}.json").write_text(text(carve(part, object_info)[0]), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
