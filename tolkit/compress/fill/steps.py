"""Codec `steps` for a whole source: the scale that meets a budget, and everything to store at it.

V vocabulary, L layers, D hidden, T tiers, G classes.

How large records come out is known only once they are coded, but closely foretold by what a walk
counts: the ideal cost of its symbols and half a byte a record. The caller encodes with a little in
hand, and comes back with a smaller target in the rare case that it was not enough.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tolkit.calibrate import Calibration
from tolkit.compress.fill.bands import (
    Job,
    all_rows,
    make_job,
    sample_rows,
    spill_scale,
    walk_layers,
)
from tolkit.compress.fill.resolve_steps import CodedModels, StepsLayer, class_models, resolve_steps
from tolkit.compress.fill.step_classes import bits_at, gaussian_bits, kept_rows
from tolkit.compress.fill.walk_steps import StepsFit, StepsWalk, Symbols, tables_of
from tolkit.compress.plan import EncodePlan
from tolkit.parallel import BlockPool
from tolkit.progress import Progress
from tolkit.sources import TableSource
from tolkit_formats.entropy import Coding, tier_coder
from tolkit_formats.rans import RowCoder
from tolkit_formats.reader import shared_name
from tolkit_formats.records import CRC_BYTES, Tier, lay_out
from tolkit_formats.sizes import coded_shard_bytes, table_bytes

__all__ = ["FilledSteps", "StepsFitter"]

_WALKS = 8
_CLOSE = 0.002  # relative distance of the predicted size from the target
_LANE_BYTES = 0.85  # measured: what a record of one lane takes beyond its information,
_CODER_SHARE = 0.003  # and beside that in proportion
_MORE_LANES = 4
_ENOUGH = 256
_LONG_RECORD = 1200  # bytes; from there on a few for more lanes do not matter

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class FilledSteps:
    """A budget, filled: everything to store, and about how large it will be.

    Attributes:
        layers: what each stores.
        tiers: their records before coding.
        table_bytes: under tables/, foretold.
        coding: for the manifest.
        common: arrays of all layers: name -> (dtype, array).
        coders: of each tier.
        layer_bytes: a token's, by layer, foretold.
        walks: over the sample that the search for the scale took.
    """

    layers: Mapping[int, StepsLayer]
    tiers: tuple[Tier, ...]
    table_bytes: int
    coding: Coding
    common: Mapping[str, tuple[str, npt.NDArray[Any]]]
    coders: tuple[RowCoder, ...]
    layer_bytes: Mapping[int, float]
    walks: int = 0


@dataclass(frozen=True)
class _Pass:
    """One walk: at which scale, what it found and counted."""

    scale: float
    fits: list[StepsFit]
    symbols: Symbols
    coded: CodedModels


class StepsFitter:
    """Fits a source as often as the budget takes. The arguments are those of `fit_bands`.

    Raises:
        UsageError: the budget is below the floor.
    """

    def __init__(
        self,
        source: TableSource,
        plan: EncodePlan,
        counts_V: npt.NDArray[np.uint64] | None,
        calibration: Calibration | None,
        work: Path,
        pool: BlockPool,
        progress: Progress,
    ) -> None:
        self._job: Job = make_job(source, plan, counts_V, calibration, work, pool)
        self._sample = sample_rows(self._job)
        self._spill = 1.0  # for all rows, from what a sample needed
        self._walks = 0
        self._progress = progress
        self._layers = tuple(p.layer for p in plan.planes)
        self._rows_T = np.array([stop - first for first, stop in self._job.ranges])

    @property
    def floor_bytes(self) -> int:
        """Of what tables/ takes when nothing is coded."""
        return self._job.floor_bytes

    def fit(self, target_bytes: int, *, sample_only: bool = False) -> FilledSteps:
        """What every layer stores so that tables/ takes about `target_bytes`.

        Args:
            target_bytes: `floor_bytes` or more.
            sample_only: fit the sample alone, for a dry run.

        Raises:
            NonFiniteError: names the layer.
        """
        assert target_bytes >= self.floor_bytes
        self._walks = 0
        done = self._search(target_bytes)
        walks = self._walks
        everything = len(self._sample[1]) == self._job.source.num_rows
        if not everything and not sample_only:
            done = self._walk(done.scale or None, done.symbols, everything=True)
        return replace(self._filled(done), walks=walks)

    def _search(self, target_bytes: int) -> _Pass:
        """Walks over the sample until the predicted size is close to the target."""
        best = last = self._walk(None, None)
        fixed_bytes: float = self._filled(last).table_bytes
        assert fixed_bytes <= self.floor_bytes  # a layer of zeros needs no predictor
        costs = gaussian_bits()
        for _ in range(_WALKS):
            scale = self._scale_for(last, costs, fixed_bytes, target_bytes)
            last = self._walk(scale, last.symbols if last.scale else None)
            size = self._filled(last).table_bytes
            if size <= target_bytes * (1 + _CLOSE):
                best = last
            if abs(size / target_bytes - 1) < _CLOSE:
                break
            costs = _measured_bits(last)
            fixed_bytes = size - self._coded_bytes(last.fits, last.scale, costs)
        return best

    def _walk(
        self, scale: float | None, before: Symbols | None, *, everything: bool = False
    ) -> _Pass:
        job = self._job
        rows, slots = (all_rows(job, self._spill), None) if everything else self._sample
        self._walks += 1
        tables = tables_of(before)
        walk = StepsWalk(
            rows, job.wish, job.pool, scale=scale, tables=tables, feedback=job.plan.feedback
        )
        size = len(self._layers) * rows.count
        with self._progress.task("fit steps", size, "rows") as task:
            fits = walk_layers(job, walk.fit, rows, slots, task)
        self._spill = spill_scale(fit.exponent for fit in fits)
        return _Pass(scale or 0.0, fits, walk.symbols, class_models(fits, walk.symbols, tables))

    def _scale_for(
        self, last: _Pass, costs_G: Floats, fixed_bytes: float, target_bytes: int
    ) -> float:
        """Bisection over log(scale); what the components are worth stays as it is."""
        fits = last.fits
        if fixed_bytes > target_bytes:
            return 1.5 * last.scale  # the models alone take too much, fewer will be needed
        largest = max((float(fit.worth_TR.max(initial=0)) for fit in fits), default=0.0)
        if largest <= 0:
            return 1.0
        high = math.log(largest) / 2 + 3
        low = high - 30
        for _ in range(60):
            middle = (low + high) / 2
            if fixed_bytes + self._coded_bytes(fits, math.exp(middle), costs_G) > target_bytes:
                low = middle
            else:
                high = middle
        return math.exp(high)

    def _coded_bytes(self, fits: Sequence[StepsFit], scale: float, costs_G: Floats) -> float:
        """Bytes of symbols and of basis rows at a scale, by what a symbol of each class costs."""
        total = 0.0
        width = self._job.source.hidden_size
        for fit in fits:
            ratio_TR = np.sqrt(fit.worth_TR) / scale
            if fit.basis is not None:
                keep, bits_R = kept_rows(ratio_TR, self._rows_T, width)
                ratio_TR = ratio_TR[:, keep]
                total += float(bits_R.sum()) * width / 8 + len(keep) * len(ratio_TR)
            total += float((self._rows_T @ bits_at(ratio_TR, costs_G)).sum()) / 8
        return total

    def _filled(self, done: _Pass) -> FilledSteps:
        source, coded = self._job.source, done.coded
        decided = [resolve_steps(fit, coded, source.hidden_size) for fit in done.fits]
        layers = dict(zip(self._layers, decided, strict=True))
        bits_T = (done.symbols.counts_TGS[:, :, : coded.bits_GS.shape[1]] * coded.bits_GS).sum(
            axis=(1, 2)
        )
        ideal = float(bits_T.sum()) / 8 / float(self._rows_T.sum())
        lanes = _MORE_LANES if ideal >= _LONG_RECORD else 1
        coding = coded.coding(lanes)
        tiers: list[Tier] = []
        coders = []
        sizes: dict[str, int] = {}
        first_slot = 0
        for index, rows in enumerate(self._rows_T.tolist()):
            codecs = [(layer, decision.codecs[index]) for layer, decision in layers.items()]
            tiers.append(lay_out(codecs, rows, index=index, first_slot=first_slot, coded=True))
            classes = [
                layer.stored[codec.classes_name][1]
                for layer, codec in zip(decided, (c for _, c in codecs), strict=True)
                if codec.count
            ]
            coders.append(tier_coder(coded.models, classes, coding))
            overhead = CRC_BYTES + (_LANE_BYTES + 1.5 * (lanes - 1)) * bool(tiers[-1].stride)
            mean = float(bits_T[index]) / 8 / rows * (1 + _CODER_SHARE) + overhead
            sizes |= coded_shard_bytes(tiers[-1], mean)
            first_slot += rows
        shapes = {name: (dtype, array.shape) for name, (dtype, array) in coded.stored.items()}
        for layer, decision in layers.items():
            for name, (dtype, array) in decision.stored.items():
                shapes[shared_name(layer, name)] = (dtype, array.shape)
        mapped = source.vocab_size if source.slot_of_token_V is not None else None
        size = table_bytes(tiers, shapes, mapped_vocab_size=mapped, shard_bytes=sizes)
        layer_bits = [
            float((counts[:, : coded.bits_GS.shape[1]] * coded.bits_GS).sum())
            for counts in done.symbols.layer_counts
        ] or [0.0] * len(layers)
        per_token = {
            layer: bits / 8 / float(self._rows_T.sum())
            for layer, bits in zip(self._layers, layer_bits, strict=True)
        }
        return FilledSteps(
            layers, tuple(tiers), size, coding, coded.stored, tuple(coders), per_token
        )


def _measured_bits(done: _Pass) -> Floats:
    """Mean cost of a symbol of each class: as counted, a Gaussian's where little was."""
    counts_GS = done.symbols.counts_TGS.sum(axis=0)[:, : done.coded.bits_GS.shape[1]]
    total_G = counts_GS.sum(axis=1)
    mean_G = (counts_GS * done.coded.bits_GS).sum(axis=1) / np.maximum(total_G, 1)
    return np.where(total_G > _ENOUGH, mean_G, gaussian_bits())
