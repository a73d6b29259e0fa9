"""tools/gpu.py where there is no card: what it says, and its code at reduced width."""

import subprocess
import sys

import host
import pytest
import torch


def gpu(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, host.PACK / "tools" / "gpu.py", *arguments], capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_so_and_fails():
    done = gpu()
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: PyTorch finds no CUDA card here; run it where there is one, or with --small")


def test_every_run_is_measured_at_reduced_width():
    done = gpu("--small", "--part", "runs")
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    titles = [title.strip() for title, *_ in rows]
    for wanted in ("SDXL, LayerFusion", "SDXL, a step of FeatGLaC", "LayerFusion", "BFS pairs"):
        assert any(wanted in title for title in titles), wanted
    assert len(titles) == len(set(titles)) == 8 and all(float(seconds) > 0 for _, seconds, _ in rows)
