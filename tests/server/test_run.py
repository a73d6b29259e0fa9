"""tools/run.py: workflow files in both formats, settings, uploads and its words when something is wrong."""

import json

import evaluate
import pytest
import run
from PIL import Image

API = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 32, "batch_size": 1, "color": 255}},
    "2": {
        "class_type": "SaveImage",
        "inputs": {"images": ["1", 0], "filename_prefix": "run/test"},
        "_meta": {"title": "Save it"},
    },
}


def workflow(tmp_path, content):
    path = tmp_path / "workflow.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_an_api_workflow_runs_with_settings_and_its_files_are_copied(comfy, tmp_path):
    made = run.run_file(
        comfy, workflow(tmp_path, API), ["1.width=48", "Save it.filename_prefix=run/other"], tmp_path / "out", False
    )
    assert len(made) == 1 and made[0].parent == tmp_path / "out" / "run" and made[0].name.startswith("other_")
    with Image.open(made[0]) as picture:
        assert picture.size == (48, 32)


def test_a_file_given_as_value_is_uploaded(comfy, tmp_path):
    Image.new("RGB", (7, 5), "red").save(tmp_path / "own picture.png")
    prompt = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "absent.png"}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "run/own"}},
    }
    made = run.run_file(
        comfy, workflow(tmp_path, prompt), [f"LoadImage.image={tmp_path / 'own picture.png'}"], tmp_path / "out", False
    )
    with Image.open(made[0]) as picture:
        assert picture.size == (7, 5)


def test_a_file_of_the_user_is_never_overwritten(comfy, tmp_path):
    kept = comfy.server.base / "input" / "mine.png"
    Image.new("RGB", (3, 3), "blue").save(kept)
    before = kept.read_bytes()
    Image.new("RGB", (7, 5), "red").save(tmp_path / "mine.png")
    prompt = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "mine.png"}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "run/mine"}},
    }
    made = run.run_file(
        comfy, workflow(tmp_path, prompt), [f"1.image={tmp_path / 'mine.png'}"], tmp_path / "out", False
    )
    with Image.open(made[0]) as picture:
        assert picture.size == (7, 5)
    assert kept.read_bytes() == before


def test_values_are_read_as_their_inputs_types(comfy, tmp_path):
    known = comfy.object_info()["Strata_TransformLayer"]["input"]
    flip = next(name for group in known.values() for name, spec in group.items() if spec[0] == "BOOLEAN")
    prompt = {
        "1": {"class_type": "Strata_TransformLayer", "inputs": {flip: True, "name": "x"}},
        "2": API["2"] | {"inputs": {**API["2"]["inputs"]}},
        "3": {"class_type": "KSampler", "inputs": {"cfg": 1, "seed": 2}},
    }
    (tmp_path / "here.txt").write_text("a file")
    for setting in (
        f"1.{flip}=False",
        f"2.filename_prefix={tmp_path / 'here.txt'}",
        "3.cfg=2",
        "3.seed=18446744073709551615",
    ):
        run.set_input(prompt, setting, comfy)
    assert prompt["1"]["inputs"][flip] is False and prompt["2"]["inputs"]["filename_prefix"] == str(
        tmp_path / "here.txt"
    )
    assert prompt["3"]["inputs"] == {"cfg": 2.0, "seed": 18446744073709551615}
    run.set_input(prompt, "2.filename_prefix=" + "long " * 200, comfy)
    for setting, words in (("3.cfg=much", "is not a number"), (f"1.{flip}=perhaps", "true or false")):
        with pytest.raises(run.RunError, match=words):
            run.set_input(prompt, setting, comfy)
    assert f"1.{flip}=False    (Strata_TransformLayer; BOOLEAN)" in run.listed(prompt, comfy)


def test_a_prompt_that_is_accepted_in_part_fails(comfy, tmp_path):
    bad = {
        "3": {"class_type": "EmptyImage", "inputs": {"width": -4, "height": 32, "batch_size": 1, "color": 255}},
        "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "run/bad"}},
    }
    with pytest.raises(run.RunError, match="EmptyImage: .*smaller than min"):
        run.run_file(comfy, workflow(tmp_path, API | bad), [], None, False)


def test_a_prompt_that_is_removed_from_the_queue_is_not_waited_for(comfy, monkeypatch):
    monkeypatch.setattr(run, "QUIET", 0.2)
    socket = run.websocket.create_connection(f"ws{comfy.url[4:]}/ws?clientId=gone", timeout=5)
    try:
        with pytest.raises(run.RunError, match="removed from ComfyUI's queue"):
            comfy._follow(socket, "no-such-prompt", API, False)
    finally:
        socket.close()


def test_a_byte_order_mark_and_an_address_without_http_are_understood(comfy, tmp_path):
    (tmp_path / "marked.json").write_text("\ufeff" + json.dumps(API), encoding="utf-8")
    assert run.read_workflow(tmp_path / "marked.json") == API
    assert run.Client(comfy.url.removeprefix("http://")).object_info().keys() == comfy.object_info().keys()


@pytest.mark.parametrize(
    ("content", "settings", "words"),
    [
        ("no json", [], "is not JSON"),
        ({"a": 1}, [], "not a ComfyUI workflow"),
        ({"1": {"class_type": "NoSuchNode", "inputs": {}}}, [], "no node NoSuchNode"),
        (API, ["width=3"], "NODE.INPUT=VALUE"),
        (API, ["3.width=3"], r"1 \(EmptyImage\), 2 \(Save it\)"),
        (API, ["1.depth=3"], "it has width, height, batch_size, color"),
        (API, ["1.width=-4"], "EmptyImage: .*smaller than min"),
    ],
)
def test_what_is_wrong_is_said(comfy, tmp_path, content, settings, words):
    with pytest.raises(run.RunError, match=words):
        run.run_file(comfy, workflow(tmp_path, content), settings, None, False)


def test_a_file_that_is_not_there_and_a_server_that_does_not_answer(tmp_path):
    with pytest.raises(run.RunError, match="nothing.json cannot be read"):
        run.read_workflow(tmp_path / "nothing.json")
    with pytest.raises(run.RunError, match="No ComfyUI answers"):
        run.Client("http://127.0.0.1:9").object_info()


def test_prompts_of_a_file_become_samples_for_the_papers_measures(comfy, tmp_path):
    path = workflow(tmp_path, API | {"2": {**API["2"], "inputs": API["2"]["inputs"] | {"filename_prefix": "run/many"}}})
    (tmp_path / "prompts.txt").write_text("40\n\n48\n")
    results, settings = tmp_path / "results", ["1.width={prompt}", "1.height=3{seed}"]
    for _ in range(2):  # the second time everything is there
        evaluate.make(path, tmp_path / "prompts.txt", settings, results, comfy.url)
        assert sorted(one.name for one in results.iterdir()) == ["0000.png", "0000.txt", "0001.png", "0001.txt"]
    with Image.open(results / "0001.png") as picture:
        assert picture.size == (48, 31)
    assert (results / "0001.txt").read_text() == "48"
