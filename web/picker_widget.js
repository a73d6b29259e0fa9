// The depth picker as a DOM element: a front view and a top view of one scene with draggable thresholds. It knows nothing of
// ComfyUI: depth_picker.js gives it pictures and thresholds, and hears of changes through onChange(thresholds, finished).
import {
    decodeDepth, joinThresholds, layerColour, moveThreshold, nearest, placeThreshold, thresholdBehind, tint, topView,
} from "./depth_view.js";

const HINT = "Drag · click sets · Shift-click adds · Delete removes";
const TOP_ROWS = 96;
const STEPS = { ArrowUp: 0.005, ArrowRight: 0.005, ArrowDown: -0.005, ArrowLeft: -0.005, PageUp: 0.05, PageDown: -0.05, Home: -1, End: 1 };

const STYLE = `
:host { display: block; box-sizing: border-box; min-width: 0; min-height: 340px; height: 100%; contain: content; }
* { box-sizing: border-box; }
.frame { position: absolute; inset: 0; display: flex; flex-direction: column; gap: 4px; padding: 4px; border-radius: 6px;
    background: #15171b; color: #d6d9df; font: 11px/1.3 system-ui, sans-serif; user-select: none; -webkit-user-select: none; }
.front, .top { position: relative; overflow: hidden; border-radius: 4px; background: #0c0d10; cursor: crosshair; touch-action: none; }
.front { flex: none; }
.top { flex: 1 1 0; min-height: 0; }
canvas { position: absolute; inset: 0; width: 100%; height: 100%; }
.band { position: absolute; left: 0; right: 0; overflow: hidden; pointer-events: none; border-left: 5px solid; padding: 1px 6px;
    display: flex; align-items: center; text-shadow: 0 0 3px #000, 0 0 3px #000; white-space: nowrap; }
.line { position: absolute; left: 0; right: 0; height: 15px; margin-top: -8px; cursor: ns-resize; touch-action: none; outline: none; }
.line::before { content: ""; position: absolute; left: 0; right: 0; top: 7px; height: 2px; background: #fff; box-shadow: 0 0 2px #000; opacity: .75; }
.line.selected::before, .line:hover::before { opacity: 1; height: 3px; }
.line:focus-visible { outline: 2px solid #5aa9ff; outline-offset: -1px; border-radius: 3px; }
.value { position: absolute; right: 4px; top: -1px; padding: 0 5px; border-radius: 8px; background: #e8eaee; color: #15171b; line-height: 16px;
    font-variant-numeric: tabular-nums; }
.line.selected .value { background: #5aa9ff; }
.line.low .value { top: 2px; }
.line.fixed { pointer-events: none; }
.line.fixed::before { height: 0; background: none; box-shadow: none; border-top: 2px dashed #fff; }
.ghost { position: absolute; left: 0; right: 0; border-top: 1px dashed #fff; pointer-events: none; }
.end { position: absolute; left: 50%; transform: translateX(-50%); color: #aab0bb; pointer-events: none; text-shadow: 0 0 3px #000, 0 0 3px #000; }
.bar { flex: none; display: flex; gap: 6px; align-items: center; min-height: 18px; }
.hint { flex: 1; min-width: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; color: #aab0bb; }
.hint.wrong { color: #ff9a8b; white-space: normal; }
button { font: inherit; color: inherit; background: #2a2e36; border: 1px solid #3d434e; border-radius: 4px; padding: 1px 8px; cursor: pointer; }
button[aria-pressed="true"] { background: #3a5f8a; border-color: #5aa9ff; }
button:focus-visible { outline: 2px solid #5aa9ff; }
.message { position: absolute; inset: 0; display: flex; align-items: center; justify-content: center; text-align: center; padding: 16px;
    font-size: 13px; white-space: pre-line; color: #c5cad3; }
[hidden] { display: none !important; }
`;

export class DepthPicker {
    constructor(onChange, onEnlarge) {
        Object.assign(this, { onChange, onEnlarge });
        this.scene = null; // {width, height, picture, depth}
        this.thresholds = [];
        this.fixed = []; // thresholds that come from elsewhere: shown, not dragged
        this.selected = 0;
        this.locked = false;
        this.tinted = true;
        this.element = document.createElement("div");
        // Nodes 2.0 stretches a widget that holds this class over the rest of the node
        this.element.className = "strata-depth-picker widget-expands";
        this.build();
        this.listen();
        this.observer = new ResizeObserver(() => this.redraw());
        this.observer.observe(this.element);
        this.say("");
    }

    build() {
        const root = this.element.attachShadow({ mode: "open" });
        root.innerHTML = `<style>${STYLE}</style>
            <div class="frame">
                <div class="front" role="img" hidden><canvas></canvas></div>
                <div class="top" role="group" aria-label="The scene from above: far at the top, near at the bottom" hidden>
                    <canvas></canvas><div class="bands" aria-hidden="true"></div><div class="lines"></div><div class="ghost" hidden></div>
                    <span class="end" style="top: 2px" aria-hidden="true">far</span><span class="end" style="bottom: 2px" aria-hidden="true">near</span>
                </div>
                <div class="bar" hidden><span class="hint" role="status"></span><button type="button" class="tint" aria-pressed="true">Tint</button>
                    <button type="button" class="large">Enlarge</button></div>
                <div class="message" role="status"></div>
            </div>`;
        for (const name of ["frame", "front", "top", "bands", "lines", "ghost", "bar", "hint", "message", "tint", "large"]) this[`${name}El`] = root.querySelector(`.${name}`);
        this.frontCanvas = this.frontEl.querySelector("canvas");
        this.topCanvas = this.topEl.querySelector("canvas");
    }

    listen() {
        this.frontEl.addEventListener("pointerdown", (event) => this.pressFront(event));
        this.frontEl.addEventListener("pointermove", (event) => this.hoverFront(event));
        this.frontEl.addEventListener("pointerleave", () => { this.ghostEl.hidden = true; });
        this.topEl.addEventListener("pointerdown", (event) => this.pressTop(event));
        this.topEl.addEventListener("pointermove", (event) => this.drag(event));
        for (const end of ["pointerup", "pointercancel"]) this.topEl.addEventListener(end, (event) => this.release(event));
        this.topEl.addEventListener("dblclick", (event) => this.doubleClick(event));
        this.linesEl.addEventListener("keydown", (event) => this.key(event));
        this.linesEl.addEventListener("focusin", (event) => this.select(this.lines().indexOf(event.target)));
        this.largeEl.addEventListener("click", () => this.onEnlarge());
        this.tintEl.addEventListener("click", () => {
            this.tinted = !this.tinted;
            this.tintEl.setAttribute("aria-pressed", String(this.tinted));
            this.redraw();
        });
    }

    dispose() {
        this.observer.disconnect();
        cancelAnimationFrame(this.frame);
        this.onChange = () => {};
        this.element.dataset.gone = "";
    }

    // What to show

    /** picture, depth: ImageData of the same size. */
    setScene(picture, depth) {
        const { width, height } = picture;
        this.scene = { width, height, picture: picture.data, depth: decodeDepth(depth.data) };
        this.frontImage = document.createElement("canvas");
        this.topImage = document.createElement("canvas");
        Object.assign(this.frontImage, { width, height });
        Object.assign(this.topImage, { width, height: TOP_ROWS });
        const seen = topView(this.scene.picture, this.scene.depth, width, TOP_ROWS);
        this.topImage.getContext("2d").putImageData(new ImageData(seen, width, TOP_ROWS), 0, 0);
        this.sorted = Float32Array.from(this.scene.depth).sort(); // for the share of each layer
        this.say("");
    }

    /** A message in place of the views, or the views when it is empty. */
    say(message) {
        const views = !message && this.scene;
        this.messageEl.textContent = message;
        this.messageEl.hidden = Boolean(views);
        for (const part of [this.frontEl, this.topEl, this.barEl]) part.hidden = !views;
        this.redraw();
    }

    /** thresholds: numbers, or null when the text is not a list of them. */
    setThresholds(thresholds, { fixed = [], locked = false, stale = false } = {}) {
        this.wrong = thresholds === null;
        this.thresholds = thresholds ?? [];
        this.fixed = fixed;
        this.locked = locked;
        this.stale = stale;
        this.selected = Math.min(Math.max(this.selected, 0), this.thresholds.length - 1);
        this.redraw();
    }

    all() {
        return joinThresholds(this.thresholds, this.fixed);
    }

    lines() {
        return [...this.linesEl.querySelectorAll(".line:not(.fixed)")];
    }

    // What the user does

    change(thresholds, focusValue, finished) {
        this.wrong = false;
        this.thresholds = thresholds;
        this.selected = nearest(thresholds, focusValue);
        this.drawLines();
        this.lines()[this.selected]?.focus({ preventScroll: true });
        this.redraw();
        this.onChange(thresholds, finished);
    }

    select(index) {
        if (index < 0 || index === this.selected) return;
        this.selected = index;
        this.drawLines();
    }

    pressFront(event) {
        if (event.button !== 0 || this.locked) return;
        event.preventDefault(); // the line gets the focus
        const value = this.behind(event);
        if (value !== null) this.change(placeThreshold(this.thresholds, value, event.shiftKey), value, true);
    }

    hoverFront(event) {
        const value = this.locked || event.buttons ? null : this.behind(event);
        this.ghostEl.hidden = value === null;
        if (value !== null) this.ghostEl.style.top = `${(1 - value) * 100}%`;
    }

    /** The threshold just behind the object under the pointer, null beside the picture. */
    behind(event) {
        const { width, height, depth } = this.scene;
        const box = this.frontEl.getBoundingClientRect();
        const area = this.area;
        const x = ((event.clientX - box.left) / box.width * this.frontEl.clientWidth - area.x) / area.width;
        const y = ((event.clientY - box.top) / box.height * this.frontEl.clientHeight - area.y) / area.height;
        return x < 0 || x >= 1 || y < 0 || y >= 1 ? null : thresholdBehind(depth, width, height, x, y);
    }

    depthAt(event) {
        const box = this.topEl.getBoundingClientRect();
        return Math.min(1, Math.max(0, 1 - (event.clientY - box.top) / box.height));
    }

    pressTop(event) {
        if (event.button !== 0 || this.locked) return;
        event.preventDefault();
        const line = this.lines().indexOf(event.target.closest(".line"));
        // A double click removes a line only when both presses were on it: the first one may just have placed it
        this.armed = line >= 0 && this.lastPress === line;
        this.lastPress = line;
        const value = this.depthAt(event);
        if (line >= 0) {
            this.select(line);
            this.lines()[line].focus({ preventScroll: true });
            this.grip = this.thresholds[line] - value;
        } else {
            this.change(placeThreshold(this.thresholds, value, event.shiftKey), value, false);
            this.grip = 0;
        }
        this.dragging = true;
        this.topEl.setPointerCapture(event.pointerId);
    }

    drag(event) {
        if (!this.dragging) return;
        const moved = moveThreshold(this.thresholds, this.selected, this.depthAt(event) + this.grip);
        if (moved[this.selected] === this.thresholds[this.selected]) return;
        this.change(moved, moved[this.selected], false);
    }

    release() {
        if (!this.dragging) return;
        this.dragging = false;
        this.onChange(this.thresholds, true);
    }

    doubleClick() {
        if (this.armed) this.remove();
        this.lastPress = -1;
        this.armed = false;
    }

    remove() {
        if (this.locked || this.all().length < 2 || !this.thresholds.length) return; // the node needs one
        const rest = this.thresholds.filter((_, i) => i !== this.selected);
        this.change(rest, rest[Math.min(this.selected, rest.length - 1)] ?? 0, true);
    }

    key(event) {
        if (event.ctrlKey || event.metaKey || event.altKey || this.locked) return;
        const number = Number(event.key);
        if (STEPS[event.key]) {
            const moved = moveThreshold(this.thresholds, this.selected, this.thresholds[this.selected] + STEPS[event.key] * (event.shiftKey ? 10 : 1));
            this.change(moved, moved[this.selected], true);
        } else if (event.key === "Delete" || event.key === "Backspace") {
            this.remove();
        } else if (event.key === "Insert" || event.key === "+") {
            const value = (this.thresholds[this.selected] + (this.thresholds[this.selected + 1] ?? 1)) / 2;
            this.change(placeThreshold(this.thresholds, value, true), value, true);
        } else if (number >= 1 && number <= this.thresholds.length) {
            this.lines()[number - 1].focus({ preventScroll: true });
        } else {
            return;
        }
        event.preventDefault();
        event.stopPropagation(); // ComfyUI has its own Delete and arrow keys
    }

    // Drawing

    redraw() {
        cancelAnimationFrame(this.frame);
        this.frame = requestAnimationFrame(() => this.draw());
    }

    draw() {
        if (!this.scene || this.frontEl.hidden) return;
        this.layOut();
        const { width, height, picture, depth } = this.scene;
        const shown = new ImageData(width, height);
        if (this.tinted) tint(shown.data, picture, depth, this.all());
        else shown.data.set(picture);
        this.frontImage.getContext("2d").putImageData(shown, 0, 0);
        const { x, y, width: w, height: h } = this.area;
        paint(this.frontCanvas, this.frontEl, this.frontImage, x, y, w, h);
        paint(this.topCanvas, this.topEl, this.topImage, x, 0, w, this.topEl.clientHeight);
        this.frontEl.setAttribute("aria-label", `The image in ${this.all().length + 1} layers. A click puts the threshold just behind the object under it.`);
        this.hintEl.textContent = this.wrong ? "thresholds: write numbers between 0 and 1, separated by commas."
            : this.stale ? "The image or its depth has changed: run the graph again to see it here."
            : this.locked ? "thresholds comes from another node; the lines show the last run." : HINT;
        this.hintEl.title = this.hintEl.textContent;
        this.hintEl.classList.toggle("wrong", this.wrong || this.stale);
        this.drawBands();
        this.drawLines();
    }

    /** The picture gets up to three fifths of the height, the top view the rest, and both share their columns. */
    layOut() {
        const wide = this.frameEl.clientWidth - 8;
        const high = this.frameEl.clientHeight - this.barEl.offsetHeight - 16;
        const { width, height } = this.scene;
        const front = Math.max(1, Math.min(high * 0.64, wide * height / width));
        const scale = Math.min(wide / width, front / height);
        this.frontEl.style.height = `${front}px`;
        this.area = { x: (wide - width * scale) / 2, y: (front - height * scale) / 2, width: width * scale, height: height * scale };
    }

    drawBands() {
        const edges = [0, ...this.all(), 1];
        this.bandsEl.replaceChildren(...edges.slice(1).map((far, layer) => {
            const near = edges[layer];
            const band = document.createElement("div");
            const [r, g, b] = layerColour(layer);
            band.className = "band";
            Object.assign(band.style, {
                top: `${(1 - far) * 100}%`, height: `${(far - near) * 100}%`, borderColor: `rgb(${r} ${g} ${b})`, background: `rgb(${r} ${g} ${b} / .1)`,
            });
            if ((far - near) * this.topEl.clientHeight > 26) band.textContent = `${layer + 1} · ${this.share(layer)} %`;
            return band;
        }));
    }

    /** How much of the picture a layer covers, in whole per cent. */
    share(layer) {
        const edges = this.all();
        const before = (edge) => {
            let [low, high] = [0, this.sorted.length];
            while (low < high) {
                const middle = (low + high) >> 1;
                if (this.sorted[middle] < edge) low = middle + 1;
                else high = middle;
            }
            return low;
        };
        const from = layer === 0 ? 0 : before(edges[layer - 1]);
        const to = layer === edges.length ? this.sorted.length : before(edges[layer]);
        return Math.round(100 * (to - from) / this.sorted.length);
    }

    /** One element per threshold, kept while it is dragged: a new one would lose focus and pointer. */
    drawLines() {
        const lines = this.lines();
        while (lines.length > this.thresholds.length) lines.pop().remove();
        while (lines.length < this.thresholds.length) {
            const line = document.createElement("div");
            line.innerHTML = `<span class="value"></span>`;
            this.linesEl.append(line);
            lines.push(line);
        }
        this.thresholds.forEach((value, i) => describe(lines[i], value, i, this.thresholds.length, i === this.selected, this.locked));
        for (const old of this.linesEl.querySelectorAll(".fixed")) old.remove();
        for (const value of this.fixed) {
            const line = document.createElement("div");
            line.className = "line fixed";
            line.style.top = `${(1 - value) * 100}%`;
            this.linesEl.append(line);
        }
    }
}

function describe(line, value, index, count, selected, locked) {
    line.className = `line${selected ? " selected" : ""}${value > 0.93 ? " low" : ""}`;
    line.style.top = `${(1 - value) * 100}%`;
    line.firstElementChild.textContent = value.toFixed(3);
    const attributes = {
        role: "slider", tabindex: "0", "aria-orientation": "vertical", "aria-valuemin": "0", "aria-valuemax": "1", "aria-valuenow": value.toFixed(3),
        "aria-label": `Threshold ${index + 1} of ${count}`, "aria-readonly": String(locked),
    };
    for (const [name, text] of Object.entries(attributes)) line.setAttribute(name, text);
}

/** Draw an image into a rectangle (CSS pixels) of a canvas that fills `box`, at the screen's own resolution. */
function paint(canvas, box, image, x, y, width, height) {
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.max(1, Math.round(box.clientWidth * ratio));
    canvas.height = Math.max(1, Math.round(box.clientHeight * ratio));
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.drawImage(image, x, y, width, height);
}
