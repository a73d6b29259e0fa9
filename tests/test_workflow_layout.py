"""How the bundled workflows lie on the canvas: apart, with every link in sight, and small enough to read."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

WORKFLOWS = sorted((Path(__file__).resolve().parents[1] / "workflows").glob("*.json"))
TITLE = 30  # height of a node's title, which is above its position
SLOT, ROW = 14, 20  # the first slot below a node's top, and from one slot to the next
GAP = 40
VIEW = np.array([1600, 1000])
RESULTS_ZOOM = 0.7  # at which the results fit the view, most of them at 1
WHOLE_ZOOM = 0.39  # and all nodes, up to 26
LARGE_ZOOM = 0.29  # and more nodes
RESULTS = ("SaveImage", "PreviewImage", "MaskPreview", "Strata_PreviewLayers", "Strata_SaveLayers")


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.stem)
def workflow(request) -> dict:
    return json.loads(request.param.read_text(encoding="utf-8"))


def box(node: dict) -> np.ndarray:
    """[left, top, right, bottom] with the title."""
    (x, y), (width, height) = node["pos"], node["size"]
    return np.array([x, y - TITLE, x + width, y + height])


def extent(nodes: list[dict]) -> np.ndarray:
    """Width and height of what encloses the nodes."""
    boxes = np.array([box(node) for node in nodes])
    return boxes[:, 2:].max(0) - boxes[:, :2].min(0)


def spline(link: list, nodes: dict[int, dict]) -> np.ndarray:
    """Points [40,2] of a link as the frontend draws it, without its ends."""
    _, start, out, end, into, _ = link
    sockets = [slot for slot in nodes[end]["inputs"] if "widget" not in slot]
    slot = nodes[end]["inputs"][into]
    row = sockets.index(slot) if slot in sockets else len(sockets)  # the first widget is below the sockets
    left, top, right, _ = box(nodes[start])
    first = np.array([right, top + TITLE + SLOT + ROW * out])
    left, top, *_ = box(nodes[end])
    last = np.array([left, top + TITLE + SLOT + ROW * row])
    handle = np.array([np.hypot(*(last - first)) / 4, 0])
    t = np.linspace(0, 1, 42)[1:-1, None]
    weights = (1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3
    return sum(w * point for w, point in zip(weights, (first, first + handle, last - handle, last), strict=True))


def test_nodes_are_apart(workflow):
    for one, other in itertools.combinations(workflow["nodes"], 2):
        left, right = box(one), box(other)
        apart = np.maximum(left[:2] - right[2:], right[:2] - left[2:]).max()
        assert apart >= GAP, f"{apart} pixels between nodes {one['id']} and {other['id']}"


def test_no_link_runs_behind_a_node(workflow):
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for link in workflow["links"]:
        points = spline(link, nodes)
        for node in nodes.values():
            left, top, right, bottom = box(node)
            inside = (points > [left + 1, top]).all(1) & (points < [right - 1, bottom]).all(1)
            assert not inside.any(), f"link {link[0]}, from node {link[1]} to {link[3]}, behind node {node['id']}"


def test_links_run_from_left_to_right(workflow):
    nodes = {node["id"]: box(node) for node in workflow["nodes"]}
    for link in workflow["links"]:
        assert nodes[link[1]][2] + GAP <= nodes[link[3]][0], f"link {link[0]}, from node {link[1]} to {link[3]}"


def test_results_are_in_one_view(workflow):
    results = [node for node in workflow["nodes"] if node["type"] in RESULTS]
    assert results and (extent(results) <= VIEW / RESULTS_ZOOM).all(), extent(results)


def test_a_whole_workflow_can_be_read(workflow):
    nodes = workflow["nodes"]
    assert (extent(nodes) <= VIEW / (WHOLE_ZOOM if len(nodes) <= 26 else LARGE_ZOOM)).all(), extent(nodes)


def test_groups_are_not_used(workflow):
    """Nodes 2.0 leaves them where they were when nodes move."""
    assert not workflow.get("groups")
