"""What a command that makes a bundle has to say about it, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tolkit.compress.plan import EncodePlan, PlanePlan, nominal_bits
from tolkit_formats.layer_errors import LayerErrors
from tolkit_formats.partial import Partial
from tolkit_formats.tensorfile import ITEM_BYTES

__all__ = ["BundleReport", "LayerReport", "layer_reports", "nominal_bits_of"]


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    The errors are those of the manifest (tolkit_formats.layer_errors); None where they are not
    known: after a dry run, and of planes copied from a bundle that does not say.
    """

    layer: int
    status: str
    into: int | None = None
    codec: Mapping[str, object] | None = None
    bytes_per_token: float = 0
    shared_bytes: int = 0
    relative_error: float | None = None
    running_sum_error: float | None = None


@dataclass(frozen=True)
class BundleReport:
    """What a command wrote. `path` is None after a dry run; bytes are then predictions.

    partial: which tokens have a record, None where all have.
    """

    command: str
    source: Path
    path: Path | None
    identity: str | None
    layers: tuple[LayerReport, ...]
    table_bytes: int
    bundle_bytes: int | None
    bits_per_value: float
    nominal_bits_per_value: float
    elapsed_s: float
    resumed: bool = False
    warnings: tuple[str, ...] = ()
    checks: Mapping[str, float] = field(default_factory=dict)
    partial: Partial | None = None


def layer_reports(plan: EncodePlan, errors: Sequence[LayerErrors]) -> tuple[LayerReport, ...]:
    """What became of every layer of the source; layers without `errors` have none."""
    planes = {p.layer: p for p in plan.planes}
    known = {found.layer: found for found in errors}
    reports = []
    for layer, status in enumerate(plan.statuses):
        plane = planes.get(layer)
        found = known.get(layer, LayerErrors(layer))
        figures = (found.relative, found.running_sum)
        if plane is None:
            gone = LayerReport(layer, status.status, status.into)
            reports.append(replace(gone, relative_error=figures[0], running_sum_error=figures[1]))
            continue
        reports.append(
            LayerReport(
                layer,
                status.status,
                None,
                plane.codec.to_json(),
                _bytes_per_token(plan, plane),
                _shared_bytes(plan, plane),
                *figures,
            )
        )
    return tuple(reports)


def nominal_bits_of(plan: EncodePlan, vocab_size: int) -> float:
    """Bits of codes alone per original value: what the paper counts (Tables 7 and 8)."""
    rows = sum(tier.num_rows for tier in plan.tiers)
    if plan.coding is not None:
        record_bytes = sum(plan.layer_bytes.values()) or plan.table_bytes / rows
        row_bits = 8 * record_bytes / plan.planes[0].codec.width / len(plan.statuses)
        return row_bits * rows / vocab_size
    total = sum(
        tier.num_rows * nominal_bits(codec)
        for plane in plan.planes
        for tier, codec in zip(plan.tiers, plane.codecs, strict=True)
    )
    return total / vocab_size / len(plan.statuses)


def _bytes_per_token(plan: EncodePlan, plane: PlanePlan) -> float:
    """Mean over tokens, where tiers differ."""
    if plan.coding is not None:
        return plan.layer_bytes.get(plane.layer, 0.0)  # a plain drop tells planes not apart
    sizes = [
        tier.num_rows * sum(codec.segments())
        for tier, codec in zip(plan.tiers, plane.codecs, strict=True)
    ]
    return sum(sizes) / sum(tier.num_rows for tier in plan.tiers)


def _shared_bytes(plan: EncodePlan, plane: PlanePlan) -> int:
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for codec in plane.codecs:
        shapes |= codec.shared_shapes()
    if plane.layer in plan.predictors:
        shapes |= plan.predictors[plane.layer].shared_shapes()
    return sum(math.prod(shape) * ITEM_BYTES[dtype] for dtype, shape in shapes.values())
