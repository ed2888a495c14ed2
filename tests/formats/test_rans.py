"""Bytes of the rANS coder against plain integers, both ways."""

from __future__ import annotations

import numpy as np
import pytest
from _rans_oracle import TOTAL, drawn, round_trip, skewed_tables, starts
from hypothesis import given, settings
from hypothesis import strategies as st

from tolkit_formats import rans
from tolkit_formats.errors import BundleError, UsageError
from tolkit_formats.rans import MAX_LANES, Models, decode, encode, normalised


@pytest.fixture(params=["lockstep", "singly", "chunks"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All ways through the code on the same small rows."""
    monkeypatch.setattr(rans, "_FEW_STREAMS", 10**9 if request.param == "singly" else 0)
    if request.param == "chunks":
        monkeypatch.setattr(rans, "_MAX_STREAMS", 5)
        monkeypatch.setattr(rans, "_CHECKED_AT_ONCE", 7)
        monkeypatch.setattr("tolkit_formats.rans_streams._BLOCK_VALUES", 12)
    return request.param


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_bytes_are_the_oracles(data: st.DataObject) -> None:
    num_symbols = data.draw(st.sampled_from([1, 2, 3, 16, 255, 256]), "S")
    num_models = data.draw(st.integers(1, 4), "K")
    num_positions = data.draw(st.integers(0, 40), "C")
    num_rows = data.draw(st.integers(0, 5), "N")
    lanes = data.draw(st.sampled_from([1, 2, 3, 7, 64, MAX_LANES]), "lanes")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), "seed"))
    models = skewed_tables(num_models, num_symbols, rng)
    model_of_C = rng.integers(0, num_models, num_positions).astype(np.uint8)
    # unlikely symbols as often as likely ones: every frequency above 0 is met
    allowed = [np.flatnonzero(models.freqs_KS[k]) for k in model_of_C]
    columns = [rng.choice(symbols, num_rows) for symbols in allowed]
    symbols_NC = np.array(columns, np.uint8).reshape(num_positions, num_rows).T.copy()
    round_trip(symbols_NC, model_of_C, models, lanes)


@pytest.mark.parametrize("lanes", [1, 2, 5])
def test_every_way_through_the_code(way: str, lanes: int) -> None:
    rng = np.random.default_rng(5)
    models = skewed_tables(6, 9, rng)
    model_of_C = rng.integers(0, 6, 53).astype(np.uint8)
    round_trip(drawn(13, model_of_C, models, rng), model_of_C, models, lanes)


def test_example_of_the_page() -> None:
    models = Models(np.array([[1024, 12288, 3072]], np.uint16))
    row = "1 2 1 1 0 1 1 2 1 1 0 2 1 2 2 1 0 0 1 1 1 1 2 1"
    symbols_NC = np.array([row.split()], np.uint8)
    for lanes, expected in ((1, "08 43 c3 73 00 74"), (2, "04 00 1c de 75 00 b0 6c 02")):
        assert round_trip(symbols_NC, np.zeros(24, np.uint8), models, lanes).hex(" ") == expected


def test_lanes_longer_than_one_length_byte() -> None:
    rng = np.random.default_rng(6)
    models = Models(np.full((1, 256), TOTAL // 256, np.uint16))
    model_of_C = np.zeros(600, np.uint8)
    symbols_NC = rng.integers(0, 256, (3, 600)).astype(np.uint8)
    data = round_trip(symbols_NC, model_of_C, models, 2)
    assert data[0] & 0x80


def test_lanes_of_very_different_length(way: str) -> None:
    models = Models(np.array([[TOTAL - 1, 1]], np.uint16))
    model_of_C = np.zeros(200, np.uint8)
    symbols_NC = np.zeros((4, 200), np.uint8)
    symbols_NC[0, ::2] = symbols_NC[1, 1::2] = symbols_NC[2] = 1
    round_trip(symbols_NC, model_of_C, models, 2)


def test_models_of_one_peak_keep_their_numbers_order() -> None:
    freqs = [[TOTAL // 2, TOTAL // 2, 0], [0, TOTAL // 2, TOTAL // 2]]
    models = Models(np.array(freqs, np.uint16))
    model_of_C = np.array([1, 0, 1, 0, 0, 1] * 4, np.uint8)
    symbols_NC = np.array([[1, 0, 2, 1, 0, 1] * 4, [2, 1, 1, 1, 0, 2] * 4], np.uint8)
    round_trip(symbols_NC, model_of_C, models, 1)


def test_a_state_at_the_lower_bound_reads_nothing(way: str) -> None:
    """Rows made so that a state is 2^16 exactly after a symbol, with words still to come."""
    models = Models(np.full((1, 256), 64, np.uint16))
    rng = np.random.default_rng(15)
    rows: list[list[int]] = []
    while len(rows) < 3:
        row, x, hit = [], 0, False
        for symbol in rng.integers(0, 256, 300).tolist():
            full = x >= 64 * 2**18
            x = x // 2**16 if full else x
            if full and x // 64 == 4:
                symbol, hit = 0, hit or x == 256
            x = x // 64 * TOTAL + 64 * symbol + x % 64
            row.insert(0, symbol)
        rows += [row] * hit
    round_trip(np.array(rows, np.uint8), np.zeros(300, np.uint8), models, 1)


@pytest.mark.parametrize("rare", [1, 2, 100])
def test_near_certain_tables(rare: int, way: str) -> None:
    models = Models(np.array([[rare, TOTAL - rare]], np.uint16))
    model_of_C = np.zeros(300, np.uint8)
    symbols_NC = np.ones((4, 300), np.uint8)
    symbols_NC[1, ::7] = 0
    symbols_NC[2] = 0
    symbols_NC[3, -1] = 0
    round_trip(symbols_NC, model_of_C, models, 1)
    lengths, _ = encode(symbols_NC, model_of_C, models, 1)
    assert lengths[0] == 0 and lengths[3] <= 2


def test_rows_without_choice_take_no_bytes() -> None:
    freqs = np.zeros((2, 5), np.uint16)
    freqs[0, 3] = freqs[1, 0] = TOTAL
    symbols_NC = np.tile(np.array([3, 0, 3, 3], np.uint8), (6, 1))
    model_of_C = np.array([0, 1, 0, 0], np.uint8)
    for lanes in (1, 4, 256):
        assert round_trip(symbols_NC, model_of_C, Models(freqs), lanes) == b""


def test_positions_without_choice_cost_nothing_among_others() -> None:
    rng = np.random.default_rng(7)
    freqs = np.zeros((2, 4), np.uint16)
    freqs[0, 2] = TOTAL
    freqs[1] = TOTAL // 4
    mixed = np.array([0, 1, 0, 0, 1, 1, 0], np.uint8)
    symbols_NC = rng.integers(0, 4, (8, 7)).astype(np.uint8)
    symbols_NC[:, mixed == 0] = 2
    alone = symbols_NC[:, mixed == 1]
    with_certain = round_trip(symbols_NC, mixed, Models(freqs), 2)
    assert with_certain == round_trip(alone, mixed[mixed == 1], Models(freqs), 2)


@pytest.mark.parametrize(("num_rows", "num_positions"), [(0, 0), (0, 3), (4, 0), (1, 1)])
def test_empty_shapes(num_rows: int, num_positions: int, way: str) -> None:
    models = Models(np.array([[TOTAL - 5, 5]], np.uint16))
    symbols_NC = np.ones((num_rows, num_positions), np.uint8)
    round_trip(symbols_NC, np.zeros(num_positions, np.uint8), models, 3)


def test_rows_are_read_in_any_order_and_alone() -> None:
    rng = np.random.default_rng(8)
    models = skewed_tables(5, 12, rng)
    model_of_C = rng.integers(0, 5, 80).astype(np.uint8)
    symbols_NC = drawn(40, model_of_C, models, rng)
    lengths, data = encode(symbols_NC, model_of_C, models, 2)
    data.flags.writeable = False
    for ids in ([39], [7, 7, 0], list(range(39, -1, -1))):
        offsets = starts(lengths)[ids].astype(np.uint64)
        decoded = decode(data, offsets, lengths[ids].astype(np.uint16), model_of_C, models, 2)
        assert np.array_equal(decoded, symbols_NC[ids])


def test_inputs_stay_and_bytes_repeat() -> None:
    rng = np.random.default_rng(9)
    models = skewed_tables(5, 12, rng)
    model_of_C = rng.integers(0, 5, 80).astype(np.uint8)
    symbols_NC = drawn(9, model_of_C, models, rng)
    for array in (symbols_NC, model_of_C):
        array.flags.writeable = False
    lengths, data = encode(symbols_NC, model_of_C, models, 3)
    again, same = encode(np.asfortranarray(symbols_NC), model_of_C, models, 3)
    assert np.array_equal(lengths, again) and np.array_equal(data, same)
    apart = [encode(row[None], model_of_C, models, 3)[1].tobytes() for row in symbols_NC]
    assert b"".join(apart) == data.tobytes()


def test_cost_is_within_bytes_of_the_entropy() -> None:
    rng = np.random.default_rng(10)
    sharpness = np.geomspace(0.3, 9.0, 32)[:, None]
    models = Models(normalised(np.exp(-sharpness * np.abs(np.arange(-8, 9)))))
    model_of_C = np.sort(rng.integers(0, 32, 2000)).astype(np.uint8)
    symbols_NC = drawn(64, model_of_C, models, rng)
    ideal = models.cost_bits(symbols_NC, model_of_C) / 8
    for lanes, allowed in ((1, 1.3), (4, 9.0), (16, 45.0)):
        lengths, _ = encode(symbols_NC, model_of_C, models, lanes)
        extra = lengths - ideal
        assert -0.01 < extra.mean() < allowed
        assert extra.max() < allowed + 3, extra


@pytest.mark.parametrize("symbol", [2, 3, 200])
def test_symbols_without_frequency_cannot_be_coded(symbol: int, way: str) -> None:
    models = Models(np.array([[TOTAL - 5, 5, 0], [TOTAL, 0, 0]], np.uint16))
    symbols_NC = np.zeros((9, 4), np.uint8)
    symbols_NC[6, 2] = symbol
    with pytest.raises(UsageError, match=f"row 6, position 2: model 0 gives symbol {symbol} no"):
        encode(symbols_NC, np.array([0, 0, 0, 1], np.uint8), models)
    symbols_NC[6, 2] = 0
    symbols_NC[5, 3] = 1
    with pytest.raises(UsageError, match="row 5, position 3: model 1 gives symbol 1 no frequency"):
        encode(symbols_NC, np.array([0, 0, 0, 1], np.uint8), models)


@pytest.mark.parametrize("lanes", [0, -1, 257])
def test_lanes_out_of_range(lanes: int) -> None:
    models = Models(np.array([[TOTAL]], np.uint16))
    with pytest.raises(UsageError, match=f"lanes: expected 1 to 256, got {lanes}"):
        encode(np.zeros((1, 1), np.uint8), np.zeros(1, np.uint8), models, lanes)


def test_positions_of_unknown_models() -> None:
    models = Models(np.array([[TOTAL]], np.uint16))
    with pytest.raises(BundleError, match="position 1: expected a model below 1, got 7"):
        encode(np.zeros((1, 2), np.uint8), np.array([0, 7], np.uint8), models)
