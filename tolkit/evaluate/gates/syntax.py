"""Gates as users write them, on a command line or in TOML.

    ppl_increase<=0.5%    kl_mean<=0.01    top1_agreement>=97%    bytes<=1.6GB    piqa.acc>=70%
    ppl_token<=baseline+0.5%    bytes<=baseline    piqa.acc>=baseline-1%    ppl_word<=reference+2%

A percentage after ``baseline`` or ``reference`` is a share of the other's value, except for
metrics that are ratios themselves (ppl_increase, top1_agreement, accuracies): there it is
percentage points.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from tolkit.errors import DataError, UsageError
from tolkit.evaluate.result import METRIC_NAMES
from tolkit_formats import files

__all__ = [
    "COMPARISONS",
    "EXACT_METRICS",
    "GATE_METRICS",
    "Comparison",
    "Gate",
    "Partner",
    "is_ratio",
    "load_gates",
    "parse_gate",
]

Comparison = Literal["<=", "<", ">=", ">"]
Partner = Literal["baseline", "reference"]

EXACT_METRICS = ("bytes", "bits_per_value")
GATE_METRICS = (*METRIC_NAMES, *EXACT_METRICS)
_ALIASES = {"kl_mean": "kl_mean_nats", "kl_median": "kl_median_nats", "kl_p99": "kl_p99_nats"}
_RATIOS = {"ppl_increase", "top1_agreement"}
# What the reference has too; every other metric of a text is a comparison with it already.
_OF_REFERENCE = ("ppl_token", "ppl_word", "ppl_byte", "bits_per_byte")
COMPARISONS = tuple(name for name in METRIC_NAMES if name not in _OF_REFERENCE)
_BYTE_UNITS = {
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)},
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", 1)},
}
_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_GATE = re.compile(
    r"\s*(?P<metric>[A-Za-z0-9_.]+)\s*(?P<comparison><=|>=|<|>)\s*"
    r"(?:(?P<partner>baseline|reference)\s*(?P<sign>[+-])?\s*)?"
    rf"(?P<number>[+-]?{_NUMBER})?\s*(?P<unit>%|[KMGT]?i?B)?\s*",
    re.ASCII,
)
_TASK_METRIC = re.compile(r"[a-z][a-z0-9_]*\.([a-z][a-z0-9_]*)\Z", re.ASCII)
_LIMIT_BYTES = 1 << 20
_HINT = "write METRIC<=VALUE, for example ppl_increase<=0.5%, bytes<=1.6GB or kl_mean<=baseline+5%"


@dataclass(frozen=True)
class Gate:
    """One condition; `text` is how the user wrote it, `limit` its number without unit.

    partner: what the metric is compared with; None compares it with `limit` itself.
    relative: `limit` is a share of the partner's value; otherwise a difference from it.
    """

    metric: str
    comparison: Comparison
    limit: float
    text: str
    partner: Partner | None = None
    relative: bool = False

    def holds(self, value: float) -> bool:
        """Whether `value` is on the right side of the limit."""
        if self.comparison == "<=":
            return value <= self.limit
        if self.comparison == "<":
            return value < self.limit
        if self.comparison == ">=":
            return value >= self.limit
        return value > self.limit


def is_ratio(metric: str) -> bool:
    """Whether a metric is a share (0.97 reads 97 %), so that % means percentage points.

    Of a task's metrics all are, but perplexities, bits per byte and nats.
    """
    if "." not in metric:
        return metric in _RATIOS
    name = metric.partition(".")[2]
    return not ("perplexity" in name or name.startswith(("ppl", "bits_")) or name.endswith("_nats"))


def parse_gate(text: str) -> Gate:
    """Read ``metric<=value`` or ``metric<=baseline+value``; also <, >=, > and ``reference``.

    Percent, and for bytes B KB MB GB TB KiB .. (KB is 1,000 bytes, KiB 1,024). kl_mean, kl_median
    and kl_p99 are short for the _nats names. ``task.metric`` names a task's metric.

    Raises:
        UsageError: anything else; the message says what was expected.
    """
    match = _GATE.fullmatch(text)
    if match is None or not _is_whole(match):
        raise UsageError(f"gate: cannot read {text!r}", hint=_HINT)
    metric = _metric(match["metric"])
    partner: Partner | None = match["partner"]  # type: ignore[assignment]  # by the pattern
    if partner == "reference" and metric not in _OF_REFERENCE:
        # A task's difference from the reference is a metric of its own.
        instead = f"{metric}_change" if "." in metric else metric
        raise UsageError(
            f"gate: {metric} has no value for the reference, expected one of "
            f"{', '.join(_OF_REFERENCE)}, got {text!r}",
            hint=f"write {instead}{match['comparison']}VALUE",
        )
    limit = _limit(metric, match, text)
    comparison: Comparison = match["comparison"]  # type: ignore[assignment]  # by the pattern
    relative = match["unit"] == "%" and not is_ratio(metric)
    return Gate(metric, comparison, limit, text.strip(), partner, relative)


def _is_whole(match: re.Match[str]) -> bool:
    """A number where there must be one: alone, or behind the sign after a partner."""
    number, signed = match["number"], match["sign"] is not None
    if match["partner"] is None:
        return number is not None
    return signed == (number is not None and number[0] not in "+-") and (
        number is not None or match["unit"] is None
    )


def _metric(name: str) -> str:
    metric = _ALIASES.get(name, name)
    if metric in GATE_METRICS or _TASK_METRIC.match(metric):
        return metric
    raise UsageError(
        f"gate: unknown metric {name!r}, expected TASK.METRIC or one of {', '.join(GATE_METRICS)}",
        hint=_HINT,
    )


def _limit(metric: str, match: re.Match[str], text: str) -> float:
    unit = match["unit"]
    scale = Decimal(1)
    if unit == "%":
        if match["partner"] is None and not is_ratio(metric):
            raise UsageError(f"gate: {metric} is not a ratio, got {text!r}", hint=_HINT)
        scale = Decimal("0.01")
    elif unit is not None:
        if metric != "bytes" or unit not in _BYTE_UNITS:
            raise UsageError(f"gate: {unit} is no unit of {metric}, got {text!r}", hint=_HINT)
        scale = Decimal(_BYTE_UNITS[unit])
    number = f"{match['sign'] or ''}{match['number'] or 0}"
    limit = float(number)
    if limit and math.isfinite(limit):
        # Scaled as a decimal, so that 0.7% is the float nearest to 0.007.
        limit = float(Decimal(number) * scale)
    if not math.isfinite(limit):
        raise UsageError(f"gate: the limit is not a finite number, got {text!r}", hint=_HINT)
    return limit


def load_gates(path: str | Path) -> list[Gate]:
    """Gates from a TOML file, in its order.

    Either ``gates = ["ppl_increase<=0.5%", "bytes<=1.6GB"]`` or a table of conditions::

        [gates]
        ppl_token = "<=baseline+0.5%"
        top1_agreement = [">=97%", ">=baseline-1%"]
        "piqa.acc" = ">=baseline-1%"

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
        # TOML reads an unquoted piqa.acc as a table inside a table.
        inner = condition.items() if isinstance(condition, dict) and metric else [("", condition)]
        for name, conditions in inner:
            full = f"{metric}.{name}" if name else metric
            for text in conditions if isinstance(conditions, list) else [conditions]:
                if not isinstance(text, str):
                    raise DataError(f"{path}: gates {full}: expected text, got {text!r}")
                yield full + text
