"""Running one malformed bundle: the right error, one line that names file and field, in time.

A case is a function that damages a fresh copy of a good bundle, the error class it must end in,
and words its message must hold. `valid` cases must open and verify instead.
"""

from __future__ import annotations

import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from _nano import refresh

from tolkit_formats import open_bundle, verify
from tolkit_formats.errors import BundleError, TolError

LIMIT_S = 2.0
LIMIT_KIB = 64 << 10


@dataclass(frozen=True)
class Case:
    """One damage. `at_open`: opening refuses already; otherwise `verify` is the one to."""

    name: str
    damage: Callable[[Path], object]
    words: tuple[str, ...]
    error: type[TolError] = BundleError
    at_open: bool = True


def params(cases: list[Case]) -> pytest.MarkDecorator:
    names = [case.name for case in cases]
    assert len(set(names)) == len(names), "two cases of one name"
    return pytest.mark.parametrize("case", cases, ids=names)


def with_file(name: str, data: bytes) -> Callable[[Path], object]:
    """Damage: other bytes for one file of the bundle, digests made to fit."""

    def damage(path: Path) -> None:
        (path / name).write_bytes(data)
        refresh(path)

    return damage


def run_case(case: Case, good: Path, folder: Path) -> None:
    """Damage a copy of `good` within `folder` and see it refused."""
    path = folder / "b.tol"
    shutil.copytree(good, path)
    case.damage(path)
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    if case.at_open:
        _refused(lambda: open_bundle(path), case)
    else:
        _all_rows_or_an_error(path)
    _refused(lambda: verify(path), case)
    assert time.monotonic() - started < LIMIT_S
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_kib
    assert grown_kib < LIMIT_KIB, f"{grown_kib} KiB above baseline"


def _refused(action: Callable[[], object], case: Case) -> None:
    with pytest.raises(TolError) as caught:
        action()
    message = caught.value.message
    assert type(caught.value) is case.error, f"{type(caught.value).__name__}: {message}"
    assert caught.value.exit_code in (4, 5)
    assert "b.tol" in message or "tokenizer.json" in message, f"no file named: {message}"
    for word in case.words:
        assert word in message, f"{word!r} is not in: {message}"
    assert message.isprintable(), f"not one plain line: {message!r}"
    assert len(message) < 400, f"{len(message)} characters: {message[:400]}"


def _all_rows_or_an_error(path: Path) -> None:
    """What opens must also be readable, or refuse in tolkit's own words."""
    try:
        bundle = open_bundle(path)
        bundle.rows(np.arange(bundle.vocab_size))
        bundle.token_counts()
    except TolError:
        pass
