// An element of a node shown large, in a dialog over the page.
import { app } from "../../scripts/app.js";
import { hideCommand } from "./keys.js";

const STYLE = `
    .strata-large { padding: 8px; box-shadow: none; border: 1px solid var(--border-color, #4a4f59);
    border-radius: 8px; overflow: hidden;
        background: var(--comfy-menu-bg, #202225); color: var(--input-text, #d6d9df); width: min(1500px, 96vw);
    height: min(1000px, 94vh); max-width: none; max-height: none; }
    .strata-large[open] { display: flex; flex-direction: column; gap: 8px; }
    .strata-large header { display: flex; align-items: center; justify-content: space-between;
    font: 600 15px system-ui, sans-serif; }
    .strata-large button { font: 13px system-ui, sans-serif; color: inherit;
    background: var(--comfy-input-bg, #15171b); border: 1px solid var(--border-color, #4a4f59);
        border-radius: 5px; padding: 4px 12px; cursor: pointer; }
    .strata-large > :last-child { flex: 1; min-height: 0; }`;

/** The graph's undo or redo: some frontends leave these keys alone while a dialog is open, and others do not. */
function stepOf(event) {
    if (!hideCommand(event)) return null;
    const key = event.key.toLowerCase();
    return key === "z" ? (event.shiftKey ? "Comfy.Redo" : "Comfy.Undo") : key === "y" ? "Comfy.Redo" : null;
}

/** Shows the element; gives what closes the dialog and puts the element back into its place. onClose is called then. */
export function showLarge(element, title, onClose) {
    const place = Object.assign(document.createElement("div"), { className: "widget-expands" });
    const dialog = document.createElement("dialog");
    dialog.className = "strata-large";
    dialog.setAttribute("aria-label", title);
    dialog.innerHTML = `<style>${STYLE}</style><header><span></span><button type="button">Close</button></header>`;
    dialog.querySelector("span").textContent = title;
    const close = () => {
        if (!dialog.isConnected) return;
        place.replaceWith(element);
        dialog.remove();
        onClose();
    };
    dialog.querySelector("button").onclick = close;
    dialog.addEventListener("cancel", close);
    dialog.addEventListener("keydown", (event) => {
        event.stopPropagation(); // the graph behind has keys of its own
        const step = stepOf(event);
        if (step) app.extensionManager.command.execute(step);
        else if (event.key === "Escape") close();
    });
    element.replaceWith(place);
    dialog.append(element);
    document.body.append(dialog);
    dialog.showModal();
    return close;
}
