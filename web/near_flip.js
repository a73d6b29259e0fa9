// A button on every node that reads depth: near and far the other way round. What auto took for near comes with the run.
import { app } from "../../scripts/app.js";
import { after, change } from "./nodes.js";

const AUTO = "auto";

function attach(node, near) {
    let guess = "white"; // what auto took it for in the last run
    const button = node.addWidget("button", "flip near and far", null, () => {
        const now = near.value === AUTO ? guess : near.value;
        change(node, near, now === "white" ? "black" : "white");
    }, { serialize: false });
    button.serialize = false;
    after(node, "onExecuted", (output) => { guess = output?.strata_near?.[0] ?? guess; });
}

app.registerExtension({
    name: "Strata.NearFlip",
    nodeCreated(node) {
        const near = node.comfyClass?.startsWith("Strata_") && node.widgets?.find(({ name }) => name === "near_is");
        if (near) attach(node, near);
    },
});
