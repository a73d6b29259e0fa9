"""The loop that every trainer shares: learning rate, moving average, checkpoints that continue to the same curve, loss
table, grids.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import errno
import json
import math
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import settings
from .muon import Muon

SHOW_EVERY = 20


def adam_8bit(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW, whose moments take a quarter of the memory; PyTorch's own where that is not installed."""
    kind = torch.optim.AdamW
    if torch.cuda.is_available():
        with contextlib.suppress(ImportError):
            from bitsandbytes.optim import AdamW8bit as kind
    return kind([value for value in model.parameters() if value.requires_grad], lr=rate, weight_decay=1e-2)


OPTIMIZERS = {
    "adam_8bit": adam_8bit,
    "muon": Muon,
    "adam": lambda model, rate: torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, betas=(0.9, 0.99)),
}


def learning_rate(step: int, config: dict) -> float:
    """Linear warm-up, then half a cosine down to the final rate."""
    if step < config["warmup"]:
        return config["learning_rate"] * (step + 1) / config["warmup"]
    done = min(1.0, (step - config["warmup"]) / max(1, config["steps"] - config["warmup"]))
    low = config["final_learning_rate"]
    return low + (config["learning_rate"] - low) * 0.5 * (1 + math.cos(math.pi * done))


class Average:
    """Exponential moving average of what a model learns, and of its buffers; frozen weights are not kept twice."""

    def __init__(self, model: nn.Module, decay: float):
        frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
        state = model.state_dict().items()
        self.decay, self.state = decay, {key: value.detach().clone() for key, value in state if key not in frozen}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        own = model.state_dict()
        for key, value in self.state.items():
            if value.is_floating_point():
                value.lerp_(own[key], 1 - decay)
            else:
                value.copy_(own[key])

    def state_dict(self) -> dict:
        return self.state

    def load_state_dict(self, state: dict) -> None:
        for key, value in self.state.items():
            value.copy_(state[key])


def shared(model: nn.Module) -> dict:
    """A memo for copy.deepcopy, with which it shares the frozen weights of a model instead of copying them."""
    return {id(value): value for value in model.parameters() if not value.requires_grad}


def save_what_learns(model: nn.Module) -> None:
    """From now on the model's state, in checkpoints too, holds only what it learns; loading does not miss the rest."""
    learnt = {name for name, value in model.named_parameters() if value.requires_grad}

    def drop(model: nn.Module, state: dict, prefix: str, metadata: dict) -> None:
        for key in [key for key in state if key.startswith(prefix) and key.removeprefix(prefix) not in learnt]:
            del state[key]

    def miss(model: nn.Module, keys) -> None:
        keys.missing_keys[:] = [key for key in keys.missing_keys if key in learnt]

    model.register_state_dict_post_hook(drop)
    model.register_load_state_dict_post_hook(miss)


class Progress:
    """How far the run is; a part of the checkpoint."""

    step = 0

    def state_dict(self) -> dict:
        return {"step": self.step}

    def load_state_dict(self, state: dict) -> None:
        self.step = state["step"]


def has_fast_bf16() -> bool:
    """Whether bf16 is fast here: a processor without its instructions emulates them, many times slower than float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def fit(
    model: nn.Module,
    loss: Callable[[nn.Module, int, int], dict[str, Tensor]],
    validate: Callable[[nn.Module, int], dict[str, float]],
    config: dict,
    folder: Path,
    minutes: float | None,
    save_every: float,
) -> nn.Module:
    """Train until config["steps"]; returns the averaged model. loss(model, step, rank) gives {"loss": scalar, ...} of
    one batch; validate(averaged model, step) gives the figures of a row of metrics.csv. minutes: after how many to stop
    with a checkpoint. save_every: seconds between checkpoints.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, set_seed
    from tqdm import tqdm

    # a step of BFS's second stage moves a part of its parameters
    partly = DistributedDataParallelKwargs(find_unused_parameters=config.get("stage") == 2)
    accelerator = Accelerator(mixed_precision="bf16" if has_fast_bf16() else "no", kwargs_handlers=[partly])
    set_seed(config["seed"])
    folder.mkdir(parents=True, exist_ok=True)
    _same_config(config, folder)
    averaged = Average(model.to(accelerator.device), config["ema"])
    optimizer = OPTIMIZERS[config["optimizer"]](model, config["learning_rate"])
    model, optimizer = accelerator.prepare(model, optimizer)
    progress = Progress()
    accelerator.register_for_checkpointing(averaged, progress)
    if (folder / "last").exists():
        accelerator.load_state(str(folder / "last"))
        print(f"Going on from step {progress.step}.", flush=True)
    plain, started = accelerator.unwrap_model(model), time.monotonic()
    saved, shown, sums = started, time.monotonic(), []

    def averaged_model() -> nn.Module:
        """In float32 on every machine; what never learns is the same tensor."""
        kept = {id(value): value for name, value in plain.named_parameters() if name not in averaged.state}
        twin = accelerator.unwrap_model(copy.deepcopy(plain, kept), keep_fp32_wrapper=False).eval()
        twin.load_state_dict(averaged.state, strict=False)
        return twin

    def save() -> None:
        if not accelerator.is_main_process:
            return
        _save(accelerator, folder)
        twin = averaged_model()
        save_file({key: value.contiguous() for key, value in twin.state_dict().items()}, folder / "model.safetensors")
        append_row(folder / "metrics.csv", {"step": progress.step, **validate(twin, progress.step)})
        plot(folder / "loss.csv", folder / "loss.png")

    bar = tqdm(
        total=config["steps"], initial=progress.step, disable=not sys.stderr.isatty() or not accelerator.is_main_process
    )
    with _stop_on_request() as asked, bar:
        while progress.step < config["steps"]:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(progress.step, config)
            # Bf16 inside the prepared model alone: frozen networks beside it stay exact.
            terms = loss(model, progress.step, accelerator.process_index)
            if not torch.isfinite(terms["loss"]):
                raise settings.TrainingError(
                    f"the loss is {terms['loss'].item()} at step {progress.step}; lower learning_rate and train again "
                    "in a new --folder."
                )
            optimizer.zero_grad(set_to_none=True)
            accelerator.backward(terms["loss"])
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            averaged.update(plain, progress.step)
            progress.step += 1
            bar.update(1)
            sums.append({key: value.item() for key, value in terms.items()})
            now = time.monotonic()
            if progress.step % SHOW_EVERY == 0 and accelerator.is_main_process:
                means = {key: float(np.mean([entry[key] for entry in sums])) for key in sums[0]}
                row = {"step": progress.step, "seconds_per_step": (now - shown) / len(sums), **means}
                append_row(folder / "loss.csv", row)
                with bar.external_write_mode():
                    print("  ".join(f"{key} {value:.5g}" for key, value in row.items()), flush=True)
                shown, sums = now, []
            if now - saved > save_every:
                save()
                saved = shown = time.monotonic()
                sums = []
            if asked or minutes is not None and now - started > minutes * 60:
                break
        accelerator.wait_for_everyone()
        save()
    if asked:
        raise KeyboardInterrupt
    return averaged_model()


@contextlib.contextmanager
def _stop_on_request() -> Iterator[list]:
    """A list that the first Ctrl-C or SIGTERM fills, so that the step ends and a checkpoint is written; the second one
    stops at once.
    """
    asked, before = [], {}

    def ask(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        print("Stopping after this step and a checkpoint; once more stops at once.", flush=True)

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _save(accelerator, folder: Path) -> None:
    """The new checkpoint is complete before the old one goes. Raises OSError when it cannot be written, whatever the
    writer raised.
    """
    try:
        accelerator.save_state(str(folder / "next"))
    except (SafetensorError, RuntimeError) as error:  # how safetensors and PyTorch say that the disk is full
        raise OSError(errno.EIO, f"the checkpoint could not be written: {error}", str(folder)) from error
    if (folder / "last").exists():
        (folder / "last").rename(folder / "old")
    (folder / "next").rename(folder / "last")
    shutil.rmtree(folder / "old", ignore_errors=True)


def start_from(model: nn.Module, path: Path, only: set[str] | None = None) -> None:
    """Weights of another run, all or those named; a wider first convolution keeps the new channels at zero."""
    if not path.exists():
        raise settings.TrainingError(f"{path} is missing; train that model first, or set start to null.")
    state, own = load_file(path), model.state_dict()
    if only is not None:
        state = own | {key: state[key] for key in only}
    for key, value in state.items():
        if value.shape != own[key].shape:
            wide = torch.zeros_like(own[key])
            wide[:, : value.shape[1]] = value
            state[key] = wide
    model.load_state_dict(state)


def _same_config(config: dict, folder: Path) -> None:
    path = folder / "config.json"
    if (folder / "last").exists() and json.loads(path.read_text()) != config:
        raise settings.TrainingError(
            f"{folder} holds a run with another config; go on with that one ({path}) or choose another --folder."
        )
    path.write_text(json.dumps(config, indent=2))


def append_row(path: Path, row: dict) -> None:
    """Append a row to a table; the first row's keys become its header."""
    fresh = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, row.keys())
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def plot(table: Path, path: Path, size: tuple[int, int] = (640, 360), margin: int = 50) -> None:
    """The loss by the step as a PNG, from the rows of loss.csv; nothing for fewer than two."""
    if not table.exists():
        return
    with open(table, newline="") as file:
        rows = [(float(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]
    if len(rows) < 2:
        return
    low, high = np.min(rows, 0), np.max(rows, 0)
    scaled = (np.array(rows) - low) / np.maximum(high - low, 1e-9)
    width, height = (side - 2 * margin for side in size)
    points = [(margin + x * width, margin + (1 - y) * height) for x, y in scaled]
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((margin, margin, margin + width, margin + height), outline="gray")
    draw.line(points, fill="black", width=1)
    draw.text((margin, 10), f"loss {low[1]:.5g} to {high[1]:.5g}", fill="black")
    draw.text((margin, size[1] - margin + 10), f"step {low[0]:g} to {high[0]:g}", fill="black")
    image.save(path)


def save_grid(path: Path, pictures: Tensor, columns: int) -> None:
    """[N,3,H,W] in 0..1 as one PNG; what the last row lacks is black."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = F.pad(pictures, (0,) * 7 + (-len(pictures) % columns,))
    grid = rearrange(pictures, "(row column) c h w -> (row h) (column w) c", column=columns)
    Image.fromarray((grid.float().clamp(0, 1) * 255).round().byte().cpu().numpy()).save(path)
