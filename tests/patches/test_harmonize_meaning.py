"""What harmonising does on the trained mini family, against the rendered truth; the pictures go to output/harmonize_meaning.png, one column a scene:
plain stacking, harmonised, truth."""
import numpy as np
import pytest
import torch
from strata.nodes.harmonize import HarmonizeLayers
from strata.techniques.layers import Layer, LayerStack, write_layers
from strata.training import loop, metrics, scenes

from .test_trained_composition import CHECKPOINT, Family, picture

pytestmark = pytest.mark.skipif(not CHECKPOINT.exists(), reason="no trained weights: make mini")
FIRST = 5 * 10**9  # numbers of scenes that nothing was trained on
SETTINGS = {"steps": 30, "cfg": 2.5, "sampler_name": "euler", "scheduler": "normal", "start_percent": 0.85, "end_percent": 0.95, "foregrounds": "keep",
            "feather": 0.0, "detail": 10.0}


def stacked(scene, moved=0):
    """The layers without their shadows, the objects so many pixels to the right, and what they look like one over the other."""
    things = [np.roll(thing.rgba, moved, 1) for thing in scene.objects]
    below = scene.background
    for thing in things:
        below = scenes.over(thing, below)
    layers = [Layer(torch.from_numpy(np.ascontiguousarray(pixels)), str(number)) for number, pixels in enumerate((scene.background, *things))]
    return write_layers(LayerStack((128, 128), tuple(layers))), picture(below)


def band(scene, moved=0):
    """Where the objects' shadows are seen around them, [1,1,H,W]."""
    shadows, alphas = (np.roll(np.stack([values[..., 3] for values in found]), moved, 2)[None] for found in
                       ([thing.shadow for thing in scene.objects], [thing.rgba for thing in scene.objects]))
    return metrics.shadow_band(torch.from_numpy(shadows), torch.from_numpy(alphas), 3)


@pytest.fixture(scope="module")
def harmonised():
    with torch.inference_mode():
        family = Family()

    @torch.inference_mode()
    def run(scene, moved=0):
        layers, plain = stacked(scene, moved)
        result = HarmonizeLayers.execute(family.model, family.text(scene.prompt), family.negative, family.vae, layers, seed=scene.seed, **SETTINGS)
        return result.args[0].movedim(-1, 1), plain
    return run


def test_the_shadows_come_nearer_to_the_truth_than_by_stacking_and_the_things_stay(harmonised):
    shown, errors = [], []
    for number in range(32):
        scene = scenes.render(scenes.Request(train=True, count=1 + number % 3), 128, 128, FIRST + number)
        made, plain = harmonised(scene)
        truth, opaque = picture(scene.composite), torch.from_numpy(np.max([thing.rgba[..., 3] for thing in scene.objects], 0) >= 1)
        assert ((made - plain).abs().amax(1)[0][opaque] <= 8 / 255).all()
        errors.append([metrics.mask_error(values, truth, band(scene)).item() for values in (plain, made)])
        shown.append(torch.cat([plain, made, truth]))
    (CHECKPOINT.parents[2] / "output").mkdir(exist_ok=True)
    loop.save_grid(CHECKPOINT.parents[2] / "output" / "harmonize_meaning.png", torch.stack(shown[:12], 1).flatten(0, 1), 12)
    plain, made = np.transpose(errors)
    print(f"error in the shadow band: stacked {np.nanmean(plain):.4f}, harmonised {np.nanmean(made):.4f}, better in {np.nanmean(made < plain):.2f}")
    assert np.nanmean(made) < np.nanmean(plain) and np.mean(made < plain) > 0.7


def test_a_moved_thing_takes_its_shadow_along(harmonised):
    darker = []
    for number in range(16):
        scene = scenes.render(scenes.Request(train=True, count=1), 128, 128, FIRST + 100 + number)
        left, _, right, _ = scene.objects[0].box
        moved = min(34, 128 - right) if left + right < 128 else -min(34, left)
        made, plain = harmonised(scene, moved)
        change = (plain - made).mean(1, keepdim=True)
        places = [band(scene, step) for step in (0, moved)]
        darker.append([float((change * place).sum() / place.sum()) for place in (places[0] * (1 - places[1].clamp(0, 1)), places[1])])
    old, new = np.nanmean(darker, 0)
    print(f"darker by {new:.4f} where the shadow belongs now, by {old:.4f} where it was")
    assert new > 0.01 and new > 2 * old
