"""tools/evaluate.py: each judge gives what the field's own library gives with the same random weights, and the figures
of rendered scenes are those computed another way. What is missing or wrong is told.
"""

import json
import math
import os
from pathlib import Path

import evaluate
import judges
import measures
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from strata.formats import files
from strata.scenes import renderer
from strata.techniques.compositing import flatten_image
from strata.techniques.layers import Layer, LayerStack
from torch import nn

from . import tiny_detectors

SIDE = 64


def pictures(count, seed, side=48):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)).mul(255).round() / 255


def lists(images):
    return [Image.fromarray(one) for one in images.mul(255).round().to(torch.uint8).movedim(1, -1).numpy()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """models/evaluate with random weights in the files' own forms, CLIP and DINO tiny."""
    root = tmp_path_factory.mktemp("evaluate")
    torch.manual_seed(5)
    names = {name: root / entry["file"] for name, entry in judges.CONFIG.items() if name != "folder"}
    clip = transformers.CLIPConfig(
        text_config={"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        projection_dim=16,
    )
    transformers.CLIPModel(clip).save_pretrained(names["clip"])
    tokenizer = transformers.CLIPTokenizer.from_pretrained(Path(os.environ["STRATA_HOST"]) / "comfy" / "sd1_tokenizer")
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(names["clip"])
    dino = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    transformers.Dinov2Model(dino).save_pretrained(names["dino"])
    transformers.BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(
        names["dino"]
    )
    widths = [16, 8, 4, 1]
    mlp = nn.ModuleDict({"layers": nn.Sequential(*(nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)))})
    torch.save(mlp.state_dict(), names["aesthetic"])
    return root


def test_clip_score_is_what_clips_own_logits_say(folder):
    path = folder / judges.CONFIG["clip"]["file"]
    model, processor = (kind.from_pretrained(path) for kind in (transformers.CLIPModel, transformers.CLIPProcessor))
    words = ["a red apple", "a dog on the meadow", "nothing"]
    images = pictures(3, 1)
    with torch.no_grad():
        given = processor(text=words, images=lists(images), return_tensors="pt", padding=True)
        logits = model(**given).logits_per_image
    wanted = (100 * logits.diag() / model.logit_scale.exp()).detach().clamp_min(0)
    torch.testing.assert_close(judges.clip_score(folder)(images, words), wanted, rtol=1e-4, atol=1e-4)
    assert wanted.max() > 0.1


def test_dino_likeness_is_the_cosine_of_the_class_tokens_of_transformers_pipeline(folder):
    pipeline = transformers.pipeline("image-feature-extraction", model=str(folder / judges.CONFIG["dino"]["file"]))
    one, other = pictures(2, 2), pictures(2, 3)
    tokens = [np.array([np.array(found)[0, 0] for found in pipeline(lists(images))]) for images in (one, other)]
    wanted = (tokens[0] * tokens[1]).sum(1) / np.linalg.norm(tokens[0], axis=1) / np.linalg.norm(tokens[1], axis=1)
    np.testing.assert_allclose(judges.dino(folder)(one, other), wanted, atol=1e-5)
    assert np.ptp(wanted) > 1e-4


def test_lpips_is_the_authors_package(folder, tmp_path):
    import lpips
    import torchvision

    torch.manual_seed(1)
    weights = torchvision.models.alexnet(weights=None).state_dict()
    torch.save(weights, tmp_path / judges.CONFIG["alexnet"]["file"])
    library = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    convolutions = [part for part in library.net.modules() if isinstance(part, nn.Conv2d)]
    for layer, number in zip(convolutions, (0, 3, 6, 8, 10), strict=True):
        layer.load_state_dict({name: weights[f"features.{number}.{name}"] for name in ("weight", "bias")})
    one, other = pictures(2, 4, 80), pictures(2, 5, 80)
    with torch.no_grad():
        wanted = library(one, other, normalize=True).flatten()
    torch.testing.assert_close(judges.lpips(tmp_path)(one, other), wanted, rtol=1e-5, atol=1e-7)


def test_fid_and_kid_are_torch_fidelitys_own(tmp_path):
    import torch_fidelity
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unread(FeatureExtractorInceptionV3):  # the library makes none without a file
        def load_state_dict(self, *_):
            pass

    path = tmp_path / judges.CONFIG["inception"]["file"]
    torch.manual_seed(2)
    torch.save({}, path)
    network = Unread("random", ["2048"], feature_extractor_weights_path=str(path))
    torch.save(network.state_dict(), path)
    sets = [judges.to_bytes(pictures(4, seed, 40)) for seed in (6, 7)]
    library = torch_fidelity.calculate_metrics(
        input1=_Set(sets[0]),
        input2=_Set(sets[1]),
        fid=True,
        kid=True,
        kid_subset_size=4,
        kid_subsets=1,
        cuda=False,
        verbose=False,
        cache=False,
        save_cpu_ram=True,
        feature_extractor_weights_path=str(path),
    )
    samples = [[measures.Sample(str(i), one) for i, one in enumerate(images / 255)] for images in sets]
    table = measures.measure(*samples, {}, {"features": judges.inception(tmp_path)})
    found = {name: columns["composite"][0] for name, columns in table.values.items() if name[:3] in ("FID", "KID")}
    assert set(found) == {"FID (64)", "FID (2048)", "KID (64)", "KID (2048)"}
    assert found["FID (2048)"] == pytest.approx(library["frechet_inception_distance"], rel=1e-3)
    assert found["KID (2048)"] == pytest.approx(library["kernel_inception_distance_mean"], rel=1e-3, abs=1e-6)


class _Set(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


def test_aesthetic_score_is_the_linear_layers_on_clips_vector(folder):
    layers = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4), nn.Linear(4, 1))
    state = torch.load(folder / judges.CONFIG["aesthetic"]["file"])
    layers.load_state_dict({key.removeprefix("layers."): value for key, value in state.items()})
    clip = transformers.CLIPModel.from_pretrained(folder / judges.CONFIG["clip"]["file"])
    processor = transformers.CLIPProcessor.from_pretrained(folder / judges.CONFIG["clip"]["file"])
    images = pictures(2, 8)
    with torch.no_grad():
        given = processor(text=["x"], images=lists(images), return_tensors="pt")
        wanted = layers(clip(**given).image_embeds).flatten()
    torch.testing.assert_close(judges.aesthetic(folder)(images), wanted, rtol=1e-4, atol=1e-5)


def test_what_is_missing_is_told_with_file_and_address(tmp_path):
    found = judges.available(tmp_path)
    assert all(isinstance(judge, judges.Missing) for judge in found.values())
    for judge, name in zip(found.values(), ("inception", "clip", "dino", "alexnet", "aesthetic"), strict=True):
        assert str(tmp_path / judges.CONFIG[name]["file"]) in str(judge) and judges.CONFIG[name]["url"] in str(judge)
    (tmp_path / judges.CONFIG["aesthetic"]["file"]).write_bytes(b"not a pickle")
    with pytest.raises(judges.Missing, match="not a file of weights alone"):
        judges.aesthetic(tmp_path)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """(folder of results, folder of truth, scenes): rendered scenes as PSD, and the same with errors that are known."""
    root = tmp_path_factory.mktemp("scenes")
    kept, depths = [], {}
    for name in ("results", "truth"):
        (root / name).mkdir()
    for seed in range(3):
        scene = renderer.render(renderer.Request(count=1), SIDE, SIDE, 40 + seed)
        front = scene.objects[0]
        kept.append(scene)
        depths[f"{seed}"] = front.depth
        parts = {
            "truth": (scene.background, front.rgba_with_shadow),
            "results": (scene.background * 0.9, np.roll(front.rgba_with_shadow, 2, 1)),
        }
        for folder, (background, rgba) in parts.items():
            layers = (
                Layer(torch.from_numpy(background.copy()).float(), scene.background_prompt),
                Layer(torch.from_numpy(rgba.copy()).float(), front.prompt),
            )
            stack = LayerStack((SIDE, SIDE), layers)
            files.save(root / folder, f"{seed}", stack, flatten_image(stack, (0, 0, 0, 1))[0], "PSD", {})
            (root / folder / f"{seed}.txt").write_text(scene.prompt)
    (root / "truth" / "depths.json").write_text(json.dumps(depths))
    return root / "results", root / "truth", kept


def test_figures_of_scenes_are_those_computed_by_hand(scenes):
    results, truth, kept = scenes
    asked = json.loads((truth / "depths.json").read_text())
    pending = iter(kept)

    def depth(pictures):
        return torch.from_numpy(next(pending).depth.copy())[None, None].float()

    networks = judges.mini() | {"depth": depth}
    table = measures.measure(measures.read(results), measures.read(truth), asked, networks)
    found = table.values
    close = {"abs": 2 / 255}
    for index, scene in enumerate(kept):
        front = scene.objects[0].rgba_with_shadow
        alpha, moved = front[..., 3], np.roll(front[..., 3], 2, 1)
        inside = moved > 0.5
        rows, columns = np.where(inside)
        by_hand = {
            ("MAD", "background"): np.abs(0.1 * scene.background).mean(),
            ("MSE", "background"): np.square(0.1 * scene.background).mean(),
            ("alpha MAD", "foreground"): np.abs(alpha - moved).mean(),
            ("alpha MSE", "foreground"): np.square(alpha - moved).mean(),
            ("alpha IoU", "foreground"): np.minimum(alpha, moved).sum() / np.maximum(alpha, moved).sum(),
            ("occupancy %", "foreground"): 100 * inside.mean(),
            ("horizontal centre %", "foreground"): 50 * (columns.min() + columns.max() + 1) / SIDE,
            ("vertical centre %", "foreground"): 50 * (rows.min() + rows.max() + 1) / SIDE,
            ("depth error", "composite"): abs(scene.depth[inside].mean() - scene.objects[0].depth),
        }
        for (figure, column), wanted in by_hand.items():
            bound = {"abs": 0.5} if "%" in figure else close
            assert found[figure][column][index] == pytest.approx(wanted, **bound), figure
        assert found["SAD / 1000"]["background"][index] == pytest.approx(
            np.abs(0.1 * scene.background).mean(2).sum() / 1000, rel=0.05
        )
        assert found["CLIP score"]["foreground"][index] in (0, 100)
    assert {"FID (classifier)", "KID (classifier)"} <= set(found) and set(found["FID (classifier)"]) == {
        "composite",
        "foreground",
        "background",
    }
    assert set(table.missing) == {"FG-MIoU", "aesthetic score"}
    assert "--detector" in table.missing["FG-MIoU"]


def test_the_truth_itself_is_perfect(scenes):
    _, truth, _ = scenes
    table = measures.measure(measures.read(truth), measures.read(truth), {}, judges.mini())
    best = {"PSNR": math.inf, "SSIM": 1, "alpha IoU": 1, "DINO likeness": 1, "LPIPS": 0, "MAD": 0, "RGB L1": 0}
    best |= {"seam error": 0, "layers' RGB L1, no merges": 0, "layers' alpha soft IoU, no merges": 1}
    for figure, wanted in best.items():
        for values in table.values[figure].values():
            assert values == pytest.approx([wanted] * 3, abs=1e-5), figure


def test_the_command_prints_a_table_and_says_what_is_wrong_in_one_sentence(scenes, tmp_path, capsys):
    results, truth, _ = scenes
    file = tmp_path / "table.json"
    assert evaluate.main([str(results), "--truth", str(truth), "--mini", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "| alpha IoU | – | 0." in shown and "Not measured:" in shown
    assert json.loads(file.read_text())["figures"]["alpha IoU"]["foreground"]["count"] == 3
    assert evaluate.main([str(tmp_path / "absent"), "--mini"]) == 1
    words = capsys.readouterr().err.strip()
    assert "absent" in words and "\n" not in words


def test_results_of_another_size_than_the_truth_are_refused(scenes, tmp_path):
    _, truth, _ = scenes
    Image.new("RGB", (SIDE, SIDE + 1)).save(tmp_path / "0.png")
    with pytest.raises(ValueError, match="0: the result is 64×65 and the truth 64×64"):
        measures.measure(measures.read(tmp_path), measures.read(truth), {}, judges.mini())
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="no image and no PSD"):
        next(measures.read(tmp_path))


@pytest.mark.parametrize("words", ["a dog", ""])
def test_the_packs_detector_gives_one_mask_and_an_empty_one_for_nothing(tmp_path, words, monkeypatch):
    tiny_detectors.grounding_dino(tmp_path / "grounding-dino" / "dino")
    tiny_detectors.sam(tmp_path / "sams" / "sam")
    monkeypatch.setattr(measures, "THRESHOLDS", (0.0, 0.0) if words else (1.0, 1.0))
    find = measures.own_models(tmp_path, "dino", "sam", None)["find"]
    mask = find(pictures(1, 9, 72), [words or "a cat"])
    assert mask.shape == (1, 1, 72, 72) and set(mask.unique().tolist()) <= {0.0, 1.0}
    assert words or not mask.any()
    with pytest.raises(judges.Missing, match="absent"):
        measures.own_models(tmp_path, "absent", "sam", None)["find"](pictures(1, 9), ["a cat"])
