"""How a row cache's memory is shared out over the tiers of a bundle."""

from __future__ import annotations

from dataclasses import dataclass

from tolkit_formats.errors import UsageError
from tolkit_formats.frames import Frames
from tolkit_formats.reader import Bundle
from tolkit_formats.record_files import RecordFiles
from tolkit_formats.records import Tier

__all__ = ["FramePlan", "least_cache_bytes", "plan_frames"]


@dataclass(frozen=True)
class FramePlan:
    """Frames of one tier, and how many of them stay with its first rows."""

    count: int
    kept: int


def least_cache_bytes(bundle: Bundle) -> int:
    """The smallest cache: its bookkeeping and one record of each tier."""
    tiers = bundle.manifest.tiers
    return _fixed_bytes(bundle) + sum(Frames.frame_bytes(tier.stride) for tier in tiers)


def plan_frames(bundle: Bundle, cache_bytes: int, *, seeded: bool) -> list[FramePlan]:
    """Frames of each tier within `cache_bytes`.

    A seeded cache gives half of the memory to the first slots, whatever tier they are in, and
    the other half to the tiers in proportion to their bytes; what a tier does not need goes to
    the next ones. One that is not seeded is all in proportion.

    Raises:
        UsageError: less than `least_cache_bytes`.
    """
    least = least_cache_bytes(bundle)
    if cache_bytes < least:
        raise UsageError(
            f"table memory: {cache_bytes:,} bytes hold no record of {bundle.path}, expected at "
            f"least {least:,}"
        )
    tiers = bundle.manifest.tiers
    counts = [1] * len(tiers)
    left = cache_bytes - least
    if seeded:
        left = left - left // 2 + _fill(tiers, counts, left // 2)
    kept = [count - 1 if seeded else 0 for count in counts]
    table_bytes = sum(_frame_bytes(tier) * tier.num_rows for tier in tiers)
    shares = [left * _frame_bytes(tier) * tier.num_rows // table_bytes for tier in tiers]
    left -= sum(shares)
    for i, share in enumerate(shares):
        more = min(share // _frame_bytes(tiers[i]), tiers[i].num_rows - counts[i])
        counts[i] += more
        left += share - more * _frame_bytes(tiers[i])
    _fill(tiers, counts, left)
    return [
        FramePlan(count, count if seeded and count == tier.num_rows else keep)
        for tier, count, keep in zip(tiers, counts, kept, strict=True)
    ]


def _fill(tiers: tuple[Tier, ...], counts: list[int], left: int) -> int:
    """Spend `left` bytes on frames of the first tiers first (`counts` mutated); what remains."""
    for i, tier in enumerate(tiers):
        more = min(left // _frame_bytes(tier), tier.num_rows - counts[i])
        counts[i] += more
        left -= more * _frame_bytes(tier)
    return left


def _frame_bytes(tier: Tier) -> int:
    return Frames.frame_bytes(tier.stride)


def _fixed_bytes(bundle: Bundle) -> int:
    fixed = sum(Frames.fixed_bytes(tier.num_rows) for tier in bundle.manifest.tiers)
    return fixed + RecordFiles.memory_bytes(bundle)
