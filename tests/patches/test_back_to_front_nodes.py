"""Fill background, Back to front and Sample foreground on the mini family's structure with random weights: what the
model is asked, pairs of a batch, sizes, extraction, and what is refused.
"""

import folder_paths
import mini_models
import numpy as np
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from safetensors.torch import save_file
from strata.nodes.back_to_front import BackToFront, FillBackground, SampleForeground
from strata.nodes.transparency import DecodeTransparency
from strata.patches import back_to_front as method
from strata.patches import rgba_vae
from strata.patches.back_to_front import extracting
from strata.techniques.layering import alpha_cells
from strata.techniques.layers import read_layers

from . import test_back_to_front
from .random_flux import random_file

registered, trained, model = (getattr(test_back_to_front, name) for name in ("registered", "trained", "model"))
SAMPLING = {"seed": 3, "steps": 3, "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple"}


@pytest.fixture
def family(registered):
    return mini_models.Family()


@pytest.fixture
def patched(model, tmp_path, monkeypatch):
    folder = tmp_path / "layer_model"
    folder.mkdir()
    save_file(random_file("released", own=True), folder / "bfs.safetensors")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "layer_model", ([str(folder)], {".safetensors", ".pt"}))
    return BackToFront.execute(model, "bfs.safetensors", "as in the file", 1.0).args[0]


def scene(count=1, height=64, width=48):
    draw = np.random.default_rng(count)
    mask = torch.zeros(count, height, width)
    for number in range(count):
        mask[number, 8 + 4 * number : 30, 10:33] = 1
    return torch.from_numpy(draw.random((count, height, width, 3), np.float32)), mask


def filled(family, background, mask, box=True, words="an apple on a beach"):
    return FillBackground.execute(family.text(words), family.negative, family.vae, background, mask, box).args


def asked(model):
    """A clone that notes what its network gets."""
    seen, clone = [], model.clone()

    def note(executor, x, timestep, *args, **kwargs):
        seen.append((x.clone(), timestep.clone()))
        return executor(x, timestep, *args, **kwargs)

    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "noted", note)
    return clone, seen


@torch.inference_mode()
def test_the_model_gets_the_whole_background_and_the_boxs_cells(family, patched):
    background, mask = scene()
    mask[0, 9, 11] = 0  # a hole in it is in its box
    positive, negative, latent = filled(family, background, mask)
    clone, seen = asked(patched)
    SampleForeground.execute(clone, positive, negative, latent, noise="same for both", **SAMPLING)
    boxed = torch.zeros(1, 1, 64, 48)
    boxed[..., 8:30, 10:33] = 1
    expected = torch.cat([family.vae.encode(background), alpha_cells(boxed)], 1)
    for x, _ in seen:
        assert x.shape[1] == 4 + 68 and len(x) % 2 == 0
        assert torch.allclose(x[:, 4:], expected.expand(len(x), -1, -1, -1), rtol=0, atol=1e-6)
    assert torch.equal(seen[0][0][0, :4], seen[0][0][1, :4]), "the same noise for both"
    as_it_is = filled(family, background, mask, box=False)[0][0][1]["concat_mask"]
    assert torch.equal(as_it_is[0, 0], mask[0])


@torch.inference_mode()
@pytest.mark.parametrize("noise", ["same for both", "one each"])
def test_a_batch_is_its_pairs_and_a_second_run_is_the_first(family, patched, noise):
    background, mask = scene(3)
    positive, negative, latent = filled(family, background, mask)
    found = SampleForeground.execute(patched, positive, negative, latent, noise=noise, **SAMPLING).args
    again = SampleForeground.execute(patched, positive, negative, latent, noise=noise, **SAMPLING).args
    for one, other in zip(found, again, strict=True):
        assert one["samples"].shape == (3, 4, 8, 6) and torch.equal(one["samples"], other["samples"])
    assert not torch.allclose(found[0]["samples"], found[1]["samples"], rtol=0, atol=0.05)
    alone = filled(family, background[:1], mask[:1])
    first = SampleForeground.execute(patched, *alone, noise=noise, **SAMPLING).args
    if noise == "one each":  # its numbers in the batch are the same for the first pair alone
        for one, other in zip(found, first, strict=True):
            assert torch.allclose(one["samples"][:1], other["samples"], rtol=1e-3, atol=1e-3)


@torch.inference_mode()
def test_any_size_is_filled_up(family, patched):
    background, mask = scene(1, 136, 200)
    positive, negative, latent = filled(family, background, mask)
    assert latent["samples"].shape == (1, 4, 18, 26)
    composite, foreground = SampleForeground.execute(
        patched, positive, negative, latent, noise="one each", **SAMPLING
    ).args
    assert composite["samples"].shape == foreground["samples"].shape == (1, 4, 18, 26)
    vae = rgba_vae.load(rgba_vae.SHIPPED)
    rgba, clear, documents, over = DecodeTransparency.execute(
        samples=foreground, passes="1", tile_size=0, vae=vae, background=background
    ).args
    assert rgba.shape == (1, 136, 200, 4) and torch.equal(clear, 1 - rgba[..., 3])
    layers = read_layers(documents[0]).layers
    assert torch.equal(layers[0].image, background[0]) and torch.equal(layers[1].image, rgba[0])
    expected = rgba[..., 3:] * rgba[..., :3] + (1 - rgba[..., 3:]) * background
    assert torch.allclose(over, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="^transparency: nothing is connected and the VAE has no alpha"):
        DecodeTransparency.execute(samples=foreground, passes="1", tile_size=0, vae=family.vae)


@torch.inference_mode()
def test_a_given_composite_is_clean_in_every_call_and_comes_out_as_it_was(family, patched, monkeypatch):
    background, mask = scene(2)
    positive, negative, latent = filled(family, background, mask)
    given = {"samples": family.vae.encode(torch.rand(2, 64, 48, 3, generator=torch.Generator().manual_seed(0)))}
    seen = []

    def noted(*args):
        clone, calls = asked(extracting(*args))  # inside of what is to be seen
        seen.append(calls)
        return clone

    monkeypatch.setattr(method, "extracting", noted)
    composite, foreground = SampleForeground.execute(
        patched, positive, negative, latent, noise="same for both", composite=given, **SAMPLING
    ).args
    assert composite is given and len(seen[0]) >= SAMPLING["steps"]
    for x, timestep in seen[0]:
        clean = patched.model.process_latent_in(given["samples"]).repeat(len(x) // 4, 1, 1, 1)
        assert torch.equal(x[0::2, :4], clean) and not timestep[0::2].any() and timestep[1::2].all()
    other = {"samples": given["samples"] + 0.5}
    changed = SampleForeground.execute(
        patched, positive, negative, latent, noise="same for both", composite=other, **SAMPLING
    ).args[1]
    assert not torch.allclose(changed["samples"], foreground["samples"], rtol=0, atol=1e-3), "it reads the composite"


def test_what_is_missing_or_does_not_fit_is_told(family, patched, model):
    background, mask = scene()
    with pytest.raises(ValueError, match="^mask: it marks nothing above one half"):
        filled(family, background, torch.zeros_like(mask))
    with pytest.raises(ValueError, match="^mask: 1 of 48×32 and 1 backgrounds of 48×64 do not go together"):
        filled(family, background, mask[:, :32])
    positive, negative, latent = filled(family, background, mask)
    rest = {"latent_image": latent, "noise": "one each", **SAMPLING}
    with pytest.raises(ValueError, match="^model: there is no Back to front on it"):
        SampleForeground.execute(model, positive, negative, **rest)
    with pytest.raises(ValueError, match="^negative: it has no background; connect the output of Fill background"):
        SampleForeground.execute(patched, positive, family.negative, **rest)
    wide = {"samples": torch.zeros(1, 4, 8, 8)}
    with pytest.raises(ValueError, match=r"^composite: its latents \(1 of 64×64 pixels\) and those of Fill background"):
        SampleForeground.execute(patched, positive, negative, composite=wide, **rest)
    with pytest.raises(ValueError, match="^model: this is not a Flux-Fill model"):
        BackToFront.execute(family.model, "bfs.safetensors", "as in the file", 1.0)


def test_a_pickle_is_read_without_running_it(model, tmp_path, patched):
    folder = folder_paths.get_folder_paths("layer_model")[0]
    torch.save(random_file("paper"), f"{folder}/trained_weights.pt")
    found = BackToFront.execute(model, "trained_weights.pt", "as in the file", 1.0).args[1]
    assert found.startswith(
        "trained_weights.pt: BFS for a Flux-Fill of width 160: information is shared in 0 double and 6"
    )

    class Harmful:
        def __reduce__(self):
            return (open, (f"{folder}/made", "w"))

    torch.save({"single_transformer_blocks.0.conv1n.weight": Harmful()}, f"{folder}/harmful.pt")
    with pytest.raises(ValueError, match=r"^file: harmful.pt cannot be read"):
        BackToFront.execute(model, "harmful.pt", "as in the file", 1.0)
    assert not (tmp_path / "layer_model" / "made").exists()
