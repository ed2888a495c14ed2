"""Passing through the layers of a source: targets, their transform, and what a layer loses.

V rows, D hidden, T tiers, R rows of a basis, S sampled rows.

What codecs bands and steps have in common: each layer's target is its table plus what the layers
before it lost; the transform is fitted to that, its coefficients are measured in every tier, and
the codec's own walk decides, quantises and passes the loss on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tolkit.compress.fill.transform import Metric, Moments, Transform, fit_transform
from tolkit.compress.gram import CrossAccumulator, GramAccumulator
from tolkit.compress.spec import BandsWish
from tolkit.compress.tiers import TierRange
from tolkit.errors import NonFiniteError
from tolkit.parallel import BlockPool
from tolkit.progress import Task
from tolkit.rotation import rotated
from tolkit_formats.limits import BLOCK_ROWS

__all__ = ["PlaneRows", "Rows", "Walk"]

_SAMPLED_ROWS = 4096
_SAMPLED_VALUES = 1 << 21
_HALF = BLOCK_ROWS // 2

PlaneRows = Callable[[int, int], Tensor]
_T = TypeVar("_T")
_Fit = TypeVar("_Fit")


@dataclass(frozen=True)
class Rows:
    """The rows a walk goes over: all of a source, or a sample of them.

    Attributes:
        ranges: first and last+1 row of each tier.
        tier_rows: rows of each tier in the source.
        shares_V: float64 [rows], how much each counts in a sum over the source's weighted rows.
        weights_V: float64 [rows], of the rows themselves, mean 1 over the source.
        unit: reader of unit embeddings, None where nothing is predicted.
        scratch: gives a place for `rows` x D values, by name.
        memo: sums over all rows that no layer changes.
        keep: gives a place for float32 values of a shape that stays until the bundle is written.
        scale: power of two that values are multiplied by on their way into scratch.
    """

    ranges: tuple[TierRange, ...]
    tier_rows: tuple[int, ...]
    shares_V: Tensor
    weights_V: Tensor
    unit: PlaneRows | None
    scratch: Callable[[str], npt.NDArray[np.generic]]
    keep: Callable[[str, tuple[int, ...]], npt.NDArray[np.float32]]
    memo: dict[str, Tensor] = field(default_factory=dict)
    scale: float = 1.0

    @property
    def count(self) -> int:
        """Rows there are to go over."""
        return self.ranges[-1][1]

    def blocks(self) -> Iterator[tuple[int, int, int]]:
        """Tier, first and last+1 row of every block; none crosses a tier."""
        for tier, (first, stop) in enumerate(self.ranges):
            for start in range(first, stop, _HALF):
                yield tier, start, min(start + _HALF, stop)


@dataclass(frozen=True)
class Coefficients:
    """What the coefficients of a layer's targets are like; float64.

    Attributes:
        variances_TR: in each tier.
        peaks_TR: largest magnitude in each tier.
        samples_SR: of some rows.
        tier_S: int64, their tiers.
    """

    variances_TR: npt.NDArray[np.float64]
    peaks_TR: npt.NDArray[np.float64]
    samples_SR: npt.NDArray[np.float64]
    tier_S: npt.NDArray[np.int64]


class Walk(ABC, Generic[_Fit]):
    """One pass through the layers.

    Args:
        rows: what to go over.
        wish: how the codec shall look.
        feedback: whether a layer's loss is passed on.
    """

    def __init__(self, rows: Rows, wish: BandsWish, pool: BlockPool, *, feedback: bool) -> None:
        self.rows, self.wish, self.pool, self.feedback = rows, wish, pool, feedback
        self.predictor_bits = 0 if wish.predictor_bits is None else wish.predictor_bits
        self._carry: npt.NDArray[np.generic] | None = None
        self._layer = 0

    def fit(self, read: PlaneRows, width: int, metric: Metric, task: Task | None) -> _Fit:
        """Fit one plane and move the carry past it.

        Raises:
            NonFiniteError: values too large for the spill or the sums.
        """
        targets = self.rows.scratch("target")
        transform = self._transform(self._moments(read, targets, width), metric, width)
        fit = self._fit(targets, transform, metric)
        if task is not None:
            task.advance(self.rows.count)
        self._layer += 1
        return fit

    @abstractmethod
    def _fit(self, targets: npt.NDArray[np.generic], transform: Transform, metric: Metric) -> _Fit:
        """Decide what is stored of the targets and, under feedback, pass on what that loses."""

    def _kept(self, analysis_DR: Tensor) -> Tensor:
        """The same in a file: those of all layers together may be gigabytes."""
        place = self.rows.keep(f"analysis{self._layer}", analysis_DR.shape)
        place[:] = analysis_DR.numpy()
        return torch.from_numpy(place)

    def _moments(self, read: PlaneRows, targets: npt.NDArray[np.generic], width: int) -> Moments:
        """Weighted moments of targets and unit embeddings; the targets are spilled on the way."""
        unit = self.rows.unit if self.predictor_bits else None
        gram = GramAccumulator(1 + width, pool=self.pool.executor)
        cross = CrossAccumulator(width, width, pool=self.pool.executor) if unit else None

        def load(block: tuple[int, int, int]) -> tuple[Tensor, Tensor | None]:
            _, first, stop = block
            target_ND = read(first, stop)
            if self._carry is not None:
                target_ND = target_ND + self._spilled(self._carry, first, stop)
            if not bool(torch.isfinite(target_ND).all()):
                raise NonFiniteError(f"rows {first} to {stop}: NaN or infinity")
            self._spill(targets, first, target_ND)
            return self._spilled(targets, first, stop), unit and unit(first, stop)

        for start, pieces in self._loaded(load):
            target_ND = torch.cat([target for target, _ in pieces])
            shares_N = self.rows.shares_V[start : start + len(target_ND)]
            gram.add(_with_ones(target_ND), shares_N)
            if cross is not None:
                unit_ND = torch.cat([rows for _, rows in pieces if rows is not None])
                cross.add(unit_ND, target_ND, shares_N)
        if cross is None:
            return Moments.of_sums(gram.gram_DD())
        return Moments.of_sums(gram.gram_DD(), self._unit_gram(width), cross.sum_CD())

    def _unit_gram(self, width: int) -> Tensor:
        """Of [1, unit]: the same for all layers and walks, so made once."""
        unit = self.rows.unit
        assert unit is not None
        if "unit" not in self.rows.memo:
            gram = GramAccumulator(1 + width, pool=self.pool.executor)
            for start, pieces in self._loaded(lambda block: unit(block[1], block[2])):
                joint = _with_ones(torch.cat(pieces))
                gram.add(joint, self.rows.shares_V[start : start + len(joint)])
            self.rows.memo["unit"] = gram.gram_DD()
        return self.rows.memo["unit"]

    def _loaded(self, load: Callable[[tuple[int, int, int]], _T]) -> Iterator[tuple[int, list[_T]]]:
        """`load` of every block, several at once, in runs of at least BLOCK_ROWS rows.

        Yields:
            the first row of a run, and what its blocks gave.
        """
        blocks = list(self.rows.blocks())
        waiting: list[_T] = []
        start = 0
        for i in range(0, len(blocks), self.pool.threads):
            group = blocks[i : i + self.pool.threads]
            for block, piece in zip(group, self.pool.map(load, group), strict=True):
                waiting.append(piece)
                stop = block[2]
                if stop - start >= BLOCK_ROWS or block is blocks[-1]:
                    yield start, waiting
                    start, waiting = stop, []

    def _transform(self, moments: Moments, metric: Metric, width: int) -> Transform:
        transform = fit_transform(moments, metric, self.predictor_bits, self.pool)
        if self.wish.transform == "klt":
            return transform
        rotation_DD = rotated(torch.eye(width)).double()
        spread_D = ((rotation_DD @ transform.synthesis_RD.T) ** 2 @ transform.variances_R).clamp(
            min=0
        )
        return Transform(
            transform.mean_D,
            transform.predictor,
            transform.predictor_bits,
            rotation_DD,
            rotation_DD,
            torch.full((width,), metric.mean_eigenvalue, dtype=torch.float64),
            spread_D,
            transform.exponent,
        )

    def _tier_weights(self) -> npt.NDArray[np.float64]:
        return np.array(
            [float(self.rows.weights_V[first:stop].mean()) for first, stop in self.rows.ranges]
        )

    def _measure(self, targets: npt.NDArray[np.generic], transform: Transform) -> Coefficients:
        """What the coefficients of the targets are like; leaves in `targets` what is transformed.

        That is the targets without mean and prediction.
        """
        analysis_DR = transform.analysis_DR.float()
        wanted = min(_SAMPLED_ROWS, max(256, _SAMPLED_VALUES // analysis_DR.shape[1]))
        step = max(1, self.rows.count // wanted)
        mean_D = transform.mean_D.float()
        weights_DD = None
        if transform.predictor is not None:
            weights_DD = transform.predictor.values_RD.T.float()

        def measure(block: tuple[int, int, int]) -> tuple[int, Tensor, Tensor, Tensor]:
            tier, first, stop = block
            residual_ND = self._spilled(targets, first, stop) - mean_D
            if weights_DD is not None:
                assert self.rows.unit is not None
                residual_ND -= self.rows.unit(first, stop) @ weights_DD
            self._spill(targets, first, residual_ND)
            coeffs_NR = residual_ND @ analysis_DR
            picked = torch.arange(-first % step, stop - first, step)
            squares_R = coeffs_NR.double().square().sum(dim=0)
            return tier, squares_R, coeffs_NR.abs().amax(dim=0).double(), coeffs_NR[picked]

        sums_TR = torch.zeros((len(self.rows.ranges), analysis_DR.shape[1]), dtype=torch.float64)
        peaks_TR = torch.zeros_like(sums_TR)
        samples, tiers = [], []
        for tier, squares_R, peak_R, picked_SR in self.pool.map(measure, self.rows.blocks()):
            sums_TR[tier] += squares_R
            peaks_TR[tier] = torch.maximum(peaks_TR[tier], peak_R)
            samples.append(picked_SR)
            tiers += [tier] * len(picked_SR)
        sizes_T1 = torch.tensor([[stop - first] for first, stop in self.rows.ranges])
        return Coefficients(
            (sums_TR / sizes_T1).numpy(),
            peaks_TR.numpy(),
            torch.cat(samples).double().numpy(),
            np.array(tiers),
        )

    def _spill(self, place: npt.NDArray[np.generic], first: int, rows_ND: Tensor) -> None:
        scaled_ND = rows_ND if self.rows.scale == 1 else rows_ND * self.rows.scale
        torch.from_numpy(place[first : first + len(rows_ND)]).copy_(scaled_ND)

    def _spilled(self, place: npt.NDArray[np.generic], first: int, stop: int) -> Tensor:
        rows_ND = torch.from_numpy(place[first:stop]).float()
        return rows_ND if self.rows.scale == 1 else rows_ND / self.rows.scale


def _with_ones(rows_ND: Tensor) -> Tensor:
    return torch.cat([torch.ones(len(rows_ND), 1), rows_ND], dim=1)
