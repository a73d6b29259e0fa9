"""LayerDiffuse: pictures with transparency, generated, decoded and encoded."""

import torch
from comfy_api.latest import io

from ..patches import autoencoder, rgba_vae, transparency_model, transparent_latents
from ..patches import layer_files as files
from ..patches.attention_sharing import together
from ..patches.layer_rows import sample_rows
from ..techniques.arrange import beside_alpha
from ..techniques.compositing import flatten
from ..techniques.layers import Layer, LayerStack, write_layers
from ..techniques.transparency import over_gray
from .sampling import sampling_inputs
from .sockets import LayerModelFile, Layers, Node, Transparency, schema

NAMES = ["LayerDiffuse", "layerdiffusion", "transparent", "RGBA", "alpha"]


def weights_input(tooltip: str, optional: bool = False):
    return Transparency.Input("transparency", optional=optional, tooltip=tooltip)


class LoadTransparency(LayerModelFile):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Strata_LoadTransparency",
            display_name="Load transparency (LayerDiffuse)",
            category="Strata/Transparency",
            search_aliases=[*NAMES, "layer_model", "load layer diffuse"],
            description="Loads one of LayerDiffuse's weight files from models/layer_model and finds out by itself "
            "what it is for.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=files.choices(files.Transparency),
                    tooltip=(
                        "A file of LayerDiffuse below models/layer_model, whatever its name. The help page says where "
                        "to get the published ones."
                    ),
                )
            ],
            outputs=[
                Transparency.Output(
                    "transparency",
                    display_name="transparency",
                    tooltip="The weights, for the other nodes of this category.",
                ),
                io.String.Output(
                    "found", display_name="found", tooltip="What the file is and which family of models it is for."
                ),
            ],
        )

    @classmethod
    def execute(cls, file):
        loaded = files.load(file, files.Transparency)
        return io.NodeOutput(loaded, f"{loaded.name}: {loaded.describe()}")


class LoadRGBAVAE(LayerModelFile):
    folder = rgba_vae.KIND

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Strata_LoadRGBAVAE",
            display_name="Load RGBA VAE",
            category="Strata/Transparency",
            search_aliases=["alpha VAE", "AlphaVAE", "transparent VAE", "RGBA autoencoder", "load VAE with alpha"],
            description="Loads a VAE whose images have alpha. VAE Decode then gives RGBA images, and Encode "
            "transparency keeps the alpha of an image.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=rgba_vae.choices(),
                    tooltip="A file below models/vae with four image channels: the pack's own, or one of AlphaVAE's or "
                    "Qwen-Image-Layered's form. Of a diffusers folder choose its diffusion_pytorch_model.safetensors.",
                )
            ],
            outputs=[io.Vae.Output("VAE", display_name="VAE", tooltip="For any node that takes a VAE.")],
        )

    @classmethod
    def execute(cls, file):
        return io.NodeOutput(rgba_vae.load(file))


class ApplyTransparency(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Strata_ApplyTransparency",
            display_name="Apply transparency (LayerDiffuse)",
            category="Strata/Transparency",
            search_aliases=[*NAMES, "transparent background", "layer diffuse apply"],
            description="Makes a model draw one object with hidden transparency, or a layer that goes with given "
            "ones. Decode with Decode transparency.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A model of the weights' family. LoRAs, ControlNets and other patches may come before or "
                    "after.",
                ),
                weights_input("Weights for a model, from Load transparency."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-2.0,
                    max=2.0,
                    step=0.05,
                    round=0.001,
                    tooltip="Strength of the weights; 0 leaves the model as it is. Transparency needs about 1.",
                ),
                io.Latent.Input(
                    "layer",
                    optional=True,
                    tooltip=(
                        "The given foreground or background, encoded by the VAE, for files with more input channels "
                        "(fg2ble, bg2ble, fgble2bg, bgble2fg). Flatten transparent images on mid gray (#808080) "
                        "first."
                    ),
                ),
                io.Latent.Input(
                    "blended",
                    optional=True,
                    tooltip="The given blended image, encoded by the VAE, for fgble2bg and bgble2fg.",
                ),
            ],
            outputs=[
                io.Model.Output("MODEL", display_name="model", tooltip="A copy of the model with the weights on it.")
            ],
        )

    @classmethod
    def execute(cls, model, transparency, strength, layer=None, blended=None):
        given = [None if latent is None else latent["samples"] for latent in (layer, blended)]
        return io.NodeOutput(transparency_model.apply(model, transparency, strength, *given))


class DecodeTransparency(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Strata_DecodeTransparency",
            display_name="Decode transparency (LayerDiffuse)",
            category="Strata/Transparency",
            search_aliases=[*NAMES, "layer diffuse decode", "latent to RGBA"],
            description="Finds the transparency that is hidden in a latent: an image with alpha. Any size and batch.",
            inputs=[
                weights_input("A decoder, from Load transparency. A VAE with alpha needs none.", optional=True),
                io.Latent.Input("samples", tooltip="The latent, as it comes from the sampler."),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="The same latent decoded by VAE Decode. Not needed when a VAE is connected.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="The model's VAE, which decodes the latent here. Not used when image is connected. One "
                    "from Load RGBA VAE finds the alpha by itself.",
                ),
                io.Combo.Input(
                    "passes",
                    options=["8", "4", "2", "1"],
                    default="8",
                    tooltip=(
                        "How often the image is decoded, mirrored and turned; the median counts. 8 is as published; "
                        "fewer are faster, with rougher edges and now and then a stain in the alpha."
                    ),
                ),
                io.Int.Input(
                    "tile_size",
                    default=0,
                    min=0,
                    max=8192,
                    step=64,
                    tooltip=(
                        "Sides in pixels of parts that are decoded one by one, which needs less memory; 0 decodes the "
                        "image whole. The decoder sees less around it then: use 1024 or more; below 128 counts as "
                        "128."
                    ),
                ),
                io.Image.Input(
                    "background",
                    optional=True,
                    tooltip=(
                        "An image of the same size to go behind it in the layers: one for all, or one for each. "
                        "LayerFusion sampler and Sample joint layers make such ones."
                    ),
                ),
                io.Combo.Input(
                    "clean",
                    options=list(transparent_latents.CLEAN),
                    default=transparent_latents.CLEAN[0],
                    optional=True,
                    tooltip=(
                        "on: takes away a faint veil and specks apart from the object, of less than 2 % of it. auto: "
                        "on for the mini family, whose small decoder leaves some; off for all others, as published."
                    ),
                ),
            ],
            outputs=[
                io.Image.Output(
                    "IMAGE",
                    display_name="image",
                    tooltip="RGBA with straight alpha; colours run on where nothing is seen.",
                ),
                io.Mask.Output("MASK", display_name="mask", tooltip="Transparency, 1 = transparent."),
                Layers.Output(
                    "LAYERS",
                    display_name="layers",
                    is_output_list=True,
                    tooltip="One document per image: the background, where one is connected, and the image.",
                ),
                io.Image.Output(
                    "composite",
                    display_name="composite",
                    tooltip="The image over its background; without one the image as it is.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        samples,
        passes,
        tile_size,
        transparency=None,
        image=None,
        vae=None,
        background=None,
        clean=transparent_latents.CLEAN[0],
    ):
        if transparency is None:
            rgba = rgba_vae.decode(vae, samples["samples"], tile_size, background)
        else:
            latent = transparent_latents.check_latent(samples, transparency)
            image = _picture_of(latent, image, vae).movedim(-1, 1)
            found = transparent_latents.decode(transparency, image, latent, int(passes), tile_size, clean)
            rgba = torch.cat(found, 1).movedim(1, -1)
        background = None if background is None else _behind(background, rgba)
        behind = [None] * len(rgba) if background is None else background
        stacks = [_cut_out(*pair) for pair in zip(rgba, behind, strict=True)]
        composite = rgba if background is None else torch.stack([flatten(stack)[0] for stack in stacks])
        return io.NodeOutput(rgba, 1 - rgba[..., 3], [write_layers(stack) for stack in stacks], composite)


def _picture_of(latent: torch.Tensor, image: torch.Tensor | None, vae) -> torch.Tensor:
    """The picture [B,H,W,3] of a latent, decoded here when there is none. Raises ValueError for that of another one."""
    if image is None and vae is None:
        raise ValueError("image: connect the decoded image, or connect the model's VAE to vae.")
    image = (autoencoder.decode(vae, latent) if image is None else image)[..., :3]
    if image.shape[:3] != (len(latent), latent.shape[2] * 8, latent.shape[3] * 8):
        raise ValueError(
            f"image: {_sizes(image, 'image')} and {len(latent)} of {latent.shape[3] * 8}×{latent.shape[2] * 8} "
            "in the latent do not go together; connect the decoded image of these samples, unchanged."
        )
    return image


def _behind(background: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """A background for each picture. Raises ValueError."""
    if background.shape[1:3] != image.shape[1:3] or len(background) not in (1, len(image)):
        raise ValueError(
            f"background: {_sizes(background, 'background')} and {_sizes(image, 'image')} do not go together; "
            "connect one background of that size, or one for each."
        )
    return background.expand(len(image), -1, -1, -1)


def _cut_out(foreground: torch.Tensor, background: torch.Tensor | None) -> LayerStack:
    behind = [] if background is None else [Layer(background, "background")]
    return LayerStack((foreground.shape[1], foreground.shape[0]), (*behind, Layer(foreground, "foreground")))


class EncodeTransparency(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Strata_EncodeTransparency",
            display_name="Encode transparency (LayerDiffuse)",
            category="Strata/Transparency",
            search_aliases=[*NAMES, "layer diffuse encode", "RGBA to latent"],
            description="Hides an image's transparency in its latent, so that a model with transparency can go on "
            "from it (denoise below 1). An RGBA VAE needs no encoder.",
            inputs=[
                Transparency.Input(
                    "transparency",
                    optional=True,
                    tooltip="An encoder, from Load transparency. Not needed with a VAE from Load RGBA VAE.",
                ),
                io.Image.Input(
                    "image",
                    tooltip="RGBA, or RGB with a mask. Sides that are no multiple of 8 are filled up with "
                    "transparency.",
                ),
                io.Vae.Input("vae", tooltip="The model's VAE, or an RGBA VAE in its latent space."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Transparency, 1 = transparent, as Load Image gives it; multiplies with the image's alpha, "
                    "unless it is that alpha over again.",
                ),
            ],
            outputs=[
                io.Latent.Output("LATENT", display_name="latent", tooltip="For a sampler, or for Decode transparency.")
            ],
        )

    @classmethod
    def execute(cls, image, vae, transparency=None, mask=None):
        colour, alpha = image[..., :3].movedim(-1, 1), _alpha(image, mask)
        if transparency is None:
            return io.NodeOutput({"samples": rgba_vae.encode(vae, colour, alpha)})
        return io.NodeOutput({"samples": transparent_latents.encode(transparency, vae, colour, alpha)})


def _alpha(image: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """[B,1,H,W]: the picture's alpha and the mask together; once where they are the same. Raises ValueError for a mask
    of another size.
    """
    alpha = image[..., 3:] if image.shape[-1] == 4 else torch.ones_like(image[..., :1])
    if mask is None:
        return alpha.movedim(-1, 1)
    if mask.shape[1:] != image.shape[1:3] or len(mask) not in (1, len(image)):
        raise ValueError(
            f"mask: {_sizes(mask, 'mask')} and {_sizes(image, 'image')} do not go together; make them the same size, "
            "or disconnect a mask that is not the image's."
        )
    beside = [beside_alpha(*pair) for pair in zip(image, mask.expand(len(image), -1, -1), strict=True)]
    shown = [torch.ones_like(mask[0]) if one is None else 1 - one for one in beside]
    return alpha.movedim(-1, 1) * torch.stack(shown)[:, None]


class SampleJointLayers(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Strata_SampleJointLayers",
            display_name="Sample joint layers (LayerDiffuse)",
            category="Strata/Transparency",
            search_aliases=[*NAMES, "layer diffuse joint", "foreground and background"],
            description="SD1.5: draws foreground, background and blended image together, so that they agree. Needs "
            "layer_sd15_joint.",
            inputs=[
                io.Model.Input("model", tooltip="An SD1.5 model, without Apply transparency."),
                weights_input("Attention sharing of three images, from Load transparency."),
                io.Conditioning.Input("foreground", tooltip="Prompt of the foreground: the object alone."),
                io.Conditioning.Input("background", tooltip="Prompt of the background."),
                io.Conditioning.Input("blended", tooltip="Prompt of the whole image."),
                *sampling_inputs(),
            ],
            outputs=[
                io.Latent.Output("FOREGROUND", display_name="foreground", tooltip="For Decode transparency."),
                io.Latent.Output("BACKGROUND", display_name="background", tooltip="For VAE Decode."),
                io.Latent.Output("BLENDED", display_name="blended", tooltip="For VAE Decode."),
            ],
        )

    @classmethod
    def execute(cls, model, transparency, foreground, background, blended, **sampling):
        prompts = [("foreground", foreground), ("background", background), ("blended", blended)]
        shared = transparency_model.share(model, transparency, 3)
        return io.NodeOutput(*sample_rows(shared, together(prompts), 3, **sampling))


class SampleAroundLayer(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Strata_SampleAroundLayer",
            display_name="Sample around a layer (LayerDiffuse)",
            category="Strata/Transparency",
            search_aliases=[*NAMES, "fg2bg", "bg2fg", "layer diffuse cond joint"],
            description="SD1.5: draws the other layer and the blended image for a given one. Needs layer_sd15_fg2bg "
            "or layer_sd15_bg2fg.",
            inputs=[
                io.Model.Input("model", tooltip="An SD1.5 model, without Apply transparency."),
                weights_input(
                    "Attention sharing of two images, from Load transparency: fg2bg when a foreground is given, "
                    "bg2fg for a background."
                ),
                io.Image.Input(
                    "image",
                    tooltip="The given foreground (RGBA) or background. Another size is scaled and centred to fill "
                    "the frame.",
                ),
                io.Conditioning.Input("layer", tooltip="Prompt of the layer that is drawn."),
                io.Conditioning.Input("blended", tooltip="Prompt of the whole image."),
                *sampling_inputs(),
            ],
            outputs=[
                io.Latent.Output(
                    "LAYER",
                    display_name="layer",
                    tooltip="The new background, for VAE Decode, or foreground, for Decode transparency.",
                ),
                io.Latent.Output("BLENDED", display_name="blended", tooltip="For VAE Decode."),
            ],
        )

    @classmethod
    def execute(cls, model, transparency, image, layer, blended, **sampling):
        image = image.movedim(-1, 1)
        picture = over_gray(image[:, :3], image[:, 3:]) if image.shape[1] == 4 else image
        shared = transparency_model.share(model, transparency, 2, picture=picture * 2 - 1)
        return io.NodeOutput(*sample_rows(shared, together([("layer", layer), ("blended", blended)]), 2, **sampling))


def _sizes(images: torch.Tensor, what: str) -> str:
    return f"{len(images)} {what}{'s' * (len(images) > 1)} of {images.shape[2]}×{images.shape[1]}"


NODES = [
    LoadTransparency,
    LoadRGBAVAE,
    ApplyTransparency,
    DecodeTransparency,
    EncodeTransparency,
    SampleJointLayers,
    SampleAroundLayer,
]
