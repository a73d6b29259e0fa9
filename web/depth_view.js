// What the depth picker computes: no DOM and no ComfyUI in here, so that tests can call it directly.
// Depth is a Float32Array in 0..1, 0 = nearest, row by row; pictures are RGBA bytes of the same size.

export const LAYER_COLOURS = [
    [255, 159, 64], [64, 190, 255], [190, 120, 255], [120, 215, 110], [255, 105, 150], [245, 215, 80], [90, 225, 205], [165, 175, 195],
];

export const layerColour = (layer) => LAYER_COLOURS[layer % LAYER_COLOURS.length];

/** Numbers of "0.350, 0.620"; null when the text is not a list of ascending numbers between 0 and 1. */
export function parseThresholds(text) {
    const values = String(text).split(",").map((part) => part.trim()).filter((part) => part !== "").map(Number);
    return values.every((value, i) => value >= 0 && value <= 1 && (i === 0 || value > values[i - 1])) ? values : null;
}

export function formatThresholds(values) {
    return values.map((value) => value.toFixed(3)).join(", ");
}

/** Inside 0..1, rounded as they are written, ascending, none twice. */
export function tidy(values) {
    const rounded = values.map((value) => Math.round(Math.min(1, Math.max(0, value)) * 1000) / 1000);
    return [...new Set(rounded)].sort((a, b) => a - b);
}

/** The thresholds with number `index` moved to `value`, kept between its neighbours so that lines never cross. */
export function moveThreshold(thresholds, index, value) {
    const low = index > 0 ? thresholds[index - 1] + 0.001 : 0;
    const high = index < thresholds.length - 1 ? thresholds[index + 1] - 0.001 : 1;
    const moved = [...thresholds];
    moved[index] = Math.round(Math.min(high, Math.max(low, value)) * 1000) / 1000;
    return moved;
}

/** A click replaces the selected threshold (the only one, or the nearest one when none is selected); `add` keeps all. */
export function placeThreshold(thresholds, selected, value, add) {
    if (add || thresholds.length === 0) return tidy([...thresholds, value]);
    const index = selected >= 0 && selected < thresholds.length ? selected : nearest(thresholds, value);
    return tidy(thresholds.map((old, i) => (i === index ? value : old)));
}

/** Index of the threshold that is closest to a value. */
export function nearest(thresholds, value) {
    let best = -1;
    thresholds.forEach((threshold, i) => {
        if (best < 0 || Math.abs(threshold - value) < Math.abs(thresholds[best] - value)) best = i;
    });
    return best;
}

/** Depth from a PNG's bytes: red is the high byte of round(depth * 65535), green the low one. */
export function decodeDepth(rgba) {
    const depth = new Float32Array(rgba.length / 4);
    for (let i = 0; i < depth.length; i++) depth[i] = (rgba[4 * i] * 256 + rgba[4 * i + 1]) / 65535;
    return depth;
}

/** Layer of a depth, 0 = nearest: how many thresholds are at or in front of it. */
export function layerAt(thresholds, depth) {
    let layer = 0;
    while (layer < thresholds.length && depth >= thresholds[layer]) layer++;
    return layer;
}

/** The picture with every layer tinted in its colour, written into `target`. */
export function tint(target, picture, depth, thresholds, strength = 0.45) {
    for (let i = 0; i < depth.length; i++) {
        const colour = layerColour(layerAt(thresholds, depth[i]));
        const at = 4 * i;
        const light = (picture[at] * 0.299 + picture[at + 1] * 0.587 + picture[at + 2] * 0.114) / 255;
        const gain = 0.25 + 0.75 * light; // keeps the picture's shading under the tint
        for (let c = 0; c < 3; c++) target[at + c] = picture[at + c] * (1 - strength) + colour[c] * gain * strength;
        target[at + 3] = 255;
    }
}

/**
 * The scene from above: column x of the picture against depth, row 0 = farthest. A cell has the mean colour of its pixels, and
 * is more opaque the more pixels it holds. Returns RGBA bytes, width × rows.
 */
export function topView(picture, depth, width, rows) {
    const sums = new Float32Array(width * rows * 4);
    for (let i = 0; i < depth.length; i++) {
        const row = rows - 1 - Math.min(rows - 1, Math.floor(depth[i] * rows));
        const cell = 4 * (row * width + (i % width));
        for (let c = 0; c < 3; c++) sums[cell + c] += picture[4 * i + c];
        sums[cell + 3]++;
    }
    const full = Math.log1p(depth.length / width / 8); // an eighth of a column in one cell is as dense as it gets
    const view = new Uint8ClampedArray(sums.length);
    for (let cell = 0; cell < sums.length; cell += 4) {
        const count = sums[cell + 3];
        if (!count) continue;
        for (let c = 0; c < 3; c++) view[cell + c] = sums[cell + c] / count;
        view[cell + 3] = 255 * Math.min(1, 0.5 + 0.5 * (Math.log1p(count) / full));
    }
    return view;
}

/** Thresholds of "x,y; x,y", points as fractions of width and height; broken ones are left to the node to complain about. */
export function pointThresholds({ depth, width, height }, text) {
    const points = String(text).split(";").map((pair) => pair.split(",").map((part) => (part.trim() === "" ? NaN : Number(part))));
    return points.filter((point) => point.length === 2 && point.every((value) => value >= 0 && value <= 1))
        .map(([x, y]) => thresholdBehind(depth, width, height, x, y));
}

export function thresholdBehind(depth, width, height, x, y) {
    return Math.min(1, depth[Math.floor(y * height) * width + Math.floor(x * width)] + 0.05);
}
