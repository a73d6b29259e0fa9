// The nodes in ComfyUI's language where the frontend leaves them in English: 1.32.9, which is ComfyUI 0.3.75's own, loads its own
// texts of a language over those of the packs (Comfy-Org/ComfyUI_frontend, issue 6748). With newer ones all this is so already.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

async function translate(defs) {
    const language = app.extensionManager.setting.get("Comfy.Locale");
    if (language === "en") return;
    const { nodeDefs = {}, nodeCategories = {} } = (await (await api.fetchApi("/i18n")).json())[language] ?? {};
    for (const [name, text] of Object.entries(nodeDefs)) {
        const def = defs[name];
        if (!def || !name.startsWith("Strata_")) continue;
        def.display_name = text.display_name;
        def.description = text.description;
        def.category = def.category.split("/").map((part) => nodeCategories[part] ?? part).join("/");
        for (const [key, [, options]] of Object.entries({ ...def.input.required, ...def.input.optional })) {
            if (options && text.inputs?.[key]) options.tooltip = text.inputs[key].tooltip;
        }
        def.output_tooltips = def.output_tooltips?.map((tooltip, index) => text.outputs?.[index]?.tooltip ?? tooltip);
    }
}

// When the page is loaded, and when somebody has the nodes read again
app.registerExtension({ name: "Strata.Languages", addCustomNodeDefs: translate, refreshComboInNodes: translate });
