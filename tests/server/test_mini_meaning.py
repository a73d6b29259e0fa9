"""The shipped mini family through its workflows and the stock nodes: do the pictures show what was asked for?"""

from pathlib import Path

import numpy as np
import pytest
import run
import torch
from PIL import Image
from strata.scenes import renderer
from strata.training import oracle

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
INPAINT = WORKFLOWS.parent / "models" / "diffusion_models" / "strata_mini_inpaint.safetensors"
SAMPLERS = ("dpmpp_2m", "euler", "ddim")
KNOWN = [entry for entry in renderer.catalogue().values() if not entry.held_out]


@pytest.fixture(scope="module")
def judge():
    return oracle.load()


def prompt(entry, kind):
    return f"{entry.prompts[0]} {renderer.PLACE_WORDS[kind][0]}"


def in_its_own_size(title):
    """Settings that turn a workflow's enlarging off."""
    return [f"{title}.upscale_method=nearest-exact", f"{title}.scale_by=1"]


def pictures(comfy, folder, workflow, settings):
    made = run.run_file(comfy, WORKFLOWS / f"{workflow}.json", settings, folder, False)
    return torch.stack(
        [torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) / 255 for path in made]
    )


def test_pictures_show_the_place_and_the_object_of_the_prompt(comfy, judge, tmp_path):
    asked = [(KNOWN[(7 * i) % len(KNOWN)], renderer.KINDS[i % len(renderer.KINDS)]) for i in range(24)]
    shown = torch.cat(
        [
            pictures(
                comfy,
                tmp_path / str(i),
                "mini_text_to_image",
                [
                    f"What to show.text={prompt(*pair)}",
                    "EmptyLatentImage.batch_size=1",
                    f"KSampler.seed={i}",
                    f"KSampler.sampler_name={SAMPLERS[i % 3]}",
                    *in_its_own_size("Four times larger"),
                ],
            )
            for i, pair in enumerate(asked)
        ]
    )
    place, item = judge.text_agreement(shown, [kind for _, kind in asked], [[entry.name] for entry, _ in asked])
    print(f"place {place.mean():.3f}, object {item.mean():.3f}")
    assert place.mean() >= 0.85 and item.mean() >= 0.7


@pytest.mark.skipif(not INPAINT.exists(), reason="the inpainting denoiser is not trained: make mini")
def test_the_box_is_filled_with_the_object_and_the_rest_is_kept(comfy, judge, tmp_path):
    asked = [(KNOWN[(11 * i + 3) % len(KNOWN)], renderer.KINDS[i % len(renderer.KINDS)]) for i in range(10)]
    filled = []
    for i, (entry, kind) in enumerate(asked):
        settings = [
            f"Image to change.kind={kind}",
            "Image to change.objects=",
            "Image to change.count=0",
            f"Image to change.seed={i}",
            f"KSampler.seed={i}",
            f"The whole image, new thing included.text={prompt(entry, kind)}",
            *in_its_own_size("Four times larger: After"),
        ]
        made = pictures(comfy, tmp_path / str(i), "mini_inpaint", settings)
        filled.append(made[-1])
        before = torch.from_numpy(renderer.render(renderer.Request(kind=kind, count=0), 128, 128, i).composite).permute(
            2, 0, 1
        )
        inside = torch.zeros(128, 128, dtype=torch.bool)
        inside[64:120, 8:64] = True
        changed = (made[-1] - before).abs().amax(0)
        assert changed[~inside].max() <= 1 / 255 + 1e-4 and changed[inside].mean() > 0.02
    place, item = judge.text_agreement(
        torch.stack(filled), [kind for _, kind in asked], [[entry.name] for entry, _ in asked]
    )
    print(f"place {place.mean():.2f}, object {item.mean():.2f}")
    assert place.mean() >= 0.85 and item.mean() >= 0.7


@pytest.mark.skipif(not INPAINT.exists(), reason="the inpainting denoiser is not trained: make mini")
@pytest.mark.parametrize("number", range(6))
def test_an_inserted_object_stands_behind_what_is_nearer(number, comfy, tmp_path):
    name, kind = (
        ("dog", "meadow"),
        ("penguin", "beach"),
        ("pumpkin", "snow"),
        ("cactus", "desert"),
        ("teapot", "table"),
        ("car", "street"),
    )[number]
    scene = renderer.render(renderer.Request(kind, (name,)), 128, 128, number + 20)
    front, low, high = scene.objects[0], scene.depth.min(), scene.depth.max()
    left, top, right, bottom = front.box
    x, y = max(0, left - 26), max(0, top - 20)
    width, height = (left + right) // 2 - x + 8, bottom - y - 4
    settings = [
        f"The image.kind={kind}",
        f"The image.objects={name}",
        f"The image.seed={number + 20}",
        f"RandomNoise.noise_seed={number}",
        f"Prompt with the object.text=a christmas tree {renderer.PLACE_WORDS[kind][0]}",
        f"Strata_InsertAtDepth.x={x}",
        f"Strata_InsertAtDepth.y={y}",
        f"Strata_InsertAtDepth.width={width}",
        f"Strata_InsertAtDepth.height={height}",
        f"Strata_InsertAtDepth.threshold={float((front.depth + 0.05 - low) / (high - low)):.4f}",
        *in_its_own_size("Four times larger"),
    ]
    made = run.run_file(comfy, WORKFLOWS / "object_insertion_mini.json", settings, tmp_path, False)
    after = np.array(Image.open(next(path for path in made if "insertion" in path.name)).convert("RGB")) / 255
    box = np.zeros((128, 128), bool)
    box[y : y + height, x : x + width] = True
    nearer = box & (front.mask > 0.5)
    changed = np.abs(after - scene.composite).max(-1)
    assert nearer.sum() > 200 and (changed[nearer] <= 8 / 255).mean() >= 0.95
    assert changed[box & ~nearer].mean() > 0.03  # something came in
