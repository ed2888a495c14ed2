"""Partial tables as a row source: stored rows where there are some, all others computed.

n distinct token ids, L layers, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tolkit.cold_rows import ColdPlanes
from tolkit.model.rows import LazyPlanes
from tolkit.runtime.statistics import TableStatistics
from tolkit_formats.reader import Bundle

if TYPE_CHECKING:
    from tolkit.runtime.rows import TableRows

__all__ = ["ColdStatistics", "RecomputeRows"]


@dataclass(frozen=True)
class ColdStatistics:
    """Rows fetched so far, and those of them that had no record and were computed."""

    rows_asked: int = 0
    rows_cold: int = 0

    @property
    def cold_rate(self) -> float:
        """Share of rows computed; 0 before the first fetch."""
        return self.rows_cold / self.rows_asked if self.rows_asked else 0.0


class RecomputeRows:
    """A row source over a partial bundle, around one that serves its stored rows.

    Cold rows are computed by the FFN weights in the bundle, layer by layer as planes are asked
    for, and none is kept. Equal sets of cold ids give the bits of the checkpoint's FFN path.

    Args:
        stored: asked for tokens that have a record only, and only where there are some.
        bundle: with `manifest.partial`.
        device, dtype: of planes with cold rows, those of `stored`.
        keep_bytes: copies of FFN weights that may stay in memory (see `ColdPlanes`).
    """

    def __init__(
        self,
        stored: TableRows,
        bundle: Bundle,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        keep_bytes: int = 256 << 20,
    ) -> None:
        self.stored, self.bundle = stored, bundle
        self.cold_statistics = ColdStatistics()
        self._device, self._dtype = torch.device(device), dtype
        self._cold = ColdPlanes(bundle, device=device, dtype=dtype, keep_bytes=keep_bytes)

    def fetch(self, ids_n: Tensor) -> Sequence[Tensor | None]:
        """See RowSource. UsageError: an id out of range."""
        ids_n = ids_n.detach().cpu()
        hot_n = torch.from_numpy(self.bundle.has_record(ids_n.numpy()))
        self._count(len(ids_n), int((~hot_n).sum()))
        if bool(hot_n.all()):
            return self.stored.fetch(ids_n)
        # Places, not masks: a mask would be looked through again at every layer.
        hot_at, cold_at = (which.nonzero()[:, 0] for which in (hot_n, ~hot_n))
        stored = self.stored.fetch(ids_n[hot_at]) if len(hot_at) else None
        kept = set(self.bundle.layer_ids)
        cold_ids = ids_n[cold_at]
        shape = (len(ids_n), self.bundle.hidden_size)

        def plane(layer: int) -> Tensor | None:
            if layer not in kept:
                return None
            cold_mD = self._cold.plane(layer)(cold_ids)
            hot_mD = None if stored is None else stored[layer]
            if hot_mD is None:
                return cold_mD
            rows_nD = torch.empty(shape, dtype=self._dtype, device=self._device)
            rows_nD[cold_at.to(self._device)] = cold_mD
            rows_nD[hot_at.to(self._device)] = hot_mD.to(self._device, self._dtype)
            return rows_nD

        return LazyPlanes(self.bundle.num_layers, plane)

    @property
    def statistics(self) -> TableStatistics:
        """Of the tokens that have a record; `cold_statistics` counts the others."""
        return self.stored.statistics

    def prefetch(self, ids_n: Tensor) -> None:
        """Start getting the rows of those ids that have a record; returns at once."""
        ids_n = ids_n.detach().cpu()
        self.stored.prefetch(ids_n[torch.from_numpy(self.bundle.has_record(ids_n.numpy()))])

    def close(self) -> None:
        """Close the stored rows; the bundle's weights stay mapped."""
        self.stored.close()

    def _count(self, asked: int, cold: int) -> None:
        before = self.cold_statistics
        self.cold_statistics = ColdStatistics(before.rows_asked + asked, before.rows_cold + cold)
