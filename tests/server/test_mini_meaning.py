"""The shipped mini family through its workflows and the stock nodes: do the pictures show what was asked for?"""
from pathlib import Path

import numpy as np
import pytest
import run
import torch
from PIL import Image
from strata.training import oracle, scenes

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
SAMPLERS = ("dpmpp_2m", "euler", "ddim")
KNOWN = [entry for entry in scenes.catalogue().values() if not entry.held_out]


@pytest.fixture(scope="module")
def judge():
    return oracle.load()


def prompt(entry, kind):
    return f"{entry.prompts[0]} {scenes.PLACE_WORDS[kind][0]}"


def pictures(comfy, folder, workflow, settings):
    made = run.run_file(comfy, WORKFLOWS / f"{workflow}.json", settings, folder, False)
    return torch.stack([torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) / 255 for path in made])


def test_pictures_show_the_place_and_the_object_of_the_prompt(comfy, judge, tmp_path):
    asked = [(KNOWN[(7 * i) % len(KNOWN)], scenes.KINDS[i % len(scenes.KINDS)]) for i in range(40)]
    shown = torch.cat([pictures(comfy, tmp_path / str(i), "mini_text_to_image", [
        f"What to show.text={prompt(*pair)}", "EmptyLatentImage.batch_size=1", f"KSampler.seed={i}", f"KSampler.sampler_name={SAMPLERS[i % 3]}"])
        for i, pair in enumerate(asked)])
    place, thing = judge.text_agreement(shown, [kind for _, kind in asked], [[entry.name] for entry, _ in asked])
    print(f"place {place.mean():.3f}, object {thing.mean():.3f}")
    assert place.mean() >= 0.85 and thing.mean() >= 0.7
