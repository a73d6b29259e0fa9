"""What the host makes of the pack: every node is there, explains itself, and keeps the ids that saved graphs
rely on.
"""

import io
import json
import logging
import re
import sys

import host
import languages
import node_files
import pytest
import strata
from PIL import Image


def test_ids_inputs_order_and_outputs_are_as_recorded(comfy):
    """A difference is a change that old graphs see: append at the end, or say in CHANGELOG.md why not; then run
    tools/node_files.py.
    """
    recorded = json.loads(node_files.GOLDEN.read_text(encoding="utf-8"))
    assert node_files.golden(comfy.object_info()) == recorded


def test_every_node_explains_itself(comfy):
    nodes = node_files.ours(comfy.object_info())
    assert nodes
    for name, info in nodes.items():
        assert re.fullmatch(r"Strata_[A-Z][A-Za-z]+", name)
        assert info["category"].split("/")[0] == "Strata" and info["display_name"] and info["description"], name
        assert not [key for key, _, options, _ in node_files.inputs(info) if not options.get("tooltip")], name
        assert all(info["output_tooltips"]), name


# What people type, and what older frontends, which know no aliases, are to find by it (see browser/test_search.py)
WORDS = {
    "PSD": {"Strata_SaveLayers", "Strata_LoadLayers"},
    "Photoshop": {"Strata_SaveLayers", "Strata_LoadLayers"},
    "Krita": {"Strata_SaveLayers", "Strata_LoadLayers"},
    "shadow": {"Strata_HarmonizeLayers"},
    "remove background": {"Strata_MatteForeground"},
    "text to mask": {"Strata_DetectForeground"},
    "foreground": {"Strata_LayerFusionSampler", "Strata_DetectForeground", "Strata_MatteForeground"},
    "background": {"Strata_FillBackground", "Strata_MatteForeground"},
    "LayerDiffuse": {"Strata_LoadTransparency", "Strata_ApplyTransparency", "Strata_DecodeTransparency"},
    "DreamLayer": {"Strata_LayerPrompts", "Strata_LayersSampler", "Strata_ImageToLayers"},
    "LayerFusion": {"Strata_EncodeLayerPrompts", "Strata_AttentionBlend", "Strata_LayerFusionSampler"},
    "depth layers": {"Strata_SliceByDepth"},
    "photo to layers": {"Strata_SliceByDepth"},
    "depth anything": {"Strata_EstimateDepth"},
    "move layer": {"Strata_EditLayers", "Strata_TransformLayer"},
    "merge layers": {"Strata_OrderLayers", "Strata_FlattenLayers"},
    "mask to layer": {"Strata_LayersFromImages"},
    "load image with alpha": {"Strata_LoadLayerImage"},
    "feature guidance sampler": {"Strata_FeatureGuidance"},
    "dual branch foreground": {"Strata_SampleForeground"},
    "attention blend patcher": {"Strata_AttentionBlend"},
    "foreground layer": {"Strata_DecomposeImage"},
    "IRH harmonizer": {"Strata_HarmonizeLayers"},
}
SEEN = 30  # a word that begins later in a name is not found by the frontends' search (Fuse.js with a threshold of 0.3)


@pytest.mark.parametrize("words", WORDS)
def test_display_names_carry_the_words_that_people_type(comfy, words):
    names = {kind: info["display_name"].lower() for kind, info in node_files.ours(comfy.object_info()).items()}
    found = {
        kind for kind, name in names.items() if all(0 <= name.find(word) <= SEEN for word in words.lower().split())
    }
    assert found >= WORDS[words]


def test_every_node_has_a_help_page_that_the_frontend_can_read(comfy):
    for name in node_files.ours(comfy.object_info()):
        page = comfy.get(f"/extensions/ComfyUI-Strata/docs/{name}.md").text
        assert len(page) > 200 and page.startswith("# "), name
    pages = {path.stem for path in (node_files.host.PACK / "web" / "docs").glob("*.md")}
    assert pages == set(node_files.ours(comfy.object_info()))


def test_the_locale_file_is_current_and_served(comfy):
    expected = node_files.locale(comfy.object_info())
    assert json.loads(node_files.LOCALE.read_text(encoding="utf-8")) == expected
    served = comfy.get("/i18n").json()["en"]["nodeDefs"]
    assert {name: served[name] for name in expected} == expected


def test_the_menu_file_is_current():
    recorded = json.loads(node_files.GOLDEN.read_text(encoding="utf-8"))
    assert json.loads(node_files.MENU.read_text(encoding="utf-8")) == node_files.menu(recorded)


def test_every_language_is_served(comfy):
    served = comfy.get("/i18n").json()
    assert languages.languages()
    for language in languages.languages():
        nodes, menu = served[language]["nodeDefs"], {"nodeCategories": served[language]["nodeCategories"]}
        assert dict(languages.leaves({"nodeDefs": nodes, "main": menu})) == languages.texts(language)


def test_workflows_for_scripts_are_the_workflows(comfy):
    for path, prompt in node_files.scripted(comfy).items():
        assert json.loads(path.read_text(encoding="utf-8")) == prompt, "run tools/node_files.py"


def test_no_other_workflow_than_those_named_needs_a_newer_comfyui(comfy):
    known = comfy.object_info().keys() | {"MarkdownNote"}
    for path in (host.PACK / "workflows").glob("*.json"):
        unknown = {node["type"] for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]} - known
        assert unknown == comfy.lacks(path.stem), path.stem


def test_the_template_browser_finds_every_workflow_with_its_picture(comfy):
    """tools/thumbnails.py makes the pictures."""
    there = {path.stem for path in (host.PACK / "workflows").glob("*.json")}
    assert set(comfy.get("/workflow_templates").json()[host.PACK_NAME]) == there
    for name in there:
        with Image.open(io.BytesIO(comfy.get(f"/api/workflow_templates/{host.PACK_NAME}/{name}.jpg").content)) as image:
            assert min(image.size) >= 128, name
    assert {path.stem for path in (host.PACK / "workflows").glob("*.jpg")} == there


def test_nothing_about_the_pack_in_the_log(comfy):
    started = comfy.server.log.read_text().split("Starting server")[0]
    lines = [line for line in started.splitlines() if host.PACK_NAME in line or "strata." in line]
    # The folder's name is fixed; the host says so once.
    lines = [line for line in lines if "example_workflows" not in line]
    assert len(lines) == 1 and re.search(r"\d seconds: ", lines[0]), lines  # its line in the list of import times


def test_an_error_while_loading_is_logged_with_its_traceback(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "strata.nodes", None)
    with caplog.at_level(logging.ERROR), pytest.raises(ImportError):
        strata.comfy_entrypoint().send(None)  # not asyncio.run: the browser tests keep a loop running in this thread
    assert "ComfyUI-Strata could not be loaded" in caplog.text and "Traceback" in caplog.text
