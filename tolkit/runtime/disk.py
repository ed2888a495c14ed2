"""Table rows read from disk when they are needed.

n ids asked for, K kept layers, D hidden, S record stride, B bytes of a plane.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tolkit.decode.record_decoder import RecordDecoder
from tolkit.runtime.planes import TierRecords, decoded_planes
from tolkit.runtime.statistics import TableStatistics
from tolkit_formats.cached_rows import DEFAULT_CACHE_BYTES, CachedRows
from tolkit_formats.reader import Bundle, Where
from tolkit_formats.records import Tier

__all__ = ["DEFAULT_TABLE_BYTES", "DiskRows"]

# At the 1B shape 680 tokens in f16, 2,400 in nf4, 10,000 at 1 bit a value: one to seven texts of
# a context's length, and little beside what the rest of a process takes.
DEFAULT_TABLE_BYTES = DEFAULT_CACHE_BYTES
_HELD_BYTES = 8 << 20


class DiskRows:
    """A bundle on disk as the row source of a decoder.

    Anonymous memory is bounded by the cache, what the decoder expands (bases), the rows of one
    layer, and some 16 MiB to work in. A batch whose records are not all in the cache and take more
    than 8 MiB costs, after one read a token, a read of one plane a token and layer.

    Args:
        bundle: open bundle.
        device: where rows go.
        dtype: of the rows.
        max_table_bytes: ceiling of the record cache; None for 64 MiB.
        seed: fill half of it with the most frequent tokens' records now.

    Raises:
        UsageError: a ceiling too low for a cache of one record of each tier.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        max_table_bytes: int | None = None,
        seed: bool = True,
    ) -> None:
        self.bundle = bundle
        self._decoder = RecordDecoder(bundle, device or torch.device("cpu"), dtype)
        cache_bytes = DEFAULT_TABLE_BYTES if max_table_bytes is None else max_table_bytes
        self._cached = CachedRows(bundle, cache_bytes=cache_bytes, seed=seed)

    @property
    def statistics(self) -> TableStatistics:
        """What was asked and read so far."""
        return self._cached.statistics

    def fetch(self, ids_n: Tensor) -> Sequence[Tensor | None]:
        """Per layer [n, D] on the device, None where the layer has no table.

        Raises:
            UsageError: an id out of range.
            BundleError: a token without a record; a damaged, cut or changed file.
            ResourceError: the disk failed.
        """
        ids = ids_n.detach().cpu().numpy()
        stride = max(tier.stride for tier in self.bundle.manifest.tiers)
        coded = self.bundle.manifest.coding is not None
        # coded rows are held whatever they take: to decode them again for each layer costs more
        if coded or len(ids) * stride <= _HELD_BYTES:
            pieces = [self._held(*piece) for piece in self._cached.records(ids)]
        else:
            self._cached.load(ids)
            slots = self.bundle.slots_of(ids)
            pieces = [
                TierRecords(tier.index, self._index(where), self._reader(ids[where]))
                for tier, where in self.bundle.by_tier(slots)
            ]
        return decoded_planes(self._decoder, pieces, ids_n.to(self._decoder.device), self.bundle)

    def prefetch(self, ids_n: Tensor) -> None:
        """Start reading these ids' records into the cache, as many as it has room for."""
        self._cached.prefetch(ids_n.detach().cpu().numpy())

    def close(self) -> None:
        """Close files and end the reading thread."""
        self._cached.close()

    def _held(self, tier: Tier, where: Where, records_nS: npt.NDArray[np.uint8]) -> TierRecords:
        records = torch.from_numpy(records_nS).to(self._decoder.device)
        return TierRecords.held(tier, self._index(where), records)

    def _reader(self, ids: npt.NDArray[np.int64]) -> Callable[[int, slice], Tensor]:
        def plane(place: int, part: slice) -> Tensor:
            ((_, _, plane_nB),) = self._cached.plane(ids[part], place)
            return torch.from_numpy(plane_nB).to(self._decoder.device)

        return plane

    def _index(self, where: Where) -> Tensor | None:
        if isinstance(where, slice):
            return None
        return torch.from_numpy(where).to(self._decoder.device)
