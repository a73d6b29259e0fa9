"""tools/run.py: workflow files in both formats, settings, uploads and its words when something is wrong."""
import json

import pytest
import run
from PIL import Image

API = {"1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 32, "batch_size": 1, "color": 255}},
       "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "run/test"}, "_meta": {"title": "Save it"}}}


def workflow(tmp_path, content):
    path = tmp_path / "workflow.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_an_api_workflow_runs_with_settings_and_its_files_are_copied(comfy, tmp_path):
    made = run.run_file(comfy, workflow(tmp_path, API), ["1.width=48", "Save it.filename_prefix=run/other"], tmp_path / "out", False)
    assert len(made) == 1 and made[0].parent == tmp_path / "out" / "run" and made[0].name.startswith("other_")
    with Image.open(made[0]) as picture:
        assert picture.size == (48, 32)


def test_a_file_given_as_value_is_uploaded(comfy, tmp_path):
    Image.new("RGB", (7, 5), "red").save(tmp_path / "own picture.png")
    prompt = {"1": {"class_type": "LoadImage", "inputs": {"image": "absent.png"}},
              "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "run/own"}}}
    made = run.run_file(comfy, workflow(tmp_path, prompt), [f"LoadImage.image={tmp_path / 'own picture.png'}"], tmp_path / "out", False)
    with Image.open(made[0]) as picture:
        assert picture.size == (7, 5)


@pytest.mark.parametrize(("content", "settings", "words"), [
    ("no json", [], "is not JSON"),
    ({"a": 1}, [], "not a ComfyUI workflow"),
    ({"1": {"class_type": "NoSuchNode", "inputs": {}}}, [], "no node NoSuchNode"),
    (API, ["width=3"], "NODE.INPUT=VALUE"),
    (API, ["3.width=3"], r"1 \(EmptyImage\), 2 \(Save it\)"),
    (API, ["1.depth=3"], "it has width, height, batch_size, color"),
    (API, ["1.width=-4"], "EmptyImage: .*smaller than min"),
])
def test_what_is_wrong_is_said(comfy, tmp_path, content, settings, words):
    with pytest.raises(run.RunError, match=words):
        run.run_file(comfy, workflow(tmp_path, content), settings, None, False)


def test_a_file_that_is_not_there_and_a_server_that_does_not_answer(tmp_path):
    with pytest.raises(run.RunError, match="nothing.json cannot be read"):
        run.read_workflow(tmp_path / "nothing.json")
    with pytest.raises(run.RunError, match="No ComfyUI answers"):
        run.Client("http://127.0.0.1:9").object_info()
