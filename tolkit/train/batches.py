"""Which windows a step sees: a pure function of seed and step.

The stream is cut into W windows of T + 1 ids (inputs and their successors; neighbours share one
id). Every epoch visits each window once, in an order drawn from (seed, epoch) by a Feistel
network, so nothing is shuffled in memory and resuming needs no generator state.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tolkit.errors import DataError

__all__ = ["WindowOrder", "permute"]

_ROUNDS = 6


@dataclass(frozen=True)
class WindowOrder:
    """Windows of `length` inputs over `ids` (U32 [n]), in the order of `seed`."""

    ids: npt.NDArray[np.uint32]
    length: int
    seed: int

    def __post_init__(self) -> None:
        if len(self.ids) <= self.length:
            raise DataError(
                f"text: {len(self.ids)} tokens, shorter than one window of {self.length} + 1",
                hint="give more text or a smaller --sequence",
            )

    @property
    def windows(self) -> int:
        """W, windows of one epoch."""
        return (len(self.ids) - 1) // self.length

    def batch(self, step: int, batch: int) -> npt.NDArray[np.int64]:
        """Ids [batch, T + 1] of optimiser step `step`, counted from 0."""
        samples = np.arange(step * batch, (step + 1) * batch, dtype=np.uint64)
        epochs, places = np.divmod(samples, np.uint64(self.windows))
        numbers = np.empty_like(places)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            numbers[inside] = permute(places[inside], self.windows, (self.seed, int(epoch)))
        return self.take(numbers)

    def take(self, numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """Windows `numbers` [b] as ids [b, T + 1]."""
        starts = numbers.astype(np.int64)[:, None] * self.length
        windows: npt.NDArray[np.int64] = self.ids[starts + np.arange(self.length + 1)].astype("i8")
        return windows


def permute(
    places: npt.NDArray[np.uint64], size: int, key: tuple[int, int]
) -> npt.NDArray[np.uint64]:
    """Image of `places` (each below `size`) under the permutation of range(size) named by `key`.

    A balanced Feistel network over the next even number of bits; images outside the range walk
    on until they fall inside (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low_mask = np.uint64((1 << half) - 1)
    seed = np.uint64(key[0] % (1 << 64)) ^ _mix(np.uint64(key[1]))
    keys = [_mix(seed, salt) for salt in range(_ROUNDS)]
    result = places.astype(np.uint64)
    outside = np.ones(len(result), bool)
    while outside.any():
        value = result[outside]
        left, right = value >> np.uint64(half), value & low_mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & low_mask)
        result[outside] = (left << np.uint64(half)) | right
        outside = result >= np.uint64(size)
    return result


def _mix(values: npt.NDArray[np.uint64] | np.uint64, salt: int = 0) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64: every input bit reaches every output bit."""
    with np.errstate(over="ignore"):
        z = np.asarray(values, np.uint64) + np.uint64((salt + 1) * 0x9E3779B97F4A7C15 % (1 << 64))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
