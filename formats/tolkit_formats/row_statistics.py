"""What looking up rows has cost so far."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

__all__ = ["TableStatistics"]

_LEVELS = frozenset({"cache_bytes", "resident_bytes"})


@dataclass(frozen=True)
class TableStatistics:
    """Counts since a source of rows was opened.

    Attributes:
        rows_asked: token ids given, repeats counted.
        rows_distinct: the same without the repeats within a call.
        rows_read: records read from disk, those of the seed and of prefetching among them.
        bytes_read: bytes of those reads.
        cache_hits: distinct ids whose record was in memory when it was needed, or on its way
            there because `prefetch` had been told.
        prefetched_rows: records read ahead: the seed, and what `prefetch` was told.
        cache_bytes: memory the row cache may take, all its bookkeeping counted; 0 without one.
        resident_bytes: table bytes held in memory now, compressed.
    """

    rows_asked: int = 0
    rows_distinct: int = 0
    rows_read: int = 0
    bytes_read: int = 0
    cache_hits: int = 0
    prefetched_rows: int = 0
    cache_bytes: int = 0
    resident_bytes: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the distinct ids found in memory, 0 before anything was asked."""
        return self.cache_hits / self.rows_distinct if self.rows_distinct else 0.0

    def plus(self, **counts: int) -> TableStatistics:
        """These with `counts` added."""
        return replace(self, **{name: getattr(self, name) + n for name, n in counts.items()})

    def since(self, earlier: TableStatistics) -> TableStatistics:
        """What was counted after `earlier`; memory as it is now."""
        names = [field.name for field in fields(self) if field.name not in _LEVELS]
        return self.plus(**{name: -getattr(earlier, name) for name in names})
