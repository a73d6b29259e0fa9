"""Every number of README and docs about the shipped mini family, from seeds: `make figures`, or `make figures
ARGS=layers` for some of them.

Settings were chosen on seeds below 1000 (TUNING). What is told is measured on seeds from 1000 on (REPORTED), which
nobody looks at while tuning: change nothing after having seen them. docs/figures.json keeps mean, standard deviation
and number of each figure, docs/figures.md shows them with their standard errors and the differences of methods seed by
seed. `make test` measures a small sample of the tuning seeds again, see check.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np

PACK = Path(__file__).resolve().parent.parent
TABLE, PAGE = PACK / "docs" / "figures.json", PACK / "docs" / "figures.md"
TUNING, REPORTED = range(1000), 1000
ERRORS = 4  # standard errors by which a sample may be off
SMALLEST = 0.01  # for figures that were the same on every seed: rounding on another processor


def sample(module) -> range:
    return TUNING[: module.SAMPLE]


def summary(values) -> dict[str, float]:
    """Mean, standard deviation and number of those that are not nan."""
    values = np.asarray(values, float)
    values = values[~np.isnan(values)]
    return {
        "mean": float(values.mean()),
        "deviation": float(values.std(ddof=1)) if len(values) > 1 else 0.0,
        "count": len(values),
    }


def error(found: dict[str, float]) -> float:
    return found["deviation"] / math.sqrt(found["count"])


def check(name: str, measured: dict[str, dict[str, list[float]]]) -> None:
    """Raise AssertionError for a figure whose sample is off the table's mean by more than 4 standard errors of the two
    together.
    """
    table = json.loads(TABLE.read_text())[name]["figures"]
    for column, figures in measured.items():
        for figure, values in figures.items():
            kept, now = table[column][figure], summary(values)
            if not now["count"]:  # not told by these seeds
                continue
            room = ERRORS * math.hypot(error(kept), kept["deviation"] / math.sqrt(now["count"])) + SMALLEST
            assert abs(now["mean"] - kept["mean"]) <= room, (
                f"{name}, {column}, {figure}: {now['mean']:.4f}, and the table has {kept['mean']:.4f} ± {room:.4f}"
            )


def run(name: str, count: int | None) -> None:
    module = importlib.import_module(f"figures_{name}")
    first = getattr(module, "FROM", REPORTED)
    seeds = range(first, first + (count or module.COUNT))
    measured = module.measure(seeds)
    entry = {
        "seeds": [seeds.start, seeds.stop - 1],
        "figures": {
            column: {figure: summary(values) for figure, values in figures.items()}
            for column, figures in measured.items()
        },
        "differences": [
            {
                "of": first,
                "from": second,
                "figure": figure,
                **summary(np.subtract(measured[first][figure], measured[second][figure])),
            }
            for first, second, figure in module.CLAIMS
        ],
    }
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    table[name] = entry
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
    PAGE.write_text(page(table))


def page(table: dict) -> str:
    lines = [
        "# Figures of the mini family",
        "",
        "Written by `make figures` from docs/figures.json; do not edit. Mean ± standard error.",
        f"Settings were chosen on seeds below {REPORTED}, these are of seeds that nobody looked at before.",
    ]
    for name, entry in sorted(table.items()):
        columns = list(entry["figures"])
        lines += [
            "",
            f"## {name}",
            "",
            f"Seeds {entry['seeds'][0]} to {entry['seeds'][1]}.",
            "",
            "| figure | " + " | ".join(columns) + " |",
            "|---" * (len(columns) + 1) + "|",
        ]
        for figure in dict.fromkeys(figure for column in columns for figure in entry["figures"][column]):
            lines.append(
                f"| {figure} | " + " | ".join(shown(entry["figures"][column].get(figure)) for column in columns) + " |"
            )
        if entry["differences"]:
            lines += ["", "| difference, seed by seed | figure | mean ± standard error | pairs |", "|---|---|---|---|"]
            lines += [
                f"| {one['of']} minus {one['from']} | {one['figure']} | {shown(one)} | {one['count']} |"
                for one in entry["differences"]
            ]
    return "\n".join(lines) + "\n"


def shown(found: dict[str, float] | None) -> str:
    """A dash for a figure that a column does not have."""
    return "–" if found is None else f"{found['mean']:.3f} ± {error(found):.3f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="which: " + ", ".join(names()))
    parser.add_argument("--count", type=int, help="number of seeds (the shipped tables have each measure's own number)")
    options = parser.parse_args()
    if len(options.names) == 1:
        prepare()
        run(options.names[0], options.count)
        return 0
    for name in options.names or names():  # each in a process of its own, so that a long one leaves nothing to the next
        subprocess.run(
            [sys.executable, __file__, name, *(["--count", str(options.count)] if options.count else [])], check=True
        )
    return 0


def names() -> list[str]:
    return sorted(path.stem.removeprefix("figures_") for path in Path(__file__).parent.glob("figures_*.py"))


def prepare(comfyui: bool = True) -> None:
    """The pack as `strata` and ComfyUI as a library in this process, as the tests have them."""
    sys.path.insert(0, str(PACK / "tests"))
    if "strata" not in sys.modules:
        import conftest  # noqa: F401
    if comfyui and "comfy" not in sys.modules:
        import patches.conftest  # noqa: F401


if __name__ == "__main__":
    sys.exit(main())
