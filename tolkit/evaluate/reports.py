"""One result for machines and people: JSON, Markdown (pull requests), JUnit XML (test tabs)."""

from __future__ import annotations

import math
import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tolkit.evaluate.gates import GateVerdict
from tolkit.evaluate.result import METRIC_NAMES, Conditions, EvalResult, Metric
from tolkit.progress import Progress, TqdmProgress

__all__ = [
    "SCHEMA_NAME",
    "SCHEMA_VERSION",
    "append_step_summary",
    "conditions_json",
    "metrics_json",
    "number_json",
    "to_json",
    "to_junit",
    "to_markdown",
    "verdict_json",
]

SCHEMA_NAME = "tolkit.eval"
SCHEMA_VERSION = "1.0"
# XML 1.0 has no way to write the other control characters.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_json(result: EvalResult, verdicts: Sequence[GateVerdict] = ()) -> dict[str, Any]:
    """The result as one JSON object; numbers unrounded, those that are not finite null.

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
        "intervals_95": {
            name: [number_json(end) for end in metric.interval]
            for name, metric in _ordered(result.metrics)
        },
        "reference_metrics": metrics_json(result.reference_metrics),
        "noise_floor_kl_mean_nats": None
        if result.noise_floor is None
        else _metric_json(result.noise_floor),
        "bytes": result.table_bytes,
        "bits_per_value": number_json(result.bits_per_value),
        "gates": [verdict_json(verdict) for verdict in verdicts],
        "problems": list(result.problems),
        "tokens_per_s": number_json(result.tokens_per_s),
        "timings_s": {part: round(elapsed, 3) for part, elapsed in result.timings_s.items()},
    }


def metrics_json(metrics: Mapping[str, Metric]) -> dict[str, dict[str, float | int | None]]:
    """Name -> {value, se, n} in the order of METRIC_NAMES."""
    return {name: _metric_json(metric) for name, metric in _ordered(metrics)}


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
        "message": verdict.message,
    }


def number_json(value: float | None) -> float | None:
    """`value`, or None where JSON has no such number."""
    return value if value is not None and math.isfinite(value) else None


def _metric_json(metric: Metric) -> dict[str, float | int | None]:
    return {"value": number_json(metric.value), "se": number_json(metric.se), "n": metric.n}


def _ordered(metrics: Mapping[str, Metric]) -> list[tuple[str, Metric]]:
    return [(name, metrics[name]) for name in METRIC_NAMES if name in metrics]


def to_markdown(result: EvalResult, verdicts: Sequence[GateVerdict] = ()) -> str:
    """A heading, the gates, the metrics with errors, and what they were measured on."""
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
    lines += ["| metric | value | s.e. | reference | n |", "|---|---:|---:|---:|---:|"]
    for name, metric in _ordered(result.metrics):
        reference = result.reference_metrics.get(name)
        lines.append(
            f"| {name} | {_shown(name, metric.value)} | {_shown(name, metric.se)} "
            f"| {'' if reference is None else _shown(name, reference.value)} | {metric.n:,} |"
        )
    if result.table_bytes is not None:
        lines.append(f"| bytes | {result.table_bytes:,} | | | |")
    if result.bits_per_value is not None:
        lines.append(f"| bits_per_value | {result.bits_per_value:.4f} | | | |")
    conditions = result.conditions
    shape = "packed" if conditions.packed else "per document"
    lines += [
        "",
        f"{conditions.n_tokens:,} tokens in {conditions.n_windows:,} windows of "
        f"{conditions.window_length} ({shape}), {conditions.device}, {conditions.dtype}; "
        f"text `{conditions.text_digest[:12]}`, model `{result.identity[:12]}`, "
        f"reference `{(result.reference_identity or 'none')[:12]}`.",
    ]
    if result.noise_floor is not None:
        lines.append(
            f"Noise floor of {conditions.dtype}: mean KL {result.noise_floor.value:.3g} nats "
            f"+- {result.noise_floor.se:.2g}."
        )
    return "\n".join(lines) + "\n"


def _shown(name: str, value: float) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{value:.4%}" if name in ("ppl_increase", "top1_agreement") else f"{value:.5g}"


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


def to_junit(result: EvalResult, verdicts: Sequence[GateVerdict] = ()) -> str:
    """JUnit XML with one test case a gate, as GitHub and GitLab read it.

    Metrics are properties of the suite. A result with problems and no gates is one failed case:
    an empty suite would count as passed.
    """
    cases = [
        (verdict.gate.text, None if verdict.ok else (verdict.status, verdict.message))
        for verdict in verdicts
    ]
    if result.problems and not cases:
        cases = [("evaluation", ("failed", "; ".join(result.problems)))]
    failures = sum(failure is not None for _, failure in cases)
    counts = {"tests": str(len(cases)), "failures": str(failures), "errors": "0", "skipped": "0"}
    elapsed = f"{result.timings_s.get('pass', 0.0):.3f}"
    root = ET.Element("testsuites", {"name": "tolkit", **counts, "time": elapsed})
    name = _xml(f"tol eval {result.label}")
    suite = ET.SubElement(root, "testsuite", {"name": name, **counts, "time": elapsed})
    properties = ET.SubElement(suite, "properties")
    for key, value in _properties(result):
        ET.SubElement(properties, "property", {"name": key, "value": _xml(value)})
    for case_name, failure in cases:
        case = ET.SubElement(
            suite,
            "testcase",
            {"classname": "tolkit.eval", "name": _xml(case_name), "time": "0"},
        )
        if failure is not None:
            kind, message = failure
            element = ET.SubElement(case, "failure", {"type": kind, "message": _xml(message)})
            element.text = _xml(message)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _properties(result: EvalResult) -> list[tuple[str, str]]:
    found = [("model", result.identity), ("reference", result.reference_identity or "none")]
    found += [
        (f"{name}.{part}", repr(number))
        for name, metric in _ordered(result.metrics)
        for part, number in (("value", metric.value), ("se", metric.se))
    ]
    return [*found, ("tokens", str(result.conditions.n_tokens))]


def _xml(text: str) -> str:
    """`text` with what XML cannot hold written as its code point."""
    return _NOT_XML.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
