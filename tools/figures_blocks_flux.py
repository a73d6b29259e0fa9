"""Which blocks of the mini Flux-Fill show what an object is and where: LayerFusion's two priors and DreamLayer's
context maps of every block, on rendered scenes at three amounts of noise. What the paper's Fig. 9 shows of a UNet.

A block's figure is the correlation of its map with the object's true alpha, over the tokens of an image.
"""

from __future__ import annotations

from functools import partial

import comfy.sample
import comfy.samplers
import torch
import torch.nn.functional as F
from comfy.patcher_extension import WrappersMP
from figures_flux import load
from figures_layers_flux import adapter
from mini_models import Family, picture
from strata.patches import joint_attention, rgba_vae, transparency_model
from strata.patches.layer_prompts import END_TOKENS, LAYERS, composite_prompt, encode_layers, encode_prompts
from strata.scenes import renderer
from strata.techniques import fusion
from strata.techniques import shared_layers as dreamlayer
from strata.techniques.transparency import extend_colours

COUNT, SAMPLE = 24, 1
CLAIMS = []
SIDE = 256
LEVELS = 0.9, 0.75, 0.5  # amounts of noise
FIRST = 4 * 10**6  # behind the scenes of training
KEY = "figures_blocks"


@torch.inference_mode()
def measure(seeds: range) -> dict[str, dict[str, list[float]]]:
    """{block: {figure: one value a seed, the mean of the levels}}"""
    family, model, rgba = Family(), load("strata_mini_flux_fill.safetensors", SIDE), rgba_vae.load(rgba_vae.SHIPPED)
    drawing, found = transparency_model.apply(model, adapter(), 1.0), {}
    for seed in seeds:
        scene = renderer.render(renderer.Request(train=True, count=2), SIDE, SIDE, FIRST + seed)
        front, prompts = scene.objects[-1], [shown.prompt for shown in scene.objects]
        whole = picture(front.rgba)
        single = torch.cat([extend_colours(whole[:, :3], whole[:, 3:]), whole[:, 3:]], 1).movedim(1, -1)
        words = encode_prompts(family.clip, (front.prompt, "", ""))[0]
        ends = [place for place in words[1][END_TOKENS] if place < words[0].shape[1]]
        alone = family.text(front.prompt)
        place = f"{renderer.EMPTY} {renderer.PLACE_WORDS[scene.kind][0]}"
        layers = encode_layers(family.clip, place, prompts)
        tokens = [own for _, own in layers[0][1][LAYERS][1:]]
        masks = torch.cat([picture(shown.rgba)[:, 3:] for shown in scene.objects])
        looks = {
            "outline": (drawing, rgba.encode(single), alone, masks[-1:], partial(outline, ends)),
            "context map": (
                model,
                family.vae.encode(picture(scene.composite).movedim(1, -1)),
                composite_prompt(layers),
                masks,
                partial(maps, tokens),
            ),
        }
        for figure, (of, latent, positive, true, look) in looks.items():
            for level in LEVELS:
                add(found, seed, looked(of, latent, positive, level, seed, look, figure), true)
    return means(found)


def add(found: dict, seed: int, maps: dict[tuple[str, str], torch.Tensor], true: torch.Tensor) -> None:
    """The correlations of maps, by block and figure, with the alphas [F,1,H,W], to those of this seed."""
    for (block, figure), values in maps.items():
        found.setdefault(block, {}).setdefault(figure, {}).setdefault(seed, []).append(correlation(values, true))


def means(found: dict) -> dict[str, dict[str, list[float]]]:
    """{block: {figure: one value a seed}}"""
    return {
        block: {figure: [sum(own) / len(own) for own in values.values()] for figure, values in figures.items()}
        for block, figures in found.items()
    }


def outline(ends: list[int], joint, q, k) -> dict[str, torch.Tensor]:
    """LayerFusion's priors of a single object, [1,M]."""
    asking, image = joint_attention.flat(q[:, :, joint.image]), joint_attention.flat(k[:, :, joint.image])
    own = [place for place in ends if place < joint.text]
    structure = fusion.structure_prior(asking, image, q.shape[1])
    content = fusion.content_prior(asking, joint_attention.flat(k), q.shape[1], own)
    return {"outline": structure, "meaning": content, "both": fusion.min_max_normalise(structure * content)}


def maps(tokens: list[list[int]], joint, q, k) -> dict[str, torch.Tensor]:
    """DreamLayer's share of each object's words, [F,M]."""
    asking = joint_attention.flat(q[:, :, joint.image])
    own = [[place for place in places if place < joint.text] for places in tokens]
    return {"context map": dreamlayer.token_shares(asking, joint_attention.flat(k), q.shape[1], own)[0]}


def looked(model, latent, positive, level: float, seed: int, look, name: str) -> dict[tuple[str, str], torch.Tensor]:
    """What `look` gives of every block, by one call of the model at this amount of noise."""
    found, model = {}, model.clone()

    def act(call, options, joint, q, k, v, attend):
        for name, values in look(joint, q, k).items():
            found[f"block {joint.number}", name] = values

    joint_attention.prepare(model)
    model.model_options["transformer_options"][KEY] = True
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, joint_attention.around(KEY, act))
    noise = comfy.sample.prepare_noise(latent, seed)
    sampler = comfy.samplers.sampler_object("euler")
    comfy.sample.sample_custom(
        model, noise, 1.0, sampler, torch.tensor([level, 0.0]), positive, positive, latent, disable_pbar=True
    )
    return found


def correlation(values: torch.Tensor, true: torch.Tensor) -> float:
    """Of maps [F,M] with alphas [F,1,H,W], the mean over F."""
    side = int(values.shape[1] ** 0.5)
    true = F.interpolate(true, (side, side), mode="area").flatten(1)
    pairs = (torch.stack(pair) for pair in zip(values, true, strict=True))
    return float(torch.stack([torch.corrcoef(pair)[0, 1] for pair in pairs]).mean())
