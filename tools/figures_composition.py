"""FeatGLaC against its ablations over pairs of rendered scenes whose true composite the renderer knows.

Each object is photographed in one place and put into another, where the truth has it at the same spot in the new
place's light. The pictures go to output/composition.png, one row a pair: photo, new place, the methods in their order,
truth.
"""

from __future__ import annotations

import comfy.samplers
import torch
from mini_models import OUTPUT, Family, picture
from strata.patches.feature_guidance import Plane, Planes, Settings, guider
from strata.patches.inversion import invert
from strata.scenes import renderer
from strata.techniques import metrics
from strata.techniques.feature_guidance import composite_latent, masks_at_level
from strata.training import loop, oracle

COUNT, SAMPLE = 24, 1
STEPS, CFG = 25, 4.0
EARLY, LATE = 5, 20  # steps of 25 that the paper's tau of 40 and 10, of 50, leave behind
METHODS = ("image pasting", "latent pasting, tau 10", "latent pasting, tau 40", "FeatGLaC")
CLAIMS = [
    ("FeatGLaC", other, figure) for other in METHODS[:3] for figure in ("features", "object", "lighting", "shadow band")
]
KNOWN = [entry for entry in renderer.catalogue().values() if not entry.held_out and entry.material == "solid"]


def photographs(number):
    """An object in two lights: (photo's prompt, photo), (the new place's prompt, the new place), true scene."""
    entry = KNOWN[(7 * number) % len(KNOWN)]
    here, there = renderer.KINDS[number % len(renderer.KINDS)], renderer.KINDS[(number + 3) % len(renderer.KINDS)]
    empty = renderer.render(renderer.Request(here, ()), 128, 128, number + 100)
    truth = renderer.render(renderer.Request(there, (entry.name,)), 128, 128, number)
    other = renderer.render(renderer.Request(there, (entry.name,)), 128, 128, number, empty.light).objects[0]
    photo = renderer.over(other.rgba_with_shadow, empty.background)
    return (
        (f"{other.prompt} {renderer.PLACE_WORDS[here][0]}", picture(photo)),
        (truth.background_prompt, picture(truth.background)),
        truth,
    )


def inverted(family, number):
    """What there is of a pair, [1,·,H,W] each, the inversions of new place and photo, and the scene's conditioning."""
    (words, photo), (place, background), truth = photographs(number)
    sigmas = family.sigmas(STEPS)
    inversions = [
        invert(family.model, family.vae.encode(shown.movedim(1, -1)), family.text(prompt), None, sigmas)
        for shown, prompt in ((background, place), (photo, words))
    ]
    shown = {
        "photo": photo,
        "place": background,
        "truth": picture(truth.composite),
        "alpha": torch.from_numpy(truth.objects[0].rgba[..., 3])[None, None],
        "shadow": torch.from_numpy(truth.objects[0].shadow[..., 3])[None, None],
    }
    return shown, inversions, family.text(truth.prompt)


def guided(family, planes: Planes, positive, cfg: float, settings: Settings):
    """The latent that FeatGLaC makes of the planes."""
    found = guider(family.model, positive, family.negative, cfg, planes, settings)
    nothing = torch.zeros_like(planes.planes[0].inversion.latents[0])
    return found.sample(
        nothing, nothing, comfy.samplers.sampler_object("euler"), family.sigmas(STEPS), disable_pbar=True
    )


def decoded(family, latents):
    """[B,3,H,W]"""
    return torch.cat([family.vae.decode(latent) for latent in latents]).movedim(-1, 1)[:, :3].clamp(0, 1)


def composed(family, number, cfg):
    """What each method makes of a pair, [4,3,H,W], and what there is of it."""
    shown, inversions, positive = inverted(family, number)
    sigmas, mask = family.sigmas(STEPS), (shown["alpha"][0, 0] > 0.5).float()
    nothing = torch.zeros_like(inversions[0].latents[0])
    latents = [family.vae.encode((mask * shown["photo"] + (1 - mask) * shown["place"]).movedim(1, -1))]
    for start in (LATE, EARLY):
        plain = comfy.samplers.CFGGuider(family.model)
        plain.set_conds(positive, family.negative)
        plain.set_cfg(cfg)
        back, front = (inversion.at(float(sigmas[start])) for inversion in inversions)
        pasted = composite_latent(front, back, masks_at_level(mask[None], back.shape[2:])[:, None])
        euler = comfy.samplers.sampler_object("euler")
        latents.append(plain.sample(pasted / sigmas[start], nothing, euler, sigmas[start:], disable_pbar=True))
    planes = Planes((Plane(inversions[0]), Plane(inversions[1], mask)))
    latents.append(guided(family, planes, positive, cfg, Settings()))
    return decoded(family, latents), shown


def figures_of(judge, made, shown):
    """{figure: [B]} of composites [B,3,H,W] of one pair."""
    truth, photo, alpha, shadow = (
        shown[key].expand(len(made), -1, -1, -1) for key in ("truth", "photo", "alpha", "shadow")
    )
    mask = (alpha > 0.5).float()
    return {
        "features": judge.similarity(oracle.cut_out(made, mask), oracle.cut_out(photo, mask)),
        "object": metrics.mask_error(made, truth, mask),
        "lighting": metrics.lighting_error(made, truth, mask),
        "shadow band": metrics.mask_error(made, truth, metrics.shadow_band(shadow, alpha, 4)),
        "seam": metrics.seam_error(made, truth, mask),
        "background": metrics.mask_error(made, truth, 1 - mask),
    }


@torch.inference_mode()
def measure(
    seeds: range, family=None, cfg: float = CFG, sheet: str = "composition.png"
) -> dict[str, dict[str, list[float]]]:
    """{method: {figure: one value a seed}}: less is better for all but features, the likeness of the cut-out to the
    photo's for the classifier.
    """
    judge, family, rows = oracle.load(), family or Family(), []
    found = {method: {} for method in METHODS}
    for seed in seeds:
        made, shown = composed(family, seed, cfg)
        for figure, one in figures_of(judge, made, shown).items():
            for method, value in zip(METHODS, one.tolist(), strict=True):
                found[method].setdefault(figure, []).append(value)
        rows.append(torch.cat([shown["photo"], shown["place"], made, shown["truth"]]))
    loop.save_grid(OUTPUT / sheet, torch.cat(rows), len(rows[0]))
    return found
