"""DreamLayer: background, any number of objects and the whole picture sampled together, without training or with
trained modules.
"""

import latent_preview
import torch
from comfy_api.latest import io

from ..patches import autoencoder, layer_files, transparency_model, transparent_latents
from ..patches.harmonize import harmonize_layers, remaining_sigmas
from ..patches.inversion import Inversion, invert, noise_levels
from ..patches.layer_prompts import LAYERS, composite_prompt, encode_layers, split_prompts
from ..patches.layer_rows import sample_rows
from ..patches.sampled_layers import all_rows, decode_layers, sample_along, trajectories
from ..patches.shared_layers import (
    MAPS,
    METHOD,
    Maps,
    Sharing,
    layer_count,
    map_context,
    object_rows,
    share_layers,
    without_layers,
)
from ..techniques.compositing import flatten
from ..techniques.fusion import map_strips
from ..techniques.layers import LayerStack, read_layers, write_layers
from . import sockets
from .inputs import centred, check_inversion, encodable, named
from .sampling import end_below_start, never_put_back, noise_inputs, sampling_inputs, scheduler_input
from .sockets import LayerModelFile, LayerModules, Layers, Node, Transparency, schema, told

ALIASES = ["dreamlayer", "multi-layer generation", "layered generation"]
NOISE = {"same for all layers": 0.0, "one each": 1.0, "half the same": 0.5}  # how much is each layer's own
SIDE_BY_SIDE = (
    "model: neither Shared layers nor Context maps acts on it, so the layers know nothing of each other; put them "
    "in front."
)
PERCENT = {"min": 0.0, "max": 1.0, "step": 0.01}


def transparency_inputs() -> list:
    return [
        Transparency.Input(
            "adapter",
            optional=True,
            tooltip="Makes the model draw single objects with hidden transparency, from Load transparency; it acts "
            "on the objects' layers only.",
        ),
        Transparency.Input(
            "decoder",
            optional=True,
            tooltip="Finds the objects' transparency, from Load transparency. A VAE with alpha needs none; without "
            "either their alpha is the last context map, which is coarse.",
        ),
    ]


def maps_output() -> io.Output:
    return io.Image.Output(
        "maps",
        display_name="maps",
        tooltip="For each step the context maps, the objects back to front from left to right. A black pixel "
        "without Context maps.",
    )


class LayerPrompts(Node):
    @classmethod
    def define_schema(cls):
        prompt = {"multiline": True, "dynamic_prompts": True, "default": ""}
        return schema(
            node_id="Strata_LayerPrompts",
            display_name="Layer prompts (DreamLayer)",
            category="Strata/Generate",
            search_aliases=[*ALIASES, "objects"],
            description="One conditioning for a background, any number of objects in front of it, and the whole "
            "image that they make.",
            inputs=[
                io.Clip.Input(
                    "clip",
                    tooltip="Text encoder of SD1.5, SD2, SDXL, Flux, Qwen-Image, Z-Image, SD3.5 or the mini family.",
                ),
                io.String.Input(
                    "background", **prompt, tooltip="The place without the objects, as in: an empty street."
                ),
                io.String.Input(
                    "objects",
                    **prompt,
                    tooltip="One object a line, as in: a red apple. The first line is farthest back, the last one in "
                    "front. Each becomes a layer; empty lines do not count, and no object at all gives the background "
                    "alone. A language model's list does as well: numbers and dashes in front of lines are left out, "
                    "and a line that begins with 'background:' is the background's.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    "positive", display_name="positive", tooltip="For positive. Negative is an ordinary text encoding."
                )
            ],
        )

    @classmethod
    def execute(cls, clip, background, objects):
        return io.NodeOutput(encode_layers(clip, *split_prompts(background, objects)))


class LoadLayerModules(LayerModelFile):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Strata_LoadLayerModules",
            display_name="Load layer modules (DreamLayer)",
            category="Strata/Generate",
            search_aliases=[*ALIASES, "layer_model", "context-aware layers"],
            description="Loads what DreamLayer's training makes: keys and values for layers, the layer embedding, and "
            "context-aware layers.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=layer_files.choices(layer_files.LayerModules),
                    tooltip=(
                        "A file below models/layer_model that python -m training dreamlayer has made, whatever its "
                        "name."
                    ),
                )
            ],
            outputs=[
                LayerModules.Output("modules", display_name="modules", tooltip="For Shared layers and Context maps."),
                io.String.Output(
                    "found", display_name="found", tooltip="What the file is and which family of models it is for."
                ),
            ],
        )

    @classmethod
    def execute(cls, file):
        loaded = layer_files.load(file, layer_files.LayerModules)
        return io.NodeOutput(loaded, f"{loaded.name}: {loaded.describe()}")


class SharedLayers(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Strata_SharedLayers",
            display_name="Shared layers (DreamLayer)",
            category="Strata/Generate",
            search_aliases=[*ALIASES, "LSSA", "layer-shared self-attention"],
            description="DreamLayer's LSSA: in the up blocks, or the second half of a transformer, every layer sees "
            "all layers of its image, so that they go together.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="SD1.5, SD2, SDXL, Flux, Qwen-Image, Z-Image, SD3.5 or the mini family. Put LoRAs and "
                    "other patches before or behind this node.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    **PERCENT,
                    tooltip="How much of the sharing: 1 as published, 0 is off and changes nothing.",
                ),
                io.Float.Input(
                    "start_percent", default=0.0, **PERCENT, tooltip="When in the sampling it starts, 0 = at once."
                ),
                io.Float.Input(
                    "end_percent", default=1.0, **PERCENT, tooltip="When it ends, 1 = with the last step, as published."
                ),
                LayerModules.Input(
                    "modules",
                    optional=True,
                    tooltip="Trained keys, values and layer embedding, from Load layer modules. They act while "
                    "and as strongly as the sharing does.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    "MODEL",
                    display_name="model",
                    tooltip="For Layers sampler, or for Context maps, which may also come first.",
                )
            ],
        )

    @classmethod
    def execute(cls, model, strength, start_percent, end_percent, modules=None):
        notes = end_below_start(start_percent, end_percent, "nothing is shared")
        shared = share_layers(model, Sharing(strength, start_percent, end_percent), modules)
        return io.NodeOutput(shared, ui=told(notes) or None)


class ContextMaps(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Strata_ContextMaps",
            display_name="Context maps (DreamLayer)",
            category="Strata/Generate",
            search_aliases=[*ALIASES, "CACA", "context-aware cross-attention", "attention maps"],
            description="DreamLayer's CACA: finds where the whole image puts each object, and lets the object's "
            "layer take over its place and size.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="SD1.5, SD2, SDXL, Flux, Qwen-Image, Z-Image, SD3.5 or the mini family, most often from "
                    "Shared layers.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    **PERCENT,
                    tooltip="How much of the whole image goes into an object's layer where its map says that "
                    "it is: 1 as published, 0 is off and changes nothing.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=0.15,
                    **PERCENT,
                    tooltip="Until when: the published 0.15 (timestep 850). Higher keeps the objects closer "
                    "to their places, and lets more of what is around them into their layers.",
                ),
                LayerModules.Input(
                    "modules",
                    optional=True,
                    tooltip="Trained context-aware layers, which clean the maps, from Load layer modules.",
                ),
            ],
            outputs=[
                io.Model.Output("MODEL", display_name="model", tooltip="For Layers sampler, which shows the maps.")
            ],
        )

    @classmethod
    def execute(cls, model, strength, end_percent, modules=None):
        return io.NodeOutput(map_context(model, Maps(strength, end_percent), modules))


class LayersSampler(Node):
    """Background, objects and whole picture in one batch, and what is harmonised of them.

    Source: dreamlayer, Sec. 3 Overview and Appendix B (inference)
    Differs: it starts with KSampler's settings (20 steps of euler, scheduler normal); the paper takes 50 steps of DDIM.
    Differs: the harmonised composite has the objects' own pixels pasted back, as Harmonize layers does with
    foregrounds = keep; the paper decodes the fused latent.
    """

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Strata_LayersSampler",
            display_name="Layers sampler (DreamLayer)",
            category="Strata/Generate",
            search_aliases=[*ALIASES, "ksampler"],
            description="Samples background, objects and whole image together, one of each for every latent that "
            "comes in, and makes layers of them.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="From Shared layers and Context maps. Without them the layers are sampled side by side "
                    "and know nothing of each other.",
                ),
                io.Vae.Input(
                    "vae",
                    tooltip="The autoencoder of the model, or an RGBA VAE in its latent space, which gives the objects "
                    "their alpha.",
                ),
                io.Conditioning.Input("positive", tooltip="From Layer prompts."),
                *sampling_inputs(),
                io.Combo.Input(
                    "noise",
                    options=list(NOISE),
                    default=next(iter(NOISE)),
                    tooltip="The same noise, as published, makes "
                    "the layers agree in their layout; half the same lets objects stand apart, and is what the mini "
                    "family's modules learnt with.",
                ),
                io.Boolean.Input(
                    "harmonize",
                    default=True,
                    tooltip="Draws shadows and light into the composite, as Harmonize layers "
                    "does; off stacks the layers.",
                ),
                io.Float.Input(
                    "harmonize_start",
                    default=0.4,
                    **PERCENT,
                    tooltip="start_percent of Harmonize layers: lower changes more of the background.",
                ),
                io.Float.Input(
                    "harmonize_end",
                    default=0.6,
                    **PERCENT,
                    tooltip="end_percent of Harmonize layers: higher keeps the objects closer.",
                ),
                *transparency_inputs(),
                *noise_inputs("harmonize_", ("harmonize_start", "harmonize_end")),
            ],
            outputs=[
                Layers.Output(
                    "LAYERS",
                    display_name="layers",
                    is_output_list=True,
                    tooltip="One document per image: background and objects, named as their prompts.",
                ),
                io.Image.Output(
                    "composite", display_name="composite", tooltip="The layers over each other, harmonised."
                ),
                io.Image.Output(
                    "whole",
                    display_name="whole",
                    tooltip="The whole image that was sampled with the layers: what they are to add up to.",
                ),
                maps_output(),
                io.Latent.Output(
                    "LATENT",
                    display_name="latent",
                    tooltip="All rows: background, objects, whole image, and again for the next latent.",
                ),
                sockets.Inversion.Output(
                    "retained",
                    display_name="retained",
                    is_output_list=True,
                    tooltip="For Harmonize layers: the trajectory of each image's layers through the run.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        vae,
        positive,
        noise,
        harmonize,
        harmonize_start,
        harmonize_end,
        adapter=None,
        decoder=None,
        harmonize_start_noise=0.0,
        harmonize_end_noise=0.0,
        **sampling,
    ):
        names, recorded, notes = _layer_names(model, vae, positive, sampling["negative"], decoder), {}, []
        count = layer_count(names)
        ends = {"start_percent": harmonize_start, "end_percent": harmonize_end}
        ends |= {"start_noise": harmonize_start_noise, "end_noise": harmonize_end_noise}
        if count > 1 and not METHOD.is_on(model):
            notes.append(SIDE_BY_SIDE)
        if harmonize and count > 1:
            notes += never_put_back(model, ("harmonize_start", "harmonize_end", "harmonize_end_noise"), **ends)
        maps_needed = count > 1 and decoder is None and not autoencoder.has_alpha(vae)
        _check_sampling(model, maps_needed, ends if harmonize and count > 1 else None, sampling)
        layered, record = _prepared(model, adapter, count)
        branches = sample_rows(layered, positive, count, **sampling, own_noise=NOISE[noise], recorded=recorded)
        stacks = decode_layers(vae, names, [branch["samples"] for branch in branches], decoder, record)
        composite = whole = autoencoder.decode(vae, branches[-1]["samples"])[..., :3]
        latent = all_rows(branches)
        retained = trajectories(model, positive, recorded, latent["samples"], names)
        if count > 1:
            draw = _harmonizer(model, vae, positive, sampling, ends, notes) if harmonize else _stacked
            composite = torch.cat([draw(*picture) for picture in zip(stacks, retained, strict=True)])
        documents, maps = [write_layers(stack) for stack in stacks], map_strips(record.steps)
        return io.NodeOutput(documents, composite, whole, maps, latent, retained, ui=told(notes) or None)


class ImageToLayers(Node):
    """The picture's path to noise, and from there the layers, which attend to that picture at every step.

    Source: dreamlayer, Appendix E
    Differs: the picture is inverted alone; the paper inverts all layers together, as copies of the picture. That was
    tried: the recomposition error was 0.045 against 0.049, but the layers held the whole scene again.
    """

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Strata_ImageToLayers",
            display_name="Image to layers (DreamLayer)",
            category="Strata/Generate",
            search_aliases=[*ALIASES, "decompose", "image decomposition", "inversion"],
            description="DreamLayer's image to layers: takes an image apart into the background and the objects that "
            "are named, without training.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="From Shared layers and Context maps. Without Shared layers the layers do not see the "
                    "image.",
                ),
                io.Vae.Input(
                    "vae",
                    tooltip="The autoencoder of the model, or an RGBA VAE in its latent space, which gives the objects "
                    "their alpha.",
                ),
                io.Image.Input(
                    "image", tooltip="The image; the first one of a batch. Sides are cut to multiples of 8."
                ),
                io.Conditioning.Input(
                    "positive",
                    tooltip="From Layer prompts: the background without the objects, and each object, the farthest "
                    "first.",
                ),
                io.Conditioning.Input("negative", tooltip="What no layer should show, from an ordinary text encoding."),
                io.Int.Input(
                    "steps",
                    default=50,
                    min=1,
                    max=1000,
                    tooltip="Steps of the way to noise, and again of the way back.",
                ),
                io.Float.Input(
                    "cfg",
                    default=7.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How closely the layers follow their prompts.",
                ),
                scheduler_input(
                    "ddim_uniform",
                    "The noise levels of the steps; ddim_uniform as in the paper. Both ways are taken with DDIM.",
                ),
                *transparency_inputs(),
            ],
            outputs=[
                Layers.Output(
                    "LAYERS", display_name="layers", tooltip="Background and objects, named as their prompts."
                ),
                io.Image.Output("recomposed", display_name="recomposed", tooltip="The layers over each other."),
                maps_output(),
                io.Float.Output(
                    "error",
                    display_name="error",
                    tooltip="Mean absolute difference between the image and the layers over each other, 0..1.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model, vae, image, positive, negative, steps, cfg, scheduler, adapter=None, decoder=None):
        names = _object_names(model, vae, positive, negative, decoder)
        count, image = layer_count(names), encodable(image, vae)[:1, ..., :3]
        sigmas = noise_levels(model, steps, scheduler)
        callback = latent_preview.prepare_callback(model, 3 * steps)
        up, down = _part(callback, 0, 3 * steps), _part(callback, 2 * steps, 3 * steps)
        layered, record = _prepared(model, adapter, count)
        prompt = composite_prompt(positive)
        trajectory = invert(without_layers(model), autoencoder.encode(vae, image), prompt, None, sigmas, callback=up)
        made = sample_along(layered, trajectory, count, positive, negative, cfg, sigmas, down)
        (stack,) = decode_layers(vae, names, list(made.split(1)), decoder, record)
        recomposed = flatten(stack)[0][None]
        error = (recomposed - centred(image, *recomposed.shape[1:3]).to(recomposed)).abs().mean().item()
        notes = told([f"recomposition error {error:.3f}"])
        return io.NodeOutput(write_layers(stack), recomposed, map_strips(record.steps), error, ui=notes)


def _layer_names(model, vae, positive: list, negative: list, decoder) -> list[str]:
    """The layers' prompts, back to front. Raises ValueError for other conditionings, and where nothing would tell what
    is transparent.
    """
    if len(positive) != 1 or LAYERS not in positive[0][1]:
        raise ValueError(
            "positive: this is not one conditioning with the words of every layer; connect Layer prompts directly."
        )
    if any(LAYERS in values for _, values in negative):
        raise ValueError(
            "negative: this is a conditioning of Layer prompts, which has a row for every layer; connect an ordinary "
            "text encoding."
        )
    names = [prompt for prompt, _ in positive[0][1][LAYERS]]
    if decoder is not None:  # before the sampling that it would come after
        with named("decoder"):
            decoder.part("decoder", transparent_latents.DECODER)
            form = model.get_model_object("latent_format")
            if (decoder.latent["channels"], 2) != (form.latent_channels, form.latent_dimensions):
                raise ValueError(
                    f"transparency: {decoder.name} is {decoder.describe()} and the model's latents have "
                    f"{form.latent_channels} channels{' and a frame axis' * (form.latent_dimensions == 3)}; load the "
                    "decoder of the model's family, or connect a VAE with alpha."
                )
    maps = MAPS in model.model_options["transformer_options"]
    if len(names) > 1 and decoder is None and not maps and not autoencoder.has_alpha(vae):
        raise ValueError(
            "decoder: nothing tells where the objects are transparent; connect a transparent decoder from Load "
            "transparency or a VAE with alpha, or put Context maps on the model."
        )
    return names


def _object_names(model, vae, positive: list, negative: list, decoder) -> list[str]:
    """As _layer_names, for a picture that at least one object is to be taken out of."""
    names = _layer_names(model, vae, positive, negative, decoder)
    if len(names) < 2:
        raise ValueError("positive: there is no object to take out of the image; name at least one in Layer prompts.")
    return names


def _check_sampling(model, maps_needed: bool, ends: dict | None, sampling: dict) -> None:
    """What would only be found out after the sampling. ends: of harmonising, None without it. Raises ValueError."""
    if maps_needed and sampling["denoise"] == 0:
        raise ValueError(
            "denoise: at 0 nothing is sampled, so there are no maps to find the objects by; raise it, or connect "
            "a decoder or a VAE with alpha."
        )
    if ends:
        levels = {name: sampling[name] for name in ("steps", "sampler_name", "scheduler")}
        starts = {name: ends[name] for name in ("start_percent", "start_noise")}
        remaining_sigmas(model, **levels, **starts, socket="harmonize_start")


def _part(callback, first: int, total: int):
    """The callback of a run that is the part from step `first` on of `total` steps."""
    return lambda step, denoised, x, _: callback(first + step, denoised, x, total)


def _prepared(model, adapter, count: int):
    """A clone whose objects have hidden transparency when there is an adapter, and the record of its maps."""
    with named("adapter"):
        layered = (
            model.clone()
            if adapter is None or count == 1
            else transparency_model.apply_to_foreground(model, adapter, object_rows(count))
        )
    return layered, METHOD.record(layered)


def _stacked(stack: LayerStack, trajectory: Inversion | None) -> torch.Tensor:
    return flatten(stack)[0][None]


def _harmonizer(model, vae, positive: list, sampling: dict, ends: dict, notes: list[str]):
    """Harmonises a stack with the whole picture's conditioning; one that is refused stays stacked, and a note says
    why.
    """
    given = {name: sampling[name] for name in ("negative", "seed", "steps", "cfg", "sampler_name", "scheduler")}
    given |= {"model": without_layers(model), "positive": composite_prompt(positive), "vae": vae}

    def draw(stack: LayerStack, trajectory: Inversion | None) -> torch.Tensor:
        try:
            document, trajectory = write_layers(stack), trajectory and check_inversion(trajectory, "retained")
            return harmonize_layers(stack=read_layers(document), retained=trajectory, **ends, **given).picture()
        except ValueError as error:
            notes.append(f"Not harmonised: {error}")
            return _stacked(stack, trajectory)

    return draw


NODES = [LayerPrompts, LoadLayerModules, SharedLayers, ContextMaps, LayersSampler, ImageToLayers]
