"""Every custom socket of the pack, and the one way to build a node's schema."""
from dataclasses import fields

from comfy_api.latest import io

Layers = io.Custom("LAYERS")  # ComfyUI's own layer document, see techniques/layers.py
Transparency = io.Custom("STRATA_TRANSPARENCY")  # one weight file of LayerDiffuse, see patches/transparency.py
LayerModules = io.Custom("STRATA_LAYER_MODULES")  # DreamLayer's trained modules, see patches/layer_modules.py
Inversion = io.Custom("INVERSION")  # a picture's path to noise, see patches/inversion.py
Planes = io.Custom("STRATA_PLANES")  # inversions with masks, back to front, see patches/feature_guidance.py

_KNOWN = {field.name for field in fields(io.Schema)}


def schema(**values) -> io.Schema:
    """io.Schema without the fields that this ComfyUI does not know yet: an unknown one would cost the user the whole pack."""
    return io.Schema(**{name: value for name, value in values.items() if name in _KNOWN})
