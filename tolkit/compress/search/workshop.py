"""A work folder in which candidates are compressed and measured, and one of them is published.

NAME.tol.search holds candidates and `measured.json`, every measurement so far: an interrupted
search of the same command starts from it, and so does one with another bound.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tolkit.bundling import BundleReport, Resources
from tolkit.compress import CompressSpec, compress
from tolkit.evaluate.judge import Judge
from tolkit.evaluate.quality import append_quality
from tolkit.measured import Measured, Measurement, content_digest, load_measured, save_measured
from tolkit.progress import Progress
from tolkit_formats import files, open_bundle
from tolkit_formats.writer import require_absent

__all__ = ["Candidate", "Workshop", "search_folder", "workshop"]

_LOCK = "lock"
_RECORDS = "measured.json"


@dataclass(frozen=True)
class Candidate:
    """A bundle in the work folder.

    fresh: whether it was evaluated just now, and not known from an equal bundle.
    """

    folder: Path
    report: BundleReport
    measured: Measurement
    fresh: bool


def search_folder(out: Path) -> Path:
    """Where candidates and measurements of a search for `out` lie."""
    return out.with_name(out.name + ".search")


@contextmanager
def workshop(
    source_path: Path,
    out: Path,
    judge: Judge,
    known: Measured,
    resources: Resources,
    progress: Progress,
) -> Iterator[Workshop]:
    """A locked work folder for `out`; it goes at the end and stays on errors.

    Raises:
        OutputExistsError: `out` is there and shall not be replaced.
        ResourceError: another process searches for the same output.
        DataError: text of fewer than two windows.
    """
    judge.require_two_windows()
    require_absent(out, force=resources.force)
    work = search_folder(out)
    files.claim_dir(work, _LOCK)
    with files.lock(work / _LOCK):
        yield Workshop(source_path, work, judge, known, resources, progress)
        files.remove_tree(work)


class Workshop:
    """Makes, measures and publishes candidates. Get one from `workshop`.

    Attributes:
        known: measurements that fit the judge, those of earlier runs first.
    """

    def __init__(
        self,
        source_path: Path,
        work: Path,
        judge: Judge,
        known: Measured,
        resources: Resources,
        progress: Progress,
    ) -> None:
        self.source_path, self.judge = source_path, judge
        self.records = work / _RECORDS
        self._work, self._resources, self._progress = work, resources, progress
        for left in files.list_dir(work):
            # Half-made ones are continued; who made the others is not written down.
            if left.is_dir() and not left.name.endswith(".partial"):
                files.remove_tree(left)
        if resources.restart:
            files.unlink(self.records)
        own = load_measured(self.records) if self.records.exists() else Measured()
        self._by_content: dict[str, Measurement] = {}
        self._entries: dict[tuple[str, str | None, int | None], Measurement] = {}
        for entry in (*known.bundles, *own.bundles):
            if entry.fits(judge.setting, judge.dtype):
                self._remember(entry)

    @property
    def known(self) -> tuple[Measurement, ...]:
        return tuple(self._entries.values())

    def make(
        self,
        name: str,
        spec: CompressSpec,
        label: str,
        recipe: str | None = None,
        budget_bytes: int | None = None,
    ) -> Candidate:
        """Compress one, and evaluate it unless an equal bundle was.

        Args:
            name: of its folder.     label: for the progress.
            recipe, budget_bytes: for its entry in the file of measurements.

        Raises:
            what `compress` and `Judge.records` raise.
        """
        folder = self._work / f"{name}.tol"
        progress = _Labelled(self._progress, label)
        threads = Resources(self._resources.threads)
        report = compress(self.source_path, folder, spec, resources=threads, progress=progress)
        manifest = open_bundle(folder).manifest
        content = content_digest(manifest)
        before = self._by_content.get(content)
        if before is None:
            (quality,) = self.judge.records([folder], progress)
        else:
            quality = {**before.quality, "bundle": manifest.identity}
        entry = Measurement.of(content, recipe, budget_bytes, quality)
        self._remember(entry)
        save_measured(self.records, Measured(self.known))
        return Candidate(folder, report, entry, before is None)

    def discard(self, candidate: Candidate) -> None:
        """Remove one that will not be published."""
        files.remove_tree(candidate.folder)

    def publish(self, candidate: Candidate, out: Path) -> BundleReport:
        """Give one its final name, its measurement in it."""
        record: Mapping[str, Any] = candidate.measured.quality
        append_quality(candidate.folder, dict(record), self._progress)
        files.publish_dir(candidate.folder, out, force=self._resources.force)
        return dataclasses.replace(candidate.report, path=out)

    def _remember(self, entry: Measurement) -> None:
        self._by_content[entry.content] = entry
        self._entries[entry.content, entry.recipe, entry.budget_bytes] = entry


class _Labelled:
    """Progress whose tasks say which candidate they are for."""

    def __init__(self, progress: Progress, label: str) -> None:
        self._progress, self._label = progress, label

    def task(self, label: str, total: float, unit: str) -> Any:
        return self._progress.task(f"{self._label}: {label}", total, unit)

    def warn(self, message: str) -> None:
        self._progress.warn(message)
