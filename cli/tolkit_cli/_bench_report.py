"""What `tol bench` shows: conditions, a table, and what to hold beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tolkit_cli._output import Column, Output
from tolkit_cli._units import bytes_text, count_text, percent_text

if TYPE_CHECKING:
    from tolkit.bench import DecodeReport, LookupReport, ReplayReport

__all__ = ["show_decode", "show_lookup", "show_replay"]


def show_decode(out: Output, report: DecodeReport) -> None:
    """A row a variant, then the paper's."""
    from tolkit.study.paper import SOURCE, TABLE_6

    spec = report.spec
    tied = f"{report.layers} layers, vocabulary {report.vocab_size:,}, {report.dtype}"
    out.field("metrics", "device", report.device, text=f"{report.device}, {tied}")
    out.record("metrics", dtype=report.dtype, layers=report.layers, vocab_size=report.vocab_size)
    out.field("metrics", "threads", report.threads)
    out.field("metrics", "context", spec.context, text=f"{spec.context:,} positions")
    rounds = f"{spec.rounds} of {spec.tokens} tokens, in turn"
    out.field("metrics", "rounds", spec.rounds, text=rounds)
    peak, on_device = report.peak_anonymous_bytes, report.peak_device_bytes
    out.field("metrics", "peak_anonymous_bytes", peak, "memory at most", _bytes(peak))
    if on_device is not None:
        out.field("metrics", "peak_device_bytes", on_device, "on the device", _bytes(on_device))
    out.text()
    rows = [vars(result) for result in report.results]
    out.record("metrics", rounds_ms={_label(row): row["rounds_ms"] for row in rows})
    out.table("models", _DECODE_COLUMNS, rows, leading=2)
    out.text()
    first = report.results[0].name
    out.text(f"Ratios are to {first}, medians over rounds. Bound: weights a token must read; with")
    out.text("keys and values of the full context in the next column.")
    out.text()
    out.record("metrics", paper={"source": f"{SOURCE}, {TABLE_6.place}", "rows": TABLE_6.rows})
    out.text(f"The paper ({SOURCE}, {TABLE_6.place}, {TABLE_6.text}):")
    for name, *cells in (TABLE_6.columns, *TABLE_6.rows):
        out.text("  " + f"{name:<12}" + "".join(f"{cell:>10}" for cell in cells))
    out.quiet_value(report.results[-1].ratio)


def show_lookup(out: Output, report: LookupReport) -> None:
    """A row a way and batch."""
    out.field("metrics", "device", report.device)
    text = f"{report.record_bytes:,.0f} bytes"
    out.field("metrics", "record_bytes", report.record_bytes, "a record", text)
    out.field("metrics", "table_bytes", report.table_bytes, "tables", _bytes(report.table_bytes))
    out.text()
    out.table("lookups", _LOOKUP_COLUMNS, [vars(result) for result in report.results], leading=3)
    out.text()
    out.text("Disk, host and device give decoded rows, the others bytes as stored. Ratios: bytes")
    out.text("given a second over those of the bare gather of the same tokens and state.")
    rates = [r.rows_per_s for r in report.results if r.rows_per_s is not None]
    out.quiet_value(max(rates))


def show_replay(out: Output, report: ReplayReport) -> None:
    """A row a size, policy and state."""
    spec = report.spec
    tokens = f"{report.tokens:,}, {report.distinct:,} different"
    out.field("metrics", "tokens", report.tokens, text=tokens)
    out.record("metrics", distinct=report.distinct)
    if report.without_record:
        share = percent_text(report.without_record / report.tokens, 1)
        text = f"{report.without_record:,} ({share}), which ask for no row"
        out.field("metrics", "without_record", report.without_record, "without a record", text)
    text = f"{report.record_bytes:,.0f} bytes"
    out.field("metrics", "record_bytes", report.record_bytes, "a record", text)
    out.field("metrics", "table_bytes", report.table_bytes, "tables", _bytes(report.table_bytes))
    disk = f"{1e6 * spec.read_latency_s:g} us a read, {_bytes(spec.read_bytes_per_s)}/s"
    out.text(f"{'disk to predict for':<20}  {disk}, {1e3 * spec.step_s:g} ms a step besides")
    out.text()
    out.table("caches", _REPLAY_COLUMNS, [vars(result) for result in report.results], leading=2)
    out.quiet_value(max(result.hit_rate for result in report.results))


def _label(row: Mapping[str, Any]) -> str:
    return ", ".join(part for part in (row["name"], row["tables"]) if part)


def _bytes(size_bytes: float | None) -> str:
    return "-" if size_bytes is None else bytes_text(size_bytes)


def _ms(value: float) -> str:
    return f"{value:.2f}"


def _ratio(value: float) -> str:
    return f"{value:.3f}"


def _share(value: float) -> str:
    return percent_text(value, 1)


_DECODE_COLUMNS = (
    Column("name", "model", right=False),
    Column("tables", "tables", lambda place: place or "-", right=False),
    Column("ms_per_token", "ms/token", _ms),
    Column("ratio", "ratio", _ratio),
    Column("cpu_ms_per_token", "CPU ms", _ms),
    Column("cpu_ratio", "ratio", _ratio),
    Column("bound", "bound", _ratio),
    Column("bound_with_cache", "with KV", _ratio),
    Column("weights_bytes", "weights", bytes_text),
    Column("tables_bytes", "tables held", bytes_text),
    Column("memory_ratio", "ratio", _ratio),
    Column("cache_bytes", "KV", bytes_text),
    Column("anonymous_bytes", "anonymous", bytes_text),
    Column("device_bytes", "on device", bytes_text),
    Column("read_bytes", "read/token", bytes_text),
    Column("flops", "FLOP/token", count_text),
    Column("table_read_bytes", "rows read/token", bytes_text),
    Column("hit_rate", "hits", _share),
    Column("computed", "computed", _share),
    Column("resident_before", "in page cache", _share),
    Column("resident_after", "after", _share),
    Column("architecture", "kind", right=False),
    Column("generated", "random", lambda random: "yes" if random else "no"),
)
_LOOKUP_COLUMNS = (
    Column("what", "rows from", right=False),
    Column("state", "state", lambda state: state or "-", right=False),
    Column("batch", "batch", lambda batch: f"{batch:,}" if batch else "-"),
    Column("rows_per_s", "rows/s", count_text),
    Column("bytes_per_s", "bytes/s", bytes_text),
    Column("decoded_bytes_per_s", "decoded/s", bytes_text),
    Column("ratio", "of a gather", _ratio),
    Column("resident_before", "in page cache", _share),
)
_REPLAY_COLUMNS = (
    Column("cache_bytes", "cache", bytes_text),
    Column("policy", "policy", right=False),
    Column("by", "by", right=False),
    Column("state", "state", lambda state: state or "-", right=False),
    Column("hit_rate", "hits", _share),
    Column("reads_per_token", "reads/token", _ratio),
    Column("bytes_per_token", "bytes/token", bytes_text),
    Column("predicted_tokens_per_s", "tokens/s", count_text),
    Column("us_per_token", "us/token", _ms),
    Column("frames", "records held", count_text),
    Column("hits", "hits, tokens", count_text),
    Column("seed_bytes", "seed", bytes_text),
    Column("resident_before", "in page cache", _share),
    Column("resident_after", "after", _share),
)
