"""Codec `bands` for a whole source: sample, search the price, walk all rows, fill the budget.

V vocabulary, D hidden, T tiers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tolkit.calibrate import Calibration
from tolkit.compress.bands import BandsWish, LayerFit, PlaneRows, Rows, Walk, unit_rows
from tolkit.compress.budget import (
    MOST_WALKS,
    Filled,
    Shape,
    fill_budget,
    require_room,
    search_price,
    smallest_bytes,
)
from tolkit.compress.plan import EncodePlan, PlanePlan
from tolkit.compress.tiers import TierRange, halved_ranges, tier_ranges
from tolkit.compress.transform import Metric
from tolkit.errors import NonFiniteError
from tolkit.parallel import BlockPool
from tolkit.progress import Progress, Task
from tolkit.sources import TableSource
from tolkit_formats.codecs import Codec
from tolkit_formats.files import scratch_array
from tolkit_formats.predictor import Predictor
from tolkit_formats.records import STRIDE_MULTIPLE, Tier

__all__ = [
    "Job",
    "all_rows",
    "filled_plan",
    "fit_bands",
    "floor_bytes",
    "make_job",
    "sample_rows",
    "sampled_rows",
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
_FINEST = 0.005  # of a budget, what 16 bytes more for each row of the smallest tier may take
_SPILL_HEADROOM = 4
"""Exponents bring deviations to at most 512; spilled in f16 they are at most 32, and rows of up to
2,000 deviations fit."""
_LAST_LAYER = 3.0
"""How much more a squared error after the last layer counts where no metric is known: nothing
pays it back, and the head reads it."""


@dataclass(frozen=True)
class Job:
    """What all walks over one source share."""

    source: TableSource
    plan: EncodePlan
    wish: BandsWish
    metrics: _Metrics
    scratch: _Scratch
    weights_V: Tensor
    ranges: tuple[tuple[int, int], ...]
    pool: BlockPool


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
    shape = _shape(source, plan, job.ranges)
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


def make_job(
    source: TableSource,
    plan: EncodePlan,
    counts_V: npt.NDArray[np.uint64] | None,
    calibration: Calibration | None,
    work: Path,
    pool: BlockPool,
) -> Job:
    """Metrics, row weights and tiers; the arguments are those of `fit_bands`."""
    assert plan.bands is not None
    values = source.vocab_size * source.num_layers * source.hidden_size
    wish = plan.bands.decided(source.vocab_size, source.hidden_size, 8 * plan.table_bytes / values)
    by_slot = _by_slot(source, counts_V)
    weights = np.ones(source.num_rows)
    if by_slot is not None:
        weights = np.sqrt(by_slot.astype(np.float64) + 1)
    ranges = tier_ranges(by_slot, source.num_rows, wish.tiers)
    if not plan.entropy:  # records of any length fill a budget anyway
        ranges = _ranges(by_slot, source.num_rows, wish.tiers, plan.table_bytes)
    if not plan.entropy:  # how small coded records get is known after a walk only
        shape = _shape(source, plan, ranges)
        if plan.bands.predictor_bits is None:
            if smallest_bytes(shape, wish.predictor_bits or 0) > plan.table_bytes:
                wish = replace(wish, predictor_bits=0)
        require_room(shape, wish.predictor_bits or 0, plan.table_bytes)
    scratch = _Scratch(work)
    return Job(
        source,
        plan,
        wish,
        _Metrics(source, plan, calibration, scratch),
        scratch,
        torch.from_numpy(weights / weights.mean()),
        ranges,
        pool,
    )


def floor_bytes(
    source: TableSource, plan: EncodePlan, counts_V: npt.NDArray[np.uint64] | None
) -> int:
    """The smallest budget that `fit_bands` can fill."""
    wish = plan.bands
    assert wish is not None
    by_slot = _by_slot(source, counts_V)
    shape = _shape(source, plan, _ranges(by_slot, source.num_rows, wish.tiers, 0))
    floor = smallest_bytes(shape, wish.predictor_bits or 0)
    values = source.vocab_size * source.num_layers * source.hidden_size
    decided = wish.decided(source.vocab_size, source.hidden_size, 8 * floor / values)
    return smallest_bytes(shape, decided.predictor_bits or 0)


def sampled_rows(num_rows: int) -> int:
    """About how many rows the search for a size goes over."""
    return min(num_rows, _SAMPLED_ROWS)


def _ranges(
    by_slot: npt.NDArray[np.uint64] | None, num_rows: int, tiers: int, budget_bytes: int
) -> tuple[TierRange, ...]:
    """Tiers by counts; where those make none, tiers small enough to fill the budget with."""
    ranges = tier_ranges(by_slot, num_rows, tiers)
    if len(ranges) > 1:
        return ranges
    return halved_ranges(num_rows, _FINEST * budget_bytes / STRIDE_MULTIPLE, tiers)


def _by_slot(
    source: TableSource, counts_V: npt.NDArray[np.uint64] | None
) -> npt.NDArray[np.uint64] | None:
    """Counts of the tokens that get a record, falling."""
    if counts_V is None:
        return None
    slots_V = source.slot_of_token_V
    if slots_V is not None and source.num_rows < source.vocab_size:
        counts_V = counts_V[slots_V < source.num_rows]
    return np.sort(counts_V)[::-1]


def spill_scale(exponents: Iterable[int]) -> float:
    """What to multiply values by so that f16 holds them, given the exponents of a sample's fits."""
    return 2.0 ** -(max(exponents) + _SPILL_HEADROOM)


def _shape(source: TableSource, plan: EncodePlan, ranges: Sequence[tuple[int, int]]) -> Shape:
    return Shape(
        tuple(p.layer for p in plan.planes),
        source.hidden_size,
        tuple(stop - first for first, stop in ranges),
        source.vocab_size if source.slot_of_token_V is not None else None,
    )


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


class _Metrics:
    """For each plane the metric of those who read the sum before the next kept plane joins it.

    Square roots are worked out once and kept in files: at the 1B shape they are 1.6 GB.
    """

    def __init__(
        self,
        source: TableSource,
        plan: EncodePlan,
        calibration: Calibration | None,
        scratch: _Scratch,
    ) -> None:
        kept = [p.layer for p in plan.planes]
        self._following = dict(zip(kept, [*kept[1:], source.num_layers], strict=True))
        self._source, self._calibration, self._scratch = source, calibration, scratch
        self._known: dict[int, Metric] = {}

    def of(self, layer: int) -> Metric:
        """The metric of plane `layer`."""
        width, following = self._source.hidden_size, self._following[layer]
        if self._calibration is None:
            last = following == self._source.num_layers
            return Metric(None, width, _LAST_LAYER if last else 1.0)
        if layer not in self._known:
            readers = range(layer, following)
            summed = torch.zeros((width, width), dtype=torch.float64)
            for reader in readers:
                summed += self._calibration.metric_DD(reader)
            metric = Metric(summed, width)
            places = [
                self._scratch.array(f"metric{layer}.{i}", np.float64, (width, width))
                for i in range(2)
            ]
            for place, made in zip(places, (metric.root_DD, metric.inverse_DD), strict=True):
                place[:] = made.numpy()
            metric.root_DD, metric.inverse_DD = (torch.from_numpy(place) for place in places)
            self._known[layer] = metric
        return self._known[layer]


class _Scratch:
    """Arrays in files of one folder, each made once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._arrays: dict[str, npt.NDArray[np.generic]] = {}

    def array(self, name: str, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """The array of that name; a new file where name or shape are new."""
        known = self._arrays.get(name)
        if known is None or known.shape != shape:
            known = scratch_array(self._folder / f"bands-{name}.tmp", dtype, shape)
            self._arrays[name] = known
        return known


def sample_rows(job: Job) -> tuple[Rows, npt.NDArray[np.int64]]:
    """Runs of neighbouring rows, evenly spaced in each tier; everything where V is small."""
    total = job.source.num_rows
    picked, ranges = [], []
    start = 0
    for first, stop in job.ranges:
        wanted = max(_RUN_ROWS, (stop - first) * _SAMPLED_ROWS // total)
        slots = np.arange(first, stop)
        if total > _SAMPLED_ROWS and wanted < stop - first:
            runs = -(-wanted // _RUN_ROWS)
            begins = np.linspace(first, stop - _RUN_ROWS, runs).astype(np.int64)
            slots = np.unique((begins[:, None] + np.arange(_RUN_ROWS)).reshape(-1))
        picked.append(slots)
        ranges.append((start, start + len(slots)))
        start += len(slots)
    chosen = np.concatenate(picked)
    share = np.concatenate(
        [
            np.full(len(slots), (stop - first) / len(slots))
            for slots, (first, stop) in zip(picked, job.ranges, strict=True)
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
    return _picked(lambda first, stop: unit_rows(job.source.embedded(first, stop)), slots)


def _picked(read: PlaneRows, slots: npt.NDArray[np.int64] | None) -> PlaneRows:
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
    walk = Walk(rows, job.wish, job.pool, price=price, feedback=job.plan.feedback)
    return walk_layers(job, walk.layer, rows, slots, task, note)


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
        read = _picked(_summed([job.source.plane(m) for m in plane.members]), slots)
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
