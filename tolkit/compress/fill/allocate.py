"""Widths of coefficients: one water level over layers, tiers and components (LAB finding 4).

T tiers, R components of a layer. A bit is worth what squared error it removes from a row, times
the row's weight and the component's importance. With the distortion of whole widths convex, taking
bits by falling worth is the best use of any number of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tolkit.compress.fill.lloyd import DISTORTION
from tolkit_formats.codecs.base import ALIGNMENT_BYTES
from tolkit_formats.records import CRC_BYTES, STRIDE_MULTIPLE

__all__ = ["Allocation", "LayerNeed", "fill", "widths_at"]

_GAINS = DISTORTION[:-1] - DISTORTION[1:]
_PACKET_BITS = 8 * ALIGNMENT_BYTES
_PACKETS_A_STEP = STRIDE_MULTIPLE // ALIGNMENT_BYTES

Widths = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LayerNeed:
    """What one layer's coefficients would be worth.

    Attributes:
        worth_TR: weight of the tier x importance x variance: squared error a row has without bits.
    """

    worth_TR: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Allocation:
    """Widths [T, R] of every layer, and the bytes of a record in each tier."""

    widths: tuple[Widths, ...]
    strides: tuple[int, ...]

    def record_bytes(self, rows: Sequence[int]) -> int:
        """Bytes of all records of `rows` rows a tier."""
        return sum(stride * n for stride, n in zip(self.strides, rows, strict=True))


def widths_at(worth_TR: npt.NDArray[np.float64], price: float) -> Widths:
    """Each component gets bits for as long as one more removes at least `price`."""
    gains = worth_TR[..., None] * _GAINS
    return np.asarray((gains >= price).cumprod(axis=-1).sum(axis=-1), np.int64)


def fill(needs: Sequence[LayerNeed], rows: Sequence[int], record_bytes: int) -> Allocation:
    """The widths that remove most squared error with at most `record_bytes` of records.

    Bits come in packets of 4 bytes of one layer in one tier, and four packets at a time make a
    tier's records 16 bytes longer, so that no bit of padding is left over. Steps are taken by
    what they remove a byte, those that do not fit any more are passed over.

    Args:
        rows: of each tier.

    Returns:
        the smallest possible records where `record_bytes` is below them.
    """
    tiers = len(rows)
    taken = [[0] * len(needs) for _ in range(tiers)]
    steps: list[tuple[float, int, list[int]]] = []  # worth a byte, tier, layers of its packets
    for tier in range(tiers):
        steps += _steps(needs, tier)
    steps.sort(key=lambda step: -step[0])
    left = record_bytes - sum(STRIDE_MULTIPLE * n for n in rows)
    blocked = set()
    strides = [STRIDE_MULTIPLE] * tiers
    first_done = [False] * tiers
    for _, tier, layers in steps:
        if tier in blocked:
            continue
        # The first step of a tier shares its 16 bytes with the CRC.
        size = 0 if not first_done[tier] else STRIDE_MULTIPLE * rows[tier]
        if size > left:
            blocked.add(tier)  # a tier's steps have to be taken in order
            continue
        first_done[tier] = True
        left -= size
        strides[tier] += STRIDE_MULTIPLE if size else 0
        for layer in layers:
            taken[tier][layer] += 1
    widths = tuple(
        np.stack([_first_bits(need, tier, taken[tier][layer]) for tier in range(tiers)])
        for layer, need in enumerate(needs)
    )
    return Allocation(widths, tuple(strides))


def _steps(needs: Sequence[LayerNeed], tier: int) -> list[tuple[float, int, list[int]]]:
    """The packets of a tier by falling worth, bundled into what fits 16 more bytes."""
    packets: list[tuple[float, int]] = []
    for layer, need in enumerate(needs):
        gains = np.sort(_gains(need, tier), axis=None)[::-1]
        gains = gains[gains > 0]
        whole = np.pad(gains, (0, -len(gains) % _PACKET_BITS)).reshape(-1, _PACKET_BITS)
        packets += [(float(worth), layer) for worth in whole.sum(axis=1)]
    packets.sort(key=lambda packet: (-packet[0], packet[1]))
    steps = []
    start = 0
    size = _PACKETS_A_STEP - CRC_BYTES // ALIGNMENT_BYTES
    while start < len(packets):
        group = packets[start : start + size]
        worth = sum(p[0] for p in group) / STRIDE_MULTIPLE
        if start == 0:
            worth = float("inf")  # these bytes are there anyway
        steps.append((worth, tier, [layer for _, layer in group]))
        start += size
        size = _PACKETS_A_STEP
    return steps


def _gains(need: LayerNeed, tier: int) -> npt.NDArray[np.float64]:
    """Worth of each further bit of each component: [R, 8], falling along the last axis."""
    gains: npt.NDArray[np.float64] = need.worth_TR[tier][:, None] * _GAINS
    return gains


def _first_bits(need: LayerNeed, tier: int, packets: int) -> Widths:
    """Widths [R] after the best `packets` packets of bits."""
    gains = _gains(need, tier)
    order = np.argsort(-gains, axis=None, kind="stable")[: packets * _PACKET_BITS]
    order = order[gains.reshape(-1)[order] > 0]
    return np.bincount(order // gains.shape[1], minlength=len(gains)).astype(np.int64)
