"""Real classes of transformers, tiny and with random weights, from folders as users have them: any image size, batches,
and what is missing in one sentence. What things are is the trained models' business; here it is sizes and places.
"""

import os
from pathlib import Path

import folder_paths
import numpy as np
import pytest
import torch
from strata.nodes.decompose import DetectForeground, MatteForeground
from strata.patches import detection, pretrained
from strata.scenes import renderer
from strata.techniques import matting

from . import tiny_detectors


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """ComfyUI's models folder with one folder of each kind."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = Path(os.environ["STRATA_HOST"]) / "comfy" / "sd1_tokenizer"
    tiny_detectors.grounding_dino(root / "grounding-dino" / "dino")
    tiny_detectors.sam(root / "sams" / "sam")
    tiny_detectors.sam2(root / "sam2" / "sam2")
    tiny_detectors.sam3(root / "sam3" / "sam3-tiny", tokenizer)
    tiny_detectors.vitmatte(root / "vitmatte" / "vitmatte")
    for kind in ("grounding-dino", "sams", "sam2", "sam3", "vitmatte"):
        folder_paths.add_model_folder_path(kind, str(root / kind))
    return root


def images(count=2, height=77, width=129):
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("detector", ["dino", "sam3-tiny"])
def test_boxes_lie_where_the_detector_says_in_pixels_of_the_image(folders, detector):
    found = list(detection.detect(images(), ["a dog", "a cat"], detector, 0.0, 0.0))
    assert len(found) == 2
    for one in found:
        assert len(one.boxes) > 0 and (one.scores.diff() <= 0).all() and len(one.labels) == len(one.scores)
        centres = (one.boxes[:, :2] + one.boxes[:, 2:]) / 2
        assert ((centres >= 0) & (centres <= torch.tensor([129.0, 77.0]))).all()
        assert all(detection.box_iou(a, b) <= detection.SAME for i, a in enumerate(one.boxes) for b in one.boxes[:i])
        assert (one.masks is not None) == (detector == "sam3-tiny")
        if one.masks is not None:
            assert one.masks.shape == (len(one.boxes), 77, 129) and set(one.masks.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("segmenter", ["sam", "sam2"])
def test_each_box_gets_its_mask_at_the_image_s_size(folders, segmenter):
    boxes = [torch.tensor([[5.0, 5, 40, 60], [60, 10, 120, 70]]), torch.tensor([[1.0, 2, 30, 40]])]
    masks = list(detection.segment(images(), boxes, segmenter))
    assert [mask.shape for mask in masks] == [(2, 77, 129), (1, 77, 129)]
    assert all(set(mask.unique().tolist()) <= {0.0, 1.0} for mask in masks)
    alone = next(detection.segment(images()[:1], [boxes[0][1:]], segmenter))
    assert torch.equal(alone[0], masks[0][1])


def test_detect_foreground_gives_the_surest_or_all_lowest_first(folders):
    best = DetectForeground.execute(images(), "a dog, a cat", "dino", "sam", "best", 0.0, 0.0)
    assert best.args[0].shape == best.args[1].shape == (2, 77, 129)
    every = DetectForeground.execute(images(1), "a dog, a cat", "dino", "sam", "all", 0.0, 0.0)
    assert len(every.args[0]) > 1 and every.args[2].count("\n") == len(every.args[0]) - 1
    rows = torch.arange(77.0)[:, None]
    lowest = [(mask * rows).max().item() for mask in every.args[1]]
    assert lowest == sorted(lowest, reverse=True)
    with pytest.raises(ValueError, match="^prompt: nothing of 'a dog' was found in image 1"):
        DetectForeground.execute(images(1), "a dog", "dino", "sam", "best", 1.0, 0.0)
    with pytest.raises(ValueError, match="^prompt: there are no words in it"):
        DetectForeground.execute(images(1), " , ", "dino", "sam", "best", 0.3, 0.0)


def test_the_nearest_match_is_that_of_least_depth_with_its_words(folders):
    image, words = images(1), "a dog, a cat"
    masks, _, found, said = DetectForeground.execute(image, words, "dino", "sam", "all", 0.0, 0.0).args
    assert said.split("\n") == [line.split(": ")[1].rsplit(" ", 5)[0] for line in found.split("\n")]
    assert set(said.split("\n")) <= {"a dog", "a cat"}
    depth = torch.rand(1, 77, 129, generator=torch.Generator().manual_seed(2))
    depth[:, :, :64] += 2  # near is white: matches that lie mostly to the left
    inside = [np.median(depth[0][mask > 0]) if mask.any() else -np.inf for mask in masks]
    assert len(set(inside)) > 2
    for near, best in (("white", np.argmax(inside)), ("black", np.argmin(np.abs(inside)))):
        one = DetectForeground.execute(image, words, "dino", "sam", "nearest", 0.0, 0.0, depth, near).args
        assert torch.equal(one[0], masks[[best]]) and one[3] == said.split("\n")[best]
    with pytest.raises(ValueError, match="^depth: nothing is connected; connect the depth of the image, or"):
        DetectForeground.execute(image, words, "dino", "sam", "nearest", 0.0, 0.0)


def test_each_image_of_a_batch_has_its_own_nearest(folders):
    depth = torch.rand(2, 77, 129, generator=torch.Generator().manual_seed(3))
    both = DetectForeground.execute(images(), "a dog, a cat", "dino", "sam", "nearest", 0.0, 0.0, depth).args
    assert len(both[0]) == 2 and both[3].count("\n") == 1
    for number in (0, 1):
        own = DetectForeground.execute(
            images()[[number]], "a dog, a cat", "dino", "sam", "nearest", 0.0, 0.0, depth[[number]]
        ).args
        assert torch.equal(own[0][0], both[0][number]) and own[3] == both[3].split("\n")[number]


def test_a_part_of_the_words_means_the_whole(folders):
    words = ["a red car", "a dog", "glass"]
    for label, whole in (("red car", "a red car"), ("car", "a red car"), ("Dog", "a dog"), ("a dog", "a dog")):
        assert detection.meant(label, words) == whole


def test_a_folder_that_is_not_there_is_named_with_where_to_get_it(folders):
    assert {"dino", "sam3-tiny", "grounding-dino-tiny"} <= set(detection.DETECTORS.choices())
    assert {"sam", "sam2"} <= set(detection.SEGMENTERS.choices()) and "sam" not in detection.DETECTORS.choices()
    with pytest.raises(
        ValueError, match="^detector: config.json and model.safetensors of grounding-dino-tiny are not in .*"
    ):
        detection.DETECTORS.find("grounding-dino-tiny")
    with pytest.raises(ValueError, match="^matting_model: .*vitmatte.*; download them from https://"):
        detection.MATTING.find("vitmatte-base-distinctions-646")


def test_a_config_that_is_no_config_has_no_type(tmp_path):
    for text in ("[]", "not JSON", "{}"):
        (tmp_path / "config.json").write_text(text)
        assert pretrained.model_type(tmp_path) == ""


def test_what_a_trimap_knows_stays_with_vitmatte(folders):
    trimap = torch.full((2, 77, 129), 0.5)
    trimap[:, :30], trimap[:, 60:] = 0, 1
    alpha = detection.vitmatte(images(), trimap, "vitmatte")
    assert alpha.shape == trimap.shape and (alpha[:, :30] == 0).all() and (alpha[:, 60:] == 1).all()
    assert alpha[:, 30:60].std() > 0 and alpha.min() >= 0 and alpha.max() <= 1


@pytest.fixture(scope="module")
def scene():
    return renderer.render(renderer.Request("meadow", ("palm tree",), 1), 128, 96, 4)


def test_a_rough_mask_becomes_the_object_s_alpha(folders, scene):
    image, truth = torch.from_numpy(scene.composite)[None], torch.from_numpy(scene.objects[0].rgba[..., 3])
    rough = (truth > 0.5).float()
    alpha, trimap = MatteForeground.execute(image, rough[None], False, "closed form", "vitmatte", 2.5, 0, "off").args
    known = trimap[0] != 0.5
    assert torch.equal(alpha[0][known], rough[known]) and 0.02 < (~known).float().mean() < 0.5
    wider = MatteForeground.execute(image, rough[None], False, "closed form", "vitmatte", 2.5, 8, "off").args[1]
    assert (wider == 0.5).sum() > (trimap == 0.5).sum()
    again = MatteForeground.execute(image, trimap, True, "closed form", "vitmatte", 2.5, 0, "off").args
    assert torch.equal(again[0], alpha) and torch.equal(again[1], trimap)
    edge = ~known
    assert (alpha[0] - truth)[edge].abs().mean() < 0.15  # 0.5 everywhere there would be about 0.4


def test_a_mask_that_says_nothing_for_certain_is_refused(folders):
    noise = (images(1)[..., 0] > 0.5).float()
    with pytest.raises(ValueError, match="^mask: nothing in mask 1 is certain.*; make the width smaller, or connect"):
        MatteForeground.execute(images(1), noise, False, "closed form", "vitmatte", 2.5, 0, "off")
    with pytest.raises(ValueError, match="^mask: nothing in mask 1 is certain.*; paint 1 where the object surely is"):
        MatteForeground.execute(images(1), 0 * noise + 0.5, True, "closed form", "vitmatte", 2.5, 0, "off")


def test_a_trimap_with_nothing_to_find_is_told_and_stays(folders):
    cut = torch.zeros(1, 77, 129)
    cut[:, 20:40, 30:60] = 1
    found = MatteForeground.execute(images(1), cut, True, "closed form", "vitmatte", 2.5, 0, "off")
    assert torch.equal(found[0], cut) and found.ui["text"][0].startswith("Mask 1 has nothing between 0 and 1")


def test_the_sentence_names_the_input_that_chose_a_detector(folders):
    cut = torch.zeros(1, 77, 129)
    cut[:, 20:40, 30:60] = 1
    with pytest.raises(ValueError, match="^transparent_things: config.json and model.safetensors of grounding-dino-t"):
        MatteForeground.execute(images(1), cut, False, "closed form", "vitmatte", 2.5, 0, "grounding-dino-tiny")


def test_a_trimap_is_what_eroding_and_dilating_give():
    mask = torch.from_numpy(np.random.default_rng(0).random((30, 40)) > 0.03).float()
    mask[10:20, 10:30] = 0
    found = matting.trimap_of(mask, 3)
    from scipy import ndimage

    square = np.ones((7, 7))
    one = ndimage.binary_erosion(mask.numpy(), square, border_value=1)
    zero = ndimage.binary_erosion(1 - mask.numpy(), square, border_value=1)
    assert np.array_equal(found.numpy(), np.where(one, 1, np.where(zero, 0, 0.5)))


def test_transparent_things_open_the_trimap_in_their_boxes(folders, monkeypatch):
    monkeypatch.setitem(detection.TRANSPARENT, "box_threshold", 0.0)
    monkeypatch.setitem(detection.TRANSPARENT, "text_threshold", 0.0)
    mask = torch.ones(1, 77, 129)
    mask[..., :20] = 0
    trimap = MatteForeground.execute(images(1), mask, False, "ViTMatte", "vitmatte", 2.5, 0, "dino").args[1]
    plain = MatteForeground.execute(images(1), mask, False, "ViTMatte", "vitmatte", 2.5, 0, "off").args[1]
    opened = trimap != plain
    assert opened.any() and (plain[opened] == 1).all() and (trimap[opened] == 0.5).all()
