"""The nodes that users see: one file per menu category, each with a NODES list."""

from comfy_api.latest import ComfyExtension

from ..patches import mini_family
from . import compositing, depth, fusion, generate, harmonize, layers_edit, layers_io, shared_layers, transparency

mini_family.register()
MODULES = (layers_io, layers_edit, depth, transparency, fusion, shared_layers, compositing, harmonize, generate)


class StrataExtension(ComfyExtension):
    async def get_node_list(self):
        return [node for module in MODULES for node in module.NODES]
