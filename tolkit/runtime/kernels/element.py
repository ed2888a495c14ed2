"""Kernel: look up rows whose values are stored one by one, and dequantise them on the way.

n rows asked for, K kept layers, D hidden, S record stride, P planes of a launch. A program makes
one chunk of one plane of one row; one launch makes all planes of a codec. Products are those of
the numpy codecs, so values are equal bit for bit before the last cast.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["FOURBIT", "INT8", "RAW", "element_kernel", "element_values", "slots_of"]

RAW = tl.constexpr(0)
INT8 = tl.constexpr(1)
FOURBIT = tl.constexpr(2)


@triton.jit
def slots_of(ids, slot_of_token, vocab_size, MAPPED: tl.constexpr):
    """Slots int64 of token ids, negative where there is none; no address is made of a wrong id."""
    known = (ids >= 0) & (ids < vocab_size)
    if MAPPED:
        slots = tl.load(slot_of_token + ids, mask=known, other=-1).to(tl.int64)
    else:
        slots = tl.where(known, ids, -1)
    return slots


@triton.jit
def element_values(
    records, numbers, codebook, base, codes, column, mask, GROUP: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """Float32 values at `column` of planes that start at byte `base`, their codes at byte `codes`.

    Shapes are broadcast. `numbers` are the records as numbers of the kind's scales, or of its
    values (raw). `base` is an address that may be read, whatever `mask` says.
    """
    if KIND == RAW:
        item_bytes: tl.constexpr = numbers.dtype.element_ty.primitive_bitwidth // 8
        values = tl.load(numbers + base // item_bytes + column, mask=mask, other=0).to(tl.float32)
    elif KIND == INT8:
        scale = tl.load(numbers + base // 2).to(tl.float32)  # of row 0 where there is none
        codes = tl.load(records + codes + column, mask=mask, other=0)
        values = codes.to(tl.int8, bitcast=True).to(tl.float32) * scale
    else:
        absmax = tl.load(numbers + base // 4 + column // GROUP, mask=mask, other=0)
        pair = tl.load(records + codes + column // 2, mask=mask, other=0).to(tl.int32)
        code = (pair >> (4 - 4 * (column % 2))) & 15
        values = tl.load(codebook + code) * absmax
    return values


@triton.jit
def element_kernel(
    out, ids, slot_of_token, records, numbers, codebook, offset_P, place_P,
    vocab_size, first_slot, num_rows, all_rows, stride, num_layers, codes_at,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
    MAPPED: tl.constexpr, FILL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes out [n, K, D] for the rows that lie in one tier. Grid: n, P, chunks of BLOCK.

    FILL: rows that have no slot at all become NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    plane = tl.program_id(1)
    slot = slots_of(tl.load(ids + row), slot_of_token, vocab_size, MAPPED)
    inside = (slot >= first_slot) & (slot < first_slot + num_rows)
    base = tl.where(inside, slot - first_slot, 0) * stride + tl.load(offset_P + plane)
    # Segments start at multiples of four, so four codes are read at once.
    base = tl.multiple_of(base, 4)
    codes = tl.multiple_of(base + codes_at, 4)
    target = out + (row * num_layers + tl.load(place_P + plane)) * WIDTH
    if KIND == FOURBIT:
        half = tl.program_id(2) * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
        read = inside & (half < (WIDTH + 1) // 2)
        absmax = tl.load(numbers + base // 4 + half // (GROUP // 2), mask=read, other=0)
        pair = tl.load(records + codes + half, mask=read, other=0).to(tl.int32)
        high = tl.load(codebook + (pair >> 4)) * absmax
        low = tl.load(codebook + (pair & 15)) * absmax
        values = tl.interleave(high, low)
        column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    else:
        column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
        read = inside & (column < WIDTH)
        values = element_values(records, numbers, codebook, base, codes, column, read, GROUP, KIND)
    write = inside
    if FILL:
        missing = (slot < 0) | (slot >= all_rows)
        values = tl.where(missing, float("nan"), values)
        write = inside | missing
    tl.store(target + column, values.to(out.dtype.element_ty), mask=write & (column < WIDTH))
