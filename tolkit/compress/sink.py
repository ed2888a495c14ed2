"""Where encoded records go: shards of a bundle, or a tally of the bytes they would take.

N rows, S bytes of a record before coding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tolkit_formats.rans import RowCoder
from tolkit_formats.records import CRC_BYTES, Tier

__all__ = ["RecordSink", "ShardSink", "Tallied", "Tally"]


class ShardSink(Protocol):
    """One shard, filled block by block; a context manager."""

    def write(self, records_NS: npt.NDArray[np.uint8]) -> None:
        """Append records."""

    def remember(self, note: Any) -> None:
        """Keep a JSON value with the shard."""

    def __enter__(self) -> ShardSink:
        """Itself."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        """Finish it, or leave it."""


class RecordSink(Protocol):
    """All shards; `BundleWriter` is one."""

    def shard_done(self, tier: Tier, shard: int) -> bool:
        """Whether it need not be encoded again."""

    def shard_note(self, tier: Tier, shard: int) -> Any:
        """What was remembered with a finished shard."""

    def open_shard(self, tier: Tier, shard: int, coder: RowCoder | None = None) -> ShardSink:
        """Start a shard; `coder` for records that are coded."""


@dataclass
class Tallied:
    """Of one shard: bytes of its records, checksums included, and what was remembered."""

    record_bytes: int = 0
    note: Any = None


class Tally:
    """Counts and keeps nothing; coded records are really coded."""

    def __init__(self) -> None:
        self._shards: dict[tuple[int, int], Tallied] = {}

    @property
    def shards(self) -> Mapping[tuple[int, int], Tallied]:
        """By index of the tier and number of the shard."""
        return self._shards

    def shard_done(self, tier: Tier, shard: int) -> bool:
        """Never."""
        return False

    def shard_note(self, tier: Tier, shard: int) -> Any:
        """What was remembered with the shard."""
        return self._shards[tier.index, shard].note

    def open_shard(self, tier: Tier, shard: int, coder: RowCoder | None = None) -> ShardSink:
        """As of `RecordSink`."""
        tallied = self._shards[tier.index, shard] = Tallied()
        return _TallyShard(tallied, coder)


class _TallyShard:
    def __init__(self, tallied: Tallied, coder: RowCoder | None) -> None:
        self._tallied, self._coder = tallied, coder

    def write(self, records_NS: npt.NDArray[np.uint8]) -> None:
        if self._coder is None:
            self._tallied.record_bytes += records_NS.size
            return
        lengths_N, _ = self._coder.encode(records_NS)
        self._tallied.record_bytes += int(lengths_N.sum()) + CRC_BYTES * len(lengths_N)

    def remember(self, note: Any) -> None:
        self._tallied.note = note

    def __enter__(self) -> ShardSink:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        pass
