"""The pack as users install it from the registry: what the archive holds, and that a ComfyUI runs with nothing else."""

import io
import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import host
import node_files
import pathspec
import pytest
import run
from host import PACK
from PIL import Image

PROJECT = tomllib.loads((PACK / "pyproject.toml").read_text(encoding="utf-8"))
NAME = PROJECT["project"]["name"]


def published() -> list[str]:
    """The files of the registry's archive: the tracked ones without those that .comfyignore names."""
    tracked = subprocess.check_output(["git", "-C", PACK, "ls-files", "-z"], text=True).split("\0")[:-1]
    left_out = pathspec.GitIgnoreSpec.from_lines((PACK / ".comfyignore").read_text(encoding="utf-8").splitlines())
    return [name for name in tracked if not left_out.match_file(name) and (PACK / name).exists()]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A running ComfyUI with the published copy and no other files of the pack."""
    base = tmp_path_factory.mktemp("installed")
    folder = base / "custom_nodes" / NAME  # where ComfyUI's Manager puts it
    for name in published():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PACK / name, folder / name)
    with host.Server(host.find_or_install(), base, pack=False) as server:
        client = run.Client(server.url)
        client.server = server
        yield client


def test_the_registrys_fields():
    project, comfy = PROJECT["project"], PROJECT["tool"]["comfy"]
    assert re.fullmatch(r"[a-z](?:[-_.]?[a-z0-9])*", NAME) and len(NAME) < 100
    assert all("comfyui" not in words.lower() for words in (NAME, comfy["DisplayName"]))
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"]) and project["license"] == {"file": "LICENSE"}
    assert "Operating System :: OS Independent" in project["classifiers"]
    assert {"Repository", "Documentation", "Issues"} <= project["urls"].keys()
    assert all(url.startswith(project["urls"]["Repository"]) for url in project["urls"].values())
    lines = (PACK / "requirements.txt").read_text().split()
    assert lines == project["dependencies"]


def test_the_floor_is_the_host_that_the_tests_start():
    needed = PROJECT["tool"]["comfy"]["requires-comfyui"]
    assert needed == ">=0.3.75" and f"{needed.removeprefix('>=')}, our floor" in Path(host.__file__).read_text()


def test_the_icon_is_in_the_tree_and_small():
    address = PROJECT["tool"]["comfy"]["Icon"]
    head = PROJECT["project"]["urls"]["Repository"].replace("github.com", "raw.githubusercontent.com")
    icon = PACK / address.removeprefix(f"{head}/main/")
    assert icon.suffix == ".svg" and icon.stat().st_size < 4000
    assert 'width="400" height="400"' in icon.read_text()


def test_what_users_do_not_need_is_left_out():
    names = published()
    rooms = {name.split("/")[0] for name in names}
    assert rooms >= {"nodes", "patches", "techniques", "formats", "scenes", "networks", "training", "models", "web"}
    assert not rooms & {"tests", "tools", ".ci", ".github", "Makefile", "AGENTS.md"}
    assert sum((PACK / name).stat().st_size for name in names) < 80e6


def test_no_published_file_replaces_its_process_or_runs_text():
    found = [
        name
        for name in published()
        if name.endswith(".py")
        and re.search(r"\bos\.exec|\bos\.system\(|(?<![\w.])(eval|exec)\(", (PACK / name).read_text("utf-8"))
    ]
    assert found == []


def test_every_node_registers_as_recorded(installed):
    assert node_files.golden(installed.object_info()) == json.loads(node_files.GOLDEN.read_text(encoding="utf-8"))
    started = installed.server.log.read_text().split("Starting server")[0]
    lines = [line for line in started.splitlines() if NAME in line and "example_workflows" not in line]
    assert len(lines) == 1 and re.search(r"\d seconds: ", lines[0]), lines  # its line in the list of import times


def test_templates_help_and_scripts_are_served(installed):
    there = {path.stem for path in (PACK / "workflows").glob("*.json")}
    assert set(installed.get("/workflow_templates").json()[NAME]) == there
    for name in node_files.ours(installed.object_info()):
        assert installed.get(f"/extensions/{NAME}/docs/{name}.md").text.startswith("# "), name
    scripts = {f"/extensions/{NAME}/{path.name}" for path in (PACK / "web").glob("*.js")}
    assert scripts <= set(installed.get("/extensions").json())
    assert all(installed.get(script).text for script in scripts)


def test_a_template_of_the_mini_family_runs(installed):
    workflow = installed.get(f"/api/workflow_templates/{NAME}/mini_text_to_image.json").json()
    prompt = installed.to_api(workflow)
    (sampler,) = [node for node in prompt.values() if node["class_type"] == "KSampler"]
    sampler["inputs"]["steps"] = 2
    pictures = installed.files(installed.run(prompt))
    with Image.open(io.BytesIO(installed.download(pictures[0]))) as image:
        assert image.size == (512, 512) and len(image.convert("RGB").getcolors(512**2)) > 100
