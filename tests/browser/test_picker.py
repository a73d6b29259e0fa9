"""The depth picker on Slice by depth, driven with mouse and keyboard in the real frontend."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
import requests
import torch
from PIL import Image
from strata.techniques import depth as technique

SCRIPT = "depth_view.js"  # whose functions `calculate` calls

SLICE = "Strata_SliceByDepth"
SIZE = (240, 160)
# A wall with a ramp of floor before it, a box in the middle distance and a pole in front; white is near
WALL, BOX, POLE = 20, 130, 250


def scene() -> tuple[Image.Image, Image.Image]:
    """(picture, depth) of 240×160."""
    width, height = SIZE
    near = np.full((height, width), WALL, np.uint8)
    near[100:] = np.linspace(WALL, POLE, height - 100)[:, None]
    colour = np.full((height, width, 3), (90, 110, 140), np.uint8)
    colour[100:] = (120, 100, 80)
    for box, value, rgb in (((90, 50, 150, 120), BOX, (210, 60, 50)), ((30, 10, 50, 160), POLE, (230, 210, 90))):
        left, top, right, bottom = box
        near[top:bottom, left:right] = value
        colour[top:bottom, left:right] = rgb
    return Image.fromarray(colour), Image.fromarray(near)


@pytest.fixture(scope="module")
def prompt(site) -> dict:
    """A graph that slices the scene, in API format."""
    for name, image in zip(("picker_scene.png", "picker_depth.png"), scene(), strict=True):
        data = io.BytesIO()
        image.save(data, "PNG")
        requests.post(
            site + "/upload/image", files={"image": (name, data.getvalue())}, data={"overwrite": "true"}, timeout=30
        ).raise_for_status()
    # Frontend 1.48.7 gives a node what the last one of its number had, where the prompt does not say: so it says.
    own = {"image": ["1", 0], "depth": ["2", 0], "thresholds": "0.3", "points": "", "near_is": "white"}
    return {
        "1": {"class_type": "LoadImage", "inputs": {"image": "picker_scene.png"}},
        "2": {"class_type": "LoadImage", "inputs": {"image": "picker_depth.png"}},
        "3": {"class_type": SLICE, "inputs": own},
        "4": {"class_type": "Strata_PreviewLayers", "inputs": {"layers": ["3", 0]}},
    }


# How often the page has gone back; the count starts with the first question
UNDONE = """() => {
    const tracker = app.extensionManager.workflow.activeWorkflow.changeTracker;
    if (!Object.hasOwn(tracker, 'undo')) {
        const { undo } = tracker;
        window.undone = 0;
        tracker.undo = async function () { await undo.call(this); window.undone++; };
    }
    return window.undone;
}"""
# Until what is shown is another step: no key and no mouse, on which the frontend would look for changes and drop redo
STEP = """async ([type, way]) => {
    const tracker = app.extensionManager.workflow.activeWorkflow.changeTracker;
    const value = () => tracker.activeState.nodes.find((node) => node.type === type).widgets_values[0];
    for (const before = value(); value() === before && tracker[`${way}Queue`].length;) await tracker[way]();
}"""


class Picker:
    def __init__(self, editor):
        self.editor, self.page = editor, editor.page
        self.root = self.page.locator(".strata-depth-picker")
        self.front, self.top, self.lines = (self.root.locator(part) for part in (".front", ".top", ".line:not(.fixed)"))

    def message(self) -> str:
        return self.root.locator(".message").inner_text()

    def value(self) -> str:
        return self.editor.widget(SLICE, "thresholds")

    def wait_value(self, *expected: float, within: float = 0.011) -> None:
        """Until the widget holds these numbers, as three decimals."""
        self.page.wait_for_function(
            """([type, expected, within]) => {
            const text = app.graph.nodes.find((n) => n.type === type)
                .widgets.find((w) => w.name === 'thresholds').value;
            const found = text.split(', ');
            return found.length === expected.length && found.every((part, i) =>
                /^[01]\\.\\d{3}$/.test(part) && Math.abs(part - expected[i]) <= within);
        }""",
            arg=[SLICE, list(expected), within],
            timeout=5000,
        )

    def wait_shown(self, value: float, within: float = 0.011) -> None:
        """Until the one line is there: after undo the node was made anew, and its own picker must be on the page."""
        self.page.wait_for_function(
            """([value, within]) => {
            const own = document.querySelector('.strata-depth-picker:not([data-gone])');
            return own?.isConnected && Math.abs(own.shadowRoot.querySelector('.line')?.ariaValueNow - value) <= within;
        }""",
            arg=[value, within],
        )
        self.root.wait_for()

    def undo(self, value: float) -> None:
        """Ctrl+Z back to the step before, which has this threshold. On a busy machine the frontend makes steps of its
        own, of the sizes that it gives nodes once their images have come: those are undone on the way.
        """
        before = self.value()
        for _ in range(9):
            count = self.page.evaluate(UNDONE)
            self.page.keyboard.press("Control+z")
            self.page.wait_for_function("(count) => window.undone > count", arg=count)
            if self.value() != before:
                break
        self.wait_shown(value)

    def history(self) -> list[str]:
        """The thresholds of the steps that undo would go back through, oldest first, and what they are now. Steps that
        left them as they were are left out.
        """
        found = self.page.evaluate(
            """(type) => {
            const { undoQueue, activeState } = app.extensionManager.workflow.activeWorkflow.changeTracker;
            return [...undoQueue, activeState].map((state) => state.nodes.find((node) => node.type === type))
                .filter((node) => node).map((node) => node.widgets_values[0]);
        }""",
            SLICE,
        )
        return [value for value, _ in itertools.groupby(found)]

    def shown(self) -> list[float]:
        return [float(line.get_attribute("aria-valuenow")) for line in self.lines.all()]

    def at(self, depth: float, across: float = 0.7) -> tuple[float, float]:
        """Where a depth is in the top view, page pixels."""
        box = self.top.bounding_box()
        return box["x"] + across * box["width"], box["y"] + (1 - depth) * box["height"]

    def drag(self, start: float, end: float) -> None:
        self.page.mouse.move(*self.at(start))
        self.page.mouse.down()
        self.page.mouse.move(*self.at((start + end) / 2))
        self.page.mouse.move(*self.at(end))
        self.page.mouse.up()

    def on_picture(self, x: float, y: float) -> dict:
        """Position inside the front view of a point of the picture, as fractions of its sides."""
        box = self.front.bounding_box()
        scale = min(box["width"] / SIZE[0], box["height"] / SIZE[1])
        width, height = SIZE[0] * scale, SIZE[1] * scale
        return {"x": (box["width"] - width) / 2 + x * width, "y": (box["height"] - height) / 2 + y * height}

    def colour(self, x: float, y: float) -> list[int]:
        """What the front view shows at a point of the picture."""
        self.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        place = self.on_picture(x, y)
        return self.root.evaluate(
            """(host, [x, y]) => {
            const canvas = host.shadowRoot.querySelector('.front canvas');
            const ratio = canvas.width / canvas.getBoundingClientRect().width;
            return [...canvas.getContext('2d').getImageData(x * ratio, y * ratio, 1, 1).data.slice(0, 3)];
        }""",
            [place["x"], place["y"]],
        )


@pytest.fixture
def picker(prompt, editor) -> Picker:
    """The picker after one run, at 100 %."""
    editor.load_api(prompt)
    editor.queue()
    editor.show(SLICE)
    picker = Picker(editor)
    picker.front.wait_for()
    picker.lines.first.wait_for()
    return picker


@pytest.fixture
def no_run(picker):
    """Fails when the test made the page queue anything."""
    requested = []
    picker.page.on(
        "request",
        lambda request: request.method == "POST" and request.url.endswith("/prompt") and requested.append(request.url),
    )
    yield
    assert not requested


def test_before_a_run_it_says_what_to_do(prompt, editor):
    editor.load_api(prompt)
    editor.show(SLICE)
    picker = Picker(editor)
    picker.root.wait_for()
    assert picker.message() == "Run the graph once to see the depth here."
    assert not picker.front.is_visible()
    editor.picture(f"picker_before_run_{editor.mode}")
    assert editor.errors == []


def test_drag_changes_widget_and_tint_without_a_run(picker, no_run):
    depth_of_box = (POLE - BOX) / (POLE - WALL)
    before, wall = picker.colour(0.5, 0.5), picker.colour(0.75, 0.3)
    picker.drag(0.3, depth_of_box + 0.2)
    picker.wait_value(depth_of_box + 0.2)
    assert picker.shown() == [float(picker.value())]
    assert picker.colour(0.5, 0.5) != before, "the box is now in front of the threshold"
    assert picker.colour(0.75, 0.3) == wall
    picker.editor.picture(f"picker_dragged_{picker.editor.mode}")
    picker.undo(0.3)
    picker.drag(0.3, 0.45)
    picker.wait_value(0.45)
    assert picker.editor.errors == []


def test_each_drag_is_one_step_of_undo(picker, no_run):
    for start, end in ((0.3, 0.5), (0.5, 0.7), (0.7, 0.9)):
        picker.drag(start, end)
        picker.wait_value(end)
    picker.page.wait_for_function(
        """([type, value]) => app.extensionManager.workflow.activeWorkflow.changeTracker.activeState
            .nodes.find((node) => node.type === type).widgets_values[0] === value""",
        arg=[SLICE, picker.value()],
    )
    steps = picker.history()[-4:]
    assert [float(step) for step in steps] == pytest.approx([0.3, 0.5, 0.7, 0.9], abs=0.011), "none on the way"
    for step in reversed(steps[:-1]):
        picker.undo(float(step))
    assert picker.value() == "0.3"
    assert picker.editor.errors == []


def test_undo_and_redo_keep_the_views_when_the_graph_changes_its_id(prompt, editor):
    """The frontend compares graphs without their id, so what undo loads can be a graph of another id than the one that
    ran: it happens on a busy machine, here it is made to happen.
    """
    editor.load_api(prompt)
    settled = """() => new Promise((done) => {
        const { changeTracker } = app.extensionManager.workflow.activeWorkflow;
        changeTracker.checkState();
        setTimeout(() => {
            const length = changeTracker.undoQueue.length;
            changeTracker.checkState();
            done(changeTracker.undoQueue.length === length);
        }, 500);
    })"""
    editor.page.wait_for_function(settled)
    editor.page.evaluate("() => { app.graph.id = crypto.randomUUID(); }")
    editor.queue()
    editor.show(SLICE)
    picker = Picker(editor)
    picker.lines.first.wait_for()
    picker.drag(0.3, 0.5)
    picker.wait_value(0.5)
    for way, value in (("undo", 0.3), ("redo", 0.5)):
        picker.page.evaluate(STEP, [SLICE, way])
        picker.wait_shown(value)
    assert editor.errors == []


def test_clicks_set_add_and_remove(picker, no_run):
    picker.page.mouse.click(*picker.at(0.6))
    picker.wait_value(0.6)
    picker.page.keyboard.down("Shift")
    picker.page.mouse.click(*picker.at(0.2))
    picker.page.mouse.click(*picker.at(0.85))
    picker.page.keyboard.up("Shift")
    picker.wait_value(0.2, 0.6, 0.85)
    picker.lines.nth(0).focus()
    picker.page.mouse.click(*picker.at(0.7))  # moves the nearest, not the one that has the focus
    picker.wait_value(0.2, 0.7, 0.85)
    picker.editor.picture(f"picker_lines_{picker.editor.mode}")
    picker.page.mouse.dblclick(*picker.at(picker.shown()[1]))
    picker.wait_value(0.2, 0.85)
    picker.drag(picker.shown()[0], 0.99)  # lines never cross
    picker.wait_value(picker.shown()[1] - 0.001, picker.shown()[1], within=0.0001)
    assert picker.editor.errors == []


def test_click_on_an_object_sets_the_threshold_behind_it(picker, no_run):
    near = torch.from_numpy(np.array(scene()[1])).double()
    depth = (near.max() - near) / (near.max() - near.min())
    box, pole = (0.5, 0.5), (40 / SIZE[0], 0.3)
    expected = [technique.threshold_behind(depth, *point) for point in (box, pole)]
    picker.front.click(position=picker.on_picture(*box))
    picker.wait_value(expected[0])
    picker.front.click(position=picker.on_picture(*pole), modifiers=["Shift"])
    picker.wait_value(*sorted(expected))
    picker.editor.picture(f"picker_front_click_{picker.editor.mode}")


def test_keyboard(picker, no_run):
    line = picker.lines.first
    line.focus()
    picker.page.keyboard.press("ArrowUp")
    picker.wait_value(0.305, within=1e-6)
    picker.page.keyboard.press("Shift+ArrowDown")
    picker.wait_value(0.255, within=1e-6)
    picker.page.keyboard.press("Insert")
    picker.wait_value(0.255, (0.255 + 1) / 2, within=0.001)
    picker.page.keyboard.press("1")
    picker.page.keyboard.press("End")
    picker.wait_value(picker.shown()[1] - 0.001, picker.shown()[1], within=1e-6)
    picker.page.keyboard.press("Tab")
    picker.page.keyboard.press("ArrowRight")
    first, second = picker.shown()
    picker.wait_value(first, second, within=1e-6)
    assert second - first == pytest.approx(0.006)
    described = picker.lines.nth(1).evaluate(
        "(line) => [line.role ?? line.getAttribute('role'), line.ariaLabel, line.ariaValueMin, line.ariaValueMax]"
    )
    assert described == ["slider", "Threshold 2 of 2", "0", "1"]
    picker.editor.picture(f"picker_focus_{picker.editor.mode}")
    picker.page.keyboard.press("Delete")
    picker.wait_value(first, within=1e-6)
    picker.page.keyboard.press("Delete")
    assert picker.shown() == [first], "the last one stays"
    nodes = picker.page.evaluate("() => app.graph.nodes.length")
    assert nodes == 4, "ComfyUI's own Delete did not see the key"


def test_it_follows_the_typed_value(picker):
    picker.editor.set_widget(SLICE, "thresholds", "0.1, 0.45, 0.9")
    picker.page.wait_for_function(
        "() => document.querySelector('.strata-depth-picker').shadowRoot.querySelectorAll('.line:not(.fixed)').length "
        "=== 3"
    )
    assert picker.shown() == [0.1, 0.45, 0.9]
    picker.editor.set_widget(SLICE, "thresholds", "0.9, near")
    hint = picker.root.locator(".hint.wrong")
    hint.wait_for()
    assert hint.inner_text() == "thresholds: write numbers between 0 and 1, separated by commas."
    assert picker.lines.count() == 0
    picker.page.mouse.click(*picker.at(0.5))
    picker.wait_value(0.5)
    picker.editor.set_widget(SLICE, "points", "0.5, 0.5")
    picker.root.locator(".line.fixed").wait_for(state="attached")
    assert picker.value() == picker.lines.first.get_attribute("aria-valuenow")


STALE = "The image or its depth has changed: run the graph again to see it here."


def test_it_says_when_the_views_are_of_another_run(picker):
    hint, stale = picker.root.locator(".hint"), picker.root.locator(".hint", has_text=STALE)
    put = picker.editor.set_widget
    for node_type, name, value in ((SLICE, "near_is", "black"), ("LoadImage", "image", "picker_depth.png")):
        before = picker.editor.widget(node_type, name)
        assert hint.inner_text() != STALE
        put(node_type, name, value)
        picker.page.mouse.click(1500, 1000)  # on the canvas: the frontend looks for what is new
        stale.wait_for()
        picker.editor.picture(f"picker_stale_{name}_{picker.editor.mode}")
        put(node_type, name, before)
        picker.page.mouse.click(1500, 1000)
        stale.wait_for(state="hidden")
    put(SLICE, "near_is", "black")
    stale.wait_for()
    picker.editor.queue()
    stale.wait_for(state="hidden")
    put(SLICE, "thresholds", "0.6")  # the views show it without a run
    picker.wait_shown(0.6)
    assert hint.inner_text() != STALE
    saved = picker.page.evaluate("() => app.graph.serialize()")
    picker.editor.load(saved)
    picker.editor.show(SLICE)
    picker.wait_shown(0.6)
    assert hint.inner_text() != STALE
    assert picker.editor.errors == []


def test_a_side_panel_leaves_its_width_alone(picker):
    """Newer frontends show the widgets of the selected node in a panel too."""
    width = picker.root.evaluate("(host) => host.getBoundingClientRect().width")
    set_open = """async (open) => {
        try { await app.extensionManager.setting.set('Comfy.RightSidePanel.IsOpen', open); }
        catch { /* older ones have none */ }
    }"""
    picker.page.evaluate("(type) => app.canvas.selectNode(app.graph.nodes.find((n) => n.type === type))", SLICE)
    picker.page.evaluate(set_open, True)
    try:
        picker.drag(0.3, 0.5)
        picker.page.evaluate(
            """(type) => {
            app.graph.nodes.find((n) => n.type === type).widgets.find((w) => w.name === 'depth_picker').width = 120;
        }""",
            SLICE,
        )
        picker.drag(0.5, 0.6)
        picker.page.evaluate("() => new Promise((done) => setTimeout(done, 500))")
        picker.editor.picture(f"picker_panel_{picker.editor.mode}")
        found = "() => document.querySelector('.strata-depth-picker').getBoundingClientRect().width"  # not the panel's
        assert picker.page.evaluate(found) == pytest.approx(width, abs=1)
        picker.wait_value(0.6)
    finally:
        picker.page.evaluate(set_open, False)


def test_the_views_are_shown_large_and_undo_stays_there(picker, no_run):
    """From the button to the drag, its undo, and Escape, which brings the views back into the node."""
    page, large = picker.page, picker.page.locator(".strata-large")
    before = picker.front.bounding_box()
    picker.root.get_by_role("button", name="Enlarge").click()
    large.wait_for()
    page.wait_for_timeout(300)
    assert picker.front.bounding_box()["height"] > 1.5 * before["height"]
    scale = page.evaluate("() => app.canvas.ds.scale")
    picker.drag(0.3, 0.6)
    picker.wait_value(0.6)
    page.mouse.wheel(0, -100)
    picker.editor.picture(f"picker_large_{picker.editor.mode}")
    picker.undo(0.3)
    large.wait_for()
    assert picker.value() == "0.3" and page.evaluate("() => app.canvas.ds.scale") == scale
    page.keyboard.press("Escape")
    large.wait_for(state="detached")
    picker.front.wait_for()
    page.wait_for_timeout(300)
    assert picker.front.bounding_box()["height"] == pytest.approx(before["height"], rel=0.2)
    picker.drag(0.3, 0.5)
    picker.wait_value(0.5)
    assert picker.editor.errors == []


def test_run_then_reload_keeps_the_views(picker):
    picker.page.keyboard.down("Shift")
    picker.page.mouse.click(*picker.at(0.8))
    picker.page.keyboard.up("Shift")
    picker.wait_value(0.3, 0.8)
    picker.editor.queue()
    used = picker.page.evaluate(
        "() => app.graph.nodes.find((n) => n.type === 'Strata_SliceByDepth').properties.strata_slice.thresholds"
    )
    assert used == pytest.approx([0.3, float(picker.value().split(", ")[1])])
    # flattened picture and three layers
    picker.page.wait_for_function(
        "() => app.nodeOutputs[app.graph.nodes.find((n) => n.type === 'Strata_PreviewLayers').id]"
        "?.strata_pictures.length === 4"
    )
    saved = picker.page.evaluate("() => app.graph.serialize()")
    picker.editor.open()
    picker.editor.load(saved)
    picker.editor.show(SLICE)
    picker.front.wait_for()
    assert picker.shown() == pytest.approx(used, abs=0.0005)
    lost = next(node for node in saved["nodes"] if node["type"] == SLICE)
    lost["properties"]["strata_slice"]["front"]["filename"] = "cleared_away.png"
    assert picker.editor.errors == []
    picker.editor.load(saved, "lost")
    picker.root.locator(".message", has_text="gone").wait_for()
    assert "Run the graph again" in picker.message()


def test_thresholds_from_another_node_are_shown_and_not_changed(prompt, editor):
    linked = {**prompt, "5": {"class_type": "PrimitiveString", "inputs": {"value": "0.2, 0.7"}}}
    linked["3"] = {"class_type": SLICE, "inputs": {**prompt["3"]["inputs"], "thresholds": ["5", 0]}}
    editor.load_api(linked)
    editor.queue()
    editor.show(SLICE)
    picker = Picker(editor)
    picker.page.wait_for_function("""() => {
        const own = document.querySelector('.strata-depth-picker:not([data-gone])');
        return own?.shadowRoot.querySelectorAll('.line').length === 2;
    }""")
    assert picker.shown() == [0.2, 0.7]
    assert "comes from another node" in picker.root.locator(".hint").inner_text()
    picker.page.mouse.click(*picker.at(0.5))
    picker.drag(0.2, 0.4)
    assert picker.shown() == [0.2, 0.7]


def test_zoom_and_pan_go_through_to_the_canvas(picker):
    place = picker.page.evaluate("() => [app.canvas.ds.scale, ...app.canvas.ds.offset]")
    box = picker.front.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    picker.page.mouse.move(x, y)
    picker.page.mouse.wheel(0, -100)
    picker.page.wait_for_function("(before) => app.canvas.ds.scale > before", arg=place[0])
    left = picker.page.evaluate("() => app.canvas.ds.offset[0]")
    picker.page.mouse.down(button="middle")
    picker.page.mouse.move(x + 60, y, steps=3)
    picker.page.mouse.up(button="middle")
    picker.page.wait_for_function("(before) => app.canvas.ds.offset[0] > before + 20", arg=left)
    assert picker.value() == "0.3"
    assert picker.editor.errors == []


CORNER = """(type) => {
    const node = app.graph.nodes.find((n) => n.type === type);
    const card = document.querySelector(`[data-node-id="${node.id}"]`);
    if (card) return [card.getBoundingClientRect().right, card.getBoundingClientRect().bottom];
    const box = app.canvas.canvas.getBoundingClientRect(), { scale, offset } = app.canvas.ds;
    return [box.left + (node.pos[0] + node.size[0] + offset[0]) * scale,
            box.top + (node.pos[1] + node.size[1] + offset[1]) * scale];
}"""


def test_it_resizes_and_leaves_with_its_node(picker):
    width = picker.root.evaluate("(host) => host.clientWidth")
    x, y = picker.page.evaluate(CORNER, SLICE)
    picker.page.mouse.move(x - 4, y - 4)
    picker.page.mouse.down()
    picker.page.mouse.move(x + 100, y + 10, steps=4)
    picker.page.mouse.move(x + 196, y + 16, steps=4)
    picker.page.mouse.up()
    picker.page.wait_for_function(
        """(width) => {
        const host = document.querySelector('.strata-depth-picker');
        const canvas = host.shadowRoot.querySelector('.front canvas');
        return Math.abs(host.clientWidth - width - 200) < 10
            && Math.abs(canvas.width - canvas.clientWidth * devicePixelRatio) <= 1;
    }""",
        arg=width,
    )
    picker.editor.picture(f"picker_wide_{picker.editor.mode}")
    picker.page.evaluate("() => app.graph.remove(app.graph.nodes.find((n) => n.type === 'Strata_SliceByDepth'))")
    picker.root.wait_for(state="detached")
    assert picker.editor.errors == []


def test_thresholds_as_text(calculate):
    for text in (" 0.25,.5 , 0.75", "", "0.5;0.6", "0.1 0.2", "1e-2", "0.5, 0.2", "0.5, 0.5"):
        assert calculate("parseThresholds", text) == technique.parse_thresholds(text)
    for wrong in ("1", "0", "1.2", "-0.1", "half", "nan", "0.5:0.6"):
        assert calculate("parseThresholds", wrong) is None, wrong
        with pytest.raises(ValueError, match="thresholds:"):
            technique.parse_thresholds(wrong)
    assert calculate("formatThresholds", [0, 0.62, 1]) == "0.000, 0.620, 1.000"


def test_depth_bytes(calculate):
    values = np.append(np.arange(0, 65536, 97), 65535)
    rgba = np.stack([values >> 8, values & 255, values * 0, values * 0 + 255], -1)
    found = calculate("decodeDepth", rgba.reshape(-1).tolist())
    assert np.abs(np.asarray(found) * 65535 - values).max() < 0.01


def test_top_view_counts_every_pixel_once(calculate):
    rng = np.random.default_rng(3)
    depth = rng.random((12, 5)).astype(np.float32)
    depth[0, 0], depth[1, 0] = 0, 1
    picture = np.concatenate([rng.integers(0, 256, (12, 5, 3)), np.full((12, 5, 1), 255)], -1)
    rows = 8
    shown = np.asarray(
        calculate("topView", picture.reshape(-1).tolist(), {"floats": depth.reshape(-1).tolist()}, 5, rows)
    ).reshape(rows, 5, 4)
    for column in range(5):
        for row in range(rows):
            near = (rows - 1 - row) / rows
            inside = (depth[:, column] >= near) & ((depth[:, column] < near + 1 / rows) | (row == 0))
            if not inside.any():
                assert shown[row, column, 3] == 0
            else:
                assert np.abs(shown[row, column, :3] - picture[inside, column, :3].mean(0)).max() <= 0.51
                assert shown[row, column, 3] >= 127


def test_threshold_behind_equals_python(calculate):
    rng = np.random.default_rng(5)
    for _ in range(25):
        height, width = rng.integers(4, 40, 2)
        levels = np.sort(rng.random(rng.integers(2, 6)))
        depth = np.clip(
            levels[rng.integers(0, len(levels), (height, width))] + rng.normal(0, 0.01, (height, width)), 0, 1
        ).astype(np.float32)
        x, y = rng.random(2)
        ours = calculate("thresholdBehind", {"floats": depth.reshape(-1).tolist()}, int(width), int(height), x, y)
        assert ours == pytest.approx(technique.threshold_behind(torch.from_numpy(depth), x, y), abs=0.01)
