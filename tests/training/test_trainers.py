"""Every trainer of the family on eight scenes: it learns them to a stated loss, and goes on where it stopped."""

import csv
import functools
import shutil

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from strata.networks import layered_denoiser
from strata.networks.autoencoder import Autoencoder
from strata.networks.transparency import published_adapter
from strata.scenes import renderer
from strata.techniques import diffusion as formulas
from strata.training import (
    adapter,
    autoencoder,
    command,
    cutouts,
    diffusion,
    dreamlayer,
    family,
    fill_base,
    flux_adapter,
    flux_fill,
    latents,
    loop,
    published,
    rgba_autoencoder,
    settings,
    text,
    transparency,
)

EIGHT = {
    "autoencoder": {"scenes": 8, "batch": 4, "side": 32, "crop": 32, "steps": 100, "warmup": 5},
    "diffusion": {"scenes": 16, "batch": 8, "side": 64, "steps": 50, "warmup": 5},
    "inpaint": {"scenes": 16, "batch": 8, "side": 64, "steps": 8, "warmup": 2},
    "transparent_decoder": {"cutouts": 8, "batch": 8, "side": 32, "crop": 32, "steps": 4, "warmup": 2},
    "transparency": {
        "cutouts": 8,
        "batch": 4,
        "side": 32,
        "crop": 32,
        "steps": 120,
        "warmup": 5,
        "learning_rate": 2e-3,
    },
    "rgba_autoencoder": {
        "scenes": 8,
        "cutouts": 8,
        "side": 64,
        "crop": 32,
        "steps": 40,
        "warmup": 5,
        "learning_rate": 3e-3,
    },
    "flux_fill": {"scenes": 16, "batch": 4, "side": 32, "steps": 40, "warmup": 5, "learning_rate": 3e-3},
    "flux_adapter": {"scenes": 12, "batch": 2, "side": 64, "smaller_side": 32, "steps": 24, "warmup": 2},
    "adapter": {"cutouts": 64, "batch": 8, "side": 64, "steps": 8, "warmup": 2},
    "dreamlayer": {
        "adapter": None,
        "scenes": 12,
        "rows": 8,
        "side": 64,
        "steps": 50,
        "warmup": 5,
        "learning_rate": 3e-3,
        "shares": [[1, 1, 1]] * 2,
    },
}


@pytest.fixture(scope="module", autouse=True)
def little_validation():
    """What the trainers keep back for validation and draw for it, as small as their pools here."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (diffusion, flux_fill):
            patch.setattr(module, "CHECK", 8)
        for name in ("CHECK", "SHOWN"):
            patch.setattr(flux_adapter, name, 4)
        patch.setattr(dreamlayer, "CHECK", 3)
        patch.setattr(dreamlayer, "SAMPLING_STEPS", 2)
        for module in (transparency, rgba_autoencoder):
            patch.setattr(module, "HELD_OUT", range(10**9, 10**9 + 8))
        patch.setattr(diffusion, "sample", functools.partial(diffusion.sample, steps=2))
        yield


def config_of(name: str, **changes) -> dict:
    return command.read_config(settings.CONFIGS / f"{name}.json", []) | EIGHT.get(name, {}) | changes


def losses(folder, what: str = "loss") -> list[float]:
    with open(folder / "loss.csv", newline="") as file:
        return [float(row[what]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def trained_autoencoder(root):
    autoencoder.train(config_of("autoencoder"), root / "autoencoder", None, 1e9)
    return root / "autoencoder"


@pytest.fixture(scope="module")
def trained_diffusion(root, trained_autoencoder):
    """The last eight scenes of its pool are for validation, so that it learns eight."""
    diffusion.train(config_of("diffusion"), root / "diffusion", None, 1e9)
    return root / "diffusion"


@pytest.fixture(scope="module")
def trained_pair(root, trained_autoencoder):
    transparency.train(config_of("transparency"), root / "transparency", None, 1e9)
    return root / "transparency"


@pytest.fixture(scope="module")
def trained_decoder(root, trained_pair):
    transparency.train(config_of("transparent_decoder"), root / "transparent_decoder", None, 1e9)
    return root / "transparent_decoder"


def test_the_autoencoder_overfits_eight_scenes(trained_autoencoder):
    found = losses(trained_autoencoder)
    print(found)
    assert found[-1] < 0.75 * found[0] and found[-1] < 0.15


def test_the_decoder_goes_on_alone(root, trained_autoencoder, tmp_path):
    shutil.copytree(trained_autoencoder, tmp_path / "autoencoder")
    autoencoder.train(config_of("decoder", **EIGHT["autoencoder"] | {"steps": 4}), tmp_path / "decoder", None, 1e9)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("autoencoder", "decoder"))
    assert all(torch.equal(value, after[key]) == key.startswith("taesd_encoder") for key, value in before.items())
    assert torch.equal(latents.load_autoencoder(tmp_path).taesd_decoder[1].weight, after["taesd_decoder.1.weight"])


def test_a_fresh_autoencoder_carries_a_blurred_picture():
    picture = torch.from_numpy(renderer.render(renderer.Request(train=True), 64, 64, 3).composite).permute(2, 0, 1)[
        None
    ]
    with torch.no_grad():
        latent, decoded = autoencoder.build(config_of("autoencoder"))(picture)
    blurred = torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(picture, 8), scale_factor=8)
    plain = (picture.mean((2, 3), keepdim=True) - picture).square().mean()
    assert (decoded - picture).square().mean() < 0.7 * plain
    assert np.corrcoef(decoded.flatten(), blurred.flatten())[0, 1] > 0.8 and latent.abs().max() < 4


def test_the_denoiser_overfits_eight_scenes(trained_diffusion):
    found = losses(trained_diffusion)
    print(found)
    assert found[0] > 0.3 and found[-1] < 0.16  # of a weighted error that is 0.45 for predicting no noise at all


def test_the_inpainting_denoiser_starts_as_the_one_it_came_from(root, trained_diffusion):
    config = config_of("inpaint")
    start, wide = diffusion.build({**config, "in_channels": 4}), diffusion.build(config)
    for model in (start, wide):
        loop.start_from(model, trained_diffusion / "model.safetensors")
    latent, mask, times, rows = (
        torch.randn(2, 4, 8, 8),
        torch.randn(2, 5, 8, 8),
        torch.tensor([10, 900]),
        text.rows(["a dog", ""]),
    )
    with torch.no_grad():
        assert torch.allclose(
            start(latent, times, rows), wide(torch.cat([latent, mask], 1), times, rows), rtol=0, atol=1e-5
        )
    diffusion.train(config, root / "inpaint", None, 1e9)
    state = load_file(root / "inpaint" / "model.safetensors")
    assert state["model.diffusion_model.input_blocks.0.0.weight"][:, 4:].abs().max() > 0


def test_the_transparency_pair_overfits_eight_objects(trained_pair):
    found = losses(trained_pair, "alpha")
    print(found)
    assert found[0] > 0.15 and found[-1] < 0.11  # nothing but transparency is an error of 0.2


def test_the_transparent_decoder_goes_on_alone(trained_decoder, trained_pair):
    before, after = (load_file(folder / "model.safetensors") for folder in (trained_pair, trained_decoder))
    same = {key for key, value in before.items() if torch.equal(value, after[key])}
    assert {key for key in before if key.startswith("encoder")} <= same
    assert not {key for key in same if key.startswith("decoder") and key.endswith(".weight")}


def test_the_rgba_autoencoder_learns_alpha_and_keeps_the_latents_of_opaque_images(root):
    rgba_autoencoder.train(config_of("rgba_autoencoder"), root / "rgba_autoencoder", None, 1e9)
    found, latent = losses(root / "rgba_autoencoder", "alpha"), losses(root / "rgba_autoencoder", "latent")
    print(found, latent)
    # Every pixel opaque is an error of about 0.5 at the start; latents of about unit deviation hardly move.
    assert found[0] > 0.2 and found[-1] < 0.7 * found[0] and latent[-1] < 0.1
    with torch.no_grad():
        colours, start, image = published.checkpoint()[1], rgba_autoencoder.build(), torch.rand(1, 3, 32, 32)
        latent, decoded = start(rgba_autoencoder.opaque(image))
        assert torch.allclose(latent, colours.encode(image), rtol=0, atol=1e-5)
        assert torch.allclose(decoded[:, :3], colours.decode(latent), rtol=0, atol=1e-5) and (decoded[:, 3] == 1).all()


def test_the_flux_fill_overfits_eight_scenes(root):
    flux_fill.train(config_of("flux_fill"), root / "flux_fill", None, 1e9)
    found = losses(root / "flux_fill", "error")
    print(found)
    assert found[0] > 1.4 and found[-1] < 0.85 * found[0]  # a model that predicts nothing has an error of about 1.9


def test_the_flux_adapter_goes_on_from_bfs_foreground_and_its_file_says_what_it_does(root, tmp_path, monkeypatch):
    """The last four cut-outs of its pool are for validation, so that it learns eight."""
    config = config_of("flux_adapter", learning_rate=3e-3)
    flux_adapter.train(config, root / "flux_adapter", None, 1e9)
    with open(root / "flux_adapter" / "metrics.csv", newline="") as file:
        after = float(list(csv.DictReader(file))[-1]["error 64"])
    state = load_file(root / "flux_adapter" / "model.safetensors")
    assert set(state) == set(flux_adapter.build(config).state_dict()) and all(".lora_" in key for key in state)

    base = fill_base.load({})
    cutouts_ = cutouts.CutOuts(root / "scenes", 12, 64, None, shadows=0.0)
    pool = flux_adapter.CutOutLatents(cutouts_, base.rgba, torch.ones(4, 8, 8))
    batch, words = pool.batch(np.arange(8, 12), 0), base.words([], root)
    assert batch.condition.shape == (4, 68, 8, 8) and (batch.condition[:, 4:] == 1).all()
    assert [bool(given.any()) for given in batch.condition[:, :4]] == [False, True, False, True]
    errors = {}
    for start in (None, flux_adapter.START):
        model = flux_adapter.build({**config, "start": start})
        plain = {**config, "empty_prompt": 0}
        with torch.no_grad():
            errors[start] = flux_fill.loss_of(model, batch, words, plain, np.random.default_rng(0))["error"].item()
    print(errors, after)
    # without an adapter it draws a scene behind every object
    assert after < errors[flux_adapter.START] < errors[None]

    monkeypatch.setattr(settings, "MODELS", tmp_path)
    for path in (published.FLUX_FILL, published.FLUX_ADAPTER):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / published.FLUX_FILL).symlink_to(settings.PACK / "models" / published.FLUX_FILL)
    save_file(flux_adapter.published_form(state), tmp_path / published.FLUX_ADAPTER)
    again = flux_adapter.build({**config, "start": "published"}).state_dict()
    assert all(torch.equal(again[key], state[key]) for key in state)


def test_holes_show_no_shadow_outside_and_their_cells_are_the_boxes(tmp_path):
    pool = flux_fill.FillPool(tmp_path, published.checkpoint()[1], 48, 64)
    batch = pool.batch(np.arange(48), 0)
    kinds = []
    for index in range(48):
        hole = pool.hole(index)
        kinds.append(hole.kind)
        left, top, right, bottom = hole.box
        mask = np.zeros((64, 64), np.float32)
        mask[top:bottom, left:right] = 1
        cells = batch.condition[index, 4:].numpy()
        assert np.array_equal(cells.reshape(8, 8, 8, 8).transpose(2, 0, 3, 1).reshape(64, 64), mask)
        assert np.allclose(batch.weight[index, 0], mask.reshape(8, 8, 8, 8).mean((1, 3)), rtol=0, atol=1e-6)
        if hole.kind != flux_fill.OBJECT:
            assert np.array_equal(hole.image, hole.scene.composite)
            continue
        chosen = next(shown for shown in hole.scene.objects if shown.name == hole.name)
        inner = chosen.box
        assert left <= inner[0] and top <= inner[1] and right >= inner[2] and bottom >= inner[3]
        # Outside the box the image is the scene without that object at all.
        rest = hole.scene.background
        for shown in hole.scene.objects:
            if shown is not chosen:
                rest = renderer.over(shown.rgba, renderer.over(shown.shadow, rest))
        assert np.allclose(hole.image[mask == 0], rest[mask == 0], rtol=0, atol=1e-6)
        words = {pool.words(index, draw) for draw in range(12)}
        assert all(any(known in text for known in renderer.catalogue()[hole.name].prompts) for text in words)
    assert set(kinds) == {flux_fill.OBJECT, flux_fill.BOX, flux_fill.EVERYTHING}
    bare = [i for i in range(48) if kinds[i] == flux_fill.EVERYTHING]
    assert {bool(batch.condition[i, :4].any()) for i in bare} == {True, False}


def test_words_are_the_published_encoders_states_and_its_end(root):
    encoder, _ = published.checkpoint()
    states, pooled = flux_fill.Words(encoder, 24)(["a dog on a beach", "", "a dog on a beach"])
    with torch.no_grad():
        whole = encoder.encode(text.rows(["a dog on a beach", ""]))
    assert torch.allclose(states[:2], whole[:, :24], rtol=0, atol=1e-6) and torch.equal(states[0], states[2])
    # The start, five words and the end; the start and the end.
    assert torch.allclose(pooled[:2], torch.stack([whole[0, 6], whole[1, 1]]), rtol=0, atol=1e-6)


def test_models_published_elsewhere_leave_the_packs_previews(root, trained_autoencoder, tmp_path):
    before = (settings.CONFIGS / "sd.json").read_text()
    try:
        family.publish(root, tmp_path)
        assert (settings.CONFIGS / "sd.json").read_text() == before
    finally:
        (settings.CONFIGS / "sd.json").write_text(before)


def test_the_adapter_trains_nothing_but_its_own_terms_and_publishes_them(root, trained_diffusion, trained_pair):
    adapter.train(config_of("adapter"), root / "adapter", None, 1e9)
    before, after = (load_file(folder / "model.safetensors") for folder in (trained_diffusion, root / "adapter"))
    for key, value in before.items():
        twin = after.get(
            key, after.get(key.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias"))
        )
        assert torch.equal(twin, value), key
    published = published_adapter(after)
    downs = [key for key in published if key.endswith("::lora::1")]
    # Up and down, four projections, two attentions, seven blocks.
    assert len(published) == 2 * len(downs) == 2 * 4 * 2 * 7
    name = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    assert published[f"{name}::lora::0"].shape == (64, 32) and published[f"{name}::lora::1"].shape == (32, 128)
    assert all(published[key].abs().max() > 0 for key in published)
    # the form says what the trained model does: up times down added to the weight gives the same prediction
    config = config_of("adapter")
    merged = diffusion.build({**config, "in_channels": 4})
    state = dict(before)
    for key in downs:
        weight = f"model.{key.removesuffix('::lora::1')}"
        state[weight] = state[weight] + published[key.replace("::lora::1", "::lora::0")] @ published[key]
    merged.load_state_dict(state)
    adapted = adapter.build(config, root)
    adapted.load_state_dict(after)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), text.rows(["a dog", ""])
    with torch.no_grad():
        assert torch.allclose(merged(*inputs), adapted(*inputs), rtol=0, atol=1e-4)
        loop.start_from(merged, trained_diffusion / "model.safetensors")
        assert not torch.allclose(merged(*inputs), adapted(*inputs), rtol=0, atol=1e-3)
    # layers are trained with it on the objects' rows
    found = dreamlayer.build(config_of("dreamlayer", adapter="adapter"), root).unet.get_submodule(
        name.removeprefix("diffusion_model.").removesuffix(".weight")
    )
    assert torch.equal(found.adapter, published[f"{name}::lora::0"] @ published[f"{name}::lora::1"])


def test_layer_modules_learn_nine_scenes_and_nothing_else_changes(root, trained_diffusion, trained_pair, monkeypatch):
    """The last three scenes of the pool are for validation, so that it learns nine: three of one object, three of two,
    three of three.
    """
    config = config_of("dreamlayer")
    trained = dreamlayer.train(config, root / "dreamlayer", None, 1e9)
    pool = dreamlayer.SceneLayers(
        root / "scenes",
        latents.load_autoencoder(root),
        cutouts.load_pair(trained_pair)[0],
        config["scenes"],
        config["side"],
    )

    @torch.no_grad()
    def measured(model, what):
        """The mean over the nine scenes and four draws of noise and timestep."""
        found = [
            dreamlayer.loss_of(
                model,
                pool.batch(np.arange(count, 9, 3), 0),
                {**config, "empty_prompt": 0},
                formulas.noise_levels(),
                np.random.default_rng(draw),
            )[what].item()
            for count in range(3)
            for draw in range(4)
        ]
        return np.mean(found)

    fresh = dreamlayer.build(config, root)
    # 60 steps teach the maps and leave the predicted noise as good as it was
    # The own maps have to follow maps that become alphas: `layout` rises at first, and `loss` with it.
    for what, share in (("error", 1.05), ("context", 0.6)):
        assert measured(trained, what) < share * measured(fresh, what), what
    before, after = (load_file(folder / "model.safetensors") for folder in (trained_diffusion, root / "dreamlayer"))
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    published = layered_denoiser.published_form(after)
    assert all(value.abs().max() > 0 for value in published.values()) and published["layer_embedding"].shape == (4, 128)
    # Two projections of 14 attentions.
    assert all(sum(key.startswith(kind) for key in published) == 2 * 2 * 7 for kind in ("shared.", "foreground."))
    assert published["foreground.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_v.weight"].shape == (
        192,
        192,
    )


def test_the_second_run_of_layer_modules_goes_on_from_the_first_with_noise_of_each_layers_own(
    root, trained_diffusion, trained_pair
):
    torch.manual_seed(0)
    first, folder = dreamlayer.build(config_of("dreamlayer"), root), root / "dreamlayer_before"
    learnt = {name: torch.randn_like(value) for name, value in first.named_parameters() if value.requires_grad}
    folder.mkdir()
    save_file(
        first.state_dict()
        | learnt
        | {
            name: torch.full_like(value, torch.nan)
            for name, value in first.state_dict().items()
            if name.endswith("adapter")
        },
        folder / "model.safetensors",
    )
    config = config_of("dreamlayer_apart", adapter=None, start="dreamlayer_before")
    model = dreamlayer.build(config, root)
    assert all(torch.equal(value, learnt[name]) for name, value in model.named_parameters() if value.requires_grad)
    assert not any(value.isnan().any() for value in model.state_dict().values()), (
        "the adapter is the config's, not the first run's"
    )

    pool = dreamlayer.SceneLayers(
        root / "scenes", latents.load_autoencoder(root), cutouts.load_pair(trained_pair)[0], 72, 64
    )
    levels, batch, given = formulas.noise_levels(), pool.batch(np.array([1, 4]), 0), []
    model.register_forward_pre_hook(lambda _, inputs: given.append(inputs))
    found = {
        weight: dreamlayer.loss_of(
            model,
            batch,
            config | {"early_weight": weight, "context_weight": 0, "layout_weight": 0},
            levels,
            np.random.default_rng(0),
        )["loss"].item()
        for weight in (1.0, 10.0)
    }
    latent, timesteps = given[0][:2]
    level = levels[timesteps].view(-1, 1, 1, 1, 1)
    noise = ((latent - level.sqrt() * batch.latent) / (1 - level).sqrt()).flatten(2)
    assert (
        noise @ noise.transpose(1, 2) / noise.shape[-1] - 0.5 - 0.5 * torch.eye(4)
    ).abs().max() < 0.2  # 256 numbers a layer
    assert (timesteps > 700).any() and found[1.0] < found[10.0] < 10 * found[1.0]


def test_scenes_come_as_layers_with_their_alphas_and_words(root, trained_pair):
    model, (encoder, _) = latents.load_autoencoder(root), cutouts.load_pair(trained_pair)
    pool = dreamlayer.SceneLayers(root / "scenes", model, encoder, 72, 64)
    batch = pool.batch(np.array([4, 1]), 0)
    assert batch.latent.shape == (2, 4, 4, 8, 8) and batch.alphas.shape == (2, 2, 8, 8)
    scene = renderer.render(pool.request(4), 64, 64, 4)
    with torch.no_grad():
        for place, picture in ((0, scene.background), (3, scene.composite)):
            assert torch.allclose(
                batch.latent[0, place],
                model.encode(torch.from_numpy(picture).permute(2, 0, 1)[None])[0],
                rtol=0,
                atol=5e-3,
            )
    for number, shown in enumerate(scene.objects):
        assert np.allclose(
            batch.alphas[0, number], shown.rgba[..., 3].reshape(8, 8, 8, 8).mean((1, 3)), rtol=0, atol=1e-3
        )
        assert batch.prompts[0][1 + number] in renderer.catalogue()[shown.name].prompts
    assert any(batch.prompts[0][0].endswith(where) for where in renderer.PLACE_WORDS[scene.kind])
    config, rng = config_of("dreamlayer", shares=[[1, 0, 0], [0, 0.5, 0.5]]), np.random.default_rng(0)
    first, last = ([dreamlayer.object_count(step, config, rng) for _ in range(200)] for step in (0, config["steps"]))
    assert set(first) == {1} and set(last) == {2, 3} and 70 < last.count(2) < 130


@pytest.mark.parametrize("name", ["diffusion", "transparency", "dreamlayer"])
def test_a_stopped_run_goes_on_to_the_same_losses(name, root, trained_autoencoder, request, monkeypatch):
    if name == "dreamlayer":
        request.getfixturevalue("trained_diffusion"), request.getfixturevalue("trained_pair")
    config = config_of(name, steps=4, **({"rows": 4} if name == "dreamlayer" else {"batch": 2}))
    modules = {
        "diffusion": (diffusion, "loss_of"),
        "transparency": (transparency, "losses"),
        "dreamlayer": (dreamlayer, "loss_of"),
    }
    module, function = modules[name]
    recorded, plain = [], getattr(module, function)

    def watched(*arguments):
        terms = plain(*arguments)
        if terms["loss"].requires_grad:
            recorded.append(terms["loss"].item())
        return terms

    monkeypatch.setattr(module, function, watched)
    module.train(config, root / f"{name}_whole", None, 1e9)
    uninterrupted = recorded.copy()
    recorded.clear()
    for minutes in (0, 0, None):  # no time: one step, then a checkpoint
        module.train(config, root / f"{name}_parts", minutes, 1e9)
    assert len(recorded) == 4 and recorded == pytest.approx(uninterrupted, rel=1e-4)


@pytest.fixture
def fresh_accelerator():
    """accelerate keeps the first precision of a process."""
    yield AcceleratorState._reset_state
    AcceleratorState._reset_state(reset_partial_state=True)


def test_bf16_is_used_in_what_learns_and_nowhere_else(trained_autoencoder, tmp_path, monkeypatch, fresh_accelerator):
    """As on a GPU; a processor without bf16 instructions emulates it."""
    config, recorded, kept = config_of("diffusion", steps=2, batch=2), [], []
    monkeypatch.setattr(
        diffusion,
        "loss_of",
        lambda *given, plain=diffusion.loss_of: (terms := plain(*given), recorded.append(terms["loss"].item()))[0],
    )
    for fast in (True, False):
        fresh_accelerator(reset_partial_state=True)
        monkeypatch.setattr(loop, "has_fast_bf16", lambda fast=fast: fast)
        root = tmp_path / str(fast)
        shutil.copytree(trained_autoencoder, root / "autoencoder")
        model = diffusion.train(config, root / "diffusion", None, 1e9)
        plain = diffusion.build(config).eval()
        plain.load_state_dict(load_file(root / "diffusion" / "model.safetensors"))
        given = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), text.rows(["a dog", ""])
        with torch.no_grad():
            assert torch.equal(model(*given), plain(*given))
        kept.append({path.name: path.read_bytes() for path in (root / "scenes").glob("latents-*")})
    assert kept[0] and kept[0] == kept[1]
    half, exact = recorded[: len(recorded) // 2], recorded[len(recorded) // 2 :]
    assert half != exact and half == pytest.approx(exact, rel=0.02)


def test_publishing_writes_what_is_trained_and_names_what_is_not(
    root, trained_diffusion, trained_decoder, tmp_path, monkeypatch, capsys
):
    shutil.copy(settings.CONFIGS / "sd.json", tmp_path / "sd.json")
    monkeypatch.setattr(settings, "CONFIGS", tmp_path)
    family.publish(root, tmp_path / "models")
    assert (
        "strata/mini_classifier.safetensors: not written, python -m training classifier has not run"
        in capsys.readouterr().out
    )
    state = load_file(tmp_path / "models" / "checkpoints" / "strata_mini_sd.safetensors")
    assert state["first_stage_model.vae_scale"] == 1 and state["cond_stage_model.token_ids"][0] == -1
    trained = load_file(trained_diffusion / "model.safetensors")
    for key, value in trained.items():
        fp8 = key.startswith(family.UNET) and value.ndim > 1  # three bits of mantissa, and steps of 2 ** -9 near 0
        assert (state[key].dtype == torch.float8_e4m3fn) == fp8, key
        assert torch.allclose(state[key].float(), value, atol=2**-10 if fp8 else 1e-3, rtol=2**-4 if fp8 else 1e-3), key
    pair = load_file(tmp_path / "models" / "layer_model" / "strata_mini_transparent_decoder.safetensors")
    assert pair["latent_conv_in.weight"].shape == (32, 4, 1, 1)


def test_latents_are_encoded_once_and_prompts_follow_the_scene(root, trained_autoencoder, tmp_path):
    model = latents.load_autoencoder(trained_autoencoder.parent)
    pool = latents.LatentPool(tmp_path, model, 80, 64)
    batch = pool.batch(np.array([8, 9, 10, 10]), 0)
    assert "empty place" in batch.prompts[0] and "plain gray background" in batch.prompts[1]
    with torch.no_grad():
        expected = model.encode(
            torch.from_numpy(renderer.render(pool.request(10), 64, 64, 10).composite).permute(2, 0, 1)[None]
        )
    assert torch.allclose(batch.latent[2], expected[0], rtol=0, atol=5e-3) and torch.equal(
        batch.latent[2], batch.latent[3]
    )
    again = latents.LatentPool(tmp_path, model, 80, 64)
    assert again.values[10].any() and not again.values[11].any()
    other = Autoencoder()
    assert not latents.LatentPool(tmp_path, other, 80, 64).values[10].any()
    words = {pool.words(10, draw) for draw in range(20)}
    shown = renderer.render(pool.request(10), 64, 64, 10).objects
    assert len(words) > 3
    assert all(any(p in text for p in renderer.catalogue()[o.name].prompts) for text in words for o in shown)


def test_holes_cover_the_object_that_the_prompt_names(trained_autoencoder, tmp_path):
    pool = latents.LatentPool(tmp_path, latents.load_autoencoder(trained_autoencoder.parent), 40, 64, inpaint=True)
    batch = pool.batch(np.arange(16), 0)
    mask = batch.condition[:, 0]
    assert set(mask.unique().tolist()) <= {0.0, 1.0} and (mask.sum((1, 2)) > 0).all()
    named = 0
    for index in range(16):
        chosen, hole = pool.hole(index)
        assert np.array_equal(hole, mask[index].numpy())
        if chosen >= 0:
            named += 1
            entry = list(renderer.catalogue().values())[chosen]
            shown = next(o for o in renderer.render(pool.request(index), 64, 64, index).objects if o.name == entry.name)
            left, top, right, bottom = shown.box
            assert hole.repeat(8, 0).repeat(8, 1)[top:bottom, left:right].all()
    assert named > 5


def test_unknown_words_share_one_row_and_the_end_fills_up():
    rows = text.rows(["a dog zzyzx", "a dog"])
    assert rows.shape == (2, 77) and (rows[0] == 0).any() and not (rows[1] == 0).any()
    assert rows[1, 3] == rows[1, -1] == len(text.token_ids()) - 1 and rows[1, 0] == len(text.token_ids()) - 2
    hidden = text.with_unknown(rows, 1.0, np.random.default_rng(0))
    assert (
        (hidden[:, 1:3] == 0).all() and torch.equal(hidden[:, 0], rows[:, 0]) and (hidden[1, 3:] == rows[1, 3:]).all()
    )


def test_a_missing_model_is_named_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(settings.TrainingError, match="train the autoencoder first"):
        diffusion.train(config_of("diffusion"), tmp_path / "diffusion", None, 1e9)
    with pytest.raises(settings.TrainingError, match="python -m training transparency"):
        cutouts.load_pair(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(settings.TrainingError, match="missing; train that model first"):
        loop.start_from(torch.nn.Linear(1, 1), tmp_path / "model.safetensors")
    with pytest.raises(settings.TrainingError, match="python -m training adapter, or set adapter to null"):
        dreamlayer.adapter_terms(tmp_path)
