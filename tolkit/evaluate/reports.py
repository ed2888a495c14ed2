"""One result for machines and people: JSON, and Markdown for pull requests (JUnit: junit.py)."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tolkit.evaluate.gates import GateVerdict
from tolkit.evaluate.gates.syntax import is_ratio
from tolkit.evaluate.result import METRIC_NAMES, Conditions, EvalResult, Metric
from tolkit.progress import Progress, TqdmProgress
from tolkit.quality_log import QualityRecord

__all__ = [
    "SCHEMA_NAME",
    "SCHEMA_VERSION",
    "append_step_summary",
    "conditions_json",
    "intervals_json",
    "metrics_json",
    "number_json",
    "ordered_metrics",
    "to_json",
    "to_markdown",
    "verdict_json",
]

SCHEMA_NAME = "tolkit.eval"
SCHEMA_VERSION = "1.0"
_M = TypeVar("_M")


def to_json(
    result: EvalResult,
    verdicts: Sequence[GateVerdict] = (),
    baseline: QualityRecord | None = None,
) -> dict[str, Any]:
    """The result as one JSON object (schemas/eval-1.json); numbers unrounded, or null.

    `metrics` maps each name to {value, se, n}; `intervals_95` to [low, high]; `ok` says whether
    the result can be trusted and every gate let it pass.
    """
    return {
        "schema": SCHEMA_NAME,
        "schema_version": SCHEMA_VERSION,
        "ok": not result.problems and all(verdict.ok for verdict in verdicts),
        "label": result.label,
        "kind": result.kind,
        "identity": result.identity,
        "reference_identity": result.reference_identity,
        "conditions": conditions_json(result.conditions),
        "metrics": metrics_json(result.metrics),
        "intervals_95": intervals_json(result.metrics),
        "reference_metrics": metrics_json(result.reference_metrics),
        "noise_floor_kl_mean_nats": None
        if result.noise_floor is None
        else _metric_json(result.noise_floor),
        "bytes": result.table_bytes,
        "bits_per_value": number_json(result.bits_per_value),
        "baseline": None if baseline is None else _baseline_json(baseline),
        "gates": [verdict_json(verdict) for verdict in verdicts],
        "problems": list(result.problems),
        "tokens_per_s": number_json(result.tokens_per_s),
        "timings_s": {part: round(elapsed, 3) for part, elapsed in result.timings_s.items()},
    }


def metrics_json(metrics: Mapping[str, Metric]) -> dict[str, dict[str, float | int | None]]:
    """Name -> {value, se, n} in the order of METRIC_NAMES, tasks' metrics behind them."""
    return {name: _metric_json(metric) for name, metric in ordered_metrics(metrics)}


def intervals_json(metrics: Mapping[str, Metric]) -> dict[str, list[float | None]]:
    """Name -> both ends of the 95 % interval, null where unknown."""
    return {
        name: [number_json(end) for end in metric.interval]
        for name, metric in ordered_metrics(metrics)
    }


def _baseline_json(record: QualityRecord) -> dict[str, Any]:
    return {
        "identity": record.bundle,
        "metrics": {name: number_json(m.value) for name, m in ordered_metrics(record.metrics)},
        "bytes": record.table_bytes,
        "bits_per_value": number_json(record.bits_per_value),
        "device": record.device,
        "dtype": record.dtype,
    }


def conditions_json(conditions: Conditions) -> dict[str, Any]:
    """What the evaluation ran on, grouped."""
    return {
        "text_digest": conditions.text_digest,
        "tokenizer_digest": conditions.tokenizer_digest,
        "windows": {
            "length": conditions.window_length,
            "packed": conditions.packed,
            "prefix_id": conditions.prefix_id,
        },
        "n": {
            "documents": conditions.n_documents,
            "windows": conditions.n_windows,
            "tokens": conditions.n_tokens,
            "words": conditions.n_words,
            "bytes": conditions.n_bytes,
        },
        "device": conditions.device,
        "dtype": conditions.dtype,
        "versions": dict(conditions.versions),
    }


def verdict_json(verdict: GateVerdict) -> dict[str, Any]:
    """One gate: what was asked, what was found."""
    return {
        "gate": verdict.gate.text,
        "metric": verdict.gate.metric,
        "comparison": verdict.gate.comparison,
        "limit": verdict.gate.limit,
        "status": verdict.status,
        "ok": verdict.ok,
        "value": number_json(verdict.value),
        "low": number_json(verdict.low),
        "high": number_json(verdict.high),
        "against": verdict.gate.partner,
        "relative": verdict.gate.relative,
        "change": None
        if verdict.change is None
        else {
            "from": number_json(verdict.change.against),
            "value": number_json(verdict.change.value),
            "low": number_json(verdict.change.low),
            "high": number_json(verdict.change.high),
            "paired": verdict.change.paired,
        },
        "message": verdict.message,
    }


def number_json(value: float | None) -> float | None:
    """`value`, or None where JSON has no such number."""
    return value if value is not None and math.isfinite(value) else None


def _metric_json(metric: Metric) -> dict[str, float | int | None]:
    return {"value": number_json(metric.value), "se": number_json(metric.se), "n": metric.n}


def ordered_metrics(metrics: Mapping[str, _M]) -> list[tuple[str, _M]]:
    """Names and metrics as reports list them: METRIC_NAMES, then the others as they come."""
    names = [name for name in METRIC_NAMES if name in metrics]
    names += [name for name in metrics if name not in METRIC_NAMES]
    return [(name, metrics[name]) for name in names]


def to_markdown(
    result: EvalResult,
    verdicts: Sequence[GateVerdict] = (),
    baseline: QualityRecord | None = None,
) -> str:
    """A heading, the gates, the metrics with errors, and what they were measured on.

    With a baseline its values have a column.
    """
    met = sum(verdict.ok for verdict in verdicts)
    heading = f"## {_cell(result.label)}"
    if verdicts:
        heading += f": {met} of {len(verdicts)} gates met"
    lines = [heading, ""]
    lines += [f"- **problem:** {_cell(problem)}" for problem in result.problems]
    if result.problems:
        lines.append("")
    if verdicts:
        lines += ["| gate | verdict | measured |", "|---|---|---|"]
        for verdict in verdicts:
            said = verdict.message.removeprefix(f"{verdict.gate.text}: ")
            shown = verdict.status if verdict.ok else f"**{verdict.status}**"
            lines.append(f"| {_code(verdict.gate.text)} | {shown} | {_cell(said)} |")
        lines.append("")
    lines += _metric_table(result, baseline)
    conditions = result.conditions
    shape = "packed" if conditions.packed else "per document"
    text = "no text, "
    if conditions.n_tokens:
        text = (
            f"{conditions.n_tokens:,} tokens in {conditions.n_windows:,} windows of "
            f"{conditions.window_length} ({shape}), text `{conditions.text_digest[:12]}`, "
        )
    lines += [
        "",
        f"{text}{conditions.device}, {conditions.dtype}; model `{result.identity[:12]}`, "
        f"reference `{(result.reference_identity or 'none')[:12]}`"
        + ("." if baseline is None else f", baseline `{baseline.bundle[:12]}`."),
    ]
    if result.noise_floor is not None:
        lines.append(
            f"Noise floor of {conditions.dtype}: mean KL {result.noise_floor.value:.3g} nats "
            f"+- {result.noise_floor.se:.2g}."
        )
    return "\n".join(lines) + "\n"


def _metric_table(result: EvalResult, baseline: QualityRecord | None) -> list[str]:
    """The rows of a Markdown table: metrics, then the exact sizes."""
    titles = ["metric", "value", "s.e.", "reference", *([] if baseline is None else ["baseline"])]
    rows = []
    for name, metric in ordered_metrics(result.metrics):
        reference = result.reference_metrics.get(name)
        cells = [name, _shown(name, metric.value), _shown(name, metric.se)]
        cells.append("" if reference is None else _shown(name, reference.value))
        if baseline is not None:
            before = baseline.metrics.get(name)
            cells.append("" if before is None else _shown(name, before.value))
        rows.append([*cells, f"{metric.n:,}"])
    for name, form, now, before_size in (
        ("bytes", ",", result.table_bytes, baseline and baseline.table_bytes),
        ("bits_per_value", ".4f", result.bits_per_value, baseline and baseline.bits_per_value),
    ):
        if now is not None:
            was = [] if baseline is None else [format(before_size, form) if before_size else ""]
            rows.append([name, format(now, form), "", "", *was, ""])
    ruler = ["---", *["---:"] * len(titles)]
    return [
        f"| {' | '.join([*titles, 'n'])} |",
        f"|{'|'.join(ruler)}|",
        *("|" + "|".join(f" {cell} " if cell else " " for cell in row) + "|" for row in rows),
    ]


def _shown(name: str, value: float) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{value:.4%}" if is_ratio(name) else f"{value:.5g}"


def _cell(text: str) -> str:
    """Text that cannot end a table cell or a line, nor start a tag."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _code(text: str) -> str:
    return "`" + " ".join(text.split()).replace("|", "\\|").replace("`", "'") + "`"


def append_step_summary(markdown: str, progress: Progress | None = None) -> bool:
    """Add to the summary page of a GitHub Actions step ($GITHUB_STEP_SUMMARY).

    Returns whether it was added: False outside of Actions, and with a warning where the file
    cannot be written, since a summary must not decide a pipeline.
    """
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if not path:
        return False
    try:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(markdown + "\n")
    except OSError as error:
        reason = os.strerror(error.errno or 0).lower()
        (progress or TqdmProgress()).warn(f"{path}: no step summary added ({reason})")
        return False
    return True
