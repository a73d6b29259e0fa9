"""Write PAPERS.md: paper, equation, function, tests, nodes and workflows, and where the code differs from the paper.

    python tools/host.py exec tools/papers.py [--check]

Equations and differences are the `Source:` and `Differs:` lines of docstrings. Tests, nodes and workflows are what
tools/record_calls.py saw running and left in docs/calls.json. --check writes nothing and fails when PAPERS.md is stale,
a technique or a training loss has no Source line, no recorded test calls a function that has one, or the record names
something that is not there any more.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent
RECORD = "docs/calls.json"
ROOMS = ("techniques", "networks", "training", "patches", "nodes")  # where Source lines are read
PAPERS = {
    "deglad": "DeGLaD: depth-guided layer decomposition (Zero-shot depth-aware image editing, ICCV 2025)",
    "featglac": "FeatGLaC: feature-guided layer composition (Zero-shot depth-aware image editing, ICCV 2025)",
    "layerfusion": "LayerFusion (arXiv 2412.04460)",
    "dreamlayer": "DreamLayer (arXiv 2503.12838, ICCV 2025)",
    "layeringdiff": "LayeringDiff (arXiv 2501.01197)",
    "bfs": "BFS: back-to-front layered image synthesis",
    "layerdiffuse": "LayerDiffuse (arXiv 2402.17113)",
    "ddpm": "DDPM (arXiv 2006.11239)",
    "ddim": "DDIM (arXiv 2010.02502)",
    "cfg": "Classifier-free guidance (arXiv 2207.12598)",
    "nulltext": "Null-text inversion (arXiv 2211.09794)",
    "flux": "FLUX.1 (Black Forest Labs, published code)",
    "alphavae": "AlphaVAE (arXiv 2507.09308)",
    "minsnr": "Min-SNR weighting (arXiv 2303.09556)",
    "depthanything": "Depth Anything V2 (arXiv 2406.09414)",
    "ssim": "SSIM (Wang et al. 2004, Image quality assessment)",
    "matting": "Alpha matting benchmark (Rhemann et al., CVPR 2009)",
    "layerd": "LayerD (Suzuki et al., ICCV 2025)",
    "immerkaer": "Fast noise variance estimation (Immerkaer 1996)",
    "sigmafilter": "The sigma filter (Lee 1983, Digital image smoothing and the sigma filter)",
    "fid": "FID (arXiv 1706.08500)",
    "kid": "KID (arXiv 1801.01401)",
    "w3c": "W3C Compositing and Blending Level 1",
    "ours": "Ours",
}
HEAD = """# From paper to code

Written by `tools/papers.py` from the `Source:` and `Differs:` lines of docstrings and from docs/calls.json, which
`make figures` records; do not edit.

- tests: the recorded test files in which the function was called (a class: its `forward` or `execute`).
- nodes: those in whose `execute` it ran, in a test or a workflow, and those that had put it into the model of a
  workflow: ComfyUI's code called a file of patches/ that the node's `execute` had used, and the function was called no
  more with the node's *strength* at 0.
- workflows: those that ran it. Graphs for Stable Diffusion 1.5, 2.1 and XL need weights that were not there when this
  was recorded, so they have not run and are not listed. A name in brackets is a run of `make demo` with settings.
"""


@dataclass(frozen=True)
class Entry:
    """A function or class. sources: (paper, where in it)."""

    path: str
    name: str
    sources: tuple[tuple[str, str], ...]
    differs: tuple[str, ...]

    @property
    def key(self) -> str:
        return f"{self.path}:{self.name}"


def definitions():
    """(path, node) of every public function and class at the top of the rooms' modules."""
    for room in ROOMS:
        for path in sorted((PACK / room).rglob("*.py")):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                    yield path.relative_to(PACK).as_posix(), node


def needs_source(path: str, node: ast.AST) -> bool:
    is_loss = path.startswith("training/") and node.name in ("loss_of", "losses")
    return isinstance(node, ast.FunctionDef) and (path.startswith("techniques/") or is_loss)


def read_entries() -> tuple[list[Entry], list[str]]:
    """Whatever has a Source line, and what is wrong with the others."""
    found, wrong = [], []
    for path, node in definitions():
        lines = re.findall(
            r"^(Source|Differs):\s*(.+?)(?=\n\s*\n|\n(?:Source|Differs):|\Z)",
            ast.get_docstring(node) or "",
            re.S | re.M,
        )
        lines = [(kind, " ".join(text.split()).rstrip(".")) for kind, text in lines]
        sources = tuple(tuple(text.split(", ", 1)) for kind, text in lines if kind == "Source")
        differs = tuple(text for kind, text in lines if kind == "Differs")
        if any(len(source) < 2 or source[0] not in PAPERS for source in sources) or (
            not sources and (differs or needs_source(path, node))
        ):
            wrong.append(
                f"{path}: {node.name} needs a docstring line 'Source: <paper>, <equation or reason>', the paper one of "
                f"{', '.join(PAPERS)}"
            )
        elif sources:
            found.append(Entry(path, node.name, sources, differs))
    return found, wrong


def node_ids() -> dict[str, str]:
    """`nodes/depth.py:SliceByDepth` -> Strata_SliceByDepth."""
    found = {}
    for path, node in definitions():
        if path.startswith("nodes/") and (id := re.search(r"node_id='(\w+)'", ast.unparse(node))):
            found[f"{path}:{node.name}"] = id[1]
    return found


def read_record() -> dict:
    """{"tests": {file: {function: nodes}}, "workflows": {run: {function: nodes}}}; a run is a workflow's file, with
    other settings also their name.
    """
    path = PACK / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"tests": {}, "workflows": {}}


def gone(record: dict, entries: list[Entry]) -> list[str]:
    """Names of the record that are not there any more."""
    known = {entry.key for entry in entries} | set(node_ids().values())
    named = {
        name
        for calls in [*record["tests"].values(), *record["workflows"].values()]
        for function, nodes in calls.items()
        for name in (function, *nodes)
    }
    files = {file_of(kind, name) for kind, entries in record.items() for name in entries}
    return sorted(named - known) + sorted(file for file in files if not (PACK / file).exists())


def file_of(kind: str, name: str) -> str:
    """The path of a test file or of the workflow of a run."""
    return name if kind == "tests" else f"workflows/{name.split(',')[0]}"


def page() -> tuple[str, list[str]]:
    entries, wrong = read_entries()
    record = read_record()
    wrong += [
        f"{RECORD}: {name} is not there any more; {again('<tests and workflows with it>')}"
        for name in gone(record, entries)
    ]
    tested = {name for calls in record["tests"].values() for name in calls}
    wrong += [
        f"{entry.path}: no recorded test calls {entry.name}; {again('tests/<the file that does>')}"
        for entry in entries
        if entry.key not in tested
    ]
    lines = [HEAD]
    for paper, title in PAPERS.items():
        own = [(where, entry.name, entry) for entry in entries for key, where in entry.sources if key == paper]
        own.sort(key=lambda row: (numbered(row[0]), row[1], row[2].path))
        if not own:
            continue
        lines += [f"## {title}", "", "| where | function | tests | nodes | workflows |", "|---|---|---|---|---|"]
        for where, name, entry in own:
            columns = [sorted(column) for column in columns_of(record, entry.key)]
            cells = [where, f"[`{name}`]({entry.path})", *(", ".join(map(_bracketed, column)) for column in columns)]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        # A function of several papers differs from the first.
        first = [entry for _, _, entry in own if entry.sources[0][0] == paper]
        differs = [f"- `{entry.name}`: {text}." for entry in first for text in entry.differs]
        lines += ["", "Differs:", "", *differs, ""] if differs else [""]
    return "\n".join(lines), wrong


def _bracketed(name: str) -> str:
    """A run with settings, as docs/calls.json has it: file, then its name."""
    file, _, run = name.partition(", ")
    return f"{file} ({run})" if run else file


def numbered(text: str) -> list:
    """A key that sorts Eq. 2 before Eq. 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", text)]


def columns_of(record: dict, function: str) -> tuple[set[str], set[str], set[str]]:
    """Tests, nodes and workflows of a function."""
    tests = {file for file, calls in record["tests"].items() if function in calls}
    runs = {run for run, calls in record["workflows"].items() if function in calls}
    nodes = {
        node for calls in [*record["tests"].values(), *record["workflows"].values()] for node in calls.get(function, ())
    }
    return tests, nodes, runs


def again(what: str) -> str:
    return f"record again: python tools/host.py exec tools/record_calls.py {what}"


def main() -> int:
    text, wrong = page()
    target = PACK / "PAPERS.md"
    if "--check" not in sys.argv:
        target.write_text(text, encoding="utf-8")
    elif not target.exists() or target.read_text(encoding="utf-8") != text:
        wrong.append("PAPERS.md is stale: run `python tools/host.py exec tools/papers.py`")
    print("\n".join(wrong), file=sys.stderr, end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
