// The layer editor: a dialog over the page in which layers are arranged by hand. It knows nothing of ComfyUI: edit_layers.js gives
// it layers and their edits as text, and gets the new text through onApply(text) when the user is done.
import { hideCommand } from "./keys.js";
import {
    boxOf, CSS_MODES, handleAt, MAX_SIDE, mirrored, placed, pulled, readEdits, scaled, snapped, tidyName, turn, untouched, writeEdits,
} from "./layer_edits.js";

const HINT = "Drag moves · Shift keeps the direction · Ctrl does not snap · Alt takes the selected layer · Wheel zooms, with Shift it scales";
const HANDLES = [[-1, -1], [0, -1], [1, -1], [1, 0], [1, 1], [0, 1], [-1, 1], [-1, 0]];
const CURSORS = ["nwse-resize", "ns-resize", "nesw-resize", "ew-resize"]; // of the handles in their order, a quarter turn on it repeats
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const REACH = 6; // screen pixels within which a moved layer snaps
const SLACK = 3; // screen pixels that a click may move
const MARGIN = 48; // around the canvas when it is fitted: room for the handles
const [LEAST_ZOOM, MOST_ZOOM] = [0.05, 16];

const ICONS = {
    undo: "M7 4 3 8l4 4M3 8h7a4 4 0 0 1 0 8H7", redo: "M13 4l4 4-4 4M17 8h-7a4 4 0 0 0 0 8h3",
    shown: "M1.5 10S4.5 4.5 10 4.5 18.5 10 18.5 10 15.5 15.5 10 15.5 1.5 10 1.5 10zM10 7.5a2.5 2.5 0 1 0 0 5 2.5 2.5 0 0 0 0-5z",
    hidden: "M3 3l14 14M5 6.2C2.8 7.7 1.5 10 1.5 10s3 5.5 8.5 5.5c1.4 0 2.6-.4 3.7-.9M8 4.7c.6-.1 1.3-.2 2-.2 5.5 0 8.5 5.5 8.5 5.5s-.8 1.5-2.300 2.900",
    across: "M10 2v16M7 5v10H2zM13 5v10h5z", down: "M2 10h16M5 7h10V2zM5 13h10v5z",
    forward: "M10 16V4M5 9l5-5 5 5", backward: "M10 4v12M5 11l5 5 5-5",
};
const icon = (name) => `<svg viewBox="0 0 20 20" aria-hidden="true"><path d="${ICONS[name]}"/></svg>`;

const STYLE = `
* { box-sizing: border-box; }
dialog { --back: var(--comfy-menu-bg, #202225); --deep: var(--comfy-input-bg, #15171b); --text: var(--input-text, #d6d9df); --soft: var(--descrip-text, #a5abb6);
    --edge: var(--border-color, #4a4f59); --mark: #2f86e5;
    padding: 0; border: 1px solid var(--edge); border-radius: 8px; background: var(--back); color: var(--text); overflow: hidden;
    width: min(1500px, 96vw); height: min(1000px, 94vh); max-width: none; max-height: none; font: 13px/1.35 system-ui, sans-serif; user-select: none; -webkit-user-select: none; }
dialog[open] { display: grid; grid-template: auto minmax(0, 1fr) auto / minmax(0, 1fr) 290px; }
dialog::backdrop { background: rgb(0 0 0 / .55); }
.bar { grid-column: 1 / 3; display: flex; flex-wrap: wrap; gap: 6px; align-items: center; padding: 8px 10px; border-bottom: 1px solid var(--edge); }
h2 { margin: 0 10px 0 0; font-size: 15px; }
.gap { flex: 1; }
.zoom { min-width: 48px; text-align: center; font-variant-numeric: tabular-nums; }
button, input, select { font: inherit; color: inherit; background: var(--deep); border: 1px solid var(--edge); border-radius: 5px; min-height: 28px; padding: 2px 8px; }
button { cursor: pointer; display: inline-flex; align-items: center; justify-content: center; gap: 6px; }
button:disabled { opacity: .45; cursor: default; }
button[aria-pressed="true"].toggle { border-color: var(--mark); box-shadow: inset 0 0 0 1px var(--mark); }
button.main { background: var(--mark); border-color: var(--mark); color: #fff; font-weight: 600; padding: 2px 16px; }
:focus-visible { outline: 2px solid var(--mark); outline-offset: 1px; }
svg { width: 16px; height: 16px; fill: none; stroke: currentColor; stroke-width: 1.5; stroke-linecap: round; stroke-linejoin: round; }
.view { position: relative; overflow: hidden; background: var(--deep); touch-action: none; cursor: default; outline-offset: -3px; }
.stage { position: absolute; left: 0; top: 0; transform-origin: 0 0; box-shadow: 0 0 0 calc(1px / var(--zoom)) var(--edge);
    background: repeating-conic-gradient(#888 0 25%, #aaa 0 50%) 0 0 / calc(16px / var(--zoom)) calc(16px / var(--zoom)); }
.pile { position: absolute; inset: 0; overflow: hidden; isolation: isolate; }
.layer { position: absolute; }
.layer img { position: absolute; pointer-events: none; }
.box { position: absolute; left: 0; top: 0; pointer-events: none; border: 1px solid #fff; outline: 1px solid var(--mark); }
.handle { position: absolute; width: 11px; height: 11px; margin: -6px; background: #fff; border: 1px solid var(--mark); pointer-events: auto; touch-action: none; }
.handle::after { content: ""; position: absolute; inset: -6px; }
.small .handle:not(.turn)::after { inset: 0; }
.small .handle:is([data-handle="1"], [data-handle="3"], [data-handle="5"], [data-handle="7"]) { display: none; }
.handle.turn { border-radius: 50%; left: 50%; top: -26px; cursor: grab; }
.stem { position: absolute; left: 50%; top: -22px; height: 22px; border-left: 1px solid var(--mark); }
.guide { position: absolute; background: #ff4fa3; pointer-events: none; }
.guide.x { width: 1px; top: 0; bottom: 0; } .guide.y { height: 1px; left: 0; right: 0; }
.message { position: absolute; inset: 0; display: grid; place-items: center; text-align: center; padding: 24px; font-size: 15px; white-space: pre-line; }
aside { display: flex; flex-direction: column; min-height: 0; border-left: 1px solid var(--edge); }
ol { flex: 1 1 90px; min-height: 90px; margin: 0; padding: 4px; list-style: none; overflow-y: auto; }
li { display: flex; align-items: center; gap: 6px; padding: 3px; border: 1px solid transparent; border-radius: 6px; }
li.selected { border-color: var(--mark); background: color-mix(in srgb, var(--mark) 22%, transparent); }
li.dragged { opacity: .6; }
li.off .pick { opacity: .55; }
li img { width: 34px; height: 34px; object-fit: contain; flex: none; border-radius: 3px; background: repeating-conic-gradient(#888 0 25%, #aaa 0 50%) 0 0 / 8px 8px; }
.eye { padding: 2px 5px; background: none; border-color: transparent; }
.pick { flex: 1; min-width: 0; justify-content: flex-start; background: none; border-color: transparent; text-align: left; }
.pick span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.grip { flex: none; padding: 6px 4px; cursor: grab; touch-action: none; color: var(--soft); letter-spacing: -2px; }
.fields { display: grid; grid-template-columns: 1fr 1fr; gap: 6px 8px; padding: 8px 10px; border-top: 1px solid var(--edge); overflow-y: auto; }
.fields label { display: grid; grid-template-columns: auto minmax(0, 1fr); gap: 6px; align-items: center; }
.fields label > span { color: var(--soft); }
.fields input, .fields select { width: 100%; }
.fields input[type="range"] { padding: 0; }
.fields .wide { grid-column: 1 / 3; }
.fields .opacity { grid-template-columns: auto minmax(0, 1fr) 42px; }
.row { display: flex; gap: 6px; } .row button { flex: 1; }
.status { grid-column: 1 / 3; min-height: 30px; padding: 6px 10px; border-top: 1px solid var(--edge); color: var(--soft); overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.status.told { color: var(--text); font-weight: 600; }
[hidden] { display: none !important; }
@media (max-width: 700px) { dialog[open] { grid-template: auto minmax(0, 1fr) minmax(0, 1fr) auto / minmax(0, 1fr); } .bar, .status { grid-column: 1; } aside { border: 0; border-top: 1px solid var(--edge); } }
`;

const FORM = `
    <label class="wide"><span>Name</span><input name="name" type="text" autocomplete="off"></label>
    <label><span>X</span><input name="x" type="number" step="1"></label><label><span>Y</span><input name="y" type="number" step="1"></label>
    <label><span>W</span><input name="w" type="number" step="1" min="1" aria-label="Width"></label><label><span>H</span><input name="h" type="number" step="1" min="1" aria-label="Height"></label>
    <label class="wide"><span>Rotation</span><input name="rotation" type="number" step="1" min="-360" max="360" aria-label="Rotation in degrees clockwise"></label>
    <label class="wide opacity"><span>Opacity</span><input name="opacity" type="range" min="0" max="100" step="1"><output></output></label>
    <label class="wide"><span>Blend</span><select name="blend_mode" aria-label="Blend mode"></select></label>
    <div class="row wide">
        <button type="button" class="across" title="Flip left and right" aria-label="Flip left and right">${icon("across")}</button>
        <button type="button" class="down" title="Flip top and bottom" aria-label="Flip top and bottom">${icon("down")}</button>
        <button type="button" class="forward" title="Bring forward" aria-label="Bring forward">${icon("forward")}</button>
        <button type="button" class="backward" title="Send backward" aria-label="Send backward">${icon("backward")}</button>
        <button type="button" class="reset" title="As it comes into the node">Reset</button>
    </div>`;

const PARTS = [
    "undo", "redo", "out", "zoom", "in", "fit", "snap", "cancel", "apply", "view", "stage", "pile", "box", "list", "fields", "status", "message", "side",
    "across", "down", "forward", "backward", "reset",
];

const html = (text) => Object.assign(document.createElement("template"), { innerHTML: text }).content.firstElementChild;

export class LayerEditor {
    constructor(onApply) {
        this.onApply = onApply;
        this.element = document.createElement("div");
        this.element.className = "strata-layer-editor";
        this.build();
        this.listen();
        document.body.append(this.element);
        this.dialog.showModal();
        this.say("Loading the layers …");
    }

    build() {
        const root = this.element.attachShadow({ mode: "open" });
        root.innerHTML = `<style>${STYLE}</style>
            <dialog aria-label="Edit layers">
                <div class="bar">
                    <h2>Edit layers</h2>
                    <button type="button" class="undo" title="Undo (Ctrl+Z)" aria-label="Undo">${icon("undo")}</button>
                    <button type="button" class="redo" title="Redo (Ctrl+Shift+Z)" aria-label="Redo">${icon("redo")}</button>
                    <button type="button" class="out" aria-label="Zoom out">−</button>
                    <button type="button" class="zoom" title="Show at 100 %" aria-label="Show at 100 %">100 %</button>
                    <button type="button" class="in" aria-label="Zoom in">+</button>
                    <button type="button" class="fit" title="Show the whole canvas">Fit</button>
                    <button type="button" class="snap toggle" title="Snap to the edges and the middle of the canvas" aria-pressed="true">Snap</button>
                    <span class="gap"></span>
                    <button type="button" class="cancel" title="Close and change nothing (Escape)">Cancel</button>
                    <button type="button" class="apply main" title="Write the edits to the node (Enter)">Apply</button>
                </div>
                <div class="view" tabindex="0" role="application" aria-label="Canvas. Arrow keys move the selected layer, with Shift by 10; Page Up and Page Down select another.">
                    <div class="stage"><div class="pile"></div></div><div class="box" hidden></div><div class="guide x" hidden></div><div class="guide y" hidden></div>
                    <div class="message"></div>
                </div>
                <aside class="side"><ol class="list" aria-label="Layers, the front one first"></ol><div class="fields">${FORM}</div></aside>
                <div class="status" role="status"></div>
            </dialog>`;
        this.dialog = root.querySelector("dialog");
        for (const name of PARTS) this[`${name}El`] = root.querySelector(`.${name}`);
        this.guideEls = [root.querySelector(".guide.x"), root.querySelector(".guide.y")];
        this.inputs = Object.fromEntries([...root.querySelectorAll("[name]")].map((input) => [input.name, input]));
        const handles = HANDLES.map(([x, y], i) => `<div class="handle" data-handle="${i}" style="left: ${50 + 50 * x}%; top: ${50 + 50 * y}%"></div>`);
        this.boxEl.innerHTML = `<div class="stem"></div>${handles.join("")}<div class="handle turn"></div>`;
        this.handleEls = [...this.boxEl.querySelectorAll("[data-handle]")];
    }

    // What is edited

    /** A message in place of the canvas, or the canvas when it is empty. */
    say(message) {
        this.messageEl.textContent = message;
        this.messageEl.hidden = !message;
        this.stageEl.hidden = this.sideEl.inert = this.applyEl.disabled = Boolean(message);
        for (const part of [this.undoEl, this.redoEl, this.outEl, this.zoomEl, this.inEl, this.fitEl, this.snapEl]) part.disabled = Boolean(message);
        (message ? this.cancelEl : this.viewEl).focus();
    }

    /** canvas: [width, height]. layers: see layer_edits.js, each with its loaded `picture`, an img element. text: their edits. */
    show(canvas, layers, text, notes = []) {
        Object.assign(this, { canvas, layers });
        const read = readEdits(text, layers);
        this.state = read ? { values: read.values, order: read.order } : untouched(layers);
        this.notes = [...notes];
        if (!read) this.notes.push("The edits on the node cannot be read; Apply writes new ones in their place.");
        else if (read.missing.length) this.notes.push(`Apply drops the edits of ${read.missing.join(", ")}: no such layer is here.`);
        this.history = [this.snapshot()];
        this.step = 0;
        this.selected = this.state.order.at(-1);
        this.layerEls = layers.map((layer) => this.layerElement(layer));
        this.rowEls = layers.map((layer, i) => this.rowElement(layer, i));
        this.pileEl.replaceChildren(...this.layerEls);
        Object.assign(this.stageEl.style, { width: `${canvas[0]}px`, height: `${canvas[1]}px` });
        this.say("");
        this.fit();
        this.tell(this.notes.join(" "));
    }

    layerElement(layer) {
        const element = document.createElement("div");
        element.className = "layer";
        const [left, top, right, bottom] = layer.box.map((part) => 100 * part);
        Object.assign(layer.picture.style, { left: `${left}%`, top: `${top}%`, width: `${right - left}%`, height: `${bottom - top}%` });
        element.append(layer.picture);
        return element;
    }

    rowElement(layer, index) {
        const row = html(`<li><button type="button" class="eye"></button><img alt="" draggable="false">
            <button type="button" class="pick"><span></span></button><span class="grip" aria-hidden="true">⋮⋮</span></li>`);
        row.dataset.index = index;
        row.querySelector("img").src = layer.picture.src;
        return row;
    }

    get value() { return this.state.values[this.selected]; }
    get layer() { return this.layers[this.selected]; }
    get box() { return boxOf(this.layer, this.value); }

    set(fields) {
        this.state.values[this.selected] = { ...this.value, ...fields };
        this.draw();
    }

    put(box) {
        this.set(placed(this.layer, this.value, box));
    }

    select(index, focus) {
        this.selected = index;
        this.draw();
        if (focus) this.rowEls[index].querySelector(".pick").focus();
        this.rowEls[index].scrollIntoView({ block: "nearest" });
    }

    // Undo within the dialog

    snapshot() {
        return JSON.stringify(this.state);
    }

    /** One step for what has changed since the last one; `kind` joins quick repetitions, as the notches of a wheel. */
    commit(kind = "") {
        const now = this.snapshot();
        if (now === this.history[this.step]) return;
        const joins = kind && kind === this.lastKind && performance.now() - this.lastTime < 600 && this.step === this.history.length - 1 && this.step > 0;
        if (!joins) this.step++;
        this.history.splice(this.step, Infinity, now);
        [this.lastKind, this.lastTime] = [kind, performance.now()];
        this.tell("");
        this.draw();
    }

    back(steps) {
        const step = Math.min(this.history.length - 1, Math.max(0, this.step + steps));
        this.revert(step);
    }

    /** To a step of the history; without one, to where the last gesture began. */
    revert(step = this.step) {
        this.step = step;
        this.lastKind = "";
        this.state = JSON.parse(this.history[step]);
        this.draw();
    }

    // What the user does

    listen() {
        const { dialog, viewEl: view, listEl: list } = this;
        // Whatever happens in the dialog is not for the graph behind it
        for (const name of ["pointerdown", "pointermove", "pointerup", "wheel", "keyup", "copy", "cut", "paste", "contextmenu", "dblclick", "click", "dragover", "drop"]) {
            dialog.addEventListener(name, (event) => event.stopPropagation());
        }
        dialog.addEventListener("keydown", (event) => this.key(event));
        dialog.addEventListener("cancel", (event) => { event.preventDefault(); this.close(); });
        view.addEventListener("pointerdown", (event) => this.press(event));
        view.addEventListener("pointermove", (event) => this.drag(event));
        view.addEventListener("pointerup", (event) => this.release(event));
        view.addEventListener("pointercancel", (event) => this.release(event, true));
        view.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
        view.addEventListener("contextmenu", (event) => event.preventDefault());
        list.addEventListener("pointerdown", (event) => this.pressRow(event));
        list.addEventListener("pointermove", (event) => this.dragRow(event));
        for (const name of ["pointerup", "pointercancel"]) list.addEventListener(name, (event) => this.releaseRow(event));
        list.addEventListener("click", (event) => this.clickRow(event));
        list.addEventListener("dblclick", () => this.rename());
        this.undoEl.onclick = () => this.back(-1);
        this.redoEl.onclick = () => this.back(1);
        this.outEl.onclick = () => this.zoomTo(this.zoom / 1.25);
        this.inEl.onclick = () => this.zoomTo(this.zoom * 1.25);
        this.zoomEl.onclick = () => { this.centre(1); };
        this.fitEl.onclick = () => this.fit();
        this.snapEl.onclick = () => this.snapEl.setAttribute("aria-pressed", String(!this.snaps()));
        this.cancelEl.onclick = () => this.close();
        this.applyEl.onclick = () => this.apply();
        this.acrossEl.onclick = () => this.flip(true);
        this.downEl.onclick = () => this.flip(false);
        this.forwardEl.onclick = () => this.reorder(1);
        this.backwardEl.onclick = () => this.reorder(-1);
        this.resetEl.onclick = () => { this.set(untouched(this.layers).values[this.selected]); this.commit(); };
        for (const input of Object.values(this.inputs)) {
            if (input.type === "range") input.oninput = () => this.typed(input);
            input.onchange = () => { this.typed(input); this.commit(); };
        }
        this.observer = new ResizeObserver(() => this.fitted && this.fit());
        this.observer.observe(view);
    }

    snaps() {
        return this.snapEl.getAttribute("aria-pressed") === "true";
    }

    flip(across) {
        this.set(mirrored(this.layer, this.value, across));
        this.commit();
    }

    reorder(by) {
        const place = this.state.order.indexOf(this.selected);
        this.moveTo(place + by);
        this.commit();
    }

    /** The selected layer to a place of the order, 0 at the back. */
    moveTo(place) {
        const others = this.state.order.filter((index) => index !== this.selected);
        others.splice(Math.max(0, place), 0, this.selected);
        this.state.order = others;
        this.draw();
    }

    rename() {
        this.inputs.name.focus();
        this.inputs.name.select();
    }

    typed({ name, value, type }) {
        if (name === "opacity") this.set({ opacity: Number(value) / 100 });
        else if (name === "blend_mode") this.set({ blend_mode: value });
        else if (name === "name") this.set({ name: tidyName(value).trim() || this.value.name });
        else if (type === "number" && value !== "") this.number(name, Number(value));
        else this.draw();
    }

    number(name, number) {
        const { box, value } = this;
        if (name === "rotation") this.put({ ...box, angle: turn(number) });
        else if (name === "x" || name === "y") this.set({ [name]: Math.min(MAX_SIDE, Math.max(-MAX_SIDE, Math.round(number))) });
        else this.put({ ...box, [name]: (box[name] * number) / value[name] });
    }

    key(event) {
        event.stopPropagation();
        const { key, shiftKey } = event;
        const command = hideCommand(event);
        const target = event.composedPath()[0];
        const typing = target.matches("input:not([type=range]), select");
        if (key === "Escape") this.gesture || this.rowGesture ? this.abandon() : this.close();
        else if (!this.layers || this.applyEl.disabled) return;
        else if (key === "Enter" && command) { target.blur?.(); this.apply(); }
        else if (key === "Enter" && typing) { target.blur(); this.viewEl.focus(); }
        else if (key === "Enter" && !target.matches("button")) this.apply();
        else if (command && !(typing && target.type === "text") && (key.toLowerCase() === "z" || (key.toLowerCase() === "y" && !shiftKey))) {
            this.abandon();
            this.back(key.toLowerCase() === "z" && !shiftKey ? -1 : 1);
        } else if (ARROWS[key] && !target.matches("input, select") && !command) {
            const [dx, dy] = ARROWS[key].map((step) => step * (shiftKey ? 10 : 1));
            this.number("x", this.value.x + dx);
            this.number("y", this.value.y + dy);
            this.commit();
            this.tell(`${this.value.name}: x ${this.value.x}, y ${this.value.y}`);
        } else if ((key === "PageUp" || key === "PageDown") && !target.matches("input, select")) {
            const { order } = this.state;
            const place = order.indexOf(this.selected) + (key === "PageUp" ? 1 : -1);
            if (order[place] !== undefined) this.select(order[place], target.matches(".pick"));
        } else if (key === "F2") this.rename();
        else if (!typing && command && key === "0") this.fit();
        else if (!typing && command && key === "1") this.centre(1);
        else return;
        event.preventDefault();
    }

    // On the canvas

    /** A pointer's place on the canvas, in its pixels. */
    at(event) {
        const view = this.viewEl.getBoundingClientRect();
        return [(event.clientX - view.left - this.pan[0]) / this.zoom, (event.clientY - view.top - this.pan[1]) / this.zoom];
    }

    press(event) {
        if (!this.layers || this.applyEl.disabled) return;
        this.viewEl.focus({ preventScroll: true });
        event.preventDefault();
        this.viewEl.setPointerCapture(event.pointerId);
        this.pointers = { ...this.pointers, [event.pointerId]: [event.clientX, event.clientY] };
        if (Object.keys(this.pointers).length > 1) return this.pinch();
        const start = this.at(event);
        const handle = event.altKey ? null : event.target.closest(".handle");
        if (event.button === 1) this.begin("pan", event);
        else if (event.button !== 0) return;
        else if (handle?.matches(".turn")) this.begin("turn", event, start);
        else if (handle) this.begin("pull", event, start, HANDLES[handle.dataset.handle]);
        else {
            const hit = event.altKey ? this.selected : this.hit(start);
            if (hit === undefined) return this.begin("pan", event);
            this.select(hit);
            this.begin("move", event, start);
        }
    }

    begin(kind, event, start, handle) {
        const from = [event.clientX, event.clientY];
        this.gesture = { kind, id: event.pointerId, from, start, handle, box: this.box, value: this.value, pan: [...this.pan], moved: false };
    }

    drag(event) {
        if (!this.pointers?.[event.pointerId]) return;
        const before = this.pointers;
        this.pointers = { ...before, [event.pointerId]: [event.clientX, event.clientY] };
        const { gesture } = this;
        if (gesture?.kind === "pinch") return this.spread(before);
        if (!gesture || gesture.id !== event.pointerId) return;
        const far = [event.clientX - gesture.from[0], event.clientY - gesture.from[1]];
        if (!gesture.moved && Math.hypot(...far) < SLACK) return;
        gesture.moved = true;
        if (gesture.kind === "pan") return this.move(gesture.pan[0] + far[0], gesture.pan[1] + far[1]);
        const point = this.at(event);
        const box = this[`${gesture.kind}Box`](gesture, [point[0] - gesture.start[0], point[1] - gesture.start[1]], point, event);
        this.set(placed(this.layer, gesture.value, box));
    }

    moveBox({ box }, [dx, dy], _, event) {
        if (event.shiftKey) [dx, dy] = Math.abs(dx) > Math.abs(dy) ? [dx, 0] : [0, dy];
        const moved = { ...box, x: box.x + dx, y: box.y + dy };
        if (!this.snaps() || event.ctrlKey || event.metaKey) return this.guide([null, null], moved);
        const found = snapped(moved, this.canvas, REACH / this.zoom);
        if (event.shiftKey) found.box = { ...found.box, ...(dx ? { y: box.y } : { x: box.x }) };
        return this.guide(found.lines, found.box);
    }

    pullBox({ box, handle }, [dx, dy], _, event) {
        const [x, y] = handleAt(box, handle);
        return pulled(box, handle, [x + dx, y + dy], event.shiftKey);
    }

    turnBox({ box, start }, _, point, event) {
        const [from, to] = [start, point].map(([x, y]) => (Math.atan2(y - box.y, x - box.x) * 180) / Math.PI);
        let angle = box.angle + to - from;
        const right = 90 * Math.round(angle / 90);
        if (event.shiftKey) angle = 15 * Math.round(angle / 15);
        else if (this.snaps() && !event.ctrlKey && !event.metaKey && Math.abs(angle - right) < 2) angle = right;
        return { ...box, angle };
    }

    /** Shows the lines that were met, and gives the box on. */
    guide(lines, box) {
        this.lines = lines;
        return box;
    }

    release(event, cancelled = false) {
        if (!this.pointers?.[event.pointerId]) return;
        const { [event.pointerId]: _, ...left } = this.pointers;
        this.pointers = left;
        const { gesture } = this;
        if (!gesture || (gesture.kind === "pinch" ? Object.keys(left).length : gesture.id !== event.pointerId)) return;
        this.gesture = this.lines = null;
        if (cancelled && gesture.kind !== "pan" && gesture.kind !== "pinch") this.revert();
        this.commit();
        this.draw();
    }

    /** What a gesture or a drag in the list has changed so far goes back. */
    abandon() {
        if (this.gesture?.kind === "pan") this.move(...this.gesture.pan);
        this.gesture = this.rowGesture = this.lines = null;
        this.revert();
    }

    /** A second finger: no layer is moved from here on, the view is. */
    pinch() {
        this.abandon();
        this.gesture = { kind: "pinch" };
    }

    spread(before) {
        if (Object.keys(this.pointers).length < 2) return;
        const [a, b] = [before, this.pointers].map((pointers) => {
            const [[x, y], [u, v]] = Object.values(pointers);
            return { x: (x + u) / 2, y: (y + v) / 2, apart: Math.hypot(x - u, y - v) };
        });
        this.move(this.pan[0] + b.x - a.x, this.pan[1] + b.y - a.y);
        this.zoomTo(this.zoom * (b.apart / Math.max(a.apart, 1)), [b.x, b.y]);
    }

    /** The nearest layer that is seen at a point of the canvas; undefined when there is none. */
    hit(point) {
        return [...this.state.order].reverse().find((index) => this.state.values[index].visible && this.opaque(index, point));
    }

    opaque(index, [x, y]) {
        const { picture } = this.layers[index];
        const box = boxOf(this.layers[index], this.state.values[index]);
        const [u, v] = handleAt({ x: 0, y: 0, w: 2 * (x - box.x), h: 2 * (y - box.y), angle: -box.angle }, [1, 1]);
        const { flip_h, flip_v } = this.state.values[index];
        const column = Math.floor(picture.naturalWidth * (0.5 + (flip_h ? -u : u) / box.w));
        const row = Math.floor(picture.naturalHeight * (0.5 + (flip_v ? -v : v) / box.h));
        if (column < 0 || row < 0 || column >= picture.naturalWidth || row >= picture.naturalHeight) return false;
        this.probe ??= Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true });
        this.probe.clearRect(0, 0, 1, 1);
        this.probe.drawImage(picture, column, row, 1, 1, 0, 0, 1, 1);
        return this.probe.getImageData(0, 0, 1, 1).data[3] > 25;
    }

    wheel(event) {
        event.preventDefault();
        if (!this.layers || this.gesture) return;
        const notches = -(event.deltaY || event.deltaX) / 100; // browsers turn a wheel with Shift sideways
        if (event.shiftKey) {
            this.put(scaled(this.box, 1.05 ** notches));
            this.commit("wheel");
        } else this.zoomTo(this.zoom * 1.15 ** notches, [event.clientX, event.clientY]);
    }

    // The view

    move(x, y) {
        this.fitted = false;
        this.pan = [Math.round(x), Math.round(y)]; // whole pixels, or the picture would be blurred
        this.draw();
    }

    zoomTo(zoom, [x, y] = this.middle()) {
        const next = Math.min(MOST_ZOOM, Math.max(LEAST_ZOOM, zoom));
        const view = this.viewEl.getBoundingClientRect();
        const [left, top] = [x - view.left, y - view.top];
        const grown = next / this.zoom;
        this.zoom = next;
        this.move(left - (left - this.pan[0]) * grown, top - (top - this.pan[1]) * grown);
    }

    middle() {
        const view = this.viewEl.getBoundingClientRect();
        return [view.left + view.width / 2, view.top + view.height / 2];
    }

    centre(zoom) {
        this.zoom = zoom;
        const { clientWidth, clientHeight } = this.viewEl;
        this.move((clientWidth - this.canvas[0] * zoom) / 2, (clientHeight - this.canvas[1] * zoom) / 2);
    }

    fit() {
        const { clientWidth, clientHeight } = this.viewEl;
        const [width, height] = this.canvas;
        this.centre(Math.max(LEAST_ZOOM, Math.min((clientWidth - 2 * MARGIN) / width, (clientHeight - 2 * MARGIN) / height, 4)));
        this.fitted = true; // until the user zooms or moves the view, a window of another size is fitted again
    }

    // In the list

    pressRow(event) {
        const row = event.target.closest("li");
        if (!row || event.button !== 0 || event.target.closest(".eye")) return;
        if (event.pointerType === "touch" && !event.target.closest(".grip")) return; // a finger scrolls the list elsewhere
        this.rowGesture = { index: Number(row.dataset.index), from: event.clientY, moved: false };
    }

    dragRow(event) {
        const { rowGesture: gesture } = this;
        if (!gesture || (!gesture.moved && Math.abs(event.clientY - gesture.from) < SLACK)) return;
        if (!gesture.moved) {
            gesture.moved = true;
            this.listEl.setPointerCapture(event.pointerId);
            this.select(gesture.index);
        }
        const others = [...this.listEl.children].filter((row) => Number(row.dataset.index) !== gesture.index);
        const above = others.filter((row) => event.clientY > row.getBoundingClientRect().top + row.offsetHeight / 2).length;
        this.moveTo(others.length - above);
    }

    releaseRow(event) {
        const { rowGesture: gesture } = this;
        this.rowGesture = null;
        if (!gesture?.moved) return;
        if (event.type === "pointercancel") this.revert();
        else this.commit();
        this.draw();
    }

    clickRow(event) {
        const row = event.target.closest("li");
        if (!row) return;
        this.select(Number(row.dataset.index));
        if (!event.target.closest(".eye")) return;
        this.set({ visible: !this.value.visible });
        this.commit();
    }

    // Drawing

    tell(text) {
        this.statusEl.textContent = text || HINT;
        this.statusEl.title = this.statusEl.textContent;
        this.statusEl.classList.toggle("told", Boolean(text));
    }

    draw() {
        const { values, order } = this.state;
        this.stageEl.style.transform = `translate(${this.pan[0]}px, ${this.pan[1]}px) scale(${this.zoom})`;
        this.stageEl.style.setProperty("--zoom", this.zoom);
        values.forEach((value, index) => this.drawLayer(index, value, order.indexOf(index)));
        this.drawRows();
        this.drawBox();
        this.drawFields();
        this.zoomEl.textContent = `${Math.round(100 * this.zoom)} %`;
        this.enable(this.undoEl, this.step > 0);
        this.enable(this.redoEl, this.step < this.history.length - 1);
        this.guideEls.forEach((line, axis) => {
            const met = this.lines?.[axis] ?? null;
            line.hidden = met === null;
            line.style[axis ? "top" : "left"] = `${this.pan[axis] + met * this.zoom}px`;
        });
    }

    drawLayer(index, value, place) {
        const flips = `scale(${value.flip_h ? -1 : 1}, ${value.flip_v ? -1 : 1})`;
        Object.assign(this.layerEls[index].style, {
            left: `${value.x}px`, top: `${value.y}px`, width: `${value.w}px`, height: `${value.h}px`, transform: `rotate(${value.rotation}deg) ${flips}`,
            opacity: value.opacity, display: value.visible ? "" : "none", zIndex: place,
            mixBlendMode: CSS_MODES.includes(value.blend_mode) ? value.blend_mode : "normal",
        });
    }

    drawRows() {
        const wanted = [...this.state.order].reverse().map((index) => this.rowEls[index]);
        if (wanted.some((row, i) => this.listEl.children[i] !== row)) {
            const focused = this.element.shadowRoot.activeElement;
            this.listEl.replaceChildren(...wanted);
            focused?.focus({ preventScroll: true });
        }
        this.state.values.forEach(({ name, visible }, index) => {
            const row = this.rowEls[index];
            const [eye, pick] = [row.querySelector(".eye"), row.querySelector(".pick")];
            row.className = `${index === this.selected ? "selected" : ""} ${visible ? "" : "off"} ${this.rowGesture?.moved && index === this.selected ? "dragged" : ""}`;
            if (eye.ariaPressed !== String(visible)) eye.innerHTML = icon(visible ? "shown" : "hidden");
            eye.ariaPressed = String(visible);
            eye.ariaLabel = eye.title = `Show ${name}`;
            pick.firstElementChild.textContent = pick.title = name;
            pick.ariaCurrent = String(index === this.selected);
        });
    }

    drawBox() {
        const { x, y, w, h, angle } = this.box;
        const [wide, high] = [Math.max(w * this.zoom, 1), Math.max(h * this.zoom, 1)];
        const [left, top] = [this.pan[0] + x * this.zoom - wide / 2, this.pan[1] + y * this.zoom - high / 2];
        this.boxEl.hidden = false;
        this.boxEl.classList.toggle("small", Math.min(wide, high) < 36); // room to take hold of the layer itself
        Object.assign(this.boxEl.style, { width: `${wide}px`, height: `${high}px`, transform: `translate(${left}px, ${top}px) rotate(${angle}deg)` });
        const eighth = Math.round(angle / 45);
        this.handleEls.forEach((handle, i) => { handle.style.cursor = CURSORS[(((i + eighth) % 4) + 4) % 4]; });
    }

    drawFields() {
        const { inputs, value } = this;
        const focused = this.element.shadowRoot.activeElement;
        for (const [name, input] of Object.entries(inputs)) {
            if (name === "blend_mode" || (input === focused && input.type === "text")) continue;
            input.value = name === "opacity" ? Math.round(100 * value.opacity) : value[name];
        }
        if (focused !== inputs.name) inputs.name.value = value.name;
        this.fieldsEl.querySelector("output").textContent = `${inputs.opacity.value} %`;
        this.drawModes(value.blend_mode);
        const place = this.state.order.indexOf(this.selected);
        this.enable(this.forwardEl, place < this.layers.length - 1);
        this.enable(this.backwardEl, place > 0);
    }

    /** A button that goes while it has the focus would take the keys along. */
    enable(button, on) {
        if (!on && button === this.element.shadowRoot.activeElement) this.viewEl.focus();
        button.disabled = !on;
    }

    /** CSS's modes, and the layer's own where that is another: it is shown as normal. */
    drawModes(mode) {
        const modes = CSS_MODES.includes(mode) ? CSS_MODES : [...CSS_MODES, mode];
        const select = this.inputs.blend_mode;
        if (select.options.length !== modes.length || select.options[modes.length - 1].value !== modes.at(-1)) {
            select.replaceChildren(...modes.map((one) => new Option(CSS_MODES.includes(one) ? one : `${one} (shown as normal)`, one)));
        }
        select.value = mode;
    }

    // The end

    apply() {
        this.commit();
        this.onApply(writeEdits(this.state, this.layers));
        this.close();
    }

    close() {
        this.observer.disconnect();
        this.dialog.close();
        this.element.remove();
    }
}
