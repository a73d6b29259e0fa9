"""The nodes that users see: one file per menu category, each with a NODES list."""

from comfy_api.latest import ComfyExtension

from ..patches import decomposer, mini_family
from . import (
    back_to_front,
    compositing,
    decompose,
    depth,
    edit_layers,
    finish,
    fusion,
    generate,
    harmonize,
    layers_edit,
    layers_io,
    redraw,
    shared_layers,
    transparency,
)

mini_family.register(decomposer.UNETS)
MODULES = (
    layers_io,
    layers_edit,
    edit_layers,
    depth,
    transparency,
    fusion,
    shared_layers,
    compositing,
    harmonize,
    generate,
    decompose,
    back_to_front,
    finish,
    redraw,
)


class StrataExtension(ComfyExtension):
    async def get_node_list(self):
        return [node for module in MODULES for node in module.NODES]
