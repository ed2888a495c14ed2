"""The smallest bundle whose measured quality meets a bound.

Every candidate is a real bundle, written and evaluated; nothing is predicted. Candidates lie in
the work folder NAME.tol.search with a file of all measurements, which the same command, or the
same with another bound, starts from.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tolkit import __version__
from tolkit.bundling import BundleReport, Resources
from tolkit.compress import CompressSpec, compress, compress_options, open_for
from tolkit.compress.bound import Bound
from tolkit.compress.fit_bands import floor_bytes
from tolkit.compress.plan import plan_compress
from tolkit.compress.search_sizes import next_size
from tolkit.errors import GateError, TolError
from tolkit.evaluate.judge import Judge
from tolkit.evaluate.quality import append_quality
from tolkit.measured import (
    Measured,
    Measurement,
    content_digest,
    load_measured,
    recipe_digest,
    save_measured,
)
from tolkit.progress import Progress, TqdmProgress
from tolkit.quality_log import RecordedMetric
from tolkit_formats import files, open_bundle
from tolkit_formats.writer import require_absent

__all__ = ["Found", "Point", "SpecAt", "search_folder", "smallest_bundle"]

_TOP_BITS = 8.0
_START_BITS = 1.0
_LEAST_SHARE = 1e-3  # an interval that ends at or below 0 counts as this share of the bound
_LOCK = "lock"
_RECORDS = "measured.json"

SpecAt = Callable[[int], CompressSpec]
"""The compression to a number of bytes; every other option is fixed."""


@dataclass(frozen=True)
class Point:
    """One size that was looked at.

    Attributes:
        budget_bytes: that was to be filled.     table_bytes, bits_per_value: what it took.
        holds: whether the bound does.
        reused: whether an earlier measurement said so.
    """

    budget_bytes: int
    table_bytes: int
    bits_per_value: float
    kl_nats: RecordedMetric
    ppl_increase: RecordedMetric
    ppl_token: RecordedMetric
    holds: bool
    reused: bool


@dataclass(frozen=True)
class Found:
    """What a search did.

    Attributes:
        points: in the order they were looked at.
        chosen: the published one.
        report: of its compression.
        evaluations: of this run.     elapsed_s: seconds this run took.
    """

    bound: Bound
    points: tuple[Point, ...]
    chosen: Point
    report: BundleReport
    evaluations: int
    elapsed_s: float


def search_folder(out: Path) -> Path:
    """Where candidates and measurements of a search for `out` lie."""
    return out.with_name(out.name + ".search")


def smallest_bundle(
    source_path: str | Path,
    out: str | Path,
    spec_at: SpecAt,
    bound: Bound,
    judge: Judge,
    *,
    known: Measured | None = None,
    resources: Resources | None = None,
    progress: Progress | None = None,
) -> Found:
    """Write the smallest bundle whose measured quality meets `bound`, to 2 % of its size.

    Cost: a compression and an evaluation (two forward passes) a size, typically four to six.

    Args:
        spec_at: codec `bands` filling that many bytes.
        judge: text and reference; two windows or more.
        known: measurements of bundles of the same recipe, text and reference stand for theirs.

    Raises:
        GateError: not even the largest bundle meets it; measurements are kept.
        OutputExistsError, MismatchError, DataError, NonFiniteError, ResourceError.
    """
    judge.require_two_windows()
    assert judge.reference is not None
    out = Path(out)
    resources = resources or Resources()
    require_absent(out, force=resources.force)
    work = search_folder(out)
    files.claim_dir(work, _LOCK)
    with files.lock(work / _LOCK):
        search = _Search(
            Path(source_path), work, spec_at, bound, judge, resources, progress or TqdmProgress()
        )
        search.learn(known or Measured())
        found = search.run(out)
        files.remove_tree(work)
    return found


class _Search:
    def __init__(
        self,
        source_path: Path,
        work: Path,
        spec_at: SpecAt,
        bound: Bound,
        judge: Judge,
        resources: Resources,
        progress: Progress,
    ) -> None:
        self.source_path, self.work, self.judge, self.bound = source_path, work, judge, bound
        self.resources, self.progress = resources, progress
        self._history = {
            **bound.to_history(),
            "text": judge.setting.text_digest[:16],
            "window": judge.setting.window_length,
            "reference": str(judge.setting.reference)[:16],
        }
        self._spec_at = spec_at
        self._entries: dict[int, Measurement] = {}
        self._by_content: dict[str, Measurement] = {}
        self._kept: dict[tuple[str, int | None], Measurement] = {}
        self._made: dict[int, BundleReport] = {}
        self._points: dict[int, Point] = {}
        self._fresh: set[int] = set()
        self._started_s = time.perf_counter()
        spec = self._spec(1)
        source, counts_V, calibration = open_for(source_path, spec)
        self.values = source.vocab_size * source.num_layers * source.hidden_size
        self.floor = floor_bytes(source, plan_compress(source, spec), counts_V)
        self.recipe = recipe_digest(
            compress_options(spec, counts_V is not None, calibration),
            sources=source.sources(),
            parent=source.identity,
            counts_V=source.token_counts_V,
            tool=f"tolkit {__version__}",
        )

    def learn(self, known: Measured) -> None:
        """Take over what an interrupted run left, and the measurements given."""
        for left in files.list_dir(self.work):
            if left.is_dir() and not left.name.endswith(".partial"):
                files.remove_tree(left)
        records = self.work / _RECORDS
        if self.resources.restart:
            files.unlink(records)
        own = load_measured(records) if records.exists() else Measured()
        for entry in (*known.bundles, *own.bundles):
            if entry.fits(self.judge.setting, self.judge.dtype):
                self._remember(entry)

    def run(self, out: Path) -> Found:
        """All sizes, then publish."""
        while True:
            chosen = self._search()
            # Only measured before: it has to be made, and may turn out to be another bundle.
            if chosen.budget_bytes not in self._made and not self._make(chosen.budget_bytes):
                continue
            report = self._made[chosen.budget_bytes]
            folder = self._folder(chosen.budget_bytes)
            record = {**self._entries[chosen.budget_bytes].quality, "bundle": report.identity}
            append_quality(folder, record, self.progress)
            files.publish_dir(folder, out, force=self.resources.force)
            return Found(
                self.bound,
                tuple(self._points.values()),
                chosen,
                dataclasses.replace(report, path=out),
                len(self._fresh),
                time.perf_counter() - self._started_s,
            )

    def _search(self) -> Point:
        """Measure sizes until none is left to try; the smallest that holds."""
        top = max(self.floor, int(_TOP_BITS * self.values / 8))
        start = int(_START_BITS * self.values / 8)
        for budget in sorted(self._entries):
            self._points.setdefault(budget, self._point(budget))
        while True:
            # What a bundle leaves of its budget is no room for a smaller one.
            excess = {
                p.table_bytes if p.holds else p.budget_bytes: self._excess(p)
                for p in self._points.values()
            }
            size = next_size(excess, floor=self.floor, top=top, start=start)
            if size is None:
                break
            self._make(size)
            self._points[size] = self._point(size)
            self._tidy()
        holding = [p for p in self._points.values() if p.holds]
        if not holding:
            raise self._unreachable()
        return min(holding, key=lambda p: (p.table_bytes, p.budget_bytes))

    def _make(self, budget: int) -> bool:
        """Write one candidate and see to its measurement; whether what was known still stands."""
        folder = self._folder(budget)
        label = f"{8 * budget / self.values:.3f} bits/value"
        progress = _Labelled(self.progress, label)
        self._made[budget] = compress(
            self.source_path,
            folder,
            self._spec(budget),
            resources=Resources(self.resources.threads),
            progress=progress,
        )
        manifest = open_bundle(folder).manifest
        content = content_digest(manifest)
        before = self._entries.get(budget)
        if before is not None and before.content == content:
            return True
        known = self._by_content.get(content)
        if known is None:
            (quality,) = self.judge.records([folder], progress)
            self._fresh.add(budget)
        else:
            quality = {**known.quality, "bundle": manifest.identity}
        self._remember(Measurement.of(content, self.recipe, budget, quality))
        save_measured(self.work / _RECORDS, Measured(tuple(self._kept.values())))
        if before is not None:
            self._points[budget] = self._point(budget)
        return before is None

    def _remember(self, entry: Measurement) -> None:
        self._by_content[entry.content] = entry
        self._kept[entry.content, entry.budget_bytes] = entry
        if entry.recipe == self.recipe and entry.budget_bytes is not None:
            self._entries[entry.budget_bytes] = entry

    def _point(self, budget: int) -> Point:
        record = self._entries[budget].record
        metrics = record.metrics
        upper = metrics[self.bound.metric].high
        assert record.table_bytes is not None and record.bits_per_value is not None
        return Point(
            budget,
            record.table_bytes,
            record.bits_per_value,
            metrics["kl_mean_nats"],
            metrics["ppl_increase"],
            metrics["ppl_token"],
            self.bound.holds(upper),
            budget not in self._fresh,
        )

    def _excess(self, point: Point) -> float:
        metric = point.kl_nats if self.bound.metric == "kl_mean_nats" else point.ppl_increase
        if math.isnan(metric.high):
            return math.inf
        return math.log(max(metric.high / self.bound.limit, _LEAST_SHARE))

    def _tidy(self) -> None:
        """Keep only the candidate that would be published now."""
        holding = [p for p in self._points.values() if p.holds]
        best = min(holding, key=lambda p: (p.table_bytes, p.budget_bytes), default=None)
        for budget in [b for b in self._made if best is None or b != best.budget_bytes]:
            files.remove_tree(self._folder(budget))
            del self._made[budget]

    def _folder(self, budget: int) -> Path:
        return self.work / f"size-{budget}.tol"

    def _spec(self, budget: int) -> CompressSpec:
        spec = self._spec_at(budget)
        return dataclasses.replace(spec, chosen_by={**spec.chosen_by, **self._history})

    def _unreachable(self) -> TolError:
        best = min(self._points.values(), key=self._excess)
        kl, change = best.kl_nats, best.ppl_increase
        return GateError(
            f"{self.bound.name}: no size up to {_TOP_BITS:g} bits/value keeps within "
            f"{self.bound.said()}; the best, {best.bits_per_value:.3f} bits/value, costs KL "
            f"{kl.value:.2g} +/- {kl.se:.1g} nats and {100 * change.value:+.3f} +/- "
            f"{100 * change.se:.3f} % of perplexity",
            hint="the upper end of the 95 % interval must hold: raise the bound, or give more "
            f"text; what was measured is kept in {self.work / _RECORDS}",
        )


class _Labelled:
    """Progress whose tasks say which candidate they are for."""

    def __init__(self, progress: Progress, label: str) -> None:
        self._progress, self._label = progress, label

    def task(self, label: str, total: float, unit: str) -> Any:
        return self._progress.task(f"{self._label}: {label}", total, unit)

    def warn(self, message: str) -> None:
        self._progress.warn(message)
