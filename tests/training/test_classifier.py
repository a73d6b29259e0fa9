"""The classifier's trainer: it learns, goes on where it stopped, and writes a file that judges as the trained model
does.
"""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from strata.networks.classifier import Classifier
from strata.scenes import renderer
from strata.scenes.renderer import Request
from strata.techniques import metrics
from strata.training import classifier, command, export, family, oracle, settings

SMALL = {"scenes": 6, "extra_scenes": 2, "check_scenes": 4, "batch": 8, "warmup": 10}


def config(**changes):
    return command.read_config(settings.CONFIGS / "classifier.json", []) | SMALL | changes


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run that overfits eight scenes, and its model."""
    folder = tmp_path_factory.mktemp("training") / "classifier"
    return folder, classifier.train(config(steps=60), folder, None, 1e9)


def test_it_overfits_eight_scenes(run):
    rows = (run[0] / "loss.csv").read_text().splitlines()
    losses = [float(row.split(",")[2]) for row in rows[1:]]
    print("losses:", losses)
    assert losses[0] > 4 and losses[-1] < 0.2


def test_it_goes_on_to_the_same_losses_after_a_stop(tmp_path, monkeypatch):
    recorded, losses = [], classifier.losses

    def watched(*arguments):
        terms = losses(*arguments)
        recorded.append(terms["loss"].item())
        return terms

    monkeypatch.setattr(classifier, "losses", watched)
    classifier.train(config(steps=6), tmp_path / "whole", None, 1e9)
    uninterrupted = recorded.copy()
    recorded.clear()
    for minutes in (0, 0, None):  # no time: one step, then a checkpoint
        classifier.train(config(steps=6), tmp_path / "parts", minutes, 1e9)
    assert len(recorded) == 6 and recorded == pytest.approx(uninterrupted, rel=1e-5)


def test_a_batch_is_a_function_of_its_numbers_and_its_labels_are_the_scenes(tmp_path):
    pool, settings = classifier.Mixture(tmp_path, config()), config(batch=40)
    image, places, objects = pool.batch(settings, 3, 0)
    again = classifier.Mixture(tmp_path, config()).batch(settings, 3, 0)
    assert all(torch.equal(a, b) for a, b in zip((image, places, objects), again, strict=True))
    assert not torch.equal(image, pool.batch(settings, 4, 0)[0]) and not torch.equal(
        image, pool.batch(settings, 3, 1)[0]
    )
    assert image.shape == (40, 3, 128, 128) and image.min() >= 0 and image.max() <= 1
    names = list(renderer.catalogue())
    known = {
        (kind if not plain else None, frozenset(shown))
        for part in pool.pools
        for i in range(part.count)
        for kind, shown in [part.content(i)]
        for plain in [isinstance(part, classifier.Extra) and i % 2]
    }
    for where, row in zip(places, objects, strict=True):
        assert (
            None if where == classifier.PLAIN else renderer.KINDS[where],
            frozenset(names[i] for i in row.nonzero()[:, 0]),
        ) in known


def test_a_disturbed_picture_is_still_the_picture():
    image = torch.from_numpy(
        np.stack([renderer.render(Request(), 128, 128, seed).composite for seed in range(8)])
    ).permute(0, 3, 1, 2)
    disturbed = classifier.disturb(image, np.random.default_rng(0))
    assert 0.01 < (disturbed - image).abs().mean() < 0.15
    assert metrics.ssim(disturbed[4:], image[4:]).mean() > 0.4


def test_the_published_file_judges_as_the_trained_model(run, tmp_path):
    folder, model = run
    family.publish(folder.parent, tmp_path)
    path = tmp_path / "strata" / oracle.FILE.name
    with safe_open(path, "pt") as file:
        about = file.metadata()
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118
    assert set(about) >= {"command", "config", "data", "steps", "metrics", "licence"} and about["steps"] == "60"
    assert json.loads(about["places"]) == list(renderer.KINDS) and json.loads(about["objects"]) == list(
        renderer.catalogue()
    )
    judge, image = oracle.load(path), torch.rand(3, 3, 128, 128)
    with torch.no_grad():
        for got, expected in zip(judge.logits(image), model(image), strict=True):
            assert torch.allclose(got, expected, rtol=0, atol=0.05)


def test_save_refuses_what_fp16_cannot_hold(tmp_path):
    with pytest.raises(settings.TrainingError, match="too large for the fp16"):
        export.save(tmp_path / "a.safetensors", {"weight": torch.tensor([1e6])}, {})
    assert list(tmp_path.iterdir()) == []


def test_save_leaves_an_equal_file_alone_and_replaces_another(tmp_path):
    path, words = tmp_path / "a.safetensors", {str(i): "word" for i in range(20)}
    export.save(path, {"weight": torch.ones(3)}, words)
    before = path.stat().st_ino
    export.save(path, {"weight": torch.ones(3)}, words)
    assert path.stat().st_ino == before
    for state, metadata in (({"weight": torch.zeros(3)}, words), ({"weight": torch.zeros(3)}, {"0": "other"})):
        export.save(path, state, metadata)
        assert path.stat().st_ino != before
        before = path.stat().st_ino


def test_load_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m training classifier"):
        oracle.load(tmp_path / "none.safetensors")
    export.save(tmp_path / "other.safetensors", {"weight": torch.ones(1)}, {"licence": "none"})
    with pytest.raises(ValueError, match="not a file of this classifier"):
        oracle.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize("size", [(64, 64), (128, 128), (256, 256), (96, 200)])
def test_the_classifier_takes_pictures_of_any_size(size):
    model = Classifier(10, 60, [8, 12], 16).eval()
    with torch.no_grad():
        places, objects = model(torch.rand(2, 3, *size))
        assert places.shape == (2, 10) and objects.shape == (2, 60)
        flat = torch.full((1, 3, 128, 128), 0.3)  # the size of a picture without edges changes nothing
        assert torch.allclose(
            model.features(flat), model.features(flat[:, :, :1, :1].expand(1, 3, size[0], size[0])), rtol=0, atol=1e-4
        )


def test_a_file_does_not_tell_the_folders_of_the_machine_that_trained_it(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss\n7,0.5\n")
    config = {"base": str(tmp_path / "base.safetensors"), "foregrounds": str(tmp_path / "cut outs"), "side": 64}
    told = export.describe("layeringdiff", tmp_path, config, "pairs")
    assert json.loads(told["config"]) == {"base": "base.safetensors", "foregrounds": "cut outs", "side": 64}
    assert str(tmp_path) not in json.dumps(told) and told["steps"] == "7"
