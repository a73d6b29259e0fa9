// An upload button for files that ComfyUI's own widgets do not take, or not several at once; dropping files does the same.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

/** Puts the button on a node. done(names): what the files are called in the input folder, in the order they were chosen. */
export function addUpload(node, { label, suffixes, multiple, done }) {
    const fits = (file) => suffixes.some((suffix) => file.name.toLowerCase().endsWith(suffix));
    const complain = (detail) => app.extensionManager.toast.add({ severity: "error", summary: node.title, detail, life: 8000 });
    const send = async (files) => {
        const names = [];
        for (const file of multiple ? files : files.slice(0, 1)) {
            try {
                names.push(await upload(file));
            } catch (error) {
                complain(error.message);
            }
        }
        if (names.length) done(names);
        node.setDirtyCanvas(true, true);
    };
    const chooser = Object.assign(document.createElement("input"), { type: "file", multiple, accept: suffixes.join(",") });
    chooser.onchange = () => {
        if (chooser.files.length) send([...chooser.files]);
        chooser.value = "";
    };
    const button = node.addWidget("button", "upload", null, () => chooser.click(), { serialize: false });
    button.label = label;
    button.serialize = false;
    node.onDragOver = (event) => [...(event.dataTransfer?.items ?? [])].some((item) => item.kind === "file");
    node.onDragDrop = (event) => {
        const files = [...event.dataTransfer.files].filter(fits);
        if (files.length) send(files);
        return files.length > 0;
    };
}

/** Puts a file into ComfyUI's input folder; gives its name there. Throws an Error with one sentence. */
export async function upload(file) {
    const body = new FormData();
    body.append("image", file);
    const answer = await api.fetchApi("/upload/image", { method: "POST", body }).catch((error) => {
        throw new Error(`${file.name} could not be uploaded: ${error}`);
    });
    if (answer.status === 413) throw new Error(`${file.name} is larger than this ComfyUI accepts; start it with a higher --max-upload-size, or copy the file into its input folder.`);
    if (answer.status !== 200) throw new Error(`${file.name} could not be uploaded: ${answer.status} ${answer.statusText}.`);
    const { name, subfolder } = await answer.json();
    return subfolder ? `${subfolder}/${name}` : name;
}
