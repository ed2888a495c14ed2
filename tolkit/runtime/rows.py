"""Table rows of a bundle while a model runs: one interface, three places they may lie.

``disk``: records are read when needed, through a cache of bounded memory. ``host``: all records,
compressed, in the host's memory, pinned where rows go to a GPU. ``device``: all records,
compressed, where the model is. Rows are decoded on the model's device in each case.

n ids asked for, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from tolkit.errors import ResourceError, UsageError
from tolkit.runtime.device import DeviceRows
from tolkit.runtime.disk import DiskRows
from tolkit.runtime.host import HostRows
from tolkit.runtime.recompute import RecomputeRows
from tolkit.runtime.statistics import TableStatistics
from tolkit_formats.reader import Bundle

__all__ = ["TABLE_PLACES", "TableRows", "open_table_rows"]

TABLE_PLACES = ("disk", "host", "device")


class TableRows(Protocol):
    """A `tolkit.model.RowSource` that can read ahead and says what it has cost."""

    def fetch(self, ids_n: Tensor) -> Sequence[Tensor | None]:
        """Rows of `ids_n` (int64 [n], best distinct): per layer [n, D], None without a table."""

    def prefetch(self, ids_n: Tensor) -> None:
        """Start getting the rows of these ids; returns at once."""

    @property
    def statistics(self) -> TableStatistics:
        """What was asked and read so far."""

    def close(self) -> None:
        """Let go of files, threads and memory."""


def open_table_rows(
    bundle: Bundle,
    tables: str = "disk",
    *,
    device: torch.device = torch.device("cpu"),  # noqa: B008  # immutable
    dtype: torch.dtype = torch.float32,
    max_table_bytes: int | None = None,
) -> TableRows:
    """The rows of a bundle's tables; of partial tables, those of cold tokens computed.

    Args:
        bundle: open bundle.
        tables: ``disk``, ``host`` or ``device``.
        device: where rows are wanted.
        dtype: of the rows; they are computed in float32.
        max_table_bytes: ceiling for what is kept of the tables in memory, compressed. For disk
            the row cache, by default `tolkit.runtime.disk.DEFAULT_TABLE_BYTES`; for host and
            device all records, by default without one.

    Raises:
        UsageError: another word for `tables`; a ceiling too low for a cache of one record.
        ResourceError: the tables do not fit; no such device.
        BundleError: a damaged bundle.
    """
    if tables not in TABLE_PLACES:
        raise UsageError(f"tables: expected one of {', '.join(TABLE_PLACES)}, got {tables!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ResourceError(
            "device: cuda was asked for, this machine or this torch has none",
            hint="leave the device out, or give cpu",
        )
    kinds: dict[str, Callable[..., TableRows]] = {"disk": DiskRows, "host": HostRows}
    kind = kinds.get(tables, DeviceRows)
    stored = kind(bundle, device=device, dtype=dtype, max_table_bytes=max_table_bytes)
    if bundle.manifest.partial is None:
        return stored
    return RecomputeRows(stored, bundle, device=device, dtype=dtype)
