"""Record layout by hand, CRC-32 against zlib one row at a time."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from _nano import ALL_CODECS, RAW_F32

from tolkit_formats.codecs import codec_from_json
from tolkit_formats.limits import BLOCK_ROWS, MAX_VOCAB_SIZE
from tolkit_formats.records import Tier, crc_of_records, lay_out, seal_records

# codec name -> bytes of one plane of D 24, counted on paper.
PLANE_BYTES = [96, 48, 48, 4 + 24, 4 + 12, 4 + 12, 4 + 12, 8, 4 + 4]


def tier_of(hidden_size: int, num_rows: int, **options: int) -> Tier:
    codecs = [(i, codec_from_json(c, hidden_size)) for i, c in enumerate(ALL_CODECS)]
    return lay_out(codecs, num_rows, **options)


def test_planes_follow_each_other_and_the_stride_holds_the_crc() -> None:
    tier = tier_of(24, 40)
    offset = 0
    for plane, length in zip(tier.planes, PLANE_BYTES, strict=True):
        assert (plane.offset, plane.length) == (offset, length)
        offset += length
    assert tier.payload_bytes == offset == 284
    assert tier.stride == 288  # 284 + 4 of CRC is a multiple of 16 already


@pytest.mark.parametrize(("payload", "stride"), [(0, 16), (4, 16), (12, 16), (16, 32), (28, 32)])
def test_stride_is_the_next_multiple_of_16(payload: int, stride: int) -> None:
    codecs = [(layer, codec_from_json(RAW_F32, 1)) for layer in range(payload // 4)]
    assert lay_out(codecs, 1).stride == stride


@pytest.mark.parametrize(
    ("num_rows", "shards", "last"), [(1, 1, 1), (1024, 1, 1024), (1025, 2, 1), (2500, 3, 452)]
)
def test_shards_are_whole_blocks(num_rows: int, shards: int, last: int) -> None:
    tier = tier_of(24, num_rows, max_shard_bytes=1)
    assert tier.rows_per_shard == BLOCK_ROWS
    assert tier.num_shards == shards
    assert [tier.shard_rows(i) for i in range(shards)] == [1024] * (shards - 1) + [last]
    assert tier.shard_name(0) == f"records-0-00001-of-{shards:05d}.safetensors"


def test_rows_a_shard_stay_within_what_a_manifest_may_say() -> None:
    assert lay_out([], 1).rows_per_shard == MAX_VOCAB_SIZE


def test_seal_writes_zlibs_crc_little_endian() -> None:
    rng = np.random.default_rng(0)
    records = rng.integers(0, 256, (33, 48)).astype(np.uint8)
    body = records.copy()
    seal_records(records, 70_000)
    expected = [
        zlib.crc32(slot.to_bytes(4, "little") + row[:-4].tobytes())
        for slot, row in enumerate(body, start=70_000)
    ]
    for row, before, crc in zip(records, body, expected, strict=True):
        assert row[:-4].tobytes() == before[:-4].tobytes()
        assert row[-4:].tobytes() == crc.to_bytes(4, "little")
    slots = np.arange(70_000, 70_033)
    assert crc_of_records(records[::2], slots[::2]).tolist() == expected[::2]
    assert not (crc_of_records(records, slots[::-1]) == np.array(expected))[:16].any()


def test_known_crc() -> None:
    """The check value every CRC-32 is known by; its first four digits are taken for the slot."""
    record = np.frombuffer(b"56789....", np.uint8)[None]
    slot = np.frombuffer(b"1234", "<u4").astype(np.int64)
    assert crc_of_records(record, slot)[0] == zlib.crc32(b"123456789") == 0xCBF43926
