"""Do the tests notice a wrong result? A fixed sample of changes to the code, one at a time, against its tests.

    python tools/host.py exec tools/mutants.py
    python tools/host.py exec tools/mutants.py techniques/depth.py --count 40 --seed 3

A change is another operator, comparison, number or condition in techniques/, formats/ and the parts of patches/ that
need no sampling. The tests that enter the changed function run, and where these notice nothing, all that name the
file. What no test notices is a survivor. docs/mutants.md lists those that change no behaviour, and why;
they do not count. Each entry is for one place, which it names by its line of source: an equal change elsewhere in the
function still counts. Ends with status 1 when less than 97 % are noticed.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import copy
import importlib.machinery
import inspect
import json
import os
import random
import signal
import sys
import tempfile
import time
import types
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent
# Tests in tests/patches take long, so only those of these files are tried.
PATCHES = {
    "layer_files": ["test_transparency_files"],
    "layer_prompts": ["test_shared_layers", "test_fusion", "test_language_prompts"],
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


def mutants(path: Path) -> list[tuple[str, str, str]]:
    """(what is changed, the function around, the module's source with it) for every change to a file. No two are named
    alike: of equal changes in lines that read the same, the later ones have their number.
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
            found.append((what if seen[what] == 1 else f"{what} ({seen[what]})", around, source))
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


def survivors(path: Path, changes: list[tuple[str, str, str]]) -> Iterator[tuple[str, bool | None]]:
    """What is changed, and whether all tests pass all the same; None when they take too long. Raises SystemExit where
    the tests fail as they are.
    """
    with tempfile.NamedTemporaryFile() as file:
        session = Session(path, changes, Path(file.name))
        _forked(session.run, LONGEST + len(changes) * LONGEST)
        found = json.loads(Path(file.name).read_text() or "null")
    if found is None:
        raise SystemExit(f"error: the tests of {path} fail as it is; mend them first.")
    for (what, _, source), passed in zip(changes, found["passed"], strict=True):
        # What no test of the function notices may show elsewhere: in what is made while modules are imported.
        yield what, survives(path, source, found["seconds"]) if passed else passed


def survives(path: Path, source: str, seconds: float) -> bool | None:
    """Whether all tests pass with that source, in a copy of this process, which has imported what takes long; None when
    they took longer than that.
    """
    return _forked(lambda: _pytest(path, source), seconds)


def _forked(run: Callable[[], int], seconds: float) -> bool | None:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            null = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(null, stream)
            if torch := sys.modules.get("torch"):  # its thread pool anew, before two threads of a test do it at once
                torch.set_num_threads(torch.get_num_threads())
            status = run()
        finally:
            os._exit(status)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _pytest(path: Path, source: str, *plugins) -> int:
    import pytest

    plain = importlib.machinery.SourceFileLoader.get_code

    def get_code(loader, name):
        if loader.path == str(path):
            return compile(source, loader.path, "exec")
        return plain(loader, name)

    importlib.machinery.SourceFileLoader.get_code = get_code
    options = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
    return int(pytest.main([*options, *tests_of(path)], plugins=plugins))


class Session:
    """A plugin of pytest. It collects a file's tests once, sees which of them enter which function, and runs those that
    enter the changed one, in a copy of the process for each change.
    """

    def __init__(self, path: Path, changes: list[tuple[str, str, str]], file: Path):
        self.path, self.changes, self.file = path, changes, file
        self.test, self.failed = "", False
        self.entering: dict[str, set[str]] = defaultdict(set)

    def run(self) -> int:
        builtins.entered = lambda function: self.entering[function].add(self.test)
        return _pytest(self.path, telling(self.path), self)

    def pytest_runtest_logreport(self, report) -> None:
        self.failed |= report.failed

    def pytest_runtestloop(self, session) -> bool:
        started = time.monotonic()
        if not session.testsfailed and _forked(lambda: self._first(session.items), LONGEST):
            entering = json.loads(self.file.read_text())
            seconds = SECONDS + 3 * (time.monotonic() - started)
            passed = []
            for _, around, source in self.changes:
                names = entering.get(around, [""])
                items = [item for item in session.items if item.nodeid in names]
                alone = "" not in names  # else modules use the function, or run the line, while they are imported
                passed.append(_forked(partial(self._changed, items, around, source), seconds) if alone else True)
            self.file.write_text(json.dumps({"seconds": seconds, "passed": passed}))
        else:
            self.file.write_text("")
        return True

    def _first(self, items: list) -> int:
        status = self._tests(items)
        self.file.write_text(json.dumps({name: sorted(tests) for name, tests in self.entering.items()}))
        return status

    def _changed(self, items: list, around: str, source: str) -> int:
        old = sys.modules[f"strata.{self.path.parent.name}.{self.path.stem}"]
        new = types.SimpleNamespace(**vars(old))
        exec(compile(source, str(self.path), "exec"), vars(new))
        for name in around.split("."):
            if isinstance(old, types.FunctionType):  # one in it is changed with it
                break
            old, new = (inspect.unwrap(vars(within)[name]) for within in (old, new))
        if not isinstance(old, types.FunctionType):  # a property, say
            return 0
        for part in ("__code__", "__defaults__", "__kwdefaults__"):
            setattr(old, part, getattr(new, part))
        return self._tests(items)

    def _tests(self, items: list) -> int:
        for item, following in zip(items, [*items[1:], None], strict=True):
            self.test = item.nodeid
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.failed:
                return 1
        return 0


def telling(path: Path) -> str:
    """The module's source with a call of `entered` at the beginning of every function."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for *_, child, around in list(places(tree)):
        if isinstance(child, ast.FunctionDef):
            child.body.insert(0, ast.parse(f"entered({around!r})").body[0])
    return ast.unparse(tree)


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
    known = judged({what for _, what, *_ in everything}, complete=not options.file)
    sample = [entry for entry in sample if entry[1] not in known]
    _import_what_takes_long(any(path.parent.name == "patches" for path, *_ in sample))
    started, alive = time.monotonic(), 0
    changes: dict[Path, list[tuple[str, str, str]]] = defaultdict(list)
    for path, *change in sample:
        changes[path].append(tuple(change))
    with ThreadPoolExecutor(options.jobs) as pool:
        for found in pool.map(lambda entry: list(survivors(*entry)), changes.items()):
            for what, passed in found:
                alive += passed is True
                if passed is not False:
                    print(f"{'survives' if passed else 'noticed, since it takes too long'}: {what}", flush=True)
    noticed = 1 - alive / max(1, len(sample))
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
