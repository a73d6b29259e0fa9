"""Layers as rows of one batch: which rows are whose, one sampling run of them, and the order of a call's estimates.

What LayerFusion and DreamLayer have in common; each keeps its mathematics and settings in a file of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import comfy.sample
import comfy.utils
import latent_preview
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..techniques.shared_layers import share_noise
from . import joint_attention
from .kept import LEVEL, Record

KINDS = (
    WrappersMP.OUTER_SAMPLE,
    WrappersMP.CALC_COND_BATCH,
    WrappersMP.DIFFUSION_MODEL,
    WrappersMP.APPLY_MODEL,
)
_selected_only = ContextVar("strata_selected_only", default=False)


@dataclass(frozen=True)
class Rows:
    """A batch of groups of `count` rows, and those chosen of each group: `number` from `first` on.

    described: the end of check's sentence.
    """

    count: int
    first: int
    number: int
    described: str = ""

    def of(self, rows: Tensor) -> Tensor:
        """The chosen rows [N·number,...] of [N·count,...]."""
        return self._places(rows).flatten(0, 1)

    def add(self, rows: Tensor, term: Tensor, strength: float = 1.0) -> None:
        """Add strength · term to the chosen rows, in place."""
        places = self._places(rows)
        places.add_(term.reshape(places.shape), alpha=strength)

    def check(self, x: Tensor) -> None:
        if not _selected_only.get() and len(x) % self.count:
            raise ValueError(f"latent: a batch of {len(x)} cannot be split into {self.described}")

    def _places(self, rows: Tensor) -> Tensor:
        if _selected_only.get():
            return rows[:, None]
        return rows.unflatten(0, (-1, self.count))[:, self.first : self.first + self.number]


LAYERFUSION = Rows(
    3,
    0,
    1,
    "foreground, background and blended; use Strata's LayerFusion sampler, or a latent batch that is a multiple of "
    "three.",
)


@contextmanager
def selected_rows_only() -> Iterator[None]:
    """While this is open, every row that the model gets is a chosen one."""
    token = _selected_only.set(True)
    try:
        yield
    finally:
        _selected_only.reset(token)


@dataclass(frozen=True)
class Method:
    """A way of sampling layers as rows. key: of its wrappers, and of its call in the transformer options.

    marker: what its node leaves in the conditioning, which tells the conditional estimate from the others.
    needs, tells, node: parts of the sentences for conditionings that do not fit.
    """

    key: str
    marker: str
    needs: str
    tells: str
    node: str

    @property
    def run_key(self) -> str:
        """Where a run's state is in the transformer options while it lasts."""
        return f"{self.key}_run"

    @property
    def record_key(self) -> str:
        """Where a run finds the record that a node wants of it."""
        return f"{self.key}_record"

    def record(self, model: ModelPatcher) -> Record:
        """A record of its own for this clone, which its runs fill."""
        record = model.model_options["transformer_options"][self.record_key] = Record()
        return record

    def attach(
        self,
        model: ModelPatcher,
        start: Callable,
        calculate: Callable,
        denoise: Callable,
        inside: str = WrappersMP.DIFFUSION_MODEL,
    ) -> None:
        """Wrap the sampling of this clone. start(entry, options) makes a run's state from the conditioning's entry and
        the transformer options; its `rows` are checked against the latent. denoise: the wrapper of the kind `inside`.
        """

        def start_run(executor, noise: Tensor, *args, **kwargs):
            guider = executor.class_obj
            options = guider.model_options["transformer_options"]  # this run's own copy
            run = options[self.run_key] = start(self.entry(guider.conds), options)
            run.rows.check(noise)
            return executor(noise, *args, **kwargs)

        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, self.key, start_run)
        model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, self.key, calculate)
        model.add_wrapper_with_key(inside, self.key, denoise)

    def detach(self, model: ModelPatcher) -> None:
        for kind in KINDS:
            model.remove_wrappers_with_key(kind, self.key)

    def is_on(self, model: ModelPatcher) -> bool:
        return bool(model.get_wrappers(WrappersMP.OUTER_SAMPLE, self.key))

    def entry(self, conds: dict[str, list[dict]]) -> dict:
        """The entry of a guider's conditionings that the method's node has made. Raises ValueError."""
        entries = [entry for own in conds.values() for entry in own]
        marked = next((entry for entry in entries if self.marker in entry), None)
        if marked is None:
            raise ValueError(f"positive: this conditioning does not say {self.tells}; make it with {self.node}.")
        if any("area" in entry for entry in entries):
            raise ValueError(
                f"positive or negative: a conditioning is limited to an area; {self.needs} conditionings of the whole "
                "image."
            )
        if any(len(own) > 1 and any(self.marker in entry for entry in own) for own in conds.values()):
            raise ValueError(
                f"positive: several conditionings are combined; {self.needs} the one of {self.node} alone."
            )
        return marked

    def conditional(self, conds: list[list[dict] | None]) -> int | None:
        """The number of the conditional estimate among those of a call."""
        marked = (i for i, own in enumerate(conds) if own and any(self.marker in entry for entry in own))
        return next(marked, None)


def conditional_first(conds: list, conditional: int | None, calculate: Callable[[list, bool], list]) -> list:
    """The estimates by two calls of calculate(conds, is it the conditional one?): the others use what it has found.

    ComfyUI would put all into one batch, or, short of memory, run the unconditional first.
    """
    if conditional is None:
        return calculate(conds, False)
    estimates = calculate([own if i == conditional else None for i, own in enumerate(conds)], True)
    others = [None if i == conditional else own for i, own in enumerate(conds)]
    if any(others):
        rest = calculate(others, False)
        estimates = [estimates[i] if i == conditional else rest[i] for i in range(len(conds))]
    return estimates


def is_between(start_percent: float, end_percent: float, sampling, timestep: Tensor) -> bool:
    """Whether the noise level of a call lies between two percents of the sampling."""
    start, end = (sampling.percent_to_sigma(percent) for percent in (start_percent, end_percent))
    return end <= float(timestep.max()) <= start


def sample_rows(
    model: ModelPatcher,
    positive: list,
    count: int,
    negative: list,
    latent_image: dict,
    seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    denoise: float,
    own_noise: float = 1.0,
    recorded: dict[float, Tensor] | None = None,
) -> list[dict]:
    """One LATENT for each of `count` rows. positive: with as many rows, which the host repeats over the batch.

    own_noise: how much of the noise's variance is a row's own, 0..1; at 0 the rows of a latent have the same.

    recorded: gets, for each noise level that the model is called at, the batch [B·count,C,h,w] of the last such call,
    in the model's scale, on the CPU.
    """
    latents = comfy.sample.fix_empty_latent_channels(model, latent_image["samples"])
    mask = latent_image.get("noise_mask")
    if mask is not None:
        mask = comfy.utils.repeat_to_batch_size(mask, len(latents)).repeat_interleave(count, 0)
    start, callback = latents.repeat_interleave(count, 0), latent_preview.prepare_callback(model, steps)
    noise = _noise(start, seed, latent_image.get("batch_index"), count, own_noise)

    if joint_attention.TEXT_LENGTHS in positive[0][1] and joint_attention.family_of(model.model.diffusion_model):
        model = model.clone()
        joint_attention.prepare(model)
    if recorded is not None:
        model = watched(model, recorded)
    samples = comfy.sample.sample(
        model,
        noise,
        steps,
        cfg,
        sampler_name,
        scheduler,
        positive,
        negative,
        start,
        denoise=denoise,
        noise_mask=mask,
        callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    return [{**latent_image, "samples": samples[row::count]} for row in range(count)]


def watched(model: ModelPatcher, recorded: dict[float, Tensor]) -> ModelPatcher:
    """A clone that keeps what its sampler asks it for. What samplers hand to their callback is not always the latent of
    that step (DEIS).
    """

    def watch(executor, x: Tensor, timestep: Tensor, *args, **kwargs):
        sigma = float(timestep.flatten()[0])
        for level in [level for level in recorded if math.isclose(level, sigma, rel_tol=LEVEL)]:
            # Heun's first call at a level is a guess, and its second one the step's latent; DPM-Solver++(2S)'s is a
            # rounding beside it.
            del recorded[level]
        recorded[sigma] = x.detach().float().cpu().clone()
        return executor(x, timestep, *args, **kwargs)

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "strata_watched", watch)
    return clone


def _noise(start: Tensor, seed: int, numbers: list[int] | None, count: int, own: float) -> Tensor:
    """Noise for `start`, [B·count,C,h,w]. The host draws equal noise for equal numbers, which are the latents' places
    in the batch unless given.
    """
    if own == 1 and numbers is None:
        return comfy.sample.prepare_noise(start, seed)
    numbers = range(len(start) // count) if numbers is None else numbers

    def drawn(per_latent: int, places: Iterable[int]) -> Tensor:
        return comfy.sample.prepare_noise(
            start, seed, [number * per_latent + place for number in numbers for place in places]
        )

    if own in (0, 1):
        return drawn(count, range(count)) if own else drawn(1, [0] * count)
    return share_noise(drawn(count + 1, [0] * count), drawn(count + 1, range(1, count + 1)), own)
