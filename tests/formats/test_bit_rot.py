"""Every bit of tol.json and of the tensor headers flipped in turn, and thousands of payload bits.

`verify` must notice each one; a row read afterwards gives the original rows or an error.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from _nano import NF4, Nano, edit_record, fault_hook, svd, write_nano

from tolkit_formats import TolError, open_bundle, verify
from tolkit_formats.errors import BundleError, InputError, ResourceError

SEED = 20240607
PAYLOAD_FLIPS = 2000


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Nano:
    """V 64, L 2, D 8: a plane with a basis, mapped slots, counts and a tokenizer."""
    path = tmp_path_factory.mktemp("rot") / "b.tol"
    return write_nano(path, [NF4, svd(3, NF4)], vocab_size=64, hidden_size=8)


@contextmanager
def flipper(path: Path) -> Iterator[object]:
    """A function that flips one bit of a file in place and returns one that flips it back."""
    fd = os.open(path, os.O_RDWR)

    def flip(bit: int) -> None:
        (byte,) = os.pread(fd, 1, bit // 8)
        os.pwrite(fd, bytes([byte ^ 1 << bit % 8]), bit // 8)

    try:
        yield flip
    finally:
        os.close(fd)


def detected(path: Path) -> bool:
    try:
        verify(path)
    except InputError as error:
        assert error.message.isprintable() and len(error.message) < 400, error.message
        return True
    return False


def read_rows(path: Path) -> np.ndarray | None:
    try:
        return open_bundle(path).rows(np.arange(64))
    except TolError:
        return None


def headers(nano: Nano) -> dict[Path, int]:
    """tensor file -> bits of its length prefix and header."""
    result = {}
    for path in sorted(nano.path.rglob("*.safetensors")):
        with path.open("rb") as file:
            result[path] = 8 * (8 + int.from_bytes(file.read(8), "little"))
    assert len(result) == 6
    return result


@pytest.mark.slow
def test_every_bit_of_the_manifest(nano: Nano) -> None:
    path = nano.path / "tol.json"
    missed = []
    with flipper(path) as flip:
        for bit in range(8 * path.stat().st_size):
            flip(bit)
            if not detected(nano.path) or read_rows(nano.path) is not None:
                missed.append(bit)
            flip(bit)
    assert not missed
    verify(nano.path)


@pytest.mark.slow
def test_every_bit_of_every_header(nano: Nano) -> None:
    want = read_rows(nano.path)
    assert want is not None
    missed = []
    for path, bits in headers(nano).items():
        with flipper(path) as flip:
            for bit in range(bits):
                flip(bit)
                rows = read_rows(nano.path) if bit % 8 == 0 else None
                if not detected(nano.path) or not (rows is None or np.array_equal(rows, want)):
                    missed.append((path.name, bit))
                flip(bit)
    assert not missed
    verify(nano.path)


def test_payload_bits(nano: Nano) -> None:
    want = read_rows(nano.path)
    assert want is not None
    skipped = {path: bits for path, bits in headers(nano).items()}
    spans = [
        (path, skipped.get(path, 0), 8 * path.stat().st_size)
        for path in sorted(nano.path.rglob("*"))
        if path.is_file() and path.name != "tol.json"
    ]
    generator = random.Random(SEED)
    weights = [stop - start for _, start, stop in spans]
    served = 0
    for path, start, stop in generator.choices(spans, weights, k=PAYLOAD_FLIPS):
        bit = generator.randrange(start, stop)
        with flipper(path) as flip:
            flip(bit)
            where = f"seed {SEED}: {path.name}, bit {bit}"
            assert detected(nano.path), f"verify missed {where}"
            rows = read_rows(nano.path)
            served += rows is not None
            assert rows is None or np.array_equal(rows, want), f"wrong rows after {where}"
            flip(bit)
    assert served < PAYLOAD_FLIPS  # some flips lie in records, so some reads must have refused
    verify(nano.path)


def test_any_byte_of_a_record_refuses_that_record_alone(nano: Nano, tmp_path: Path) -> None:
    (shard,) = (nano.path / "tables").glob("records-*")
    stride = open_bundle(nano.path).manifest.tiers[0].stride
    size_bytes = shard.stat().st_size
    assert nano.slot_of_token_V is not None
    token = int(np.flatnonzero(nano.slot_of_token_V == 9)[0])
    with flipper(shard) as flip:
        for byte in range(stride):
            bit = 8 * (size_bytes - (64 - 9) * stride + byte) + byte % 8
            flip(bit)
            with pytest.raises(BundleError, match="slot 9 does not match its CRC"):
                open_bundle(nano.path).rows([token])
            flip(bit)
    verify(nano.path)


@pytest.mark.parametrize("how", ["swapped", "duplicated", "shifted by one"])
def test_records_in_the_place_of_others_are_refused(how: str, tmp_path: Path) -> None:
    """Whole intact records, as a misdirected write of a block would leave them."""
    nano = write_nano(tmp_path / "b.tol")
    (shard,) = (nano.path / "tables").glob("records-*")
    (tier,) = open_bundle(nano.path).manifest.tiers
    data = bytearray(shard.read_bytes())
    start = len(data) - tier.num_rows * tier.stride
    records = np.frombuffer(data, np.uint8, offset=start).reshape(tier.num_rows, tier.stride)
    before = records.copy()
    moved = {
        "swapped": lambda: before[[7, 5, 6, 4]],
        "duplicated": lambda: before[[4, 4, 4, 4]],
        "shifted by one": lambda: before[[5, 6, 7, 8]],
    }[how]()
    records[4:8] = moved
    shard.write_bytes(data)
    bundle = open_bundle(nano.path)
    expected = nano.rows_VKD
    refused = 0
    for token in range(tier.num_rows):
        try:
            assert np.array_equal(bundle.rows([token])[0], expected[token])
        except BundleError:
            refused += 1
    assert refused >= 2
    with pytest.raises(BundleError):
        verify(nano.path)


def test_verify_says_where_the_damage_is(tmp_path: Path) -> None:
    nano = write_nano(
        tmp_path / "b.tol", [{"name": "raw", "dtype": "f32"}], vocab_size=9000, hidden_size=80,
        counts=False,
    )  # fmt: skip
    (shard,) = (nano.path / "tables").glob("records-*")
    assert shard.stat().st_size > 2 << 20
    with flipper(shard) as flip:
        flip(8 * (1 << 20) + 3)
    with pytest.raises(BundleError, match="bytes 1,048,576 to 2,097,152"):
        verify(nano.path)


def test_an_edited_record_with_a_fitting_crc_is_still_noticed(tmp_path: Path) -> None:
    nano = write_nano(tmp_path / "b.tol")
    edit_record(nano.path, 3, lambda record: record.__setitem__(0, record[0] ^ 1))
    assert detected(nano.path)
    assert read_rows_or_none(nano.path) is None


def read_rows_or_none(path: Path) -> np.ndarray | None:
    try:
        return open_bundle(path).rows(np.arange(40))
    except TolError:
        return None


def test_progress_counts_every_byte(nano: Nano) -> None:
    seen: list[int] = []
    report = verify(nano.path, on_bytes=seen.append)
    assert sum(seen) == report.size_bytes == open_bundle(nano.path).manifest.bundle_bytes
    assert report.num_records == 64 and report.identity == nano.identity


@pytest.mark.parametrize("operation", ["read", "map", "read-done", "map-done"])
def test_a_failing_disk_is_not_called_a_bad_bundle(nano: Nano, operation: str) -> None:
    calls = []

    def count(what: str, _: str) -> None:
        if what == operation:
            calls.append(what)

    def fail_at(number: int) -> Callable[[str, str], None]:
        left = [number]

        def hook(what: str, _: str) -> None:
            if what == operation:
                left[0] -= 1
                if left[0] == 0:
                    raise OSError(5, "Input/output error")

        return hook

    with fault_hook(count):
        verify(nano.path)
    assert len(calls) > 3
    for number in range(1, len(calls) + 1):
        with fault_hook(fail_at(number)):
            with pytest.raises(ResourceError, match="input/output error") as caught:
                verify(nano.path)
        assert caught.value.exit_code == 6
