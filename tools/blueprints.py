"""Write subgraphs/: parts of the bundled workflows as subgraphs, which ComfyUI's node library offers as blueprints.

    python tools/host.py exec tools/blueprints.py

What a part reads from outside becomes an input of the subgraph, what is read of it outside an output, and the widgets
that PARTS names are shown on it.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path

import host
import node_files
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
    return run.read_workflow(WORKFLOWS / f"{name}.json")


def ordered(node: dict, object_info: dict) -> dict:
    """The node with its inputs as the frontend orders them, sockets before widgets; optional ones may not be saved."""
    widgets = {slot["name"] for slot in node["inputs"] if "widget" in slot}
    sockets = [
        {"name": name, "type": kind, "link": None}
        for name, kind, *_ in node_files.inputs(object_info[node["type"]])
        if name not in widgets and isinstance(kind, str) and kind not in WIDGETS
    ]
    saved = {slot["name"]: slot for slot in node["inputs"]}
    sockets = [saved.pop(slot["name"], slot) for slot in sockets]
    return {**copy.deepcopy(node), "inputs": copy.deepcopy([*sockets, *saved.values()])}


def unique(name: str, taken: list[dict]) -> str:
    names = [slot["name"] for slot in taken]
    return next(each for each in (name, *(f"{name} {n}" for n in range(2, 99))) if each not in names)


class Carving:
    """A part of a workflow on its way into a subgraph: the node that stands for it outside, and what is inside."""

    def __init__(self, part: Part, client: run.Client):
        self.part, self.workflow = part, read(part.workflow)
        self.prompt = client.to_api(self.workflow)
        self.nodes = {node["id"]: node for node in self.workflow["nodes"]}
        self.inner = {number: ordered(self.nodes[number], client.object_info()) for number in part.inside}
        self.last = self.workflow["last_link_id"]
        self.root = self.workflow["last_node_id"] + 1
        self.inputs, self.outputs = [], []  # slots of the subgraph
        self.links, self.outer = [], []  # inside, outside
        self.places = {}  # (node, slot) where a link begins: the subgraph's input or output for it
        for link in self.workflow["links"]:
            self.take(*link)
        for number, widget, label in part.widgets:
            self.show(number, widget, label)

    def take(self, number: int, start: int, out: int, end: int, into: int, kind: str) -> None:
        """One link of the workflow, to the side where it belongs, or cut in two."""
        if start not in self.inner and end not in self.inner:
            self.outer.append([number, start, out, end, into, kind])
        elif start in self.inner and end in self.inner:
            self.link(number, start, out, end, self.slot_of(end, number), kind)
        elif end in self.inner:
            into = self.slot_of(end, number)
            if (start, out) not in self.places:
                self.places[start, out] = self.slot(self.inputs, self.inner[end]["inputs"][into]["name"], kind)
                self.outer.append([number, start, out, self.root, self.places[start, out], kind])
            place = self.places[start, out]
            self.inputs[place]["linkIds"].append(number)
            self.link(number, INPUTS, place, end, into, kind)
        else:
            slot = self.inner[start]["outputs"][out]
            if (start, out) not in self.places:
                self.places[start, out] = self.slot(self.outputs, slot["name"], kind)
                inside = self.link(None, start, out, OUTPUTS, self.places[start, out], kind)
                self.outputs[-1]["linkIds"].append(inside)
                slot["links"].append(inside)
            slot["links"].remove(number)
            self.outer.append([number, self.root, self.places[start, out], end, into, kind])

    def show(self, number: int, widget: str, label: str) -> None:
        """A widget of a node inside on the subgraph."""
        into, slot = next(
            (place, slot) for place, slot in enumerate(self.inner[number]["inputs"]) if slot["name"] == widget
        )
        place = self.slot(self.inputs, label, slot["type"])
        slot["link"] = self.link(None, INPUTS, place, number, into, slot["type"])
        self.inputs[place]["linkIds"].append(slot["link"])

    def slot_of(self, node: int, link: int) -> int:
        return next(place for place, slot in enumerate(self.inner[node]["inputs"]) if slot["link"] == link)

    @staticmethod
    def slot(slots: list[dict], name: str, kind: str) -> int:
        slots.append({"name": unique(name, slots), "type": kind, "linkIds": []})
        return len(slots) - 1

    def link(self, number: int | None, start: int, out: int, end: int, into: int, kind: str) -> int:
        """A link inside. Without a number it gets the next one."""
        if number is None:
            number = self.last = self.last + 1
        ends = {"origin_id": start, "origin_slot": out, "target_id": end, "target_slot": into}
        self.links.append({"id": number, **ends, "type": kind})
        return number

    def node(self) -> dict:
        """What stands for the part in a workflow, with nothing connected."""
        labels = [label for *_, label in self.part.widgets]
        return {
            "id": self.root,
            "type": self.identity("subgraph"),
            "title": self.part.name,
            "pos": list(next(iter(self.inner.values()))["pos"]),
            "size": [360, 320],
            "flags": {},
            "order": 0,
            "mode": 0,
            "inputs": [
                {"name": slot["name"], "type": slot["type"], "link": None}
                | ({"widget": {"name": slot["name"]}} if slot["name"] in labels else {})
                for slot in self.inputs
            ],
            "outputs": [{"name": slot["name"], "type": slot["type"], "links": None} for slot in self.outputs],
            "properties": {"proxyWidgets": [["-1", label] for label in labels]},
            "widgets_values": [self.prompt[str(number)]["inputs"][widget] for number, widget, _ in self.part.widgets],
        }

    def identity(self, what: str) -> str:
        return str(uuid.uuid5(NAMESPACE, f"{self.part.name} {what}"))

    def definition(self) -> dict:
        left = min(node["pos"][0] for node in self.inner.values()) - 200
        right = max(node["pos"][0] + node["size"][0] for node in self.inner.values()) + 40
        top = min(node["pos"][1] for node in self.inner.values())

        def placed(slots: list[dict], side: str, x: float) -> list[dict]:
            return [
                {"id": self.identity(f"{side} {slot['name']}"), **slot, "pos": [x, top + 20 * row]}
                for row, slot in enumerate(slots)
            ]

        return {
            "id": self.identity("subgraph"),
            "version": 1,
            "state": {"lastGroupId": 0, "lastNodeId": self.root, "lastLinkId": self.last, "lastRerouteId": 0},
            "revision": 0,
            "config": {},
            "name": self.part.name,
            "inputNode": {"id": INPUTS, "bounding": [left, top, 160, 40 + 20 * len(self.inputs)]},
            "outputNode": {"id": OUTPUTS, "bounding": [right, top, 160, 40 + 20 * len(self.outputs)]},
            "inputs": placed(self.inputs, "in", left + 140),
            "outputs": placed(self.outputs, "out", right + 20),
            "widgets": [],
            "nodes": list(self.inner.values()),
            "groups": [],
            "links": self.links,
            "extra": {},
            "description": self.part.about,
        }

    def blueprint(self) -> dict:
        """A workflow of the subgraph alone, as ComfyUI wants it."""
        return self.around([self.node()], []) | {"extra": {"BlueprintDescription": self.part.about}}

    def whole(self) -> dict:
        """The workflow with the subgraph in the place of its part."""
        nodes = [node for number, node in self.nodes.items() if number not in self.inner] + [self.node()]
        for node in nodes:
            for place, slot in enumerate(node.get("outputs", [])):
                slot["links"] = [link[0] for link in self.outer if link[1:3] == [node["id"], place]] or None
        for number, *_, end, into, _ in self.outer:
            if end == self.root:
                nodes[-1]["inputs"][into]["link"] = number
        return self.around(nodes, self.outer)

    def around(self, nodes: list[dict], links: list[list]) -> dict:
        numbers = {"last_node_id": self.root, "last_link_id": self.last}
        inside = {"definitions": {"subgraphs": [self.definition()]}}
        return copy.deepcopy({**self.workflow, **numbers, "nodes": nodes, "links": links, **inside})


def main() -> int:
    found = host.find_or_install()
    with tempfile.TemporaryDirectory() as base, host.Server(found, Path(base)) as server:
        client = run.Client(server.url)
        made = {part.name: node_files.text(Carving(part, client).blueprint()) for part in PARTS}
    FOLDER.mkdir(exist_ok=True)
    for path in FOLDER.glob("*.json"):
        path.unlink()
    for name, content in made.items():
        (FOLDER / f"{name}.json").write_text(content, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
