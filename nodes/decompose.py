"""LayeringDiff: an image taken apart into what stands in front and what is behind it."""

from __future__ import annotations

import re

import torch
from comfy.utils import ProgressBar
from comfy_api.latest import io

from ..patches import decomposer as layeringdiff
from ..patches import detection, layer_files
from ..techniques import matting
from ..techniques.layering import OPAQUE, composite, visible_to_own
from ..techniques.layers import Layer, LayerStack, write_layers
from .depth_inputs import NEAR, DepthReader, depth_input
from .inputs import named
from .sampling import sampler_input, scheduler_input, seed_input, steps_input
from .sockets import Decomposer, LayerModelFile, Layers, Node, schema, told

NAMES = ["LayeringDiff", "decompose", "layers from image", "foreground", "background"]
IN_FILE = "in file"
METHODS = ("closed form", "ViTMatte")
BEST, NEAREST = "best", "nearest"
MATCHES = (BEST, "all", NEAREST)
STARTS = ("noise", "image")


class DetectForeground(Node):
    """Things that words name, as masks.

    Source: layeringdiff, Sec. 3.2
    Source: dreamlayer, Sec. 3.4 and App. A.1 (the foremost thing, its mask and its words)
    Differs: the mask is what a segmenter finds in the box of the words; DreamLayer segments everything first, and takes
    the words of the box that overlaps most.
    """

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Strata_DetectForeground",
            display_name="Detect foreground (text to mask)",
            category="Strata/Decompose",
            search_aliases=[*NAMES, "Grounding DINO", "SAM", "segment by words", "text to mask"],
            description="Finds what words name in an image and gives its mask. Any other mask does as well for the "
            "nodes that follow.",
            inputs=[
                io.Image.Input("image", tooltip="The image, or a batch; each is searched."),
                io.String.Input(
                    "prompt",
                    default="",
                    tooltip="What to find, for example: a dog. Several things with commas between.",
                ),
                io.Combo.Input(
                    "detector",
                    options=detection.DETECTORS.choices(),
                    tooltip="A model folder of the transformers library below models/grounding-dino or models/sam3. "
                    "SAM 3 makes masks by itself.",
                ),
                io.Combo.Input(
                    "segmenter",
                    options=detection.SEGMENTERS.choices(),
                    tooltip="A model folder of the transformers library below models/sam2 or models/sams, which makes "
                    "masks from the boxes of the detector. Not used with SAM 3.",
                ),
                io.Combo.Input(
                    "matches",
                    options=list(MATCHES),
                    default=BEST,
                    tooltip="best: one mask for each image, of the surest match. all: one for each match, those that "
                    "reach lowest in the image first, since they mostly stand in front. nearest: one mask for each "
                    "image, of the match that is nearest by depth.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.35,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How sure the detector has to be of a box; lower finds more.",
                ),
                io.Float.Input(
                    "text_threshold",
                    default=0.25,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How sure it has to be of the word, for Grounding DINO.",
                ),
                depth_input(
                    tooltip="For nearest: depth of the image from any depth node; another size is resized.",
                    optional=True,
                ),
                io.Combo.Input(
                    "near_is",
                    options=NEAR.options,
                    default=NEAR.default,
                    optional=True,
                    tooltip=NEAR.tooltip,
                ),
            ],
            outputs=[
                io.Mask.Output("MASK", display_name="mask", tooltip="1 where the thing is."),
                io.Mask.Output("box", display_name="box", tooltip="The box of each match as a mask."),
                io.String.Output("found", display_name="found", tooltip="Words, sureness and box of each match."),
                io.String.Output(
                    "words", display_name="words", tooltip="Which of the words each match is of, one a line."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        image,
        prompt,
        detector,
        segmenter,
        matches,
        threshold,
        text_threshold,
        depth=None,
        near_is=NEAR.default,
    ):
        words = [word.strip() for word in re.split(r"[,;\n]", prompt) if word.strip()]
        if not words:
            raise ValueError("prompt: there are no words in it; write what to find, for example: a dog.")
        reader, image = DepthReader(near_is, "auto"), image[..., :3]
        if matches == NEAREST:
            if depth is None:
                raise ValueError(
                    "depth: nothing is connected; connect the depth of the image, or choose other matches."
                )
            depth = reader.read(depth, image)
        progress = ProgressBar(2 * len(image))
        found = detection.find(
            image, words, detector, segmenter, matches != BEST, threshold, text_threshold, progress.update
        )
        if matches == NEAREST:
            found = [one[[detection.nearest(one.masks, own)]] for one, own in zip(found, depth, strict=True)]
        boxes = torch.cat([detection.box_masks(one.boxes, image.shape[1:3]) for one in found])
        lines = [f"image {number}: {line}" for number, one in enumerate(found, 1) for line in one.lines()]
        labels = [label for one in found for label in one.labels]
        notes = told([*reader.notes, *lines])
        return io.NodeOutput(
            torch.cat([one.masks for one in found]), boxes, "\n".join(lines), "\n".join(labels), ui=notes
        )


class MatteForeground(Node):
    """The alpha of what a mask marks roughly.

    Source: layeringdiff, Sec. 3.2
    Differs: the trimap's width is a share of the image's short side, 2.5 % by default; MatteAnything, which the paper
    cites, takes about 25 pixels at any size.
    """

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Strata_MatteForeground",
            display_name="Matte foreground (remove background)",
            category="Strata/Decompose",
            search_aliases=[*NAMES, "matting", "trimap", "ViTMatte", "alpha from mask", "hair", "background removal"],
            description="Finds the fine alpha of an object from its rough mask or a trimap: hair, glass, soft edges.",
            inputs=[
                io.Image.Input("image", tooltip="The image, or a batch."),
                io.Mask.Input(
                    "mask",
                    tooltip="1 where the object is, one for each image or one for all. A trimap works too, see trimap.",
                ),
                io.Boolean.Input(
                    "trimap",
                    default=False,
                    tooltip="on: the mask is a trimap. Where it is 0 or 1 it stays, and the values between are found. "
                    "off: its edge is found within the width.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default=METHODS[0],
                    tooltip="closed form: no model, needs pymatting. ViTMatte: a trained network, better for hair.",
                ),
                io.Combo.Input(
                    "matting_model",
                    options=detection.MATTING.choices(),
                    tooltip="For ViTMatte: a model folder of the transformers library below models/vitmatte.",
                ),
                io.Float.Input(
                    "width_percent",
                    default=2.5,
                    min=0.0,
                    max=50.0,
                    step=0.1,
                    tooltip="How far from the mask's edge alpha is found, to either side, in percent of the image's "
                    "short side.",
                ),
                io.Int.Input(
                    "width_pixels", default=0, min=0, max=1024, tooltip="The same in pixels; 0 uses the percentage."
                ),
                io.Combo.Input(
                    "transparent_things",
                    options=["off", *detection.DETECTORS.choices()],
                    default="off",
                    tooltip="A detector that looks for glass, lenses, bubbles and the like; inside their boxes all of "
                    "the object's alpha is found anew.",
                ),
            ],
            outputs=[
                io.Mask.Output("alpha", display_name="alpha", tooltip="1 = opaque: for Decompose image."),
                io.Mask.Output(
                    "used_trimap", display_name="trimap", tooltip="What was known, and 0.5 where it was not."
                ),
            ],
        )

    @classmethod
    def execute(cls, image, mask, trimap, method, matting_model, width_percent, width_pixels, transparent_things):
        image, mask = image[..., :3], _fitting(mask, image)
        reach = width_pixels or max(1, round(width_percent / 100 * min(image.shape[1:3])))
        trimaps = mask if trimap else torch.stack([matting.trimap_of((one > 0.5).float(), reach) for one in mask])
        if unclear := [number for number, one in enumerate(trimaps, 1) if ((one > 0) & (one < 1)).all()]:
            do = "paint 1 where the object surely is and 0 where it is not" if trimap else "make the width smaller"
            raise ValueError(
                f"mask: nothing in mask {unclear[0]} is certain, neither of the object nor of what is around it; "
                f"{do}, or connect another mask."
            )
        if transparent_things != "off":
            with named("transparent_things", "detector"):
                trimaps = detection.opened(image, trimaps, transparent_things)
        notes = [
            f"Mask {number} has nothing between 0 and 1 and stays as it is; turn trimap off for a rough mask."
            for number, one in enumerate(trimaps, 1)
            if trimap and not ((one > 0) & (one < 1)).any()
        ] + [
            f"Mask {number} is empty, so nothing of the image is left; paint it where the object is."
            for number, one in enumerate(mask, 1)
            if not one.any()
        ]
        progress = ProgressBar(len(image))
        if method == METHODS[1]:
            alphas = detection.vitmatte(image, trimaps, matting_model, progress.update)
            return io.NodeOutput(alphas, trimaps, ui=told(notes))
        alphas = []
        for pair in zip(image, trimaps, strict=True):
            alphas.append(matting.matte_of_trimap(*pair))
            progress.update(1)
        return io.NodeOutput(torch.stack(alphas), trimaps, ui=told(notes))


def _fitting(mask: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """A mask [B,H,W] for each image. Raises ValueError."""
    if mask.shape[1:] != image.shape[1:3]:
        raise ValueError(
            f"mask: it has {mask.shape[2]}×{mask.shape[1]} pixels and the image {image.shape[2]}×{image.shape[1]}; "
            "connect a mask of the image's size."
        )
    if len(mask) not in (1, len(image)):
        raise ValueError(
            f"mask: there are {len(mask)} masks and {len(image)} image{'s' * (len(image) > 1)}; connect one mask, or "
            "one for each image."
        )
    return mask.expand(len(image), -1, -1)


class LoadDecomposer(LayerModelFile):
    @classmethod
    def define_schema(cls):
        files = layer_files.choices(layeringdiff.Decomposer)
        return schema(
            node_id="Strata_LoadDecomposer",
            display_name="Load decomposer (LayeringDiff)",
            category="Strata/Decompose",
            search_aliases=[*NAMES, "layer_model", "FBDD", "HFA"],
            description="Loads LayeringDiff's networks, which python -m training layeringdiff makes, and finds out by "
            "itself what they are for.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=files,
                    default=layer_files.DECOMPOSER,
                    tooltip="A file below models/layer_model, whatever its name: of both layers, or of the foreground.",
                ),
                io.Combo.Input(
                    "background_file",
                    options=[IN_FILE, *files],
                    default=IN_FILE,
                    optional=True,
                    tooltip="The background's denoiser, where it is a file of its own.",
                ),
                io.Combo.Input(
                    "alignment_file",
                    options=[IN_FILE, *files],
                    default=IN_FILE,
                    optional=True,
                    tooltip="The networks that align details (HFA), where they are a file of their own.",
                ),
            ],
            outputs=[
                Decomposer.Output("decomposer", display_name="decomposer", tooltip="For Decompose image."),
                io.String.Output(
                    "found", display_name="found", tooltip="What the files are and which family of models they are for."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, file, background_file=IN_FILE, alignment_file=IN_FILE):
        for name, socket, _ in _parts(file, background_file, alignment_file):
            if sentence := layer_files.missing(name):
                return socket + sentence.removeprefix("file")
        return True

    @classmethod
    def fingerprint_inputs(cls, file, background_file=IN_FILE, alignment_file=IN_FILE):
        return "".join(map(layer_files.state, (file, background_file, alignment_file)))

    @classmethod
    def execute(cls, file, background_file=IN_FILE, alignment_file=IN_FILE):
        loaded = []
        for name, socket, layer in _parts(file, background_file, alignment_file):
            with named(socket, "file"):
                loaded.append(layer_files.load(name, layeringdiff.Decomposer, layer))
        loaded = layeringdiff.join(loaded)
        return io.NodeOutput(loaded, f"{loaded.name}: {loaded.describe()}, predicts {loaded.prediction}")


def _parts(file: str, background_file: str, alignment_file: str) -> list[tuple[str, str, str]]:
    """(name, socket, the layer that a nameless UNet in it is taken for) of each file that was chosen."""
    chosen = (
        (file, "file", "foreground"),
        (background_file, "background_file", "background"),
        (alignment_file, "alignment_file", "foreground"),
    )
    return [part for part in chosen if part[0] != IN_FILE]


class DecomposeImage(Node):
    """An image as layers: objects with alpha, and all that is behind them.

    Source: layeringdiff, Sec. 3.3
    Differs: colours follow what is seen of each layer, and the layers are brought to add up to the image, unless exact
    is off; HFA is off by default.
    Differs: DDIM in 20 steps by default; the paper does not say how it samples.
    """

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Strata_DecomposeImage",
            display_name="Decompose image (foreground, layer decomposer)",
            category="Strata/Decompose",
            search_aliases=[*NAMES, "image to layers", "remove object", "extract object", "foreground and background"],
            description="Takes an image apart: each object that a mask marks becomes a layer with alpha, and what it "
            "hid is drawn behind it. The layers add up to the image.",
            inputs=[
                io.Image.Input("image", tooltip="A photograph or a generated image; a batch with one mask each."),
                io.Mask.Input(
                    "mask",
                    tooltip="Alpha, 1 where the object is, from any source; Matte foreground makes fine edges. A batch "
                    "of masks for one image gives one layer each, the first in front.",
                ),
                io.Vae.Input("vae", tooltip="The VAE of the decomposer's family."),
                Decomposer.Input("decomposer", tooltip="From Load decomposer."),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The inpainting model that the decomposer is added to. Not used by files of whole UNets.",
                ),
                io.Conditioning.Input(
                    "empty_prompt",
                    optional=True,
                    tooltip="An empty prompt, encoded. Only for files without one.",
                ),
                io.Boolean.Input(
                    "align_details",
                    default=False,
                    tooltip="Brings the image's own fine details into the layers by networks (HFA, as published), if "
                    "the file has them. With exact on, the mini family's layers are better without.",
                ),
                io.Boolean.Input(
                    "exact",
                    default=True,
                    tooltip="on: colours follow what is seen of each layer, and the layers add up to the image in "
                    "every pixel. off: as published, they nearly do.",
                ),
                io.Combo.Input(
                    "start",
                    options=list(STARTS),
                    default=STARTS[0],
                    tooltip="What sampling starts from: noise, as published, or the image under noise.",
                ),
                seed_input("The same seed gives the same layers; another one fills what was hidden in another way."),
                steps_input("Steps for each layer: two passes for each mask."),
                sampler_input("ddim", "As in KSampler."),
                scheduler_input("ddim_uniform", "As in KSampler."),
            ],
            outputs=[
                Layers.Output(
                    "LAYERS",
                    display_name="layers",
                    is_output_list=True,
                    tooltip="A document for each image: the background, and the objects in front of it.",
                ),
                io.Image.Output(
                    "foreground",
                    display_name="foreground",
                    tooltip="RGBA, one for each object, the first in front; of a batch one for each image.",
                ),
                io.Image.Output("background", display_name="background", tooltip="The image without the objects."),
                io.Float.Output(
                    "error",
                    display_name="error",
                    tooltip="Mean difference between the layers over each other and the image, 0 to 1.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        image,
        mask,
        vae,
        decomposer,
        align_details,
        exact,
        start,
        seed,
        steps,
        sampler_name,
        scheduler,
        model=None,
        empty_prompt=None,
    ):
        image, alphas = image[..., :3].clamp(0, 1), _alphas(mask, image)
        run = layeringdiff.Run(seed, steps, sampler_name, scheduler, start == STARTS[1])
        decomposer = layeringdiff.ready(decomposer, vae, model, empty_prompt)
        fronts, behind = layeringdiff.take_apart(
            model, vae, decomposer, image.movedim(-1, 1), alphas, run, align_details, exact
        )
        foregrounds, behind = torch.cat([fronts, alphas], 2).movedim(2, -1), behind.movedim(1, -1)
        error = (_recomposed(foregrounds, behind) - image).abs().mean().item()
        stacks = [write_layers(_stack(*pair)) for pair in zip(behind, foregrounds.unbind(1), strict=True)]
        empty = [number for number, alpha in enumerate(alphas, 1) if not alpha.any()]
        full = [number for number, alpha in enumerate(alphas, 1) if (alpha >= OPAQUE).flatten(1).all(1).any()]
        notes = [f"Mask {number} is empty, and so is its layer." for number in empty]
        notes += [
            f"Mask {number} covers the whole image, so all that is behind it is made up; invert the mask if it marks "
            "the background."
            for number in full
        ]
        return io.NodeOutput(stacks, foregrounds.flatten(0, 1), behind, error, ui=told(notes))


def _recomposed(foregrounds: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
    """[B,H,W,3] of objects [K,B,H,W,4], front to back, and a background [B,H,W,3]."""
    for front in foregrounds.flip(0):
        background = composite(front[..., :3], background, front[..., 3:])
    return background


def _alphas(mask: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """[K,B,1,H,W]: of one image an object for each mask, of several an object with one mask, or with one each. Raises
    ValueError.
    """
    if len(image) > 1:
        return _fitting(mask, image)[None, :, None]
    if mask.shape[1:] != image.shape[1:3]:
        _fitting(mask[:1], image)
    return visible_to_own(mask[:, None, None])


def _stack(background: torch.Tensor, foregrounds: torch.Tensor) -> LayerStack:
    """background: [H,W,3]. foregrounds: [K,H,W,4], front to back."""
    names = ["foreground"] if len(foregrounds) == 1 else [f"foreground {i + 1}" for i in range(len(foregrounds))]
    objects = [Layer(front, name) for front, name in zip(foregrounds, names, strict=True)]
    return LayerStack((background.shape[1], background.shape[0]), (Layer(background, "background"), *objects[::-1]))


NODES = [DetectForeground, MatteForeground, LoadDecomposer, DecomposeImage]
