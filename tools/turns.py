"""Methods of doing the same, measured in turns: each has a process of its own, so that neither memory nor caches of one
help the other.

The parent computes with one thread until then, since threads do not survive a fork; the processes use all that torch
would.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

TURNS = 5
THREADS = torch.get_num_threads()
torch.set_num_threads(1)


@dataclass(frozen=True)
class Measured:
    """seconds: of each turn; gib: the most memory beyond what the process held before its first run; result: what the
    first run returned, where asked for.
    """

    seconds: list[float]
    gib: float
    result: object


def in_turns(*methods: Callable[[], object], results: bool = False) -> list[Measured]:
    """Each once to warm up, then TURNS times one behind the other, so that other work on the machine slows a turn of
    all of them down.

    A method that returns a float has measured its own seconds. With CUDA all run in this process, and memory is the
    card's.
    """
    global _methods, _results
    _methods, _results = methods, results
    if torch.cuda.is_available():
        first = [_warm_up(number) for number in range(len(methods))]
        turns = [[_once(number) for number in range(len(methods))] for _ in range(TURNS)]
    else:
        with ExitStack() as stack:
            fork = multiprocessing.get_context("fork")
            workers = [stack.enter_context(fork.Pool(1, torch.set_num_threads, (THREADS,))) for _ in methods]
            first = [worker.apply(_warm_up, (number,)) for number, worker in enumerate(workers)]
            turns = [[worker.apply(_once, (number,)) for number, worker in enumerate(workers)] for _ in range(TURNS)]
    return [
        Measured([seconds for seconds, _ in own], max(gib for _, gib in own), result)
        for own, result in zip(zip(*turns, strict=True), first, strict=True)
    ]


def compared(name: str, ours: Callable[[], object], plain: Callable[[], object]) -> Iterator[tuple]:
    """Rows of a bench for one pair of ways."""
    return rows_of(name, *in_turns(ours, plain))


def rows_of(name: str, ours: Measured, plain: Measured) -> Iterator[tuple]:
    """(what, ours, plain, ratio of the fastest turns, ratio of the median turns), and the same for memory, whose ratio
    is one.
    """
    yield (
        name,
        *(min(one.seconds) for one in (ours, plain)),
        *(take(ours.seconds) / take(plain.seconds) for take in (min, statistics.median)),
    )
    ratio = ours.gib / max(plain.gib, 1e-9)
    yield f"{name}: peak memory in GiB", ours.gib, plain.gib, ratio, ratio


def now() -> float:
    """Seconds, when the graphics card has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _warm_up(number: int) -> object:
    global _held
    _held = _kibibytes("VmRSS")
    result = _methods[number]()
    return result if _results else None


def _once(number: int) -> tuple[float, float]:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
    start = now()
    found = _methods[number]()
    seconds = found if isinstance(found, float) else now() - start
    if torch.cuda.is_available():
        return seconds, (torch.cuda.max_memory_allocated() - held) / 2**30
    return seconds, (_kibibytes("VmHWM") - _held) / 2**20


def _kibibytes(name: str) -> int:
    return next(
        int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)
    )
