"""Record which tests, nodes and workflows run the functions that PAPERS.md lists, into docs/calls.json.

    python tools/host.py exec tools/record_calls.py                              # everything, over an hour
    python tools/host.py exec tools/record_calls.py tests/techniques workflows/mini_inpaint.json

A test file or workflow that is recorded anew replaces its own entries, all others stay; then PAPERS.md is written.

Tests run in pytest with this file as a plugin, workflows in a ComfyUI that this file starts, and so does whatever the
tests ask a ComfyUI for. In each of these processes a Recorder sees every call. Nothing of it is in the pack.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import inspect
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
sys.path.insert(0, str(TOOLS))

import papers  # noqa: E402

TESTS = ("tests/techniques", "tests/formats", "tests/patches", "tests/training", "tests/scenes", "tests/server")
CALLED = ("", "execute", "forward")  # a function itself, or these methods of a class


@functools.cache
def pack_path(filename: str) -> str | None:
    """`techniques/fusion.py`, for a file in one of the rooms whose functions are listed."""
    path = Path(os.path.realpath(filename))
    name = path.relative_to(papers.PACK).as_posix() if path.is_relative_to(papers.PACK) else ""
    return name if name.split("/")[0] in papers.ROOMS else None


class Recorder:
    """A trace function. It tells `note` of every call of a listed function: its name, the nodes that are executing, and
    the nodes that had put it into the model, whose execute has used a file of patches/ that ComfyUI now calls into.

    prompt: gives the name of the prompt that runs.
    """

    def __init__(
        self, note: Callable[[str, set[str], set[str]], None], prompt: Callable[[], str | None] = lambda: None
    ):
        self.note, self.prompt = note, prompt
        self.listed, self.ids = {entry.key for entry in papers.read_entries()[0]}, papers.node_ids()
        self.users: dict[tuple, set[str]] = {}  # (prompt, file of patches/) -> nodes whose execute has called the file

    def start(self) -> None:
        threading.settrace(self)
        sys.settrace(self)

    def stop(self) -> None:
        threading.settrace(None)
        sys.settrace(None)

    def __call__(self, frame, event: str, argument) -> None:
        code, path = frame.f_code, pack_path(frame.f_code.co_filename)
        if path is None or not code.co_flags & inspect.CO_OPTIMIZED:  # bodies of classes and modules have no such flag
            return
        name, _, method = code.co_qualname.partition(".")
        listed, patch = method in CALLED and f"{path}:{name}" in self.listed, path.startswith("patches/")
        if not (listed or patch):
            return
        executing, entered = self.around(frame)
        if patch and not entered:
            self.users.setdefault((self.prompt(), path), set()).update(executing)
        if listed:
            patched = set().union(*(self.users.get((self.prompt(), file), ()) for file in entered))
            self.note(f"{path}:{name}", executing, patched - executing)

    def around(self, frame) -> tuple[set[str], set[str]]:
        """The nodes whose execute is on the stack, and the files of patches/ on it that others than the pack called."""
        executing, entered = set(), set()
        while frame is not None:
            code, path, frame = frame.f_code, pack_path(frame.f_code.co_filename) or "", frame.f_back
            if path.startswith("nodes/") and code.co_name == "execute":
                executing.add(self.ids[f"{path}:{code.co_qualname.partition('.')[0]}"])
            if path.startswith("patches/") and (frame is None or pack_path(frame.f_code.co_filename) is None):
                entered.add(path)
        return executing, entered


def merge(kind: str, found: dict[str, dict[str, set[str]]], path: Path) -> None:
    """Put {test file or run: {function: nodes}} into the record, and leave out what is not there any more."""
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"tests": {}, "workflows": {}}
    record[kind] |= found
    gone = set(papers.gone(record, papers.read_entries()[0]))
    for kind, entries in record.items():
        record[kind] = {
            name: {
                function: sorted(set(nodes) - gone) for function, nodes in sorted(calls.items()) if function not in gone
            }
            for name, calls in sorted(entries.items())
            if papers.file_of(kind, name) not in gone
        }
    text = re.sub(r"\[\s+([^]]*?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", json.dumps(record, indent=1))
    path.write_text(text + "\n", encoding="utf-8")  # a line for each function


# The workflows, in a ComfyUI of this tool


def start_comfyui(log: str, main: str, *arguments: str) -> None:
    """ComfyUI's main.py in this process. For each prompt, `log` gets a line for each call that is another than before:
    prompt, function, nodes that execute, nodes that had put it there.
    """
    written, out = set(), open(log, "a", buffering=1)  # noqa: SIM115 (open as long as the process)

    def prompt() -> str | None:
        context = get_executing_context()
        return context and context.prompt_id

    def note(function: str, executing: set[str], patched: set[str]) -> None:
        line = json.dumps([prompt(), function, sorted(executing), sorted(patched)])
        if line not in written:
            written.add(line)
            out.write(line + "\n")

    sys.argv, sys.path[:] = [main, *arguments], [path for path in sys.path if path != str(TOOLS)]
    sys.path.insert(0, str(Path(main).parent))
    from comfy_execution.utils import get_executing_context

    Recorder(note, prompt).start()
    runpy.run_path(main, run_name="__main__")


class Log:
    """What the ComfyUI processes with this log have called since the last look."""

    def __init__(self, path: Path):
        self.path, self.read = path, 0
        path.touch()

    def command(self, command: list[str]) -> list[str]:
        """A command that starts ComfyUI, so that it records."""
        python, *rest = command
        return [python, __file__, "--comfyui", str(self.path), *rest]

    def new(self) -> dict[str, tuple[set[str], set[str]]]:
        """{function: (nodes that executed, nodes that had put it there)}"""
        text, found = self.path.read_text(encoding="utf-8"), {}
        for line in text[self.read :].splitlines():
            _, function, executing, patched = json.loads(line)
            both = found.setdefault(function, (set(), set()))
            both[0].update(executing)
            both[1].update(patched)
        self.read = len(text)
        return found


@contextlib.contextmanager
def comfyui(folder: Path):
    """run.Client of a ComfyUI that records, and its Log. Without a cache every node executes in every prompt."""
    import host
    import run

    log, installed = Log(folder / "calls"), host.find_or_install()
    server = host.Server(installed, folder / "comfyui", args=("--cache-none",))
    command = log.command(server.command())
    server.command = lambda: command
    host.copy_inputs(installed, server.base)
    with server:
        yield run.Client(server.url), log


def record_workflows(chosen: list[str]) -> dict[str, dict[str, set[str]]]:
    """Run the bundled workflows that the weights here are enough for, and the demo's with other settings."""
    import demo
    import run

    found, runs = {}, [(f"{workflow}.json", name, settings) for name, workflow, settings in demo.RUNS]
    known = {file for file, _, _ in runs}
    runs += [(path.name, "", []) for path in (papers.PACK / "workflows").glob("*.json") if path.name not in known]
    with tempfile.TemporaryDirectory() as folder, comfyui(Path(folder)) as (client, log):
        for file, name, settings in sorted(runs):
            if chosen and file not in chosen or client.lacks(Path(file).stem):
                continue
            title = f"{file}, {name}" if settings else file
            prompt = client.to_api(run.read_workflow(papers.PACK / "workflows" / file))
            for setting in settings:
                run.set_input(prompt, setting, client)
            try:
                found[title] = calls_of(client, prompt, log)
                print(f"{title}: {len(found[title])} functions", flush=True)
            except run.RunError as error:
                if "not in list" not in str(error).lower():  # other than a file that ComfyUI does not have
                    raise
                print(f"{title}: not run, its weights are not here", flush=True)
    return found


def calls_of(client, prompt: dict, log: Log) -> dict[str, set[str]]:
    """{function: nodes} of a prompt. A node with a strength that has put something into the model counts only for what
    it does not call at strength 0.
    """
    import run

    log.new()
    client.run(prompt)
    called = log.new()
    for kind in sorted(set().union(*(patched for _, patched in called.values()))):
        off = {
            key: {**node, "inputs": {**node["inputs"], "strength": 0.0}}
            if node["class_type"] == kind and "strength" in node["inputs"]
            else node
            for key, node in prompt.items()
        }
        if off != prompt:
            try:
                client.run(off)
            except run.RunError:  # a sampler refuses a model without it, so that all of it counts
                log.new()
                continue
            for function, (_, patched) in log.new().items():
                if kind in patched and function in called:
                    called[function][1].discard(kind)
    return {function: executing | patched for function, (executing, patched) in called.items()}


# The tests, as a plugin of pytest


def pytest_addoption(parser) -> None:
    parser.addoption("--calls", type=Path, default=papers.PACK / papers.RECORD, help="file to record calls into")


def pytest_configure(config) -> None:
    config.pluginmanager.register(Plugin(config.getoption("calls")))


class Plugin:
    """Records per test file; a file with a failed test is left as it was."""

    def __init__(self, path: Path):
        import host

        self.path, self.folder, self.recorder = path, tempfile.TemporaryDirectory(), Recorder(self.note)
        self.found, self.failed, self.current = {}, set(), {}
        log, command = Log(Path(self.folder.name) / "calls"), host.Server.command
        host.Server.command, self.log = lambda server: log.command(command(server)), log

    def note(self, function: str, executing: set[str], patched: set[str]) -> None:
        self.current.setdefault(function, set()).update(executing)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.current = self.found.setdefault(nodeid.split("::")[0], {})
        self.recorder.start()

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self.failed.add(report.nodeid.split("::")[0])

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.recorder.stop()
        for function, (executing, patched) in self.log.new().items():
            self.note(function, executing, patched)

    def pytest_sessionfinish(self) -> None:
        merge("tests", {file: calls for file, calls in self.found.items() if file not in self.failed}, self.path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", help="tests and workflows; all when none is given")
    paths = parser.parse_args().paths
    workflows = [Path(path).name for path in paths if path.endswith(".json")]
    tests = [path for path in paths if not path.endswith(".json")] if paths else TESTS
    if workflows or not paths:
        merge("workflows", record_workflows(workflows), papers.PACK / papers.RECORD)
    failed = 0
    if tests:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "record_calls", *tests]
        failed = subprocess.call(command, cwd=papers.PACK, env={**os.environ, "PYTHONPATH": str(TOOLS)})
    (papers.PACK / "PAPERS.md").write_text(papers.page()[0], encoding="utf-8")
    return failed


if __name__ == "__main__":
    if sys.argv[1:2] == ["--comfyui"]:
        start_comfyui(*sys.argv[2:])
    else:
        sys.exit(main())
