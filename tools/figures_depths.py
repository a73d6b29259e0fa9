"""FeatGLaC with several depths: two objects, each photographed in a place of its own, put into a third place at two
depths, all planes at once or one depth after the other.

The truth is the renderer's, which has both objects at the same spots in the new place's light. The pictures go to
output/depths.png, one row a scene: both photos, the new place, the methods in their order, truth.
"""

from __future__ import annotations

import torch
from figures_composition import CFG, KNOWN, STEPS, decoded, guided
from mini_models import OUTPUT, Family, picture
from strata.patches.feature_guidance import Plane, Planes, Settings
from strata.patches.inversion import invert
from strata.scenes import renderer
from strata.techniques import metrics
from strata.training import loop, oracle

COUNT, SAMPLE = 12, 0
FROM = 1400  # behind the pairs of figures_composition.py and figures_guidance.py
PASTED, AT_ONCE, IN_TURN = "image pasting", "all planes at once", "one depth after the other"
CLAIMS = [
    (AT_ONCE, other, figure)
    for other in (PASTED, IN_TURN)
    for figure in ("farther object", "nearer object", "shadow band", "both objects")
]


def scene_of(number: int):
    """The two photos and their prompts, farther first, and the true scene."""
    names = tuple(KNOWN[(step * number + step) % len(KNOWN)].name for step in (7, 11))
    kinds = [renderer.KINDS[(number + step) % len(renderer.KINDS)] for step in (3, 0, 6)]
    truth = renderer.render(renderer.Request(kinds[0], names), 128, 128, number)
    photos = []
    for index, kind in enumerate(kinds[1:]):
        empty = renderer.render(renderer.Request(kind, ()), 128, 128, number + 100)
        item = renderer.render(renderer.Request(kinds[0], names), 128, 128, number, empty.light).objects[index]
        words = f"{item.prompt} {renderer.PLACE_WORDS[kind][0]}"
        photos.append((words, picture(renderer.over(item.rgba_with_shadow, empty.background))))
    return photos, truth


def composed(family, photos, truth):
    """[3,3,H,W]: what each method makes."""
    sigmas, place = family.sigmas(STEPS), picture(truth.background)

    def inverted(words, image):
        return invert(family.model, family.vae.encode(image.movedim(1, -1)), family.text(words), None, sigmas)

    def one(words, *planes):
        return guided(family, Planes(planes), family.text(words), CFG, Settings())

    masks = [(torch.from_numpy(item.rgba[..., 3]) > 0.5).float() for item in truth.objects]
    pasted = place
    for mask, (_, photo) in zip(masks, photos, strict=True):
        pasted = mask * photo + (1 - mask) * pasted
    back = inverted(truth.background_prompt, place)
    fronts = [Plane(inverted(*photo), mask) for photo, mask in zip(photos, masks, strict=True)]
    where = truth.background_prompt.removeprefix(renderer.EMPTY)
    alone = truth.objects[0].prompt + where
    first = decoded(family, [one(alone, Plane(back), fronts[0])])
    latents = [
        family.vae.encode(pasted.movedim(1, -1)),
        one(truth.prompt, Plane(back), *fronts),
        one(truth.prompt, Plane(inverted(alone, first)), fronts[1]),
    ]
    return decoded(family, latents)


@torch.inference_mode()
def measure(seeds: range) -> dict[str, dict[str, list[float]]]:
    """{method: {figure: one value a seed}}. Errors are of what is seen of an object."""
    judge, family, rows = oracle.load(), Family(), []
    found = {method: {} for method in (PASTED, AT_ONCE, IN_TURN)}
    for seed in seeds:
        photos, scene = scene_of(seed)
        made = composed(family, photos, scene)
        truth = picture(scene.composite).expand(len(made), -1, -1, -1)
        seen = [torch.from_numpy(item.mask)[None, None].expand(len(made), -1, -1, -1) for item in scene.objects]
        shadows, alphas = (
            torch.stack([torch.from_numpy(values[..., 3]) for values in parts])[None]
            for parts in ([item.shadow for item in scene.objects], [item.rgba for item in scene.objects])
        )
        names = [item.name for item in scene.objects]
        values = {
            "farther object": metrics.mask_error(made, truth, seen[0]),
            "nearer object": metrics.mask_error(made, truth, seen[1]),
            "shadow band": metrics.mask_error(made, truth, metrics.shadow_band(shadows, alphas, 4)),
            "background": metrics.mask_error(made, truth, 1 - seen[0] - seen[1]),
            "both objects": judge.text_agreement(made, [scene.kind] * len(made), [names] * len(made))[1],
        }
        for figure, one in values.items():
            for method, value in zip(found, one.tolist(), strict=True):
                found[method].setdefault(figure, []).append(value)
        rows.append(torch.cat([*(photo for _, photo in photos), picture(scene.background), made, truth[:1]]))
    loop.save_grid(OUTPUT / "depths.png", torch.cat(rows), len(rows[0]))
    return found
