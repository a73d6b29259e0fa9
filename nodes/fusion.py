"""LayerFusion: foreground, background and blended picture sampled together."""

from comfy_api.latest import io

from ..patches import autoencoder, transparency_model
from ..patches.fusion import BLOCKS, METHOD, ROWS, Settings, blend_attention
from ..patches.layer_prompts import encode_prompts
from ..patches.layer_rows import sample_rows
from ..patches.sampled_layers import decode_layers
from ..techniques.fusion import PRIORS, map_strips
from ..techniques.layers import write_layers
from .sampling import end_below_start, sampling_inputs
from .sockets import Layers, Node, Transparency, schema, told

STRUCTURE = ("prior pass at each step", "reuse previous step")
BLENDED_TEXT = ("background prompt", "own prompt")
ENTRY = ("soft", "wide")
SIDE_BY_SIDE = (
    "model: no Attention blend acts on it, so the three images know nothing of each other; put Attention blend in "
    "front."
)
NOISE = {"same for the three": 0.0, "one each": 1.0}  # how much is each one's own


class EncodeLayerPrompts(Node):
    @classmethod
    def define_schema(cls):
        prompt = {"multiline": True, "dynamic_prompts": True, "default": ""}
        return schema(
            node_id="Strata_EncodeLayerPrompts",
            display_name="Encode layer prompts (LayerFusion)",
            category="Strata/Generate",
            search_aliases=["layerfusion", "layer prompts", "foreground prompt"],
            description="One conditioning for foreground, background and blended image, which knows where the "
            "foreground's prompt ends.",
            inputs=[
                io.Clip.Input(
                    "clip",
                    tooltip="Text encoder of SD1.5, SD2, SDXL, Flux, Qwen-Image, Z-Image, SD3.5 or the mini family.",
                ),
                io.String.Input(
                    "foreground",
                    **prompt,
                    tooltip="The object alone, as in: a red apple. Its place in the image follows from these words.",
                ),
                io.String.Input(
                    "background", **prompt, tooltip="The scene without the object, as in: a beach at sunset."
                ),
                io.String.Input(
                    "blended",
                    **prompt,
                    tooltip="The whole image. Empty joins foreground and background with a comma. "
                    "The blend reads it only where Attention blend is set to own prompt, switched off, or limited to "
                    "some blocks or steps.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    "positive", display_name="positive", tooltip="For positive. Negative is an ordinary text encoding."
                )
            ],
        )

    @classmethod
    def execute(cls, clip, foreground, background, blended):
        blended = blended.strip() or ", ".join(part for part in (foreground.strip(), background.strip()) if part)
        return io.NodeOutput(encode_prompts(clip, (foreground, background, blended)))


class AttentionBlend(Node):
    @classmethod
    def define_schema(cls):
        percent = {"min": 0.0, "max": 1.0, "step": 0.01}
        return schema(
            node_id="Strata_AttentionBlend",
            display_name="Attention blend (LayerFusion patcher)",
            category="Strata/Generate",
            search_aliases=["layerfusion", "attention blending", "layered generation"],
            description="LayerFusion: lets foreground, background and blended image exchange their attention while "
            "they are sampled as one batch.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="SD1.5, SD2, SDXL, Flux, Qwen-Image, Z-Image, SD3.5 or the mini family. Put LoRAs and "
                    "other patches before or behind this node.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    **percent,
                    tooltip="How much of the exchange: 1 as published, 0 is off and changes nothing.",
                ),
                io.Float.Input(
                    "boundary",
                    default=10.0,
                    min=0.0,
                    max=100.0,
                    step=0.5,
                    tooltip="The coefficient d of the hard mask. Lower lets more of "
                    "the scene leak into the foreground; higher draws a sharper edge.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    **percent,
                    tooltip="When in the sampling the blending starts, 0 = at once.",
                ),
                io.Float.Input("end_percent", default=1.0, **percent, tooltip="When it ends, 1 = with the last step."),
                io.Combo.Input(
                    "blocks",
                    options=list(BLOCKS),
                    default="all",
                    tooltip="Blocks of the model that blend: all as published; down is the "
                    "half that looks, up the half that draws. Of transformers such as Flux each is a third.",
                ),
                io.Combo.Input(
                    "structure",
                    options=list(STRUCTURE),
                    default=STRUCTURE[0],
                    tooltip="Where the foreground's outline comes from. A prior "
                    "pass, as published, costs up to a quarter of a step more (a third at cfg 1); reuse takes the "
                    "outline of the step before.",
                ),
                io.Combo.Input(
                    "blended_text",
                    options=list(BLENDED_TEXT),
                    default=BLENDED_TEXT[0],
                    tooltip="The words that the blended image's "
                    "attention reads: the background's, as published (the object then comes from the foreground "
                    "alone), or its own.",
                ),
                Transparency.Input(
                    "transparency",
                    optional=True,
                    tooltip="Adapter for a transparent foreground, from Load transparency; it acts on the "
                    "foreground only. Attention files add low-rank terms; convolution files are full differences, a "
                    "second set of weights.",
                ),
                io.Combo.Input(
                    "entry",
                    options=list(ENTRY),
                    default=ENTRY[0],
                    optional=True,
                    tooltip="How the object enters the blended image: "
                    "through the soft mask as published, or through a wide one, whole up to its rim (the mini "
                    "family's objects agree better so).",
                ),
                io.Combo.Input(
                    "priors",
                    options=list(PRIORS),
                    default=PRIORS[0],
                    optional=True,
                    tooltip="What the masks are made of: outline times meaning, as published, or one of the two, for "
                    "comparison.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    "model_out",
                    display_name="model",
                    tooltip="For the LayerFusion sampler, or any sampler with a latent batch of three: "
                    "foreground, background, blended.",
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        strength,
        boundary,
        start_percent,
        end_percent,
        blocks,
        structure,
        blended_text,
        transparency=None,
        entry=ENTRY[0],
        priors=PRIORS[0],
    ):
        if transparency is not None:
            model = transparency_model.apply_to_foreground(model, transparency)
        switches = structure == STRUCTURE[1], blended_text == BLENDED_TEXT[1], entry == ENTRY[1]
        settings = Settings(strength, boundary, start_percent, end_percent, BLOCKS[blocks], *switches, priors)
        notes = end_below_start(start_percent, end_percent, "nothing is blended")
        return io.NodeOutput(blend_attention(model, settings), ui=told(notes) or None)


class LayerFusionSampler(Node):
    """Foreground, background and blended picture in one batch.

    Source: layerfusion, Sec. 3.3, the generation of the triplet
    Differs: it starts with KSampler's settings (20 steps of euler, scheduler normal); the paper names neither.
    """

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Strata_LayerFusionSampler",
            display_name="LayerFusion sampler (foreground, background)",
            category="Strata/Generate",
            search_aliases=["layerfusion", "ksampler", "layered generation", "foreground and background"],
            description="Samples foreground, background and blended image together, one of each for every latent "
            "that comes in.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="From Attention blend. Without it the three are sampled side by side and know nothing of "
                    "each other.",
                ),
                io.Conditioning.Input("positive", tooltip="From Encode layer prompts."),
                *sampling_inputs(),
                io.Combo.Input(
                    "noise",
                    options=list(NOISE),
                    default=next(iter(NOISE)),
                    tooltip="The same noise makes the three agree in their layout from the start.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="An RGBA VAE in the model's latent space, for the output layers: it gives the foreground "
                    "its alpha, without a decoder.",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    "foreground",
                    display_name="foreground",
                    tooltip="With a transparency model: decode with Decode transparency.",
                ),
                io.Latent.Output(
                    "background", display_name="background", tooltip="The scene without the object: VAE Decode."
                ),
                io.Latent.Output("blended", display_name="blended", tooltip="The whole image: VAE Decode."),
                io.Image.Output(
                    "priors",
                    display_name="priors",
                    tooltip="For each step, left to right: structure and content prior, soft and hard mask.",
                ),
                Layers.Output(
                    "LAYERS",
                    display_name="layers",
                    is_output_list=True,
                    tooltip="With an RGBA VAE at vae one document per image, foreground over background; else nothing.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model, positive, noise, vae=None, **sampling):
        if vae is not None and not autoencoder.has_alpha(vae):
            raise ValueError(
                "vae: it has no alpha to make layers by; connect one from Load RGBA VAE, or decode the foreground "
                "with Decode transparency."
            )
        model = model.clone()
        notes = [] if METHOD.is_on(model) else [SIDE_BY_SIDE]
        record = METHOD.record(model)
        latents = sample_rows(model, positive, ROWS.count, **sampling, own_noise=NOISE[noise])
        documents = [None]
        if vae is not None:
            foreground, background, _ = (latent["samples"] for latent in latents)
            stacks = decode_layers(vae, ["background", "foreground"], [background, foreground], None, record)
            documents = [write_layers(stack) for stack in stacks]
        return io.NodeOutput(*latents, map_strips(record.steps), documents, ui=told(notes) or None)


NODES = [EncodeLayerPrompts, AttentionBlend, LayerFusionSampler]
