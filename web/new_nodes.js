// What a new node starts with. Where the input came later a graph that was saved without the value keeps the old default,
// which is the one of the schema, and so do prompts of the API.
import { app } from "../../scripts/app.js";

const STARTS = { Strata_HarmonizeLayers: { reach: 0.3 } };
const SIZES = { Strata_PreviewLayers: [420, 460], Strata_LoadLayerImage: [360, 460] }; // names below the images can be read
// Dragging a link from an input of two types to the canvas: the frontend knows nothing that gives both
const SOURCES = { "IMAGE,MASK": ["Strata_EstimateDepth", "Strata_LoadDepth", "Strata_RenderScene", "LoadImage", "LoadImageMask"] };

app.registerExtension({
    name: "Strata.NewNodes",
    setup() {
        const core = app.extensions.find(({ name }) => name === "Comfy.SlotDefaults"); // it fills the other in again
        for (const table of [core?.slot_types_default_in, LiteGraph.slot_types_default_in]) if (table) Object.assign(table, SOURCES);
    },
    nodeCreated(node) {
        const size = SIZES[node.comfyClass];
        if (size) node.setSize([Math.max(node.size[0], size[0]), Math.max(node.size[1], size[1])]);
        const starts = Object.entries(STARTS[node.comfyClass] ?? {});
        if (!starts.length) return;
        const saved = node.widgets.filter((widget) => widget.serialize !== false);
        const later = starts.map(([name, value]) => {
            const widget = saved.find((candidate) => candidate.name === name);
            const old = widget.value;
            widget.value = value;
            return [widget, saved.indexOf(widget), old];
        });
        const configured = node.onConfigure;
        node.onConfigure = function (info) {
            for (const [widget, index, old] of later) if (!(index < (info.widgets_values?.length ?? 0))) widget.value = old;
            return configured?.apply(this, arguments);
        };
    },
});
