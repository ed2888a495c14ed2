"""Static rANS: many short rows of symbols, each its own stream of bytes (SPEC, same title).

N rows, C positions of a row, P of them coded (their model leaves a choice), A lanes in use
(min(lanes, P)), M = N * A streams, S symbols, B steps in a block.

A state is a 32-bit number in [2^16, 2^32); it starts at 0 and simply grows into that interval, so
a stream costs its information and about half a byte, and a row without choice nothing. A stream
has ended well when the state is 0 again and every byte is read. Lanes are separate streams: each
costs a length byte and about another byte, and none waits for the others.

Own code rather than a library: constriction (0.5) decodes one record faster than numpy can, but
builds its tables from floats by rules of its own, writes whole 32-bit words and takes no batch,
so its bytes cannot be what a specification prescribes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tolkit_formats.errors import BundleError, UsageError
from tolkit_formats.rans_lanes import length_bytes, put_lengths
from tolkit_formats.rans_models import PROB_BITS, Models, normalised
from tolkit_formats.rans_streams import Streams, decode_lockstep, decode_singly

__all__ = ["MAX_LANES", "PROB_BITS", "Models", "RowCoder", "decode", "encode", "normalised"]

MAX_LANES = 256
_FEW_STREAMS = 24  # below, plain integers beat numpy's cost a call
_MAX_STREAMS = 8192  # above, the working arrays leave the cache
_MAX_SYMBOLS_AT_ONCE = 1 << 25
_CHECKED_AT_ONCE = 1 << 20
_HEAD_BOUNDS = np.array([1, 1 << 8, 1 << 16, 1 << 24], np.uint32)  # one more byte from here on

_U8 = npt.NDArray[np.uint8]
_U32 = npt.NDArray[np.uint32]
_I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Layout:
    """Which positions are coded, in which order, by which model, in how many lanes.

    The least certain come first. The encoder starts at the other end, where a state that is still
    small costs least, and lanes that take turns get equal shares of every kind of position.
    """

    coded_P: _I64
    model_P: _I64
    lanes: int  # A

    @classmethod
    def of(cls, model_of_C: _U8, models: Models, lanes: int) -> _Layout:
        if not 1 <= lanes <= MAX_LANES:
            raise UsageError(f"lanes: expected 1 to {MAX_LANES}, got {lanes}")
        wrong = np.flatnonzero(model_of_C >= models.num_models)
        if wrong.size:
            raise BundleError(
                f"entropy models, position {wrong[0]}: expected a model below "
                f"{models.num_models}, got {model_of_C[wrong[0]]}"
            )
        coded_P = np.flatnonzero(models.certain_K[model_of_C] < 0)
        model_P = model_of_C[coded_P]
        coded_P = coded_P[np.lexsort((coded_P, model_P, models.peak_K[model_P]))]
        return cls(coded_P, model_of_C[coded_P].astype(np.int64), min(lanes, len(coded_P)))

    def chunks(self, num_rows: int, num_positions: int) -> Iterator[slice]:
        """Runs of rows that keep the working arrays small."""
        size = min(
            _MAX_STREAMS // max(1, self.lanes), _MAX_SYMBOLS_AT_ONCE // max(1, num_positions)
        )
        size = max(1, size)
        return (slice(at, min(at + size, num_rows)) for at in range(0, num_rows, size))


class RowCoder:
    """`encode` and `decode` for rows of one layout, which is worked out once.

    Args:
        model_of_C: uint8 [C], the model of every position.
        lanes: interleaved states of a row, 1 to 256. Each beyond the first costs about 1.5 bytes
            a row and lets a reader of few rows decode that many symbols at a time.

    Raises:
        BundleError: a position names a model that does not exist.
    """

    def __init__(self, model_of_C: _U8, models: Models, lanes: int = 1) -> None:
        self.model_of_C, self.models = model_of_C, models
        self._layout = _Layout.of(model_of_C, models, lanes)

    @property
    def num_positions(self) -> int:
        """C, symbols of a row."""
        return len(self.model_of_C)

    def encode(self, symbols_NC: _U8) -> tuple[_I64, _U8]:
        """As the function `encode`."""
        assert symbols_NC.dtype == np.uint8 and symbols_NC.shape[1:] == self.model_of_C.shape
        lengths, parts = [np.zeros(0, np.int64)], [np.zeros(0, np.uint8)]
        for rows in self._layout.chunks(*symbols_NC.shape):
            _require_codable(symbols_NC[rows], self.model_of_C, self.models, rows.start)
            length_N, part = _encode_rows(symbols_NC[rows], self._layout, self.models)
            lengths.append(length_N)
            parts.append(part)
        return np.concatenate(lengths), np.concatenate(parts)

    def decode(
        self, data: _U8, offsets_N: npt.NDArray[np.integer], lengths_N: npt.NDArray[np.integer]
    ) -> _U8:
        """As the function `decode`."""
        assert data.dtype == np.uint8 and data.ndim == 1
        layout, models = self._layout, self.models
        spans = _spans(offsets_N, lengths_N, len(data))
        certain_C = np.maximum(models.certain_K[self.model_of_C], 0).astype(np.uint8)
        out_NC = np.empty((len(spans), self.num_positions), np.uint8)
        for rows in layout.chunks(*out_NC.shape):
            pieces = [data[at:end] for at, end in spans[rows]]
            streams = Streams.of(pieces, layout.lanes, rows.start)
            symbols_CN = np.repeat(certain_C[:, None], rows.stop - rows.start, axis=1)
            if layout.lanes:
                few = len(streams.states_M) < _FEW_STREAMS
                decoder = decode_singly if few else decode_lockstep
                symbols_CN[layout.coded_P] = decoder(streams, layout.model_P, models)
            streams.require_ended()
            out_NC[rows] = symbols_CN.T
        return out_NC


def encode(symbols_NC: _U8, model_of_C: _U8, models: Models, lanes: int = 1) -> tuple[_I64, _U8]:
    """Each row as an independent stream of bytes, the streams one after the other.

    Args:
        symbols_NC: uint8 [N, C].
        model_of_C: uint8 [C], the model of every position.
        lanes: interleaved states of a row, 1 to 256. Each beyond the first costs about 1.5 bytes
            a row and lets a reader of few rows decode that many symbols at a time.

    Returns:
        (int64 [N] bytes of each row, uint8 [sum of them]).

    Raises:
        UsageError: a symbol its model gives no frequency; the message names row and position.
        BundleError: a position names a model that does not exist.
    """
    return RowCoder(model_of_C, models, lanes).encode(symbols_NC)


def decode(
    data: _U8,
    offsets_N: npt.NDArray[np.integer],
    lengths_N: npt.NDArray[np.integer],
    model_of_C: _U8,
    models: Models,
    lanes: int = 1,
) -> _U8:
    """The symbols of the rows whose bytes are ``data[offset : offset + length]``.

    Accepts exactly the bytes `encode` can write for these models and lanes; different accepted
    bytes give different symbols. It cannot tell a damaged stream that happens to be another
    row's: a checksum must.

    Args:
        data: uint8, one axis; may be mapped, only the rows asked for are read.
        offsets_N, lengths_N: integers [N], in any order.

    Returns:
        uint8 [N, C], freshly allocated, C-contiguous.

    Raises:
        BundleError: a row lies outside `data` or is no stream; the message names its index here.
    """
    return RowCoder(model_of_C, models, lanes).decode(data, offsets_N, lengths_N)


def _require_codable(symbols_NC: _U8, model_of_C: _U8, models: Models, first_row: int) -> None:
    size = max(1, _CHECKED_AT_ONCE // max(1, len(model_of_C)))
    for first in range(0, len(symbols_NC), size):
        symbols = symbols_NC[first : first + size]
        known = np.minimum(symbols, models.num_symbols - 1)
        freqs = models.freqs_KS[model_of_C, known]
        wrong = np.argwhere((symbols >= models.num_symbols) | (freqs == 0))
        if wrong.size:
            row, position = wrong[0].tolist()
            raise UsageError(
                f"row {first_row + first + row}, position {position}: model "
                f"{model_of_C[position]} gives symbol {symbols[row, position]} no frequency",
                hint="count the symbols of all rows before the tables are made",
            )


def _encode_rows(symbols_NC: _U8, layout: _Layout, models: Models) -> tuple[_I64, _U8]:
    symbols_PN = np.ascontiguousarray(symbols_NC.T[layout.coded_P])
    states = np.zeros(len(symbols_NC) * layout.lanes, np.uint32)
    base_P = layout.model_P * models.num_symbols
    freqs_KS = models.freqs_KS.astype(np.uint32).ravel()
    starts_KS = models.starts_KS.ravel()
    emitters: list[npt.NDArray[np.uint16]] = [np.zeros(0, np.uint16)]
    words: list[npt.NDArray[np.uint16]] = [np.zeros(0, np.uint16)]
    for first in reversed(range(0, len(base_P), max(1, layout.lanes))):
        step = slice(first, first + layout.lanes)
        at = (symbols_PN[step] + base_P[step, None]).ravel()
        state = states[: len(at)]
        freq = freqs_KS.take(at)
        full = (state >= freq << np.uint32(32 - PROB_BITS)).nonzero()[0]
        if full.size:
            emitters.append(full.astype(np.uint16))
            words.append(state[full].astype(np.uint16))
            state[full] >>= np.uint32(16)
        state += state // freq * (np.uint32(1 << PROB_BITS) - freq)
        state += starts_KS.take(at)
    return _assemble(states, np.concatenate(emitters), np.concatenate(words), len(symbols_NC))


def _assemble(
    states: _U32,
    emitters: npt.NDArray[np.uint16],
    words: npt.NDArray[np.uint16],
    num_rows: int,
) -> tuple[_I64, _U8]:
    """Bytes of the rows from final states and from the words in the order they were emitted."""
    order = np.argsort(emitters[::-1], kind="stable")
    emitters, words = emitters[::-1][order], words[::-1][order]
    num_words = np.bincount(emitters, minlength=len(states))
    heads = np.searchsorted(_HEAD_BOUNDS, states, side="right")
    lengths_NA = (heads + 2 * num_words).reshape(-1, num_rows).T
    prefix_N = length_bytes(lengths_NA)
    lengths_N = prefix_N + lengths_NA.sum(axis=1)
    row_N = np.cumsum(lengths_N) - lengths_N
    data = np.empty(int(lengths_N.sum()), np.uint8)
    put_lengths(data, row_N, lengths_NA)
    start_NA = (row_N + prefix_N)[:, None] + np.cumsum(lengths_NA, axis=1) - lengths_NA
    starts = start_NA.T.ravel()
    for byte in range(4):
        has = heads > byte
        data[starts[has] + byte] = (states[has] >> np.uint32(8 * byte)).astype(np.uint8)
    nth = np.arange(len(words)) - (np.cumsum(num_words) - num_words)[emitters]
    where = (starts + heads)[emitters] + 2 * nth
    data[where] = words.astype(np.uint8)
    data[where + 1] = (words >> np.uint16(8)).astype(np.uint8)
    return lengths_N, data


def _spans(
    offsets_N: npt.NDArray[np.integer], lengths_N: npt.NDArray[np.integer], size_bytes: int
) -> list[tuple[int, int]]:
    """First byte and end of each row; BundleError where they lie outside `size_bytes`."""
    offsets, lengths = offsets_N.tolist(), lengths_N.tolist()
    spans = [(at, at + length) for at, length in zip(offsets, lengths, strict=True)]
    for row, (at, end) in enumerate(spans):
        if not 0 <= at <= end <= size_bytes:
            raise BundleError(
                f"row {row}, entropy-coded record: {end - at} bytes at {at} lie outside the "
                f"{size_bytes} bytes there are"
            )
    return spans
