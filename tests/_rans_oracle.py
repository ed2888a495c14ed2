"""The rANS coder in plain integers, one symbol at a time, written from the page alone."""

from __future__ import annotations

import functools

import numpy as np

from tolkit_formats.rans import Models, decode, encode, normalised

TOTAL = 16_384


@functools.cache
def naive_slots(freqs: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """The symbol of every slot, by falling frequency, then number; the first slot of each."""
    order = sorted(range(len(freqs)), key=lambda symbol: (-freqs[symbol], symbol))
    slots = [symbol for symbol in order for _ in range(freqs[symbol])]
    return slots, [slots.index(symbol) if freqs[symbol] else -1 for symbol in range(len(freqs))]


def naive_places(tables: list[list[int]], model_of: list[int]) -> list[int]:
    coded = [c for c, model in enumerate(model_of) if max(tables[model]) < TOTAL]
    return sorted(coded, key=lambda c: (max(tables[model_of[c]]), model_of[c], c))


def naive_number(value: int) -> bytes:
    if value < 128:
        return bytes([value])
    return bytes([value % 128 + 128]) + naive_number(value // 128)


def naive_encode(row: list[int], model_of: list[int], tables: list[list[int]], lanes: int) -> bytes:
    places = naive_places(tables, model_of)
    streams = []
    for lane in range(min(lanes, len(places))):
        x, words = 0, b""
        for c in reversed(places[lane :: min(lanes, len(places))]):
            start = naive_slots(tuple(tables[model_of[c]]))[1][row[c]]
            f = tables[model_of[c]][row[c]]
            if x >= f * 2**18:
                words = (x % 2**16).to_bytes(2, "little") + words
                x //= 2**16
            x = x // f * TOTAL + start + x % f
        streams.append(x.to_bytes(-(-x.bit_length() // 8), "little") + words)
    prefix = b""
    for lane, stream in enumerate(streams[:-1]):
        d = len(stream) - (len(streams[lane - 1]) if lane else 0)
        prefix += naive_number(d if not lane else 2 * d if d >= 0 else -2 * d - 1)
    return prefix + b"".join(streams)


class RefusedError(Exception):
    pass


def naive_decode(row: bytes, model_of: list[int], tables: list[list[int]], lanes: int) -> list[int]:
    def need(condition: bool) -> None:
        if not condition:
            raise RefusedError

    symbols = [
        table.index(TOTAL) if TOTAL in table else -1 for table in map(tables.__getitem__, model_of)
    ]
    places = naive_places(tables, model_of)
    num_lanes = min(lanes, len(places))
    lengths: list[int] = []
    for lane in range(num_lanes - 1):
        value, digits = 0, 0
        while True:
            need(len(row) > 0 and digits < 4)
            digit, row = row[0], row[1:]
            value += digit % 128 * 128**digits
            digits += 1
            if digit < 128:
                break
        need(digits == 1 or digit > 0)
        if lane:
            value = lengths[-1] + (value // 2 if value % 2 == 0 else -(value + 1) // 2)
        lengths.append(value)
    lengths.append(len(row) - sum(lengths))
    need(all(length >= 0 for length in lengths))
    if not places:
        need(not row)
    for lane in range(num_lanes):
        stream, row = row[: lengths[lane]], row[lengths[lane] :]
        m = len(stream)
        h = m if m <= 4 else 4 if m % 2 == 0 else 3
        head, rest = stream[:h], stream[h:]
        need(h == 0 or head[-1] > 0)
        x = int.from_bytes(head, "little")
        for c in places[lane::num_lanes]:
            slots, firsts = naive_slots(tuple(tables[model_of[c]]))
            slot = x % TOTAL
            symbols[c] = slots[slot]
            x = tables[model_of[c]][slots[slot]] * (x // TOTAL) + slot - firsts[slots[slot]]
            assert x < 2**32
            if x < 2**16 and rest:
                x, rest = x * 2**16 + int.from_bytes(rest[:2], "little"), rest[2:]
        need(x == 0 and not rest)
    return symbols


def skewed_tables(num_models: int, num_symbols: int, rng: np.random.Generator) -> Models:
    """From nearly flat to nearly certain, a few symbols missing."""
    sharpness = np.geomspace(0.05, 6.0, num_models)
    weights = np.exp(-sharpness[:, None] * rng.permuted(np.arange(num_symbols)))
    weights[rng.random(weights.shape) < 0.1] = 0
    weights[np.arange(num_models), rng.integers(0, num_symbols, num_models)] += 1e-3
    return Models(normalised(weights))


def drawn(
    num_rows: int, model_of_C: np.ndarray, models: Models, rng: np.random.Generator
) -> np.ndarray:
    """Rows as likely as the models say."""
    slots = [naive_slots(tuple(freqs))[0] for freqs in models.freqs_KS.tolist()]
    columns = [np.array(slots[k])[rng.integers(0, TOTAL, num_rows)] for k in model_of_C]
    return np.array(columns, np.uint8).reshape(len(columns), num_rows).T.copy()


def starts(lengths_N: np.ndarray) -> np.ndarray:
    return np.cumsum(lengths_N) - lengths_N


def round_trip(symbols_NC: np.ndarray, model_of_C: np.ndarray, models: Models, lanes: int) -> bytes:
    """Encoded and decoded, both as the oracle has it; the bytes."""
    lengths, data = encode(symbols_NC, model_of_C, models, lanes)
    tables, model_of = models.freqs_KS.tolist(), model_of_C.tolist()
    rows = [naive_encode(row, model_of, tables, lanes) for row in symbols_NC.tolist()]
    assert lengths.tolist() == [len(row) for row in rows]
    assert data.tobytes() == b"".join(rows)
    decoded = decode(data, starts(lengths), lengths, model_of_C, models, lanes)
    assert decoded.dtype == np.uint8 and decoded.flags.c_contiguous
    assert np.array_equal(decoded, symbols_NC)
    assert [naive_decode(row, model_of, tables, lanes) for row in rows] == symbols_NC.tolist()
    return data.tobytes()
