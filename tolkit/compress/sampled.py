"""Encoding some rows of a plan, or all of them, to see what they take and lose; nothing is written.

N rows of a block, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from torch import Tensor

from tolkit.compress.encode import WORK_ROWS, Shared, encode_rows
from tolkit.compress.fill.bands import picked, sampled_slots
from tolkit.compress.plan import EncodePlan
from tolkit.compress.running import sums_from_json
from tolkit.compress.sink import Tally
from tolkit.parallel import BlockPool
from tolkit.progress import Progress
from tolkit.sources import PlaneReader, RowSource
from tolkit_formats.layer_errors import ErrorSums
from tolkit_formats.rans import RowCoder
from tolkit_formats.records import Tier
from tolkit_formats.sizes import coded_file_bytes, coded_shard_bytes

__all__ = ["Encoded", "encode_sample"]


@dataclass(frozen=True)
class Encoded:
    """What was seen.

    Attributes:
        errors: of each of the L layers, over all rows: the sum of what was encoded, each tier's
            in proportion.
        rows: that were encoded.
        record_bytes: of all rows, checksums included; lengths of coded records are not.
        shard_bytes: of the files of coded tiers, by name.
    """

    errors: tuple[ErrorSums, ...]
    rows: int
    record_bytes: int
    shard_bytes: Mapping[str, int]


def encode_sample(
    source: RowSource,
    plan: EncodePlan,
    shared: Shared,
    pool: BlockPool,
    progress: Progress,
    coders: Sequence[RowCoder] = (),
    *,
    blocks: int | None,
    fitted: bool = False,
) -> Encoded:
    """Encode evenly spaced blocks of each tier as `encode_rows` would, count bytes and errors.

    Args:
        coders: of each tier, where records are coded.
        blocks: about how many in all, one at least of each tier; None takes all rows, and bytes
            and errors are then exactly those of `encode_rows`.
        fitted: only of the rows that a fit to a sample looks at.
    """
    rows: RowSource = source
    tiers = plan.tiers
    if blocks is not None:
        total = sum(tier.num_rows for tier in tiers)
        ranges = [(tier.first_slot, tier.first_slot + tier.num_rows) for tier in tiers]
        slots = sampled_slots(ranges) if fitted else [np.arange(*whole) for whole in ranges]
        slots = [
            _blocks(some, max(1, round(blocks * t.num_rows / total)))
            for some, t in zip(slots, tiers, strict=True)
        ]
        rows = _Sampled(source, np.concatenate(slots))
        tiers = _shortened(tiers, [len(some) for some in slots])
    tally = Tally()
    encode_rows(rows, replace(plan, tiers=tiers), shared, tally, pool, progress, coders)
    return _extended(plan, tiers, tally)


def _blocks(slots: npt.NDArray[np.int64], wanted: int) -> npt.NDArray[np.int64]:
    """Of slots of a tier: blocks as compression cuts them, evenly spaced."""
    firsts = np.arange(0, len(slots), WORK_ROWS)
    places = np.unique(np.linspace(0, len(firsts) - 1, wanted).round().astype(int))
    return np.concatenate([slots[first : first + WORK_ROWS] for first in firsts[places]])


def _shortened(tiers: Sequence[Tier], rows: Sequence[int]) -> tuple[Tier, ...]:
    """The same layouts for so many rows each."""
    found = []
    first = 0
    for tier, count in zip(tiers, rows, strict=True):
        found.append(replace(tier, first_slot=first, num_rows=count))
        first += count
    return tuple(found)


def _extended(plan: EncodePlan, tiers: Sequence[Tier], tally: Tally) -> Encoded:
    """From the encoded rows to all."""
    errors = tuple(ErrorSums() for _ in plan.statuses)
    shard_bytes: dict[str, int] = {}
    record_bytes = 0
    for whole, some in zip(plan.tiers, tiers, strict=True):
        share = whole.num_rows / some.num_rows
        seen = [tally.shards[some.index, shard] for shard in range(some.num_shards)]
        found = sum(tallied.record_bytes for tallied in seen)
        record_bytes += round(share * found)
        for tallied in seen:
            for total, part in zip(errors, sums_from_json(tallied.note), strict=True):
                total.add(ErrorSums(*(share * value for value in vars(part).values())))
        if not whole.coded:
            continue
        if share > 1:
            shard_bytes |= coded_shard_bytes(whole, found / some.num_rows)
            continue
        for shard, tallied in enumerate(seen):
            size = coded_file_bytes(whole, shard, tallied.record_bytes)
            shard_bytes[whole.shard_name(shard)] = size
    rows = sum(tier.num_rows for tier in tiers)
    return Encoded(errors, rows, record_bytes, shard_bytes)


class _Sampled:
    """Some slots of a source, one after the other."""

    def __init__(self, source: RowSource, slots: npt.NDArray[np.int64]) -> None:
        self._source, self._slots = source, slots
        self.path = source.path
        self.num_layers = source.num_layers
        self.hidden_size = source.hidden_size
        self.statuses = source.statuses

    def plane(self, layer: int) -> PlaneReader:
        return picked(self._source.plane(layer), self._slots)

    def embedded(self, first_slot: int, stop_slot: int) -> Tensor:
        return picked(self._source.embedded, self._slots)(first_slot, stop_slot)

    def token_at(self, slot: int) -> int:
        return self._source.token_at(int(self._slots[slot]))

    def stored_plane(self, layer: int, first_slot: int, stop_slot: int) -> npt.NDArray[np.uint8]:
        raise AssertionError("copied planes need no look")
