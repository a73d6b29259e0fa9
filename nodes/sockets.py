"""Every custom socket of the pack, the one way to build a node's schema, and what every node does before its work: look
at what has arrived.
"""

import functools
import inspect
from dataclasses import fields

from comfy_api.latest import io, ui

from ..patches import layer_files
from . import inputs

Layers = io.Custom("LAYERS")  # ComfyUI's own layer document, see techniques/layers.py
Transparency = io.Custom("STRATA_TRANSPARENCY")  # one weight file of LayerDiffuse, see patches/transparency.py
Decomposer = io.Custom("STRATA_DECOMPOSER")  # LayeringDiff's networks, see patches/decomposer.py
LayerModules = io.Custom("STRATA_LAYER_MODULES")  # DreamLayer's trained modules, see patches/layer_modules.py
Inversion = io.Custom("INVERSION")  # a picture's path to noise, see patches/inversion.py
Planes = io.Custom("STRATA_PLANES")  # inversions with masks, back to front, see patches/feature_guidance.py

_KNOWN = {field.name for field in fields(io.Schema)}


def schema(**values) -> io.Schema:
    """io.Schema without the fields that this ComfyUI does not know yet: an unknown one would cost the user the whole
    pack.
    """
    return io.Schema(**{name: value for name, value in values.items() if name in _KNOWN})


def told(notes: list[str]) -> dict:
    """What a node shows of its notes, one sentence a line: for `ui`, beside anything else."""
    return ui.PreviewText("\n".join(notes)).as_dict() if notes else {}


class Node(io.ComfyNode):
    """A node whose execute sees checked values alone: ComfyUI checks constants of a graph, and nothing that comes over
    a link. What it gives lies where ComfyUI keeps pictures.
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        own = cls.__dict__.get("execute")
        # ComfyUI runs copies of the class, locked and checked already.
        if own is not None and not hasattr(own.__func__, "__wrapped__"):
            cls.execute = classmethod(_checked(own.__func__))


def _checked(execute):
    signature, declared, made = inspect.signature(execute), [], []

    @functools.wraps(execute)
    def run(cls, *args, **kwargs):
        given = signature.bind(cls, *args, **kwargs).arguments
        rest = next((name for name, one in signature.parameters.items() if one.kind is one.VAR_KEYWORD), None)
        named = {name: value for name, value in given.items() if name != rest} | given.get(rest, {})
        if not declared or any(
            one.get_io_type() == "COMBO" and named.get(one.id, one.default) not in (one.options or ())
            for one in declared
        ):
            # Which lists folders; a node that looks for its own file checks that itself.
            own = cls.define_schema()
            declared[:], made[:] = own.inputs, [str(one.get_io_type()) for one in own.outputs]
        for one in declared:
            if one.id in named:
                named[one.id] = inputs.check(one, named[one.id], files=_looks_itself(cls))
        inputs.check_together(named, {one.id: str(one.get_io_type()) for one in declared})
        found = execute(**named)
        found.args = tuple(inputs.placed(*pair) for pair in zip(found.args, made, strict=True))
        return found

    return run


def _looks_itself(cls) -> bool:
    """Whether the node, or a base of it, looks for its files itself."""
    return any("validate_inputs" in vars(one) for one in cls.__mro__[: cls.__mro__.index(Node)])


class LayerModelFile(Node):
    """What loaders of model files have in common: the choice is checked before the run, and a changed file is loaded
    again.
    """

    folder = layer_files.KIND

    @classmethod
    def validate_inputs(cls, file):
        sentence = layer_files.missing(file, cls.folder)
        return sentence is None or sentence.removeprefix("file: ")  # ComfyUI names the input itself

    @classmethod
    def fingerprint_inputs(cls, file):
        return layer_files.state(file, cls.folder)
