"""Do the tests notice a wrong result? A fixed sample of changes to the code, one at a time, against its tests.

    python tools/host.py exec tools/mutants.py        # about half an hour on two cores
    python tools/host.py exec tools/mutants.py techniques/depth.py --count 40 --seed 3

A change is another operator, comparison, number or condition in techniques/, formats/ and the parts of patches/ that
need no sampling. What no test notices is a survivor. docs/mutants.md lists those that change no behaviour, and why;
they do not count. Ends with status 1 when less than 97 % are noticed.
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
SECONDS = 600  # of one change's tests; what hangs is noticed
WANTED = 0.97
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
    """(what is changed, the module's source with it) for every change to a file."""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), []
    for parent, field, index, child, around in places(tree):
        for other in changed(child):
            before, after = ast.unparse(child), ast.unparse(other)
            if before == after:
                continue
            _put(parent, field, index, other)
            source = ast.unparse(tree)
            _put(parent, field, index, child)
            found.append((f"{path.relative_to(PACK).as_posix()} {around or 'module'}: `{before}` → `{after}`", source))
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


def survives(path: Path, source: str) -> bool:
    """In a copy of this process, which has imported what takes long. Whether all tests pass with that source."""
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        os._exit(_run(path, source))
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


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


def judged() -> set[str]:
    """The changes that docs/mutants.md explains."""
    page = PACK / "docs" / "mutants.md"
    return {line[2:].split(" — ")[0] for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("- ")}


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
    known = judged()
    sample = [entry for entry in sample if entry[1] not in known]
    _import_what_takes_long(any(path.parent.name == "patches" for path, *_ in sample))
    started, survivors = time.monotonic(), []
    plain = [(path, ast.unparse(ast.parse(path.read_text(encoding="utf-8")))) for path in {path for path, *_ in sample}]
    with ThreadPoolExecutor(options.jobs) as pool:
        for (path, _), alive in zip(plain, pool.map(lambda entry: survives(*entry), plain), strict=True):
            if not alive:
                raise SystemExit(f"error: the tests of {path} fail as it is; mend them first.")
        for (_, what, _), alive in zip(
            sample, pool.map(lambda entry: survives(entry[0], entry[2]), sample), strict=True
        ):
            if alive:
                survivors.append(what)
                print(f"survives: {what}", flush=True)
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
