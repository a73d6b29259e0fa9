"""Redraw layer on rendered scenes: the nearest object becomes another one, by BFS, and its old shadow goes.

Image, empty place and plain objects are the renderer's; Effect layers finds the shadows. Beside it stand BFS with the
true scene behind the object and the same box, words and noise, and Redraw layer where nobody took the old shadow out
of the background. The band is where the old shadow lay and no old object was. The new thing and its shadow may be
there too, so it is also measured without them.
The pictures go to output/redraw.png, one row a scene: image, the three in the order of the columns, the true scene
behind the object.
"""

from __future__ import annotations

import figures_back_to_front as bfs
import numpy as np
import torch
from figures_effects import stack_of
from mini_models import OUTPUT, picture
from strata.nodes.redraw import RedrawLayer
from strata.scenes import renderer
from strata.techniques import arrange, effects, metrics
from strata.techniques.compositing import flatten
from strata.techniques.layers import Layer, LayerStack, read_layers, write_layers
from strata.training import loop

COUNT, SAMPLE = 96, 2
FIRST = 9 * 10**6  # behind the scenes of training
OURS, TRUE, LEFT = "Redraw layer", "BFS before the true scene", "old shadow left in the background"
CLAIMS = [(OURS, TRUE, "named object"), (OURS, TRUE, "old shadow's band"), (LEFT, TRUE, "old shadow's band")]
ROOM = 0.3


@torch.inference_mode()
def measure(seeds: range) -> dict[str, dict[str, list[float]]]:
    models, shown = bfs.Models(), []
    found: dict[str, dict[str, list[float]]] = {OURS: {}, TRUE: {}, LEFT: {}}
    for seed in seeds:
        request = renderer.Request(train=True, count=1 + seed % 3, bright_side=True)
        scene = renderer.render(request, bfs.SIDE, bfs.SIDE, FIRST + seed)
        name = new_name(scene)
        behind, old = picture(scene.behind_nearest), band(scene)
        stack, image = stack_of(scene), torch.from_numpy(scene.composite)
        baked = renderer.over(scene.objects[-1].shadow, scene.behind_nearest)
        given = {
            OURS: effects.with_effect_layers(stack, image, 0),
            TRUE: LayerStack(stack.canvas, (Layer(behind[0].movedim(0, -1), "behind"), stack.layers[-1])),
            LEFT: LayerStack(stack.canvas, (Layer(torch.from_numpy(baked), "behind"), stack.layers[-1])),
        }
        images = {}
        for column, layers in given.items():
            images[column], without = redrawn(models, layers, scene, name, seed)
            logits = models.judge.logits(images[column])[1][0]
            seen = (logits > logits[models.judge.objects.index(name)]).sum() < len(scene.objects)
            values = {
                "named object": float(seen),
                "old shadow's band": metrics.mask_error(images[column], behind, old).item(),
                "the band without the new thing": metrics.mask_error(without, behind, old).item(),
            }
            for figure, value in values.items():
                found[column].setdefault(figure, []).append(value)
        if len(shown) < 12:
            shown.append(torch.cat([picture(scene.composite), *images.values(), behind]))
    loop.save_grid(OUTPUT / "redraw.png", torch.cat(shown), len(shown[0]))
    return found


def new_name(scene: renderer.Scene) -> str:
    """A thing that the scene does not have."""
    request = renderer.Request(scene.kind, train=True, count=renderer.MOST_OBJECTS)
    names = renderer.choose(request, np.random.default_rng((scene.seed, 5)))[1]
    return next(name for name in names if name not in [one.name for one in scene.objects])


def band(scene: renderer.Scene) -> torch.Tensor:
    """[1,1,H,W]: how dark the nearest object's shadow is where no object is."""
    free = np.prod([1 - one.rgba[..., 3:] for one in scene.objects], 0)
    return picture(scene.objects[-1].shadow[..., 3:] * free)


def redrawn(models: bfs.Models, stack: LayerStack, scene: renderer.Scene, name: str, seed: int) -> tuple:
    """The image [1,3,H,W] by the pack's node, and the same without the new thing and its shadow."""
    words, old = models.family.text(renderer.catalogue()[name].prompts[0]), f'"{scene.objects[-1].name}"'
    found = RedrawLayer.execute(
        models.coupled,
        words,
        models.family.negative,
        models.family.vae,
        write_layers(stack),
        old,
        ROOM,
        seed=seed,
        noise=bfs.NOISE,
        rgba_vae=models.rgba,
        **bfs.FLOW,
    )
    without = flatten(arrange.arrange(read_layers(found.args[0]), "drop", old))[0][None]
    return tuple(one[..., :3].movedim(-1, 1) for one in (found.args[1], without))
