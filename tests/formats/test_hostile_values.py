"""Sound tables of illegal content: codec values, slots, bases.

Every CRC and digest is made to fit, so only looking at the values themselves can find these.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from _hostile import Case, params, run_case
from _nano import (
    INT4,
    INT8,
    NF4,
    RAW_BF16,
    RAW_F16,
    RAW_F32,
    edit_record,
    refresh,
    svd,
    tensor_bytes,
    write_nano,
)

from tolkit_formats import open_bundle, verify

# One layer for each kind of value, 23 wide so that tails and paddings exist. Bytes of the planes:
# f32 92 | f16 46+2 | bf16 46+2 | int8 2+2 + 23+1 | nf4 4 + 11.5+0.5+0 | int4 likewise | svd 4+3+1
CODECS = (RAW_F32, RAW_F16, RAW_BF16, INT8, NF4, INT4, svd(3, INT8))
START = {"f32": 0, "f16": 92, "bf16": 140, "int8": 188, "nf4": 216, "int4": 232, "svd": 248}
SLOT = 7
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "g.tol"
    nano = write_nano(path, CODECS, hidden_size=23)
    planes = open_bundle(path).manifest.tiers[0].planes
    assert [plane.offset for plane in planes] == list(START.values())
    return nano.path


def value(place: str, offset: int, data: bytes) -> Callable[[Path], object]:
    """Overwrite bytes of a plane of one record, CRC and digests made to fit."""
    start = START[place] + offset

    def change(record: bytearray) -> None:
        record[start : start + len(data)] = data

    def damage(path: Path) -> None:
        edit_record(path, SLOT, change)
        refresh(path)

    return damage


def f32(number: float) -> bytes:
    return struct.pack("<f", number)


def f16(number: float) -> bytes:
    return np.float16(number).tobytes()


def bf16(bits: int) -> bytes:
    return struct.pack("<H", bits)


def refused_value(name: str, layer: int, damage: Callable[[Path], object], *words: str) -> Case:
    place = ("records-0-", f"layer {layer}", f"row {SLOT}")
    return Case(name, damage, (*place, *words), at_open=False)


VALUES = [
    refused_value("f32 NaN", 0, value("f32", 4, f32(NAN)), "column 1", "not finite"),
    refused_value("f32 Inf", 0, value("f32", 88, f32(INF)), "column 22", "not finite"),
    refused_value("f32 -Inf", 0, value("f32", 0, f32(-INF)), "column 0", "not finite"),
    refused_value("f32 signalling NaN", 0, value("f32", 0, b"\1\0\x80\x7f"), "not finite"),
    refused_value("f16 NaN", 1, value("f16", 2, f16(NAN)), "column 1", "not finite"),
    refused_value("f16 Inf", 1, value("f16", 44, f16(INF)), "column 22", "not finite"),
    refused_value("f16 padding", 1, value("f16", 46, b"\1"), "padding"),
    refused_value("bf16 NaN", 2, value("bf16", 0, bf16(0x7FC0)), "not finite"),
    refused_value("bf16 Inf", 2, value("bf16", 0, bf16(0xFF80)), "not finite"),
    refused_value("bf16 padding", 2, value("bf16", 47, b"\x80"), "padding"),
    refused_value("int8 scale NaN", 3, value("int8", 0, f16(NAN)), "scale"),
    refused_value("int8 scale Inf", 3, value("int8", 0, f16(INF)), "scale"),
    refused_value("int8 scale negative", 3, value("int8", 0, f16(-1)), "scale"),
    refused_value("int8 scale -0", 3, value("int8", 0, f16(-0.0)), "scale"),
    refused_value("int8 scale padding", 3, value("int8", 2, b"\1"), "padding"),
    refused_value("int8 code -128", 3, value("int8", 4, b"\x80"), "-128"),
    refused_value("int8 code padding", 3, value("int8", 27, b"\1"), "padding"),
    refused_value("nf4 absmax NaN", 4, value("nf4", 0, f32(NAN)), "absmax"),
    refused_value("nf4 absmax Inf", 4, value("nf4", 0, f32(INF)), "absmax"),
    refused_value("nf4 absmax negative", 4, value("nf4", 0, f32(-1.0)), "absmax"),
    refused_value("nf4 absmax -0", 4, value("nf4", 0, f32(-0.0)), "absmax"),
    refused_value("nf4 tail nibble", 4, value("nf4", 4 + 11, b"\x01"), "padding"),
    refused_value("int4 absmax -Inf", 5, value("int4", 0, f32(-INF)), "absmax"),
    refused_value("int4 code 0 high", 5, value("int4", 4, b"\x08"), "code 0"),
    refused_value("int4 code 0 low", 5, value("int4", 4, b"\x80"), "code 0"),
    refused_value("svd scale NaN", 6, value("svd", 0, f16(NAN)), "scale"),
    refused_value("svd code -128", 6, value("svd", 4, b"\x80"), "-128"),
    refused_value("svd padding", 6, value("svd", 7, b"\x01"), "padding"),
]


def padding_before_crc(path: Path) -> None:
    edit_record(path, SLOT, lambda record: record.__setitem__(START["svd"] + 8, 1))
    refresh(path)


def crc_wrong(path: Path) -> None:
    (shard,) = (path / "tables").glob("records-*")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    refresh(path)


def slots(change: Callable[[np.ndarray], object]) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        file = path / "tables" / "slots.safetensors"
        array = np.frombuffer(file.read_bytes()[-160:], "<u4").copy()
        change(array)
        file.write_bytes(tensor_bytes({"slots": ("U32", [40], array.tobytes())}))
        refresh(path)

    return damage


def basis(number: float) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        array = np.ones((3, 23), np.float16)
        array[2, 5] = number
        (path / "tables" / "bases.safetensors").write_bytes(
            tensor_bytes({"layer.6.basis": ("F16", [3, 23], array.tobytes())})
        )
        refresh(path)

    return damage


def one_to_one(name: str, change: Callable[[np.ndarray], object]) -> Case:
    return Case(name, slots(change), ("slots", "one-to-one"), at_open=False)


TABLES = [
    Case("padding before the CRC", padding_before_crc, ("padding", "CRC"), at_open=False),
    Case("CRC wrong", crc_wrong, ("slot 39", "CRC-32"), at_open=False),
    one_to_one("slot twice", lambda a: a.__setitem__(0, a[1])),
    one_to_one("slot beyond the records", lambda a: a.__setitem__(0, 40)),
    one_to_one("slot 2^31", lambda a: a.__setitem__(0, 1 << 31)),
    one_to_one("a token without a slot", lambda a: a.__setitem__(0, 0xFFFFFFFF)),
    one_to_one("all slots 0", lambda a: a.fill(0)),
    Case("basis NaN", basis(NAN), ("layer 6", "basis", "NaN"), at_open=False),
    Case("basis Inf", basis(INF), ("layer 6", "basis", "NaN or inf"), at_open=False),
    Case("basis -Inf", basis(-INF), ("layer 6", "basis", "NaN or inf"), at_open=False),
]


@params(VALUES)
def test_codec_values(case: Case, good: Path, tmp_path: Path) -> None:
    run_case(case, good, tmp_path)


@params(TABLES)
def test_other_tables(case: Case, good: Path, tmp_path: Path) -> None:
    run_case(case, good, tmp_path)


def test_zero_scales_are_legal(good: Path, tmp_path: Path) -> None:
    """A row of zeros: scale 0, codes 0."""
    nano = write_nano(tmp_path / "b.tol", CODECS, hidden_size=23)
    edit_record(nano.path, SLOT, lambda r: r.__setitem__(slice(0, 232), bytes(232)))
    refresh(nano.path)
    verify(nano.path)
    assert nano.slot_of_token_V is not None
    token = int(np.flatnonzero(nano.slot_of_token_V == SLOT)[0])
    assert not open_bundle(nano.path).rows([token])[0, :5].any()


def test_the_corpus_is_as_large_as_planned() -> None:
    assert len(VALUES) >= 25
