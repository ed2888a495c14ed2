"""Evaluation records read back from a bundle's `quality.jsonl`, without torch.

One JSON object a line (tolkit/evaluate/schemas/quality-1.json). What is not JSON is a line that a
killed run left behind and is passed over; a record that is JSON but breaks the schema is an error.
W windows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from tolkit.errors import BundleError, DataError, UnsupportedVersionError
from tolkit_formats import files, strict_json

__all__ = [
    "QUALITY_FILE",
    "QUALITY_SCHEMA",
    "QualityRecord",
    "RecordedMetric",
    "Setting",
    "parse_record",
    "quality_lines",
]

QUALITY_FILE = "quality.jsonl"
QUALITY_SCHEMA = "tolkit.quality/1"
_SCHEMA_NAME = re.compile(r"tolkit\.quality/([0-9]+)\Z", re.ASCII)
_LIMIT_BYTES = 1 << 28
_T = TypeVar("_T", str, int, float)


@dataclass(frozen=True)
class Setting:
    """What two evaluations must share to be compared; digests in hex."""

    text_digest: str
    tokenizer_digest: str
    window_length: int
    packed: bool
    prefix_id: int | None
    reference: str | None

    def differences(self, other: Setting) -> list[str]:
        """What differs, in words, ours first; empty when the two compare."""
        found = []
        for field in fields(self):
            ours, theirs = getattr(self, field.name), getattr(other, field.name)
            if ours != theirs:
                name = field.name.replace("_", " ")
                found.append(f"{name} is {_short(ours)} here, {_short(theirs)} there")
        return found


@dataclass(frozen=True)
class RecordedMetric:
    """A metric as recorded: NaN where it was not a finite number; ends infinite where unknown."""

    value: float
    se: float
    n: int
    low: float
    high: float


@dataclass(frozen=True)
class QualityRecord:
    """One evaluation of one bundle.

    where: file and line, for messages.
    counts: documents, windows, tokens, words, bytes.
    window_sums: nll_nats, kl_nats, agreeing_tokens, each [W]; empty where they were left out.
    task_digests, outcomes: task -> digest of its items; ``task.metric`` -> a string of 0 and 1.
    """

    where: str
    bundle: str
    setting: Setting
    counts: Mapping[str, int]
    device: str
    dtype: str
    metrics: Mapping[str, RecordedMetric]
    reference_metrics: Mapping[str, RecordedMetric]
    table_bytes: int | None
    bits_per_value: float | None
    problems: tuple[str, ...]
    window_sums: Mapping[str, Sequence[float]]
    task_digests: Mapping[str, str]
    outcomes: Mapping[str, str]


def quality_lines(path: Path) -> list[tuple[int, bytes]]:
    """The lines of a quality.jsonl that are not empty, each with its number.

    Raises:
        InputError: missing, or larger than 256 MiB.
    """
    data = files.read_bytes(path, limit_bytes=_LIMIT_BYTES)
    return [(i, line) for i, line in enumerate(data.split(b"\n"), 1) if line.strip()]


def parse_record(line: bytes, where: str) -> QualityRecord | None:
    """The record of one line; None when the line is not JSON (what a killed run leaves).

    Raises:
        UnsupportedVersionError: a record of another schema version.
        DataError: JSON that is no record; the message names the field.
    """
    try:
        value = strict_json.parse(line, where)
    except BundleError:
        return None
    record = _Object(value, where)
    schema = record.text("schema")
    if schema != QUALITY_SCHEMA:
        if _SCHEMA_NAME.match(schema):
            raise UnsupportedVersionError(
                f"{where}: schema is {schema}, this tolkit reads {QUALITY_SCHEMA}",
                hint="use the tolkit that wrote it, or evaluate again",
            )
        raise DataError(f"{where}: schema is {schema[:40]!r}, expected {QUALITY_SCHEMA}")
    counts = record.object("n")
    windows = record.object("windows")
    intervals = record.value.get("intervals_95", {})
    tasks = _Object(record.value.get("tasks", {}), f"{where}: tasks")
    n_windows = counts.integer("windows")
    return QualityRecord(
        where=where,
        bundle=record.text("bundle"),
        setting=Setting(
            text_digest=record.text("text_digest"),
            tokenizer_digest=record.text("tokenizer_digest"),
            window_length=windows.integer("length"),
            packed=windows.boolean("packed"),
            prefix_id=windows.optional("prefix_id", int),
            reference=record.optional("reference", str),
        ),
        counts={name: counts.integer(name) for name in sorted(counts.value)},
        device=record.text("device"),
        dtype=record.text("dtype"),
        metrics=_metrics(record.object("metrics"), intervals),
        reference_metrics=_metrics(record.object("reference_metrics"), {}),
        table_bytes=record.optional("bytes", int),
        bits_per_value=record.optional("bits_per_value", float),
        problems=tuple(str(problem) for problem in record.array("problems")),
        window_sums=_window_sums(record, n_windows),
        task_digests={name: tasks.object(name).text("digest") for name in sorted(tasks.value)},
        outcomes=_outcomes(tasks),
    )


def _metrics(metrics: _Object, intervals: object) -> dict[str, RecordedMetric]:
    ends_of = intervals if isinstance(intervals, dict) else {}
    found = {}
    for name in metrics.value:
        metric = metrics.object(name)
        value, se = (metric.optional(key, float) for key in ("value", "se"))
        reach = math.inf if se is None else 1.96 * se
        centre = math.nan if value is None else value
        low, high = _ends(ends_of.get(name), centre, reach)
        found[name] = RecordedMetric(
            centre, math.nan if se is None else se, metric.integer("n"), low, high
        )
    return found


def _ends(ends: object, centre: float, reach: float) -> tuple[float, float]:
    if isinstance(ends, list) and len(ends) == 2:
        low, high = (end if isinstance(end, (int, float)) else None for end in ends)
        return -math.inf if low is None else low, math.inf if high is None else high
    return centre - reach, centre + reach


def _window_sums(record: _Object, n_windows: int) -> dict[str, list[float]]:
    if record.value.get("window_sums") is None:
        return {}
    sums = record.object("window_sums")
    found = {}
    for name in ("nll_nats", "kl_nats", "agreeing_tokens"):
        if sums.value.get(name) is None:
            continue
        values = sums.array(name)
        if len(values) != n_windows:
            raise DataError(
                f"{sums.where}: {name} has {len(values)} entries, expected {n_windows} windows"
            )
        if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
            raise DataError(f"{sums.where}: {name} holds something that is not a number")
        found[name] = values
    return found


def _outcomes(tasks: _Object) -> dict[str, str]:
    found = {}
    for task in sorted(tasks.value):
        outcomes = tasks.object(task).object("outcomes")
        for metric in sorted(outcomes.value):
            text = outcomes.text(metric)
            if set(text) - {"0", "1"}:
                raise DataError(f"{outcomes.where}: {metric} holds something besides 0 and 1")
            found[f"{task}.{metric}"] = text
    return found


class _Object:
    """A JSON object being read; every wrong type is one DataError that names the field."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise DataError(f"{where}: expected an object, got {type(value).__name__}")
        self.value: dict[str, Any] = value
        self.where = where

    def _get(self, name: str, kinds: tuple[type, ...], expected: str) -> Any:
        if name not in self.value:
            raise DataError(f"{self.where}: {name} is missing")
        value = self.value[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise DataError(f"{self.where}: {name} is not {expected}, got {str(value)[:40]!r}")
        return value

    def text(self, name: str) -> str:
        return str(self._get(name, (str,), "text"))

    def integer(self, name: str) -> int:
        return int(self._get(name, (int,), "an integer"))

    def boolean(self, name: str) -> bool:
        return bool(self._get(name, (bool,), "true or false"))

    def array(self, name: str) -> list[Any]:
        return list(self._get(name, (list,), "a list"))

    def object(self, name: str) -> _Object:
        return _Object(self._get(name, (dict,), "an object"), f"{self.where}: {name}")

    def optional(self, name: str, kind: type[_T]) -> _T | None:
        """A value of one type, or null."""
        if name in self.value and self.value[name] is None:
            return None
        kinds: tuple[type, ...] = (int, float) if kind is float else (kind,)
        expected = {str: "text", int: "an integer", float: "a number"}[kind]
        found: _T = kind(self._get(name, kinds, f"{expected} or null"))
        return found


def _short(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)[:16]
