"""Codec `bands` for a whole source: sample, search the price, walk all rows, fill the budget.

V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tolkit.calibrate import Calibration
from tolkit.compress.fill.budget import MOST_WALKS, Filled, fill_budget, search_price
from tolkit.compress.fill.job import Job, floor_bytes, make_job, shape_of
from tolkit.compress.fill.transform import Metric
from tolkit.compress.fill.walk import PlaneRows, Rows
from tolkit.compress.fill.walk_bands import BandsWalk, LayerFit
from tolkit.compress.plan import EncodePlan, PlanePlan
from tolkit.decode.record_decoder import unit_rows
from tolkit.errors import NonFiniteError
from tolkit.parallel import BlockPool
from tolkit.progress import Progress, Task
from tolkit.sources import TableSource
from tolkit_formats.codecs import Codec
from tolkit_formats.predictor import Predictor
from tolkit_formats.records import Tier

__all__ = [
    "Job",
    "all_rows",
    "filled_plan",
    "fit_bands",
    "floor_bytes",
    "make_job",
    "picked",
    "sample_rows",
    "sampled_rows",
    "sampled_slots",
    "spill_scale",
    "walk_layers",
]

Fit = TypeVar("Fit")


class _Decided(Protocol):
    @property
    def codecs(self) -> Sequence[Codec]: ...

    @property
    def predictor(self) -> Predictor | None: ...


class FilledAny(Protocol):
    """What `Filled` and its kin have in common."""

    @property
    def layers(self) -> Mapping[int, _Decided]: ...

    @property
    def tiers(self) -> tuple[Tier, ...]: ...

    @property
    def table_bytes(self) -> int: ...


_SAMPLED_ROWS = 16_384
_RUN_ROWS = 64
_SPILL_HEADROOM = 4
"""Exponents bring deviations to at most 512; spilled in f16 they are at most 32, and rows of up to
2,000 deviations fit."""


def fit_bands(
    source: TableSource,
    plan: EncodePlan,
    counts_V: npt.NDArray[np.uint64] | None,
    calibration: Calibration | None,
    work: Path,
    pool: BlockPool,
    progress: Progress,
    *,
    sample_only: bool = False,
) -> Filled:
    """What every layer stores so that tables/ takes at most `plan.table_bytes`.

    Args:
        plan: of `plan_compress`, with `bands`.
        counts_V: token counts by token id, which weigh rows and make tiers; None for neither.
        calibration: of `tol calibrate`; None takes plain squared errors.
        work: folder for scratch files: three of V x D in f16, for a sample of 16,384 rows three
            in f32, and five D x D a layer. They have to stay until the rows are encoded.
        sample_only: fit the sample alone, for a dry run.

    Raises:
        UsageError: the budget is below the floor.     NonFiniteError: names the layer.
    """
    job = make_job(source, plan, counts_V, calibration, work, pool)
    shape = shape_of(source, plan, job.ranges)
    rows, slots = sample_rows(job)
    size = len(plan.planes) * rows.count
    walks = 0
    with progress.task("search size", MOST_WALKS * size, "rows") as task:

        def walk(price: float) -> list[LayerFit]:
            nonlocal walks
            walks += 1
            return _walk(job, rows, slots, price, task, f"walk {walks} of {MOST_WALKS} at most, ")

        price, fits = search_price(walk, shape, plan.table_bytes)
        task.advance((MOST_WALKS - walks) * size)
    if len(slots) < source.num_rows and not sample_only:
        with progress.task("fit bands", len(plan.planes) * source.num_rows, "rows") as task:
            scale = spill_scale(fit.exponent for fit in fits)
            fits = _walk(job, all_rows(job, scale), None, price, task)
    return replace(fill_budget(fits, shape, plan.table_bytes), walks=walks)


def sampled_rows(num_rows: int) -> int:
    """About how many rows the search for a size goes over."""
    return min(num_rows, _SAMPLED_ROWS)


def spill_scale(exponents: Iterable[int]) -> float:
    """What to multiply values by so that f16 holds them, given the exponents of a sample's fits."""
    return 2.0 ** -(max(exponents) + _SPILL_HEADROOM)


def filled_plan(plan: EncodePlan, filled: FilledAny) -> EncodePlan:
    """The plan with everything that the fit decided."""
    planes = tuple(
        PlanePlan(p.layer, tuple(filled.layers[p.layer].codecs), p.members) for p in plan.planes
    )
    predictors = {
        layer: decided.predictor
        for layer, decided in filled.layers.items()
        if decided.predictor is not None
    }
    return replace(
        plan,
        planes=planes,
        tiers=filled.tiers,
        table_bytes=filled.table_bytes,
        predictors=predictors,
    )


def sample_rows(job: Job) -> tuple[Rows, npt.NDArray[np.int64]]:
    """The rows in `sampled_slots`, and those."""
    slots_of_tiers = sampled_slots(job.ranges)
    ranges = []
    start = 0
    for slots in slots_of_tiers:
        ranges.append((start, start + len(slots)))
        start += len(slots)
    chosen = np.concatenate(slots_of_tiers)
    share = np.concatenate(
        [
            np.full(len(slots), (stop - first) / len(slots))
            for slots, (first, stop) in zip(slots_of_tiers, job.ranges, strict=True)
        ]
    )
    shape = (len(chosen), job.source.hidden_size)
    rows = Rows(
        tuple(ranges),
        tuple(stop - first for first, stop in job.ranges),
        job.weights_V[chosen] * torch.from_numpy(share),
        job.weights_V[chosen],
        _unit(job, chosen),
        lambda name: job.scratch.array(f"sample-{name}", np.float32, shape),
        lambda name, shape: job.scratch.array(name, np.float32, shape),
    )
    return rows, chosen


def sampled_slots(ranges: Sequence[tuple[int, int]]) -> list[npt.NDArray[np.int64]]:
    """Of each tier, given its first and last+1 slot: runs of neighbours, evenly spaced; everything
    where there are few."""
    total = ranges[-1][1]
    found = []
    for first, stop in ranges:
        wanted = max(_RUN_ROWS, (stop - first) * _SAMPLED_ROWS // total)
        slots = np.arange(first, stop)
        if total > _SAMPLED_ROWS and wanted < stop - first:
            runs = -(-wanted // _RUN_ROWS)
            begins = np.linspace(first, stop - _RUN_ROWS, runs).astype(np.int64)
            slots = np.unique((begins[:, None] + np.arange(_RUN_ROWS)).reshape(-1))
        found.append(slots)
    return found


def all_rows(job: Job, scale: float) -> Rows:
    """Every row, spilled to files as f16 of `scale` times the values."""
    shape = (job.source.num_rows, job.source.hidden_size)
    return Rows(
        job.ranges,
        tuple(stop - first for first, stop in job.ranges),
        job.weights_V,
        job.weights_V,
        _unit(job, None),
        lambda name: job.scratch.array(name, np.float16, shape),
        lambda name, shape: job.scratch.array(name, np.float32, shape),
        scale=scale,
    )


def _unit(job: Job, slots: npt.NDArray[np.int64] | None) -> PlaneRows | None:
    if not job.wish.predictor_bits:
        return None
    return picked(lambda first, stop: unit_rows(job.source.embedded(first, stop)), slots)


def picked(read: PlaneRows, slots: npt.NDArray[np.int64] | None) -> PlaneRows:
    """A reader of the rows in `slots` (ascending), by runs of neighbours."""
    if slots is None or len(slots) == slots[-1] + 1:
        return read

    def pick(first: int, stop: int) -> Tensor:
        wanted = slots[first:stop]
        cuts = np.flatnonzero(np.diff(wanted) != 1) + 1
        runs = np.split(wanted, cuts)
        return torch.cat([read(int(run[0]), int(run[-1]) + 1) for run in runs])

    return pick


def _walk(
    job: Job,
    rows: Rows,
    slots: npt.NDArray[np.int64] | None,
    price: float,
    task: Task,
    note: str = "",
) -> list[LayerFit]:
    walk = BandsWalk(rows, job.wish, job.pool, price=price, feedback=job.plan.feedback)
    return walk_layers(job, walk.fit, rows, slots, task, note)


def walk_layers(
    job: Job,
    layer: Callable[[PlaneRows, int, Metric, Task | None], Fit],
    rows: Rows,
    slots: npt.NDArray[np.int64] | None,
    task: Task,
    note: str = "",
) -> list[Fit]:
    """`layer` of every plane in turn; `slots` are those of `rows`, None for all."""
    fits = []
    for plane in job.plan.planes:
        task.note(f"{note}layer {plane.layer}")
        read = picked(_summed([job.source.plane(m) for m in plane.members]), slots)
        try:
            fit = layer(read, job.source.hidden_size, job.metrics.of(plane.layer), task)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"{job.source.path}: layer {plane.layer}: {error.message}",
                hint="check the weights",
            ) from error
        fits.append(fit)
    return fits


def _summed(readers: list[Callable[[int, int], Tensor]]) -> PlaneRows:
    if len(readers) == 1:
        return readers[0]
    return lambda first, stop: torch.stack([read(first, stop) for read in readers]).sum(dim=0)
