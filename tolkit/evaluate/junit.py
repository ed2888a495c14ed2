"""An evaluation as JUnit XML, for the test tabs of continuous integration.

One suite, one case a gate. Only what the schema of Jenkins' xUnit plugin (junit-10) knows is
written, properties first and output last, which GitHub's and GitLab's readers accept too.
"""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass

from tolkit.evaluate.gates import GateVerdict
from tolkit.evaluate.reports import ordered_metrics
from tolkit.evaluate.result import EvalResult
from tolkit.quality_log import QualityRecord

__all__ = ["to_junit"]

# XML 1.0 has no way to write the other control characters.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class _Case:
    """`failure`: kind and message; `output`: what was measured."""

    name: str
    failure: tuple[str, str] | None
    output: str


def to_junit(
    result: EvalResult,
    verdicts: Sequence[GateVerdict] = (),
    baseline: QualityRecord | None = None,
) -> str:
    """JUnit XML with one test case a gate; the time of the evaluation is shared out among them.

    Metrics are properties of the suite. Without gates there is one case, which fails when the
    result has problems: an empty suite would count as passed, or as an error of the reader.
    """
    cases = _cases(result, verdicts)
    elapsed_s = result.timings_s.get("pass", 0.0)
    counts = {
        "tests": str(len(cases)),
        "failures": str(sum(case.failure is not None for case in cases)),
        "errors": "0",
        "time": f"{elapsed_s:.3f}",
    }
    root = ET.Element("testsuites", {"name": "tolkit", **counts})
    name = _xml(f"tol eval {result.label}")
    suite = ET.SubElement(root, "testsuite", {"name": name, **counts, "skipped": "0"})
    properties = ET.SubElement(suite, "properties")
    for key, value in _properties(result, baseline):
        ET.SubElement(properties, "property", {"name": _xml(key), "value": _xml(value)})
    for case in cases:
        _add_case(suite, case, elapsed_s / len(cases))
    ET.SubElement(suite, "system-out").text = _xml(_numbers(result))
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _cases(result: EvalResult, verdicts: Sequence[GateVerdict]) -> list[_Case]:
    if verdicts:
        return [
            _Case(v.gate.text, None if v.ok else (v.status, v.message), v.message) for v in verdicts
        ]
    problems = "; ".join(result.problems)
    return [_Case("evaluation", ("failed", problems) if problems else None, problems or "no gates")]


def _add_case(suite: ET.Element, case: _Case, elapsed_s: float) -> None:
    attributes = {"classname": "tolkit.eval", "name": _xml(case.name), "time": f"{elapsed_s:.3f}"}
    element = ET.SubElement(suite, "testcase", attributes)
    if case.failure is not None:
        kind, message = case.failure
        failure = ET.SubElement(element, "failure", {"type": kind, "message": _xml(message)})
        failure.text = _xml(message)
    ET.SubElement(element, "system-out").text = _xml(case.output)


def _properties(result: EvalResult, baseline: QualityRecord | None) -> list[tuple[str, str]]:
    found = [("model", result.identity), ("reference", result.reference_identity or "none")]
    if baseline is not None:
        found.append(("baseline", baseline.bundle))
    found += [
        (f"{name}.{part}", repr(number))
        for name, metric in ordered_metrics(result.metrics)
        for part, number in (("value", metric.value), ("se", metric.se))
    ]
    return [*found, ("tokens", str(result.conditions.n_tokens))]


def _numbers(result: EvalResult) -> str:
    """The metrics as lines of text."""
    lines = [
        f"{name} {metric.value!r} +/- {metric.se!r} (n {metric.n})"
        if math.isfinite(metric.se)
        else f"{name} {metric.value!r} (n {metric.n})"
        for name, metric in ordered_metrics(result.metrics)
    ]
    if result.table_bytes is not None:
        lines.append(f"bytes {result.table_bytes}")
    return "\n".join([*lines, *result.problems])


def _xml(text: str) -> str:
    """`text` with what XML cannot hold written as its code point."""
    return _NOT_XML.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
