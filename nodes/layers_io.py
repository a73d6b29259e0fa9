"""Layers to files and back: PSD, OpenRaster, PNG, WebP."""

import os
import re
import time
from dataclasses import replace
from pathlib import Path

import folder_paths
from comfy.cli_args import args
from comfy.utils import ProgressBar
from comfy_api.latest import io, ui

from ..formats import files
from ..formats.groups import GROUPS
from ..formats.images import load_images
from ..formats.raster import modes_note, picture
from ..techniques.arrange import to_batch
from ..techniques.compositing import preview
from ..techniques.layers import MAX_LAYERS, read_layers, write_layers
from .depth_inputs import depth_input, depth_layer
from .inputs import holds_name, input_file, input_names, input_state, inside, save_temporary
from .layers_edit import sheet, shown_layers
from .sockets import Layers, Node, schema, told

BITS = ("8", "16")
LONGEST = 160  # bytes of a prefix: number, layer's name and ending follow, and a file's name holds 255


class SaveLayers(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Strata_SaveLayers",
            display_name="Save layers (Photoshop PSD, Krita ORA)",
            category="Strata/Layers",
            is_output_node=True,
            search_aliases=["psd", "ora", "openraster", "photoshop", "krita", "gimp", "export layers", "export PSD"],
            description="Saves layers to the output folder as a Photoshop or OpenRaster document, or as one image "
            "per layer. The workflow is embedded in every file.",
            inputs=[
                Layers.Input("layers", tooltip="The layers to save, from any node that makes layers."),
                io.String.Input(
                    "filename_prefix",
                    default="layers/strata",
                    tooltip="Start of the file names; a / makes a subfolder of the output folder. %date:yyyy-MM-dd%, "
                    "%year%, %month%, %day%, %hour%, %minute%, %second%, %width% and %height% are replaced.",
                ),
                io.Combo.Input(
                    "format",
                    options=list(files.FORMATS),
                    default=files.FORMATS[0],
                    tooltip="PSD: Photoshop, GIMP, Krita, Affinity. OpenRaster: Krita, GIMP, MyPaint. PNG or WebP "
                    "layers: one lossless canvas-sized image per layer and the flattened one.",
                ),
                io.Combo.Input(
                    "bits",
                    options=list(BITS),
                    default=BITS[0],
                    optional=True,
                    tooltip="Bits of each colour channel in a PSD. 16 keeps fine gradients for later editing; the file "
                    "is at least twice as large. Other formats have 8.",
                ),
                io.Boolean.Input(
                    "trim",
                    default=False,
                    optional=True,
                    tooltip="PSD and OpenRaster: cut each layer to what is drawn in it, placed where it was. Smaller "
                    "files, and handles that fit the object; the colours of transparent places around it are lost.",
                ),
                io.Boolean.Input(
                    "alpha_as_mask",
                    default=False,
                    optional=True,
                    tooltip="PSD: store each layer's transparency as a layer mask over opaque pixels, so that you can "
                    "paint parts back in your paint program.",
                ),
                depth_input(
                    optional=True,
                    tooltip="Depth of the image, saved as a hidden layer named Depth on top. Values beyond 0 to 1 are "
                    "stretched to that range.",
                ),
            ],
            outputs=[
                Layers.Output(
                    "layers_out", display_name="layers", tooltip="The same layers, unchanged, to go on with."
                ),
                io.String.Output(
                    "files", display_name="files", tooltip="Full paths of the files that were written, one a line."
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(cls, layers, filename_prefix, format, bits=BITS[0], trim=False, alpha_as_mask=False, depth=None):
        stack = read_layers(layers)
        merged = picture(stack)
        choices = {"bits": int(bits), "trim": trim, "alpha_as_mask": alpha_as_mask}
        notes = modes_note(stack.layers) + files.unused(format, **choices)
        if depth is not None:
            stack = stack.with_layers([*stack.layers, depth_layer(depth, merged[None], notes)])
        if len(stack.layers) > MAX_LAYERS:
            raise ValueError(
                f"depth: with it there are {len(stack.layers)} layers and Load layers takes {MAX_LAYERS}; merge some."
            )
        folder, stem, subfolder = _target(filename_prefix, stack.canvas)
        progress = ProgressBar(len(stack.layers)).update_absolute
        paths = files.save(folder, stem, stack, merged, format, _metadata(cls.hidden), progress, **choices)
        saved = [{"filename": path.name, "subfolder": subfolder, "type": "output"} for path in paths]
        shown = {"images": saved} if "layers" in format else {**ui.PreviewImage(merged[None]).as_dict(), "files": saved}
        return io.NodeOutput(layers, "\n".join(map(str, paths)), ui=shown | told(notes))


class LoadLayers(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Strata_LoadLayers",
            display_name="Load layers (Photoshop PSD, Krita ORA)",
            category="Strata/Layers",
            search_aliases=["psd", "ora", "openraster", "photoshop", "krita", "import layers", "open PSD"],
            description="Loads the layers of a Photoshop (PSD, PSB) or OpenRaster (ORA) file. Groups become their "
            "layers where that shows the same; Save layers writes them again.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=input_names(files.SUFFIXES),
                    tooltip=("A PSD, PSB or ORA file in ComfyUI's input folder; the button below uploads one."),
                ),
                io.Combo.Input(
                    "groups",
                    options=list(GROUPS),
                    default=GROUPS[0],
                    optional=True,
                    tooltip=(
                        "leaves: a group's layers one by one where they show the same without it, and otherwise the "
                        "group as one layer. one layer each: every outermost group as one layer."
                    ),
                ),
            ],
            outputs=[
                Layers.Output(
                    "layers", display_name="layers", tooltip="The layers, back to front, with all their fields."
                ),
                io.Image.Output("image", display_name="image", tooltip="The visible layers flattened."),
                io.Mask.Output(
                    "mask", display_name="mask", tooltip="Transparency of the flattened image, 1 = transparent."
                ),
                io.String.Output(
                    "notes",
                    display_name="notes",
                    tooltip="What layers cannot hold of the file, one sentence a line; also shown on the node.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, file):
        return (
            True
            if (path := input_file(file)) and path.is_file()
            else f"{file!r} is not a file in ComfyUI's input folder; upload a PSD or ORA file."
        )

    @classmethod
    def fingerprint_inputs(cls, file, groups=GROUPS[0]):
        return input_state(file)

    @classmethod
    def execute(cls, file, groups=GROUPS[0]):
        notes = []
        stack = files.load(input_file(file), groups, notes)
        notes += modes_note(stack.layers)
        merged = picture(stack)[None]
        return io.NodeOutput(
            write_layers(stack), merged[..., :3], 1 - merged[..., 3], "\n".join(notes), ui=told(notes) or None
        )


class LoadLayerImage(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Strata_LoadLayerImage",
            display_name="Load layer image (PNG with alpha)",
            category="Strata/Layers",
            search_aliases=["load image with alpha", "RGBA", "transparent PNG", "cut-out", "load images"],
            description="Loads images as layers and keeps their alpha, which Load Image gives apart. The button takes "
            "several files at once.",
            inputs=[
                io.String.Input(
                    "files",
                    multiline=True,
                    default="",
                    tooltip="Names of image files in ComfyUI's input folder, one a line, the first one the back layer. "
                    "The button below uploads them.",
                )
            ],
            outputs=[
                Layers.Output(
                    "LAYERS",
                    display_name="layers",
                    tooltip="A layer for each file, named after it and centred on a canvas as large as the largest. "
                    "Files of Save layers are the layers that they were, effects of objects too.",
                ),
                io.Image.Output(
                    "IMAGE", display_name="image", tooltip="RGBA, one image per file, of the canvas's size."
                ),
                io.Mask.Output("MASK", display_name="mask", tooltip="Transparency of the images, 1 = transparent."),
            ],
        )

    @classmethod
    def validate_inputs(cls, files):
        names = _names(files)
        if not names:
            return "no file is named; upload one, or write the name of one in the input folder."
        absent = next((name for name in names if not ((path := input_file(name)) and path.is_file())), None)
        return absent is None or f"{absent!r} is not a file in ComfyUI's input folder; upload it."

    @classmethod
    def fingerprint_inputs(cls, files):
        return "\n".join(map(input_state, _names(files)))

    @classmethod
    def execute(cls, files):
        notes = []
        stack = load_images([input_file(name) for name in _names(files)], notes)
        images = to_batch(stack.with_layers(replace(layer, opacity=1.0) for layer in stack.layers))
        result = shown_layers(stack, images, 1 - images[..., 3], notes=notes)
        result.ui = {**(result.ui or {}), "images": [save_temporary(sheet(stack, preview(stack)))]}
        return result


def _names(files: str) -> list[str]:
    return [line.strip() for line in files.splitlines() if line.strip()]


def _target(prefix: str, canvas: tuple[int, int]) -> tuple[Path, str, str]:
    """(folder, start of the file names, subfolder) that are free in the output folder, by ComfyUI's own rules."""
    # Normalised first: with a / at its end ComfyUI would count from 1 again.
    root, prefix = (
        folder_paths.get_output_directory(),
        os.path.normpath(re.sub(r"%date:(.*?)%", lambda found: _date(found[1]), prefix)),
    )
    if not holds_name(prefix, LONGEST):
        raise ValueError(
            f"filename_prefix: {prefix[:60]!r} cannot be the start of a file name; use ordinary characters, at most "
            f"{LONGEST} bytes a part."
        )
    if not inside(root, os.path.join(root, os.path.dirname(prefix))):
        raise ValueError(
            f"filename_prefix: {prefix!r} leads outside ComfyUI's output folder; use a name, or subfolder/name."
        )
    if os.path.basename(prefix) in ("", ".", ".."):
        raise ValueError(f"filename_prefix: {prefix!r} has no file name; write one, for example layers/strata.")
    try:
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, root, *canvas)
    except OSError as error:  # a file of that name, no rights, a path that is too long
        raise ValueError(
            f"filename_prefix: the folder of {prefix[:60]!r} cannot be used ({error.strerror}); use another one."
        ) from error
    except Exception as error:  # newer ComfyUI follows links, and raises in several lines when one leads elsewhere
        raise ValueError(
            f"filename_prefix: ComfyUI does not save to {prefix!r}, which leads outside its output folder by a link; "
            "use another folder, or start ComfyUI with --output-directory."
        ) from error
    return Path(folder), f"{name}_{counter:05}_", subfolder


def _date(pattern: str) -> str:
    """The words of the frontend's %date:…%, which it fills in for ComfyUI's own save nodes only."""
    words = {"yyyy": "%Y", "yy": "%y", "MM": "%m", "dd": "%d", "hh": "%H", "mm": "%M", "ss": "%S"}
    return re.sub("yyyy|yy|MM|dd|hh|mm|ss", lambda word: time.strftime(words[word[0]]), pattern)


def _metadata(hidden) -> dict:
    if args.disable_metadata:
        return {}
    return {**({"prompt": hidden.prompt} if hidden.prompt else {}), **(hidden.extra_pnginfo or {})}


NODES = [SaveLayers, LoadLayers, LoadLayerImage]
