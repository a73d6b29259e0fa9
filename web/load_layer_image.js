// "Load layer image": ComfyUI's upload button gives a list of several files, which the classic canvas cannot draw in the widget.
// The widget holds them as text, one a line, as the API does; the preview gets the list.
import { app } from "../../scripts/app.js";

const names = (value) => (Array.isArray(value) ? value : String(value ?? "").split("\n"));

app.registerExtension({
    name: "Strata.LoadLayerImage",
    nodeCreated(node) {
        if (node.comfyClass !== "Strata_LoadLayerImage") return;
        const widget = node.widgets.find(({ name }) => name === "files");
        const asText = () => { widget.value = names(widget.value).join("\n"); };
        const preview = widget.callback;
        widget.callback = function () {
            if (names(widget.value).length > 1) widget.value = names(widget.value);
            const result = preview?.apply(this, arguments);
            asText();
            return result;
        };
        const configured = node.onConfigure;
        node.onConfigure = function () {
            if (names(widget.value).length > 1) {
                // For the button's first preview, which comes with the next frame
                Object.assign(widget, { value: names(widget.value), hidden: true });
                requestAnimationFrame(() => { asText(); widget.hidden = false; });
            }
            return configured?.apply(this, arguments);
        };
    },
});
