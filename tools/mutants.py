"""Do the tests notice a wrong result? A fixed sample of changes to the code, one at a time, against its tests.

    python tools/host.py exec tools/mutants.py        # about half an hour on two cores
    python tools/host.py exec tools/mutants.py techniques/depth.py --count 40 --seed 3

A change is another operator, comparison, number or condition in techniques/, formats/ and the parts of patches/ that
need no sampling. What no test notices is a survivor. docs/mutants.md lists those that change no behaviour, and why;
they do not count. Each entry is for one place, which it names by its line of source: an equal change elsewhere in the
function still counts. Ends with status 1 when less than 97 % are noticed.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.machinery
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent
# Tests in tests/patches take long, so only those of these files are tried.
PATCHES = {
    "layer_files": ["test_transparency_files"],
    "layer_prompts": ["test_shared_layers", "test_fusion"],
    "layer_rows": ["test_layer_rows", "test_shared_layers", "test_fusion"],
    "transparency": ["test_transparency_files"],
}
SECONDS = 60  # and three times what the tests take without a change: what hangs is noticed, what is slow is not
WANTED = 0.97
LONGEST = 1800  # seconds of one file's tests without a change
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult}
COMPARISONS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}


def files() -> list[Path]:
    rooms = [path for room in ("techniques", "formats") for path in (PACK / room).glob("*.py")]
    return sorted([*rooms, *(PACK / "patches" / f"{name}.py" for name in PATCHES)])


def changed(node: ast.AST) -> Iterator[ast.AST]:
    """The node with one thing in it changed."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        yield _with(node, op=OPERATORS[type(node.op)]())
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        yield _with(node, ops=[COMPARISONS[type(node.ops[0])](), *node.ops[1:]])
    if isinstance(node, ast.BoolOp):
        yield _with(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield node.operand
    if isinstance(node, ast.IfExp):
        yield _with(node, body=node.orelse, orelse=node.body)
    if isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield _with(node, value=not node.value)
        elif isinstance(node.value, int):
            yield _with(node, value=node.value + 1)
        elif isinstance(node.value, float):
            yield _with(node, value=node.value * 1.5 if node.value else 0.5)


def _with(node: ast.AST, **fields) -> ast.AST:
    node = copy.copy(node)
    for name, value in fields.items():
        setattr(node, name, value)
    return node


def places(tree: ast.AST, inside: tuple = ()) -> Iterator[tuple[ast.AST, str, int | None, ast.AST, str]]:
    """(parent, field, index in it, child, name of the function around) of everything that runs and says no error."""
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns", "decorator_list") or isinstance(tree, ast.Raise | ast.JoinedStr):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST):
                continue
            around = (*inside, child.name) if isinstance(child, ast.FunctionDef | ast.ClassDef) else inside
            yield tree, name, index, child, ".".join(around)
            yield from places(child, around)


def mutants(path: Path) -> list[tuple[str, str]]:
    """(what is changed, the module's source with it) for every change to a file. No two are named alike: of equal
    changes in lines that read the same, the later ones have their number.
    """
    text = path.read_text(encoding="utf-8")
    tree, lines, found, seen = ast.parse(text), text.splitlines(), [], Counter()
    for parent, field, index, child, around in places(tree):
        for other in changed(child):
            before, after = ast.unparse(child), ast.unparse(other)
            if before == after:
                continue
            _put(parent, field, index, other)
            source = ast.unparse(tree)
            _put(parent, field, index, child)
            where = f"{path.relative_to(PACK).as_posix()} {around or 'module'}"
            what = f"{where}: `{before}` → `{after}` in `{lines[child.lineno - 1].strip()}`"
            seen[what] += 1
            found.append((what if seen[what] == 1 else f"{what} ({seen[what]})", source))
    return found


def _put(parent: ast.AST, field: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def tests_of(path: Path) -> list[str]:
    """The files of quick tests that name the module, the one of its own name first."""
    if path.parent.name == "patches":
        return [str(PACK / "tests" / "patches" / f"{name}.py") for name in PATCHES[path.stem]]
    quick = [test for room in ("techniques", "formats") for test in sorted((PACK / "tests" / room).glob("test_*.py"))]
    named = [test for test in quick if path.stem in test.read_text(encoding="utf-8")]
    return [str(test) for test in sorted(named, key=lambda test: test.stem != f"test_{path.stem}")]


def survives(path: Path, source: str, seconds: float) -> bool | None:
    """In a copy of this process, which has imported what takes long. Whether all tests pass with that source; None when
    they took longer than that.
    """
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        os._exit(_run(path, source))
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def limit(path: Path) -> float:
    """Seconds that a change to the file may take. Raises SystemExit where its tests fail as it is."""
    started = time.monotonic()
    if not survives(path, ast.unparse(ast.parse(path.read_text(encoding="utf-8"))), LONGEST):
        raise SystemExit(f"error: the tests of {path} fail as it is; mend them first.")
    return SECONDS + 3 * (time.monotonic() - started)


def _run(path: Path, source: str) -> int:
    import pytest

    plain = importlib.machinery.SourceFileLoader.get_code

    def get_code(loader, name):
        if loader.path == str(path):
            return compile(source, loader.path, "exec")
        return plain(loader, name)

    importlib.machinery.SourceFileLoader.get_code = get_code
    options = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
    return int(pytest.main([*options, *tests_of(path)]))


def judged(names: set[str], complete: bool) -> set[str]:
    """The changes among `names` that docs/mutants.md explains. complete: whether they are all that there are, so that
    an entry for none of them is an old one.
    """
    page = (PACK / "docs" / "mutants.md").read_text(encoding="utf-8")
    entries = [line[2:] for line in page.splitlines() if line.startswith("- ")]
    found = {entry: next((name for name in names if entry.startswith(f"{name} — ")), None) for entry in entries}
    if complete and None in found.values():
        old = next(entry for entry, name in found.items() if name is None)
        raise SystemExit(f"error: docs/mutants.md explains a change that does not exist: {old}")
    return {name for name in found.values() if name is not None}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="*", type=Path, help="files to change; all when there is none")
    parser.add_argument("--count", type=int, default=200, help="changes that are tried")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="changes that are tried at the same time")
    options = parser.parse_args()
    paths = [path.resolve() for path in options.file] or files()
    everything = [(path, *mutant) for path in paths for mutant in mutants(path)]
    sample = random.Random(options.seed).sample(everything, min(options.count, len(everything)))
    known = judged({what for _, what, _ in everything}, complete=not options.file)
    sample = [entry for entry in sample if entry[1] not in known]
    _import_what_takes_long(any(path.parent.name == "patches" for path, *_ in sample))
    started, survivors = time.monotonic(), []
    with ThreadPoolExecutor(options.jobs) as pool:
        paths = sorted({path for path, *_ in sample})
        limits = dict(zip(paths, pool.map(limit, paths), strict=True))
        alive = pool.map(lambda entry: survives(entry[0], entry[2], limits[entry[0]]), sample)
        for (_, what, _), passed in zip(sample, alive, strict=True):
            if passed:
                survivors.append(what)
            if passed is not False:
                print(f"{'survives' if passed else 'noticed, since it takes too long'}: {what}", flush=True)
    noticed = 1 - len(survivors) / max(1, len(sample))
    print(f"{len(sample)} of {len(everything)} changes, {noticed:.1%} noticed, {time.monotonic() - started:.0f} s")
    return int(noticed < WANTED)


def _import_what_takes_long(patches: bool) -> None:
    os.chdir(PACK)
    import hypothesis  # noqa: F401
    import psd_tools  # noqa: F401
    import pytest  # noqa: F401
    import scipy.ndimage  # noqa: F401
    import skimage.metrics  # noqa: F401
    import torch

    torch.set_num_threads(1)
    if patches:
        import host

        sys.path.insert(0, str(host.find_or_install().root))
        from comfy.cli_args import args

        args.cpu = True
        import comfy.sd  # noqa: F401


if __name__ == "__main__":
    sys.exit(main())
