"""Files that are generated are as their generator would write them today."""

import inspect
import json
import os
import re
import subprocess
import sys

import figures
import mutants
import papers
import pytest
import record_calls
import run
from strata.techniques import diffusion


def test_papers_page_is_current_and_every_technique_has_a_source_and_a_recorded_test():
    text, wrong = papers.page()
    assert wrong == []
    assert (papers.PACK / "PAPERS.md").read_text(encoding="utf-8") == text


CODE = '''
def good():
    """Adds.

    Raises nothing.
    Source: deglad, Eq. 2,
    twice
    Source: ddim, Eq. 12
    Differs: it adds
    more.
    Differs: and less
    """


def bad():
    """No line of its own. Source: deglad, Eq. 3"""
'''


@pytest.fixture
def pack(tmp_path, monkeypatch):
    """A folder with two techniques, a test and a record of what the test calls."""
    for folder in ("techniques", "tests", "docs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "techniques" / "x.py").write_text(CODE)
    (tmp_path / "tests" / "test_x.py").touch()
    record = {"tests": {"tests/test_x.py": {"techniques/x.py:good": []}}, "workflows": {}}
    (tmp_path / papers.RECORD).write_text(json.dumps(record))
    monkeypatch.setattr(papers, "PACK", tmp_path)
    return tmp_path


def test_the_page_shows_every_source_and_what_differs(pack):
    text, _ = papers.page()
    assert "| Eq. 2, twice | [`good`](techniques/x.py) | tests/test_x.py |  |  |" in text
    assert "| Eq. 12 | [`good`](techniques/x.py) | tests/test_x.py |  |  |" in text
    assert text.count("- `good`: it adds more.\n- `good`: and less.\n") == 1
    assert text.index("it adds more") < text.index("## DDIM")


def test_a_technique_without_source_or_without_a_recorded_test_is_reported(pack):
    assert [line.split(" needs")[0] for line in papers.page()[1]] == ["techniques/x.py: bad"]
    (pack / papers.RECORD).unlink()
    assert papers.page()[1][1].startswith("techniques/x.py: no recorded test calls good; record again")


def test_names_of_the_record_that_are_gone_are_reported_until_the_next_recording(pack):
    known = json.loads((pack / papers.RECORD).read_text())
    stale = {"techniques/x.py:good": ["Strata_Old"], "techniques/x.py:old": []}
    record = {"tests": {**known["tests"], "tests/test_old.py": stale}, "workflows": {"old.json, again": stale}}
    (pack / papers.RECORD).write_text(json.dumps(record))
    reported = "\n".join(papers.page()[1])
    for name in ("Strata_Old", "techniques/x.py:old", "tests/test_old.py", "workflows/old.json"):
        assert f"{papers.RECORD}: {name} is not there any more" in reported
    record_calls.merge("tests", {}, pack / papers.RECORD)
    assert json.loads((pack / papers.RECORD).read_text()) == known


def test_the_page_has_the_equations_of_networks_and_training():
    rows = [line for line in papers.page()[0].splitlines() if line.startswith("| ")]
    for where, place in (("Eq. 2", "training/"), ("Eq. 5", "networks/"), ("Eq. 8", "training/")):
        assert any(where in row and place in row for row in rows), where


def test_a_test_file_is_recorded_anew_and_the_others_stay(tmp_path):
    kept = {"techniques/fusion.py:reduce_attention": ["Strata_AttentionBlend"]}
    file, path = "tests/techniques/test_diffusion.py", tmp_path / "calls.json"
    path.write_text(
        json.dumps(
            {"tests": {file: kept, "tests/techniques/test_fusion.py": kept}, "workflows": {"mini_inpaint.json": {}}}
        )
    )
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "record_calls", "--calls", str(path), file],
        cwd=papers.PACK,
        env={**os.environ, "PYTHONPATH": str(papers.PACK / "tools")},
        check=True,
    )
    names = [name for name, value in vars(diffusion).items() if inspect.isfunction(value)]
    assert json.loads(path.read_text()) == {
        "tests": {
            file: {f"techniques/diffusion.py:{name}": [] for name in names},
            "tests/techniques/test_fusion.py": kept,
        },
        "workflows": {"mini_inpaint.json": {}},
    }


@pytest.mark.slow
def test_a_function_counts_for_the_sampler_and_for_the_node_that_put_it_into_the_model(tmp_path):
    with record_calls.comfyui(tmp_path) as (client, log):
        prompt = client.to_api(run.read_workflow(papers.PACK / "workflows" / "layers_from_text_mini.json"))
        for setting in ("steps=2", "harmonize=false"):
            run.set_input(prompt, f"Strata_LayersSampler.{setting}", client)
        calls = record_calls.calls_of(client, prompt, log)
    shared = "techniques/shared_layers.py:"
    assert calls[f"{shared}global_embedding"] == {"Strata_LayerPrompts"}
    assert calls[f"{shared}joint_attention"] == {"Strata_LayersSampler", "Strata_SharedLayers"}
    assert calls[f"{shared}mix_global_in"] == {"Strata_LayersSampler", "Strata_ContextMaps"}
    assert calls["networks/context_layers.py:ContextLayer"] == {"Strata_LayersSampler", "Strata_ContextMaps"}
    assert "techniques/harmonization.py:fuse_latents" not in calls


def test_what_a_sampler_of_comfyui_runs_counts_for_the_node_that_made_its_guider():
    """From the record, since this takes its time to run."""
    calls = papers.read_record()["workflows"]["scene_composition_mini.json"]
    assert calls["techniques/feature_guidance.py:composition_energy"] == ["Strata_FeatureGuidance"]
    assert calls["techniques/inversion.py:scale_between"] == ["Strata_InvertImage"]


def test_the_page_of_figures_is_of_its_table():
    assert figures.PAGE.read_text(encoding="utf-8") == figures.page(
        json.loads(figures.TABLE.read_text(encoding="utf-8"))
    )


def test_every_number_of_the_page_of_the_papers_is_in_the_figures_that_its_row_links_to():
    sections = {part.partition("\n")[0]: part for part in figures.PAGE.read_text(encoding="utf-8").split("\n## ")[1:]}
    rows = (figures.PAGE.parent / "papers.md").read_text(encoding="utf-8").split("\n## FeatGLaC")[1].splitlines()
    numbers = []
    for row in rows:
        names = re.findall(r"figures\.md#(\w+)", row)
        for number in re.findall(r"-?[\d.]+ ± [\d.]*\d", row):
            assert any(f"| {number} |" in sections[name] for name in names), (number, row[:60])
            numbers.append(number)
    assert len(numbers) > 50


@pytest.mark.slow
def test_every_change_that_the_page_of_mutants_explains_is_one_of_the_code():
    """A changed line of code leaves its entry behind, and `make mutants` would stop there."""
    mutants.judged({what for path in mutants.files() for what, *_ in mutants.mutants(path)}, complete=True)


def test_a_sample_that_is_off_by_more_than_four_standard_errors_is_named(tmp_path, monkeypatch):
    table = {"x": {"figures": {"ours": {"error": {"mean": 0.5, "deviation": 0.1, "count": 100}}}}}
    monkeypatch.setattr(figures, "TABLE", tmp_path / "figures.json")
    figures.TABLE.write_text(json.dumps(table))
    # 2 standard errors of 4 values.
    figures.check("x", {"ours": {"error": [0.5 + 0.1, 0.5 + 0.1, 0.5 + 0.1, 0.5 + 0.1]}})
    with pytest.raises(AssertionError, match="x, ours, error: 0.8000"):
        figures.check("x", {"ours": {"error": [0.8] * 4}})
