// Puts the depth picker on "Slice by depth" and keeps it in step with the node: its `thresholds` widget, its last run, its links.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { LastRun } from "./last_run.js";
import { formatThresholds, parseThresholds, pointThresholds } from "./depth_view.js";
import { showLarge } from "./large_view.js";
import { after } from "./nodes.js";
import { DepthPicker } from "./picker_widget.js";

const NODE = "Strata_SliceByDepth";
const SEEN = ["near_is", "missing_depth"]; // widgets that change what the views show
const runs = new LastRun("strata_slice", ["image", "depth"], SEEN);
const RUN_FIRST = "Run the graph once to see the depth here.";
const GONE = "The images of the last run are gone (ComfyUI clears them when it restarts).\nRun the graph again to see the depth here.";

async function fetchPixels({ filename, subfolder = "", type = "temp" }) {
    const answer = await api.fetchApi(`/view?${new URLSearchParams({ filename, subfolder, type })}`, { cache: "no-store" });
    if (!answer.ok) return null;
    // Colour management would change the depth bytes
    const bitmap = await createImageBitmap(await answer.blob(), { colorSpaceConversion: "none", premultiplyAlpha: "none" });
    const canvas = document.createElement("canvas");
    Object.assign(canvas, { width: bitmap.width, height: bitmap.height });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(bitmap, 0, 0);
    bitmap.close();
    return context.getImageData(0, 0, canvas.width, canvas.height);
}

/** In the classic canvas a DOM widget lies over the canvas and would swallow zooming and panning; Nodes 2.0 handles both itself. */
function passOnToCanvas(element) {
    const elsewhere = () => Boolean(element.closest("[data-node-id], dialog"));
    const pass = (name, when) => (event) => { if (!elsewhere() && when(event)) app.canvas[name]?.(event); };
    element.addEventListener("wheel", pass("processMouseWheel", () => true));
    element.addEventListener("pointerdown", pass("processMouseDown", (event) => event.button === 1));
    element.addEventListener("pointermove", pass("processMouseMove", (event) => event.buttons & 4));
    element.addEventListener("pointerup", pass("processMouseUp", (event) => event.button === 1));
    for (const name of ["pointerdown", "pointermove", "pointerup", "dblclick"]) {
        // A Vue node would start to drag itself
        element.addEventListener(name, (event) => { if (event.button <= 0 && !(event.buttons & 4)) event.stopPropagation(); });
    }
}

/** A Vue card that outlives its node (undo, or another workflow with the same node id) keeps the old node's element: take its place. */
function takePlace(node, element, frames = 120) {
    if (element.isConnected || frames === 0) return;
    document.querySelector(`[data-node-id="${node.id}"] .strata-depth-picker[data-gone]`)?.replaceWith(element);
    requestAnimationFrame(() => takePlace(node, element, frames - 1));
}

let reopen = null; // id of a node whose views were shown large when undo took the node away

/** Undo makes the node anew: its views are shown large again as soon as they are on the page. */
function showAgain(node, picker, frames = 120) {
    if (reopen !== node.id) return;
    if (!picker.element.isConnected && frames > 0) {
        requestAnimationFrame(() => showAgain(node, picker, frames - 1));
        return;
    }
    reopen = null;
    if (frames > 0) picker.onEnlarge();
}

function attach(node) {
    const widget = (name) => node.widgets?.find((candidate) => candidate.name === name);
    let newest = 0; // a slow answer must not replace a newer one
    let shrink = null; // puts views that are shown large back into the node
    let shown; // the run whose pictures the views have

    const picker = new DepthPicker((values, finished) => {
        const text = formatThresholds(values);
        const thresholds = widget("thresholds");
        if (finished) app.canvas.emitBeforeChange?.(); // the graph's own beforeChange is heard by nobody
        if (thresholds.value !== text) {
            thresholds.value = text;
            thresholds.callback?.(text, app.canvas, node);
        }
        if (finished) app.canvas.emitAfterChange?.(); // one step for undo
        node.setDirtyCanvas(true, true);
    }, () => {
        picker.largeEl.hidden = true;
        shrink = showLarge(picker.element, "Slice by depth", () => {
            shrink = null;
            picker.largeEl.hidden = false;
        });
    });

    const follow = () => {
        const slice = runs.of(node);
        if (slice !== shown) load();
        const linked = node.inputs?.some((input) => input.name === "thresholds" && input.link != null);
        const fixed = picker.scene ? pointThresholds(picker.scene, widget("points")?.value ?? "") : [];
        const values = linked ? slice?.thresholds ?? [] : parseThresholds(widget("thresholds")?.value ?? "");
        picker.setThresholds(values, { fixed: linked ? [] : fixed, locked: linked, stale: runs.stale(node) });
    };

    const load = async () => {
        const slice = shown = runs.of(node);
        const turn = ++newest;
        if (!slice?.front || !slice?.depth) {
            picker.say(RUN_FIRST);
            return;
        }
        const [front, depth] = await Promise.all([fetchPixels(slice.front), fetchPixels(slice.depth)]).catch(() => [null, null]);
        if (turn !== newest) return;
        if (!front || front.width !== depth?.width || front.height !== depth.height) {
            picker.say(GONE);
            return;
        }
        picker.setScene(front, depth);
        follow();
    };

    passOnToCanvas(picker.element);
    const options = { serialize: false, getMinHeight: () => 340, hideOnZoom: true };
    const view = node.addDOMWidget("depth_picker", "strata_depth_picker", picker.element, options);
    view.serialize = false;
    // A side panel that shows the widget too would set its own width on it
    Object.defineProperty(view, "width", { get: () => undefined, set: () => {}, configurable: true });
    view.computeLayoutSize = () => ({ minHeight: 340, minWidth: 300 });

    for (const name of ["thresholds", "points", ...SEEN]) if (widget(name)) after(widget(name), "callback", follow);
    after(node, "onExecuted", (output) => {
        if (runs.keep(node, output)) load();
    });
    after(node, "onConfigure", () => { load(); follow(); });
    after(node, "onAfterGraphConfigured", follow); // the nodes behind it have their values now
    after(node, "onConnectionsChange", follow);
    after(node, "onAdded", () => { takePlace(node, picker.element); showAgain(node, picker); });
    api.addEventListener("graphChanged", follow);
    after(node, "onRemoved", () => {
        if (shrink) reopen = node.id;
        shrink?.();
        newest++;
        picker.dispose();
        api.removeEventListener("graphChanged", follow);
    });
    const least = node.computeSize(); // the frontend widens a loaded node to it: undo would find another graph
    node.setSize([Math.max(node.size[0], least[0], 400), Math.max(node.size[1], least[1] + 120)]);
    load();
    follow();
}

app.registerExtension({
    name: "Strata.DepthPicker",
    nodeCreated(node) {
        if (node.comfyClass === NODE) attach(node);
    },
});
