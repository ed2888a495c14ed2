"""What codec `bands` will make of a size, before anything is written.

V vocabulary, L layers, D hidden, R rows of a basis, J width of the joint moments.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from tolkit.bundling import Resources
from tolkit.compress import CompressSpec, open_for
from tolkit.compress.budget import Filled
from tolkit.compress.encode import (
    HELD_BYTES,
    WORK_ROWS,
    Shared,
    block_target,
    encode_block,
)
from tolkit.compress.fit_bands import filled_plan, fit_bands, floor_bytes, sampled_rows
from tolkit.compress.plan import EncodePlan, plan_compress
from tolkit.compress.resolve import BandsLayer, WorkingArrays
from tolkit.compress.running import squares
from tolkit.decode.record_decoder import unit_rows
from tolkit.parallel import BlockPool, block_pool
from tolkit.progress import Progress, TqdmProgress
from tolkit.sources import TableSource
from tolkit_formats.layer_errors import ErrorSums
from tolkit_formats.records import Tier
from tolkit_formats.tensorfile import ITEM_BYTES

__all__ = ["LayerOutlook", "Outlook", "outlook"]

_LIBRARIES_BYTES = 48 << 20  # buffers of the numeric libraries once they have run
_KINDS = {"basis": "bases", "predictor": "predictors"}
_BLOCKS = 8  # of rows that are encoded to see what is lost and how long it takes


@dataclass(frozen=True)
class LayerOutlook:
    """One layer.

    Attributes:
        status, into: as in the manifest.
        mean_bits: of codes a value, over tokens.
        rank: rows of the basis.     predictor_bits: 0 without.
        shared_bytes: of basis, predictor, scales, codebooks and mean.
        relative_error: ||decoded - table|| / ||table|| of the layer alone, and
        running_sum_error: that of the sum of layers so far; of the encoded sample.
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
        table_bytes: that will be taken; `exact` where all rows were fitted.
        parts: the same by what it is for; they add up.
        fitted_rows, encoded_rows: what was looked at.
        time_s: of the whole compression: the search for the size as it took here, the pass over
            all rows and their encoding scaled from the rows looked at. Copying of the backbone is
            not in it.
        memory_bytes: beyond the process after imports and one layer's weights, by formula.
        scratch_bytes: files that are removed at the end.
    """

    budget_bytes: int
    table_bytes: int
    bits_per_value: float
    exact: bool
    parts: Mapping[str, int]
    layers: tuple[LayerOutlook, ...]
    floor_bytes: int
    fitted_rows: int
    encoded_rows: int
    time_s: float
    memory_bytes: int
    scratch_bytes: int
    warnings: tuple[str, ...]


def outlook(
    source_path: str | Path,
    spec: CompressSpec,
    *,
    resources: Resources | None = None,
    progress: Progress | None = None,
) -> Outlook:
    """Fit a sample of rows to the size of `spec`, encode some of them, write nothing.

    Cost: up to six walks over at most 16,384 rows.

    Args:
        spec: codec `bands` with a size.

    Raises:
        UsageError: the size is below the floor.     MismatchError: counts or metric of another
        model.     NonFiniteError: names the layer.
    """
    progress = progress or TqdmProgress()
    source, counts_V, calibration = open_for(source_path, spec)
    plan = plan_compress(source, spec)
    floor = floor_bytes(source, plan, counts_V)
    with (
        block_pool((resources or Resources()).threads) as pool,
        tempfile.TemporaryDirectory(prefix="tolkit-") as work,
    ):
        started_s = time.perf_counter()
        filled = fit_bands(
            source, plan, counts_V, calibration, Path(work), pool, progress, sample_only=True
        )
        fit_s = time.perf_counter() - started_s
        done = filled_plan(plan, filled)
        shared = WorkingArrays(filled.layers)
        started_s = time.perf_counter()
        errors, encoded = _encode_sample(source, done, shared, pool)
        encode_s = time.perf_counter() - started_s
        threads = pool.threads
    fitted = sampled_rows(source.num_rows)
    exact = fitted == source.num_rows
    time_s = fit_s + encode_s * source.num_rows / encoded
    if not exact:
        time_s += fit_s / filled.walks * source.num_rows / fitted
    values = source.vocab_size * source.num_layers * source.hidden_size
    return Outlook(
        budget_bytes=plan.table_bytes,
        table_bytes=filled.table_bytes,
        bits_per_value=8 * filled.table_bytes / values,
        exact=exact,
        parts=_parts(source, filled),
        layers=_layers(done, filled, errors),
        floor_bytes=floor,
        fitted_rows=fitted,
        encoded_rows=encoded,
        time_s=time_s,
        memory_bytes=_memory_bytes(source, filled, fitted, threads),
        scratch_bytes=_scratch_bytes(source, len(plan.planes), calibration is not None, fitted),
        warnings=plan.warnings,
    )


def _encode_sample(
    source: TableSource, plan: EncodePlan, shared: Shared, pool: BlockPool
) -> tuple[dict[int, ErrorSums], int]:
    """Errors of all rows, estimated from evenly spaced blocks of each tier, and rows encoded."""
    errors = {plane.layer: ErrorSums() for plane in plan.planes}
    encoded = 0
    for tier in plan.tiers:
        spans = _spans(tier, source.num_rows)
        rows = sum(stop - first for first, stop in spans)
        encoded += rows
        carries: list[Tensor | None] = [None] * len(spans)
        units: list[Tensor | None] = [None] * len(spans)
        sums: list[Tensor | None] = [None] * len(spans)
        if plan.predictors:
            units = [unit_rows(source.embedded(*span)) for span in spans]
        for plane in plan.planes:
            arrays = shared[plane.layer]
            targets = block_target(source, plane, spans, pool)
            for i, own_ND in enumerate(targets):
                before_ND = sums[i]
                sums[i] = total_ND = own_ND if before_ND is None else before_ND + own_ND
                _, carry_ND, lost = encode_block(
                    source,
                    plane,
                    own_ND,
                    carries[i],
                    arrays,
                    feedback=plan.feedback,
                    first_slot=spans[i][0],
                    tier=tier.index,
                    unit_ND=units[i],
                )
                share = tier.num_rows / rows
                carries[i] = carry_ND
                parts = (squares(own_ND), lost, squares(total_ND), squares(carry_ND))
                errors[plane.layer].add(ErrorSums(*(share * part for part in parts)))
    return errors, encoded


def _spans(tier: Tier, num_rows: int) -> list[tuple[int, int]]:
    """Blocks of a tier as compression cuts them, evenly spaced, at least one."""
    firsts = np.arange(tier.first_slot, tier.first_slot + tier.num_rows, WORK_ROWS)
    wanted = max(1, round(_BLOCKS * tier.num_rows / num_rows))
    places = np.unique(np.linspace(0, len(firsts) - 1, wanted).round().astype(int))
    stop = tier.first_slot + tier.num_rows
    return [(int(first), min(int(first) + WORK_ROWS, stop)) for first in firsts[places]]


def _layers(
    plan: EncodePlan, filled: Filled, errors: Mapping[int, ErrorSums]
) -> tuple[LayerOutlook, ...]:
    found = []
    for layer, status in enumerate(plan.statuses):
        decided = filled.layers.get(layer)
        if decided is None:
            found.append(LayerOutlook(layer, status.status, status.into))
            continue
        error = errors[layer]
        found.append(
            LayerOutlook(
                layer,
                status.status,
                None,
                _mean_bits(decided, plan.tiers),
                _rank(decided),
                0 if decided.predictor is None else decided.predictor.bits,
                sum(_shared_bytes(decided).values()),
                error.relative,
                error.running_sum,
            )
        )
    return tuple(found)


def _mean_bits(decided: BandsLayer, tiers: Sequence[Tier]) -> float:
    codes = [
        tier.num_rows * float(codec.widths_R.sum()) / codec.width
        for tier, codec in zip(tiers, decided.codecs, strict=True)
    ]
    return sum(codes) / sum(tier.num_rows for tier in tiers)


def _rank(decided: BandsLayer) -> int:
    """Rows of the basis; without one, coefficients that some token stores."""
    codec = decided.codecs[0]
    if codec.basis:
        return codec.rank
    return max(len(codec.stored_C) for codec in decided.codecs)


def _shared_bytes(decided: BandsLayer) -> dict[str, int]:
    """Bytes of stored arrays by what they are for."""
    found = {"bases": 0, "predictors": 0, "scales": 0}
    for name, (dtype, array) in decided.stored.items():
        kind = _KINDS.get(name.partition("_")[0], "scales")
        found[kind] += math.prod(array.shape) * ITEM_BYTES[dtype]
    return found


def _parts(source: TableSource, filled: Filled) -> dict[str, int]:
    parts = {"records": sum(tier.num_rows * tier.stride for tier in filled.tiers)}
    for decided in filled.layers.values():
        for kind, size in _shared_bytes(decided).items():
            parts[kind] = parts.get(kind, 0) + size
    parts["slots"] = 0 if source.slot_of_token_V is None else 4 * source.vocab_size
    parts["checksums"] = filled.table_bytes - sum(parts.values())
    return parts


def _memory_bytes(source: TableSource, filled: Filled, rows: int, threads: int) -> int:
    """Of a layer being fitted and of blocks being encoded, which the allocator may both keep."""
    width = source.hidden_size
    ranks = [_rank(decided) for decided in filled.layers.values()]
    predicts = any(decided.predictor is not None for decided in filled.layers.values())
    joint = 1 + width * (2 if predicts else 1)
    # Codes of all layers' bases and predictors, int8; what a layer's statistics and transforms
    # take in float64; coefficients of sampled rows, once more while they are sorted by width.
    kept = sum(rank * width for rank in ranks) + len(ranks) * predicts * width * width
    layer = 8 * (4 * joint * joint + 6 * width * width) + 3 * 8 * min(rows, 4096) * width
    stride = max(tier.stride for tier in filled.tiers)
    held = min(source.num_rows, HELD_BYTES // (stride + 4 * width))
    working = 2 * 4 * max(ranks) * width + 4 * predicts * width * width
    # Of a held row: its record, carry, target and, for predictions, embedding.
    blocks = held * (stride + 4 * width * (2 + predicts)) + threads * 6 * 4 * WORK_ROWS * width
    return _LIBRARIES_BYTES + kept + layer + working + blocks


def _scratch_bytes(source: TableSource, layers: int, calibrated: bool, fitted: int) -> int:
    """Files that go at the end: rows in passing, and square matrices of each layer."""
    width = source.hidden_size
    rows = 3 * 4 * fitted * width
    if fitted < source.num_rows:
        rows += 3 * 2 * source.num_rows * width
    return rows + layers * 4 * width * width * (5 if calibrated else 1)
