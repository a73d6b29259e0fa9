// What a node's last run gave its view, kept with the node: in a property, so that it is saved with the workflow and
// found after a reload.

export class LastRun {
    /** property: of the node, and of its output. inputs, widgets: names of those that the view depends on. */
    constructor(property, inputs, widgets = []) {
        Object.assign(this, { property, inputs, widgets });
        // Undo goes back to a node from before its run, which has not the property: it is known by all that its view
        // depends on, not by its graph's id, which undo may change. Writing the property again would be a step of undo
        // itself.
        this.kept = new Map();
    }

    key(node) {
        return `${node.id} ${this.source(node)}`;
    }

    of(node) {
        // New nodes are in no graph yet
        return node.properties[this.property] ?? (node.graph ? this.kept.get(this.key(node)) : undefined);
    }

    /** Keep what a run's output has for the view; false when there is nothing. */
    keep(node, output) {
        if (!output?.[this.property]?.[0]) return false;
        const run = { ...output[this.property][0], source: this.source(node) };
        node.properties[this.property] = run;
        this.kept.set(this.key(node), run);
        return true;
    }

    stale(node) {
        const run = this.of(node);
        return run?.source !== undefined && run.source !== this.source(node);
    }

    /** What the view depends on, as one number: these widgets, and all nodes behind the inputs. */
    source(node) {
        const seen = new Set();
        // No previews and no elements
        const plain = ({ name, value }) => !name.startsWith("$$") && typeof value !== "object";
        const parts = (widgets) => (widgets ?? []).filter(plain).map(({ name, value }) => [name, value]);
        const behind = (other) => {
            if (!other || seen.has(other)) return [];
            seen.add(other);
            const before = (other.inputs ?? []).map((_, slot) => behind(other.getInputNode(slot)));
            return [other.id, other.type, other.mode, parts(other.widgets), before];
        };
        const inputs = this.inputs.map((name) => {
            const slot = node.findInputSlot(name);
            return [node.getInputLink(slot)?.origin_slot, behind(node.getInputNode(slot))];
        });
        const text = JSON.stringify([parts(node.widgets?.filter(({ name }) => this.widgets.includes(name))), inputs]);
        return [...text].reduce((sum, letter) => (Math.imul(sum, 31) + letter.codePointAt(0)) | 0, text.length);
    }
}
