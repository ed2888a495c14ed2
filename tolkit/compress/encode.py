"""The row pass: every block of rows through all planes, bases fixed, records written as they come.

N rows of a block, D hidden, S record stride.

Error feedback over depth (LAB finding 1): the target of a plane is its table plus the carry, what
earlier planes of the same rows lost, so the running sum X + T_0 + T_1 + ... stays right. The
carry belongs to a row, which is why this pass streams.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tolkit.compress.bands import unit_rows
from tolkit.compress.codecs import encoder_for
from tolkit.compress.plan import EncodePlan, PlanePlan
from tolkit.errors import NonFiniteError
from tolkit.parallel import BlockPool
from tolkit.progress import Progress, Task
from tolkit.sources import PlaneReader, TableSource
from tolkit_formats.limits import BLOCK_ROWS
from tolkit_formats.rans import RowCoder
from tolkit_formats.records import Tier
from tolkit_formats.writer import BundleWriter, CodedShardWriter, ShardWriter

__all__ = [
    "WORK_ROWS",
    "PlaneError",
    "Shared",
    "block_target",
    "encode_block",
    "encode_rows",
    "row_blocks",
]

WORK_ROWS = BLOCK_ROWS // 2
"""Rows one thread works on at a time: half a block, so that two threads hold one block of records.

Matrix products may round differently for another number of rows, so this is part of what decides
bits and never a function of the thread count.
"""

_HELD_BYTES = 64 << 20

Shared = Mapping[int, Mapping[str, Tensor]]
"""layer -> the plane's shared arrays (bases, float16)."""


@dataclass
class PlaneError:
    """Sums of squares over all values of one plane.

    Attributes:
        own: of the table the plane stands for.
        lost: of what a reader decodes minus that table.
        carry: of the running sum's error after this plane.
    """

    own: float = 0.0
    lost: float = 0.0
    carry: float = 0.0

    def add(self, other: PlaneError) -> None:
        """Count another block in."""
        self.own += other.own
        self.lost += other.lost
        self.carry += other.carry

    @property
    def relative_error(self) -> float:
        """||decoded - table|| / ||table|| of this plane alone."""
        return (self.lost / self.own) ** 0.5 if self.own else 0.0

    @property
    def running_sum_error(self) -> float:
        """||decoded sum - table sum|| up to this plane, relative to this plane's ||table||."""
        return (self.carry / self.own) ** 0.5 if self.own else 0.0


@dataclass
class _Block:
    first: int
    stop: int
    records_NS: npt.NDArray[np.uint8]
    carry_ND: Tensor | None = None
    unit_ND: Tensor | None = None


def encode_rows(
    source: TableSource,
    plan: EncodePlan,
    shared: Shared,
    writer: BundleWriter,
    pool: BlockPool,
    progress: Progress,
    coders: Sequence[RowCoder] = (),
) -> dict[int, PlaneError]:
    """Encode and write all rows; shards an earlier run finished are kept.

    Memory: WORK_ROWS records a thread (more while they are small, see _blocks_at_once), one
    layer's reader, the temporaries of a block a thread.

    Args:
        coders: of each tier, where records are coded.

    Returns:
        errors by layer, over the rows encoded in this run.
    """
    errors = {p.layer: PlaneError() for p in plan.planes}
    num_rows = sum(tier.num_rows for tier in plan.tiers)
    with progress.task("encode", num_rows * len(plan.planes), "rows") as task:
        for tier in plan.tiers:
            for shard in range(tier.num_shards):
                if writer.shard_done(tier, shard):
                    task.advance(tier.shard_rows(shard) * len(plan.planes))
                    continue
                coder = coders[tier.index] if tier.coded else None
                with writer.open_shard(tier, shard, coder) as out:
                    _encode_shard(source, plan, tier, shard, shared, out, pool, errors, task)
    return errors


def _encode_shard(
    source: TableSource,
    plan: EncodePlan,
    tier: Tier,
    shard: int,
    shared: Shared,
    out: ShardWriter | CodedShardWriter,
    pool: BlockPool,
    errors: dict[int, PlaneError],
    task: Task,
) -> None:
    start = tier.first_slot + shard * tier.rows_per_shard
    stop = start + tier.shard_rows(shard)
    predicts = any(not p.copy and p.layer in plan.predictors for p in plan.planes)
    for group in row_blocks(start, stop, _blocks_at_once(tier, source, pool.threads)):
        blocks = [
            _Block(first, end, np.zeros((end - first, tier.stride), np.uint8))
            for first, end in group
        ]
        if predicts:
            for block in blocks:
                block.unit_ND = unit_rows(source.embedded(block.first, block.stop))
        for plane in plan.planes:
            task.note(f"layer {plane.layer}")
            _encode_plane(source, plan, tier, plane, blocks, shared, pool, errors)
            task.advance(group[-1][1] - group[0][0])
        for block in blocks:
            out.write(block.records_NS)


def _blocks_at_once(tier: Tier, source: TableSource, threads: int) -> int:
    """Blocks that take turns at each layer: a multiple of `threads`, so that reading a layer (its
    weights widened to float32) serves as many rows as _HELD_BYTES of records and carries allow."""
    block_bytes = WORK_ROWS * (tier.stride + 4 * source.hidden_size)
    return threads * max(1, _HELD_BYTES // (threads * block_bytes))


def row_blocks(start: int, stop: int, threads: int) -> Iterator[list[tuple[int, int]]]:
    """Runs of WORK_ROWS slots of start..stop, as many at a time as there are threads."""
    firsts = range(start, stop, WORK_ROWS)
    for i in range(0, len(firsts), threads):
        yield [(first, min(first + WORK_ROWS, stop)) for first in firsts[i : i + threads]]


def _encode_plane(
    source: TableSource,
    plan: EncodePlan,
    tier: Tier,
    plane: PlanePlan,
    blocks: list[_Block],
    shared: Shared,
    pool: BlockPool,
    errors: dict[int, PlaneError],
) -> None:
    (place,) = [p for p in tier.planes if p.layer == plane.layer]
    where = slice(place.offset, place.offset + place.length)
    if plane.copy:
        for block in blocks:
            stored = source.stored_plane(plane.layer, block.first, block.stop)
            block.records_NS[:, where] = stored
        return
    targets = block_target(source, plane, [(b.first, b.stop) for b in blocks], pool)

    arrays = shared[plane.layer]

    def encode(item: tuple[_Block, Tensor]) -> PlaneError:
        block, own_ND = item
        plane_NB, carried_ND, error = encode_block(
            source,
            plane,
            own_ND,
            block.carry_ND,
            arrays,
            feedback=plan.feedback,
            first_slot=block.first,
            tier=tier.index,
            unit_ND=block.unit_ND,
        )
        block.records_NS[:, where] = plane_NB.numpy()
        block.carry_ND = carried_ND
        return error

    for error in pool.map(encode, zip(blocks, targets, strict=True)):
        errors[plane.layer].add(error)


def block_target(
    source: TableSource, plane: PlanePlan, spans: list[tuple[int, int]], pool: BlockPool
) -> list[Tensor]:
    """For each span of slots the table `plane` stands for: the sum of its members, [N, D]."""
    sums: list[Tensor] = []
    for member in plane.members:
        reader: PlaneReader = source.plane(member)
        rows = pool.map(lambda span, read=reader: read(*span), spans)  # type: ignore[misc]
        sums = rows if not sums else [a.add_(b) for a, b in zip(sums, rows, strict=True)]
    return sums


def encode_block(
    source: TableSource,
    plane: PlanePlan,
    own_ND: Tensor,
    carry_ND: Tensor | None,
    shared: Mapping[str, Tensor],
    *,
    feedback: bool,
    first_slot: int,
    tier: int = 0,
    unit_ND: Tensor | None = None,
) -> tuple[Tensor, Tensor, PlaneError]:
    """Encode one block of a plane: table plus carry under feedback, the table alone without.

    Args:
        own_ND: the table's rows, float32 [N, D].
        carry_ND: error of the running sum before this plane, tables minus decoded; None is zero.
        tier: whose codec.
        unit_ND: unit embeddings of the rows, for planes with a predictor.

    Returns:
        the plane's bytes U8 [N, B], the carry after it float32 [N, D], and the sums of squares.

    Raises:
        NonFiniteError: names layer and token.
    """
    summed_ND = own_ND if carry_ND is None else own_ND + carry_ND
    target_ND = summed_ND if feedback else own_ND
    predicted_ND = None
    if "predictor" in shared:
        assert unit_ND is not None
        predicted_ND = unit_ND @ shared["predictor"].T
        target_ND = target_ND - predicted_ND
    try:
        plane_NB, decoded_ND = encoder_for(plane.codecs[tier]).encode(target_ND, shared)
        if predicted_ND is not None:
            decoded_ND += predicted_ND
    except NonFiniteError as error:
        token = "" if error.row is None else f", token {source.token_at(first_slot + error.row)}"
        raise NonFiniteError(
            f"{source.path}: layer {plane.layer}{token}: {error.message}",
            hint="check the weights, or store wider: --dtype f32 or bf16",
        ) from error
    lost = _squares(decoded_ND - own_ND)
    carried_ND = torch.sub(summed_ND, decoded_ND, out=decoded_ND)
    return plane_NB, carried_ND, PlaneError(_squares(own_ND), lost, _squares(carried_ND))


def _squares(values_ND: Tensor) -> float:
    flat = values_ND.reshape(-1)
    return float(torch.dot(flat, flat))
