"""Writing one record shard, of fixed stride or entropy-coded; `BundleWriter.open_shard` makes them.

Letters: N rows, S record stride, C symbols of a record.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from tolkit_formats import files
from tolkit_formats.coded_shards import coded_tensors
from tolkit_formats.rans import RowCoder
from tolkit_formats.records import Tier, seal_records
from tolkit_formats.tensorfile import TensorStream, write_tensors

__all__ = ["CodedShardWriter", "ShardWriter"]

Finished = Callable[[Any], None]


class ShardWriter:
    """One shard file, written block by block; a context manager.

    Args:
        path: of the shard file.
        tier: whose it is.
        shard: its number, from 0.
        finished: called with the note once the file is durable.
    """

    def __init__(self, path: Path, tier: Tier, shard: int, finished: Finished) -> None:
        self._path, self._tier, self._finished = path, tier, finished
        self._temporary = path.with_name(f".{path.name}.tmp")
        self._next_slot = tier.first_slot + shard * tier.rows_per_shard
        shape = (tier.shard_rows(shard), tier.stride)
        self._stream = TensorStream(self._temporary, [("records", "U8", shape)])
        self._note: Any = None

    def remember(self, note: Any) -> None:
        """Keep a JSON value with the shard once it is finished, across a crash."""
        self._note = note

    def write(self, records_NS: npt.NDArray[np.uint8]) -> None:
        """Append records: planes in place, zeros behind them. Their CRC is filled in here."""
        assert records_NS.shape[1] == self._tier.stride, records_NS.shape
        seal_records(records_NS, self._next_slot)
        self._next_slot += len(records_NS)
        self._stream.write(records_NS)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._stream.__exit__(kind, value, tb)
        if kind is not None:
            return
        files.replace(self._temporary, self._path)
        files.fsync_dir(self._path.parent)
        self._finished(self._note)


class CodedShardWriter:
    """One shard of entropy-coded records; a context manager.

    Records are held in memory until the end: only then their lengths, which come first, are known.

    Args:
        coder: of the tier's rows; the others as of `ShardWriter`.
    """

    def __init__(
        self, path: Path, tier: Tier, shard: int, coder: RowCoder, finished: Finished
    ) -> None:
        self._path, self._tier, self._shard, self._coder = path, tier, shard, coder
        self._finished = finished
        self._bodies: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]] = []
        self._note: Any = None

    def write(self, symbols_NC: npt.NDArray[np.uint8]) -> None:
        """Append rows of symbols: planes in place, a byte each."""
        self._bodies.append(self._coder.encode(symbols_NC))

    def remember(self, note: Any) -> None:
        """As `ShardWriter.remember`."""
        self._note = note

    def __enter__(self) -> CodedShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if kind is not None:
            return
        tier, shard = self._tier, self._shard
        assert sum(len(lengths) for lengths, _ in self._bodies) == tier.shard_rows(shard)
        first_slot = tier.first_slot + shard * tier.rows_per_shard
        write_tensors(self._path, coded_tensors(self._bodies, first_slot, tier.stride))
        self._finished(self._note)
