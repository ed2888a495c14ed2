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

from tolkit.compress.codecs import encoder_for
from tolkit.compress.plan import EncodePlan, PlanePlan
from tolkit.compress.running import RunningSum, squares, sums_from_json, sums_to_json
from tolkit.compress.sink import RecordSink, ShardSink
from tolkit.decode.record_decoder import unit_rows
from tolkit.errors import NonFiniteError
from tolkit.parallel import BlockPool
from tolkit.progress import Progress, Task
from tolkit.sources import PlaneReader, RowSource
from tolkit_formats.layer_errors import ErrorSums
from tolkit_formats.limits import BLOCK_ROWS
from tolkit_formats.rans import RowCoder
from tolkit_formats.records import Tier

__all__ = [
    "HELD_BYTES",
    "WORK_ROWS",
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

HELD_BYTES = 64 << 20

Shared = Mapping[int, Mapping[str, Tensor]]
"""layer -> the plane's shared arrays (bases, float16)."""


@dataclass
class _Block:
    first: int
    stop: int
    records_NS: npt.NDArray[np.uint8]
    running: RunningSum
    carry_ND: Tensor | None = None
    unit_ND: Tensor | None = None


def encode_rows(
    source: RowSource,
    plan: EncodePlan,
    shared: Shared,
    writer: RecordSink,
    pool: BlockPool,
    progress: Progress,
    coders: Sequence[RowCoder] = (),
) -> list[ErrorSums]:
    """Encode and write all rows; shards an earlier run finished are kept.

    Memory: WORK_ROWS records a thread (more while they are small, see _blocks_at_once), one
    layer's reader, the temporaries of a block a thread.

    Args:
        coders: of each tier, where records are coded.

    Returns:
        what each of the L layers lost, over all rows; summed block by block and shard by shard
        in order, so the same to the last bit at any number of threads and after a resumed run.
    """
    errors = [ErrorSums() for _ in plan.statuses]
    num_rows = sum(tier.num_rows for tier in plan.tiers)
    with progress.task("encode", num_rows * len(plan.planes), "rows") as task:
        for tier in plan.tiers:
            for shard in range(tier.num_shards):
                if writer.shard_done(tier, shard):
                    found = sums_from_json(writer.shard_note(tier, shard))
                    task.advance(tier.shard_rows(shard) * len(plan.planes))
                else:
                    coder = coders[tier.index] if tier.coded else None
                    with writer.open_shard(tier, shard, coder) as out:
                        found = _encode_shard(source, plan, tier, shard, shared, out, pool, task)
                        out.remember(sums_to_json(found))
                for total, part in zip(errors, found, strict=True):
                    total.add(part)
    return errors


def _encode_shard(
    source: RowSource,
    plan: EncodePlan,
    tier: Tier,
    shard: int,
    shared: Shared,
    out: ShardSink,
    pool: BlockPool,
    task: Task,
) -> list[ErrorSums]:
    errors = [ErrorSums() for _ in plan.statuses]
    planes = {p.layer: p for p in plan.planes}
    start = tier.first_slot + shard * tier.rows_per_shard
    stop = start + tier.shard_rows(shard)
    predicts = any(not p.copy and p.layer in plan.predictors for p in plan.planes)
    for group in row_blocks(start, stop, _blocks_at_once(tier, source, plan, pool.threads)):
        blocks = [
            _Block(first, end, np.zeros((end - first, tier.stride), np.uint8), RunningSum())
            for first, end in group
        ]
        if predicts:
            for block in blocks:
                block.unit_ND = unit_rows(source.embedded(block.first, block.stop))
        for layer in range(source.num_layers):
            plane = planes.get(layer)
            tables = _tables(source, plan, layer, plane, blocks, pool)
            if plane is None:
                lost = [_left_out(own_ND) for own_ND in tables]
            else:
                task.note(f"layer {layer}")
                lost = _write_plane(source, plan, tier, plane, blocks, tables, shared, pool)
                task.advance(group[-1][1] - group[0][0])
            sums = pool.map(lambda block: block.running.squares(block.carry_ND), blocks)
            for own, running in zip(lost, sums, strict=True):
                errors[layer].add(ErrorSums(*own, *running))
        for block in blocks:
            out.write(block.records_NS)
    return errors


def _blocks_at_once(tier: Tier, source: RowSource, plan: EncodePlan, threads: int) -> int:
    """Blocks that take turns at each layer: a multiple of `threads`, so that reading a layer (its
    weights widened to float32) serves as many rows as HELD_BYTES of records, carries and sums
    allow."""
    waiting = len(plan.folded)
    block_bytes = WORK_ROWS * (tier.stride + 4 * source.hidden_size * (2 + waiting))
    return threads * max(1, HELD_BYTES // (threads * block_bytes))


def row_blocks(start: int, stop: int, threads: int) -> Iterator[list[tuple[int, int]]]:
    """Runs of WORK_ROWS slots of start..stop, as many at a time as there are threads."""
    firsts = range(start, stop, WORK_ROWS)
    for i in range(0, len(firsts), threads):
        yield [(first, min(first + WORK_ROWS, stop)) for first in firsts[i : i + threads]]


def _tables(
    source: RowSource,
    plan: EncodePlan,
    layer: int,
    plane: PlanePlan | None,
    blocks: list[_Block],
    pool: BlockPool,
) -> list[Tensor | None]:
    """For each block the table its plane of `layer` stands for, or the one that is dropped there;
    None where there is none. Passes the layer in the blocks' running sums."""
    own = (layer,) if source.statuses[layer].status == "kept" else ()
    members = own if plane is None else plane.members
    tables: list[dict[int, Tensor]] = [{} for _ in blocks]
    for member in members:
        if member in blocks[0].running.held:
            rows = [block.running.held.pop(member) for block in blocks]
        else:
            rows = _read(source, member, [(b.first, b.stop) for b in blocks], pool)
            if member in plan.folded:
                for block, rows_ND in zip(blocks, rows, strict=True):
                    block.running.held[member] = rows_ND
        for found, rows_ND in zip(tables, rows, strict=True):
            found[member] = rows_ND
    whole = plan.is_whole(layer, source.statuses)

    def step(item: tuple[_Block, dict[int, Tensor]]) -> Tensor | None:
        block, found = item
        block.running.advance(layer, found, kept=plane is not None, whole=whole)
        if not found or (plane is None and plan.statuses[layer].into is not None):
            return None
        parts = list(found.values())
        return parts[0] if len(parts) == 1 else sum(parts[2:], parts[0] + parts[1])

    return pool.map(step, zip(blocks, tables, strict=True))


def _left_out(own_ND: Tensor | None) -> tuple[float, float]:
    """A dropped table has lost all; a folded one has no plane to lose from."""
    gone = 0.0 if own_ND is None else squares(own_ND)
    return gone, gone


def _write_plane(
    source: RowSource,
    plan: EncodePlan,
    tier: Tier,
    plane: PlanePlan,
    blocks: list[_Block],
    tables: list[Tensor | None],
    shared: Shared,
    pool: BlockPool,
) -> list[tuple[float, float]]:
    """Sums of squares of each block's table and of what was lost of it."""
    (place,) = [p for p in tier.planes if p.layer == plane.layer]
    where = slice(place.offset, place.offset + place.length)

    arrays: Mapping[str, Tensor] = {} if plane.copy else shared[plane.layer]

    def encode(item: tuple[_Block, Tensor | None]) -> tuple[float, float]:
        block, own_ND = item
        assert own_ND is not None
        own = squares(own_ND)
        if plane.copy:
            return own, 0.0
        plane_NB, block.carry_ND, lost = encode_block(
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
        return own, lost

    if plane.copy:
        for block in blocks:
            stored = source.stored_plane(plane.layer, block.first, block.stop)
            block.records_NS[:, where] = stored
    return pool.map(encode, zip(blocks, tables, strict=True))


def _read(
    source: RowSource, layer: int, spans: list[tuple[int, int]], pool: BlockPool
) -> list[Tensor]:
    reader: PlaneReader = source.plane(layer)
    return pool.map(lambda span: reader(*span), spans)


def block_target(
    source: RowSource, plane: PlanePlan, spans: list[tuple[int, int]], pool: BlockPool
) -> list[Tensor]:
    """For each span of slots the table `plane` stands for: the sum of its members, [N, D]."""
    sums: list[Tensor] = []
    for member in plane.members:
        rows = _read(source, member, spans, pool)
        sums = rows if not sums else [a.add_(b) for a, b in zip(sums, rows, strict=True)]
    return sums


def encode_block(
    source: RowSource,
    plane: PlanePlan,
    own_ND: Tensor,
    carry_ND: Tensor | None,
    shared: Mapping[str, Tensor],
    *,
    feedback: bool,
    first_slot: int,
    tier: int = 0,
    unit_ND: Tensor | None = None,
) -> tuple[Tensor, Tensor, float]:
    """Encode one block of a plane: table plus carry under feedback, the table alone without.

    Args:
        own_ND: the table's rows, float32 [N, D].
        carry_ND: error of the running sum before this plane, tables minus decoded; None is zero.
        tier: whose codec.
        unit_ND: unit embeddings of the rows, for planes with a predictor.

    Returns:
        the plane's bytes U8 [N, B], the carry after it float32 [N, D], and the sum of squares
        of what was lost of the table.

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
    lost = squares(decoded_ND - own_ND)
    carried_ND = torch.sub(summed_ND, decoded_ND, out=decoded_ND)
    return plane_NB, carried_ND, lost
