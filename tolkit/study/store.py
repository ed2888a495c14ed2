"""results.jsonl: the points a study has measured, under what they were measured; it resumes there.

The first line is the fingerprint (model, text, options that change numbers), each later line one
point. The file is rewritten whole and atomically, so an interruption loses at most the points
being measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tolkit.errors import DataError, MismatchError
from tolkit_formats import files

__all__ = ["RESULTS", "WORK", "Point", "Results", "open_results"]

RESULTS = "results.jsonl"
WORK = "work"
_SCHEMA = "tolkit.study/1"
_LOCK = "lock"
_LARGEST_BYTES = 1 << 28

Point = Mapping[str, Any]
"""Flat facts of one point; ``key`` names it within its study. JSON values only."""


class Results:
    """The points of one study so far; `add` makes more of them durable."""

    def __init__(self, path: Path, fingerprint: Mapping[str, Any], points: Sequence[Point]) -> None:
        self._path = path
        self._fingerprint = fingerprint
        self._points = {str(point["key"]): point for point in points}

    def __contains__(self, key: str) -> bool:
        return key in self._points

    def __getitem__(self, key: str) -> Point:
        return self._points[key]

    def add(self, points: Sequence[Point]) -> None:
        """Keep these points too; numbers that are not finite become null."""
        for point in points:
            self._points[str(point["key"])] = {k: _plain(v) for k, v in point.items()}
        self.save()

    def save(self) -> None:
        """Write the file anew."""
        head = {"schema": _SCHEMA, "fingerprint": self._fingerprint}
        lines = [json.dumps(line, allow_nan=False) for line in [head, *self._points.values()]]
        files.write_atomic(self._path, ("\n".join(lines) + "\n").encode())


@contextmanager
def open_results(
    folder: Path, fingerprint: Mapping[str, Any], *, restart: bool
) -> Iterator[Results]:
    """The results in `folder`, made when missing; no other process can write there meanwhile.

    Args:
        fingerprint: everything a number depends on, flat JSON values.
        restart: discard what the folder holds of a study.

    Raises:
        OutputExistsError: the folder holds something else.
        MismatchError: it holds another study, or this one under other conditions.
        DataError: its results cannot be read.      ResourceError: another process writes there.
    """
    files.claim_dir(folder, RESULTS)
    path, work = folder / RESULTS, folder / WORK
    if not path.exists():
        Results(path, fingerprint, ()).save()
    files.make_dir(work)
    with files.lock(work / _LOCK):
        if restart:
            _clear(work)
        points = () if restart else _read(path, fingerprint)
        results = Results(path, fingerprint, points)
        results.save()
        yield results
        _clear(work)
    files.remove_tree(work)


def _clear(work: Path) -> None:
    """Everything but the lock, which says until the end that somebody is here."""
    for entry in files.list_dir(work):
        if entry.name == _LOCK:
            continue
        if entry.is_dir() and not entry.is_symlink():
            files.remove_tree(entry)
        else:
            files.unlink(entry)


def _read(path: Path, fingerprint: Mapping[str, Any]) -> Sequence[Point]:
    """The points of the file if they were measured under `fingerprint`."""
    lines = files.read_bytes(path, limit_bytes=_LARGEST_BYTES).splitlines()
    parsed = [_parsed(path, number, line) for number, line in enumerate(lines, 1)]
    head: Mapping[str, Any] = parsed[0] if parsed else {}
    found = head.get("fingerprint")
    if head.get("schema") != _SCHEMA or not isinstance(found, dict):
        raise DataError(f"{path}:1: is not the head of a study's results", hint=_FRESH)
    differing = sorted(k for k in {*found, *fingerprint} if found.get(k) != fingerprint.get(k))
    if differing:
        raise MismatchError(
            f"{path}: holds results of another {', '.join(differing)}; they do not belong into "
            "one table",
            hint=_FRESH,
        )
    for number, point in enumerate(parsed[1:], 2):
        if not isinstance(point.get("key"), str):
            raise DataError(f"{path}:{number}: has no key, expected a point", hint=_FRESH)
    return parsed[1:]


_FRESH = "choose another folder with -o, or add --restart to discard what this one holds"


def _parsed(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}:{number}: is not JSON", hint=_FRESH) from error
    if not isinstance(value, dict):
        raise DataError(f"{path}:{number}: expected a JSON object", hint=_FRESH)
    return value


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
