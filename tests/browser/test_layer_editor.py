"""The editor of Edit layers, driven with mouse, keyboard and fingers in the real frontend."""

from __future__ import annotations

import io
import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import maximum_filter, minimum_filter
from strata.techniques import effects
from strata.techniques.arrange import transform_layers
from strata.techniques.compositing import W3C_MODES
from strata.techniques.geometry import transform
from strata.techniques.layer_edits import apply_edits, read_edits
from strata.techniques.layers import Layer, LayerStack, as_effect, bound_to

# What happens in the dialog is the same over both canvas modes; `make test-full` asks in both
in_the_dialog = pytest.mark.parametrize(
    "editor", ["canvas", pytest.param("nodes2", marks=pytest.mark.slow)], indirect=True
)
SCRIPT = "layer_edits.js"  # whose functions `calculate` calls

EDIT = "Strata_EditLayers"
CANVAS = (240, 160)
# Left, top, right, bottom of what can be seen of each layer; the plate's own image is as large as the canvas
BOXES = {"wall": (0, 0, 240, 160), "plate": (150, 90, 200, 130), "card": (40, 30, 100, 70)}
WALL, PLATE, CARD = 1, 2, 3  # their numbers


def colour(value: int, width: int, height: int) -> dict:
    return {
        "class_type": "EmptyImage",
        "inputs": {"width": width, "height": height, "batch_size": 1, "color": value},
    }


def added(layers, image: str, name: str, x: int, y: int, **links) -> dict:
    place = {"x": x, "y": y, "w": 0, "h": 0, "rotation": 0.0, "flip_h": False, "flip_v": False}
    look = {"opacity": 1.0, "blend_mode": "normal", "visible": True}
    inputs = {
        "action": "append",
        "layer": "",
        "name": name,
        "fields": "",
        "image": [image, 0],
        **place,
        **look,
        **links,
    }
    return {"class_type": "Strata_SetLayer", "inputs": inputs | ({"layers": layers} if layers else {})}


def edited(layers) -> dict:
    """Edit layers and what shows its result."""
    return {
        "20": {"class_type": EDIT, "inputs": {"layers": layers, "edits": ""}},
        "21": {
            "class_type": "Strata_FlattenLayers",
            "inputs": {"layers": ["20", 0], "blending": "sRGB", "background": "transparent"},
        },
        "22": {"class_type": "PreviewImage", "inputs": {"images": ["21", 0]}},
    }


@pytest.fixture
def prompt() -> dict:
    """A card of 60×40 and a plate, which is a hole in the mask of a large layer, before a wall."""
    left, top, right, bottom = BOXES["plate"]
    return {
        "1": colour(0x506080, *CANVAS),
        "2": colour(0x20C040, *CANVAS),
        "3": colour(0xE04020, 60, 40),
        "4": {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": CANVAS[0], "height": CANVAS[1]}},
        "5": {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": right - left, "height": bottom - top}},
        "6": {
            "class_type": "MaskComposite",
            "inputs": {"destination": ["4", 0], "source": ["5", 0], "x": left, "y": top, "operation": "subtract"},
        },
        "7": added(None, "1", "wall", 0, 0),
        "8": added(["7", 0], "2", "plate", 0, 0, mask=["6", 0]),
        "9": added(["8", 0], "3", "card", *BOXES["card"][:2]),
        **edited(["9", 0]),
    }


def stack() -> LayerStack:
    """The same layers here."""
    large, small = torch.zeros(CANVAS[1], CANVAS[0], 4), torch.zeros(40, 60, 4)
    return LayerStack(CANVAS, (Layer(large, "wall"), Layer(large, "plate"), Layer(small, "card", x=40, y=30)))


def middle(name: str) -> tuple[float, float]:
    left, top, right, bottom = BOXES[name]
    return (left + right) / 2, (top + bottom) / 2


def fields(layer: Layer, number: int) -> dict:
    """What `edits` says of a layer that has become this one."""
    before = stack().layers[number - 1]
    values = {
        "x": (before.x, layer.x),
        "y": (before.y, layer.y),
        "w": (before.size[0], layer.size[0]),
        "h": (before.size[1], layer.size[1]),
        "rotation": (0, round(math.degrees(layer.rotation), 1)),
        "flip_h": (False, layer.flip_h),
        "flip_v": (False, layer.flip_v),
    }
    return {key: now for key, (was, now) in values.items() if was != now}


class Dialog:
    def __init__(self, editor):
        self.editor, self.page = editor, editor.page
        self.root = self.page.locator(".strata-layer-editor")
        self.view, self.apply, self.status = (self.root.locator(f".{part}") for part in ("view", "apply", "status"))

    def open(self) -> Dialog:
        """A click on the node's button."""
        if self.editor.mode == "nodes2":
            node = self.page.evaluate("(type) => app.graph.nodes.find((n) => n.type === type).id", EDIT)
            self.page.locator(f"[data-node-id='{node}'] button", has_text="open the editor").click()
        else:
            place = self.page.evaluate(
                """(type) => {
                const node = app.graph.nodes.find((n) => n.type === type);
                const button = node.widgets.find((w) => w.name === 'open the editor');
                const box = app.canvas.canvas.getBoundingClientRect(), { scale, offset } = app.canvas.ds;
                const [x, y] = [node.pos[0] + node.size[0] / 2, node.pos[1] + button.last_y + 10];
                return [box.left + (x + offset[0]) * scale, box.top + (y + offset[1]) * scale];
            }""",
                EDIT,
            )
            self.page.mouse.click(*place)
        self.root.locator("dialog").wait_for()
        return self

    def ready(self) -> Dialog:
        """The canvas at 100 % and nothing that snaps."""
        self.root.locator("li").first.wait_for()
        self.button("Show at 100 %").click()
        self.button("Snap").click()
        return self

    def button(self, name: str):
        return self.root.get_by_role("button", name=name, exact=True)

    def field(self, name: str):
        return self.root.locator(f"[name={name}]")

    def edits(self) -> str:
        return self.editor.widget(EDIT, "edits")

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Page pixels of a point of the canvas, at 100 %."""
        box = self.root.locator(".stage").bounding_box()
        return box["x"] + x, box["y"] + y

    def drag(self, start: tuple[float, float], by: tuple[float, float], *keys: str, button: str = "left") -> None:
        """From a point of the canvas."""
        self.pull(self.at(*start), by, *keys, button=button)

    def pull(self, start: tuple[float, float], by: tuple[float, float], *keys: str, button: str = "left") -> None:
        mouse, (x, y) = self.page.mouse, start
        mouse.move(x, y)
        for key in keys:
            self.page.keyboard.down(key)
        mouse.down(button=button)
        mouse.move(x + by[0] / 2, y + by[1] / 2)
        mouse.move(x + by[0], y + by[1])
        mouse.up(button=button)
        for key in keys:
            self.page.keyboard.up(key)

    def handle(self, selector: str) -> tuple[float, float]:
        box = self.root.locator(f".box {selector}").bounding_box()
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def rows(self) -> list[str]:
        return self.root.locator("li .pick").all_inner_texts()

    def select(self, name: str) -> None:
        self.root.locator("li").get_by_role("button", name=name, exact=True).click()

    def picture(self) -> np.ndarray:
        """What the canvas shows, at 100 %: [H,W,3]."""
        hide = "(host, shown) => { host.shadowRoot.querySelector('.box').style.visibility = shown; }"
        self.root.evaluate(hide, "hidden")
        x, y = self.at(0, 0)
        width, height = self.root.locator(".stage").evaluate(
            "({ style }) => [style.width, style.height].map(parseFloat)"
        )
        shot = self.page.screenshot(clip={"x": x, "y": y, "width": width, "height": height})
        self.root.evaluate(hide, "")
        return np.asarray(Image.open(io.BytesIO(shot)).convert("RGB")).astype(int)

    def result(self) -> np.ndarray:
        """Run, and give what Flatten layers has made: [H,W,4]."""
        self.editor.queue()
        source = self.page.evaluate(
            """() => {
            const [image] = app.nodeOutputs[app.graph.nodes.find((n) => n.type === 'PreviewImage').id].images;
            return `/view?${new URLSearchParams(image)}`;
        }"""
        )
        data = self.page.request.get(self.editor.url + source).body()
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGBA")).astype(int)

    def written(self) -> dict:
        """What Apply writes: {layer: fields}, order as names."""
        self.apply.click()
        self.root.wait_for(state="detached")
        text = self.edits()
        if not text:
            return {}
        found = json.loads(text)
        assert found.pop("version") == 1
        return {entry.pop("number"): entry for entry in found.pop("layers", [])} | found


def saved(page) -> dict:
    return json.loads(page.evaluate("() => JSON.stringify(app.graph.serialize())"))


def load(editor, prompt: dict) -> None:
    """Without nodes that lie over each other, as the frontend puts those of a prompt."""
    editor.page.evaluate("() => document.querySelector('.strata-layer-editor')?.remove()")  # of a test that failed
    editor.load_api(prompt)
    graph = saved(editor.page)
    for place, node in enumerate(sorted(graph["nodes"], key=lambda node: node["type"] != EDIT)):
        node["pos"] = [500 * (place % 4), 450 * (place // 4)]
    editor.load(graph)
    editor.show(EDIT)


@pytest.fixture
def fresh(prompt, editor) -> Dialog:
    load(editor, prompt)
    editor.queue()
    return Dialog(editor)


@pytest.fixture
def dialog(fresh) -> Dialog:
    return fresh.open().ready()


def off_edges(image: np.ndarray) -> np.ndarray:
    """Where an image [H,W,3] is flat, two pixels around."""
    return (maximum_filter(image, (5, 5, 1)) - minimum_filter(image, (5, 5, 1))).max(-1) <= 2


def finish(dialog: Dialog, expected: dict, exact: bool = False) -> None:
    """Apply: the text, the image that Flatten layers makes of it beside what the editor showed, and one step of undo.

    exact: nothing was resampled.
    """
    shown = dialog.picture()
    assert dialog.written() == expected
    result = dialog.result()
    # The editor has a checkerboard behind what is not opaque
    same = (np.abs(shown - result[..., :3]).max(-1) <= 2) | (result[..., 3] < 255)
    assert same.all() if exact else same[off_edges(result)].all()
    assert same.mean() > 0.9
    text = dialog.edits()
    steps = """(type) => {
        const { undoQueue, activeState } = app.extensionManager.workflow.activeWorkflow.changeTracker;
        return [...undoQueue, activeState].map((state) => state.nodes.find((node) => node.type === type))
            .filter((node) => node).map((node) => node.widgets_values[0]);
    }"""
    history = dialog.page.evaluate(steps, EDIT)
    history = [value for value, before in zip(history, [None, *history], strict=False) if value != before]
    assert history[-2:] == ["", text], "one step of the graph's undo"
    for key, value in (("Control+z", ""), ("Control+Shift+z", text)):
        # On a busy machine the frontend makes steps of its own, of the sizes of nodes
        for _ in range(9):
            dialog.page.keyboard.press(key)
            dialog.page.wait_for_timeout(300)
            if dialog.edits() == value:
                break
        assert dialog.edits() == value
    assert dialog.editor.errors == []


def test_before_a_run_it_says_what_to_do(prompt, editor):
    load(editor, prompt)
    dialog = Dialog(editor).open()
    assert dialog.root.locator(".message").inner_text() == "Run the graph once to edit its layers here."
    assert dialog.apply.is_disabled()
    dialog.page.keyboard.press("Escape")
    dialog.root.wait_for(state="detached")
    assert dialog.edits() == "" and editor.errors == []


def test_a_layer_is_dragged(dialog):
    dialog.drag(middle("card"), (31, -17))
    dialog.editor.picture(f"editor_drag_{dialog.editor.mode}")
    finish(dialog, {CARD: {"layer": "card", "x": 71, "y": 13}}, exact=True)


@in_the_dialog
def test_what_is_seen_under_the_pointer_is_dragged(dialog):
    """The plate's layer covers the canvas, and shows in a small part of it."""
    dialog.drag(middle("plate"), (-20, 10), "Shift")
    dialog.drag((10, 10), (5, 5))  # the wall
    dialog.select("plate")
    dialog.drag(middle("card"), (0, -30), "Alt")
    finish(
        dialog,
        {PLATE: {"layer": "plate", "x": -20, "y": -30}, WALL: {"layer": "wall", "x": 5, "y": 5}},
    )


@in_the_dialog
def test_it_snaps_to_edges_and_the_middle(dialog):
    dialog.button("Snap").click()
    card = BOXES["card"]
    dialog.drag(middle("card"), (-card[0] + 4, 13))  # 4 pixels from the left edge
    assert dialog.field("x").input_value() == "0" and dialog.field("y").input_value() == str(card[1] + 13)
    x, y = 30, (card[1] + card[3]) / 2 + 13
    dialog.page.mouse.move(*dialog.at(x, y))
    dialog.page.mouse.down()
    dialog.page.mouse.move(*dialog.at(CANVAS[0] / 2 - 5, CANVAS[1] / 2 + 3))
    assert [guide.is_visible() for guide in dialog.root.locator(".guide").all()] == [True, True]
    dialog.editor.picture(f"editor_snap_{dialog.editor.mode}")
    dialog.page.mouse.up()
    assert [dialog.field(name).input_value() for name in ("x", "y")] == ["90", "60"]
    dialog.drag((CANVAS[0] / 2, CANVAS[1] / 2), (3, -2), "Control")
    finish(dialog, {CARD: {"layer": "card", "x": 93, "y": 58}}, exact=True)


HANDLES = [(-1, -1), (0, -1), (1, -1), (1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0)]


@in_the_dialog
@pytest.mark.parametrize("name, number", [("card", CARD), ("plate", PLATE)])
def test_eight_handles(dialog, name, number):
    """Each alone, and undone; then a corner with Shift, which stays."""
    left, top, right, bottom = BOXES[name]
    width, height, before = right - left, bottom - top, stack().layers[number - 1]
    dialog.select(name)
    for index, (across, down) in enumerate(HANDLES):
        dialog.pull(dialog.handle(f"[data-handle='{index}']"), (16, 10))
        wide, high = width + across * 16, height + down * 10
        if across and down:
            scale = (wide * width + high * height) / (width**2 + height**2)
            wide, high = width * scale, height * scale
        # The opposite handle stays: the layer, of which the content is a part, grows about it
        fixed = (right if across < 0 else left, bottom if down < 0 else top)
        expected = [
            fixed[0] + (before.x - fixed[0]) * wide / width,
            fixed[1] + (before.y - fixed[1]) * high / height,
            before.size[0] * wide / width,
            before.size[1] * high / height,
        ]
        found = [float(dialog.field(field).input_value()) for field in ("x", "y", "w", "h")]
        # Half a pixel of the layer's side is less of its content
        assert found == pytest.approx(expected, abs=1.01), (across, down)
        dialog.page.keyboard.press("Control+z")
        assert [float(dialog.field(field).input_value()) for field in ("x", "y")] == [before.x, before.y]
    dialog.pull(dialog.handle("[data-handle='4']"), (width, -height / 2), "Shift")
    scaled = {"w": before.size[0] * 2, "h": before.size[1] // 2, "x": before.x * 2 - left, "y": (before.y + top) // 2}
    dialog.editor.picture(f"editor_handles_{name}_{dialog.editor.mode}")
    finish(
        dialog,
        {
            number: {
                "layer": name,
                **{key: scaled[key] for key in ("x", "y", "w", "h") if scaled[key] != getattr(before, key)},
            }
        },
    )


@in_the_dialog
@pytest.mark.parametrize("name, number", [("card", CARD), ("plate", PLATE)])
def test_it_turns_about_what_is_seen(dialog, name, number):
    dialog.select(name)
    centre, before = dialog.at(*middle(name)), stack().layers[number - 1]
    x, y = dialog.handle(".turn")
    radius = centre[1] - y
    for degrees, keys in ((30, ()), (47, ("Shift",))):
        angle = math.radians(degrees)
        dialog.pull((x, y), (radius * math.sin(angle), radius * (1 - math.cos(angle))), *keys)
        shown = 45 if keys else degrees
        assert float(dialog.field("rotation").input_value()) == pytest.approx(shown, abs=1)
        if keys:
            break
        dialog.page.keyboard.press("Control+z")
    dialog.editor.picture(f"editor_turn_{name}_{dialog.editor.mode}")
    turned = transform(before, middle(name), rotation=math.radians(45))
    finish(dialog, {number: {"layer": name, **fields(turned, number)}})


@in_the_dialog
def test_a_turned_layer_is_scaled_along_its_own_sides_and_flipped_as_it_is_seen(dialog):
    dialog.select("card")
    dialog.field("rotation").fill("90")
    dialog.page.keyboard.press("Enter")
    before = transform(stack().layers[CARD - 1], rotation=math.pi / 2)
    dialog.pull(dialog.handle("[data-handle='3']"), (0, 20))  # its right side points down
    grown = replace(before, x=before.x - 10, y=before.y + 10, w=80, h=40)
    assert [float(dialog.field(field).input_value()) for field in "xywh"] == [grown.x, grown.y, 80, 40]
    dialog.field("rotation").fill("30")
    dialog.button("Flip left and right").click()
    expected = transform(replace(grown, rotation=math.radians(30)), flip_h=True)
    finish(dialog, {CARD: {"layer": "card", **fields(expected, CARD)}})


@in_the_dialog
def test_wheel_zooms_and_with_shift_scales(dialog):
    zoom = dialog.root.locator(".zoom")
    dialog.page.mouse.move(*dialog.at(*middle("plate")))
    dialog.page.mouse.wheel(0, -100)
    dialog.page.wait_for_function(
        "() => document.querySelector('.strata-layer-editor').shadowRoot.querySelector('.zoom').textContent === '115 %'"
    )
    zoom.click()
    assert zoom.inner_text() == "100 %"
    dialog.select("plate")
    dialog.page.keyboard.down("Shift")
    dialog.page.mouse.move(*dialog.at(5, 5))
    dialog.page.mouse.wheel(0, -100)
    dialog.page.keyboard.up("Shift")
    larger = transform(stack().layers[PLATE - 1], middle("plate"), scale=1.05)
    dialog.page.wait_for_function(
        "(w) => document.querySelector('.strata-layer-editor').shadowRoot.querySelector('[name=w]').value === w",
        arg=str(larger.size[0]),
    )
    finish(dialog, {PLATE: {"layer": "plate", **fields(larger, PLATE)}})


@in_the_dialog
def test_flips_opacity_blend_mode_visibility_and_name(dialog):
    dialog.select("plate")
    dialog.button("Flip top and bottom").click()
    dialog.field("opacity").focus()
    for _ in range(3):
        dialog.page.keyboard.press("PageDown")
    opacity = int(dialog.field("opacity").input_value()) / 100
    assert opacity < 0.9
    dialog.field("blend_mode").select_option("multiply")
    dialog.select("card")
    dialog.root.get_by_role("button", name="Show card").click()
    dialog.root.locator("li .pick", has_text="plate").dblclick()
    dialog.page.keyboard.type("Teller")
    dialog.page.keyboard.press("Enter")
    assert dialog.rows() == ["card", "Teller", "wall"]
    flipped = transform(stack().layers[PLATE - 1], middle("plate"), flip_v=True)
    look = {"opacity": opacity, "blend_mode": "multiply", "name": "Teller"}
    dialog.editor.picture(f"editor_fields_{dialog.editor.mode}")
    finish(
        dialog,
        {PLATE: {"layer": "plate", **fields(flipped, PLATE), **look}, CARD: {"layer": "card", "visible": False}},
        exact=True,
    )


@in_the_dialog
def test_order_by_dragging_and_by_buttons(dialog):
    dialog.drag(middle("card"), (125, 70))  # over the plate
    row = dialog.root.locator("li", has_text="card").bounding_box()
    last = dialog.root.locator("li", has_text="wall").bounding_box()
    dialog.pull((row["x"] + 120, row["y"] + 15), (0, last["y"] - row["y"] - 12))
    assert dialog.rows() == ["plate", "card", "wall"]
    dialog.editor.picture(f"editor_order_{dialog.editor.mode}")
    dialog.button("Bring forward").click()
    assert dialog.rows() == ["card", "plate", "wall"] and dialog.button("Bring forward").is_disabled()
    dialog.page.keyboard.press("Control+z")  # the button that had the focus has gone
    assert dialog.rows() == ["plate", "card", "wall"]
    finish(dialog, {CARD: {"layer": "card", "x": 165, "y": 100}, "order": ["wall", "card", "plate"]}, exact=True)


@in_the_dialog
def test_keyboard_alone(dialog):
    keys = dialog.page.keyboard
    for key in ("ArrowRight", "Shift+ArrowRight", "Shift+ArrowDown", "ArrowUp"):
        keys.press(key)
    assert dialog.status.inner_text() == "card: x 51, y 39"
    keys.press("PageDown")
    keys.press("ArrowLeft")
    keys.press("F2")
    keys.type("Dish")
    keys.press("Enter")
    keys.press("Enter")
    dialog.root.wait_for(state="detached")
    assert json.loads(dialog.edits())["layers"] == [
        {"layer": "plate", "number": 2, "x": -1, "name": "Dish"},
        {"layer": "card", "number": 3, "x": 51, "y": 39},
    ]
    dialog.open()  # it goes on from there
    dialog.root.locator("li").first.wait_for()
    assert dialog.rows() == ["card", "Dish", "wall"]
    keys.press("ArrowRight")
    keys.press("Escape")
    dialog.root.wait_for(state="detached")
    assert json.loads(dialog.edits())["layers"][1]["x"] == 51
    nodes = dialog.page.evaluate("() => app.graph.nodes.length")
    assert nodes == 12, "none of the keys was the graph's"
    assert dialog.editor.errors == []


@in_the_dialog
def test_every_control_has_a_name_and_tab_goes_through_them(dialog):
    unnamed = """(host) => [...host.shadowRoot.querySelectorAll('button, input, select')].filter((one) =>
        !(one.ariaLabel || one.innerText.trim() || [...(one.labels ?? [])].some((label) => label.innerText.trim())))
        .map((one) => one.outerHTML)"""
    assert dialog.root.evaluate(unnamed) == []
    seen = set()
    for _ in range(40):
        dialog.page.keyboard.press("Tab")
        seen.add(
            dialog.root.evaluate(
                "(host) => host.shadowRoot.activeElement?.name || host.shadowRoot.activeElement?.className"
            )
        )
    assert {
        "name",
        "x",
        "y",
        "w",
        "h",
        "rotation",
        "opacity",
        "blend_mode",
        "reset",
        "pick",
        "eye",
        "apply main",
    } <= seen
    assert dialog.root.locator("li .pick[aria-current=true]").inner_text() == "card"


@in_the_dialog
def test_undo_and_redo_stay_in_the_dialog(dialog):
    before = dialog.page.evaluate("() => app.extensionManager.workflow.activeWorkflow.changeTracker.undoQueue.length")
    dialog.drag(middle("card"), (20, 0))
    dialog.page.keyboard.press("ArrowDown")
    dialog.field("opacity").fill("40")
    for expected in (["60", "31", "100"], ["60", "30", "100"], ["40", "30", "100"], ["40", "30", "100"]):
        dialog.page.keyboard.press("Control+z")
        assert [dialog.field(name).input_value() for name in ("x", "y", "opacity")] == expected
    dialog.page.keyboard.press("Control+y")
    dialog.button("Redo").click()
    dialog.page.keyboard.press("Control+Shift+z")
    assert [dialog.field(name).input_value() for name in ("x", "y", "opacity")] == ["60", "31", "40"]
    assert dialog.button("Redo").is_disabled()
    dialog.page.mouse.move(*dialog.at(90, 50))
    dialog.page.mouse.down()
    dialog.page.mouse.move(*dialog.at(130, 80))
    dialog.page.keyboard.press("Escape")  # takes the drag back, and not the dialog away
    dialog.page.mouse.up()
    assert [dialog.field(name).input_value() for name in ("x", "y")] == ["60", "31"]
    dialog.button("Reset").click()
    assert dialog.written() == {}
    after = dialog.page.evaluate("() => app.extensionManager.workflow.activeWorkflow.changeTracker.undoQueue.length")
    assert after == before


def test_fingers(dialog):
    """One moves a layer, two zoom and move the view."""
    touch = dialog.page.context.new_cdp_session(dialog.page)

    def fingers(kind: str, *points: tuple[float, float]) -> None:
        told = [{"x": x, "y": y, "id": number} for number, (x, y) in enumerate(points)]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": told})

    x, y = dialog.at(*middle("card"))
    fingers("touchStart", (x, y))
    fingers("touchMove", (x + 10, y + 5))
    fingers("touchMove", (x + 24, y + 9))
    fingers("touchEnd")
    assert [dialog.field(name).input_value() for name in ("x", "y")] == ["64", "39"]
    fingers("touchStart", (x, y))
    fingers("touchMove", (x + 10, y))
    fingers("touchStart", (x + 10, y), (x + 110, y))
    fingers("touchMove", (x - 40, y), (x + 160, y))
    fingers("touchEnd")
    assert dialog.root.locator(".zoom").inner_text() == "200 %"
    assert [dialog.field(name).input_value() for name in ("x", "y")] == ["64", "39"], (
        "the first finger's move went back"
    )
    dialog.button("Show at 100 %").click()
    row, last = (dialog.root.locator("li", has_text=name).locator(".grip").bounding_box() for name in ("card", "wall"))
    x, y = row["x"] + 8, row["y"] + 12
    fingers("touchStart", (x, y))
    fingers("touchMove", (x, y + 8))
    fingers("touchMove", (x, last["y"] + 25))
    fingers("touchEnd")
    assert dialog.rows() == ["plate", "wall", "card"]
    finish(dialog, {CARD: {"layer": "card", "x": 64, "y": 39}, "order": ["card", "wall", "plate"]}, exact=True)


@in_the_dialog
def test_the_view_moves_and_fits_small_windows(dialog):
    dialog.drag((10, 10), (50, 30), button="middle")
    dialog.button("Fit").click()
    size = dialog.page.viewport_size
    try:
        dialog.page.set_viewport_size({"width": 1280, "height": 720})
        dialog.page.wait_for_timeout(300)
        stage, view = (dialog.root.locator(part).bounding_box() for part in (".stage", ".view"))
        for side, length in (("x", "width"), ("y", "height")):
            assert view[side] < stage[side] and stage[side] + stage[length] < view[side] + view[length]
        for part in ("apply", "reset", "status"):
            box = dialog.root.locator(f".{part}").bounding_box()
            assert box["y"] + box["height"] <= 720 and box["x"] + box["width"] <= 1280
        dialog.editor.picture(f"editor_1280x720_{dialog.editor.mode}")
        dialog.page.set_viewport_size({"width": 600, "height": 720})
        dialog.page.wait_for_timeout(300)
        dialog.editor.picture(f"editor_600x720_{dialog.editor.mode}")
        assert dialog.root.locator(".apply").bounding_box()["x"] < 600
    finally:
        dialog.page.set_viewport_size(size)
    assert dialog.written() == {}


def test_edits_survive_reload_copy_and_paste_and_a_subgraph(dialog):
    dialog.drag(middle("card"), (20, 10))
    expected = {CARD: {"layer": "card", "x": 60, "y": 40}}
    assert dialog.written() == expected
    page, text = dialog.page, dialog.edits()
    page.evaluate(
        """(type) => {
        app.canvas.selectNodes([app.graph.nodes.find((n) => n.type === type)]);
        app.canvas.copyToClipboard();
        app.canvas.pasteFromClipboard({ connectInputs: true });
    }""",
        EDIT,
    )
    values = "(type) => app.graph.nodes.filter((n) => n.type === type).map((n) => n.widgets[0].value)"
    assert page.evaluate(values, EDIT) == [text, text]
    page.evaluate("(type) => app.graph.remove(app.graph.nodes.findLast((n) => n.type === type))", EDIT)
    graph = saved(page)
    dialog.editor.open()
    dialog.editor.load(graph)
    dialog.editor.show(EDIT)
    assert dialog.edits() == text
    dialog.open()
    dialog.root.locator("li").first.wait_for()
    assert [dialog.field(name).input_value() for name in ("x", "y")] == ["60", "40"]
    dialog.page.keyboard.press("Escape")
    before = dialog.result()
    page.evaluate(
        "(type) => { app.graph.convertToSubgraph(new Set([app.graph.nodes.find((n) => n.type === type)])); }", EDIT
    )
    inner = "app.graph.nodes.find((n) => n.subgraph).subgraph.nodes.find((n) => n.type === type).properties"
    page.evaluate(f"(type) => {{ delete {inner}.strata_layers; }}", EDIT)
    assert np.array_equal(dialog.result(), before)
    assert page.evaluate(f"(type) => {inner}.strata_layers.layers.length", EDIT) == 3
    assert dialog.editor.errors == []


STALE = "What comes before this node has changed: run the graph again to see it here."


def test_it_says_what_is_old_gone_or_linked(fresh, prompt):
    editor, page = fresh.editor, fresh.page
    editor.set_widget(EDIT, "edits", '{"layers": [{"layer": "cat", "x": 3}, {"layer": "card", "x": 3}]}')
    page.evaluate("() => { app.graph.nodes.find((n) => n.type === 'EmptyImage').widgets[3].value = 7; }")
    fresh.open()
    fresh.root.locator("li").first.wait_for()
    assert fresh.status.inner_text() == f"{STALE} Apply drops the edits of cat: no such layer is here."
    editor.picture(f"editor_stale_{editor.mode}")
    assert fresh.written() == {CARD: {"layer": "card", "x": 3}}
    editor.set_widget(EDIT, "edits", "{")
    fresh.open()
    fresh.root.locator("li").first.wait_for()
    assert "The edits on the node cannot be read" in fresh.status.inner_text()
    page.keyboard.press("Escape")
    graph = saved(page)
    node = next(node for node in graph["nodes"] if node["type"] == EDIT)
    node["properties"]["strata_layers"]["layers"][0]["image"]["filename"] = "cleared_away.png"
    editor.load(graph, "lost")
    editor.show(EDIT)
    fresh.open()
    fresh.root.locator(".message", has_text="gone").wait_for()
    assert "Run the graph again" in fresh.root.locator(".message").inner_text()
    page.keyboard.press("Escape")
    linked = {**prompt, "30": {"class_type": "PrimitiveString", "inputs": {"value": ""}}}
    linked["20"] = {"class_type": EDIT, "inputs": {"layers": ["9", 0], "edits": ["30", 0]}}
    editor.errors.clear()  # the picture that is gone
    load(editor, linked)
    fresh.open()
    assert fresh.root.locator(".message").inner_text().startswith("edits comes from another node")
    assert fresh.apply.is_disabled()
    page.keyboard.press("Escape")
    assert editor.errors == []


@in_the_dialog
def test_blend_modes_as_flatten_layers_has_them(editor):
    """Sixteen dogs with soft shadows on a meadow, one in each mode that CSS has, moved there by edits."""
    scene = {"kind": "meadow", "objects": "dog", "count": 1, "seed": 5, "shadows": True}
    layers = {"images": ["4", 0], "layers": ["1", 2], "names": "\n".join(W3C_MODES)}
    load(
        editor,
        {
            "1": {
                "class_type": "Strata_RenderScene",
                "inputs": {**scene, "count": 0, "objects": "", "width": 512, "height": 512},
            },
            "2": {"class_type": "Strata_RenderScene", "inputs": {**scene, "width": 128, "height": 128}},
            "3": {"class_type": "Strata_LayersToBatch", "inputs": {"layers": ["2", 2], "at_canvas_size": True}},
            "5": {"class_type": "ImageFromBatch", "inputs": {"image": ["3", 0], "batch_index": 1, "length": 1}},
            "4": {"class_type": "RepeatImageBatch", "inputs": {"image": ["5", 0], "amount": len(W3C_MODES)}},
            "6": {"class_type": "Strata_LayersFromImages", "inputs": layers},
            **edited(["6", 0]),
        },
    )
    entries = [
        {"layer": mode, "x": place % 4 * 128, "y": place // 4 * 128, "blend_mode": mode, "opacity": 0.7}
        for place, mode in enumerate(W3C_MODES)
    ]
    editor.set_widget(EDIT, "edits", json.dumps({"layers": entries}))
    dialog = Dialog(editor)
    result = dialog.result()
    dialog.open().ready()
    editor.picture(f"editor_modes_{editor.mode}")
    difference = np.abs(dialog.picture() - result[..., :3])
    tiles = difference.reshape(4, 128, 4, 128, 3).transpose(0, 2, 1, 3, 4).reshape(16, -1)
    found = {mode: (int(tile.max()), float((tile > 2).mean())) for mode, tile in zip(W3C_MODES, tiles, strict=True)}
    # The browser keeps eight bits of what is behind, and of a faint colour times its alpha
    assert all(most <= 4 and share < 1e-3 for most, share in found.values()), found
    assert editor.errors == []


def described(layer: Layer) -> dict:
    """As nodes/edit_layers.py gives it to the editor."""
    names = ("name", "x", "y", "flip_h", "flip_v", "opacity", "blend_mode", "visible")
    size = {"w": layer.size[0], "h": layer.size[1], "rotation": math.degrees(layer.rotation)}
    return {**{name: getattr(layer, name) for name in names}, **size}


def test_text_is_read_and_written_as_in_python(calculate):
    random_ = random.Random(4)
    layers = LayerStack(CANVAS, tuple(Layer(torch.zeros(9, 12, 4), name) for name in ("Sky", "Dog", "dog", "Größe")))
    shown = [{**described(layer), "box": [0, 0, 1, 1]} for layer in layers.layers]
    choices = {
        "x": [-3, 2.5, -0.5, 7],
        "y": [0.49, 12],
        "w": [1, 30.5],
        "h": [16384],
        "rotation": [15, -90.5],
        "flip_h": [True],
        "flip_v": [True, False],
        "opacity": [0, 0.25],
        "blend_mode": ["screen", "hard-mix"],
        "visible": [False],
        "name": ["Hund", "a, b"],
    }
    references = [
        {"layer": "SKY"},
        {"layer": 2},
        {"layer": "Dog", "number": 3},
        {"layer": "größe", "number": 1},
        {"layer": "x"},
    ]
    for _ in range(40):
        entries = [
            {**reference, **{key: random_.choice(choices[key]) for key in random_.sample(sorted(choices), 3)}}
            for reference in random_.sample(references, 3)
        ]
        order = random_.sample(references, random_.randint(0, 5))
        text = json.dumps({"layers": entries, "order": order})
        python, notes = apply_edits(layers, read_edits(text))
        state = calculate("readEdits", text, shown)
        ours = [state["values"][index] for index in state["order"]]
        assert ours == [pytest.approx(described(layer)) for layer in python.layers]
        assert bool(notes) == bool(state["missing"] or {"layer": "x"} in order)
        again, _ = apply_edits(layers, read_edits(calculate("writeEdits", state, shown)))
        assert [described(layer) for layer in again.layers] == [described(layer) for layer in python.layers]


def bound_stack() -> LayerStack:
    """A card with a shadow in its group, on a wall."""
    small = torch.zeros(40, 60, 4)
    group = effects.bound(
        [as_effect(Layer(small, "card shadow", x=52, y=37), "shadow")], Layer(small, "card", x=40, y=30), [], []
    )
    return LayerStack(CANVAS, (Layer(torch.zeros(CANVAS[1], CANVAS[0], 4), "wall"), *group))


@pytest.mark.parametrize(
    "changes", [{"move": (31, -17)}, {"scale": 1.5}, {"rotation": math.pi / 3, "move": (5, 0)}, {"flip_h": True}]
)
def test_effects_are_carried_along_as_by_transform_layer(calculate, changes):
    before = bound_stack()
    moved = transform_layers(before, "card", **changes)
    layers = [described(layer) | {"bound": bound_to(before, number)} for number, layer in enumerate(before.layers)]
    after = [described(layer) for layer in moved.layers]
    (found,) = calculate("along", layers, layers, 2, {**layers[2], **after[2]})
    assert found[0] == 1
    ours, theirs = ({name: one[name] for name in ("x", "y", "w", "h", "rotation")} for one in (found[1], after[1]))
    assert ours == pytest.approx(theirs, abs=1) and ours["rotation"] == pytest.approx(theirs["rotation"], abs=0.05)
    assert (found[1]["flip_h"], found[1]["flip_v"]) == (after[1]["flip_h"], after[1]["flip_v"])


def test_many_small_turns_and_scales_are_one_for_the_effects(calculate):
    start = bound_stack()
    layers = [described(layer) | {"bound": bound_to(start, number)} for number, layer in enumerate(start.layers)]
    values = [dict(layer) for layer in layers]
    for step in range(1, 31):
        side = {"w": round(60 * 1.03**step), "h": round(40 * 1.03**step)}
        next_ = {**layers[2], **side, "rotation": step / 2, "visible": step < 30}
        ((_, carried),) = calculate("along", layers, values, 2, next_)
        values[1:] = [carried, next_]
    at_once = calculate("carried", layers[1], layers[2], values[2])
    assert at_once == {name: values[1][name] for name in at_once} and values[1]["visible"] is False
    # An effect that was moved by itself keeps its new place beside its object
    values[1] = {**values[1], "x": values[1]["x"] + 20}
    ((_, carried),) = calculate("along", layers, values, 2, {**values[2], "y": 90})
    assert (carried["x"], carried["y"] - values[1]["y"]) == (values[1]["x"], 90 - values[2]["y"])


def test_an_object_is_dragged_with_its_shadow_and_ordered_with_it(editor):
    scene = {"kind": "meadow", "objects": "apple, house", "count": 2, "width": 240, "height": 160, "seed": 4}
    prompt = {
        "1": {"class_type": "Strata_RenderScene", "inputs": scene | {"shadows": False}},
        "2": {"class_type": "Strata_EffectLayers", "inputs": {"layers": ["1", 2], "image": ["1", 0], "reach": 0.5}},
        **edited(["2", 0]),
    }
    load(editor, prompt)
    editor.queue()
    dialog = Dialog(editor).open().ready()
    rows = dialog.rows()
    front = next(name for name in rows if name in ("apple", "house"))
    own = [name for name in rows if name.startswith(front)]

    def places() -> dict:
        found = {}
        for name in own:
            dialog.select(name)
            found[name] = tuple(int(dialog.field(axis).input_value()) for axis in "xy")
        return found

    before = places()
    dialog.select(front)
    box = dialog.root.locator(".box").bounding_box()
    dialog.pull((box["x"] + box["width"] / 2, box["y"] + box["height"] / 2), (21, -9))
    after = places()
    assert after == {name: (x + 21, y - 9) for name, (x, y) in before.items()} and f"{front} shadow" in after
    dialog.editor.picture(f"editor_effects_{editor.mode}")
    dialog.select(front)
    dialog.button("Send backward").click()
    assert [name for name in dialog.rows() if name.startswith(front)] == own
    assert dialog.rows() == [name for name in rows if name not in own][:-1] + own + ["background"]
    text = dialog.written()
    edits = {entry["layer"]: (entry["x"], entry["y"]) for key, entry in text.items() if key != "order"}
    assert edits == after and [text["order"][0], *reversed(text["order"][1 : 1 + len(own)])] == ["background", *own]
    dialog.result()  # the node takes them
    assert editor.errors == []


def test_texts_that_the_node_refuses_are_no_edits(calculate):
    shown = [{**described(layer), "box": [0, 0, 1, 1]} for layer in stack().layers]
    for text in (
        "{",
        "[1]",
        "3",
        '{"layers": 3}',
        '{"layers": [{"layer": 1, "x": "3"}]}',
        '{"layers": [{"layer": 1, "w": 0}]}',
    ):
        with pytest.raises(ValueError, match="edits:"):
            read_edits(text)
        assert calculate("readEdits", text, shown) is None, text
    assert calculate("writeEdits", calculate("untouched", shown), shown) == ""
