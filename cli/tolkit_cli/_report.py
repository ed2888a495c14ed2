"""How the commands that write a bundle say what they wrote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tolkit_cli._describe import ERROR_COLUMNS, show_partial
from tolkit_cli._output import Column, Output
from tolkit_cli._units import bytes_text, duration_text

if TYPE_CHECKING:
    from tolkit.bundling import BundleReport, LayerReport

__all__ = ["show_report"]

_COLUMNS = (
    Column("layer", "layer"),
    Column("status", "status", right=False),
    Column("codec", "codec", right=False),
    Column("bytes_per_token", "bytes/token", lambda value: f"{value:,}"),
    Column("shared_bytes", "basis", bytes_text),
    *ERROR_COLUMNS,
)


def show_report(out: Output, report: BundleReport) -> None:
    """Where it is, what it takes, and each layer's codec and errors (as tol diff has them)."""
    planned = report.path is None
    for warning in report.warnings:
        out.warn(warning)
    out.field("outputs", "bundle", report.path)
    out.record("outputs", identity=report.identity, dry_run=planned)
    tables = f"{bytes_text(report.table_bytes)}{' predicted' if planned else ''}"
    out.field("metrics", "bytes", report.table_bytes, "tables", tables)
    nominal = report.nominal_bits_per_value
    bits = f"{report.bits_per_value:.4f} ({nominal:.4f} for codes alone)"
    out.field("metrics", "bits_per_value", report.bits_per_value, "bits/value", bits)
    out.record("metrics", nominal_bits_per_value=nominal)
    if report.partial is not None:
        show_partial(out, report.partial)
    if report.bundle_bytes is not None:
        size = bytes_text(report.bundle_bytes)
        out.field("metrics", "bundle_bytes", report.bundle_bytes, "with backbone", size)
        out.field("metrics", "elapsed_s", report.elapsed_s, "time", duration_text(report.elapsed_s))
    out.record("metrics", resumed=report.resumed)
    out.text()
    out.table("layers", _COLUMNS, [_row(layer) for layer in report.layers])
    out.quiet_value(report.table_bytes if planned else report.path)


def _row(layer: LayerReport) -> dict[str, Any]:
    status = layer.status if layer.into is None else f"folded into {layer.into}"
    return {
        "layer": layer.layer,
        "status": status,
        "codec": None if layer.codec is None else _label(layer.codec),
        "bytes_per_token": layer.bytes_per_token or None,
        "shared_bytes": layer.shared_bytes or None,
        "relative_error": layer.relative_error,
        "running_sum_error": layer.running_sum_error,
    }


def _label(params: Mapping[str, Any]) -> str:
    """As codec_label of the same codec: "nf4", "rank 512 x int8", "f16"."""
    if params["name"] == "svd":
        return f"rank {params['rank']} x {_label(params['inner'])}"
    return str(params["dtype"] if params["name"] == "raw" else params["name"])
