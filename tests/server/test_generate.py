"""Strata_RenderScene in a running ComfyUI."""

import pytest


def graph(**values):
    inputs = {"kind": "beach", "objects": "house, dog", "count": 2, "width": 96, "height": 80, "seed": 4, **values}
    return {
        "1": {"class_type": "Strata_RenderScene", "inputs": inputs},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
        "3": {"class_type": "PreviewImage", "inputs": {"images": ["1", 1]}},
        "4": {"class_type": "PreviewImage", "inputs": {"images": ["1", 3]}},
        "5": {"class_type": "MaskToImage", "inputs": {"mask": ["1", 4]}},
        "6": {"class_type": "PreviewImage", "inputs": {"images": ["5", 0]}},
    }


def pictures(comfy, entry):
    import io

    import numpy as np
    from PIL import Image

    refs = {node: out["images"] for node, out in entry["outputs"].items() if "images" in out}
    return {
        node: [np.asarray(Image.open(io.BytesIO(comfy.download(ref)))) for ref in found] for node, found in refs.items()
    }


@pytest.mark.parametrize("bright", [False, True])
def test_the_node_returns_the_renderers_picture_and_truth(comfy, bright):
    import numpy as np
    from strata.scenes import renderer

    found = pictures(comfy, comfy.run(graph(**({"bright_side": True} if bright else {}))))
    scene = renderer.render(renderer.Request("beach", ("house", "dog"), 2, bright_side=bright), 80, 96, 4)
    for node, truth in (
        ("2", scene.composite),
        ("3", scene.background),
        ("4", np.repeat(scene.depth[..., None], 3, 2)),
    ):
        assert np.abs(found[node][0][..., :3] / 255 - truth).max() <= 1 / 255 + 1e-6
    assert len(found["6"]) == 3
    assert (sum(mask[..., 0].astype(int) for mask in found["6"]) == 255).all()


def test_an_unknown_object_is_named(comfy):
    import run

    with pytest.raises(run.RunError, match="dragon"):
        comfy.run(graph(objects="dragon"))
    assert comfy.run(graph(objects="", count=0))


def test_layers_come_with_or_without_their_shadows(comfy):
    """Flattened with shadows they are the picture; without, they are darker nowhere."""
    import numpy as np
    from strata.scenes import renderer

    scene = renderer.render(renderer.Request("beach", ("house", "dog"), 2), 80, 96, 4)
    flat = {
        "7": {
            "class_type": "Strata_FlattenLayers",
            "inputs": {"layers": ["1", 2], "background": "transparent", "blending": "sRGB"},
        },
        "8": {"class_type": "PreviewImage", "inputs": {"images": ["7", 0]}},
    }
    shown = {
        shadows: pictures(comfy, comfy.run({**graph(shadows=shadows), **flat}))["8"][0][..., :3] / 255
        for shadows in (True, False)
    }
    bare = scene.background
    for item in scene.objects:
        bare = renderer.over(item.rgba, bare)
    assert np.abs(shown[True] - scene.composite).max() <= 1.5 / 255 and np.abs(shown[False] - bare).max() <= 1.5 / 255
    assert np.abs(scene.composite - bare).max() > 0.1
