"""BFS: a foreground with its shadow for a given background, or the foreground of an image and its background."""

import node_helpers
import torch
import torch.nn.functional as F
from comfy_api.latest import io

from ..patches import autoencoder, layer_files
from ..patches import back_to_front as method
from ..patches.rgba_vae import FILLED_UP
from ..techniques.back_to_front import box_of
from ..techniques.geometry import filled_up
from .inputs import encodable
from .sampling import cfg_input, sampler_input, scheduler_input, seed_input, steps_input
from .sockets import LayerModelFile, Node, schema

NAMES = ["BFS", "back to front", "add object", "foreground", "flux fill"]


class FillBackground(Node):
    """The background whole, and where the foreground is to stand.

    Source: bfs, Sec. 3
    Differs: the background is the mean of the VAE's posterior; the released code draws from it.
    Differs: sides are filled up to multiples of 16 by mirroring; the released code scales to a short side of 512.
    """

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Strata_FillBackground",
            display_name="Fill background (BFS)",
            category="Strata/Generate",
            search_aliases=[*NAMES, "inpaint conditioning"],
            description="Tells a Flux-Fill model the background and the box that the foreground is to stand in, as BFS "
            "wants it: the background whole, without a hole.",
            inputs=[
                io.Conditioning.Input("positive", tooltip="What shall stand in the box, as in: a red apple."),
                io.Conditioning.Input("negative", tooltip="An empty prompt; with cfg 1 it is not used."),
                io.Vae.Input("vae", tooltip="The model's VAE."),
                io.Image.Input("background", tooltip="The image without the object; one, or a batch."),
                io.Mask.Input("mask", tooltip="Where the foreground goes: object and shadow both have to fit in."),
                io.Boolean.Input(
                    "box",
                    default=True,
                    tooltip="on: the box around the mask, as BFS is trained. off: the mask as it is.",
                ),
            ],
            outputs=[
                io.Conditioning.Output("POSITIVE", display_name="positive", tooltip="For Sample foreground."),
                io.Conditioning.Output("NEGATIVE", display_name="negative", tooltip="For Sample foreground."),
                io.Latent.Output("LATENT", display_name="latent", tooltip="An empty latent of the background's size."),
            ],
        )

    @classmethod
    def execute(cls, positive, negative, vae, background, mask, box):
        mask = _checked(encodable(background, vae, "background"), mask)
        mask = box_of(mask) if box else mask
        whole = filled_up(background[..., :3].movedim(-1, 1), FILLED_UP)
        latent = autoencoder.encode(vae, whole.movedim(1, -1))
        values = {"concat_latent_image": latent, "concat_mask": _with_border(mask[:, None])}
        told = [node_helpers.conditioning_set_values(one, values) for one in (positive, negative)]
        return io.NodeOutput(*told, {"samples": torch.zeros_like(latent)})


def _checked(background: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A mask for each background. Raises ValueError."""
    if mask.shape[1:] != background.shape[1:3] or len(mask) not in (1, len(background)):
        sizes = f"{mask.shape[2]}×{mask.shape[1]}", f"{background.shape[2]}×{background.shape[1]}"
        raise ValueError(
            f"mask: {len(mask)} of {sizes[0]} and {len(background)} backgrounds of {sizes[1]} do not go together; "
            "connect one mask of that size, or one for each."
        )
    if not (mask > 0.5).flatten(1).any(1).all():
        raise ValueError("mask: it marks nothing above one half; paint where the foreground is to stand.")
    return mask.expand(len(background), -1, -1)


def _with_border(mask: torch.Tensor) -> torch.Tensor:
    """[B,1,H,W] as large as the background that is filled up; nothing is painted there."""
    height, width = mask.shape[-2:]
    return F.pad(mask, (0, -width % FILLED_UP, 0, -height % FILLED_UP))


class BackToFront(LayerModelFile):
    """The two branches of a Flux-Fill that read each other.

    Source: bfs, Sec. 3
    """

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Strata_BackToFront",
            display_name="Back to front (BFS)",
            category="Strata/Generate",
            search_aliases=[*NAMES, "information sharing", "dual branch"],
            description="Puts BFS on a Flux-Fill model: composite and foreground are sampled together and read each "
            "other.",
            inputs=[
                io.Model.Input("model", tooltip="A Flux-Fill model: flux1-fill-dev, or the mini family's."),
                io.Combo.Input(
                    "file",
                    options=layer_files.choices(layer_files.BackToFront),
                    default=layer_files.BACK_TO_FRONT,
                    tooltip="BFS's weights below models/layer_model, whatever the name: the mini family's, or your own "
                    "for Flux-Fill. A .pt file is read without running what is in it.",
                ),
                io.Combo.Input(
                    "layout",
                    options=list(method.LAYOUTS),
                    default=method.LAYOUTS[0],
                    tooltip="How the queries' low-rank terms are paired: as the file says, as in the paper, or as in "
                    "the released code.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.01,
                    tooltip="1 as trained; 0 is off: two plain branches that know nothing of each other.",
                ),
            ],
            outputs=[
                io.Model.Output("MODEL", display_name="model", tooltip="For Sample foreground."),
                io.String.Output("found", display_name="found", tooltip="What the file is and what it has."),
            ],
        )

    @classmethod
    def execute(cls, model, file, layout, strength):
        loaded = layer_files.load(file, layer_files.BackToFront)
        unknown = (
            f"; {len(loaded.unknown)} keys that nothing here reads, such as {', '.join(loaded.unknown[:3])}"
            if loaded.unknown
            else ""
        )
        patched = method.apply(model, loaded, strength, layout)
        return io.NodeOutput(patched, f"{loaded.name}: {loaded.describe()}{unknown}")


class SampleForeground(Node):
    """Composite and foreground, from the same noise, or the foreground of a composite that is there.

    Source: bfs, Sec. 3 and 5.4
    Differs: it starts with 20 steps of euler; the paper takes 50, at a guidance of 30 (FluxGuidance).
    """

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Strata_SampleForeground",
            display_name="Sample foreground (dual branch sampler)",
            category="Strata/Generate",
            search_aliases=[*NAMES, "ksampler", "extract foreground"],
            description="Samples a composite and its foreground together. With a composite connected it finds the "
            "foreground of that one.",
            inputs=[
                io.Model.Input("model", tooltip="From Back to front."),
                io.Conditioning.Input("positive", tooltip="From Fill background."),
                io.Conditioning.Input("negative", tooltip="From Fill background."),
                io.Latent.Input("latent_image", tooltip="From Fill background: one pair for each latent."),
                seed_input("The same seed gives the same images."),
                steps_input("Number of steps; 50 as published."),
                cfg_input(1.0, "1 for Flux, which has its guidance from FluxGuidance; 2 for the mini family."),
                sampler_input("euler", "The sampler, as in KSampler."),
                scheduler_input("simple", "Noise levels, as in KSampler."),
                io.Combo.Input(
                    "noise",
                    options=list(method.NOISE),
                    default=next(iter(method.NOISE)),
                    tooltip="The same noise for both, as in the paper, or one each, as in the released code and "
                    "for the mini family.",
                ),
                io.Latent.Input(
                    "composite",
                    optional=True,
                    tooltip="A composite that is there, encoded: its foreground is found, and it comes out as it went "
                    "in.",
                ),
            ],
            outputs=[
                io.Latent.Output("COMPOSITE", display_name="composite", tooltip="For VAE Decode."),
                io.Latent.Output("FOREGROUND", display_name="foreground", tooltip="For VAE Decode with an RGBA VAE."),
            ],
        )

    @classmethod
    def execute(cls, model, positive, negative, latent_image, noise, composite=None, **sampling):
        return io.NodeOutput(
            *method.sample(model, positive, negative, latent_image, noise, composite, denoise=1.0, **sampling)
        )


NODES = [FillBackground, BackToFront, SampleForeground]
