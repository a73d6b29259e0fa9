"""LayerFusion: layers that agree with the blended picture, and objects that follow their place and stay themselves.

wide: as in layerfusion_mini.json, at boundary 15 and cfg 2; soft: the paper's soft mask at boundary 10. The pictures go
to output/layerfusion_wide.png and output/layerfusion_soft.png, one row a picture: foreground, background, blended,
layers flattened, an independent foreground pasted in, and foreground and blended picture for another background.
"""

from __future__ import annotations

from dataclasses import dataclass

import comfy.sd
import numpy as np
import torch
from mini_models import CHECKPOINT, LAYER_MODEL, OUTPUT
from safetensors.torch import load_file
from strata.patches import mini_family, transparency, transparency_model, transparent_latents
from strata.patches.fusion import Settings, blend_attention
from strata.patches.layer_prompts import encode_prompts
from strata.patches.layer_rows import sample_rows
from strata.scenes import renderer
from strata.techniques import metrics
from strata.techniques.compositing import flatten
from strata.techniques.layers import Layer, LayerStack
from strata.training import loop, oracle

COUNT, SAMPLE = 40, 2
FILES = [CHECKPOINT, *(LAYER_MODEL / f"strata_mini_transparent_{name}.safetensors" for name in ("attn", "decoder"))]
OBJECTS = ("apple", "teapot", "dog", "penguin", "cactus", "car", "pumpkin", "robot")
PLACES = ("table", "room", "beach", "snow", "desert", "street", "autumn", "meadow")
SIDE = 128
DIFFERS = 0.06  # 15 of 255; of 0.05 to 0.1 the one at which rendered scenes come out best
COLUMNS = {"wide": Settings(boundary=15.0, wide=True), "soft": Settings(boundary=10.0)}
SAMPLING = {"cfg": 2.0, "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 1.0}
CLAIMS = [("wide", "soft", figure) for figure in ("iou", "layers nearer than pasted", "change by the place")]


@dataclass
class Family:
    model: object
    clip: object
    vae: object
    adapter: transparency.Transparency
    decoder: transparency.Transparency | None
    rgba: object = None  # an autoencoder with alpha, in the decoder's place


def family_of(checkpoint, adapter, decoder):
    mini_family.register()
    model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(checkpoint))
    return Family(
        model, clip, vae, transparency.recognise("adapter", adapter), transparency.recognise("decoder", decoder)
    )


def pictures(family, latent):
    """[B,3,H,W] in 0..1."""
    return family.vae.decode(latent["samples"]).movedim(-1, 1)[:, :3].clamp(0, 1)


def foreground(family, latent):
    """Straight colours [B,3,H,W] and alpha [B,1,H,W]."""
    if family.decoder is None:
        return family.rgba.decode(latent["samples"]).movedim(-1, 1).clamp(0, 1).split((3, 1), 1)
    return transparent_latents.decode(family.decoder, pictures(family, latent), latent["samples"], passes=4)


def over(colour, alpha, background):
    return alpha * colour + (1 - alpha) * background


def flattened(colour, alpha, background):
    """The LAYERS of each picture through the pack's own compositing."""
    found = []
    for front, opacity, back in zip(colour, alpha, background, strict=True):
        layers = (Layer(back.movedim(0, -1)), Layer(torch.cat([front, opacity]).movedim(0, -1)))
        found.append(flatten(LayerStack(back.shape[:0:-1], layers))[0].movedim(-1, 0))
    return torch.stack(found)


@torch.inference_mode()
def drawn(family, seeds: range, settings: Settings, steps=15, side=SIDE, sampling=SAMPLING):
    """Everything drawn, a few of each object, as one dictionary of pictures [N,·,H,W], and the objects' names.

    Object i is drawn with the noise of seed seeds.start + i.
    """
    layered = blend_attention(transparency_model.apply_to_foreground(family.model, family.adapter), settings)
    alone = transparency_model.apply(family.model, family.adapter, 1.0)
    negative = family.clip.encode_from_tokens_scheduled(family.clip.tokenize(""))
    each = -(-len(seeds) // len(OBJECTS))
    names, found = [], {}
    for number, name in enumerate(OBJECTS[: -(-len(seeds) // each)]):
        what = renderer.catalogue()[name].prompts[0]
        first, second = (renderer.PLACE_WORDS[PLACES[(number + step) % len(PLACES)]][0] for step in (0, 3))
        run = {
            "negative": negative,
            "latent_image": {"samples": torch.zeros(each, 4, side // 8, side // 8)},
            "steps": steps,
            "seed": seeds.start + number,
            **sampling,
        }

        def triplet(where, what=what, run=run):
            positive = encode_prompts(family.clip, (what, f"{renderer.EMPTY} {where}", f"{what} {where}"))
            front, back, both = sample_rows(layered, positive, 3, **run, own_noise=0.0)
            colour, alpha = foreground(family, front)
            return {
                "colour": colour,
                "alpha": alpha,
                "background": pictures(family, back),
                "blended": pictures(family, both),
            }

        positive = family.clip.encode_from_tokens_scheduled(family.clip.tokenize(what))
        colour, alpha = foreground(family, sample_rows(alone, positive, 1, **run)[0])
        parts = {
            **triplet(first),
            **{f"other {key}": value for key, value in triplet(second).items()},
            "independent colour": colour,
            "independent alpha": alpha,
        }
        for key, value in parts.items():
            found.setdefault(key, []).append(value.float())
        names += [name] * each
    return {key: torch.cat(values) for key, values in found.items()}, names


def overlap(alpha, blended, background):
    """IoU of an object's alpha with where a picture differs from its background by more than a shadow does."""
    return metrics.alpha_iou((alpha > 0.5).float(), (metrics.beyond_shadow(blended, background) > DIFFERS).float())


@torch.inference_mode()
def rendered_overlap(family, names, side=SIDE):
    """The same of rendered scenes, whose truth is known, after they went through the autoencoder: as much as can be
    asked for.
    """
    requests = [renderer.Request(kind=PLACES[OBJECTS.index(name)], objects=(name,)) for name in names]
    shown = [renderer.render(request, side, side, seed) for seed, request in enumerate(requests)]
    picture, background = (
        pictures(family, {"samples": family.vae.encode(torch.from_numpy(np.stack(part)))})
        for part in ([scene.composite for scene in shown], [scene.background for scene in shown])
    )
    alpha = torch.from_numpy(np.stack([scene.objects[0].rgba[..., 3] for scene in shown]))[:, None]
    return overlap(alpha, picture.float(), background.float())


def measured(shown, names, judge, grid):
    """The figures of the three claims, one per seed; writes the grid."""
    flat = flattened(shown["colour"], shown["alpha"], shown["background"])
    pasted = flattened(shown["independent colour"], shown["independent alpha"], shown["background"])
    side = flat.shape[-1]
    plain = (
        torch.from_numpy(renderer.render(renderer.Request(kind="tiles", objects=()), side, side, 5).background)
        .permute(2, 0, 1)
        .float()[None]
    )
    rates = [
        judge.text_agreement(
            over(shown[f"{key}colour"], shown[f"{key}alpha"], plain), [None] * len(names), [[name] for name in names]
        )[1]
        for key in ("", "other ")
    ]
    gray = [over(shown[f"{key}colour"], shown[f"{key}alpha"], torch.tensor(0.5)) for key in ("", "other ")]
    columns = [gray[0], shown["background"], shown["blended"], flat, pasted, gray[1], shown["other blended"]]
    loop.save_grid(grid, torch.stack(columns, 1).flatten(0, 1), len(columns))
    near, far = ((values - shown["blended"]).abs().flatten(1).mean(1) for values in (flat, pasted))
    return {
        "iou": overlap(shown["alpha"], shown["blended"], shown["background"]),
        "layers to blended": near,
        "pasted to blended": far,
        "layers nearer than pasted": (near < far).float(),
        "class": rates[0],
        "class in another place": rates[1],
        "class in the blended picture": judge.text_agreement(
            shown["blended"], [None] * len(names), [[name] for name in names]
        )[1].float(),
        "change by the place": metrics.mask_error(
            gray[0], gray[1], torch.maximum(shown["alpha"], shown["other alpha"])
        ),
    }


def measure(seeds: range, columns: dict[str, Settings] = COLUMNS) -> dict[str, dict[str, list[float]]]:
    """{column: {figure: one value a picture}}"""
    judge, found = oracle.load(), {}
    for column, settings in columns.items():
        family = family_of(FILES[0], *map(load_file, FILES[1:]))
        shown, names = drawn(family, seeds, settings)
        figures = measured(shown, names, judge, OUTPUT / f"layerfusion_{column}.png")
        figures["iou of rendered scenes"] = rendered_overlap(family, names)
        found[column] = {figure: values.tolist() for figure, values in figures.items()}
    return found
