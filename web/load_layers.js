// The upload buttons of "Load layers" and "Load layer image".
import { app } from "../../scripts/app.js";
import { addUpload } from "./upload.js";

const LAYERS = [".psd", ".psb", ".ora"];
const IMAGES = [".png", ".webp", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".avif"];

const widget = (node, name) => node.widgets.find((item) => item.name === name);

function set(target, value) {
    target.value = value;
    target.callback?.(value);
}

function loadLayers(node) {
    addUpload(node, {
        label: "choose file to upload",
        suffixes: LAYERS,
        multiple: false,
        done: ([name]) => {
            const file = widget(node, "file");
            if (!file.options.values.includes(name)) file.options.values.push(name);
            set(file, name);
        },
    });
    // Graphs saved before "groups" came hold the button's empty value in its place
    const configured = node.onConfigure;
    node.onConfigure = function (...args) {
        const groups = widget(node, "groups");
        if (groups) groups.value ??= groups.options.values[0];
        return configured?.apply(this, args);
    };
}

function loadLayerImage(node) {
    addUpload(node, {
        label: "choose files to upload",
        suffixes: IMAGES,
        multiple: true,
        done: (names) => set(widget(node, "files"), names.join("\n")),
    });
}

const BUTTONS = { Strata_LoadLayers: loadLayers, Strata_LoadLayerImage: loadLayerImage };

app.registerExtension({
    name: "Strata.LoadLayers",
    nodeCreated: (node) => BUTTONS[node.comfyClass]?.(node),
});
