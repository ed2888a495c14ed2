"""Conditions a bundle must meet to ship, and verdicts that fail closed.

A measured metric is compared through its two-sided 95 % interval, unrounded: wholly on the right
side passes, wholly on the wrong side fails, straddling is undecided and fails unless allowed.
Against a baseline or the reference it is the interval of the paired difference that decides.
Sizes are exact. What was not measured, or is NaN, fails. How gates are written: syntax.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from tolkit.errors import GateError, UsageError
from tolkit.evaluate.baseline import Baseline, setting_of
from tolkit.evaluate.gates.changes import Change, from_baseline, from_reference, require_same_counts
from tolkit.evaluate.gates.syntax import (
    COMPARISONS,
    EXACT_METRICS,
    Gate,
    is_ratio,
)
from tolkit.evaluate.result import EvalResult
from tolkit.quality_log import QualityRecord

__all__ = [
    "GateVerdict",
    "check_gates",
    "require_baseline",
    "require_gate_partners",
    "require_gates",
]

Status = Literal["passed", "failed", "undecided"]


@dataclass(frozen=True)
class GateVerdict:
    """What became of a gate.

    ok: whether it lets the bundle pass (an undecided one only where that was allowed).
    value, low, high: the measured value and its 95 % interval; None when nothing was measured.
    message: one line that says it all.
    change: how far the value is from the gate's partner; None for a gate without one.
    """

    gate: Gate
    status: Status
    ok: bool
    value: float | None
    low: float | None
    high: float | None
    message: str
    change: Change | None = None


def check_gates(
    result: EvalResult,
    gates: Sequence[Gate],
    allow_undecided: bool = False,
    baseline: Baseline | None = None,
) -> list[GateVerdict]:
    """One verdict a gate, in order.

    A result with `problems` passes no gate. A metric measured on a single window has no error:
    on the wrong side of the limit it fails, on the right side it is undecided.

    Raises:
        UsageError: a gate against a baseline, and none was given.
        MismatchError, DataError: no record of the baseline fits the result (`Baseline`).
    """
    require_baseline(gates, baseline)
    record = None
    if baseline is not None:
        record = baseline.record_for(setting_of(result))
        require_same_counts(result, record)
    return [_verdict(result, gate, allow_undecided, record) for gate in gates]


def require_baseline(gates: Sequence[Gate], baseline: Baseline | None) -> None:
    """UsageError when a gate needs a baseline and there is none."""
    needing = [gate.text for gate in gates if gate.partner == "baseline"]
    if needing and baseline is None:
        raise UsageError(
            f"gate: {needing[0]} compares with a baseline, none was given",
            hint="add --baseline FILE, a quality.jsonl or the bundle that holds it",
        )


def require_gate_partners(
    gates: Sequence[Gate], *, baseline: Baseline | None, reference: bool
) -> None:
    """UsageError when a gate compares with something the evaluation will not have."""
    require_baseline(gates, baseline)
    needing = [gate for gate in gates if gate.partner == "reference" or gate.metric in COMPARISONS]
    if needing and not reference:
        raise UsageError(
            f"gate: {needing[0].text} compares with a reference, none was given",
            hint="add --reference CHECKPOINT, the one the tables were built from",
        )


def require_gates(verdicts: Sequence[GateVerdict]) -> None:
    """GateError (exit code 3) naming every gate that does not let the bundle pass."""
    missed = [verdict for verdict in verdicts if not verdict.ok]
    if missed:
        raise GateError(
            f"gate: {len(missed)} of {len(verdicts)} not met: "
            + "; ".join(verdict.message for verdict in missed),
            hint="undecided gates need more text (or --allow-undecided)"
            if any(verdict.status == "undecided" for verdict in missed)
            else "compress less, or loosen the gate",
        )


def _verdict(
    result: EvalResult, gate: Gate, allow_undecided: bool, record: QualityRecord | None
) -> GateVerdict:
    def failed(why: str) -> GateVerdict:
        return GateVerdict(gate, "failed", False, None, None, None, f"{gate.text}: {why}")

    if result.problems:
        return failed(f"not decided on a broken result ({'; '.join(result.problems)})")
    value, low, high = _measured(result, gate.metric)
    if not math.isfinite(value):
        return failed(f"{gate.metric} was not measured")
    change = None
    if gate.partner is not None:
        change = _change(result, gate, record)
        if change is None or math.isnan(change.value):
            return failed(f"the {gate.partner} has no {gate.metric} to compare with")
    status = _status(gate, value, low, high) if change is None else _status_of(gate, change)
    ok = status == "passed" or (status == "undecided" and allow_undecided)
    if not _is_known(low, high):
        low, high = -math.inf, math.inf
    message = _message(gate, status, (value, low, high), change)
    return GateVerdict(gate, status, ok, value, low, high, message, change)


def _measured(result: EvalResult, name: str) -> tuple[float, float, float]:
    """Value and 95 % interval of a metric; NaN when it was not measured on anything."""
    if name in EXACT_METRICS:
        size = result.table_bytes if name == "bytes" else result.bits_per_value
        value = math.nan if size is None else float(size)
        return value, value, value
    metric = result.metrics.get(name)
    if metric is None or metric.n < 1:
        return math.nan, math.nan, math.nan
    return metric.value, *metric.interval


def _change(result: EvalResult, gate: Gate, record: QualityRecord | None) -> Change | None:
    if gate.partner == "reference":
        return from_reference(result, gate.metric, gate.relative)
    assert record is not None  # require_baseline
    return from_baseline(result, record, gate.metric, gate.relative)


def _status_of(gate: Gate, change: Change) -> Status:
    if change.exact is None:
        return _status(gate, change.value, change.low, change.high)
    # As users write decimals: 105 bytes are within 5 % of 100.
    limit = Fraction(str(gate.limit))
    above = {"<=": change.exact <= limit, "<": change.exact < limit}
    below = {">=": change.exact >= limit, ">": change.exact > limit}
    return "passed" if {**above, **below}[gate.comparison] else "failed"


def _status(gate: Gate, value: float, low: float, high: float) -> Status:
    if not _is_known(low, high):
        return "undecided" if gate.holds(value) else "failed"
    if gate.holds(low) and gate.holds(high):
        return "passed"
    return "undecided" if gate.holds(low) or gate.holds(high) else "failed"


def _is_known(low: float, high: float) -> bool:
    """Whether the interval says anything."""
    return not (math.isnan(low) or math.isnan(high) or (low == -math.inf and high == math.inf))


def _message(
    gate: Gate, status: Status, measured: tuple[float, float, float], change: Change | None
) -> str:
    def show(number: float) -> str:
        if gate.metric == "bytes":
            return f"{number:,.0f}"
        return f"{number:.4%}" if is_ratio(gate.metric) else f"{number:.6g}"

    def show_change(number: float) -> str:
        if gate.relative:
            return f"{number:+.4%}"
        if is_ratio(gate.metric):
            return f"{100 * number:+.4f} points"
        return f"{number:+,.0f}" if gate.metric == "bytes" else f"{number:+.6g}"

    value, low, high = measured
    text = f"{gate.text}: {status}, {gate.metric} is {show(value)}"
    if change is not None:
        text += f", the {gate.partner}'s {show(change.against)}, {show_change(change.value)}"
        show, low, high = show_change, change.low, change.high
    if gate.metric in EXACT_METRICS:
        return text
    if not _is_known(low, high):
        why = "" if change is not None and not change.paired else " (one window)"
        return f"{text}, its error is unknown{why}"
    how = "" if change is None else " of the paired difference"
    if change is not None and not change.paired:
        how = ", unpaired (both errors at their worst)"
    return f"{text}, 95 % interval {show(low)} to {show(high)}{how}"
