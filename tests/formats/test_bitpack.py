"""Packed fields against strings of bits."""

from __future__ import annotations

import numpy as np
import pytest
from _bands import field_bits, packed_bits, slow_signed
from hypothesis import given, settings
from hypothesis import strategies as st

from tolkit_formats.bitpack import FieldLayout, SignedRows, field_widths, pack
from tolkit_formats.errors import BundleError

WIDTHS = st.lists(st.integers(1, 8), max_size=40)


@settings(max_examples=150, deadline=None)
@given(WIDTHS, st.integers(0, 2**32))
def test_packing_equals_a_string_of_bits(widths: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    fields = np.array([[rng.integers(1 << w) for w in widths] for _ in range(3)], np.uint8)
    fields = fields.reshape(3, len(widths))
    widths_C = np.array(widths, np.int64)
    packed_NB = pack(fields, widths_C)
    assert [row.tobytes() for row in packed_NB] == [packed_bits(r, widths) for r in fields.tolist()]
    layout = FieldLayout(widths_C)
    assert packed_NB.shape == (3, layout.size_bytes)
    assert layout.spare_bits == 8 * layout.size_bytes - sum(widths)
    assert np.array_equal(layout.unpack(packed_NB), fields)


@settings(max_examples=100, deadline=None)
@given(WIDTHS, st.binary(min_size=40, max_size=40))
def test_unpacking_reads_any_bytes_and_no_further(widths: list[int], data: bytes) -> None:
    layout = FieldLayout(np.array(widths, np.int64))
    exact_NB = np.frombuffer(data, np.uint8)[None, : layout.size_bytes]
    longer_NB = np.frombuffer(data, np.uint8)[None]
    want = field_bits(data, widths)
    assert layout.unpack(exact_NB)[0].tolist() == want
    assert layout.unpack(longer_NB)[0].tolist() == want


def test_widths_of_runs() -> None:
    assert field_widths([]).tolist() == []
    assert field_widths([(2, 3), (1, 0), (3, 8)]).tolist() == [3, 3, 0, 8, 8, 8]


def test_the_first_field_is_in_the_highest_bits() -> None:
    packed = pack(np.array([[1, 0, 5]], np.uint8), np.array([1, 2, 7]))
    assert packed.tolist() == [[0b1_00_00001, 0b01_000000]]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("width", [1, 7, 8])
def test_signed_rows(bits: int, width: int) -> None:
    rows = SignedRows(3, width, bits)
    rng = np.random.default_rng(bits)
    largest = (1 << bits) - 2
    fields = [rng.integers(0, largest + 1, width).tolist() for _ in range(3)]
    fields[1][-1] = largest
    data = b"".join(packed_bits(row, [bits] * width) for row in fields)
    packed_B = np.frombuffer(data, np.uint8)
    assert rows.size_bytes == len(data)
    got = rows.unpack(packed_B, "here")
    assert got.dtype == np.float32
    assert np.array_equal(got, slow_signed(data, [[3, bits]], width))
    assert got[1, -1] == 2 ** (bits - 1) - 1
    rows.check(packed_B, "here")
    fields[2][0] = largest + 1
    spoiled = b"".join(packed_bits(row, [bits] * width) for row in fields)
    with pytest.raises(BundleError, match=f"here: code {largest + 1} is outside 0..{largest}"):
        rows.unpack(np.frombuffer(spoiled, np.uint8), "here")
    if bits * width % 8:
        padded = packed_B.copy()
        padded[-1] |= 1
        with pytest.raises(BundleError, match="row 2, here: padding"):
            rows.check(padded, "here")
