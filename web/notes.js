// What a node tells of its run, a sentence a line: no frontend shows the text of any node but Preview Any by itself.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { after } from "./nodes.js";

const NAME = "strata_notes";
const LINE = 15;
const MARGIN = 10; // which the classic canvas leaves around an element
const STYLE = `box-sizing: border-box; padding: 4px 8px; overflow: auto; white-space: pre-wrap; pointer-events: none;
    font: 11px/${LINE}px system-ui, sans-serif; color: #e6c27a; background: #2a251b; border-radius: 4px;`;

/** Lines of text at a width in pixels, by the mean width of a letter. */
const lines = (text, width) => text.split("\n").reduce((sum, line) => sum + Math.max(1, Math.ceil((line.length * 6.3) / Math.max(60, width - 40))), 0);

function show(node, text) {
    const index = node.widgets?.findIndex(({ name }) => name === NAME) ?? -1;
    if (!text) {
        if (index < 0) return;
        const [view] = node.widgets.splice(index, 1);
        view.onRemove?.();
        view.element.remove();
    } else if (index >= 0) {
        node.widgets[index].element.textContent = text;
    } else {
        const element = Object.assign(document.createElement("div"), { className: "strata-notes", textContent: text });
        element.setAttribute("role", "status");
        element.style.cssText = STYLE;
        const height = () => Math.min(10, lines(element.textContent, node.size[0])) * LINE + 8 + 2 * MARGIN;
        const view = node.addDOMWidget(NAME, NAME, element, { serialize: false, getMinHeight: height, getMaxHeight: height });
        view.serialize = false;
        view.computeLayoutSize = () => ({ minHeight: height(), maxHeight: height(), minWidth: 100 });
        // Early Nodes 2.0 show no widget that comes after the node
        requestAnimationFrame(() => requestAnimationFrame(() => {
            if (!element.isConnected) document.querySelector(`[data-node-id="${node.id}"]`)?.append(element);
        }));
    }
    const least = node.computeSize();
    node.setSize([Math.max(node.size[0], least[0]), Math.max(node.size[1], least[1])]);
    node.setDirtyCanvas(true, true);
}

/** The node of an execution id, such as 5, or 5:3 in a subgraph. */
function find(id) {
    let graph = app.rootGraph ?? app.graph, node;
    for (const part of String(id).split(":")) [node, graph] = [graph?.getNodeById(part), graph?.getNodeById(part)?.subgraph];
    return node;
}

app.registerExtension({
    name: "Strata.Notes",
    setup() {
        // On nodes of others, which have no text of their own
        const told = new Set();
        api.addEventListener("strata_note", ({ detail }) => {
            const node = find(detail.node);
            if (!node) return;
            told.add(String(detail.node));
            show(node, detail.text);
        });
        api.addEventListener("executing", ({ detail }) => {
            const node = told.delete(String(detail)) && find(detail);
            if (node) show(node, "");
        });
    },
    nodeCreated(node) {
        if (!node.comfyClass?.startsWith("Strata_")) return;
        after(node, "onExecuted", (output) => show(node, output?.text?.join("\n")));
    },
});
