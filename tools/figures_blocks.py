"""Which attention layers of the mini SD show what an object is and where, on rendered scenes at three amounts of noise:
LayerFusion's two priors (its Fig. 9) and DreamLayer's context maps (its D.1). figures_blocks_flux.py has the figures'
meaning.
"""

from __future__ import annotations

import comfy.sample
import comfy.samplers
import torch
from figures_blocks_flux import FIRST, add, means
from mini_models import Family, picture
from strata.patches import attention_blocks, layer_files, transparency_model, transparent_latents
from strata.patches.layer_prompts import END_TOKENS, LAYERS, composite_prompt, encode_layers, encode_prompts
from strata.scenes import renderer
from strata.techniques import fusion
from strata.techniques import shared_layers as dreamlayer
from strata.techniques.transparency import extend_colours

COUNT, SAMPLE = 48, 4
SIDE = 128
TIMESTEPS = 850, 500, 250
OUTLINE, MEANING, MAP = "outline", "meaning", "context map"
# What the pack takes the outline from, and the context maps
SHIPPED, LOWEST = "output 4", "input 3"
CLAIMS = [
    *((SHIPPED, other, OUTLINE) for other in ("output 5", "output 2")),
    *((LOWEST, other, MAP) for other in ("input 1", "middle 0", "output 2", "output 3", "output 4", "output 5")),
]


@torch.inference_mode()
def measure(seeds: range) -> dict[str, dict[str, list[float]]]:
    """{attention's block: {figure: one value a seed, the mean of the timesteps}}"""
    family, found = Family(), {}
    adapter, encoder = (
        layer_files.load(f"strata_mini_transparent_{name}.safetensors", layer_files.Transparency)
        for name in ("attn", "encoder")
    )
    drawing = transparency_model.apply(family.model, adapter, 1.0)
    for seed in seeds:
        scene = renderer.render(renderer.Request(train=True, count=2), SIDE, SIDE, FIRST + seed)
        front, prompts = scene.objects[-1], [shown.prompt for shown in scene.objects]
        rgba = picture(front.rgba)
        single = transparent_latents.encode(encoder, family.vae, extend_colours(rgba[:, :3], rgba[:, 3:]), rgba[:, 3:])
        words = encode_prompts(family.clip, (front.prompt, "", ""))[0]
        layers = encode_layers(family.clip, f"{renderer.EMPTY} {renderer.PLACE_WORDS[scene.kind][0]}", prompts)
        tokens = [own for _, own in layers[0][1][LAYERS][1:]]
        masks = torch.cat([picture(shown.rgba)[:, 3:] for shown in scene.objects])

        def priors(q, k, heads, ends=words[1][END_TOKENS]):
            if k.shape[1] == q.shape[1]:
                return {OUTLINE: fusion.structure_prior(q, k, heads)}
            return {MEANING: fusion.content_prior(q, k, heads, [place for place in ends if place < k.shape[1]])}

        def maps(q, k, heads, tokens=tokens):
            return {} if k.shape[1] == q.shape[1] else {MAP: dreamlayer.token_shares(q, k, heads, tokens)[0]}

        whole = family.vae.encode(picture(scene.composite).movedim(1, -1))
        for model, latent, positive, true, look in (
            (drawing, single, family.text(front.prompt), masks[-1:], priors),
            (family.model, whole, composite_prompt(layers), masks, maps),
        ):
            for timestep in TIMESTEPS:
                add(found, seed, looked(model, latent, positive, timestep, seed, look), true)
    return means(found)


def looked(model, latent, positive, timestep: int, seed: int, look) -> dict[tuple[str, str], torch.Tensor]:
    """What `look` gives of every attention, by one call of the model at this timestep."""
    found, model = {}, model.clone()

    def act(there, q, k, v, options):
        block = " ".join(map(str, options["block"]))
        found.update({(block, figure): values for figure, values in look(q, k, options["n_heads"]).items()})
        return there(q, k, v, options)

    places = list(attention_blocks.transformers(model.model.diffusion_model))
    options = model.model_options["transformer_options"]
    model.model_options["transformer_options"] = attention_blocks.with_patches(
        options, {name: (places, act) for name in ("attn1", "attn2")}
    )
    sigma = model.get_model_object("model_sampling").sigma(torch.tensor(float(timestep)))
    noise, sampler = comfy.sample.prepare_noise(latent, seed), comfy.samplers.sampler_object("euler")
    comfy.sample.sample_custom(
        model, noise, 1.0, sampler, torch.tensor([sigma, 0.0]), positive, positive, latent, disable_pbar=True
    )
    return found
