"""Files that are generated are as their generator would write them today."""
import papers


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
