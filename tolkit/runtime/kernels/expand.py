"""Kernel: look up rows stored as coefficients and expand them in their basis, in one go.

n rows asked for, K kept layers, D hidden, S record stride, P planes of a launch, C coefficients of
all of them one after the other, c those of one plane. A program makes a block of rows by a block
of columns of one plane: coefficients are decoded where the product needs them, so none goes to
memory, and a basis is read as it is stored (int8 numbers, or f16).

    row = (mean + sum over c of value_c * basis[row_of_c]) * factor
"""

from __future__ import annotations

import triton
import triton.language as tl

from tolkit.runtime.kernels.element import element_values, slots_of

__all__ = ["BANDS", "ELEMENTS", "STEPS", "expand_kernel"]

BANDS = tl.constexpr(10)
STEPS = tl.constexpr(11)
ELEMENTS = tl.constexpr(12)


@triton.jit
def field_values(records, table, base, place, field, scale, mask, KIND: tl.constexpr):
    """Float32 values of bit fields (bands) or symbols (steps), their places given in bytes.

    `field` of bands is shift | mask << 8 | start of its codebook << 16; of steps the first level.
    A field of bands ends before the record's CRC, so the byte behind its first one is there.
    """
    first = tl.load(records + base + place, mask=mask, other=0).to(tl.int32)
    if KIND == BANDS:
        second = tl.load(records + base + place + 1, mask=mask, other=0).to(tl.int32)
        code = (((first << 8) | second) >> (field & 255)) & ((field >> 8) & 255)
        return tl.load(table + (field >> 16) + code, mask=mask, other=0) * scale
    return tl.load(table + field + first, mask=mask, other=0) * scale


@triton.jit
def predicted(
    unit_nD, weights, weight_scales, which, row, inside, column, WIDTH: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Float32 prediction from unit embeddings by int8 weights [D in, D out]; 0 where which < 0."""
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    inner = tl.where(which < 0, 0, WIDTH)
    first_weight = weights + tl.maximum(which, 0).to(tl.int64) * WIDTH * WIDTH
    for first in range(0, inner, BLOCK_C):
        k = first + tl.arange(0, BLOCK_C)
        unit = tl.load(
            unit_nD + row[:, None] * WIDTH + k[None, :],
            mask=inside[:, None] & (k < WIDTH)[None, :],
            other=0,
        )
        tile = tl.load(
            first_weight + k[:, None] * WIDTH + column[None, :],
            mask=(k < WIDTH)[:, None] & (column < WIDTH)[None, :],
            other=0,
        ).to(tl.float32)
        total = tl.dot(unit, tile, total, input_precision=PRECISION)
    scale = tl.load(
        weight_scales + tl.maximum(which, 0) * WIDTH + column,
        mask=(column < WIDTH) & (which >= 0),
        other=0,
    )
    return total * scale[None, :]


@triton.jit
def expand_kernel(
    out, ids, slot_of_token, records, numbers, table, basis, mean_PD, factor_P,
    offset_P, place_P, start_P, count_P, extra_P, place_C, field_C, scale_C, row_C,
    unit_nD, weights, weight_scales, predictor_P,
    vocab_size, num_ids, first_slot, num_rows, all_rows, stride, num_layers,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, INNER: tl.constexpr, KIND: tl.constexpr,
    MAPPED: tl.constexpr, FILL: tl.constexpr, PREDICT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes out [n, K, D] for the rows that lie in one tier. Grid: row blocks, P, column blocks.

    `extra_P` is where a plane's codes start in it (elements) or its codebooks in `table` (bands).
    FILL: rows that have no slot at all become NaN. PRECISION is that of `tl.dot`.
    PREDICT: planes whose `predictor_P` is not negative get unit_nD @ weights * weight_scales.
    """
    plane = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    asked = row < num_ids
    ids_n = tl.load(ids + row, mask=asked, other=-1)
    slot = slots_of(ids_n, slot_of_token, vocab_size, MAPPED)
    inside = (slot >= first_slot) & (slot < first_slot + num_rows)
    base = tl.where(inside, slot - first_slot, 0) * stride + tl.load(offset_P + plane)
    column = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    start = tl.load(start_P + plane)
    count = tl.load(count_P + plane)
    extra = tl.load(extra_P + plane)
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for first in range(0, count, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        real = c < count
        mask = inside[:, None] & real[None, :]
        row_of_c = tl.load(row_C + start + c, mask=real, other=0).to(tl.int64)
        if KIND == ELEMENTS:
            values = element_values(
                records, numbers, table, base[:, None], (base + extra)[:, None], c[None, :], mask,
                GROUP, INNER,
            )  # fmt: skip
        else:
            place = tl.load(place_C + start + c, mask=real, other=0)
            field = tl.load(field_C + start + c, mask=real, other=0)
            scale = tl.load(scale_C + start + c, mask=real, other=0)
            values = field_values(
                records, table + extra, base[:, None], place[None, :], field[None, :],
                scale[None, :], mask, KIND,
            )  # fmt: skip
        rows = tl.load(
            basis + row_of_c[:, None] * WIDTH + column[None, :],
            mask=real[:, None] & (column < WIDTH)[None, :],
            other=0,
        ).to(tl.float32)
        total = tl.dot(values, rows, total, input_precision=PRECISION)
    mean = tl.load(mean_PD + plane * WIDTH + column, mask=column < WIDTH, other=0)
    values = (total + mean[None, :]) * tl.load(factor_P + plane)
    if PREDICT:
        which = tl.load(predictor_P + plane)
        values += predicted(
            unit_nD, weights, weight_scales, which, row, inside, column, WIDTH, PRECISION,
            BLOCK_N, BLOCK_D, BLOCK_C,
        )  # fmt: skip
    write = inside
    if FILL:
        missing = (slot < 0) | (slot >= all_rows)
        values = tl.where(missing[:, None], float("nan"), values)
        write = (inside | missing) & asked
    target = (row * num_layers + tl.load(place_P + plane)) * WIDTH
    tl.store(
        out + target[:, None] + column[None, :],
        values.to(out.dtype.element_ty),
        mask=write[:, None] & (column < WIDTH)[None, :],
    )
