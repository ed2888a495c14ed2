"""Variants of one model that differ only in its table rows: scaled, or without some layers.

L layers, n distinct token ids, D hidden. Nothing is copied or written: a variant is the same
runnable with another `adjust`, so several of them fit beside the reference in one pass.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tolkit.errors import UsageError
from tolkit.evaluate.runnable import Adjust
from tolkit.model import FfnRows, RowSource
from tolkit.model.rows import LazyPlanes

if TYPE_CHECKING:
    from tolkit.tables import Runnable

__all__ = [
    "MemoRows",
    "layers_with_tables",
    "require_tables",
    "scaled",
    "without_ffn",
    "without_layers",
]


def scaled(runnable: Runnable, alpha: float) -> Runnable:
    """Every table row times `alpha`: the paper's alpha * FFN(X0), section 3.2.

    One alpha for all layers, so bundles with folded layers keep their meaning.

    Raises:
        UsageError: `alpha` is negative or not finite, or the model is dense.
    """
    require_tables(runnable)
    if not math.isfinite(alpha) or alpha < 0:
        raise UsageError(f"alpha: expected a finite number of at least 0, got {alpha}")

    def adjust(planes: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        def plane(layer: int) -> Tensor | None:
            plane_nD = planes[layer]
            return None if plane_nD is None else plane_nD * alpha

        return LazyPlanes(len(planes), plane)

    return _adjusted(runnable, adjust)


def without_layers(runnable: Runnable, gone: Mapping[int, int | None]) -> Runnable:
    """The model without some layers' tables: dropped, or added to the table of another layer.

    The sums equal those that `drop_layers` writes, before they are stored.

    Args:
        gone: layer -> the layer its table is added to; None drops it (the paper's way).

    Raises:
        UsageError: the model is dense, a layer has no table, or a receiver goes as well.
    """
    require_tables(runnable)
    kept = layers_with_tables(runnable)
    for layer, into in gone.items():
        if layer not in kept:
            raise UsageError(f"layer: {layer} has no table to leave out, expected one of {kept}")
        if into is not None and (into not in kept or into in gone):
            raise UsageError(f"layer: {layer} is folded into {into}, which has no table")
    members = {layer: [layer] for layer in kept if layer not in gone}
    for layer, into in gone.items():
        if into is not None:
            members[into].append(layer)

    def adjust(planes: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        return LazyPlanes(len(planes), lambda layer: _sum(planes, members.get(layer, ())))

    return _adjusted(runnable, adjust)


def without_ffn(runnable: Runnable, layer: int) -> Runnable:
    """A dense model without the FFN of one block; all weights are shared with the original.

    Raises:
        UsageError: the model has tables (leave those out instead), or no such layer.
    """
    config = runnable.model.config
    if config.has_tables:
        raise UsageError(f"{runnable.path}: its FFNs are tables, expected a dense model")
    if not 0 <= layer < config.num_hidden_layers:
        raise UsageError(
            f"layer: {layer} is out of range, expected 0 to {config.num_hidden_layers - 1}"
        )
    shared = {id(weight): weight for weight in runnable.model.parameters()}
    model = copy.deepcopy(runnable.model, shared)
    model.block(layer).mlp = None
    return dataclasses.replace(runnable, model=model)


class MemoRows:
    """A row source that remembers what it gave last, for variants that read the same batch.

    Holds the planes of one batch, L x n x D values; each is computed when first asked for.
    """

    def __init__(self, rows: RowSource) -> None:
        self._rows = rows
        self._ids_n: Tensor | None = None
        self._planes: Sequence[Tensor | None] = ()

    def fetch(self, ids_n: Tensor) -> Sequence[Tensor | None]:
        """See RowSource."""
        if self._ids_n is None or not torch.equal(self._ids_n, ids_n):
            self._ids_n = ids_n
            self._planes = _Remembered(self._rows.fetch(ids_n)).planes
        return self._planes


class _Remembered:
    """Planes that are computed once each."""

    def __init__(self, source: Sequence[Tensor | None]) -> None:
        self._source = source
        self._known: dict[int, Tensor | None] = {}
        self.planes = LazyPlanes(len(source), self._plane)

    def _plane(self, layer: int) -> Tensor | None:
        if layer not in self._known:
            self._known[layer] = self._source[layer]
        return self._known[layer]


def _sum(planes: Sequence[Tensor | None], members: Sequence[int]) -> Tensor | None:
    """The planes' sum in layer order, as `tolkit.compress` adds them; None of none."""
    total_nD: Tensor | None = None
    for layer in sorted(members):
        plane_nD = planes[layer]
        assert plane_nD is not None
        total_nD = plane_nD if total_nD is None else total_nD + plane_nD
    return total_nD


def _adjusted(runnable: Runnable, adjust: Adjust) -> Runnable:
    before = runnable.adjust
    if before is None:
        return dataclasses.replace(runnable, adjust=adjust)
    return dataclasses.replace(runnable, adjust=lambda planes: adjust(before(planes)))


def require_tables(runnable: Runnable) -> None:
    """UsageError for a dense model."""
    if not runnable.model.config.has_tables:
        raise UsageError(
            f"{runnable.path}: is a dense model, its FFNs read the residual stream and have no "
            "table rows"
        )


def layers_with_tables(runnable: Runnable) -> list[int]:
    """Layers whose rows are not left out or folded; found by asking for one token's rows."""
    model = runnable.model
    rows = runnable.rows or FfnRows(model)
    with torch.inference_mode():
        planes = rows.fetch(torch.zeros(1, dtype=torch.int64, device=model.embedding.device))
        if runnable.adjust is not None:
            planes = runnable.adjust(planes)
        return [layer for layer in range(len(planes)) if planes[layer] is not None]
