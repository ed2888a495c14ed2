"""Rows decoded once and kept in float32, where the whole table fits.

V vocabulary, K kept layers, D hidden, n ids asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tolkit.runtime.disk import DiskRows
from tolkit.runtime.planes import spread_planes
from tolkit.runtime.statistics import TableStatistics
from tolkit_formats.frame_plan import least_cache_bytes
from tolkit_formats.reader import Bundle

__all__ = ["DecodedRows"]

_DECODED_BYTES = 1 << 30


class DecodedRows:
    """A bundle as a row source for scoring text, which asks for most rows many times.

    A row is decoded when it is first asked for. Tables too large in float32 are served as
    `DiskRows` does.

    Args:
        bundle: open bundle.
        decoded_bytes: memory for decoded rows.
    """

    def __init__(self, bundle: Bundle, *, decoded_bytes: int = _DECODED_BYTES) -> None:
        self.bundle = bundle
        values = bundle.vocab_size * len(bundle.layer_ids) * bundle.hidden_size
        self._rows_VKD: Tensor | None = None
        if 4 * values <= decoded_bytes:
            # Pages come to life when a row is written, so this costs what is used.
            shape = (bundle.vocab_size, len(bundle.layer_ids), bundle.hidden_size)
            self._rows_VKD = torch.empty(shape)
            self._known_V = torch.zeros(bundle.vocab_size, dtype=torch.bool)
            # every record is read once: there is nothing for a cache of them to do
            self._disk = DiskRows(bundle, max_table_bytes=least_cache_bytes(bundle), seed=False)
        else:
            self._disk = DiskRows(bundle)

    @property
    def statistics(self) -> TableStatistics:
        """Of the reads from disk; rows found decoded are not counted."""
        return self._disk.statistics

    def fetch(self, ids_n: Tensor) -> Sequence[Tensor | None]:
        """Per layer float32 [n, D] on the CPU; see `DiskRows.fetch`."""
        if self._rows_VKD is None:
            return self._disk.fetch(ids_n)
        ids_n = ids_n.detach().cpu()
        self.bundle.slots_of(ids_n.numpy())  # refuses ids out of range
        fresh = torch.unique(ids_n[~self._known_V[ids_n]])
        if len(fresh):
            planes = self._disk.fetch(fresh)
            for place, layer in enumerate(self.bundle.layer_ids):
                plane_nD = planes[layer]
                assert plane_nD is not None
                self._rows_VKD[fresh, place] = plane_nD
            self._known_V[fresh] = True
        rows_nKD = self._rows_VKD.index_select(0, ids_n)
        return spread_planes(rows_nKD, self.bundle.layer_ids, self.bundle.num_layers)

    def prefetch(self, ids_n: Tensor) -> None:
        """Start reading records that were not decoded yet."""
        if self._rows_VKD is None:
            self._disk.prefetch(ids_n)

    def close(self) -> None:
        """Close the bundle's files; what is decoded goes."""
        self._disk.close()
        self._rows_VKD = None
