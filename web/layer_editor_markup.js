// What the layer editor looks like: its icons, its style and its elements.

const ICONS = {
    undo: "M7 4 3 8l4 4M3 8h7a4 4 0 0 1 0 8H7", redo: "M13 4l4 4-4 4M17 8h-7a4 4 0 0 0 0 8h3",
    shown: "M1.5 10S4.5 4.5 10 4.5 18.5 10 18.5 10 15.5 15.5 10 15.5 1.5 10 1.5 10z" +
        "M10 7.5a2.5 2.5 0 1 0 0 5 2.5 2.5 0 0 0 0-5z",
    hidden: "M3 3l14 14M5 6.2C2.8 7.7 1.5 10 1.5 10s3 5.5 8.5 5.5c1.4 0 2.6-.4 3.7-.9" +
        "M8 4.7c.6-.1 1.3-.2 2-.2 5.5 0 8.5 5.5 8.5 5.5s-.8 1.5-2.3 2.9",
    across: "M10 2v16M7 5v10H2zM13 5v10h5z", down: "M2 10h16M5 7h10V2zM5 13h10v5z",
    forward: "M10 16V4M5 9l5-5 5 5", backward: "M10 4v12M5 11l5 5 5-5",
};
export const icon = (name) => `<svg viewBox="0 0 20 20" aria-hidden="true"><path d="${ICONS[name]}"/></svg>`;

const STYLE = `
* { box-sizing: border-box; }
dialog { --back: var(--comfy-menu-bg, #202225); --deep: var(--comfy-input-bg, #15171b);
    --text: var(--input-text, #d6d9df); --soft: var(--descrip-text, #a5abb6);
    --edge: var(--border-color, #4a4f59); --mark: #2f86e5;
    padding: 0; border: 1px solid var(--edge); border-radius: 8px; background: var(--back); color: var(--text);
    overflow: hidden; width: min(1500px, 96vw); height: min(1000px, 94vh); max-width: none; max-height: none;
    font: 13px/1.35 system-ui, sans-serif; user-select: none; -webkit-user-select: none; }
dialog[open] { display: grid; grid-template: auto minmax(0, 1fr) auto / minmax(0, 1fr) 290px; }
dialog::backdrop { background: rgb(0 0 0 / .55); }
.bar { grid-column: 1 / 3; display: flex; flex-wrap: wrap; gap: 6px; align-items: center; padding: 8px 10px;
    border-bottom: 1px solid var(--edge); }
h2 { margin: 0 10px 0 0; font-size: 15px; }
.gap { flex: 1; }
.zoom { min-width: 48px; text-align: center; font-variant-numeric: tabular-nums; }
button, input, select { font: inherit; color: inherit; background: var(--deep); border: 1px solid var(--edge);
    border-radius: 5px; min-height: 28px; padding: 2px 8px; }
button { cursor: pointer; display: inline-flex; align-items: center; justify-content: center; gap: 6px; }
button:disabled { opacity: .45; cursor: default; }
button[aria-pressed="true"].toggle { border-color: var(--mark); box-shadow: inset 0 0 0 1px var(--mark); }
button.main { background: var(--mark); border-color: var(--mark); color: #fff; font-weight: 600; padding: 2px 16px; }
:focus-visible { outline: 2px solid var(--mark); outline-offset: 1px; }
svg { width: 16px; height: 16px; fill: none; stroke: currentColor; stroke-width: 1.5; stroke-linecap: round;
    stroke-linejoin: round; }
.view { position: relative; overflow: hidden; background: var(--deep); touch-action: none; cursor: default;
    outline-offset: -3px; }
.stage { position: absolute; left: 0; top: 0; transform-origin: 0 0;
    box-shadow: 0 0 0 calc(1px / var(--zoom)) var(--edge);
    background: repeating-conic-gradient(#888 0 25%, #aaa 0 50%);
    background-size: calc(16px / var(--zoom)) calc(16px / var(--zoom)); }
.pile { position: absolute; inset: 0; overflow: hidden; isolation: isolate; }
.layer { position: absolute; }
.layer img { position: absolute; pointer-events: none; }
.box { position: absolute; left: 0; top: 0; pointer-events: none; border: 1px solid #fff;
    outline: 1px solid var(--mark); }
.handle { position: absolute; width: 11px; height: 11px; margin: -6px; background: #fff;
    border: 1px solid var(--mark); pointer-events: auto; touch-action: none; }
.handle::after { content: ""; position: absolute; inset: -6px; }
.small .handle:not(.turn)::after { inset: 0; }
.small .handle:is([data-handle="1"], [data-handle="3"], [data-handle="5"], [data-handle="7"]) { display: none; }
.handle.turn { border-radius: 50%; left: 50%; top: -26px; cursor: grab; }
.stem { position: absolute; left: 50%; top: -22px; height: 22px; border-left: 1px solid var(--mark); }
.guide { position: absolute; background: #ff4fa3; pointer-events: none; }
.guide.x { width: 1px; top: 0; bottom: 0; } .guide.y { height: 1px; left: 0; right: 0; }
.message { position: absolute; inset: 0; display: grid; place-items: center; text-align: center; padding: 24px;
    font-size: 15px; white-space: pre-line; }
aside { display: flex; flex-direction: column; min-height: 0; border-left: 1px solid var(--edge); }
ol { flex: 1 1 90px; min-height: 90px; margin: 0; padding: 4px; list-style: none; overflow-y: auto; }
li { display: flex; align-items: center; gap: 6px; padding: 3px; border: 1px solid transparent; border-radius: 6px; }
li.selected { border-color: var(--mark); background: color-mix(in srgb, var(--mark) 22%, transparent); }
li.dragged { opacity: .6; }
li.off .pick { opacity: .55; }
li img { width: 34px; height: 34px; object-fit: contain; flex: none; border-radius: 3px;
    background: repeating-conic-gradient(#888 0 25%, #aaa 0 50%) 0 0 / 8px 8px; }
.eye { padding: 2px 5px; background: none; border-color: transparent; }
.pick { flex: 1; min-width: 0; justify-content: flex-start; background: none; border-color: transparent;
    text-align: left; }
.pick span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.grip { flex: none; padding: 6px 4px; cursor: grab; touch-action: none; color: var(--soft); letter-spacing: -2px; }
.fields { display: grid; grid-template-columns: 1fr 1fr; gap: 6px 8px; padding: 8px 10px;
    border-top: 1px solid var(--edge); overflow-y: auto; }
.fields label { display: grid; grid-template-columns: auto minmax(0, 1fr); gap: 6px; align-items: center; }
.fields label > span { color: var(--soft); }
.fields input, .fields select { width: 100%; }
.fields input[type="range"] { padding: 0; }
.fields .wide { grid-column: 1 / 3; }
.fields .opacity { grid-template-columns: auto minmax(0, 1fr) 42px; }
.row { display: flex; gap: 6px; } .row button { flex: 1; }
.status { grid-column: 1 / 3; min-height: 30px; padding: 6px 10px; border-top: 1px solid var(--edge);
    color: var(--soft); overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.status.told { color: var(--text); font-weight: 600; }
[hidden] { display: none !important; }
@media (max-width: 700px) {
    dialog[open] { grid-template: auto minmax(0, 1fr) minmax(0, 1fr) auto / minmax(0, 1fr); }
    .bar, .status { grid-column: 1; }
    aside { border: 0; border-top: 1px solid var(--edge); }
}
`;

const CANVAS = "Canvas. Arrow keys move the selected layer, with Shift by 10; Page Up and Page Down select another.";

const action = (name, label) =>
    `<button type="button" class="${name}" title="${label}" aria-label="${label}">${icon(name)}</button>`;

const number = (name, letter, label, more = "") =>
    `<label><span>${letter}</span><input name="${name}" type="number" step="1" aria-label="${label}" ${more}></label>`;

const FORM = `
    <label class="wide"><span>Name</span><input name="name" type="text" autocomplete="off"></label>
    ${number("x", "X", "X")}${number("y", "Y", "Y")}
    ${number("w", "W", "Width", 'min="1"')}${number("h", "H", "Height", 'min="1"')}
    <label class="wide"><span>Rotation</span>
        <input name="rotation" type="number" step="1" min="-360" max="360" aria-label="Rotation in degrees clockwise">
    </label>
    <label class="wide opacity"><span>Opacity</span>
        <input name="opacity" type="range" min="0" max="100" step="1"><output></output>
    </label>
    <label class="wide"><span>Blend</span><select name="blend_mode" aria-label="Blend mode"></select></label>
    <div class="row wide">
        ${action("across", "Flip left and right")}${action("down", "Flip top and bottom")}
        ${action("forward", "Bring forward")}${action("backward", "Send backward")}
        <button type="button" class="reset" title="As it comes into the node">Reset</button>
    </div>`;

export const MARKUP = `<style>${STYLE}</style>
    <dialog aria-label="Edit layers">
        <div class="bar">
            <h2>Edit layers</h2>
            ${action("undo", "Undo")}${action("redo", "Redo")}
            <button type="button" class="out" aria-label="Zoom out">−</button>
            <button type="button" class="zoom" title="Show at 100 %" aria-label="Show at 100 %">100 %</button>
            <button type="button" class="in" aria-label="Zoom in">+</button>
            <button type="button" class="fit" title="Show the whole canvas">Fit</button>
            <button type="button" class="snap toggle" title="Snap to edges and middle" aria-pressed="true">Snap</button>
            <span class="gap"></span>
            <button type="button" class="cancel" title="Close and change nothing (Escape)">Cancel</button>
            <button type="button" class="apply main" title="Write the edits to the node (Enter)">Apply</button>
        </div>
        <div class="view" tabindex="0" role="application" aria-label="${CANVAS}">
            <div class="stage"><div class="pile"></div></div>
            <div class="box" hidden></div>
            <div class="guide x" hidden></div><div class="guide y" hidden></div>
            <div class="message"></div>
        </div>
        <aside class="side">
            <ol class="list" aria-label="Layers, the front one first"></ol>
            <div class="fields">${FORM}</div>
        </aside>
        <div class="status" role="status"></div>
    </dialog>`;

/** Classes of the elements that the editor speaks to. */
export const PARTS = [
    "undo", "redo", "out", "zoom", "in", "fit", "snap", "cancel", "apply", "view", "stage", "pile", "box", "list",
    "fields", "status", "message", "side", "across", "down", "forward", "backward", "reset",
];

/** A layer in the list. */
export const ROW = `<li>
    <button type="button" class="eye"></button><img alt="" draggable="false">
    <button type="button" class="pick"><span></span></button><span class="grip" aria-hidden="true">⋮⋮</span>
</li>`;
