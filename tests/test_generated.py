"""Files that are generated are as their generator would write them today."""

import json

import figures
import papers
import pytest


def test_papers_page_is_current_and_every_technique_has_source_and_test():
    text, wrong = papers.page()
    assert wrong == []
    assert (papers.PACK / "PAPERS.md").read_text(encoding="utf-8") == text


def test_a_technique_without_source_is_reported(tmp_path, monkeypatch):
    (tmp_path / "techniques").mkdir()
    code = 'def good():\n    """Adds.\n\n    Source: deglad, Eq. 2\n    """\n\n\ndef bad():\n    """No source."""\n'
    (tmp_path / "techniques" / "x.py").write_text(code)
    monkeypatch.setattr(papers, "PACK", tmp_path)
    text, wrong = papers.page()
    assert "Eq. 2" in text and len(wrong) == 2  # bad has no Source, good has no test


def test_the_page_of_figures_is_of_its_table():
    assert figures.PAGE.read_text(encoding="utf-8") == figures.page(
        json.loads(figures.TABLE.read_text(encoding="utf-8"))
    )


def test_a_sample_that_is_off_by_more_than_four_standard_errors_is_named(tmp_path, monkeypatch):
    table = {"x": {"figures": {"ours": {"error": {"mean": 0.5, "deviation": 0.1, "count": 100}}}}}
    monkeypatch.setattr(figures, "TABLE", tmp_path / "figures.json")
    figures.TABLE.write_text(json.dumps(table))
    # 2 standard errors of 4 values.
    figures.check("x", {"ours": {"error": [0.5 + 0.1, 0.5 + 0.1, 0.5 + 0.1, 0.5 + 0.1]}})
    with pytest.raises(AssertionError, match="x, ours, error: 0.8000"):
        figures.check("x", {"ours": {"error": [0.8] * 4}})
