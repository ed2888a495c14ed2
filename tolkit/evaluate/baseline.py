"""A stored evaluation that later ones are compared with.

The records of a `quality.jsonl`, read from the end: the last one that fits decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tolkit.errors import DataError, InputError, MismatchError, UsageError
from tolkit.evaluate.result import EvalResult
from tolkit.evaluate.windows import Windows
from tolkit.quality_log import (
    QUALITY_FILE,
    QualityRecord,
    Setting,
    parse_record,
    quality_lines,
)

__all__ = ["Baseline", "load_baseline", "planned_setting", "setting_of"]

_IDENTITY = re.compile(r"[0-9a-f]{4,64}\Z")


def planned_setting(windows: Windows, reference_identity: str | None) -> Setting:
    """`setting_of` the result that an evaluation of these windows will give."""
    return Setting(
        windows.text_digest,
        windows.tokenizer_digest,
        windows.length,
        windows.packed,
        windows.prefix_id,
        reference_identity,
    )


def setting_of(result: EvalResult) -> Setting:
    """What a record must have in common with a result to be its baseline."""
    ran = result.conditions
    return Setting(
        ran.text_digest,
        ran.tokenizer_digest,
        ran.window_length,
        ran.packed,
        ran.prefix_id,
        result.reference_identity,
    )


@dataclass(frozen=True)
class Baseline:
    """The records of one file that may serve as a baseline, oldest first.

    identity: beginning of the bundle identity asked for; None takes a record of any bundle.
    lines: number and bytes of each line, parsed when looked at.
    """

    path: Path
    identity: str | None
    lines: tuple[tuple[int, bytes], ...]

    def record_for(self, setting: Setting) -> QualityRecord:
        """The last record measured under the same setting, without problems.

        Raises:
            MismatchError: none was; the message says what differs in the nearest one.
            DataError: no record (of that identity) at all, or only of broken results.
            UnsupportedVersionError: a record of another schema version came first.
        """
        nearest: QualityRecord | None = None
        broken: QualityRecord | None = None
        for record in self.newest_first():
            if record.problems:
                broken = broken or record
                continue
            differences = setting.differences(record.setting)
            if not differences:
                return record
            if nearest is None or len(differences) < len(setting.differences(nearest.setting)):
                nearest = record
        if nearest is not None:
            raise MismatchError(
                f"baseline: {nearest.where} does not fit: "
                + "; ".join(setting.differences(nearest.setting)),
                hint="give the text, window and reference the baseline was measured with",
            )
        if broken is not None:
            raise DataError(f"baseline: {broken.where} is no baseline: {broken.problems[0]}")
        raise self.none_found()

    def newest_first(self) -> Iterator[QualityRecord]:
        """Its records, those of other identities left out."""
        for number, line in reversed(self.lines):
            record = parse_record(line, f"{self.path}:{number}")
            if record is not None and record.bundle.startswith(self.identity or ""):
                yield record

    def none_found(self) -> DataError:
        """The error of a file without a usable record."""
        wanted = "" if self.identity is None else f" of a bundle {self.identity}.."
        return DataError(
            f"baseline: {self.path} holds no record{wanted}", hint="tol eval adds one to a bundle"
        )


def load_baseline(path: str | Path, identity: str | None = None) -> Baseline:
    """The records of a quality.jsonl, or of the bundle folder that holds one.

    Args:
        path: the file or folder; ``FILE#1a2b3c`` also names the identity.
        identity: the first 4 or more hex digits of the bundle whose records are meant.

    Raises:
        InputError: no such file, or too large.     DataError: not one record in it.
        UsageError: `identity` is not hex, or fits records of two bundles.
        UnsupportedVersionError: its last record is of another schema version.
    """
    path = Path(path)
    if identity is None and "#" in path.name and not path.exists():
        name, _, identity = path.name.rpartition("#")
        path = path.with_name(name) if name else path
    if identity is not None and not _IDENTITY.match(identity):
        raise UsageError(
            f"baseline: expected 4 to 64 lower-case hex digits after #, got {identity!r}"
        )
    if path.is_dir():
        path = path / QUALITY_FILE
    if not path.is_file():
        raise InputError(
            f"baseline: {path}: no such file",
            hint="tol eval of a bundle writes quality.jsonl into it; keep a copy as the baseline",
        )
    baseline = Baseline(path, identity, tuple(quality_lines(path)))
    newest = next(baseline.newest_first(), None)
    if newest is None:
        raise baseline.none_found()
    others = {record.bundle for record in baseline.newest_first()} if identity else set()
    if len(others) > 1:
        shown = " and ".join(sorted(bundle[:16] for bundle in others))
        raise UsageError(f"baseline: {identity} fits records of {shown}", hint="give more digits")
    return baseline
