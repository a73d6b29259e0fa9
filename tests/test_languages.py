"""The translations of the nodes' texts: all there, none left behind by its English, and what has to survive does.

tools/languages.py says what is missing and takes it in.
"""

import json
import re

import host
import languages
import pytest

ENGLISH = languages.texts("en")
GLOSSARIES = host.PACK / "docs" / "languages"
# Texts that are the same in a language and in English.
SAME: dict[str, set[str]] = {}
# Letters that a word's end may differ by, for languages that bend their words.
BENT = 3


def test_there_are_languages_and_each_has_a_glossary():
    assert languages.languages()
    assert sorted(path.stem for path in GLOSSARIES.glob("*.md")) == languages.languages()
    assert sorted(languages.record()) == languages.languages()


@pytest.fixture(params=languages.languages())
def language(request):
    return request.param


@pytest.fixture
def translated(language):
    return languages.texts(language)


def test_no_text_is_missing_stale_or_extra(language, translated):
    assert languages.missing(language) == {}, "see tools/languages.py"
    assert list(translated) == list(ENGLISH)


def test_names_of_inputs_and_outputs_are_left_to_english(language):
    """Errors, help pages and shared workflows use them; the frontend shows the English ones where there is no other."""
    for name in languages.FILES:
        path = languages.LOCALES / language / f"{name}.json"
        assert '"name": "' not in path.read_text(encoding="utf-8"), path


def test_none_is_empty_or_left_in_english(language, translated):
    for path, value in translated.items():
        assert value and value == value.strip(), path
    same = {value for path, value in translated.items() if value == ENGLISH[path]}
    assert same <= SAME.get(language, set())
    # Five English words in a row that the English text has: a part was forgotten. Words to type have commas between.
    for path, value in translated.items():
        runs = re.findall(r"(?=\b((?:[a-z]+ ){4}[a-z]+)\b)", value)
        assert not [run for run in runs if run in ENGLISH[path]], path


def test_names_numbers_choices_and_placeholders_survive(translated):
    lost = {path: words for path, value in translated.items() if (words := languages.lost(path, ENGLISH[path], value))}
    assert lost == {}


def test_nodes_are_called_by_their_translated_names(translated):
    def short(name):  # the words in brackets are for the search
        return re.split(r" ?[(（]", name)[0]

    names = {short(ENGLISH[path]): short(translated[path]) for path in ENGLISH if path[-1] == "display_name"}
    assert len(set(names.values())) == len(names)
    # Where one name begins with another the longer one is meant.
    anyone = re.compile("|".join(sorted(names, key=len, reverse=True)))
    wrong = {
        (path, name)
        for path, value in translated.items()
        if path[-1] != "display_name"
        for name in anyone.findall(ENGLISH[path])
        if names[name] not in value
    }
    assert wrong == set()


def glossary(language):
    """[(English term, [its translations], remark)]"""
    text = (GLOSSARIES / f"{language}.md").read_text(encoding="utf-8")
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line] for line in lines]
    assert rows[0] == ["English", "term", "remark"]
    return [(english, term.split(" / "), remark) for english, term, remark in rows[1:]]


def stems(term):
    """What of a term's words every form has."""
    return [word[: max(3, len(word) - BENT)].lower() for word in term.split()]


def test_the_glossary_has_sixty_terms_and_is_followed(language, translated):
    rows = glossary(language)
    assert len({english for english, _, _ in rows}) == len(rows) == 60
    used = 0
    for english, terms, _ in rows:
        word = re.compile(rf"\b{re.escape(english)}(s|es|d|ed|ning)?\b", re.IGNORECASE)
        paths = [path for path, text in ENGLISH.items() if word.search(text)]
        if not paths:  # of help pages and the frontend
            continue
        used += 1
        # Not all: model is also a folder, and width an input's name.
        hits = [path for path in paths if any(all(s in translated[path].lower() for s in stems(t)) for t in terms)]
        # Not all: opacity is an input's name too, and models a folder's.
        assert len(hits) >= len(paths) / 2, (english, terms, [p for p in paths if p not in hits][:3])
    assert used >= 50


def test_a_changed_english_text_is_missing_until_it_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(languages, "LOCALES", tmp_path)
    monkeypatch.setattr(languages, "RECORD", tmp_path / "translated.json")

    def write(tooltip):
        node = {"display_name": "Add layer", "inputs": {"x": {"name": "x", "tooltip": tooltip}}}
        (tmp_path / "en").mkdir(exist_ok=True)
        (tmp_path / "en" / "nodeDefs.json").write_text(json.dumps({"Strata_AddLayer": node}))

    write("Left side in 2 pixels.")
    assert languages.missing("de") == {"Add layer": "", "Left side in 2 pixels.": ""}
    with pytest.raises(languages.LanguageError, match="x/tooltip: 2$"):
        languages.take("de", {"Left side in 2 pixels.": "Linke Seite in zwei Pixeln."})
    with pytest.raises(languages.LanguageError, match="English has no"):
        languages.take("de", {"Add mask": "Maske hinzufügen"})
    assert not (tmp_path / "de").exists()
    # One by one, and as a whole file with names.
    assert languages.take("de", {"Left side in 2 pixels.": "Linke Seite in 2 Pixeln."}) == 1
    assert languages.missing("de") == {"Add layer": ""}
    whole = {"Strata_AddLayer": {"display_name": "Ebene hinzufügen", "inputs": {"x": {"name": "x"}}}}
    assert languages.take("de", whole) == 1
    assert languages.missing("de") == {}
    whole["Strata_AddLayer"]["inputs"]["x"] = {"tooltip": "Linke Seite in 2 Pixeln."}
    assert json.loads((tmp_path / "de" / "nodeDefs.json").read_text(encoding="utf-8")) == whole
    write("Right side in 2 pixels.")
    assert languages.missing("de") == {"Right side in 2 pixels.": "Linke Seite in 2 Pixeln."}
    languages.take("de", {"Right side in 2 pixels.": "Rechte Seite in 2 Pixeln."})
    assert languages.missing("de") == {} and languages.languages() == ["de"]
