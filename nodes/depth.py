"""Nodes of the menu category Strata/Depth."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from comfy.utils import ProgressBar, common_upscale
from comfy_api.latest import io
from PIL import Image

from ..patches import depth_model
from ..techniques import depth as deglad
from ..techniques.arrange import name_lines
from ..techniques.layers import write_layers
from ..techniques.matting import refine_slices
from .depth_inputs import MISSING, NEAR, THRESHOLD, DepthReader, box_or_region, depth_input, range_inputs
from .inputs import input_file, input_names, input_state, save_temporary
from .sockets import Layers, Node, schema


def picker_files(image: torch.Tensor, depth: torch.Tensor, thresholds: list[float]) -> dict:
    """What the picker on the node draws: a small picture, and its depth in 16 bits (red the high byte, green the low
    one).
    """
    height, width = depth.shape
    scale = min(1.0, 768 / max(height, width))
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    front = torch.nn.functional.interpolate(image.permute(2, 0, 1)[None], size, mode="area")[0].permute(1, 2, 0)
    values = (deglad.resize_depth(depth[None], *size)[0] * 65535).round().int()
    packed = torch.stack([values // 256, values % 256, torch.zeros_like(values)], -1)
    pictures = {"front": (front.clamp(0, 1) * 255).round(), "depth": packed}
    return {
        "width": width,
        "height": height,
        "thresholds": thresholds,
        **{name: save_temporary(pixels.to(torch.uint8).cpu().numpy()) for name, pixels in pictures.items()},
    }


class SliceByDepth(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Strata_SliceByDepth",
            display_name="Slice by depth (photo to layers, slicer)",
            category="Strata/Depth",
            is_output_node=True,
            search_aliases=["DeGLaD", "split by depth", "cut into layers", "foreground and background"],
            description="Cuts an image into layers at one or more depths. Run it once, then click in the views on "
            "the node to choose where.",
            inputs=[
                io.Image.Input("image", tooltip="The image to cut into layers."),
                depth_input(),
                io.String.Input(
                    "thresholds",
                    default="0.5",
                    tooltip="Depths of the cuts (0 is nearest, 1 farthest), in any order, for example 0.3, 0.6.",
                ),
                io.String.Input(
                    "points",
                    default="",
                    tooltip=(
                        "Points on objects, as fractions of width and height, for example 0.5, 0.4; 0.2, 0.7. "
                        "Each adds a cut just behind the object there."
                    ),
                ),
                NEAR,
                MISSING,
                io.Float.Input(
                    "soft_edge",
                    default=1.0,
                    min=0.0,
                    max=256.0,
                    step=0.5,
                    tooltip=(
                        "Pixels over which neighbouring layers fade into each other; 0 cuts hard. Not used with "
                        "matting."
                    ),
                ),
                io.Combo.Input(
                    "refine_edges",
                    ["off", "matting"],
                    default="off",
                    tooltip=(
                        "matting: finds hair-fine alpha along each cut and removes the other side's colour from it. "
                        "Takes seconds; needs pymatting."
                    ),
                ),
                io.Int.Input(
                    "refine_width",
                    default=16,
                    min=2,
                    max=256,
                    tooltip="Pixels around each cut that matting may change.",
                ),
                io.Combo.Input(
                    "fill_holes",
                    ["none", "blurred"],
                    default="blurred",
                    tooltip=(
                        "blurred: continues each layer smoothly behind nearer ones. none: leaves holes; inpaint them "
                        "with the holes output."
                    ),
                ),
                *range_inputs(),
                io.String.Input(
                    "names",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="Names of the layers, one a line, back to front. A layer without one is named by its "
                    "depths.",
                ),
            ],
            outputs=[
                Layers.Output(
                    "layers",
                    display_name="layers",
                    is_output_list=True,
                    tooltip="One LAYERS document per image, layers back to front.",
                ),
                io.Mask.Output(
                    "masks",
                    display_name="masks",
                    tooltip="One per layer, back to front: 1 where a pixel belongs to it. They sum to 1.",
                ),
                io.Image.Output(
                    "depth_map",
                    display_name="depth",
                    tooltip="The depth that was used, black = nearest, white = farthest.",
                ),
                io.Mask.Output(
                    "holes",
                    display_name="holes",
                    tooltip="One mask per layer, back to front: 1 where nearer layers hide it.",
                ),
                io.String.Output(
                    "used_thresholds",
                    display_name="thresholds",
                    tooltip="Those of the first image, with those of its points.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        image,
        depth,
        thresholds,
        points,
        near_is,
        missing_depth,
        soft_edge,
        refine_edges,
        refine_width,
        fill_holes,
        names="",
        **depth_range,
    ):
        reader = DepthReader(near_is, missing_depth, **depth_range)
        depth = reader.read(depth, image)
        given, clicked = deglad.parse_thresholds(thresholds), deglad.parse_points(points)
        cuts = [deglad.all_thresholds(one, given, clicked) for one in depth]
        matted = refine_width if refine_edges == "matting" else None
        named = name_lines(names, max(map(len, cuts)) + 1)
        slices = _slices(image, depth, cuts, fill_holes == "blurred", soft_edge, matted, named)
        stacks, masks, holes = zip(*slices, strict=True)
        layers, gray = [write_layers(stack) for stack in stacks], depth[..., None].expand(-1, -1, -1, 3)
        shown = {"strata_slice": [picker_files(image[0, ..., :3], depth[0], cuts[0])]}
        used = ", ".join(f"{value:.4g}" for value in cuts[0])
        return io.NodeOutput(layers, torch.cat(masks), gray, torch.cat(holes), used, ui=shown | reader.ui())


def _slices(
    image: torch.Tensor,
    depth: torch.Tensor,
    cuts: list[list[float]],
    fill: bool,
    soft_edge: float,
    matted: int | None,
    names: list[str],
) -> Iterator:
    """Layers, masks and holes of one picture after the other. matted: within how many pixels edges are, None for not at
    all.
    """
    progress = ProgressBar(sum(len(used) + 1 for used in cuts))
    refine = None if matted is None else partial(refine_slices, width=matted, step=lambda: progress.update(1))
    opacity = image[..., 3].split(1) if image.shape[-1] == 4 else [None] * len(image)
    for picture in zip(image[..., :3], depth, cuts, opacity, strict=True):
        yield deglad.slice_picture(*picture, fill, soft_edge, refine, names)
        progress.update(1)


class DepthTopView(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Strata_DepthTopView",
            display_name="View depth from above",
            category="Strata/Depth",
            search_aliases=["DeGLaD", "top view", "bird's eye"],
            description="The scene from above: columns of the image against depth, nearest at the bottom. To choose "
            "thresholds without the editor.",
            inputs=[
                io.Image.Input("image", tooltip="The image; its colours are shown."),
                depth_input(),
                NEAR,
                MISSING,
                io.Int.Input(
                    "height", default=512, min=16, max=4096, tooltip="Height of the view in pixels, for depth 0 to 1."
                ),
                *range_inputs(),
            ],
            outputs=[
                io.Image.Output("view", display_name="view", tooltip="The view from above, as wide as the image.")
            ],
        )

    @classmethod
    def execute(cls, image, depth, near_is, missing_depth, height, **depth_range):
        reader = DepthReader(near_is, missing_depth, **depth_range)
        view = deglad.top_view(image, reader.read(depth, image), height)
        return io.NodeOutput(view, ui=reader.ui() or None)


class AmodalMask(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Strata_AmodalMask",
            display_name="Mask a region behind nearer things",
            category="Strata/Depth",
            search_aliases=["DeGLaD", "amodal", "occlusion mask"],
            description="A box, or a mask, without what is nearer than a depth: where an object at that depth can be "
            "seen. For inpainting.",
            inputs=[
                io.Image.Input("image", tooltip="The image that the region lies in; it gives the size."),
                depth_input(),
                THRESHOLD,
                io.Int.Input("x", default=0, min=-16384, max=16384, tooltip="Left side of the box in pixels."),
                io.Int.Input("y", default=0, min=-16384, max=16384, tooltip="Upper side of the box in pixels."),
                io.Int.Input("width", default=256, min=1, max=16384, tooltip="Width of the box in pixels."),
                io.Int.Input("height", default=256, min=1, max=16384, tooltip="Height of the box in pixels."),
                NEAR,
                MISSING,
                io.Mask.Input("region", optional=True, tooltip="A mask to use in place of the box, 1 = in the region."),
                *range_inputs(),
            ],
            outputs=[io.Mask.Output("mask", display_name="mask", tooltip="1 where the object can be seen.")],
        )

    @classmethod
    def execute(cls, image, depth, threshold, x, y, width, height, near_is, missing_depth, region=None, **depth_range):
        reader = DepthReader(near_is, missing_depth, **depth_range)
        depth = reader.read(depth, image)
        region = box_or_region(depth, x, y, width, height, region)
        return io.NodeOutput(deglad.amodal_mask(region, depth, threshold), ui=reader.ui() or None)


class ComposeByDepth(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Strata_ComposeByDepth",
            display_name="Compose two scenes at a depth",
            category="Strata/Depth",
            search_aliases=["DeGLaD", "swap background", "replace background"],
            description="Pastes what is nearer than a depth in one scene over another scene, and composes their "
            "depths in the same way.",
            inputs=[
                io.Image.Input("foreground", tooltip="The scene whose near part is kept; it gives the size."),
                depth_input("foreground_depth"),
                io.Image.Input(
                    "background", tooltip="The scene behind; scaled and centred to fill the foreground's frame."
                ),
                depth_input("background_depth"),
                THRESHOLD,
                NEAR,
                MISSING,
                io.Float.Input(
                    "soft_edge",
                    default=2.0,
                    min=0.0,
                    max=256.0,
                    step=0.5,
                    tooltip="Pixels over which the cut fades; 0 cuts hard.",
                ),
                *range_inputs(),
            ],
            outputs=[
                io.Image.Output("image", display_name="image", tooltip="The composite."),
                io.Mask.Output("mask", display_name="mask", tooltip="1 where the foreground scene shows."),
                io.Image.Output(
                    "composite_depth",
                    display_name="depth",
                    tooltip=("Depth of the composite, black = nearest. A depth ControlNet wants it inverted."),
                ),
                Layers.Output(
                    "layers",
                    display_name="layers",
                    is_output_list=True,
                    tooltip="Background and foreground, one document per image.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        foreground,
        foreground_depth,
        background,
        background_depth,
        threshold,
        near_is,
        missing_depth,
        soft_edge,
        **depth_range,
    ):
        front, back = foreground[..., :3], background[..., :3]
        if len(back) not in (1, len(front)):
            raise ValueError(
                f"background: there are {len(back)} images for {len(front)} foregrounds; connect one, or one for each."
            )
        reader = DepthReader(near_is, missing_depth, **depth_range)
        front_depth = reader.read(foreground_depth, front, "foreground_depth")
        back_depth = reader.read(background_depth, back, "background_depth")
        back, back_depth = _filling(front, back, back_depth)
        weights = deglad.soften(deglad.slice_masks(front_depth, [threshold]), soft_edge)
        image, depth = deglad.compose_by_depth(front, back, front_depth, back_depth, weights[:, 1])
        stacks = [write_layers(deglad.paste_layers(*pair)) for pair in zip(back, front, weights[:, 1], strict=True)]
        gray = depth[..., None].expand(-1, -1, -1, 3)
        return io.NodeOutput(image, weights[:, 1], gray, stacks, ui=reader.ui() or None)


def _filling(front: torch.Tensor, back: torch.Tensor, back_depth: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures and depth of another scene, scaled and centred to fill the foregrounds' frame, one for each of them.
    Raises ValueError.
    """
    height, width = front.shape[1:3]
    rows, columns = back.shape[1:3]
    cut = (
        round((columns - min(columns, rows * width / height)) / 2),
        round((rows - min(rows, columns * height / width)) / 2),
    )
    # As common_upscale crops, which leaves nothing of pictures of a few pixels.
    if columns <= 2 * cut[0] or rows <= 2 * cut[1]:
        raise ValueError(
            f"foreground, background: nothing is left of the background's {columns}×{rows} pixels when it is cut to "
            f"the foreground's shape of {width}×{height}; crop one of them."
        )
    back = common_upscale(back.movedim(-1, 1), width, height, "lanczos", "center").movedim(1, -1)
    back_depth = common_upscale(back_depth[:, None], width, height, "nearest-exact", "center")[:, 0]
    return back.expand(len(front), -1, -1, -1), back_depth.expand(len(front), -1, -1)


class LoadDepth(Node):
    @classmethod
    def define_schema(cls):
        names = input_names((".png", ".tif", ".tiff", ".npy", ".npz"))
        return schema(
            node_id="Strata_LoadDepth",
            display_name="Load depth",
            category="Strata/Depth",
            search_aliases=["16-bit depth", "load disparity", "depth png", "load depth map"],
            description="Loads a depth or disparity file with its full precision: 8- and 16-bit PNG, TIFF with "
            "floats, or a NumPy file.",
            inputs=[
                io.Combo.Input(
                    "file",
                    names,
                    upload=io.UploadType.image,
                    image_folder=io.FolderType.input,
                    tooltip="A depth file in ComfyUI's input folder; core's Load Image spoils 16-bit files (8 bits at "
                    "most, or all white).",
                )
            ],
            outputs=[
                io.Image.Output(
                    "depth", display_name="depth", tooltip="The stored values, integers scaled to 0..1; NaN stays NaN."
                )
            ],
        )

    @classmethod
    def execute(cls, file):
        values = read_depth_file(input_file(file))
        return io.NodeOutput(torch.from_numpy(values)[None, ..., None].expand(-1, -1, -1, 3))

    @classmethod
    def fingerprint_inputs(cls, file):
        return input_state(file)

    @classmethod
    def validate_inputs(cls, file):
        return (
            bool((path := input_file(file)) and path.is_file())
            or f"{file!r} is not a file in ComfyUI's input folder; upload it or choose another."
        )


def read_depth_file(path: Path) -> np.ndarray:
    """float32 [H,W]: integers of 8 or 16 bits scaled to 0..1, floats as they are. Raises ValueError naming the file."""
    try:
        values = _stored(path)
    except Exception as error:  # damaged files make NumPy, zipfile, zlib, Pillow and PyAV raise nearly anything
        raise ValueError(
            f"file: {path.name} cannot be read as depth ({error}); save it as PNG, TIFF or NPY."
        ) from error
    if isinstance(values, dict):
        found = {name: array for name, array in values.items() if _plane(array).ndim == 2 and array.dtype.kind in "uif"}
        named = {name: array for name, array in found.items() if "depth" in name.lower() or "disp" in name.lower()}
        chosen = named if len(named) == 1 else found
        if len(chosen) != 1:
            raise ValueError(
                f"file: {path.name} holds {', '.join(values) or 'no array'}, and it is not clear which one is the "
                "depth; save that array alone."
            )
        (values,) = chosen.values()
    values = _plane(values)
    if values.ndim != 2 or 0 in values.shape or values.dtype.kind not in "uif":
        raise ValueError(
            f"file: {path.name} holds {values.dtype} values of shape {values.shape}; depth is one number per pixel, "
            "[height, width]."
        )
    if values.dtype.kind == "f":
        return values.astype(np.float32)
    return values.astype(np.float32) / (255 if values.dtype.itemsize == 1 else 65535)


def _plane(values: np.ndarray) -> np.ndarray:
    """Without leading axes of length one, and without a last one when there are three."""
    while values.ndim > 2 and values.shape[0] == 1:
        values = values[0]
    return values[..., 0] if values.ndim == 3 and values.shape[-1] == 1 else values


def _stored(path: Path) -> np.ndarray | dict[str, np.ndarray]:
    """What the file holds; of an archive every array by its name."""
    if path.suffix.lower() in (".npy", ".npz"):
        values = np.load(path, allow_pickle=False)
        return values if isinstance(values, np.ndarray) else {name: values[name] for name in values.files}
    with open(path, "rb") as file:
        head = file.read(26)
    if head[:4] == b"\x89PNG" and head[24] == 16 and head[25] in (2, 6):  # Pillow would keep 8 of the 16 bits of colour
        import av

        with av.open(str(path)) as container:
            colours = next(container.decode(video=0)).to_ndarray(format="rgb48le")
        return (colours @ np.array([0.299, 0.587, 0.114])).round().astype(np.uint16)
    with Image.open(path) as picture:
        return np.array(picture if picture.mode in ("L", "F") or picture.mode.startswith("I") else picture.convert("L"))


class EstimateDepth(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Strata_EstimateDepth",
            display_name="Estimate depth (map, Depth Anything)",
            category="Strata/Depth",
            search_aliases=["Depth Anything V2", "monocular depth", "depth map"],
            description="Depth of an image by Depth Anything V2 (or another transformers depth model) from a folder "
            "below models/depth_estimation.",
            inputs=[
                io.Image.Input("image", tooltip="The image whose depth is wanted."),
                io.Combo.Input(
                    "model",
                    depth_model.FOLDERS.choices(),
                    tooltip="A folder below models/depth_estimation with config.json and weights.",
                ),
            ],
            outputs=[io.Image.Output("depth", display_name="depth", tooltip="Relative depth in 0..1, white = near.")],
        )

    @classmethod
    def execute(cls, image, model):
        return io.NodeOutput(depth_model.estimate(image[..., :3], model))


NODES = [SliceByDepth, DepthTopView, EstimateDepth, LoadDepth, AmodalMask, ComposeByDepth]
