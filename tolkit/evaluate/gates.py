"""Conditions a bundle must meet to ship, and verdicts that fail closed.

    ppl_increase<=0.5%    kl_mean_nats<=0.01    top1_agreement>=97%    bytes<=1.6GB

A measured metric is compared through its two-sided 95 % interval, unrounded: wholly on the right
side passes, wholly on the wrong side fails, straddling is undecided and fails unless allowed.
Sizes are exact. What was not measured, or is NaN, fails.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tolkit.errors import DataError, GateError, UsageError
from tolkit.evaluate.result import METRIC_NAMES, EvalResult
from tolkit_formats import files

__all__ = [
    "GATE_METRICS",
    "Gate",
    "GateVerdict",
    "check_gates",
    "load_gates",
    "parse_gate",
    "require_gates",
]

Comparison = Literal["<=", "<", ">=", ">"]
Status = Literal["passed", "failed", "undecided"]

GATE_METRICS = (*METRIC_NAMES, "bytes", "bits_per_value")
_ALIASES = {"kl_mean": "kl_mean_nats", "kl_median": "kl_median_nats", "kl_p99": "kl_p99_nats"}
_RATIOS = {"ppl_increase", "top1_agreement"}
_BYTE_UNITS = {
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)},
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", 1)},
}
_GATE = re.compile(
    r"\s*(?P<metric>[A-Za-z0-9_]+)\s*(?P<comparison><=|>=|<|>)\s*"
    r"(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(?P<unit>%|[KMGT]?i?B)?\s*",
    re.ASCII,
)
_LIMIT_BYTES = 1 << 20
_HINT = "write METRIC<=VALUE, for example ppl_increase<=0.5% or bytes<=1.6GB"


@dataclass(frozen=True)
class Gate:
    """One condition; `text` is how the user wrote it, `limit` its number without unit."""

    metric: str
    comparison: Comparison
    limit: float
    text: str


@dataclass(frozen=True)
class GateVerdict:
    """What became of a gate.

    ok: whether it lets the bundle pass (an undecided one only where that was allowed).
    value, low, high: the measured value and its 95 % interval; None when nothing was measured.
    message: one line that says it all.
    """

    gate: Gate
    status: Status
    ok: bool
    value: float | None
    low: float | None
    high: float | None
    message: str


def parse_gate(text: str) -> Gate:
    """Read ``metric<=value``; also <, >=, >. Percent for ratios, B KB MB GB TB KiB .. for bytes.

    KB is 1,000 bytes, KiB 1,024. kl_mean, kl_median and kl_p99 are short for the _nats names.

    Raises:
        UsageError: anything else; the message says what was expected.
    """
    match = _GATE.fullmatch(text)
    if match is None:
        raise UsageError(f"gate: cannot read {text!r}", hint=_HINT)
    metric = _ALIASES.get(match["metric"], match["metric"])
    if metric not in GATE_METRICS:
        raise UsageError(
            f"gate: unknown metric {match['metric']!r}, expected one of {', '.join(GATE_METRICS)}",
            hint=_HINT,
        )
    limit, unit = float(match["number"]), match["unit"]
    if unit == "%":
        if metric not in _RATIOS:
            raise UsageError(f"gate: {metric} is not a ratio, got {text!r}", hint=_HINT)
        limit /= 100
    elif unit is not None:
        if metric != "bytes" or unit not in _BYTE_UNITS:
            raise UsageError(f"gate: {unit} is no unit of {metric}, got {text!r}", hint=_HINT)
        limit *= _BYTE_UNITS[unit]
    if not math.isfinite(limit):
        raise UsageError(f"gate: the limit is not a finite number, got {text!r}", hint=_HINT)
    comparison: Comparison = match["comparison"]  # type: ignore[assignment]  # by the pattern
    return Gate(metric, comparison, limit, text.strip())


def load_gates(path: str | Path) -> list[Gate]:
    """Gates from a TOML file, in its order.

    Either ``gates = ["ppl_increase<=0.5%", "bytes<=1.6GB"]`` or a table of conditions::

        [gates]
        ppl_increase = "<=0.5%"
        top1_agreement = [">=97%", "<=100%"]

    Raises:
        InputError: missing or too large.        DataError: not TOML, or no gate in it.
        UsageError: a gate that `parse_gate` refuses.
    """
    path = Path(path)
    data = files.read_bytes(path, limit_bytes=_LIMIT_BYTES)
    try:
        document: dict[str, Any] = tomllib.loads(data.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not TOML ({error})") from error
    unknown = sorted(set(document) - {"gates"})
    if unknown:
        raise DataError(f"{path}: unknown key {unknown[0]!r}, expected only gates")
    texts = list(_gate_texts(document.get("gates"), path))
    if not texts:
        raise DataError(f"{path}: holds no gates", hint='write gates = ["ppl_increase<=0.5%"]')
    gates = []
    for text in texts:
        try:
            gates.append(parse_gate(text))
        except UsageError as error:
            raise UsageError(f"{path}: {error.message}", hint=error.hint) from error
    return gates


def _gate_texts(value: object, path: Path) -> Iterable[str]:
    if value is None:
        return
    if isinstance(value, dict):
        pairs = [(metric, condition) for metric, condition in value.items()]
    elif isinstance(value, list):
        pairs = [("", condition) for condition in value]
    else:
        raise DataError(f"{path}: gates is neither a list nor a table")
    for metric, condition in pairs:
        for text in condition if isinstance(condition, list) else [condition]:
            if not isinstance(text, str):
                raise DataError(f"{path}: gates {metric}: expected text, got {text!r}")
            yield metric + text


def check_gates(
    result: EvalResult, gates: Sequence[Gate], allow_undecided: bool = False
) -> list[GateVerdict]:
    """One verdict a gate, in order.

    A result with `problems` passes no gate. A metric measured on a single window has no error:
    on the wrong side of the limit it fails, on the right side it is undecided.
    """
    return [_verdict(result, gate, allow_undecided) for gate in gates]


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


def _verdict(result: EvalResult, gate: Gate, allow_undecided: bool) -> GateVerdict:
    if result.problems:
        why = f"{gate.text}: not decided on a broken result ({'; '.join(result.problems)})"
        return GateVerdict(gate, "failed", False, None, None, None, why)
    if gate.metric in ("bytes", "bits_per_value"):
        size = result.table_bytes if gate.metric == "bytes" else result.bits_per_value
        value = low = high = math.nan if size is None else float(size)
    else:
        metric = result.metrics.get(gate.metric)
        value = math.nan if metric is None else metric.value
        low, high = (math.nan, math.nan) if metric is None else metric.interval
        if metric is not None and metric.n < 1:
            value = math.nan
    if not math.isfinite(value):
        why = f"{gate.text}: {gate.metric} was not measured"
        return GateVerdict(gate, "failed", False, None, None, None, why)
    known = not (math.isnan(low) or math.isnan(high) or (math.isinf(low) and math.isinf(high)))
    if not known:
        low, high = -math.inf, math.inf
        status: Status = "undecided" if _holds(value, gate) else "failed"
    elif _holds(low, gate) and _holds(high, gate):
        status = "passed"
    elif _holds(low, gate) or _holds(high, gate):
        status = "undecided"
    else:
        status = "failed"
    ok = status == "passed" or (status == "undecided" and allow_undecided)
    return GateVerdict(
        gate, status, ok, value, low, high, _message(gate, status, value, low, high, known)
    )


def _holds(value: float, gate: Gate) -> bool:
    if gate.comparison == "<=":
        return value <= gate.limit
    if gate.comparison == "<":
        return value < gate.limit
    if gate.comparison == ">=":
        return value >= gate.limit
    return value > gate.limit


def _message(gate: Gate, status: Status, value: float, low: float, high: float, known: bool) -> str:
    def show(number: float) -> str:
        if gate.metric == "bytes":
            return f"{number:,.0f}"
        return f"{number:.4%}" if gate.metric in _RATIOS else f"{number:.6g}"

    text = f"{gate.text}: {status}, {gate.metric} is {show(value)}"
    if gate.metric in ("bytes", "bits_per_value"):
        return text
    if not known:
        return f"{text}, its error is unknown (one window)"
    return f"{text}, 95 % interval {show(low)} to {show(high)}"
