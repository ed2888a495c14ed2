"""The smallest bundle whose measured quality meets a bound.

Every size that is tried is a real bundle, written and evaluated; nothing is predicted.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tolkit.bundling import BundleReport, Resources
from tolkit.compress import CompressSpec, open_for
from tolkit.compress.fill.bands import floor_bytes
from tolkit.compress.plan import plan_compress
from tolkit.compress.search.bound import Bound
from tolkit.compress.search.recipe import recipe_of
from tolkit.compress.search.sizes import next_size
from tolkit.compress.search.workshop import Candidate, Workshop, workshop
from tolkit.errors import GateError, TolError
from tolkit.evaluate.judge import Judge
from tolkit.measured import Measured, Measurement
from tolkit.progress import Progress, TqdmProgress
from tolkit.quality_log import RecordedMetric

__all__ = ["Found", "Point", "SpecAt", "smallest_bundle"]

_TOP_BITS = 8.0
_START_BITS = 1.0
_LEAST_SHARE = 1e-3  # an interval that ends at or below 0 counts as this share of the bound

SpecAt = Callable[[int], CompressSpec]
"""The compression to a number of bytes; every other option is fixed."""


@dataclass(frozen=True)
class Point:
    """One size that was looked at.

    Attributes:
        budget_bytes: that was to be filled.     table_bytes, bits_per_value: what it took.
        holds: whether the bound does.
        reused: whether an earlier measurement says so.
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
        judge: text, two windows or more, and the reference.
        known: measurements of bundles of the same recipe, text and reference stand for theirs.

    Raises:
        GateError: not even the largest bundle meets it; measurements are kept.
        OutputExistsError, MismatchError, DataError, NonFiniteError, ResourceError.
    """
    assert judge.reference is not None
    source_path, out = Path(source_path), Path(out)
    resources, progress = resources or Resources(), progress or TqdmProgress()
    with workshop(source_path, out, judge, known or Measured(), resources, progress) as shop:
        return _Search(shop, spec_at, bound).run(out)


class _Search:
    def __init__(self, shop: Workshop, spec_at: SpecAt, bound: Bound) -> None:
        self.shop, self.bound, self._spec_at = shop, bound, spec_at
        self._made: dict[int, Candidate] = {}
        self._points: dict[int, Point] = {}
        self._evaluations = 0
        self._started_s = time.perf_counter()
        spec = self._spec(1)
        source, counts_V, calibration = open_for(shop.source_path, spec)
        self._values = source.vocab_size * source.num_layers * source.hidden_size
        self._floor = floor_bytes(source, plan_compress(source, spec), counts_V)
        self._recipe = recipe_of(source, spec, counts_V, calibration)
        for entry in shop.known:
            if entry.recipe == self._recipe and entry.budget_bytes is not None:
                self._points[entry.budget_bytes] = self._point(entry, reused=True)

    def run(self, out: Path) -> Found:
        """All sizes, then publish."""
        self._try_sizes()
        chosen = self._best()
        while chosen is not None and chosen.budget_bytes not in self._made:
            # Known from a file: it has to be made, and is judged by what it turns out to be.
            self._make(chosen.budget_bytes)
            self._try_sizes()
            chosen = self._best()
        if chosen is None:
            raise self._unreachable()
        report = self.shop.publish(self._made[chosen.budget_bytes], out)
        elapsed_s = time.perf_counter() - self._started_s
        points = tuple(self._points.values())
        return Found(self.bound, points, chosen, report, self._evaluations, elapsed_s)

    def _try_sizes(self) -> None:
        """Measure sizes until none is left to try; keep the one that would be published."""
        top = max(self._floor, int(_TOP_BITS * self._values / 8))
        start = int(_START_BITS * self._values / 8)
        while True:
            # What a bundle leaves of its budget is no room for a smaller one.
            excess = {
                p.table_bytes if p.holds else p.budget_bytes: self._excess(p)
                for p in self._points.values()
            }
            size = next_size(excess, floor=self._floor, top=top, start=start)
            if size is None or size in self._points:
                return
            self._make(size)

    def _make(self, budget: int) -> None:
        """Write and measure one candidate."""
        made = self.shop.make(
            f"size-{budget}",
            self._spec(budget),
            f"{8 * budget / self._values:.3f} bits/value",
            self._recipe,
            budget,
        )
        self._evaluations += made.fresh
        self._made[budget] = made
        self._points[budget] = self._point(made.measured, reused=not made.fresh)
        best = self._best()
        for other in [b for b in self._made if best is None or b != best.budget_bytes]:
            self.shop.discard(self._made.pop(other))

    def _best(self) -> Point | None:
        holding = [p for p in self._points.values() if p.holds]
        return min(holding, key=lambda p: (p.table_bytes, p.budget_bytes), default=None)

    def _point(self, entry: Measurement, *, reused: bool) -> Point:
        record, metrics = entry.record, entry.record.metrics
        assert entry.budget_bytes is not None
        assert record.table_bytes is not None and record.bits_per_value is not None
        return Point(
            entry.budget_bytes,
            record.table_bytes,
            record.bits_per_value,
            metrics["kl_mean_nats"],
            metrics["ppl_increase"],
            metrics["ppl_token"],
            self.bound.holds(metrics[self.bound.metric].high),
            reused,
        )

    def _excess(self, point: Point) -> float:
        metric = point.kl_nats if self.bound.metric == "kl_mean_nats" else point.ppl_increase
        if math.isnan(metric.high):
            return math.inf
        return math.log(max(metric.high / self.bound.limit, _LEAST_SHARE))

    def _spec(self, budget: int) -> CompressSpec:
        setting = self.shop.judge.setting
        reason = {
            **self.bound.to_history(),
            "text": setting.text_digest[:16],
            "window": setting.window_length,
            "reference": str(setting.reference)[:16],
        }
        spec = self._spec_at(budget)
        return dataclasses.replace(spec, chosen_by={**spec.chosen_by, **reason})

    def _unreachable(self) -> TolError:
        best = min(self._points.values(), key=self._excess)
        kl, change = best.kl_nats, best.ppl_increase
        return GateError(
            f"{self.bound.name}: no size up to {_TOP_BITS:g} bits/value keeps within "
            f"{self.bound.said()}; the best, {best.bits_per_value:.3f} bits/value, costs KL "
            f"{kl.value:.2g} +/- {kl.se:.1g} nats and {100 * change.value:+.3f} +/- "
            f"{100 * change.se:.3f} % of perplexity",
            hint="the upper end of the 95 % interval must hold: raise the bound, or give more "
            f"text; what was measured is kept in {self.shop.records}",
        )
