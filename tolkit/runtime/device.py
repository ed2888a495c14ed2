"""All records of a bundle on the model's device, compressed.

n ids asked for, K kept layers, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tolkit.runtime.device_tables import DeviceTables
from tolkit.runtime.host import require_room, resident_bytes
from tolkit.runtime.planes import TierRecords, decoded_planes, spread_planes
from tolkit.runtime.statistics import TableStatistics
from tolkit_formats.reader import Bundle

__all__ = ["DeviceRows"]


class DeviceRows:
    """`DeviceTables` as the row source of a decoder.

    On a GPU nothing here waits for the device, so ids are not looked at: one without a record, or
    out of range, gives NaN. Without kernels, on the CPU, a large batch is decoded layer by layer.

    Args:
        bundle: open bundle; every record is read and checked here.
        device: where records lie and rows go.
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
        require_room(bundle, "device", max_table_bytes)
        self.bundle = bundle
        self.tables = DeviceTables(bundle, device or torch.device("cpu"), dtype)
        self._statistics = TableStatistics(
            rows_read=bundle.manifest.num_rows,
            prefetched_rows=bundle.manifest.num_rows,
            bytes_read=resident_bytes(bundle),
            resident_bytes=self.tables.resident_bytes,
        )

    @property
    def statistics(self) -> TableStatistics:
        """What was asked; ids are taken to be distinct, as finding out would wait for a GPU."""
        return self._statistics

    def fetch(self, ids_n: Tensor) -> Sequence[Tensor | None]:
        """Per layer [n, D] on the device, None where the layer has no table.

        Raises:
            UsageError: an id out of range, BundleError: one without a record; on a CPU only.
        """
        count = len(ids_n)
        self._statistics = self._statistics.plus(
            rows_asked=count, rows_distinct=count, cache_hits=count
        )
        ids_n = ids_n.to(self.tables.device)
        if self.tables.fused or self.tables.device.type != "cpu":
            return spread_planes(
                self.tables.rows(ids_n), self.tables.layer_ids, self.bundle.num_layers
            )
        pieces = [TierRecords.held(*piece) for piece in self.tables.records(ids_n)]
        return decoded_planes(self.tables.decoder, pieces, ids_n, self.bundle)

    def prefetch(self, ids_n: Tensor) -> None:
        """Nothing: everything is there."""

    def close(self) -> None:
        """Nothing: memory goes with the object."""
