"""How a plan of codec bands is shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tolkit_cli._output import Column, Output
from tolkit_cli._units import bytes_text, duration_text

if TYPE_CHECKING:
    from tolkit.compress.outlook import LayerOutlook, Outlook

__all__ = ["show_plan"]

_PARTS = ("records", "bases", "predictors", "scales", "slots", "checksums")
_TITLES = {"checksums": "checksums, headers"}
_LAYERS = (
    Column("bits_per_value", "bits/value", lambda value: f"{value:.4f}"),
    Column("layer", "layer"),
    Column("status", "status", right=False),
    Column("mean_bits", "code bits", lambda value: f"{value:.3f}"),
    Column("rank", "rank"),
    Column("predictor_bits", "predictor"),
    Column("shared_bytes", "basis etc.", bytes_text),
    Column("relative_error", "error", lambda value: f"{value:.5f}"),
    Column("running_sum_error", "running sum", lambda value: f"{value:.5f}"),
)


def show_plan(out: Output, plans: Sequence[Outlook]) -> None:
    """The floor, each size with its parts, cost and layers; the first size's facts as fields."""
    first = plans[0]
    for warning in first.warnings:
        out.warn(warning)
    out.record("outputs", bundle=None, identity=None, dry_run=True)
    out.field("metrics", "floor_bytes", first.floor_bytes, "floor", bytes_text(first.floor_bytes))
    looked = f"{first.fitted_rows:,} rows fitted, {first.encoded_rows:,} encoded"
    out.field("metrics", "fitted_rows", first.fitted_rows, "looked at", looked)
    out.record("metrics", encoded_rows=first.encoded_rows, exact=first.exact, within=first.within)
    if len(plans) == 1:
        note = "" if first.exact else f", within {100 * first.within:g} %"
        tables = f"{bytes_text(first.table_bytes)} predicted{note}"
        out.field("metrics", "bytes", first.table_bytes, "tables", tables)
        bits = f"{first.bits_per_value:.4f}"
        out.field("metrics", "bits_per_value", first.bits_per_value, "bits/value", bits)
    out.text()
    out.table("sizes", _size_columns(), [_size(plan) for plan in plans], leading=1)
    out.text()
    rows = [_layer(plan, layer) for plan in plans for layer in plan.layers]
    out.table("layers", _LAYERS if len(plans) > 1 else _LAYERS[1:], rows)
    out.text()
    out.text("Errors are of the encoded rows. Time: measured on those rows and scaled; memory: a")
    out.text("formula, beyond the started process and one layer's weights.")
    out.quiet_value(first.table_bytes)


def _size_columns() -> list[Column]:
    return [
        Column("bits_per_value", "bits/value", lambda value: f"{value:.4f}"),
        Column("bytes", "tables", bytes_text),
        *(Column(f"{part}_bytes", _TITLES.get(part, part), bytes_text) for part in _PARTS),
        Column("time_s", "time", duration_text),
        Column("memory_bytes", "memory", bytes_text),
        Column("scratch_bytes", "scratch", bytes_text),
    ]


def _size(plan: Outlook) -> dict[str, Any]:
    return {
        "bits_per_value": plan.bits_per_value,
        "bytes": plan.table_bytes,
        **{f"{part}_bytes": plan.parts[part] for part in _PARTS},
        "time_s": plan.time_s,
        "memory_bytes": plan.memory_bytes,
        "scratch_bytes": plan.scratch_bytes,
    }


def _layer(plan: Outlook, layer: LayerOutlook) -> dict[str, Any]:
    kept = layer.status == "kept"
    return {
        "bits_per_value": plan.bits_per_value,
        "layer": layer.layer,
        "status": layer.status if layer.into is None else f"folded into {layer.into}",
        "mean_bits": layer.mean_bits if kept else None,
        "rank": layer.rank if kept else None,
        "predictor_bits": layer.predictor_bits if kept else None,
        "shared_bytes": layer.shared_bytes if kept else None,
        "relative_error": layer.relative_error,
        "running_sum_error": layer.running_sum_error,
    }
