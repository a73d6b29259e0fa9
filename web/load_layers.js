// The upload button of "Load layers": ComfyUI's own upload widgets take pictures, sound and video only.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const SUFFIXES = [".psd", ".psb", ".ora"];

const fits = (file) => SUFFIXES.some((suffix) => file.name.toLowerCase().endsWith(suffix));

function complain(detail) {
    app.extensionManager.toast.add({ severity: "error", summary: "Load layers", detail, life: 8000 });
}

async function upload(node, file) {
    const body = new FormData();
    body.append("image", file);
    try {
        const answer = await api.fetchApi("/upload/image", { method: "POST", body });
        if (answer.status === 413) return complain(`${file.name} is larger than this ComfyUI accepts; start it with a higher --max-upload-size, or copy the file into its input folder.`);
        if (answer.status !== 200) return complain(`${file.name} could not be uploaded: ${answer.status} ${answer.statusText}.`);
        const { name, subfolder } = await answer.json();
        const value = subfolder ? `${subfolder}/${name}` : name;
        const widget = node.widgets.find((item) => item.name === "file");
        if (!widget.options.values.includes(value)) widget.options.values.push(value);
        widget.value = value;
        widget.callback?.(value);
        node.setDirtyCanvas(true, true);
    } catch (error) {
        complain(`${file.name} could not be uploaded: ${error}`);
    }
}

app.registerExtension({
    name: "Strata.LoadLayers",
    nodeCreated(node) {
        if (node.comfyClass !== "Strata_LoadLayers") return;
        const chooser = Object.assign(document.createElement("input"), { type: "file", accept: SUFFIXES.join(",") });
        chooser.onchange = () => {
            if (chooser.files.length) upload(node, chooser.files[0]);
            chooser.value = "";
        };
        const button = node.addWidget("button", "upload", null, () => chooser.click(), { serialize: false });
        button.label = "choose file to upload";
        button.serialize = false; // graphs saved before "groups" came hold the button's empty value in its place
        const configured = node.onConfigure;
        node.onConfigure = function (...args) {
            const groups = node.widgets.find((item) => item.name === "groups");
            if (groups) groups.value ??= groups.options.values[0];
            return configured?.apply(this, args);
        };
        node.onDragOver = (event) => [...(event.dataTransfer?.items ?? [])].some((item) => item.kind === "file");
        node.onDragDrop = (event) => {
            const file = [...event.dataTransfer.files].find(fits);
            if (file) upload(node, file);
            return Boolean(file);
        };
    },
});
