"""A shard of entropy-coded records: lengths first, then the records one after the other.

N rows asked for, C symbols of a record.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np
import numpy.typing as npt

from tolkit_formats.entropy import length_dtype
from tolkit_formats.errors import BundleError
from tolkit_formats.rans import RowCoder
from tolkit_formats.records import CRC_BYTES, Tier, crc_of_bytes
from tolkit_formats.tensorfile import TensorFile

__all__ = ["CodedShard", "coded_tensors"]

_U8 = npt.NDArray[np.uint8]
_I64 = npt.NDArray[np.int64]


class CodedShard:
    """One shard file, mapped; its header is checked when made.

    Args:
        file: the shard.
        tier: whose it is.
        shard: its number, from 0.
    """

    def __init__(self, file: TensorFile, tier: Tier, shard: int) -> None:
        if file.names != ("lengths", "records"):
            raise BundleError(
                f"{file.path}: holds {list(file.names)[:3]}, expected 'lengths' and 'records'"
            )
        self._file = file
        self._first_slot = tier.first_slot + shard * tier.rows_per_shard
        dtype = length_dtype(tier.stride)
        self._lengths_N = file.expect("lengths", dtype, (tier.shard_rows(shard),))
        info = file.infos["records"]
        if info.dtype != "U8" or len(info.shape) != 1:
            raise BundleError(
                f"{file.path}: tensor 'records' is {info.dtype} {list(info.shape)}, "
                "expected U8 with one axis"
            )
        self._data: _U8 = file.array("records").view(np.uint8)

    @cached_property
    def _ends_N(self) -> _I64:
        """Where each record ends, summed once.

        Raises:
            BundleError: the lengths do not add up to the bytes there are.
        """
        ends_N = np.cumsum(self._lengths_N, dtype=np.int64)
        if len(ends_N) and ends_N[-1] != len(self._data):
            raise BundleError(
                f"{self._file.path}: lengths add up to {ends_N[-1]:,} bytes, "
                f"records have {len(self._data):,}"
            )
        return ends_N

    def decode(self, rows_N: _I64, fresh_N: npt.NDArray[np.bool_], coder: RowCoder) -> _U8:
        """Symbols [N, C] of rows, counted from this shard's first.

        Args:
            fresh_N: rows whose CRC is to be compared.

        Raises:
            BundleError: names the slot of a record that does not match its CRC or is no stream.
        """
        lengths_N = self._lengths_N[rows_N].astype(np.int64)
        starts_N = self._ends_N[rows_N] - lengths_N
        self._check_crc(rows_N[fresh_N], starts_N[fresh_N], lengths_N[fresh_N])
        bodies_N = np.maximum(lengths_N - CRC_BYTES, 0)
        try:
            return coder.decode(self._data, starts_N, bodies_N)
        except BundleError:
            for row, start, length in zip(rows_N, starts_N, bodies_N, strict=True):
                try:
                    coder.decode(self._data, np.array([start]), np.array([length]))
                except BundleError as error:
                    slot = self._first_slot + int(row)
                    raise self._damaged(
                        slot, f"is no entropy-coded row ({error.message})"
                    ) from None
            raise

    def _check_crc(self, rows_N: _I64, starts_N: _I64, lengths_N: _I64) -> None:
        data = self._data.data
        for row, start, length in zip(
            rows_N.tolist(), starts_N.tolist(), lengths_N.tolist(), strict=True
        ):
            slot = self._first_slot + row
            body, end = start + length - CRC_BYTES, start + length
            if body < start:
                raise self._damaged(slot, f"has {length} bytes, its CRC-32 alone has {CRC_BYTES}")
            stored = int.from_bytes(data[body:end], "little")
            if crc_of_bytes(data[start:body], slot) != stored:
                raise self._damaged(slot, "does not match its CRC-32")

    def _damaged(self, slot: int, what: str) -> BundleError:
        return BundleError(
            f"{self._file.path}: record in slot {slot} {what}: damaged",
            hint=f"run: tol verify {self._file.path.parent.parent}",
        )


def coded_tensors(
    bodies: list[tuple[_I64, _U8]], first_slot: int, num_positions: int
) -> Mapping[str, tuple[str, npt.NDArray[np.generic]]]:
    """The tensors of a shard from what the coder gave for its rows, block by block."""
    lengths_N = np.concatenate([np.zeros(0, np.int64), *(lengths for lengths, _ in bodies)])
    data = np.concatenate([np.zeros(0, np.uint8), *(part for _, part in bodies)])
    starts_N = np.cumsum(lengths_N) - lengths_N
    crcs = np.array(
        [
            crc_of_bytes(data[start : start + length].data, first_slot + row)
            for row, (start, length) in enumerate(
                zip(starts_N.tolist(), lengths_N.tolist(), strict=True)
            )
        ],
        "<u4",
    )
    ends_N = np.cumsum(lengths_N + CRC_BYTES)
    records = np.empty(len(data) + CRC_BYTES * len(crcs), np.uint8)
    is_crc = np.zeros(len(records), bool)
    is_crc[(ends_N[:, None] - CRC_BYTES + np.arange(CRC_BYTES)).reshape(-1)] = True
    records[is_crc] = crcs.view(np.uint8)
    records[~is_crc] = data
    dtype = length_dtype(num_positions)
    lengths = (lengths_N + CRC_BYTES).astype("<u2" if dtype == "U16" else "<u4")
    return {"lengths": (dtype, lengths), "records": ("U8", records)}
