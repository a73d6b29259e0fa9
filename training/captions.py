"""Captions as what text encoders make of them, kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

AT_ONCE = 8


class Captions:
    """Arrays of what text encoders make of captions, encoded once and kept on disk in fp16; the encoders are needed
    only then.

    shapes: of one caption's arrays, by their kinds. known: JSON values that change with whatever changes the arrays.
    encode(captions, arrays): fills arrays [N,...] of these kinds.
    """

    def __init__(
        self,
        folder: Path,
        captions: list[str],
        shapes: dict[str, tuple[int, ...]],
        known: list,
        encode: Callable[[list[str], dict[str, np.memmap]], None],
    ):
        from accelerate import PartialState

        unique = sorted({"", *captions})
        self.rows = {caption: row for row, caption in enumerate(unique)}
        digest = hashlib.sha256(json.dumps([unique, *known]).encode()).hexdigest()[:10]
        shapes = {kind: (len(unique), *shape) for kind, shape in shapes.items()}
        paths = {kind: folder / f"captions-{digest}.{kind}" for kind in shapes}
        with PartialState().main_process_first():
            if not all(path.exists() for path in paths.values()):
                folder.mkdir(parents=True, exist_ok=True)
                partial = {kind: path.with_name(path.name + ".partial") for kind, path in paths.items()}
                arrays = {kind: np.memmap(partial[kind], np.float16, "w+", shape=shapes[kind]) for kind in shapes}
                encode(unique, arrays)
                for kind, values in arrays.items():
                    values.flush()
                    partial[kind].replace(paths[kind])
        self.values = [np.memmap(paths[kind], np.float16, "r", shape=shapes[kind]) for kind in shapes]

    def __call__(self, prompts: list[str]) -> tuple[Tensor, ...]:
        """[B,...] of each kind, in float32."""
        rows = [self.rows[prompt] for prompt in prompts]
        return tuple(torch.from_numpy(values[rows]).float() for values in self.values)


@torch.no_grad()
def fill(arrays: list[np.ndarray], network: nn.Module, ids: Tensor, device: torch.device, take: Callable) -> None:
    """Fills arrays [N,...] with take(network, rows), as many tensors, for rows of tokens [N,T], a few at a time."""
    network = network.to(device, torch.float32 if device.type == "cpu" else torch.bfloat16).eval()
    for start in range(0, len(ids), AT_ONCE):
        part = ids[start : start + AT_ONCE].to(device)
        for values, made in zip(arrays, take(network, part), strict=True):
            values[start : start + len(part)] = made.float().cpu().numpy()
    network.to("cpu")
    if device.type == "cuda":
        torch.cuda.empty_cache()
