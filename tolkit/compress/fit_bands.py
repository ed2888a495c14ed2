"""Codec `bands` for a whole source: sample, search the price, walk all rows, fill the budget.

V vocabulary, D hidden, T tiers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tolkit.calibrate import Calibration
from tolkit.compress.bands import BandsWish, LayerFit, PlaneRows, Rows, Walk, unit_rows
from tolkit.compress.budget import Filled, Shape, fill_budget, search_price
from tolkit.compress.plan import EncodePlan, PlanePlan
from tolkit.compress.tiers import tier_ranges
from tolkit.compress.transform import Metric
from tolkit.errors import NonFiniteError
from tolkit.parallel import BlockPool
from tolkit.progress import Progress
from tolkit.sources import TableSource
from tolkit_formats.files import scratch_array, unlink

__all__ = ["fit_bands", "filled_plan"]

_SAMPLED_ROWS = 16_384
_RUN_ROWS = 64
_SPILL_HEADROOM = 4
"""Exponents bring deviations to at most 512; spilled in f16 they are at most 32, and rows of up to
2,000 deviations fit."""
_LAST_LAYER = 3.0
"""How much more a squared error after the last layer counts where no metric is known: nothing
pays it back, and the head reads it."""


@dataclass(frozen=True)
class _Job:
    source: TableSource
    plan: EncodePlan
    wish: BandsWish
    metrics: dict[int, Metric]
    weights_V: Tensor
    ranges: tuple[tuple[int, int], ...]
    pool: BlockPool


def fit_bands(
    source: TableSource,
    plan: EncodePlan,
    counts_V: npt.NDArray[np.uint64] | None,
    calibration: Calibration | None,
    work: Path | None,
    pool: BlockPool,
    progress: Progress,
) -> Filled:
    """What every layer stores so that tables/ takes at most `plan.table_bytes`.

    Args:
        plan: of `plan_compress`, with `bands`.
        counts_V: token counts by token id, which weigh rows and make tiers; None for neither.
        calibration: of `tol calibrate`; None takes plain squared errors.
        work: folder for three V x D f16 files when V is above 16,384; None (a dry run) fits the
            sample alone.

    Raises:
        UsageError: the budget is below the floor.     NonFiniteError: names the layer.
    """
    assert plan.bands is not None
    values = source.vocab_size * source.num_layers * source.hidden_size
    wish = plan.bands.decided(source.vocab_size, source.hidden_size, 8 * plan.table_bytes / values)
    by_slot = None if counts_V is None else np.sort(counts_V)[::-1]
    weights = np.ones(source.vocab_size)
    if by_slot is not None:
        weights = np.sqrt(by_slot.astype(np.float64) + 1)
    job = _Job(
        source,
        plan,
        wish,
        _metrics(source, plan, calibration),
        torch.from_numpy(weights / weights.mean()),
        tier_ranges(by_slot, source.vocab_size, wish.tiers),
        pool,
    )
    shape = Shape(
        tuple(p.layer for p in plan.planes),
        source.hidden_size,
        tuple(stop - first for first, stop in job.ranges),
        source.vocab_size if source.slot_of_token_V is not None else None,
    )
    rows, slots = _sample(job)
    price, fits = search_price(
        lambda price: _walk(job, rows, slots, price, progress), shape, plan.table_bytes
    )
    if len(slots) < source.vocab_size and work is not None:
        largest = max(fit.transform.exponent for fit in fits)
        rows = _all_rows(job, work, 2.0 ** -(largest + _SPILL_HEADROOM))
        fits = _walk(job, rows, None, price, progress)
        for path in work.glob("bands-*.f16"):
            unlink(path)
    return fill_budget(fits, shape, plan.table_bytes)


def filled_plan(plan: EncodePlan, filled: Filled) -> EncodePlan:
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


def _metrics(
    source: TableSource, plan: EncodePlan, calibration: Calibration | None
) -> dict[int, Metric]:
    """For each plane the metric of those who read the sum before the next kept plane joins it."""
    kept = [p.layer for p in plan.planes]
    metrics = {}
    for layer, following in zip(kept, [*kept[1:], source.num_layers], strict=True):
        if calibration is None:
            last = following == source.num_layers
            metrics[layer] = Metric(None, source.hidden_size, _LAST_LAYER if last else 1.0)
            continue
        readers = [calibration.metric_DD(reader).double() for reader in range(layer, following)]
        metrics[layer] = Metric(torch.stack(readers).sum(dim=0), source.hidden_size)
    return metrics


def _sample(job: _Job) -> tuple[Rows, npt.NDArray[np.int64]]:
    """Runs of neighbouring rows, evenly spaced in each tier; everything where V is small."""
    total = job.source.vocab_size
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
    kept: dict[str, npt.NDArray[np.generic]] = {}

    def scratch(name: str) -> npt.NDArray[np.generic]:
        if name not in kept:
            kept[name] = np.empty((len(chosen), job.source.hidden_size), np.float32)
        return kept[name]

    rows = Rows(
        tuple(ranges),
        tuple(stop - first for first, stop in job.ranges),
        job.weights_V[chosen] * torch.from_numpy(share),
        job.weights_V[chosen],
        _unit(job, chosen),
        scratch,
    )
    return rows, chosen


def _all_rows(job: _Job, work: Path, scale: float) -> Rows:
    shape = (job.source.vocab_size, job.source.hidden_size)
    kept: dict[str, npt.NDArray[np.generic]] = {}

    def scratch(name: str) -> npt.NDArray[np.generic]:
        if name not in kept:
            kept[name] = scratch_array(work / f"bands-{name}.f16", np.float16, shape)
        return kept[name]

    return Rows(
        job.ranges,
        tuple(stop - first for first, stop in job.ranges),
        job.weights_V,
        job.weights_V,
        _unit(job, None),
        scratch,
        scale,
    )


def _unit(job: _Job, slots: npt.NDArray[np.int64] | None) -> PlaneRows | None:
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
    job: _Job,
    rows: Rows,
    slots: npt.NDArray[np.int64] | None,
    price: float,
    progress: Progress,
) -> list[LayerFit]:
    walk = Walk(rows, job.wish, job.pool, price=price, feedback=job.plan.feedback)
    fits = []
    with progress.task("fit bands", len(job.plan.planes) * rows.count, "rows") as task:
        for plane in job.plan.planes:
            task.note(f"layer {plane.layer}")
            read = _picked(_summed([job.source.plane(m) for m in plane.members]), slots)
            try:
                fit = walk.layer(read, job.source.hidden_size, job.metrics[plane.layer], task)
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
