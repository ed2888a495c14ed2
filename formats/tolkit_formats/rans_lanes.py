"""The bytes before a row's lanes: how long each lane is, but for the last (SPEC, rANS coder).

N rows, A lanes. The first length as it is, the next ones as differences to the one before, signed
numbers folded onto naturals; each a little-endian base-128 number. Lanes that took turns are nearly
equal, so most differences take one byte however long the lanes are.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tolkit_formats.errors import BundleError

__all__ = ["length_bytes", "put_lengths", "read_lengths", "refuse"]

_MAX_BYTES = 4  # of one number: 28 bits

_U8 = npt.NDArray[np.uint8]
_I64 = npt.NDArray[np.int64]


def length_bytes(lengths_NA: _I64) -> _I64:
    """int64 [N]: the bytes `put_lengths` takes for each row."""
    return np.asarray(_sizes(_folded(lengths_NA)).sum(axis=1), np.int64)


def put_lengths(data: _U8, at_N: _I64, lengths_NA: _I64) -> None:
    """Write the rows' lane lengths into `data` from bytes `at_N` on, in place."""
    values = _folded(lengths_NA)
    sizes = _sizes(values)
    at = at_N[:, None] + np.cumsum(sizes, axis=1) - sizes
    for byte in range(_MAX_BYTES):
        has = sizes > byte
        goes_on = 128 * (sizes[has] > byte + 1)
        data[at[has] + byte] = (values[has] >> 7 * byte & 127 | goes_on).astype(np.uint8)


def read_lengths(
    data: _U8, at_N: _I64, end_N: _I64, lanes: int, first_row: int
) -> tuple[_I64, _I64]:
    """Lane lengths of the rows in ``data[at : end]``.

    Returns:
        (int64 [N, A] bytes of each lane, int64 [N] where each row's first lane begins).

    Raises:
        BundleError: lengths that run past the row, are not in shortest form or do not add up.
    """
    at_N = at_N.copy()
    lengths_NA = np.zeros((len(at_N), lanes), np.int64)
    for lane in range(lanes - 1):
        value_N = _read_numbers(data, at_N, end_N, first_row)
        if lane:
            value_N = lengths_NA[:, lane - 1] + (value_N >> 1 ^ -(value_N & 1))
        lengths_NA[:, lane] = value_N
    lengths_NA[:, -1] = end_N - at_N - lengths_NA.sum(axis=1)
    refuse(lengths_NA.min(axis=1) < 0, first_row, "its lanes are longer than it")
    return lengths_NA, at_N


def refuse(wrong_N: npt.NDArray[np.bool_], first_row: int, what: str) -> None:
    """BundleError for the first row marked, if any."""
    if wrong_N.any():
        raise BundleError(f"row {first_row + int(wrong_N.argmax())}, entropy-coded record: {what}")


def _read_numbers(data: _U8, at_N: _I64, end_N: _I64, first_row: int) -> _I64:
    """One number of each row; moves `at_N` behind it."""
    value_N = np.zeros(len(at_N), np.int64)
    goes_on_N = np.ones(len(at_N), bool)
    for byte in range(_MAX_BYTES):
        refuse(goes_on_N & (at_N >= end_N), first_row, "the lengths of its lanes run past it")
        digit_N = np.where(goes_on_N, data[np.minimum(at_N, len(data) - 1)], 0).astype(np.int64)
        at_N += goes_on_N
        value_N |= (digit_N & 127) << 7 * byte
        if byte:
            refuse(goes_on_N & (digit_N == 0), first_row, "a lane's length is not in shortest form")
        goes_on_N = digit_N > 127
        if not goes_on_N.any():
            return value_N
    refuse(goes_on_N, first_row, f"a lane's length takes more than {_MAX_BYTES} bytes")
    return value_N


def _folded(lengths_NA: _I64) -> _I64:
    """int64 [N, A - 1]: first length, then differences d as 2 d, or -2 d - 1 below 0."""
    first_N1 = lengths_NA[:, :1]
    steps = np.diff(lengths_NA, axis=1)
    folded = np.concatenate([first_N1, steps << 1 ^ steps >> 63], axis=1)
    return np.asarray(folded[:, :-1], np.int64)


def _sizes(values: _I64) -> _I64:
    return np.asarray(sum(values >= 128**power for power in range(1, _MAX_BYTES)) + 1, np.int64)
