"""Time and memory of the pack against plain ways of doing the same, side by side in one run.

make bench            # every bench
make bench ARGS=depth # those whose name contains "depth"
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import host


def import_seconds() -> str:
    """The pack's line in ComfyUI's own report of import times."""
    with tempfile.TemporaryDirectory() as base, host.Server(host.find_or_install(), Path(base)) as server:
        return re.search(r"([\d.]+) seconds: .*" + host.PACK_NAME, server.log.read_text())[1]


def table(name: str) -> None:
    module = importlib.import_module(name)
    print(
        f"\n{module.__doc__.strip().splitlines()[0]}\n| what, seconds of the fastest turn unless it says otherwise | "
        "ours | plain | "
        "ratio | ratio of medians |\n|---|---|---|---|---|",
        flush=True,
    )
    for what, *figures in module.rows():
        print(f"| {what} | " + " | ".join(f"{figure:.2f}" for figure in figures) + " |", flush=True)


def main() -> int:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    names = [path.stem for path in sorted(Path(__file__).parent.glob(f"bench_*{wanted}*.py"))]
    if len(names) == 1:
        table(names[0])
        return 0
    for name in names:  # each in a process of its own, since ComfyUI reads its options once
        subprocess.run([sys.executable, __file__, name.removeprefix("bench_")], check=True)
    if not wanted:
        print(f"\nImport of the pack, as ComfyUI reports it: {import_seconds()} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
