// Keys of a dialog over the page.

/**
 * Whether Ctrl or Command is held with a key. The frontend looks at the same event a frame later, wherever the focus
 * is, and would undo the graph's last step: for it, neither is held from now on.
 */
export function hideCommand(event) {
    const held = (event.ctrlKey || event.metaKey) && !event.altKey;
    if (held) for (const name of ["ctrlKey", "metaKey"]) Object.defineProperty(event, name, { value: false });
    return held;
}
