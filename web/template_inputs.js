// What our workflows load lies beside them. Where ComfyUI's input folder lacks it, it is copied there when one opens.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { upload } from "./upload.js";

const OURS = /^strata_\w+\.(png|jpg|ora)$/;
const PACK = decodeURIComponent(new URL(import.meta.url).pathname.split("/").at(-2));

function* nodesOf(graph) {
    yield* graph?.nodes ?? [];
    for (const inner of graph?.definitions?.subgraphs ?? []) yield* nodesOf(inner);
}

function named(graph) {
    const values = [...nodesOf(graph)].flatMap((node) => Object.values(node.widgets_values ?? {}));
    const names = values.flatMap((value) => (typeof value === "string" ? value.split("\n") : [])); // or one a line
    return [...new Set(names.filter((name) => OURS.test(name)))];
}

async function copy(name) {
    const shipped = await api.fetchApi(`/workflow_templates/${encodeURIComponent(PACK)}/input/${name}`);
    if (!shipped.ok) return false; // a file of the user's own that is called like ours
    await upload(new File([await shipped.blob()], name));
    return true;
}

app.registerExtension({
    name: "Strata.TemplateInputs",
    async beforeConfigureGraph(graph) {
        try {
            const wanted = named(graph);
            const there = wanted.length ? await (await fetch(api.internalURL("/files/input"))).json() : [];
            const copied = await Promise.all(wanted.filter((name) => !there.includes(name)).map(copy));
            if (copied.includes(true)) await app.refreshComboInNodes(); // the lists of files, before nodes look into them
        } catch (error) {
            console.warn("Strata: the images of this workflow could not be copied into the input folder.", error);
        }
    },
});
