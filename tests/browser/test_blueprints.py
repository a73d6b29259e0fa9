"""The blueprints are in the node library, and each means to ComfyUI what the part of the workflow means that it was
made of.
"""

import blueprints
import node_files
import pytest


def flat(prompt: dict, root: int) -> dict:
    """The prompt with the nodes of a subgraph under their own ids."""

    def own(number: str) -> str:
        return number.removeprefix(f"{root}:")

    return {
        own(number): (
            node["class_type"],
            {
                key: [own(value[0]), value[1]] if isinstance(value, list) else value
                for key, value in node["inputs"].items()
            },
        )
        for number, node in prompt.items()
    }


@pytest.mark.parametrize("part", blueprints.PARTS, ids=lambda part: part.name)
def test_means_what_the_workflow_means(part, editor, comfy):
    carving = blueprints.Carving(part, comfy)
    whole, written = carving.whole(), (blueprints.FOLDER / f"{part.name}.json").read_text(encoding="utf-8")
    assert written == node_files.text(carving.blueprint()), "run tools/blueprints.py"
    editor.load(blueprints.read(part.workflow), part.workflow)
    plain = editor.prompt()
    editor.load(whole, f"{part.workflow}, carved")
    assert flat(editor.prompt(), whole["last_node_id"]) == flat(plain, -1)
    names = editor.page.evaluate("(id) => app.graph.getNodeById(id).widgets.map((w) => w.name)", whole["last_node_id"])
    labels = [label for *_, label in part.widgets]
    assert [name for name in names if name in labels] == labels  # what is linked from outside shows its value as well
    editor.picture(f"blueprint_{part.name}_{editor.mode}")
    assert editor.errors == []


def test_are_found_by_search_and_added_whole(editor, comfy):
    there = [entry["name"] for entry in comfy.get("/global_subgraphs").json().values()]
    assert {part.name for part in blueprints.PARTS} <= set(there)
    name = blueprints.PARTS[0].name
    editor.page.evaluate("() => app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    editor.page.get_by_role("combobox").last.fill(name)
    offered = editor.page.get_by_role("option").filter(has_text=name).first
    offered.wait_for()
    for _ in range(20):  # a click into a list that is still changing is lost
        if editor.page.evaluate("() => app.graph.nodes.length"):
            break
        if offered.is_visible():
            offered.click()
        editor.page.wait_for_timeout(500)
    inside = "() => app.graph.nodes.flatMap((n) => n.subgraph?.nodes.map((inner) => inner.type) ?? n.type)"
    assert editor.page.evaluate(inside) == ["Strata_SliceByDepth", "Strata_SaveLayers"]
    editor.picture(f"blueprint_added_{editor.mode}")
