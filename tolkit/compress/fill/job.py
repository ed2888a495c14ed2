"""What all walks over one source share: metrics, row weights, tiers and scratch files.

V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tolkit.calibrate import Calibration
from tolkit.compress.fill.budget import Shape, require_room, smallest_bytes
from tolkit.compress.fill.transform import Metric
from tolkit.compress.plan import EncodePlan
from tolkit.compress.spec import BandsWish
from tolkit.compress.tiers import TierRange, halved_ranges, tier_ranges
from tolkit.parallel import BlockPool
from tolkit.sources import TableSource
from tolkit_formats.codecs import Steps
from tolkit_formats.entropy import Coding
from tolkit_formats.files import scratch_array
from tolkit_formats.predictor import Predictor
from tolkit_formats.reader import shared_name
from tolkit_formats.records import CRC_BYTES, STRIDE_MULTIPLE, lay_out
from tolkit_formats.sizes import coded_shard_bytes, table_bytes

__all__ = ["Job", "floor_bytes", "make_job", "shape_of"]

_FINEST = 0.005  # of a budget, what 16 bytes more for each row of the smallest tier may take
_LAST_LAYER = 3.0
"""How much more a squared error after the last layer counts where no metric is known: nothing
pays it back, and the head reads it."""


@dataclass(frozen=True)
class Job:
    """What all walks over one source share.

    floor_bytes: of what tables/ takes when nothing is coded.
    """

    source: TableSource
    plan: EncodePlan
    wish: BandsWish
    metrics: Metrics
    scratch: Scratch
    weights_V: Tensor
    ranges: tuple[tuple[int, int], ...]
    floor_bytes: int
    pool: BlockPool


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
    ranges = _ranges(by_slot, source.num_rows, plan, plan.table_bytes)
    shape = shape_of(source, plan, ranges)
    floor = _smallest(shape, plan, wish.predictor_bits)
    if plan.bands.predictor_bits is None and floor > plan.table_bytes:
        wish = replace(wish, predictor_bits=0)
        floor = _smallest(shape, plan, 0)
    require_room(shape, floor, plan.table_bytes, bool(wish.predictor_bits))
    scratch = Scratch(work)
    return Job(
        source,
        plan,
        wish,
        Metrics(source, plan, calibration, scratch),
        scratch,
        torch.from_numpy(weights / weights.mean()),
        ranges,
        floor,
        pool,
    )


def floor_bytes(
    source: TableSource, plan: EncodePlan, counts_V: npt.NDArray[np.uint64] | None
) -> int:
    """The smallest budget that a fit can fill."""
    wish = plan.bands
    assert wish is not None
    by_slot = _by_slot(source, counts_V)
    shape = shape_of(source, plan, _ranges(by_slot, source.num_rows, plan, 0))
    floor = _smallest(shape, plan, wish.predictor_bits)
    if plan.entropy:
        return floor
    values = source.vocab_size * source.num_layers * source.hidden_size
    decided = wish.decided(source.vocab_size, source.hidden_size, 8 * floor / values)
    return _smallest(shape, plan, decided.predictor_bits)


def shape_of(source: TableSource, plan: EncodePlan, ranges: Sequence[tuple[int, int]]) -> Shape:
    """What the budget of tables/ is divided among."""
    return Shape(
        tuple(p.layer for p in plan.planes),
        source.hidden_size,
        tuple(stop - first for first, stop in ranges),
        source.vocab_size if source.slot_of_token_V is not None else None,
    )


def _smallest(shape: Shape, plan: EncodePlan, predictor_bits: int | None) -> int:
    """Bytes under tables/ when records hold nothing but their checksums."""
    if not plan.entropy:
        return smallest_bytes(shape, predictor_bits or 0)
    width, num_tiers = shape.hidden_size, len(shape.tier_rows)
    planes = [(layer, Steps(width, 0, num_tiers, 0, ())) for layer in shape.layers]
    own = dict(planes[0][1].shared_shapes())
    if predictor_bits:
        own |= Predictor(width, predictor_bits).shared_shapes()
    shared = {shared_name(i, name): array for i in shape.layers for name, array in own.items()}
    shared |= Coding(1, 1, 1).shared_shapes()
    tiers = [lay_out(planes, rows, index=i, coded=True) for i, rows in enumerate(shape.tier_rows)]
    sizes = {
        name: size for tier in tiers for name, size in coded_shard_bytes(tier, CRC_BYTES).items()
    }
    return table_bytes(tiers, shared, mapped_vocab_size=shape.mapped_vocab_size, shard_bytes=sizes)


def _ranges(
    by_slot: npt.NDArray[np.uint64] | None, num_rows: int, plan: EncodePlan, budget_bytes: int
) -> tuple[TierRange, ...]:
    """Tiers by counts; where those make none, tiers small enough to fill the budget with, which
    records of any length do anyway."""
    assert plan.bands is not None
    tiers = plan.bands.tiers
    ranges = tier_ranges(by_slot, num_rows, tiers)
    if len(ranges) > 1 or plan.entropy:
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


class Metrics:
    """For each plane the metric of those who read the sum before the next kept plane joins it.

    Square roots are worked out once and kept in files: at the 1B shape they are 1.6 GB.
    """

    def __init__(
        self,
        source: TableSource,
        plan: EncodePlan,
        calibration: Calibration | None,
        scratch: Scratch,
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
            metric.move(
                lambda name: self._scratch.array(
                    f"metric{layer}.{name}", np.float64, (width, width)
                )
            )
            self._known[layer] = metric
        return self._known[layer]


class Scratch:
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
