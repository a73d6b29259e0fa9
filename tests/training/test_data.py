"""Batches are functions of their numbers, and what a pool says about a scene is what the renderer put into it."""

import numpy as np
import pytest
import torch
from strata.scenes import renderer
from strata.scenes.renderer import Request
from strata.training import classifier, data

SIDE, COUNT = 64, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pool")


def truth(pool, index):
    return renderer.render(pool.request(index), SIDE, SIDE, index)


@pytest.mark.parametrize("kind", [data.ScenePool, classifier.Extra])
def test_labels_are_those_of_the_rendered_scene(folder, kind):
    pool = kind(folder, COUNT, SIDE)
    names = list(renderer.catalogue())
    for index in range(COUNT):
        scene = truth(pool, index)
        shown = [names[i] for i in pool.labels.objects[index] if i >= 0]
        assert shown == [item.name for item in scene.objects] == pool.content(index)[1]
        cut_out = kind is classifier.Extra and index % 2
        assert pool.labels.places[index] == (classifier.PLAIN if cut_out else renderer.KINDS.index(scene.kind))
        if not cut_out:
            assert np.abs(pool[index] / 255 - scene.composite).max() <= 0.5 / 255 + 1e-6


def test_a_prompt_names_the_scene_in_the_renderers_words(folder):
    pool = data.ScenePool(folder, COUNT, SIDE)
    for index in range(COUNT):
        scene, said = truth(pool, index), pool.prompt(index)
        assert said == pool.prompt(index)
        assert any(said.endswith(where) for where in renderer.PLACE_WORDS[scene.kind])
        places = [max(said.find(words) for words in renderer.catalogue()[item.name].prompts) for item in scene.objects]
        assert min(places) >= 0 and places == sorted(places, reverse=True)  # nearest first
    assert len({pool.prompt(0, draw) for draw in range(20)}) > 3


def test_the_same_numbers_give_the_same_batch_and_others_another(folder):
    pool = data.ScenePool(folder, COUNT, SIDE)
    first = pool.batch(8, 32, seed=1, step=5)
    assert torch.equal(first, data.ScenePool(folder, COUNT, SIDE).batch(8, 32, seed=1, step=5))
    for other in ({"seed": 2, "step": 5}, {"seed": 1, "step": 6}, {"seed": 1, "step": 5, "rank": 1}):
        assert not torch.equal(first, pool.batch(8, 32, **other))
    assert first.shape == (8, 3, 32, 32) and first.min() >= 0 and first.max() <= 1


def test_a_batch_holds_the_cuts_that_its_draw_says(folder):
    pool = data.ScenePool(folder, COUNT, SIDE)
    draw, batch = pool.draw(8, 40, 3, 9), pool.batch(8, 40, 3, 9)
    for index, (y, x), flip, picture in zip(draw.scenes, draw.corners, draw.flip, batch, strict=True):
        cut = truth(pool, index).composite[y : y + 40, x : x + 40]
        assert np.abs((cut[:, ::-1] if flip else cut) - picture.permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6


def test_pools_keep_to_their_objects_and_pairs(folder):
    pool, extra = data.ScenePool(folder, 300, SIDE), classifier.Extra(folder, 300, SIDE)
    for index in range(300):
        kind, names = pool.content(index)
        assert not any(renderer.is_held_out(name, kind) for name in names)
        kind, names = extra.content(index)
        assert len(set(names)) == len(names)
        if index % 2:
            assert len(names) == 1
        else:
            assert not any(renderer.is_held_out_pair(name, kind) for name in names) and any(
                renderer.catalogue()[name].held_out for name in names
            )


def test_choose_is_what_render_shows():
    for seed in range(30):
        for request in (Request(), Request(train=True), Request(held_out=True), Request(kind="snow", count=2)):
            scene = renderer.render(request, 32, 32, seed)
            assert (scene.kind, [item.name for item in scene.objects]) == renderer.choose(
                request, np.random.default_rng(seed)
            )
