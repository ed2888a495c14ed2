"""The evaluation record a bundle carries: a line of `quality.jsonl` (schemas/quality-1.json).

A record binds the numbers to everything they depend on: bundle, reference, text, tokenizer,
windows, device, number format, versions. It holds no time stamp, so equal runs write equal lines.
It also keeps the sums of each window, to 9 significant digits, so that it can be a baseline for
paired comparisons; those of more than 20,000 windows are left out, and the record says so.
The file is outside the bundle's identity and only ever grows. Read with tolkit.quality_log.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tolkit.evaluate.gates import GateVerdict
from tolkit.evaluate.reports import (
    conditions_json,
    intervals_json,
    metrics_json,
    number_json,
    verdict_json,
)
from tolkit.evaluate.result import EvalResult, Floats, rounded
from tolkit.progress import Progress, TqdmProgress
from tolkit.quality_log import QUALITY_FILE, QUALITY_SCHEMA

__all__ = [
    "MAX_RECORDED_WINDOWS",
    "QUALITY_FILE",
    "QUALITY_SCHEMA",
    "append_quality",
    "quality_record",
]

MAX_RECORDED_WINDOWS = 20_000
# Where a bundle cannot be added to, as opposed to a disk that fails.
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}


def quality_record(result: EvalResult, verdicts: Sequence[GateVerdict] = ()) -> dict[str, Any]:
    """The record of a result, ready for JSON (numbers that are not finite are null)."""
    return {
        "schema": QUALITY_SCHEMA,
        "bundle": result.identity,
        "reference": result.reference_identity,
        **conditions_json(result.conditions),
        "metrics": metrics_json(result.metrics),
        "intervals_95": intervals_json(result.metrics),
        "reference_metrics": metrics_json(result.reference_metrics),
        "bytes": result.table_bytes,
        "bits_per_value": number_json(result.bits_per_value),
        "problems": list(result.problems),
        "gates": [verdict_json(verdict) for verdict in verdicts],
        **_window_sums(result),
        "tasks": {
            name: {"digest": task.digest, "outcomes": dict(task.outcomes)}
            for name, task in result.tasks.items()
        },
    }


def _window_sums(result: EvalResult) -> dict[str, Any]:
    """`window_sums`, or null and in `window_sums_left_out` why."""
    windows = result.windows
    why = None
    if result.problems or windows is None:
        why = "not measured"
    elif len(windows.nll_W) > MAX_RECORDED_WINDOWS:
        why = f"{len(windows.nll_W):,} windows, at most {MAX_RECORDED_WINDOWS:,} are kept"
    if windows is None or why is not None:
        return {"window_sums": None, "window_sums_left_out": why}

    def listed(sums_W: Floats | None) -> list[float] | None:
        return None if sums_W is None else rounded(sums_W).tolist()

    sums = {
        "nll_nats": listed(windows.nll_W),
        "kl_nats": listed(windows.kl_W),
        "agreeing_tokens": listed(windows.agreeing_W),
    }
    return {"window_sums": sums, "window_sums_left_out": None}


def append_quality(
    bundle: str | Path, record: dict[str, Any], progress: Progress | None = None
) -> bool:
    """Append a record to the bundle's quality.jsonl; whether it could be written.

    One write behind the file's end, under the file's lock where the file system has one, so
    records of simultaneous runs do not mix; a line that an earlier run left unfinished is closed
    first. What cannot be written is a warning, not an
    error: the numbers are in the report anyway.
    """
    path = Path(bundle) / QUALITY_FILE
    line = json.dumps(record, allow_nan=False, separators=(",", ":"), sort_keys=True).encode()
    try:
        _append_line(path, line + b"\n")
    except OSError as error:
        reason = os.strerror(error.errno or 0).lower()
        kind = "the bundle is read-only" if error.errno in _READ_ONLY else "cannot write"
        (progress or TqdmProgress()).warn(f"{path}: {kind}, no record added ({reason})")
        return False
    return True


def _append_line(path: Path, line: bytes) -> None:
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(path, flags, 0o666)
    try:
        with contextlib.suppress(OSError):  # not on every network file system
            fcntl.flock(fd, fcntl.LOCK_EX)
        # Without the lock, a long line of another run can be seen half written.
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":
            line = b"\n" + line
        written = os.write(fd, line)
        if written < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(fd)
    finally:
        os.close(fd)
