// Puts the button of the layer editor on "Edit layers", and gives the editor the node's last run and its `edits`.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { LastRun } from "./last_run.js";
import { LayerEditor } from "./layer_editor.js";
import { after, change } from "./nodes.js";

const runs = new LastRun("strata_layers", ["layers"]);
const RUN_FIRST = "Run the graph once to edit its layers here.";
const GONE = "The images of the last run are gone (ComfyUI clears them when it restarts).\n"
    + "Run the graph again to edit its layers here.";
const LINKED = "edits comes from another node: change it there, or take the link off to edit here.";
const STALE = "What comes before this node has changed: run the graph again to see it here.";

async function withPicture({ image, ...layer }) {
    const src = api.apiURL(`/view?${new URLSearchParams(image)}`);
    const picture = Object.assign(new Image(), { src, draggable: false, alt: "" });
    await picture.decode();
    return { ...layer, picture };
}

async function open(node) {
    if (document.querySelector(".strata-layer-editor")) return;
    const widget = node.widgets.find(({ name }) => name === "edits");
    const run = runs.of(node);
    const editor = new LayerEditor((text) => widget.value !== text && change(node, widget, text));
    if (node.inputs?.some(({ name, link }) => name === "edits" && link != null)) return editor.say(LINKED);
    if (!run) return editor.say(RUN_FIRST);
    const layers = await Promise.all(run.layers.map(withPicture)).catch(() => null);
    if (layers) editor.show(run.canvas, layers, widget.value ?? "", runs.stale(node) ? [STALE] : []);
    else editor.say(GONE);
}

app.registerExtension({
    name: "Strata.EditLayers",
    nodeCreated(node) {
        if (node.comfyClass !== "Strata_EditLayers") return;
        node.addWidget("button", "open the editor", null, () => open(node), { serialize: false }).serialize = false;
        after(node, "onExecuted", (output) => runs.keep(node, output));
        const least = node.computeSize();
        node.setSize([Math.max(node.size[0], 300), Math.max(node.size[1], least[1])]);
    },
});
