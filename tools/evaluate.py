"""The papers' measures of layered images: of a folder of results, or of a workflow and the prompts that it is run with.

    python tools/host.py exec tools/evaluate.py results --truth truth
    python tools/host.py exec tools/evaluate.py results --run workflow.json --prompts prompts.txt
        --set "positive.text={prompt}" --set "sampler.seed={seed}"

A sample is what lies in the folder under one name: apple.png (or .jpg, .webp) is the image, apple.psd (or .ora) its
layers from back to front, each named by its words, apple.txt the words of the whole. Image or layers may be missing.
The truth has the same names. Of an image that has no counterpart only the distances of sets (FID, KID) take notice.
truth/depths.json may give the depth that was asked for of a sample's front layer, 0 near to 1 far: {"apple": 0.4}.

Networks that judge are read from the folder evaluate of --models, by default ComfyUI's models folder. A measure whose
files are missing is left out, and what to get is told. --mini puts the mini family's classifier in their places.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import figures
import host
import judges
import run
from tqdm import tqdm


def make(workflow: Path, prompts: Path, settings: list[str], results: Path, server: str | None) -> None:
    """Run the workflow once for each line of prompts, with {prompt} and {seed} in the settings; what is there stays."""
    lines = [line.strip() for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    results.mkdir(parents=True, exist_ok=True)
    with run.connected(server) as client, tempfile.TemporaryDirectory() as folder:
        for seed, words in enumerate(tqdm(lines, unit="prompt")):
            name = f"{seed:04d}"
            if (results / f"{name}.txt").exists():  # written last
                continue
            filled = [one.replace("{prompt}", words).replace("{seed}", str(seed)) for one in settings]
            made = [Path(path) for path in run.run_file(client, workflow, filled, Path(folder) / name, False)]
            for kinds in (judges.IMAGES, judges.LAYERED):
                if found := next((path for path in made if path.suffix.lower() in kinds), None):
                    shutil.copy(found, results / (name + found.suffix.lower()))
            (results / f"{name}.txt").write_text(words, encoding="utf-8")


def page(found: dict[str, dict[str, dict[str, float]]], missing: dict[str, str]) -> str:
    columns = dict.fromkeys(column for own in found.values() for column in own)
    lines = ["Mean ± standard error (standard deviation, number).", ""]
    lines += ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [
        f"| {figure} | " + " | ".join(shown(own.get(column)) for column in columns) + " |"
        for figure, own in found.items()
    ]
    if missing:
        lines += ["", "Not measured:", ""] + [f"- {figure}: {why}" for figure, why in missing.items()]
    return "\n".join(lines) + "\n"


def shown(own: dict[str, float] | None) -> str:
    if own is None or not own["count"]:
        return "–"
    if own["count"] == 1:
        return f"{own['mean']:.4g}"
    return f"{own['mean']:.4g} ± {figures.error(own):.2g} ({own['deviation']:.3g}, {own['count']})"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder of the samples")
    parser.add_argument("--truth", type=Path, help="folder of the true ones, or of images that a set is compared with")
    parser.add_argument("--models", type=Path, help="ComfyUI's folder of models")
    parser.add_argument("--mini", action="store_true", help="the mini family's classifier judges")
    parser.add_argument("--detector", help="for FG-MIoU: a folder that Detect foreground lists")
    parser.add_argument("--segmenter", help="the same, for its masks")
    parser.add_argument("--depth", help="for the depth error: a folder that Estimate depth lists")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--run", type=Path, metavar="WORKFLOW", help="makes the results first")
    parser.add_argument("--prompts", type=Path, help="for --run: a text file, one prompt a line")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NODE.INPUT=VALUE", help="for --run, see tools/run.py"
    )
    parser.add_argument("--server", help="for --run: URL of a running ComfyUI")
    options = parser.parse_args(arguments)
    try:
        if options.run:
            if options.prompts is None:
                raise ValueError("--run needs --prompts: a text file with one prompt a line.")
            make(options.run, options.prompts, options.set, options.results, options.server)
        figures.prepare(comfyui=bool(options.detector or options.depth))
        import measures

        models = options.models or host.find_or_install().root / "models"
        networks = judges.mini() if options.mini else judges.available(models / judges.CONFIG["folder"])
        networks |= measures.own_models(models, options.detector, options.segmenter, options.depth)
        truths = measures.read(options.truth) if options.truth else ()
        asked = options.truth / "depths.json" if options.truth else None
        depths = json.loads(asked.read_text(encoding="utf-8")) if asked and asked.exists() else {}
        table = measures.measure(measures.read(options.results), truths, depths, networks)
    except (ValueError, OSError, run.RunError) as error:
        print(error, file=sys.stderr)
        return 1
    found = table.summaries()
    if options.json:
        options.json.write_text(json.dumps({"figures": found, "missing": table.missing}, indent=1) + "\n")
    print(page(found, table.missing))
    return 0


if __name__ == "__main__":
    sys.exit(main())
