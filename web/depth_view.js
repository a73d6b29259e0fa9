// What the depth picker computes: no DOM and no ComfyUI in here, so that tests can call it directly.
// Depth is a Float32Array in 0..1, 0 = nearest, row by row; pictures are RGBA bytes of the same size.

const BINS = 256;
export const LAYER_COLOURS = [
    [255, 159, 64], [64, 190, 255], [190, 120, 255], [120, 215, 110], [255, 105, 150], [245, 215, 80], [90, 225, 205], [165, 175, 195],
];

export const layerColour = (layer) => LAYER_COLOURS[layer % LAYER_COLOURS.length];

/** Numbers of "0.6, 0.35", ascending and none twice; null when the node would refuse the text: not all between 0 and 1. */
export function parseThresholds(text) {
    const values = String(text).split(/[,;\s]+/).filter((part) => part !== "").map(Number);
    return values.every((value) => value > 0 && value < 1) ? [...new Set(values)].sort((a, b) => a - b) : null;
}

export function formatThresholds(values) {
    return values.map((value) => value.toFixed(3)).join(", ");
}

const round = (value) => Math.round(Math.min(0.999, Math.max(0.001, value)) * 1000) / 1000;

/** As they are written: three decimals between 0 and 1, ascending, none twice. */
export function tidy(values) {
    return [...new Set(values.map(round))].sort((a, b) => a - b);
}

/** Given thresholds with those of points, which count only where they are not as good as there already. */
export function joinThresholds(given, points) {
    const used = [];
    for (const value of [...given, ...points].sort((a, b) => a - b)) {
        if (!used.length || given.includes(value) || value - used.at(-1) >= 1 / BINS) used.push(value);
    }
    return used;
}

/** The thresholds with number `index` moved to `value`, kept between its neighbours so that lines never cross. */
export function moveThreshold(thresholds, index, value) {
    const low = index > 0 ? thresholds[index - 1] + 0.001 : 0;
    const high = index < thresholds.length - 1 ? thresholds[index + 1] - 0.001 : 1;
    const moved = [...thresholds];
    moved[index] = round(Math.min(high, Math.max(low, value)));
    return moved;
}

/** A click moves the threshold that is nearest to it; `add` keeps all. */
export function placeThreshold(thresholds, value, add) {
    if (add || thresholds.length === 0) return tidy([...thresholds, value]);
    const index = nearest(thresholds, value);
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

/** The depth just behind the object at (x, y), fractions of width and height: techniques/depth.py's threshold_behind, step by step. */
export function thresholdBehind(depth, width, height, x, y) {
    const column = Math.min(Math.floor(x * width), width - 1);
    const row = Math.min(Math.floor(y * height), height - 1);
    const counts = smooth(smooth(smooth(histogramAround(depth, width, height, column, row))));
    let peak = binOf(depth[row * width + column]);
    while (peak + 1 < BINS && counts[peak + 1] > counts[peak]) peak++;
    let lowest = peak;
    for (let bin = peak + 1; bin < BINS; bin++) {
        if (counts[lowest] < counts[peak] / 20 || counts[bin] > 1.5 * counts[lowest]) break;
        if (counts[bin] < counts[lowest]) lowest = bin;
    }
    return Math.min(lowest + 1, BINS - 1) / BINS;
}

const binOf = (depth) => Math.min(BINS - 1, Math.floor(depth * BINS));

/** Pixels per depth bin, weighted by a Gaussian around a pixel. */
function histogramAround(depth, width, height, column, row) {
    const scale = 2 * (0.15 * Math.max(width, height)) ** 2;
    const across = Float64Array.from({ length: width }, (_, x) => Math.exp(-((x - column) ** 2) / scale));
    const counts = new Float64Array(BINS);
    for (let y = 0; y < height; y++) {
        const down = Math.exp(-((y - row) ** 2) / scale);
        for (let x = 0; x < width; x++) counts[binOf(depth[y * width + x])] += down * across[x];
    }
    return counts;
}

const smooth = (counts) => counts.map((count, i) => (counts[Math.max(0, i - 1)] + 2 * count + counts[Math.min(BINS - 1, i + 1)]) / 4);
