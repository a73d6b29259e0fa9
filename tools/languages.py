"""Translations of the nodes' names and tooltips, and of their places in the menu: what is missing, and taking in what
was translated.

    python tools/host.py exec tools/languages.py missing ja > ja.json
    python tools/host.py exec tools/languages.py take ja ja.json

`missing` prints {English: translation} of the texts that have none (an empty string), and of those whose English was
changed since (the translation of before). `take` merges such a file into locales/ja, or a whole nodeDefs.json or
main.json. translated.json records of which English text each is a translation. docs/languages has the glossaries.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import re
import sys
from pathlib import Path

import host
from node_files import GOLDEN, text

LOCALES = host.PACK / "locales"
RECORD = host.PACK / "tools" / "translated.json"
FILES = ("nodeDefs", "main")
# Marks by which the frontend's messages (vue-i18n) would link, choose or fill in.
SIGNS = "@{}|"
SYNTAX = re.compile(f"[{SIGNS}]")
# What stays letter for letter: %placeholders%, file names and ids, names with two capitals or with digits, numbers, and
# two names that people search by.
KEPT = re.compile(
    r"%[\w:-]+%|[\w./-]*[a-z]_[\w./-]*|\b\w+/[\w-]+|\.?\b\w+\.(?:json|pt|safetensors)\b|"
    r"(?<![\w.])\w*[A-Z][\w.+-]*[A-Z0-9]\w*(?:[.-]\w+)*|\d+(?:\.\d+)?|Photoshop|Krita"
)


class LanguageError(RuntimeError):
    """What a translator has to mend; written for the translator."""


def leaves(tree: dict, path: tuple[str, ...] = ()):
    """(path, text) of all that is translated: inputs and outputs keep their names, which errors and help pages use."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        elif key != "name":
            yield (*path, key), value


def texts(language: str) -> dict[tuple[str, ...], str]:
    """{(file, key, …): text} of locales/<language>."""
    found = {}
    for name in FILES:
        path = LOCALES / language / f"{name}.json"
        if path.exists():
            found.update(leaves(json.loads(path.read_text(encoding="utf-8")), (name,)))
    return found


def languages() -> list[str]:
    return sorted(path.name for path in LOCALES.iterdir() if path.is_dir() and path.name != "en")


def mark(path: tuple[str, ...], english: str) -> str:
    """What translated.json keeps of a text that was translated."""
    return hashlib.sha256("\n".join((*path, english)).encode()).hexdigest()[:6]


def record() -> dict[str, str]:
    """{language: marks with spaces between}"""
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}


def missing(language: str) -> dict[str, str]:
    """{English: translation of before, or nothing}"""
    marks, there = set(record().get(language, "").split()), texts(language)
    return {
        english: there.get(path, "")
        for path, english in texts("en").items()
        if not there.get(path) or mark(path, english) not in marks
    }


@functools.cache
def choices() -> dict[tuple[str, ...], list[str]]:
    """{(file, key, …) of a tooltip: the choices of its input}"""
    nodes = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return {
        ("nodeDefs", node, "inputs", entry["id"], "tooltip"): [str(choice) for choice in entry.get("choices") or ()]
        for node, info in nodes.items()
        for entry in info["inputs"]
    }


def lost(path: tuple[str, ...], english: str, translation: str) -> list[str]:
    """What of the English text has to survive in a translation and does not, and what the frontend would misread."""
    kept = {word for word in choices().get(path, ()) if re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", english)}
    for word in KEPT.findall(english):
        kept.add(word.rstrip(".").removesuffix("s"))  # LoRAs and UNets are the English plurals of names
    return sorted(word for word in kept if word not in translation) + SYNTAX.findall(translation)


def take(language: str, given: dict) -> int:
    """Merge {English: translation}, or the tree of a nodeDefs.json or main.json, and write. Returns how many texts
    were taken.

    Raises:
        LanguageError: for texts that English does not have, and those that lost something. Nothing is written then.
    """
    english = texts("en")
    if any(isinstance(value, dict) for value in given.values()):
        name = "main" if "nodeCategories" in given else "nodeDefs"
        new = {path: value for path, value in leaves(given, (name,)) if value}
        unknown = ["/".join(path) for path in new.keys() - english.keys()]
    else:
        new = {path: given[value] for path, value in english.items() if given.get(value)}
        unknown = list(given.keys() - set(english.values()))
    if unknown:
        raise LanguageError(f"English has no {sorted(unknown)}; `missing` prints the texts as they are now.")
    wrong = {"/".join(path): words for path, value in new.items() if (words := lost(path, english[path], value))}
    if wrong:
        lines = [f"{name}: {', '.join(words)}" for name, words in wrong.items()]
        raise LanguageError("\n".join([f"These have to stay as in English, and {SIGNS} may not be there:", *lines]))
    merged = texts(language) | new
    for name in FILES:
        tree: dict = {}
        for path in english:
            if path[0] == name and path in merged:
                *folders, leaf = path[1:]
                node = tree
                for folder in folders:
                    node = node.setdefault(folder, {})
                node[leaf] = merged[path]
        if tree:
            target = LOCALES / language / f"{name}.json"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text(tree), encoding="utf-8")
    marks = record()
    current = {mark(path, value) for path, value in english.items()}
    taken = {mark(path, english[path]) for path in new}
    marks[language] = " ".join(sorted(set(marks.get(language, "").split()) & current | taken))
    RECORD.write_text(text(dict(sorted(marks.items()))), encoding="utf-8")
    return len(new)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("missing", "take"))
    parser.add_argument("language", help="the folder's name below locales, as in ja or zh-TW")
    parser.add_argument("file", nargs="?", type=Path, help="translations to take")
    args = parser.parse_args()
    if args.what == "missing":
        print(text(missing(args.language)), end="")
    elif args.file is None:
        parser.error("take needs a file.")
    else:
        try:
            count = take(args.language, json.loads(args.file.read_text(encoding="utf-8")))
        except LanguageError as error:
            sys.exit(str(error))
        print(f"{count} texts taken, {len(missing(args.language))} missing")
