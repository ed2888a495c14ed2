"""What `tol eval` says and writes about a result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tolkit_cli._output import Column, Output
from tolkit_cli._units import number_text, percent_text

if TYPE_CHECKING:
    from tolkit.evaluate import EvalResult, GateVerdict, Metric
    from tolkit.quality_log import QualityRecord, RecordedMetric

__all__ = ["require_writable", "show_result", "write_reports"]

_COLUMNS = (
    Column("metric", "metric", right=False),
    Column("value", "value", human="value_text"),
    Column("se", "+/- s.e.", human="se_text"),
    Column("reference", "reference", human="reference_text"),
    Column("baseline", "baseline", human="baseline_text"),
    Column("n", "n", lambda n: f"{n:,}"),
)


def show_result(
    out: Output, result: EvalResult, verdicts: list[GateVerdict], before: QualityRecord | None
) -> None:
    """The result in every mode: conditions, metrics, verdicts."""
    from tolkit.evaluate import to_json
    from tolkit.evaluate.reports import ordered_metrics

    ran = result.conditions
    text = f"{ran.n_tokens:,} tokens in {ran.n_windows:,} windows of {ran.window_length}"
    out.field("metrics", "identity", result.identity, "model", result.identity[:16])
    if ran.n_tokens:
        out.field("metrics", "tokens", ran.n_tokens, "text", text)
    out.field("metrics", "device", ran.device, text=f"{ran.device}, {ran.dtype}")
    speed = result.tokens_per_s
    shown = None if speed is None else f"{speed:,.0f} tokens/s, all models together"
    out.field("metrics", "tokens_per_s", speed, "speed", shown)
    for problem in result.problems:
        out.warn(problem)
    if result.noise_floor is not None:
        floor = result.noise_floor
        out.text(f"{'noise floor':<20}  KL {floor.value:.2e} +/- {floor.se:.1e} nats")
    if before is not None:
        out.field(
            "metrics",
            "baseline",
            before.bundle,
            text=f"{before.bundle[:16]}, the record of {before.where}",
        )
        if (before.device, before.dtype) != (ran.device, ran.dtype):
            out.warn(f"baseline: was measured on {before.device} in {before.dtype}")
    out.text()
    partners, earlier = result.reference_metrics, before.metrics if before else {}
    rows = [
        _row(name, metric, partners.get(name), earlier.get(name))
        for name, metric in ordered_metrics(result.metrics)
    ]
    columns = [c for c in _COLUMNS if before is not None or c.key != "baseline"]
    out.table("table", columns, rows, in_json=False)
    report = to_json(result, verdicts, before)
    out.record("metrics", **report["metrics"], bytes=report["bytes"])
    out.record("metrics", bits_per_value=report["bits_per_value"])
    for verdict, facts in zip(verdicts, report["gates"], strict=True):
        out.threshold(facts)
        out.text(verdict.message)
    names = [name for name in ("ppl_increase", "ppl_token") if name in result.metrics]
    headline = next(iter([*names, *result.metrics]))
    out.quiet_value(result.metrics[headline].value)


def _row(
    name: str, metric: Metric, partner: Metric | None, earlier: RecordedMetric | None
) -> dict[str, Any]:
    return {
        "metric": name,
        "value": metric.value,
        "value_text": _shown(name, metric.value),
        "se": metric.se,
        "se_text": _shown(name, metric.se).lstrip("+"),
        "reference": partner.value if partner else None,
        "reference_text": _shown(name, partner.value) if partner else "",
        "baseline": earlier.value if earlier else None,
        "baseline_text": _shown(name, earlier.value) if earlier else "",
        "n": metric.n,
    }


def _shown(name: str, value: float) -> str:
    from tolkit.evaluate.gates.syntax import is_ratio

    if is_ratio(name):
        return percent_text(value, signed=name == "ppl_increase")
    return number_text(value)


def require_writable(reports: Mapping[str, Path | None], force: bool) -> None:
    """Said before the work, not after it: a report that has no folder or is already there."""
    from tolkit.errors import OutputExistsError, UsageError

    for name, path in reports.items():
        if path is None:
            continue
        if not path.parent.is_dir():
            raise UsageError(f"{name}: {path.parent}: no such folder")
        if path.exists() and not force:
            raise OutputExistsError(
                f"{path}: already exists", hint="choose another name, or add --force"
            )


def write_reports(
    out: Output,
    result: EvalResult,
    verdicts: list[GateVerdict],
    before: QualityRecord | None,
    reports: Mapping[str, Path | None],
) -> None:
    """The files asked for, and the summary page of a CI step where there is one."""
    import json

    from tolkit.evaluate import append_step_summary, to_json, to_junit, to_markdown
    from tolkit_formats.files import write_atomic

    summary = to_markdown(result, verdicts, before)
    report = to_json(result, verdicts, before)
    texts = {
        "--json-out": json.dumps(report, indent=2, allow_nan=False) + "\n",
        "--junit": to_junit(result, verdicts, before),
        "--markdown": summary,
    }
    for name, path in reports.items():
        if path is not None:
            write_atomic(path, texts[name].encode())
            out.record("outputs", **{name[2:].replace("-", "_"): path})
    append_step_summary(summary)
