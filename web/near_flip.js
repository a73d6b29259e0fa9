// A button on every node that reads depth: near and far the other way round. What auto took for near comes with the run.
import { app } from "../../scripts/app.js";

const AUTO = "auto";

function attach(node, near) {
    let guess = "white"; // what auto took it for in the last run
    const button = node.addWidget("button", "flip near and far", null, () => {
        const now = near.value === AUTO ? guess : near.value;
        app.canvas.emitBeforeChange?.(); // one step for undo
        near.value = now === "white" ? "black" : "white";
        near.callback?.(near.value, app.canvas, node);
        app.canvas.emitAfterChange?.();
        node.setDirtyCanvas(true, true);
    }, { serialize: false });
    button.serialize = false;
    const executed = node.onExecuted;
    node.onExecuted = function (output) {
        guess = output?.strata_near?.[0] ?? guess;
        return executed?.apply(this, arguments);
    };
}

app.registerExtension({
    name: "Strata.NearFlip",
    nodeCreated(node) {
        const near = node.comfyClass?.startsWith("Strata_") && node.widgets?.find(({ name }) => name === "near_is");
        if (near) attach(node, near);
    },
});
