// What several of our scripts do to nodes.
import { app } from "../../scripts/app.js";

/** Chain a handler behind one that may be there already. */
export function after(object, name, handler) {
    const before = object[name];
    object[name] = function (...args) {
        const result = before?.apply(this, args);
        handler.apply(this, args);
        return result;
    };
}

/** Give a widget a value, as one step of undo. */
export function change(node, widget, value) {
    app.canvas.emitBeforeChange?.();
    widget.value = value;
    widget.callback?.(value, app.canvas, node);
    app.canvas.emitAfterChange?.();
    node.setDirtyCanvas(true, true);
}
