"""README and docs/ name files that are there, every workflow, and every node."""

import json
import re
from pathlib import Path

import pytest

PACK = Path(__file__).resolve().parents[1]
RAW = "https://raw.githubusercontent.com/ComfyUI-Strata/ComfyUI-Strata/main/"
PAGES = [PACK / name for name in ("README.md", "AGENTS.md", "PAPERS.md")] + sorted((PACK / "docs").glob("*.md"))


def targets(text: str) -> list[str]:
    """Where links and images lead, of Markdown and of <img>."""
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    return [target.split("#")[0] for target in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in targets(page.read_text(encoding="utf-8")):
        if target.startswith(RAW):
            assert (PACK / target.removeprefix(RAW)).is_file(), target
        elif target and not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


def test_readme_shows_its_images_by_absolute_address():
    """The registry shows the README without the files beside it."""
    images = re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", text := (PACK / "README.md").read_text(encoding="utf-8"))
    assert images and all(image.startswith(RAW) for image in images + re.findall(r'src="([^"]+)"', text))


def test_readme_links_to_its_own_headings():
    text = (PACK / "README.md").read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)$", text, re.M)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings


def test_every_workflow_is_listed():
    text = (PACK / "docs" / "workflows.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"\b(\w+)\.json\b", text))
    assert {path.stem for path in (PACK / "workflows").glob("*.json")} <= listed


def test_every_node_is_in_the_readme_by_its_name_which_leads_to_its_help_page():
    nodes = json.loads((PACK / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    text = (PACK / "README.md").read_text(encoding="utf-8")
    # the rest of a name is for the search
    rows = {f"| [{node['display_name'].split(' (')[0]}](web/docs/{kind}.md) |" for kind, node in nodes.items()}
    assert sorted(row for row in rows if row not in text) == []
