"""A picture taken apart by prompts, on the trained mini family, against what the renderer knows."""

from functools import partial

import comfy.samplers
import pytest
import torch
from mini_models import CHECKPOINT, Family
from strata.patches.inversion import invert
from strata.patches.layer_prompts import encode_layers
from strata.patches.layer_rows import watched
from strata.patches.shared_layers import TRAJECTORY, Maps, Sharing, map_context, share_layers, without_layers
from strata.scenes import renderer
from strata.techniques.layers import read_layers
from strata.techniques.shared_layers import joint_attention
from strata.training import oracle

trained = pytest.mark.skipif(not CHECKPOINT.exists(), reason="no trained weights: make mini")


@pytest.fixture(scope="module")
def mini():
    with torch.inference_mode():
        return Family()


@pytest.fixture
def split():
    from strata.nodes.shared_layers import ImageToLayers

    return ImageToLayers.execute


def test_the_isolated_composite_is_eq_15_s_masked_softmax():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2 * 4, 5, 6, generator=generator, dtype=torch.float64) for _ in range(3))

    def attend(q, k, v):
        return (q @ k.transpose(1, 2) / 6**0.5).softmax(-1) @ v

    found = joint_attention(q, k, v, 4, attend, isolated=True)
    for scene in range(2):
        rows = slice(4 * scene, 4 * scene + 4)
        queries, keys, values = (part[rows].flatten(0, 1) for part in (q, k, v))
        mask = torch.zeros(20, 20, dtype=torch.float64)
        mask[15:, :15] = -torch.inf
        expected = (queries @ keys.T / 6**0.5 + mask).softmax(-1) @ values
        assert torch.allclose(found[rows].flatten(0, 1), expected, rtol=1e-12, atol=1e-12)


@trained
@torch.inference_mode()
def test_no_layer_changes_the_given_picture_and_it_changes_the_layers(mini):
    positive = encode_layers(mini.clip, "on a beach", ["a red apple"])
    layered = share_layers(mini.model, Sharing())
    x = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    levels = []

    def denoised(model, x, positive, trajectory=None):
        model = model.clone()
        if trajectory is not None:
            model.model_options["transformer_options"][TRAJECTORY] = trajectory
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, mini.negative)
        guider.set_cfg(1.0)
        sigmas = torch.tensor([3.0, 0.0])  # one Euler step to zero is the prediction itself
        return guider.sample(x, torch.zeros_like(x), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True)

    given = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    found = denoised(layered, x, positive, lambda sigma: levels.append(sigma) or 3 * given)
    alone = denoised(without_layers(layered), given, [[positive[0][0][-1:], {}]])
    other = denoised(layered, x, positive, lambda sigma: -3 * given)
    assert levels == [3.0] and torch.allclose(found[2:], alone, rtol=1e-5, atol=2e-4)
    assert (found[:2] - other[:2]).abs().amax() > 0.05


@trained
@torch.inference_mode()
@pytest.mark.parametrize(("kind", "name"), [("meadow", "car"), ("snow", "penguin")])
def test_a_picture_comes_apart_into_the_place_and_the_object(mini, split, kind, name):
    judge = oracle.load()
    scene = renderer.render(renderer.Request(kind, (name,)), 128, 128, 3)
    picture = torch.from_numpy(scene.composite)[None]
    model = map_context(share_layers(mini.model, Sharing()), Maps())
    positive = encode_layers(mini.clip, scene.background_prompt, [scene.objects[0].prompt])
    document, recomposed, maps, error = split(
        model, mini.vae, picture, positive, mini.negative, 20, 4.0, "ddim_uniform"
    ).result
    background, item = (layer.image.movedim(-1, 0)[None].float() for layer in read_layers(document).layers)
    empty, truth = torch.from_numpy(scene.background), torch.from_numpy(scene.objects[0].rgba[..., 3])
    place, nothing = judge.text_agreement(background[:, :3], [kind], [[]])
    shown = item[:, :3] * item[:, 3:] + 0.5 * (1 - item[:, 3:])
    assert place.all() and nothing.all(), "the place is left, and the thing is out of it"
    assert judge.text_agreement(shown, [None], [[name]])[1].all()
    without = (empty - picture[0]).abs().mean()
    assert (
        error == pytest.approx((recomposed - picture).abs().mean().item())
        and error < 2 * without
        and maps.shape[0] == 20
    )
    overlap = (item[0, 3] * truth).sum() / item[0, 3].sum()
    assert overlap > 0.5, "the thing is where it was in the picture"


@trained
@torch.inference_mode()
@pytest.mark.parametrize("scheduler", ["ddim_uniform", "normal", "karras"])
def test_the_layers_start_from_the_trajectory_as_it_is(mini, split, scheduler):
    scene = renderer.render(renderer.Request("meadow", ("car",)), 128, 128, 3)
    picture, recorded = torch.from_numpy(scene.composite)[None], {}
    positive = encode_layers(mini.clip, scene.background_prompt, [scene.objects[0].prompt])
    model = map_context(share_layers(mini.model, Sharing()), Maps())
    split(watched(model, recorded), mini.vae, picture, positive, mini.negative, 3, 1.0, scheduler)
    sigmas = comfy.samplers.calculate_sigmas(mini.model.get_model_object("model_sampling"), scheduler, 3)
    trajectory = invert(mini.model, mini.vae.encode(picture), [[positive[0][0][-1:], {}]], None, sigmas)
    assert torch.allclose(recorded[float(sigmas[0])][:1], trajectory.latents[0], rtol=1e-5, atol=1e-3)


@trained
@torch.inference_mode()
def test_what_cannot_be_taken_apart_is_said(mini, split):
    picture, model = torch.zeros(1, 64, 64, 3), share_layers(mini.model, Sharing())
    run = partial(split, model, mini.vae, picture, negative=mini.negative, steps=2, cfg=1.0, scheduler="simple")
    with pytest.raises(ValueError, match="positive: there is no object"):
        run(positive=encode_layers(mini.clip, "on a beach", []))
    with pytest.raises(ValueError, match="positive: .* connect Layer prompts"):
        run(positive=mini.text("a dog"))
    with pytest.raises(ValueError, match="negative: this is a conditioning of Layer prompts"):
        run(
            positive=encode_layers(mini.clip, "on a beach", ["a dog"]),
            negative=encode_layers(mini.clip, "on a beach", ["a dog"]),
        )
    with pytest.raises(ValueError, match="decoder: nothing tells"):
        run(positive=encode_layers(mini.clip, "on a beach", ["a dog"]))
