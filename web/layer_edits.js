// What the layer editor computes: no DOM and no ComfyUI in here, so that tests can call it directly.
// A layer is as it comes into the node: name, x, y, w, h, rotation, flip_h, flip_v, opacity, blend_mode, visible, box.
// x, y is its top left corner before rotation, rotation is in degrees clockwise about its centre, and box is where its
// content lies, as fractions [left, top, right, bottom] of its sides. bound are the indices of its effects (shadow,
// light), which go where it goes. Values are the fields of a layer after editing;
// a state has those of all layers, and their order.

/** The modes that CSS has: techniques/compositing.py has the same formulas. */
export const CSS_MODES = [
    "normal", "multiply", "screen", "overlay", "darken", "lighten", "color-dodge", "color-burn", "hard-light",
    "soft-light", "difference", "exclusion", "hue", "saturation", "color", "luminosity",
];
export const MAX_SIDE = 16384;

/** Without what no file can hold: control characters and halves of characters. */
export const tidyName = (name) => name.replace(/[\p{Cc}\p{Cs}]/gu, "");

const between = (low, high) => (value) => typeof value === "number" && value >= low && value <= high;
const flag = (value) => typeof value === "boolean";
const FITS = {
    x: between(-MAX_SIDE, MAX_SIDE), y: between(-MAX_SIDE, MAX_SIDE), w: between(1, MAX_SIDE), h: between(1, MAX_SIDE),
    rotation: between(-360, 360), flip_h: flag, flip_v: flag, opacity: between(0, 1),
    blend_mode: (value) => typeof value === "string", visible: flag,
    name: (value) => typeof value === "string" && tidyName(value) === value && value.trim() !== "",
};
export const FIELDS = Object.keys(FITS);
const WHOLE = ["x", "y", "w", "h"];
const whole = (value) => Math.floor(value + 0.5); // as the node does

export const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
const tenth = (value) => Math.round(value * 10) / 10;

/** Degrees in -180 < angle <= 180, of which the node keeps tenths. */
export const turn = (degrees) => tenth(degrees - 360 * Math.ceil((degrees - 180) / 360)) + 0;

const plain = (layer) => Object.fromEntries(FIELDS.map((field) => [field, layer[field]]));

/** The state before any edit. */
export const untouched = (layers) => ({ values: layers.map(plain), order: layers.map((_, i) => i) });

const sameName = (a, b) => a.toLowerCase() === b.toLowerCase();

/** Index of the layer that an entry of the text means, -1 for none: techniques/layer_edits.py's Reference.find. */
function find(layers, { layer, number }) {
    if (typeof layer === "number") return layers[layer - 1] ? layer - 1 : -1;
    const same = layers.map((_, i) => i).filter((i) => sameName(layers[i].name, String(layer)));
    if (same.length === 1) return same[0];
    return same.includes(number - 1) ? number - 1 : -1;
}

/**
 * The state that a text makes of the layers, as the node does it; `missing` are the layers that it names and that are
 * not there. Null when the text cannot be read, which the node refuses.
 */
export function readEdits(text, layers) {
    const state = { ...untouched(layers), missing: [] };
    if (!text.trim()) return state;
    let written;
    try {
        written = JSON.parse(text);
    } catch {
        return null;
    }
    if (written === null || typeof written !== "object" || Array.isArray(written)) return null;
    const { layers: entries = [], order = [] } = written;
    if (!Array.isArray(entries) || !Array.isArray(order)) return null;
    for (const entry of entries) {
        if (!FIELDS.every((field) => entry?.[field] === undefined || FITS[field](entry[field]))) return null;
        const value = state.values[find(layers, entry)];
        if (!value) state.missing.push(String(entry.layer));
        else for (const field of FIELDS.filter((name) => entry[name] !== undefined)) {
            value[field] = WHOLE.includes(field) ? whole(entry[field]) : entry[field];
        }
    }
    const wanted = order.map((one) => find(layers, one?.layer ? one : { layer: one })).filter((i) => i >= 0);
    // Layers that the order leaves out keep their places
    [...wanted].sort((a, b) => a - b).forEach((place, i) => { state.order[place] = wanted[i]; });
    return state;
}

/** The text of a state: what differs from the layers as they come in, a layer a line; empty when nothing does. */
export function writeEdits({ values, order }, layers) {
    const unique = layers.every(({ name }, i) => layers.every((other, j) => i === j || !sameName(name, other.name)));
    const changed = layers.map((layer, i) => {
        const fields = Object.entries(values[i]).filter(([field, value]) => value !== layer[field]);
        return fields.length ? JSON.stringify({ layer: layer.name, number: i + 1, ...Object.fromEntries(fields) }) : "";
    }).filter(Boolean);
    const reference = (i) => (unique ? layers[i].name : { layer: layers[i].name, number: i + 1 });
    const parts = [`"version": 1`];
    if (changed.length) parts.push(`"layers": [\n${changed.join(",\n")}\n]`);
    if (order.some((layer, place) => layer !== place)) parts.push(`"order": ${JSON.stringify(order.map(reference))}`);
    return parts.length > 1 ? `{${parts.join(", ")}}` : "";
}

// Places on the canvas. A box is a layer's content there: centre x, y, sides w, h, and angle in degrees clockwise.

export const rotated = ([x, y], degrees) => {
    const [cos, sin] = [Math.cos((degrees * Math.PI) / 180), Math.sin((degrees * Math.PI) / 180)];
    return [x * cos - y * sin, x * sin + y * cos];
};

/** From the layer's centre to its content's, on the canvas. */
function offset({ box: [left, top, right, bottom] }, { w, h, rotation, flip_h, flip_v }) {
    const [x, y] = [((left + right - 1) / 2) * w, ((top + bottom - 1) / 2) * h];
    return rotated([flip_h ? -x : x, flip_v ? -y : y], rotation);
}

export function boxOf(layer, value) {
    const [dx, dy] = offset(layer, value);
    const [left, top, right, bottom] = layer.box;
    const { x, y, w, h, rotation } = value;
    return { x: x + w / 2 + dx, y: y + h / 2 + dy, w: (right - left) * w, h: (bottom - top) * h, angle: rotation };
}

/** The values that put the layer's content into a box; whole pixels, as the node keeps them. */
export function placed(layer, value, box) {
    const [left, top, right, bottom] = layer.box;
    const side = (length) => clamp(whole(length), 1, MAX_SIDE);
    const rotation = box.angle === value.rotation ? value.rotation : turn(box.angle);
    const next = { ...value, rotation, w: side(box.w / (right - left)), h: side(box.h / (bottom - top)) };
    const [dx, dy] = offset(layer, next);
    const corner = (centre, length) => clamp(whole(centre - length / 2), -MAX_SIDE, MAX_SIDE);
    return { ...next, x: corner(box.x - dx, next.w), y: corner(box.y - dy, next.h) };
}

const PLACE = ["x", "y", "w", "h", "rotation", "flip_h", "flip_v"];
const samePlace = (a, b) => PLACE.every((field) => a[field] === b[field]);

/** The place of a layer that is moved, scaled, turned and flipped as another was when it went from one place to another. */
export function carried(own, from, to) {
    if (samePlace(from, to)) return Object.fromEntries(PLACE.map((field) => [field, own[field]]));
    const flips = [from.flip_h !== to.flip_h ? -1 : 1, from.flip_v !== to.flip_v ? -1 : 1];
    const [across, down] = [to.w / from.w, to.h / from.h];
    const side = (length) => clamp(whole(length), 1, MAX_SIDE);
    const off = own.rotation - from.rotation;
    const [cos, sin] = rotated([1, 0], off);
    const w = side(own.w * Math.hypot(across * cos, down * sin));
    const h = side(own.h * Math.hypot(across * sin, down * cos));
    const away = [own.x + own.w / 2 - from.x - from.w / 2, own.y + own.h / 2 - from.y - from.h / 2];
    const [u, v] = rotated(away, -from.rotation);
    const [dx, dy] = rotated([u * flips[0] * across, v * flips[1] * down], to.rotation);
    const corner = (centre, length) => clamp(whole(centre - length / 2), -MAX_SIDE, MAX_SIDE);
    return {
        x: corner(to.x + to.w / 2 + dx, w), y: corner(to.y + to.h / 2 + dy, h), w, h,
        rotation: turn(to.rotation + off * flips[0] * flips[1]),
        flip_h: own.flip_h !== flips[0] < 0, flip_v: own.flip_v !== flips[1] < 0,
    };
}

/**
 * [index, values] of what goes along when layer `index` has become `next`: its effects. before: the values of all
 * layers until then. As long as an effect lies where it came in beside its object, it is carried from there, so that
 * many small steps are one.
 */
export function along(layers, before, index, next) {
    return (layers[index].bound ?? []).map((effect) => {
        const came = samePlace(carried(layers[effect], layers[index], before[index]), before[effect]);
        const [own, lead] = came ? [layers[effect], layers[index]] : [before[effect], before[index]];
        const shown = next.visible === before[index].visible ? {} : { visible: next.visible };
        return [effect, { ...before[effect], ...carried(own, lead, next), ...shown }];
    });
}

/** Mirrored as it is seen, about the middle of its content: across is left and right, otherwise top and bottom. */
export function mirrored(layer, value, across) {
    const flips = across ? { flip_h: !value.flip_h } : { flip_v: !value.flip_v };
    const box = boxOf(layer, value);
    return placed(layer, { ...value, ...flips }, { ...box, angle: -box.angle });
}

/** Where a handle of a box is: across and down are -1, 0 or 1. */
export function handleAt(box, [across, down]) {
    const [dx, dy] = rotated([(across * box.w) / 2, (down * box.h) / 2], box.angle);
    return [box.x + dx, box.y + dy];
}

/** The box with a handle pulled to a point; the opposite one stays. A corner keeps the proportions unless `free`. */
export function pulled(box, [across, down], [x, y], free) {
    const [fixedX, fixedY] = handleAt(box, [-across, -down]);
    const [u, v] = rotated([x - fixedX, y - fixedY], -box.angle);
    let [w, h] = [across ? Math.max(across * u, 0.5) : box.w, down ? Math.max(down * v, 0.5) : box.h];
    if (across && down && !free) {
        const along = (across * u * box.w + down * v * box.h) / (box.w ** 2 + box.h ** 2);
        const scale = Math.max(along, 0.5 / Math.min(box.w, box.h));
        [w, h] = [box.w * scale, box.h * scale];
    }
    const [dx, dy] = rotated([(across * w) / 2, (down * h) / 2], box.angle);
    return { ...box, w, h, x: fixedX + dx, y: fixedY + dy };
}

/** The box scaled about its centre. */
export const scaled = (box, factor) => ({ ...box, w: box.w * factor, h: box.h * factor });

/** Left, top, right, bottom of a turned box. */
export function bounds(box) {
    const corners = [[-1, -1], [1, -1], [1, 1], [-1, 1]].map((corner) => handleAt(box, corner));
    const [xs, ys] = [0, 1].map((axis) => corners.map((corner) => corner[axis]));
    return [Math.min(...xs), Math.min(...ys), Math.max(...xs), Math.max(...ys)];
}

/** How far a span must move for an end or its middle to meet those of 0 to length, and where; null beyond `reach`. */
function nearestMeeting(low, high, length, reach) {
    const pairs = [[low, 0], [high, length], [(low + high) / 2, length / 2]];
    const meetings = pairs.map(([from, to]) => ({ by: to - from, at: to }));
    const best = meetings.reduce((a, b) => (Math.abs(b.by) < Math.abs(a.by) ? b : a));
    return Math.abs(best.by) <= reach ? best : null;
}

/** The box moved to the canvas's edges and middle where it is within reach of them, and the lines that it met. */
export function snapped(box, [width, height], reach) {
    const [left, top, right, bottom] = bounds(box);
    const [x, y] = [nearestMeeting(left, right, width, reach), nearestMeeting(top, bottom, height, reach)];
    return { box: { ...box, x: box.x + (x?.by ?? 0), y: box.y + (y?.by ?? 0) }, lines: [x?.at ?? null, y?.at ?? null] };
}
