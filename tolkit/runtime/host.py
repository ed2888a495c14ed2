"""All records of a bundle in the host's memory, compressed.

n ids asked for, V vocabulary, S record stride.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from tolkit.decode.record_decoder import RecordDecoder
from tolkit.errors import ResourceError
from tolkit.runtime.planes import TierRecords, decoded_planes
from tolkit.runtime.statistics import TableStatistics
from tolkit_formats.reader import Bundle
from tolkit_formats.record_files import RecordFiles
from tolkit_formats.records import Tier

__all__ = ["HostRows", "require_room", "resident_bytes"]

_CHUNK_BYTES = 4 << 20
_HELD_BYTES = 4 << 20


def resident_bytes(bundle: Bundle) -> int:
    """Memory that all records take, entropy-coded ones as the symbols they decode to."""
    return sum(tier.num_rows * tier.stride for tier in bundle.manifest.tiers)


def require_room(bundle: Bundle, where: str, max_table_bytes: int | None) -> None:
    """ResourceError when all records take more than the ceiling."""
    needed = resident_bytes(bundle)
    if max_table_bytes is not None and needed > max_table_bytes:
        raise ResourceError(
            f"table memory: the tables of {bundle.path} take {needed:,} bytes on the {where}, "
            f"the ceiling is {max_table_bytes:,}",
            hint="serve them from disk (--tables disk), or raise the ceiling",
        )


class HostRows:
    """A bundle in host memory as the row source of a decoder.

    Where rows go to a GPU, the memory is pinned and records are copied on a stream of their own,
    so that the copy runs beside whatever the device is doing.

    Args:
        bundle: open bundle; every record is read and checked here.
        device: where rows go.
        dtype: of the rows.
        max_table_bytes: refuse tables that take more; None takes what there is.

    Raises:
        ResourceError: the tables do not fit.
        BundleError: a damaged record.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        max_table_bytes: int | None = None,
    ) -> None:
        require_room(bundle, "host", max_table_bytes)
        self.bundle = bundle
        self._device = device or torch.device("cpu")
        self._decoder = RecordDecoder(bundle, self._device, dtype)
        self._on_gpu = self._device.type == "cuda"
        self._stream: torch.cuda.Stream | None = None
        if self._on_gpu:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._ahead: tuple[Tensor, list[TierRecords]] | None = None
        self._statistics = TableStatistics()
        files = RecordFiles(bundle)
        try:
            self._records = [self._load(files, tier) for tier in bundle.manifest.tiers]
        finally:
            files.close()

    @property
    def statistics(self) -> TableStatistics:
        """What was asked; the records read when it was opened count as prefetched."""
        return self._statistics

    def fetch(self, ids_n: Tensor) -> Sequence[Tensor | None]:
        """Per layer [n, D] on the device, None where the layer has no table.

        Raises:
            UsageError: an id out of range.
            BundleError: a token without a record.
        """
        ids_cpu = ids_n.detach().cpu()
        ahead, self._ahead = self._ahead, None
        if ahead is not None and torch.equal(ahead[0], ids_cpu):
            pieces = ahead[1]
        else:
            pieces = self._gathered(ids_cpu)
        distinct = len(torch.unique(ids_cpu))
        self._statistics = self._statistics.plus(
            rows_asked=len(ids_cpu), rows_distinct=distinct, cache_hits=distinct
        )
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for piece in pieces:
                if piece.records is not None:
                    piece.records.record_stream(current)
        return decoded_planes(self._decoder, pieces, ids_n.to(self._device), self.bundle)

    def prefetch(self, ids_n: Tensor) -> None:
        """Start copying these ids' records to a GPU, for a `fetch` of the same; else nothing."""
        if self._on_gpu:
            ids_cpu = ids_n.detach().cpu()
            self._ahead = ids_cpu, self._gathered(ids_cpu)

    def close(self) -> None:
        """Let go of the memory."""
        self._records, self._ahead = [], None

    def _gathered(self, ids_cpu: Tensor) -> list[TierRecords]:
        """Records of the ids on the device; on a GPU they are on their way there."""
        slots = self.bundle.slots_of(ids_cpu.numpy())
        pieces = []
        for tier, where in self.bundle.by_tier(slots):
            rows = torch.from_numpy(slots[where] - tier.first_slot)
            stored_VS = self._records[tier.index]
            index = None if isinstance(where, slice) else torch.from_numpy(where).to(self._device)
            if not self._on_gpu and len(rows) * tier.stride > _HELD_BYTES:
                pieces.append(TierRecords(tier.index, index, _plane_reader(tier, stored_VS, rows)))
                continue
            records = torch.empty(
                (len(rows), tier.stride), dtype=torch.uint8, pin_memory=self._on_gpu
            )
            torch.index_select(stored_VS, 0, rows, out=records)
            if self._stream is not None:
                with torch.cuda.stream(self._stream):
                    records = records.to(self._device, non_blocking=True)
            pieces.append(TierRecords.held(tier, index, records))
        return pieces

    def _load(self, files: RecordFiles, tier: Tier) -> Tensor:
        try:
            stored_VS = torch.empty(
                (tier.num_rows, tier.stride), dtype=torch.uint8, pin_memory=self._on_gpu
            )
        except RuntimeError as error:
            raise ResourceError(
                f"table memory: {resident_bytes(self.bundle):,} bytes of host memory are needed "
                f"for {self.bundle.path}, and could not be had",
                hint="serve the tables from disk (--tables disk)",
            ) from error
        into_VS = stored_VS.numpy()
        size_bytes = 0
        step = max(1, _CHUNK_BYTES // max(1, tier.stride))
        for first in range(0, tier.num_rows, step):
            rows = np.arange(first, min(first + step, tier.num_rows))
            size_bytes += files.read(tier, rows, into_VS[first : first + len(rows)])
        self._statistics = self._statistics.plus(
            rows_read=tier.num_rows,
            prefetched_rows=tier.num_rows,
            bytes_read=size_bytes,
            resident_bytes=into_VS.nbytes,
        )
        return stored_VS


def _plane_reader(tier: Tier, stored_VS: Tensor, rows: Tensor) -> Callable[[int, slice], Tensor]:
    """Gathers one plane when it is asked for: of a large batch no records are held twice."""
    stored, own = stored_VS.numpy(), rows.numpy()

    def plane(place: int, part: slice) -> Tensor:
        start = tier.planes[place].offset
        return torch.from_numpy(stored[own[part], start : start + tier.planes[place].length])

    return plane
