"""BFS's trainer: it starts as two plain branches, learns eight scenes, moves what its stage moves, and its scenes are
layers that add up; the gradient against finite differences.
"""

import numpy as np
import pytest
import torch
from strata.networks import back_to_front as networks
from strata.networks import flux
from strata.scenes import renderer
from strata.techniques import back_to_front as formulas
from strata.training import (
    back_to_front,
    command,
    latent_composition,
    layered_scenes,
    loop,
    published,
    rgba_autoencoder,
    settings,
)
from strata.training.flux_fill import Words

SMALL = {"scenes": 12, "batch": 4, "side": 64, "warmup": 2}


def config_of(name: str, **changes) -> dict:
    return command.read_config(settings.CONFIGS / f"{name}.json", []) | SMALL | changes


@pytest.fixture(scope="module", autouse=True)
def little_validation():
    with pytest.MonkeyPatch.context() as patch:
        for module in (back_to_front, latent_composition):
            patch.setattr(module, "CHECK", 4)
        yield


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    model = flux.build(settings.family()["flux"]).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1 or not weight.any():
                weight.normal_(std=0.05)
    return model


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    rgba = rgba_autoencoder.build("published").eval().requires_grad_(False)
    return layered_scenes.LayeredScenes(
        tmp_path_factory.mktemp("scenes"), published.checkpoint()[1], rgba, SMALL["scenes"], SMALL["side"]
    )


@pytest.fixture(scope="module")
def words():
    return Words(published.checkpoint()[0], settings.family()["flux_tokens"])


def test_scenes_are_layers_that_add_up_and_their_box_holds_them(pool):
    for index in range(6):
        true, poor = (pool.layers(index, shadow) for shadow in (layered_scenes.TRUE, layered_scenes.POOR))
        for one in (true, poor):
            alpha = one.foreground[..., 3:]
            found = alpha * one.foreground[..., :3] + (1 - alpha) * one.background
            assert np.allclose(found, one.composite, rtol=0, atol=1e-5)
        left, top, right, bottom = true.box
        outside = true.foreground[..., 3].copy()
        outside[top:bottom, left:right] = 0
        assert outside.max() <= 1 / 16 + 1e-6, "nothing but the faintest shadow lies outside"
        assert np.array_equal(true.background, poor.background)
        assert poor.foreground[..., 3].sum() < true.foreground[..., 3].sum()
        scene = renderer.render(pool.request(index), SMALL["side"], SMALL["side"], index)
        assert true.name == scene.objects[-1].name
    batch = pool.batch(np.arange(3), 0)
    again = pool.batch(np.arange(3), 0)
    assert torch.equal(batch.composite, again.composite) and batch.cells.shape == (3, 64, 8, 8)
    assert all(
        prompt in {text for entry in renderer.catalogue().values() for text in entry.prompts}
        for prompt in batch.prompts
    )


def given(count: int, seed: int = 1) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = (count, 4, 4, 4), (count, 68, 4, 4), (count,), (count, 5, 128), (count, 128)
    return [torch.rand(shape, generator=draw) for shape in shapes]


@torch.no_grad()
def test_it_starts_as_two_plain_branches(base):
    model = back_to_front.Branches(base, 4, 2)
    rows = given(4)
    assert torch.allclose(model(*rows), flux.predict(base, *rows), rtol=0, atol=1e-6)


def test_the_gradient_is_that_of_finite_differences(base, pool, words):
    """Up to what diffusers' positions lose, which are float32."""
    model = back_to_front.Branches(base, 2, 2).double()
    torch.manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.02 * torch.randn_like(value))
    compose = latent_composition.Composition([32, 32]).double().eval().requires_grad_(False)
    config = config_of("back_to_front")
    batch = pool.batch(np.arange(2), 0)

    def double(prompts):
        return [part.double() for part in words(prompts)]

    parts = {name: getattr(batch, name).double() for name in ("composite", "background", "foreground", "cut", "cells")}
    exact = layered_scenes.Batch(**parts, prompts=batch.prompts)

    def loss():
        return back_to_front.losses(model, compose, exact, double, config, np.random.default_rng(0), "flow")["loss"]

    names = [name for name, value in model.named_parameters() if value.requires_grad]
    chosen = [
        next(name for name in names if part in name)
        for part in ("lora_A.x_lora", "lora_B.y_lora", "terms.to_q.xy_lora.up", "mix")
    ]
    loss().backward()
    for name in chosen:
        value = model.get_parameter(name)
        place = value.grad.abs().argmax()
        with torch.no_grad():
            flat, found = value.view(-1), []
            for step in (1e-4, -1e-4):
                flat[place] += step
                found.append(loss().item())
                flat[place] -= step
        assert (found[0] - found[1]) / 2e-4 == pytest.approx(value.grad.view(-1)[place].item(), rel=1e-2), name


@pytest.mark.parametrize("same", [True, False])
def test_each_stage_moves_its_own_and_the_losses_are_the_formulas(base, pool, words, same):
    model = back_to_front.Branches(base, 2, 2)
    moved = {}
    for kind in ("flow", "real", "regular"):
        back_to_front.learning(model, kind)
        moved[kind] = {name for name, value in model.named_parameters() if value.requires_grad}
    assert moved["real"] == {name for name in moved["flow"] if ".x_lora." in name}
    assert moved["regular"] == moved["flow"] - moved["real"] and any("sharing" in name for name in moved["regular"])
    batch, config = pool.batch(np.arange(4), 0), config_of("back_to_front", same_noise=same)
    compose = latent_composition.Composition([32, 32]).eval()
    seen = []

    def watched(*rows):
        seen.append(rows)
        return torch.zeros_like(rows[0])

    model.forward = watched
    for kind in ("flow", "real", "regular"):
        with torch.no_grad():
            found = back_to_front.losses(model, compose, batch, words, config, np.random.default_rng(5), kind)
        noisy, _, levels = seen[-1][:3]
        rng = np.random.default_rng(5)  # the same draws, in their order
        sigma = torch.from_numpy(rng.normal(0.3, 1.0, 4)).float().sigmoid()
        noise = torch.from_numpy(rng.standard_normal(batch.composite.shape, np.float32))
        other = noise if same else torch.from_numpy(rng.standard_normal(batch.composite.shape, np.float32))
        foreground = batch.cut if kind == "real" else batch.foreground
        level = sigma.view(-1, 1, 1, 1)
        assert torch.allclose(noisy[1::2], (1 - level) * foreground + level * other, rtol=0, atol=1e-6)
        errors = [(batch.composite - noise).square().mean(), (foreground - other).square().mean()]
        if kind == "regular":
            assert torch.equal(noisy[0::2], batch.composite) and not levels[0::2].any()
            assert torch.equal(levels[1::2], sigma)
        if kind == "real":
            assert found["loss"].item() == pytest.approx(errors[0].item(), rel=1e-5)
            continue
        clean = noisy  # the velocity is zero
        composite = batch.composite if kind == "regular" else clean[0::2]
        with torch.no_grad():
            composition = (compose(clean[1::2], batch.background) - composite).abs().mean()
        wanted = (errors[1] if kind == "regular" else sum(errors)) + 0.1 * composition
        assert found["loss"].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert formulas.clean_estimate(
        torch.ones(2, 1, 1, 1), torch.ones(2, 1, 1, 1), torch.tensor([0.0, 0.5])
    ).tolist() == [
        [[[1.0]]],
        [[[0.5]]],
    ]


def test_both_stages_learn_eight_scenes(base, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SHOW_EVERY", 6)
    monkeypatch.setattr(back_to_front, "build", lambda config, root: back_to_front.Branches(base, 4, 2))
    compose = config_of("latent_composition", steps=4, widths=[32, 32])
    latent_composition.train(compose, tmp_path / "latent_composition", None, 1e9)
    with pytest.raises(settings.TrainingError, match="train it first: python -m training latent_composition"):
        latent_composition.load(tmp_path / "nothing", "Strata mini")
    first = config_of("back_to_front", steps=18, learning_rate=4e-3)
    model = back_to_front.train(first, tmp_path / "back_to_front", None, 1e9)
    rows = (tmp_path / "back_to_front" / "loss.csv").read_text().splitlines()
    loss = [float(row.split(",")[2]) for row in rows[1:]]
    print(loss)
    assert loss[-1] < 0.9 * loss[0]
    second = config_of("back_to_front_real", steps=4)
    back_to_front.train(second, tmp_path / "back_to_front_real", None, 1e9)
    alone = back_to_front.train(second | {"steps": 1, "regularise": False}, tmp_path / "alone", None, 1e9)
    moved = {key for key, value in alone.state_dict().items() if not torch.equal(value, model.state_dict()[key])}
    assert moved and all(f".{back_to_front.CONTENT[0]}." in key for key in moved)
    weights = back_to_front.published_form(model.state_dict())
    fresh = back_to_front.Branches(base, 4, 2)
    back_to_front.from_published(fresh, weights)  # a published file can be learnt on from
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in fresh.state_dict().items())
    file = networks.recognise("bfs", weights, {})
    assert not file.unknown and file.pairing == "paper" and len(file.sharing) == 6
    assert {len(own) for own in file.content.values()} == {2 * 8 + 6 * 2}
