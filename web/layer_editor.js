// The layer editor: a dialog over the page in which layers are arranged by hand. It knows nothing of ComfyUI:
// edit_layers.js gives it layers and their edits as text, and gets the new text through onApply(text).
import { hideCommand } from "./keys.js";
import { icon, MARKUP, PARTS, ROW } from "./layer_editor_markup.js";
import {
    along, boxOf, clamp, CSS_MODES, handleAt, MAX_SIDE, mirrored, placed, pulled, readEdits, rotated, scaled, snapped,
    tidyName, turn, untouched, writeEdits,
} from "./layer_edits.js";

const HINT = "Drag moves · Shift keeps the direction · Ctrl does not snap · Alt takes the selected layer"
    + " · Wheel zooms, with Shift it scales";
const HANDLES = [[-1, -1], [0, -1], [1, -1], [1, 0], [1, 1], [0, 1], [-1, 1], [-1, 0]];
const CURSORS = ["nwse-resize", "ns-resize", "nesw-resize", "ew-resize"]; // of the handles in their order
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const OURS = [
    "pointerdown", "pointermove", "pointerup", "wheel", "keyup", "copy", "cut", "paste", "contextmenu", "dblclick",
    "click", "dragover", "drop",
];
const REACH = 6; // screen pixels within which a moved layer snaps
const SLACK = 3; // screen pixels that a click may move
const MARGIN = 48; // around the canvas when it is fitted: room for the handles
const [LEAST_ZOOM, MOST_ZOOM] = [0.05, 16];

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
        root.innerHTML = MARKUP;
        this.dialog = root.querySelector("dialog");
        for (const name of PARTS) this[`${name}El`] = root.querySelector(`.${name}`);
        this.guideEls = [root.querySelector(".guide.x"), root.querySelector(".guide.y")];
        this.inputs = Object.fromEntries([...root.querySelectorAll("[name]")].map((input) => [input.name, input]));
        const at = ([x, y]) => `left: ${50 + 50 * x}%; top: ${50 + 50 * y}%`;
        const handles = HANDLES.map((place, i) => `<div class="handle" data-handle="${i}" style="${at(place)}"></div>`);
        this.boxEl.innerHTML = `<div class="stem"></div>${handles.join("")}<div class="handle turn"></div>`;
        this.handleEls = [...this.boxEl.querySelectorAll("[data-handle]")];
    }

    // What is edited

    /** A message in place of the canvas, or the canvas when it is empty. */
    say(message) {
        this.messageEl.textContent = message;
        this.messageEl.hidden = !message;
        this.stageEl.hidden = this.sideEl.inert = this.applyEl.disabled = Boolean(message);
        const needLayers = ["undo", "redo", "out", "zoom", "in", "fit", "snap"];
        for (const name of needLayers) this[`${name}El`].disabled = Boolean(message);
        (message ? this.cancelEl : this.viewEl).focus();
    }

    /**
     * canvas: [width, height]. layers: see layer_edits.js, each with its loaded `picture`, an img element. text: their
     * edits. notes: sentences to begin with.
     */
    show(canvas, layers, text, notes = []) {
        Object.assign(this, { canvas, layers });
        const read = readEdits(text, layers);
        this.state = read ? { values: read.values, order: read.order } : untouched(layers);
        const missing = [...new Set(read?.missing)].join(", ");
        if (!read) notes.push("The edits on the node cannot be read; Apply writes new ones in their place.");
        else if (missing) notes.push(`Apply drops the edits of ${missing}: no such layer is here.`);
        this.history = [this.snapshot()];
        this.step = 0;
        this.effects = new Set(layers.flatMap(({ bound = [] }) => bound));
        this.selected = this.state.order.findLast((index) => !this.effects.has(index)) ?? this.state.order.at(-1);
        this.layerEls = layers.map((layer) => this.layerElement(layer));
        this.rowEls = layers.map((layer, i) => this.rowElement(layer, i));
        this.pileEl.replaceChildren(...this.layerEls);
        Object.assign(this.stageEl.style, { width: `${canvas[0]}px`, height: `${canvas[1]}px` });
        this.say("");
        this.fit();
        this.tell(notes.join(" "));
    }

    layerElement(layer) {
        const element = document.createElement("div");
        element.className = "layer";
        const [left, top, right, bottom] = layer.box.map((part) => 100 * part);
        const [width, height] = [`${right - left}%`, `${bottom - top}%`];
        Object.assign(layer.picture.style, { left: `${left}%`, top: `${top}%`, width, height });
        element.append(layer.picture);
        return element;
    }

    rowElement(layer, index) {
        const row = html(ROW);
        row.dataset.index = index;
        row.querySelector("img").src = layer.picture.src;
        return row;
    }

    get value() { return this.state.values[this.selected]; }
    get layer() { return this.layers[this.selected]; }
    get box() { return boxOf(this.layer, this.value); }

    set(fields) {
        const { values } = this.state;
        values[this.selected] = { ...this.value, ...fields };
        const before = JSON.parse(this.history[this.step]).values;
        for (const [i, value] of along(this.layers, before, this.selected, this.value)) values[i] = value;
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
        const joins = kind && kind === this.lastKind && performance.now() - this.lastTime < 600;
        if (!joins) this.step++;
        this.history.splice(this.step, Infinity, now);
        [this.lastKind, this.lastTime] = [kind, performance.now()];
        this.tell("");
        this.draw();
    }

    back(steps) {
        this.revert(clamp(this.step + steps, 0, this.history.length - 1));
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
        for (const name of OURS) dialog.addEventListener(name, (event) => event.stopPropagation());
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
        list.addEventListener("pointerup", (event) => this.releaseRow(event));
        list.addEventListener("pointercancel", (event) => this.releaseRow(event));
        list.addEventListener("click", (event) => this.clickRow(event));
        list.addEventListener("dblclick", () => this.rename());
        this.undoEl.onclick = () => this.back(-1);
        this.redoEl.onclick = () => this.back(1);
        this.outEl.onclick = () => this.zoomTo(this.zoom / 1.25);
        this.inEl.onclick = () => this.zoomTo(this.zoom * 1.25);
        this.zoomEl.onclick = () => this.actual();
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

    /** One step forward or backward, past the next layer with all of its effects. */
    reorder(by) {
        const { staying } = this;
        let { place } = this;
        const next = () => staying[by > 0 ? place : place - 1];
        const together = this.effects.has(this.selected) ? [next()] : this.group(next());
        while (together.includes(next())) place += by;
        this.moveTo(place);
        this.commit();
    }

    /** A layer's index, or those of an object with its effects. */
    group(index) {
        const lead = this.layers.findIndex(({ bound = [] }, i) => bound.length && (i === index || bound.includes(index)));
        return lead < 0 ? [index] : [lead, ...this.layers[lead].bound];
    }

    /** Whether a layer moves when the selected one does: itself and its effects. */
    moves(index) {
        return index === this.selected || Boolean(this.layer.bound?.includes(index));
    }

    get staying() { return this.state.order.filter((index) => !this.moves(index)); }

    /** How many of the layers that stay are behind the selected one. */
    get place() {
        const { order } = this.state;
        return order.slice(0, order.indexOf(this.selected)).filter((index) => !this.moves(index)).length;
    }

    /** The selected layer, with its effects around it, to a place among the others, 0 at the back. */
    moveTo(place) {
        const others = this.staying;
        others.splice(Math.max(0, place), 0, ...this.state.order.filter((index) => this.moves(index)));
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
        else if (name === "x" || name === "y") this.set({ [name]: clamp(Math.round(number), -MAX_SIDE, MAX_SIDE) });
        else this.put({ ...box, [name]: (box[name] * number) / value[name] });
    }

    key(event) {
        event.stopPropagation();
        const command = hideCommand(event);
        const target = event.composedPath()[0];
        if (event.key === "Escape") {
            if (this.gesture || this.rowGesture) this.abandon();
            else this.close();
        } else if (!this.layers || !this.keyed(event, command, target)) return;
        event.preventDefault();
    }

    /** What a key does to the layers; false when it does nothing. */
    keyed({ key, shiftKey }, command, target) {
        const field = target.matches("input, select");
        const typing = field && target.type !== "range";
        if (key === "Enter") return this.enter(command, typing, target);
        if (command && target.type !== "text" && "zy".includes(key.toLowerCase())) {
            this.abandon();
            this.back(key.toLowerCase() === "z" && !shiftKey ? -1 : 1);
        } else if (command && "01".includes(key)) this[key === "0" ? "fit" : "actual"]();
        else if (key === "F2") this.rename();
        else if (field || command) return false;
        else if (ARROWS[key]) this.nudge(ARROWS[key].map((step) => step * (shiftKey ? 10 : 1)));
        else if (key === "PageUp") this.selectNext(1, target.matches(".pick"));
        else if (key === "PageDown") this.selectNext(-1, target.matches(".pick"));
        else return false;
        return true;
    }

    enter(command, typing, target) {
        if (typing) target.blur(); // which takes over what was typed
        if (typing && !command) this.viewEl.focus();
        else if (command || !target.matches("button")) this.apply();
        else return false;
        return true;
    }

    nudge([dx, dy]) {
        this.number("x", this.value.x + dx);
        this.number("y", this.value.y + dy);
        this.commit();
        this.tell(`${this.value.name}: x ${this.value.x}, y ${this.value.y}`);
    }

    selectNext(by, focus) {
        const next = this.state.order[this.state.order.indexOf(this.selected) + by];
        if (next !== undefined) this.select(next, focus);
    }

    // On the canvas

    /** A pointer's place on the canvas, in its pixels. */
    at(event) {
        const view = this.viewEl.getBoundingClientRect();
        const [x, y] = [event.clientX - view.left, event.clientY - view.top];
        return [(x - this.pan[0]) / this.zoom, (y - this.pan[1]) / this.zoom];
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
        const { box, value, pan } = this;
        this.gesture = { kind, id: event.pointerId, from, start, handle, box, value, pan, moved: false };
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
        const by = [point[0] - gesture.start[0], point[1] - gesture.start[1]];
        const box = this[`${gesture.kind}Box`](gesture, by, point, event);
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

    /** The nearest layer that is seen at a point of the canvas, of an object with effects the object; undefined when
     * there is none. */
    hit(point) {
        const { order, values } = this.state;
        const taken = order.filter((index) => values[index].visible && !this.effects.has(index));
        return taken.findLast((index) => this.opaque(index, point));
    }

    opaque(index, [x, y]) {
        const [{ picture }, value] = [this.layers[index], this.state.values[index]];
        const { flip_h, flip_v } = value;
        const box = boxOf(this.layers[index], value);
        const [u, v] = rotated([x - box.x, y - box.y], -box.angle);
        const column = Math.floor(picture.naturalWidth * (0.5 + (flip_h ? -u : u) / box.w));
        const row = Math.floor(picture.naturalHeight * (0.5 + (flip_v ? -v : v) / box.h));
        if (column < 0 || row < 0 || column >= picture.naturalWidth || row >= picture.naturalHeight) return false;
        this.probe ??= new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
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
        const next = clamp(zoom, LEAST_ZOOM, MOST_ZOOM);
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

    /** One pixel of the canvas for each of the screen. */
    actual() {
        this.centre(1);
    }

    fit() {
        const { clientWidth, clientHeight } = this.viewEl;
        const [width, height] = this.canvas;
        const [across, down] = [(clientWidth - 2 * MARGIN) / width, (clientHeight - 2 * MARGIN) / height];
        this.centre(Math.max(LEAST_ZOOM, Math.min(across, down, 4)));
        this.fitted = true; // until the user zooms or moves the view, a window of another size is fitted again
    }

    // In the list

    pressRow(event) {
        const row = event.target.closest("li");
        if (!row || event.button !== 0 || event.target.closest(".eye")) return;
        // Elsewhere a finger scrolls the list
        if (event.pointerType === "touch" && !event.target.closest(".grip")) return;
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
        const others = [...this.listEl.children].filter((row) => !this.moves(Number(row.dataset.index)));
        const middle = (row) => row.getBoundingClientRect().top + row.offsetHeight / 2;
        this.moveTo(others.filter((row) => event.clientY <= middle(row)).length);
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
            left: `${value.x}px`, top: `${value.y}px`, width: `${value.w}px`, height: `${value.h}px`,
            transform: `rotate(${value.rotation}deg) ${flips}`, opacity: value.opacity,
            display: value.visible ? "" : "none", zIndex: place,
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
            row.classList.toggle("selected", index === this.selected);
            row.classList.toggle("dragged", index === this.selected && Boolean(this.rowGesture?.moved));
            row.classList.toggle("off", !visible);
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
        const transform = `translate(${left}px, ${top}px) rotate(${angle}deg)`;
        Object.assign(this.boxEl.style, { width: `${wide}px`, height: `${high}px`, transform });
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
        this.enable(this.forwardEl, this.place < this.staying.length);
        this.enable(this.backwardEl, this.place > 0);
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
            const label = (one) => (CSS_MODES.includes(one) ? one : `${one} (shown as normal)`);
            select.replaceChildren(...modes.map((one) => new Option(label(one), one)));
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
