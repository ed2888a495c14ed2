"""Decoding of rANS streams: their bytes taken apart, then all of them stepped at once.

N rows, A lanes, M = A * N streams in lane-major order, P coded positions, B steps in a block,
T = 2^PROB_BITS slots of a model. Stream m is lane m // N of row m % N.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tolkit_formats.rans_lanes import read_lengths, refuse
from tolkit_formats.rans_models import PROB_BITS, Models

__all__ = ["LOWER_STATE", "Streams", "decode_lockstep", "decode_singly"]

LOWER_STATE = 1 << 16  # least state of a stream with words to come
_HEAD_BYTES = 4
_MASK = (1 << PROB_BITS) - 1
_BLOCK_VALUES = 1 << 17

_U8 = npt.NDArray[np.uint8]
_U32 = npt.NDArray[np.uint32]
_I64 = npt.NDArray[np.int64]


@dataclass
class Streams:
    """M streams part way: decoding moves `states_M` and `at_M` and nothing else."""

    data: _U8  # the bytes of all rows and a few zeros
    states_M: _U32
    at_M: _I64  # the next unread byte
    end_M: _I64
    num_rows: int
    first_row: int  # for messages

    @classmethod
    def of(cls, rows: Sequence[_U8], lanes: int, first_row: int) -> Streams:
        """The streams of these rows' bytes, heads read.

        Raises:
            BundleError: lane lengths that do not fit the row, or a head that ends in a zero byte.
        """
        data = np.concatenate([*rows, np.zeros(_HEAD_BYTES, np.uint8)])
        end_N = np.cumsum([len(row) for row in rows], dtype=np.int64)
        at_N = np.concatenate([np.zeros(1, np.int64), end_N[:-1]])
        if not lanes:
            refuse(end_N > at_N, first_row, "expected no bytes where no position leaves a choice")
            return cls(data, np.zeros(0, np.uint32), at_N[:0], at_N[:0], len(rows), first_row)
        lengths_NA, at_N = read_lengths(data, at_N, end_N, lanes, first_row)
        end_M = (at_N[:, None] + np.cumsum(lengths_NA, axis=1)).T.ravel()
        length_M = lengths_NA.T.ravel()
        head_M = np.where(length_M > _HEAD_BYTES, _HEAD_BYTES - length_M % 2, length_M)
        at_M = end_M - length_M
        states_M = np.zeros(len(at_M), np.uint32)
        for byte in range(_HEAD_BYTES):
            value_M = data[at_M + byte].astype(np.uint32) << np.uint32(8 * byte)
            states_M += np.where(head_M > byte, value_M, np.uint32(0))
        at_M += head_M
        zero_M = (head_M > 0) & (data[at_M - 1] == 0)
        refuse(
            zero_M.reshape(lanes, -1).any(axis=0), first_row, "a lane's state ends in a zero byte"
        )
        return cls(data, states_M, at_M, end_M, len(rows), first_row)

    def require_ended(self) -> None:
        """BundleError names the first row with a lane that is not back at state 0.

        A state with words to come is at least LOWER_STATE, so at 0 all are read.
        """
        if self.states_M.any():
            open_N = self.states_M.reshape(-1, self.num_rows).max(axis=0) > 0
            refuse(open_N, self.first_row, "its bytes do not end where its symbols do")


def decode_lockstep(streams: Streams, model_P: _I64, models: Models) -> _U8:
    """uint8 [P, N]: one numpy operation steps all streams; best for many."""
    words = streams.data[:-1] | streams.data[1:].astype(np.uint32) << np.uint32(8)
    lower_after = np.full(len(words), LOWER_STATE, np.uint32)
    has_words = streams.at_M < streams.end_M
    lower_after[streams.end_M[has_words] - 2] = 0
    lower_M = np.where(has_words, np.uint32(LOWER_STATE), np.uint32(0))
    symbols_PN = np.empty((len(model_P), streams.num_rows), np.uint8)
    lanes = len(streams.states_M) // streams.num_rows
    whole = len(model_P) // lanes * lanes
    stepper = _Stepper(streams, words, lower_after, lower_M, models)
    stepper.run(lanes, model_P[:whole], symbols_PN[:whole])
    if whole < len(model_P):
        stepper.run(len(model_P) - whole, model_P[whole:], symbols_PN[whole:])
    return symbols_PN


@dataclass(frozen=True)
class _Stepper:
    """Steps the first lanes of all rows; a lane without words left has lower bound 0."""

    streams: Streams
    words: npt.NDArray[np.uint32]  # the little-endian word at every byte
    lower_after: npt.NDArray[np.uint32]  # a stream's lower bound after the word there is read
    lower_M: npt.NDArray[np.uint32]
    models: Models

    def run(self, lanes: int, model_P: _I64, symbols_PN: _U8) -> None:
        """Decode P positions, a multiple of `lanes`, into `symbols_PN`."""
        num_rows = self.streams.num_rows
        base_SA1 = (model_P << PROB_BITS).reshape(-1, lanes, 1)
        size = max(1, _BLOCK_VALUES // (lanes * num_rows))
        slots_BAN = np.empty((min(size, len(base_SA1)), lanes, num_rows), np.int64)
        for first in range(0, len(base_SA1), size):
            base_BA1 = base_SA1[first : first + size]
            slots = slots_BAN[: len(base_BA1)]
            self._run_block(base_BA1, slots)
            decoded = self.models.symbols_KT.take(slots)
            at = first * lanes
            symbols_PN[at : at + len(base_BA1) * lanes] = decoded.reshape(-1, num_rows)

    def _run_block(self, base_BA1: _I64, slots_BAN: _I64) -> None:
        lanes, num_rows = slots_BAN.shape[1:]
        steps = self.models.steps_KT
        state_M = self.streams.states_M[: lanes * num_rows]
        lower_M = self.lower_M[: lanes * num_rows]
        state_AN = state_M.reshape(lanes, num_rows)
        entry_AN, freq_AN = np.empty_like(state_AN), np.empty_like(state_AN)
        mask, bits = np.uint32(_MASK), np.uint32(PROB_BITS)
        for base_A1, slot_AN in zip(base_BA1, slots_BAN, strict=True):
            np.bitwise_and(state_AN, mask, out=slot_AN)
            np.add(slot_AN, base_A1, out=slot_AN)
            steps.take(slot_AN, out=entry_AN, mode="clip")
            np.right_shift(state_AN, bits, out=state_AN)
            np.right_shift(entry_AN, bits, out=freq_AN)
            np.multiply(state_AN, freq_AN, out=state_AN)
            np.bitwise_and(entry_AN, mask, out=entry_AN)
            np.add(state_AN, entry_AN, out=state_AN)
            low = (state_M < lower_M).nonzero()[0]
            if low.size:
                at = self.streams.at_M[low]
                state_M[low] = state_M[low] << np.uint32(16) | self.words[at]
                lower_M[low] = self.lower_after[at]
                self.streams.at_M[low] = at + 2


def decode_singly(streams: Streams, model_P: _I64, models: Models) -> _U8:
    """uint8 [P, N]: one stream after the other in plain integers; best for few."""
    symbols_PN = np.empty((len(model_P), streams.num_rows), np.uint8)
    lanes = len(streams.states_M) // streams.num_rows
    steps, data = models.steps_KT.data, streams.data.tobytes()
    for lane in range(lanes):
        bases = (model_P[lane::lanes] << PROB_BITS).tolist()
        for row in range(streams.num_rows):
            stream = lane * streams.num_rows + row
            state, at = int(streams.states_M[stream]), int(streams.at_M[stream])
            end = int(streams.end_M[stream])
            slots = []
            for base in bases:
                slot = base + (state & _MASK)
                slots.append(slot)
                entry = steps[slot]
                state = (entry >> PROB_BITS) * (state >> PROB_BITS) + (entry & _MASK)
                if state < LOWER_STATE and at < end:
                    state = state << 16 | data[at + 1] << 8 | data[at]
                    at += 2
            symbols_PN[lane::lanes, row] = models.symbols_KT[slots]
            streams.states_M[stream], streams.at_M[stream] = state, at
    return symbols_PN
