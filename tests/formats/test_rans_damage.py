"""What the rANS decoder refuses, and that all it accepts is what some row encodes to."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from _rans_oracle import (
    TOTAL,
    RefusedError,
    drawn,
    naive_decode,
    skewed_tables,
    starts,
)

from tolkit_formats import rans
from tolkit_formats.errors import BundleError
from tolkit_formats.rans import Models, decode, encode


@pytest.fixture(params=["lockstep", "singly"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both decoders on the same rows."""
    monkeypatch.setattr(rans, "_FEW_STREAMS", 10**9 if request.param == "singly" else 0)
    return request.param


def short_streams() -> tuple[np.ndarray, Models, list[bytes]]:
    rng = np.random.default_rng(11)
    models = skewed_tables(4, 5, rng)
    model_of_C = rng.integers(0, 4, 60).astype(np.uint8)
    symbols_NC = drawn(6, model_of_C, models, rng)
    lengths, data = encode(symbols_NC, model_of_C, models, 2)
    rows = [data.tobytes()[at : at + n] for at, n in zip(starts(lengths), lengths, strict=True)]
    return model_of_C, models, rows


def decoded_or_none(row: bytes, model_of_C: np.ndarray, models: Models, lanes: int) -> list | None:
    data = np.frombuffer(row, np.uint8)
    try:
        at, size = np.array([0]), np.array([len(row)])
        return decode(data, at, size, model_of_C, models, lanes)[0].tolist()
    except BundleError as error:
        assert error.message.startswith("row 0, entropy-coded record: ")
        return None


def naively_decoded_or_none(row: bytes, *args: object) -> list | None:
    try:
        return naive_decode(row, *args)  # type: ignore[arg-type]
    except RefusedError:
        return None


def test_damaged_rows_are_refused_or_another_rows_bytes(way: str) -> None:
    """Every bit flipped, every truncation, bytes added: what passes is what that row encodes to."""
    model_of_C, models, rows = short_streams()
    oracle = (model_of_C.tolist(), models.freqs_KS.tolist(), 2)
    tried, passed = 0, 0
    for row in rows:
        flips = [
            row[:at] + bytes([row[at] ^ 1 << bit]) + row[at + 1 :]
            for at, bit in itertools.product(range(len(row)), range(8))
        ]
        cuts = [row[:size] for size in range(len(row))]
        longer = [row + b"\0", row + b"\0\0", b"\0" + row, row + row, row + b"\1\2"]
        for damaged in flips + cuts + longer:
            symbols = decoded_or_none(damaged, model_of_C, models, 2)
            tried += 1
            assert symbols == naively_decoded_or_none(damaged, *oracle)
            if symbols is not None:
                passed += 1
                assert (
                    encode(np.array([symbols], np.uint8), model_of_C, models, 2)[1].tobytes()
                    == damaged
                )
    assert 0 < passed < tried / 10


@pytest.mark.parametrize("lanes", [1, 2])
def test_accepted_is_what_some_row_encodes_to(lanes: int) -> None:
    """All rows of a small alphabet against all strings of a byte and many longer ones."""
    models = Models(np.array([[TOTAL - 9, 8, 1], [TOTAL - 600, 600, 0]], np.uint16))
    model_of_C = np.array([0, 1, 1], np.uint8)
    rows = itertools.product(*(np.flatnonzero(models.freqs_KS[k]) for k in model_of_C))
    symbols_NC = np.array(list(rows), np.uint8)
    lengths, data = encode(symbols_NC, model_of_C, models, lanes)
    written = {data.tobytes()[at : at + n] for at, n in zip(starts(lengths), lengths, strict=True)}
    assert len(written) == len(symbols_NC)
    rng = np.random.default_rng(14)
    strings = {bytes([value]) for value in range(256)} | {b""} | written
    strings |= {rng.bytes(size) for size in (2, 3, 4, 5, 6) for _ in range(400)}
    for string in sorted(strings):
        accepted = decoded_or_none(string, model_of_C, models, lanes) is not None
        assert accepted == (string in written), string


def test_first_damaged_row_is_named(way: str) -> None:
    rng = np.random.default_rng(12)
    models = Models(np.full((1, 256), TOTAL // 256, np.uint16))
    model_of_C = np.zeros(20, np.uint8)
    lengths, data = encode(rng.integers(0, 256, (9, 20)).astype(np.uint8), model_of_C, models, 1)
    short = lengths.copy()
    short[7] -= 2
    short[4] -= 2
    with pytest.raises(BundleError, match="row 4, entropy-coded record: its bytes do not end"):
        decode(data, starts(lengths), short, model_of_C, models, 1)


@pytest.mark.parametrize(("offset", "length"), [(-1, 2), (0, 11), (10, 1), (4, -1), (2**62, 2**62)])
def test_rows_outside_the_data(offset: int, length: int) -> None:
    models = Models(np.array([[TOTAL - 5, 5]], np.uint16))
    with pytest.raises(BundleError, match=r"row 1, entropy-coded record: .* lie outside the 10"):
        decode(
            np.zeros(10, np.uint8),
            np.array([0, offset]),
            np.array([0, length]),
            np.zeros(3, np.uint8),
            models,
        )


@pytest.mark.parametrize(
    ("row", "what"),
    [
        (b"", "lengths of its lanes run past it"),
        (b"\x80", "lengths of its lanes run past it"),
        (b"\x80\x00\x01", "not in shortest form"),
        (b"\xff\xff\xff\xff\x01", "more than 4 bytes"),
        (b"\x05\x01\x02", "lanes are longer than it"),
        (b"\x02\x01\x00", "state ends in a zero byte"),
        (b"\x00\xff\xff\xff\xff\x01", "do not end where its symbols do"),
    ],
)
def test_rows_that_are_no_streams(row: bytes, what: str) -> None:
    models = Models(np.array([[TOTAL - 5, 5]], np.uint16))
    with pytest.raises(BundleError, match=what):
        decode(
            np.frombuffer(row, np.uint8),
            np.array([0]),
            np.array([len(row)]),
            np.zeros(4, np.uint8),
            models,
            2,
        )


def test_bytes_where_nothing_is_coded() -> None:
    models = Models(np.array([[TOTAL]], np.uint16))
    with pytest.raises(BundleError, match="row 1, entropy-coded record: expected no bytes"):
        decode(
            np.ones(1, np.uint8), np.array([0, 0]), np.array([0, 1]), np.zeros(2, np.uint8), models
        )
