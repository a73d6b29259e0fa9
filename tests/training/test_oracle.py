"""The shipped classifier: right on scenes it never saw, and its measures follow what is in the pictures."""

import numpy as np
import pytest
import torch
from strata.scenes import renderer
from strata.scenes.renderer import Request
from strata.techniques import metrics
from strata.training import oracle

FIRST = 3 * 10**9  # seeds of neither training nor the trainer's own checks


@pytest.fixture(scope="module")
def judge():
    return oracle.load()


def batch(arrays):
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def rendered(request, count, first=FIRST):
    return [renderer.render(request, 128, 128, first + i) for i in range(count)]


def agreement(judge, shown, pictures=None):
    pictures = batch([s.composite for s in shown]) if pictures is None else pictures
    where, items = judge.text_agreement(pictures, [s.kind for s in shown], [[o.name for o in s.objects] for s in shown])
    return where.mean().item(), items.mean().item()


@pytest.mark.parametrize("request_", [Request(count=1, train=True), Request(count=1, held_out=True), Request(count=1)])
def test_it_is_right_on_scenes_that_it_never_saw(judge, request_):
    where, item = agreement(judge, rendered(request_, 200))
    print(f"{request_}: scene {where:.3f}, object {item:.3f}")
    assert where >= 0.97 and item >= 0.97


def test_scenes_of_several_objects_and_of_none(judge):
    where, items = agreement(judge, rendered(Request(count=3), 100))
    assert where >= 0.97 and items >= 0.85
    where, none = agreement(judge, rendered(Request(objects=()), 50))
    assert where >= 0.97 and none >= 0.85


def test_permuted_prompts_agree_less(judge):
    shown = rendered(Request(count=1), 100)
    where, item = agreement(judge, shown)
    other_place, other_item = agreement(judge, shown, batch([s.composite for s in shown]).roll(1, 0))
    assert other_place < 0.3 < where and other_item < 0.2 < item


def test_agreement_is_counted_by_hand(judge):
    shown = rendered(Request(kind="beach", objects=("dog", "apple")), 1)
    picture = batch([s.composite for s in shown]).expand(4, -1, -1, -1)
    asked = [["dog", "apple"], ["dog", "rocket"], ["rocket"], []]
    where, items = judge.text_agreement(picture, ["beach", "snow", None, "beach"], asked)
    assert where.tolist() == [1, 0, 1, 1] and items.tolist() == [1, 0.5, 0, 0]
    with pytest.raises(ValueError, match="does not know unicorn"):
        judge.text_agreement(picture[:1], ["beach"], [["unicorn"]])


def test_pictures_of_other_sizes_are_judged_alike(judge):
    for size in ((256, 256), (96, 96), (128, 192)):
        shown = [renderer.render(Request(count=1), *size, FIRST + i) for i in range(40)]
        where, item = agreement(judge, shown)
        assert where >= 0.9 and item >= 0.85, size


def test_an_object_is_more_like_itself_in_another_place_than_like_another_object(judge):
    names = list(renderer.catalogue())
    cuts = []
    for first, kind in ((0, "meadow"), (1000, "room")):
        items = [
            renderer.render(Request(kind=kind, objects=(name,)), 128, 128, FIRST + first + i).objects[0].rgba
            for i, name in enumerate(names)
        ]
        rgba = batch(items)
        cuts.append(oracle.cut_out(rgba[:, :3], rgba[:, 3:]))
    same = judge.similarity(*cuts)
    other = judge.similarity(cuts[0], cuts[1].roll(1, 0))
    print(
        f"same thing {same.mean():.3f}, other thing {other.mean():.3f}, right order {(same > other).float().mean():.3f}"
    )
    assert (same > other).float().mean() >= 0.95 and same.mean() > other.mean() + 0.1
    assert judge.similarity(cuts[0], cuts[0]).tolist() == pytest.approx([1] * len(names))


def test_cut_out_does_not_depend_on_place_and_size():
    y, x = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    colour = torch.tensor([0.9, 0.2, 0.1])[None, :, None, None].expand(1, 3, 128, 128)

    def disc(cx, cy, radius):
        return ((radius - ((x - cx) ** 2 + (y - cy) ** 2).sqrt()) + 0.5).clamp(0, 1)[None, None]

    one, two = oracle.cut_out(colour, disc(30, 40, 16)), oracle.cut_out(colour, disc(80, 70, 40))
    assert (one - two).abs().mean() < 0.01
    assert torch.allclose(one[0, :, 64, 64], colour[0, :, 0, 0], rtol=0, atol=1e-6) and torch.allclose(
        one[0, :, 0, 0], torch.full((3,), 0.5), rtol=0, atol=1e-6
    )
    with pytest.raises(ValueError, match="alpha is empty"):
        oracle.cut_out(colour, disc(30, 40, 16) * 0)


@pytest.mark.parametrize(("height", "width"), [(10, 40), (40, 10), (12, 12)])
def test_the_longer_side_of_a_cut_out_is_half_of_the_picture(height, width):
    alpha = torch.zeros(1, 1, 96, 128)
    alpha[..., 20 : 20 + height, 30 : 30 + width] = 1
    colour = torch.tensor([1.0, 0.0, 0.25])[None, :, None, None].expand(1, 3, 96, 128)
    (found,) = oracle.cut_out(colour, alpha)
    scale = 64 / max(height, width)
    tall, wide = round(height * scale), round(width * scale)
    expected = torch.full((3, 128, 128), 0.5)
    top, left = (128 - tall) // 2, (128 - wide) // 2
    expected[:, top : top + tall, left : left + wide] = colour[0, :, :1, :1]
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)


def test_distances_grow_with_what_is_wrong_with_a_set(judge):
    pictures = [batch([s.composite for s in rendered(Request(), 150, FIRST + first)]) for first in (0, 500)]
    features = judge.features(pictures[0])

    def both(other):
        others = judge.features(other)
        return np.array([metrics.frechet_distance(features, others), metrics.kernel_distance(features, others)])

    alike = both(pictures[1])
    blurred = both(torch.nn.functional.avg_pool2d(pictures[1], 9, 1, 4))
    one_place = both(batch([s.composite for s in rendered(Request(kind="snow"), 150, FIRST + 500)]))
    print("alike", alike, "blurred", blurred, "snow only", one_place)
    assert (blurred > 1.3 * alike).all() and (one_place > 1.3 * alike).all()
