"""What codec `bands`, in either coding, will make of a size, before anything is written.

V vocabulary, L layers, D hidden, R rows of a basis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy.typing as npt

from tolkit.bundling import Resources
from tolkit.compress import CompressSpec, open_for
from tolkit.compress.encode import HELD_BYTES, WORK_ROWS
from tolkit.compress.fill.bands import floor_bytes
from tolkit.compress.fill.resolve import BandsLayer
from tolkit.compress.fill.resolve_steps import StepsLayer
from tolkit.compress.foresee import Foreseen, foresee
from tolkit.compress.plan import EncodePlan, plan_compress
from tolkit.parallel import block_pool
from tolkit.progress import Progress, TqdmProgress
from tolkit.sources import TableSource
from tolkit_formats.entropy import length_dtype
from tolkit_formats.tensorfile import ITEM_BYTES

__all__ = ["LayerOutlook", "Outlook", "outlook"]

_LIBRARIES_BYTES = 48 << 20  # buffers of the numeric libraries once they have run
_CODED_ROWS, _CODED_SYMBOLS = 8192, 1 << 25  # at a time, at most
_KINDS = {"basis": "bases", "predictor": "predictors"}

Stored = Mapping[str, tuple[str, npt.NDArray[Any]]]


@dataclass(frozen=True)
class LayerOutlook:
    """One layer.

    Attributes:
        status, into: as in the manifest.
        mean_bits: of codes a value, over tokens; of coded records what its symbols cost by
            their models.
        rank: rows of the basis.     predictor_bits: 0 without.
        shared_bytes: of basis, predictor, scales, codebooks or classes, and mean.
        relative_error: ||decoded - table|| / ||table|| of the layer alone, and
        running_sum_error: that of the sum of layers so far; of the encoded rows.
    """

    layer: int
    status: str
    into: int | None = None
    mean_bits: float = 0.0
    rank: int = 0
    predictor_bits: int = 0
    shared_bytes: int = 0
    relative_error: float | None = None
    running_sum_error: float | None = None


@dataclass(frozen=True)
class Outlook:
    """One size.

    Attributes:
        budget_bytes: asked for.
        table_bytes: that will be taken; never more than the budget.
        within: how far that may be from what is written, as a ratio: 0 where all rows were
            fitted, 0.005 elsewhere, 0.01 for coded records.
        parts: the same by what it is for; they add up. Lengths of coded records count as
            records, their models as scales.
        fitted_rows, encoded_rows: what was looked at.
        time_s: of the whole compression: the search for the size as it took here, the pass over
            all rows and their encoding scaled from the rows looked at, as often as coded records
            have to be tried. Copying of the backbone is not in it.
        memory_bytes: beyond the process after imports and one layer's weights, by formula.
        scratch_bytes: files that are removed at the end.
    """

    budget_bytes: int
    table_bytes: int
    bits_per_value: float
    within: float
    parts: Mapping[str, int]
    layers: tuple[LayerOutlook, ...]
    floor_bytes: int
    fitted_rows: int
    encoded_rows: int
    time_s: float
    memory_bytes: int
    scratch_bytes: int
    warnings: tuple[str, ...]

    @property
    def exact(self) -> bool:
        """Whether compression writes just these bytes."""
        return self.within == 0


def outlook(
    source_path: str | Path,
    spec: CompressSpec,
    *,
    resources: Resources | None = None,
    progress: Progress | None = None,
) -> Outlook:
    """Fit a sample of rows to the size of `spec`, encode some of them, write nothing.

    Cost: up to six walks over at most 16,384 rows; for coded records that of the compression
    itself where there are no more, without the backbone.

    Args:
        spec: codec `bands` with a size, in either coding.

    Raises:
        UsageError: the size is below the floor, or cannot be met.     MismatchError: counts or
        metric of another model.     NonFiniteError: names the layer.
    """
    progress = progress or TqdmProgress()
    source, counts_V, calibration = open_for(source_path, spec)
    plan = plan_compress(source, spec)
    floor = floor_bytes(source, plan, counts_V)
    with block_pool((resources or Resources()).threads) as pool:
        found = foresee(source, plan, counts_V, calibration, pool, progress)
        threads = pool.threads
    values = source.vocab_size * source.num_layers * source.hidden_size
    return Outlook(
        budget_bytes=plan.table_bytes,
        table_bytes=found.plan.table_bytes,
        bits_per_value=8 * found.plan.table_bytes / values,
        within=found.within,
        parts=_parts(source, found),
        layers=_layers(found),
        floor_bytes=floor,
        fitted_rows=found.fitted_rows,
        encoded_rows=found.encoded.rows,
        time_s=found.time_s,
        memory_bytes=_memory_bytes(source, found, threads),
        scratch_bytes=_scratch_bytes(source, found, calibration is not None),
        warnings=plan.warnings,
    )


def _layers(found: Foreseen) -> tuple[LayerOutlook, ...]:
    layers = []
    for layer, status in enumerate(found.plan.statuses):
        error = found.encoded.errors[layer]
        decided = found.layers.get(layer)
        line = LayerOutlook(
            layer,
            status.status,
            status.into,
            relative_error=error.relative,
            running_sum_error=error.running_sum,
        )
        if decided is not None:
            line = replace(
                line,
                mean_bits=_mean_bits(found.plan, layer, decided),
                rank=_rank(decided),
                predictor_bits=0 if decided.predictor is None else decided.predictor.bits,
                shared_bytes=sum(_shared_bytes(decided.stored).values()),
            )
        layers.append(line)
    return tuple(layers)


def _mean_bits(plan: EncodePlan, layer: int, decided: BandsLayer | StepsLayer) -> float:
    if isinstance(decided, StepsLayer):
        return 8 * plan.layer_bytes[layer] / decided.codecs[0].width
    codes = [
        tier.num_rows * float(codec.widths_R.sum()) / codec.width
        for tier, codec in zip(plan.tiers, decided.codecs, strict=True)
    ]
    return sum(codes) / sum(tier.num_rows for tier in plan.tiers)


def _rank(decided: BandsLayer | StepsLayer) -> int:
    """Rows of the basis; without one, coefficients that some token stores."""
    codec = decided.codecs[0]
    if codec.basis:
        return codec.rank
    if isinstance(decided, StepsLayer):
        return max(codec.count for codec in decided.codecs)
    return max(len(codec.stored_C) for codec in decided.codecs)


def _shared_bytes(stored: Stored) -> dict[str, int]:
    """Bytes of stored arrays by what they are for."""
    found = {"bases": 0, "predictors": 0, "scales": 0}
    for name, (dtype, array) in stored.items():
        kind = _KINDS.get(name.partition("_")[0], "scales")
        found[kind] += math.prod(array.shape) * ITEM_BYTES[dtype]
    return found


def _parts(source: TableSource, found: Foreseen) -> dict[str, int]:
    parts = {"records": found.encoded.record_bytes}
    for tier in found.plan.tiers:
        if tier.coded:
            parts["records"] += tier.num_rows * ITEM_BYTES[length_dtype(tier.stride)]
    for stored in (found.common, *(decided.stored for decided in found.layers.values())):
        for kind, size in _shared_bytes(stored).items():
            parts[kind] = parts.get(kind, 0) + size
    parts["slots"] = 0 if source.slot_of_token_V is None else 4 * source.vocab_size
    parts["checksums"] = found.plan.table_bytes - sum(parts.values())
    return parts


def _memory_bytes(source: TableSource, found: Foreseen, threads: int) -> int:
    """Of a layer being fitted and of blocks being encoded, which the allocator may both keep."""
    width = source.hidden_size
    ranks = [_rank(decided) for decided in found.layers.values()]
    predicts = bool(found.plan.predictors)
    joint = 1 + width * (2 if predicts else 1)
    # Codes of all layers' bases and predictors, int8; what a layer's statistics and transforms
    # take in float64; coefficients of sampled rows, once more while they are sorted by width.
    kept = sum(rank * width for rank in ranks) + len(ranks) * predicts * width * width
    layer = 8 * (4 * joint * joint + 6 * width * width)
    layer += 3 * 8 * min(found.fitted_rows, 4096) * width
    stride = max(tier.stride for tier in found.plan.tiers)
    held = min(source.num_rows, HELD_BYTES // (stride + 4 * width))
    working = 2 * 4 * max(ranks) * width + 4 * predicts * width * width
    # Of a held row: its record, carry, target and, for predictions, embedding.
    blocks = held * (stride + 4 * width * (2 + predicts)) + threads * 6 * 4 * WORK_ROWS * width
    return _LIBRARIES_BYTES + kept + layer + working + blocks + _coder_bytes(found, threads)


def _coder_bytes(found: Foreseen, threads: int) -> int:
    """Of symbols while they are counted, rows in the coder, and a shard before it is written."""
    shards = found.encoded.shard_bytes
    if not shards:
        return 0
    largest = max(found.plan.tiers, key=lambda tier: tier.num_rows)
    rows = sum(tier.num_rows for tier in found.plan.tiers)
    record = found.encoded.record_bytes / rows
    at_once = min(largest.num_rows, _CODED_ROWS, _CODED_SYMBOLS // max(1, largest.stride))
    counted = threads * 5 * 8 * WORK_ROWS * largest.planes[0].codec.width
    # A shard's records lie there in blocks, in a row, and with their checksums, and twice a
    # byte says which ones are checksums. A word of two bytes takes 40 until it is in its place.
    return counted + 5 * max(shards.values()) + int(at_once * (largest.stride + 20 * record))


def _scratch_bytes(source: TableSource, found: Foreseen, calibrated: bool) -> int:
    """Files that go at the end: rows in passing, and square matrices of each layer."""
    width = source.hidden_size
    rows = 3 * 4 * found.fitted_rows * width
    if found.fitted_rows < source.num_rows:
        rows += 3 * 2 * source.num_rows * width
    return rows + len(found.layers) * 4 * width * width * (5 if calibrated else 1)
