"""Complete layers on rendered scenes of two or three things: layers cut to what is seen of each, completed by the
inpainting model, which is told their names, and by LayeringDiff's background model, beside colours that go on smoothly
and layers left as they are.

Errors are absolute differences of each layer alone over gray, where nearer things hide it. The background's shadows are
its own, and so are those on an object. Of objects the sum is divided by how much of them is hidden, so that what is
drawn beyond them counts too; scenes where next to nothing of them is hidden are left out.
The pictures go to output/complete.png, one row a scene: image, the background of each column, the true one.
"""

from __future__ import annotations

import numpy as np
import torch
from figures_decompose import opened
from mini_models import OUTPUT, picture
from strata.nodes.redraw import CompleteLayers
from strata.patches import completion
from strata.scenes import renderer
from strata.techniques.layers import Layer, LayerStack, read_layers, write_layers
from strata.training import loop

COUNT, SAMPLE = 16, 2
FIRST = 10**7  # behind the scenes of training
PAINTED, DECOMPOSED, SMOOTH, LEFT = "inpainting model", "LayeringDiff's background", "smooth fill", "left open"
CLAIMS = [(ours, other, "hidden background") for ours in (PAINTED, DECOMPOSED) for other in (SMOOTH, LEFT)]
CLAIMS += [(ours, other, "hidden parts of objects") for ours in (PAINTED, DECOMPOSED) for other in (SMOOTH, LEFT)]
SIDE = 128
FEW = 20  # pixels


@torch.inference_mode()
def measure(seeds: range) -> dict[str, dict[str, list[float]]]:
    family, _, model, loaded = opened()
    shown, found = [], {}
    for seed in seeds:
        scene = renderer.render(renderer.Request(train=True, count=2 + seed % 2), SIDE, SIDE, FIRST + seed)
        image, masks = torch.from_numpy(scene.composite), torch.from_numpy(scene.masks)[..., None]
        names = [scene.background_prompt, *(item.prompt for item in scene.objects)]
        layers = (Layer(torch.cat([image, mask], -1), name) for name, mask in zip(names, masks, strict=True))
        stack = LayerStack((SIDE, SIDE), tuple(layers))
        given = {"model": model, "vae": family.vae, "negative": family.negative, "layers": write_layers(stack)}
        given |= {"select": "", "grow": 4, "seed": seed, "steps": 20, "cfg": 4.0, "scheduler": "normal"}
        made = {
            PAINTED: CompleteLayers.execute(**given, sampler_name="euler", clip=family.clip).args[0],
            DECOMPOSED: CompleteLayers.execute(**given, sampler_name="ddim", decomposer=loaded).args[0],
        }
        stacks = {column: read_layers(one) for column, one in made.items()}
        stacks[SMOOTH] = completion.complete(stack, range(len(masks)), lambda hole, _: hole.image, 1, given["grow"])[0]
        stacks[LEFT] = stack
        for column, one in stacks.items():
            for figure, value in figures_of(scene, one).items():
                found.setdefault(column, {}).setdefault(figure, []).append(value)
        if len(shown) < 12:
            back = [picture(one.layers[0].image[..., :3].numpy()) for one in list(stacks.values())[:3]]
            shown.append(torch.cat([picture(scene.composite), *back, picture(truth_of(scene)[0])[:, :3]]))
    loop.save_grid(OUTPUT / "complete.png", torch.cat(shown), len(shown[0]))
    return found


def truth_of(scene: renderer.Scene) -> list[np.ndarray]:
    """[H,W,4] of background and objects, in the shadows of nearer things."""
    found = [np.dstack([scene.background, np.ones_like(scene.depth)])]
    for item in scene.objects:
        found = [np.dstack([renderer.over(item.shadow, one[..., :3]), one[..., 3]]) for one in found] + [item.rgba]
    return found


def figures_of(scene: renderer.Scene, stack: LayerStack) -> dict[str, float]:
    errors, hidden = [], []
    for number, (layer, true) in enumerate(zip(stack.layers, truth_of(scene), strict=True)):
        behind = scene.masks[number + 1 :].sum(0)
        difference = np.abs(over_gray(layer.image.numpy()) - over_gray(true)).mean(-1) * behind
        errors.append(difference.sum())
        hidden.append((true[..., 3] * behind).sum())
    objects = sum(errors[1:]) / sum(hidden[1:]) if sum(hidden[1:]) > FEW else float("nan")
    return {"hidden background": errors[0] / hidden[0], "hidden parts of objects": objects}


def over_gray(pixels: np.ndarray) -> np.ndarray:
    return renderer.over(pixels, np.full_like(pixels[..., :3], 0.5))
