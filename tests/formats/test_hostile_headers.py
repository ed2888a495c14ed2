"""Safetensors headers: what the package refuses and what it lets through, both refused here.

Every case is a whole file. It is read alone, and in a bundle as shard and as bases, with all
digests made to fit, so that the header rule is what refuses it.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from _hostile import Case, params, run_case, with_file
from _nano import tensor_bytes, with_header, write_nano

from tolkit_formats.errors import BundleError
from tolkit_formats.tensorfile import TensorFile

SHARD = "tables/records-0-00001-of-00001.safetensors"
BASES = "tables/bases.safetensors"


def header(entries: object, data: bytes = b"", **more: object) -> bytes:
    """A file whose header is the JSON of `entries`."""
    if isinstance(entries, dict):
        entries = {**entries, **more}
    return with_header(json.dumps(entries).encode(), data)


def entry(dtype: object, shape: object, offsets: object, **more: object) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


U8 = entry("U8", [4], [0, 4])
FILES: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "too short"),
    "7 bytes": (b"\x01" * 7, "too short"),
    "8 bytes": (struct.pack("<Q", 2), "too short"),
    "length 0": (struct.pack("<Q", 0) + b"{}" + bytes(8), "header of 0 bytes"),
    "length 1": (struct.pack("<Q", 1) + b"{}", "header of 1 bytes"),
    "length past the end by 1": (struct.pack("<Q", 3) + b"{}", "header of 3 bytes"),
    "length 2^63": (struct.pack("<Q", 1 << 63) + b"{}" + bytes(8), "limit 1,048,576"),
    "length 2^64 - 1": (b"\xff" * 8 + b"{}", "limit 1,048,576"),
    "length big-endian": (struct.pack(">Q", 2) + b"{}", "limit"),
    "length above the limit, file as long": (with_header(b"{" + b" " * (1 << 20)), "limit"),
    "not JSON": (with_header(b"{nope}"), "not JSON"),
    "leading space": (with_header(b" {}"), "does not start with '{'"),
    "leading line feed": (with_header(b"\n{}"), "does not start with '{'"),
    "byte order mark": (with_header(b"\xef\xbb\xbf{}"), "does not start with '{'"),
    "a list": (with_header(b"[]"), "does not start with '{'"),
    "trailing NULs": (with_header(b"{}\0\0"), "not closed by '}'"),
    "trailing line feed": (with_header(b"{}\n"), "not closed by '}'"),
    "two objects": (with_header(b"{}{}"), "Extra data"),
    "not UTF-8": (with_header(b'{"\xff": 1}'), "not UTF-8"),
    "200,000 deep": (with_header(b'{"a":' * 200_000 + b"}"), "nested"),
    "depth 5": (header({"a": entry("U8", [[[[4]]]], [0, 4])}, b"1234"), "nested"),
    "duplicate name": (
        with_header(f'{{"a": {json.dumps(U8)}, "a": {json.dumps(U8)}}}'.encode(), b"1234"),
        "duplicate key 'a'",
    ),
    "duplicate name, other dtype": (
        with_header(
            f'{{"a": {json.dumps(U8)}, "a": {json.dumps(entry("I32", [1], [0, 4]))}}}'.encode(),
            b"1234",
        ),
        "duplicate key 'a'",
    ),
    "duplicate metadata": (
        with_header(b'{"__metadata__": {}, "__metadata__": {"a": "b"}}'),
        "duplicate key '__metadata__'",
    ),
    "duplicate field": (
        with_header(b'{"a": {"dtype":"U8","shape":[4],"shape":[2],"data_offsets":[0,4]}}', b"1234"),
        "duplicate key 'shape'",
    ),
    "metadata a list": (header({"__metadata__": []}), "__metadata__"),
    "metadata of numbers": (header({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata nested": (header({"__metadata__": {"a": {"b": "c"}}}), "__metadata__"),
    "entry a list": (header({"a": ["U8", [4], [0, 4]]}, b"1234"), "'a'"),
    "entry null": (header({"a": None}), "'a'"),
    "dtype missing": (header({"a": {"shape": [4], "data_offsets": [0, 4]}}, b"1234"), "dtype"),
    "shape missing": (header({"a": {"dtype": "U8", "data_offsets": [0, 4]}}, b"1234"), "shape"),
    "offsets missing": (header({"a": {"dtype": "U8", "shape": [4]}}, b"1234"), "data_offsets"),
    "unknown field": (header({"a": entry("U8", [4], [0, 4], stride=1)}, b"1234"), "exactly"),
    "dtype unknown": (header({"a": entry("U7", [4], [0, 4])}, b"1234"), "unknown dtype 'U7'"),
    "dtype lower case": (header({"a": entry("u8", [4], [0, 4])}, b"1234"), "unknown dtype"),
    "dtype a number": (header({"a": entry(8, [4], [0, 4])}, b"1234"), "unknown dtype"),
    "dtype a list": (header({"a": entry(["U8"], [4], [0, 4])}, b"1234"), "unknown dtype"),
    "dtype long": (header({"a": entry("U\n" * 9999, [4], [0, 4])}, b"1234"), "unknown dtype"),
    "shape a number": (header({"a": entry("U8", 4, [0, 4])}, b"1234"), "shape must be"),
    "shape negative": (header({"a": entry("U8", [-4], [0, 4])}, b"1234"), "shape must be"),
    "shape two negatives": (header({"a": entry("U8", [-2, -2], [0, 4])}, b"1234"), "shape must be"),
    "shape of floats": (header({"a": entry("U8", [4.0], [0, 4])}, b"1234"), "shape must be"),
    "shape of true": (header({"a": entry("U8", [True], [0, 1])}, b"1"), "shape must be"),
    "shape of strings": (header({"a": entry("U8", ["4"], [0, 4])}, b"1234"), "shape must be"),
    "nine axes": (header({"a": entry("U8", [1] * 9, [0, 1])}, b"1"), "up to 8"),
    "shape overflows 2^64": (
        header({"a": entry("U8", [1 << 32, 1 << 32], [0, 0])}),
        "too large",
    ),
    "shape overflows to the size": (
        header({"a": entry("U8", [(1 << 32) + 1, 1 << 32], [0, 4])}, b"1234"),
        "too large",
    ),
    "zero elements, huge axes": (
        header({"a": entry("U8", [0, 1 << 40, 1 << 40], [0, 0])}),
        "too large",
    ),
    "shape and bytes disagree": (header({"a": entry("U16", [4], [0, 4])}, b"1234"), "expected 8"),
    "offsets reversed": (header({"a": entry("U8", [4], [4, 0])}, b"1234"), "-4 bytes"),
    "offsets negative": (header({"a": entry("U8", [4], [-4, 0])}, b"1234"), "data_offsets must"),
    "offsets of three": (header({"a": entry("U8", [4], [0, 2, 4])}, b"1234"), "data_offsets must"),
    "offsets a string": (header({"a": entry("U8", [4], "04")}, b"1234"), "data_offsets must"),
    "offset 2^53": (header({"a": entry("U8", [4], [1 << 53, 4])}, b"1234"), "out of range"),
    "past the end": (header({"a": entry("U8", [9], [0, 9])}, b"1234"), "tensors end at"),
    "starts late": (header({"a": entry("U8", [2], [2, 4])}, b"1234"), "hole or overlap"),
    "hole": (
        header({"a": entry("U8", [1], [0, 1]), "b": entry("U8", [1], [3, 4])}, b"1234"),
        "hole or overlap",
    ),
    "overlap": (
        header({"a": entry("U8", [3], [0, 3]), "b": entry("U8", [2], [2, 4])}, b"1234"),
        "hole or overlap",
    ),
    "same bytes twice": (header({"a": U8, "b": U8}, b"1234"), "hole or overlap"),
    "trailing byte": (header({"a": U8}, b"12345"), "tensors end at"),
    "missing byte": (header({"a": U8}, b"123"), "tensors end at"),
    "no tensors, data": (header({}, b"1234"), "tensors end at"),
    "name escapes": (header({"../../etc/x": U8}, b"1234"), "name not allowed"),
    "name absolute": (header({"/etc/x": U8}, b"1234"), "name not allowed"),
    "name with NUL": (header({"x\0": U8}, b"1234"), "name not allowed"),
    "name with a line feed": (header({"x\n": U8}, b"1234"), "name not allowed"),
    "name empty": (header({"": U8}, b"1234"), "name not allowed"),
    "name of 257": (header({"x" * 257: U8}, b"1234"), "name not allowed"),
    "name of a megabyte": (header({"x" * 999_999: U8}, b"1234"), "name not allowed"),
    "100,000 tensors": (
        with_header(
            json.dumps(
                {f"{i}": entry("U8", [0], [0, 0]) for i in range(100_000)}, separators=(",", ":")
            ).encode()
        ),
        "limit 1,048,576",
    ),
}


@pytest.mark.parametrize(("data", "word"), FILES.values(), ids=FILES.keys())
def test_a_file_alone(data: bytes, word: str, tmp_path: Path) -> None:
    path = tmp_path / "b.tol.safetensors"
    path.write_bytes(data)
    with pytest.raises(BundleError) as caught:
        TensorFile(path)
    message = caught.value.message
    assert word in message and str(path) in message
    assert message.isprintable() and len(message) < 400


IN_SHARD = [Case(k, with_file(SHARD, d), (SHARD, w)) for k, (d, w) in FILES.items()]
IN_BASES = [Case(k, with_file(BASES, d), (BASES, w)) for k, (d, w) in FILES.items()]
MEANING = [
    Case("no tensors", with_file(SHARD, header({})), (SHARD, "'records'")),
    Case("another name", with_file(SHARD, header({"rows": U8}, b"1234")), (SHARD, "'records'")),
    Case(
        "one tensor more",
        with_file(SHARD, header({"records": U8, "b": entry("U8", [1], [4, 5])}, b"12345")),
        (SHARD, "'records'"),
    ),
    Case("too few rows", with_file(SHARD, header({"records": U8}, b"1234")), ("'records'", "[4]")),
    Case("no slots", with_file("tables/slots.safetensors", header({})), ("slots", "missing")),
    Case(
        "slots of I32",
        with_file("tables/slots.safetensors", tensor_bytes({"slots": ("I32", [40], bytes(160))})),
        ("slots", "I32 [40], expected U32 [40]"),
    ),
    Case(
        "slots too short",
        with_file("tables/slots.safetensors", tensor_bytes({"slots": ("U32", [39], bytes(156))})),
        ("slots", "U32 [39], expected U32 [40]"),
    ),
    Case(
        "basis transposed",
        with_file(BASES, tensor_bytes({"layer.3.basis": ("F16", [24, 4], bytes(192))})),
        (BASES, "F16 [24, 4], expected F16 [4, 24]"),
    ),
    Case(
        "basis in f32",
        with_file(BASES, tensor_bytes({"layer.3.basis": ("F32", [4, 24], bytes(384))})),
        (BASES, "F32 [4, 24], expected F16 [4, 24]"),
    ),
    Case(
        "basis of another layer",
        with_file(BASES, tensor_bytes({"layer.2.basis": ("F16", [4, 24], bytes(192))})),
        (BASES, "'layer.3.basis' is missing"),
    ),
]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_nano(tmp_path_factory.mktemp("good") / "g.tol").path


@params(IN_SHARD)
def test_as_a_shard(case: Case, good: Path, tmp_path: Path) -> None:
    run_case(case, good, tmp_path)


@params(IN_BASES)
def test_as_bases(case: Case, good: Path, tmp_path: Path) -> None:
    run_case(case, good, tmp_path)


@params(MEANING)
def test_a_sound_file_of_the_wrong_content(case: Case, good: Path, tmp_path: Path) -> None:
    run_case(case, good, tmp_path)


VALID = {
    "no tensors": header({}),
    "metadata": header({"__metadata__": {"a": "b"}, "a": U8}, b"1234"),
    "empty metadata": header({"__metadata__": {}}),
    "padded header": with_header(json.dumps({"a": U8}).encode() + b" " * 999, b"1234"),
    "tensors out of order": header(
        {"b": entry("U8", [1], [3, 4]), "a": entry("U8", [3], [0, 3])}, b"1234"
    ),
    "an axis of 0 and one of 2^52": header({"a": entry("U8", [0, 1 << 52], [0, 0])}),
    "empty tensors between": header(
        {"a": U8, "b": entry("F64", [0, 3], [4, 4]), "c": entry("U8", [], [4, 5])}, b"12345"
    ),
    "unaligned": header({"a": entry("U8", [1], [0, 1]), "b": entry("F32", [1], [1, 5])}, b"12345"),
}


@pytest.mark.parametrize("data", VALID.values(), ids=VALID.keys())
def test_valid_oddities_open(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    file = TensorFile(path)
    for name in file.names:
        assert file.array(name).shape == file.infos[name].shape


def test_the_corpus_is_as_large_as_planned() -> None:
    assert len(FILES) >= 40
