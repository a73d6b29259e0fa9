"""BFS's shadow network and the triplets made with it: it starts as the Flux-Fill that it is made of, learns eight
objects, goes on after a stop, and its triplets are layers that add up, from scenes and from a user's folders.
"""

import csv

import numpy as np
import pytest
import torch
from PIL import Image
from strata.networks import flux
from strata.scenes import renderer
from strata.techniques import layering
from strata.training import command, published, settings, shadow, triplets
from strata.training.flux_fill import Words

from ..patches import tiny_detectors

SMALL = {"scenes": 12, "batch": 4, "side": 64, "warmup": 2, "rank": 4}
QUICK = ["--set", "side=64", "--set", "sampling_steps=2"]


def config_of(name: str, **changes) -> dict:
    return command.read_config(settings.CONFIGS / f"{name}.json", []) | changes


@pytest.fixture(scope="module", autouse=True)
def little_validation():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shadow, "CHECK", 4)
        patch.setattr(shadow, "SHOWN", 2)
        patch.setenv("MALLOC_MMAP_MAX_", "0")  # else this process would keep all memory that it frees
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The folder of a network that has seen eight objects."""
    folder = tmp_path_factory.mktemp("training")
    shadow.train(config_of("shadow", **SMALL, steps=40), folder / "shadow", None, 1e9)
    return folder


@torch.no_grad()
def test_it_starts_as_the_flux_fill_that_it_is_made_of():
    model = shadow.build(config_of("shadow"))
    base = flux.build(settings.family()["flux"]).eval()
    base.load_state_dict(flux.diffusers_form(published.read(settings.MODELS / published.FLUX_FILL)[0]))
    noisy, image, plain = torch.randn(3, 2, 4, 4, 4)
    alpha, sigma = torch.rand(2, 1, 32, 32), torch.tensor([0.3, 0.9])
    words = Words(published.checkpoint()[0], settings.family()["flux_tokens"])(["", ""])
    expected = flux.predict(base, noisy, torch.cat([image, torch.zeros(2, 64, 4, 4)], 1), sigma, *words)
    found = model(noisy, shadow.condition_of(image, plain, alpha), sigma)
    assert expected.std() > 0.1 and torch.allclose(found, expected, rtol=0, atol=1e-5)
    learns = {name for name, value in model.named_parameters() if value.requires_grad}
    assert {name for name in learns if ".lora_" not in name} == {
        "transformer.x_embedder.weight",
        "transformer.x_embedder.bias",
    }
    assert len(learns) == 2 + 2 * (2 * 12 + 6 * 5)
    model.transformer.x_embedder.weight[:, 72 * 4 :].normal_()
    assert not torch.allclose(model(noisy, shadow.condition_of(image, plain, alpha), sigma), expected, atol=1e-2)


def test_objects_stand_on_white_and_their_shadow_darkens_it(tmp_path):
    pool = shadow.Objects(tmp_path, published.checkpoint()[1], SMALL["scenes"], SMALL["side"])
    for index in range(4):
        shown = pool.object(index)
        plain, shadowed = shadow.on_white(shown)
        alone = shown.rgba[..., 3] == 0
        assert (plain[alone] == 1).all()
        gray = np.repeat(1 - shown.shadow[..., 3:], 3, -1)
        assert np.allclose(shadowed[alone], gray[alone], rtol=0, atol=1e-6)
        solid = shown.rgba[..., 3] == 1
        assert np.array_equal(plain[solid], shadowed[solid])
    batch, again = pool.batch(np.arange(3)), pool.batch(np.arange(3))
    assert torch.equal(batch.shadowed, again.shadowed) and not torch.equal(batch.plain, batch.shadowed)
    assert np.abs(batch.alpha[0, 0].numpy() - pool.object(0).rgba[..., 3]).max() <= 0.5 / 255 + 1e-6


@torch.no_grad()
def test_samples_of_a_perfect_model_are_the_shadowed_image_whatever_the_batch():
    clean, plain, alpha = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4), torch.rand(2, 1, 32, 32)

    class Perfect(torch.nn.Linear):
        def forward(self, noisy, condition, sigma):
            wanted = clean[: len(noisy)] if len(noisy) > 1 else clean[1:]
            return (noisy - wanted) / sigma.view(-1, 1, 1, 1)

    found = shadow.sample(Perfect(1, 1), plain, alpha, 4, [5, 6])
    assert torch.allclose(found, clean, rtol=0, atol=1e-5)
    model = shadow.build(config_of("shadow")).eval()
    both = shadow.sample(model, plain, alpha, 2, [5, 6])
    assert torch.allclose(both[1:], shadow.sample(model, plain[1:], alpha[1:], 2, [6]), rtol=0, atol=1e-4)


@torch.no_grad()
def test_it_learns_eight_objects(root):
    config = config_of("shadow", **SMALL)
    batch = shadow.Objects(root / "scenes", published.checkpoint()[1], SMALL["scenes"], SMALL["side"]).batch(
        np.arange(8)
    )
    before, after = (
        shadow.loss_of(model, batch, config, np.random.default_rng(3))["loss"].item()
        for model in (shadow.build(config), shadow.load(root / "shadow"))
    )
    assert after < 0.7 * before, (before, after)
    assert (root / "shadow" / "grid.png").exists()


def test_the_command_goes_on_after_a_stop(tmp_path, capsys):
    sets = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
    arguments = ["shadow", "--folder", str(tmp_path / "shadow"), *sets, "--set", "steps=2"]
    assert command.main([*arguments, "--minutes", "0"]) == 0
    first = torch.load(tmp_path / "shadow" / "last" / "custom_checkpoint_1.pkl", weights_only=True)
    assert command.main(arguments) == 0
    assert first == {"step": 1} and "Going on from step 1." in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "shadow" / "metrics.csv").open()))
    assert [row["step"] for row in rows] == ["1", "2"]


def layers(folder, name):
    """Of a triplet: foreground, background and composite in 0..1, and the caption."""
    images = [np.asarray(Image.open(folder / kind / f"{name}.png"), np.float64) / 255 for kind in triplets.WRITTEN]
    caption = folder / "foregrounds" / f"{name}.txt"
    return *images, caption.read_text() if caption.exists() else None


def test_triplets_of_rendered_scenes_add_up_and_are_measured(root, capsys):
    folder = root / "triplets"
    arguments = ["triplets", "--folder", str(folder), *QUICK, "--set", "count=4"]
    assert command.main([*arguments, "--minutes", "0"]) == 0  # nothing yet
    assert command.main(arguments) == 0
    assert "4 triplets, 0 dropped" in capsys.readouterr().out
    rows = list(csv.DictReader((folder / "triplets.csv").open()))
    assert command.main(arguments) == 0 and rows == list(csv.DictReader((folder / "triplets.csv").open()))
    differences = []
    for row in rows:
        front, behind, composite, caption = layers(folder, row["name"])
        alpha = front[..., 3:]
        assert np.abs(alpha * front[..., :3] + (1 - alpha) * behind - composite).max() < 2.5 / 255
        scene = renderer.render(renderer.Request(train=True, count=1), 64, 64, int(row["name"]))
        assert caption == scene.objects[0].prompt
        assert np.abs(behind - scene.background).max() <= 0.5 / 255 + 1e-6
        error = np.abs(alpha - scene.objects[0].rgba_with_shadow[..., 3:]).mean()
        assert float(row["with shadow"]) == pytest.approx(error, abs=1e-3)
        solid = (scene.objects[0].rgba[..., 3] == 1) & (alpha[..., 0] == 1)
        differences += [*np.abs(front[solid][:, :3] - scene.composite[solid]).max(-1)]
    assert len(differences) > 100 and np.mean(differences) < 0.02, "the object keeps its own pixels"


@pytest.fixture
def own(tmp_path):
    """A user's folders with images of other sizes than 64 pixels; the third's mask is empty, the last has none."""
    for number in range(4):
        scene = renderer.render(renderer.Request(train=True, count=1), 96, 120, number)
        images = scene.composite, scene.background, scene.objects[0].mask * (number < 2)
        for kind, image in list(zip(triplets.FOLDERS, images, strict=True))[: 3 - number // 3]:
            (tmp_path / kind).mkdir(exist_ok=True)
            Image.fromarray((image * 255).round().astype(np.uint8)).save(tmp_path / kind / f"image_{number}.png")
    (tmp_path / "composites" / "image_0.txt").write_text("a thing\n")
    return tmp_path


def given(folder, **others):
    options = {kind: folder / kind for kind in triplets.FOLDERS} | others
    return [word for name, path in options.items() for word in (f"--{name}", str(path))]


def test_triplets_of_a_user_s_folders(root, own, capsys):
    arguments = ["triplets", "--folder", str(own / "made"), *QUICK]
    assert command.main([*arguments, *given(own, shadow=root / "shadow")]) == 0
    rows = list(csv.DictReader((own / "made" / "triplets.csv").open()))
    assert [(row["name"], row["kept"], row["with shadow"]) for row in rows] == [
        (f"image_{number}", str(int(number < 2)), "") for number in range(3)
    ]
    assert "2 triplets, 1 dropped" in capsys.readouterr().out
    front, behind, composite, caption = layers(own / "made", "image_0")
    assert front.shape == (64, 64, 4) and behind.shape == composite.shape == (64, 64, 3) and caption == "a thing"
    assert layers(own / "made", "image_1")[-1] is None
    paths = {kind: own / kind for kind in triplets.FOLDERS}
    scene = triplets.Folders(config_of("triplets", side=64, **paths))["image_0"]
    assert scene.mask.unique().tolist() == [0, 1]
    inside = scene.mask[0].bool().numpy()
    assert front[..., 3][inside].mean() > 0.9, "the object lies where its mask is"


def test_a_segmenter_s_mask_counts_and_one_that_lies_elsewhere_is_dropped(root, own, capsys):
    """Of random weights: its masks are nothing like the object."""
    model = tiny_detectors.sam2(own / "sam2")
    arguments = ["triplets", "--folder", str(own / "made"), *QUICK]
    assert command.main([*arguments, *given(own, shadow=root / "shadow", segmenter=model)]) == 0
    assert "0 triplets, 3 dropped" in capsys.readouterr().out
    assert not list((own / "made" / "foregrounds").iterdir())
    find, mask = triplets.segmenter(model), torch.zeros(1, 48, 64)
    mask[:, 10:20, 30:50] = 1
    found = find(torch.rand(3, 48, 64), mask)
    assert found.shape == mask.shape and set(found.unique().tolist()) <= {0.0, 1.0}


def refused(arguments) -> str:
    with pytest.raises(SystemExit) as error:
        command.main(arguments)
    return str(error.value)


def test_what_is_wrong_is_said_in_one_sentence(own, root, tmp_path):
    arguments = ["triplets", "--folder", str(own / "made")]
    assert "has no model; train it first: python -m training shadow" in refused(arguments)
    nowhere = own / "nowhere"
    assert f"--masks: {nowhere} has no PNG, WebP or JPEG files" in refused([*arguments, *given(own, masks=nowhere)])
    assert "--masks is missing" in refused([*arguments, *given(own)[:4]])
    assert f"--segmenter: {nowhere} cannot be loaded" in refused([*arguments, *given(own, segmenter=nowhere)])
    (own / "masks" / "image_1.png").write_bytes(b"no image")
    assert "image_1.png cannot be read" in refused([*arguments, *given(own)])
    Image.new("L", (5, 5)).save(own / "masks" / "image_1.png")
    assert "images of one name need one size" in refused([*arguments, *given(own)])
    nowhere.mkdir()
    Image.new("L", (5, 5)).save(nowhere / "other.png")
    assert "of the same name; name the files alike" in refused([*arguments, *given(own, masks=nowhere)])


def test_a_layer_of_the_true_shadow_gives_the_true_opacity(monkeypatch):
    """With a perfect shadow network, and an autoencoder that darkens everything a little."""
    source = triplets.Rendered(7, 3, 64)
    for name in source.names:
        scene = source[name]
        alpha, both = scene.truth
        shown = renderer.render(renderer.Request(train=True, count=1), 64, 64, int(name)).objects[0]
        colour, shadowed = (
            torch.from_numpy(part).permute(2, 0, 1) for part in (shown.rgba[..., :3], shadow.on_white(shown)[1])
        )
        monkeypatch.setattr(shadow, "sample", lambda *given, drawn=shadowed: drawn[None])

        class Darker:
            encode, decode = staticmethod(lambda image: image), staticmethod(lambda latent: latent - 0.03)

        found, opacity = triplets.with_shadow(colour, alpha, None, Darker(), 1, 0)
        faint = (both <= 10 / 255) & (opacity == 0)
        assert torch.allclose(torch.where(faint, 0, opacity), torch.where(faint, 0, both), rtol=0, atol=1e-5)
        composite = layering.composite(found, scene.background, opacity)
        expected = renderer.over(shown.rgba, scene.background.permute(1, 2, 0).numpy() * (1 - shown.shadow[..., 3:]))
        assert np.abs(composite.permute(1, 2, 0).numpy() - expected).max() < 10.5 / 255
