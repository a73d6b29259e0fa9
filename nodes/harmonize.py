"""DreamLayer's harmonisation: layers that were only stacked become one picture."""

from comfy_api.latest import io

from ..patches.harmonize import harmonize_layers
from ..techniques.effects import with_effect_layers
from ..techniques.layers import read_layers, write_layers
from . import sockets
from .sampling import never_put_back, noise_inputs, sampler_input, scheduler_input, seed_input
from .sockets import Layers, Node, schema, told

FOREGROUNDS = ("keep", "relight")
REACH = 0  # effects may lie anywhere: `reach` has said where the model may draw them


class HarmonizeLayers(Node):
    """The layers put into the denoising of the background, then the picture and the layers that come of it.

    Source: dreamlayer, Sec. 3.3
    Differs: with foregrounds = keep, the default, the layers' own pixels are pasted back onto the decoded picture; the
    paper decodes the fused latent, as relight does.
    Differs: without retained, noise is added to the layers; the paper keeps the latents of the run that made them.
    Differs: it starts with 30 steps of euler, scheduler normal, and takes Euler's steps while layers are put back; the
    paper takes 50 steps of DDIM.
    """

    @classmethod
    def define_schema(cls):
        percent = {"min": 0.0, "max": 1.0, "step": 0.01}
        return schema(
            node_id="Strata_HarmonizeLayers",
            display_name="Harmonize layers (shadow, IRH harmonizer)",
            category="Strata/Compose",
            search_aliases=["dreamlayer", "IRH", "harmonization", "contact shadow", "blend layers", "relight"],
            description="Draws the shadows and the light that a stack of layers lacks: the background is denoised "
            "anew with the layers put into it on the way.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="Any diffusion model of ComfyUI, with LoRAs and other patches as you like."
                ),
                io.Conditioning.Input("positive", tooltip="The whole image in words: the place and the things in it."),
                io.Conditioning.Input("negative", tooltip="What should not be seen, from an ordinary text encoding."),
                io.Vae.Input("vae", tooltip="The autoencoder of the model."),
                Layers.Input(
                    "layers",
                    tooltip="Background first, things in front of it. Move, turn, flip or resize a layer and run "
                    "again: nothing else has to change.",
                ),
                seed_input("The same seed gives the same image."),
                io.Int.Input(
                    "steps",
                    default=30,
                    min=1,
                    max=10000,
                    tooltip="Steps of a whole denoising; only those after start_percent are done.",
                ),
                io.Float.Input(
                    "cfg",
                    default=5.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How closely to follow the words.",
                ),
                sampler_input("euler", "For the steps after end_percent; those before are Euler's."),
                scheduler_input("normal", "As in KSampler."),
                io.Float.Input(
                    "start_percent",
                    default=0.4,
                    **percent,
                    tooltip="How far into the denoising to start: the published 0.4 (timestep 600). "
                    "Lower changes more of the background.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=0.6,
                    **percent,
                    tooltip="Until when the layers are put back at every step: the published 0.6 "
                    "(timestep 400). Higher keeps them closer, lower blends them more.",
                ),
                io.Combo.Input(
                    "foregrounds",
                    options=list(FOREGROUNDS),
                    default=FOREGROUNDS[0],
                    tooltip="keep: the things keep their own pixels. "
                    "relight: they are taken as the model has drawn them.",
                ),
                io.Float.Input(
                    "feather",
                    default=2.0,
                    min=0.0,
                    max=64.0,
                    step=0.5,
                    tooltip="With keep: over how many pixels inside of their edge the things "
                    "fade into what the model has drawn.",
                ),
                io.Float.Input(
                    "detail",
                    default=8.0,
                    min=0.0,
                    max=256.0,
                    step=0.5,
                    optional=True,
                    tooltip="Above 0 the background keeps its own texture, and "
                    "takes from the model only what is smoother than so many pixels: light and shadow. 0 takes it as "
                    "the model has drawn it.",
                ),
                sockets.Inversion.Input(
                    "retained",
                    optional=True,
                    tooltip="The layers' latents on their way, the background's first: of the run, from "
                    "Layers sampler, or of their images, from Invert image. Without it noise is added to the layers.",
                ),
                io.Float.Input(
                    "reach",
                    default=0.0,
                    min=0.0,
                    max=2.0,
                    step=0.01,
                    optional=True,
                    tooltip="How far around the things the background may change, as a share of the canvas's longer "
                    "side; it fades out on the second half of the way. 0 lets all of it change.",
                ),
                *noise_inputs(),
                io.Boolean.Input(
                    "effects",
                    default=False,
                    optional=True,
                    tooltip="on: shadow and light come as layers of their own, in a group with the thing that they "
                    "belong to, and the background stays as it was (see Effect layers). off: they are drawn into the "
                    "background.",
                ),
            ],
            outputs=[
                io.Image.Output("IMAGE", display_name="image", tooltip="The image, of the canvas's size."),
                io.Latent.Output("LATENT", display_name="latent", tooltip="The harmonised latent, to go on from."),
                Layers.Output(
                    "LAYERS",
                    display_name="layers",
                    tooltip="The layers with the harmonised background, shadows included. Behind the things it "
                    "is as it was, in the light around them, so that they can be moved away.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        vae,
        layers,
        start_percent,
        end_percent,
        foregrounds,
        feather,
        start_noise=0.0,
        end_noise=0.0,
        effects=False,
        **settings,
    ):
        ends = {"start_percent": start_percent, "end_percent": end_percent}
        ends |= {"start_noise": start_noise, "end_noise": end_noise}
        notes = never_put_back(model, ("start_percent", "end_percent", "end_noise"), **ends)
        relight = foregrounds == FOREGROUNDS[1]
        harmonised = harmonize_layers(model, positive, negative, vae, read_layers(layers), **ends, **settings)
        picture = harmonised.picture(relight, feather)
        stack = with_effect_layers(harmonised.stack, picture[0], REACH) if effects else harmonised.layers(relight)
        return io.NodeOutput(
            picture,
            {"samples": harmonised.latent},
            write_layers(stack),
            ui=told(notes) or None,
        )


NODES = [HarmonizeLayers]
