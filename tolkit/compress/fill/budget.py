"""The price of a bit that a budget of bytes calls for, and the widths that fill it.

V vocabulary, L layers, D hidden, T tiers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tolkit.compress.fill.allocate import Allocation, fill, widths_at
from tolkit.compress.fill.resolve import BandsLayer, layer_codecs, resolve
from tolkit.compress.fill.walk_bands import LayerFit
from tolkit.errors import UsageError
from tolkit_formats.codecs import Bands
from tolkit_formats.predictor import Predictor
from tolkit_formats.reader import shared_name
from tolkit_formats.records import STRIDE_MULTIPLE, Tier, lay_out
from tolkit_formats.sizes import table_bytes

__all__ = [
    "MOST_WALKS",
    "Filled",
    "Shape",
    "fill_budget",
    "require_room",
    "search_price",
    "size_at",
    "smallest_bytes",
]

MOST_WALKS = 7
_CLOSE = 0.05  # relative change of the price that another walk is not worth


@dataclass(frozen=True)
class Shape:
    """What of the bundle decides bytes besides widths."""

    layers: tuple[int, ...]
    hidden_size: int
    tier_rows: tuple[int, ...]
    mapped_vocab_size: int | None


@dataclass(frozen=True)
class Filled:
    """A budget, filled: everything to store, and exactly how large it will be.

    walks: that the search for the price took.
    """

    layers: Mapping[int, BandsLayer]
    tiers: tuple[Tier, ...]
    table_bytes: int
    walks: int = 0


def search_price(
    walk: Callable[[float], list[LayerFit]], shape: Shape, budget_bytes: int
) -> tuple[float, list[LayerFit]]:
    """The price at which a walk's needs fit the budget, and the fits of that walk.

    A walk says what variances its price leads to; the price that would fill the budget with those
    is tried next, until it stays. The steps shrink by an even factor (0.26 on the reference
    model), so from the third on their sum is foreseen; that takes four walks.

    Raises:
        UsageError: the budget is below what the smallest bundle takes.
    """
    fits = walk(0.0)
    tried = [math.log(_fitting_price(fits, shape, budget_bytes))]
    foreseen = False
    for _ in range(MOST_WALKS - 1):
        fits = walk(math.exp(tried[-1]))
        fitting = math.log(_fitting_price(fits, shape, budget_bytes))
        if abs(fitting - tried[-1]) < _CLOSE:
            break
        tried.append(fitting)
        if len(tried) >= 3 and not foreseen:
            tried[-1], foreseen = _limit(*tried[-3:]), True
    return math.exp(tried[-1]), fits


def _limit(first: float, second: float, third: float) -> float:
    """Where three steps of a geometric series lead (Aitken); the third if they are none."""
    ratio = (third - second) / (second - first) if second != first else 1.0
    return third + (third - second) * ratio / (1 - ratio) if 0 < ratio < 0.9 else third


def fill_budget(fits: Sequence[LayerFit], shape: Shape, budget_bytes: int) -> Filled:
    """Widths for at most `budget_bytes` under tables/, headers and checksums counted.

    Raises:
        UsageError: not even records without codes fit; says how much would.
    """
    best = _Sized.of(fits, shape, 0)
    if best.table_bytes > budget_bytes:
        predicts = any(fit.predictor is not None for fit in fits)
        raise _below(budget_bytes, best.table_bytes, shape, predicts)
    # More records also bring more rows of bases, so what is left for records has to be searched.
    low, high = 0, budget_bytes + 1
    while high - low > STRIDE_MULTIPLE:
        middle = (low + high) // 2
        sized = _Sized.of(fits, shape, middle)
        if sized.table_bytes <= budget_bytes:
            low, best = middle, sized
        else:
            high = middle
    decided = resolve(fits, best.allocation, shape.hidden_size)
    return Filled(dict(zip(shape.layers, decided, strict=True)), best.tiers, best.table_bytes)


def require_room(shape: Shape, floor_bytes: int, budget_bytes: int, predicts: bool) -> None:
    """UsageError where `budget_bytes` is below the floor, before anything is fitted."""
    if floor_bytes > budget_bytes:
        raise _below(budget_bytes, floor_bytes, shape, predicts)


def _below(budget_bytes: int, floor_bytes: int, shape: Shape, predicts: bool) -> UsageError:
    values = shape.hidden_size * sum(shape.tier_rows) * len(shape.layers)
    return UsageError(
        f"budget: {budget_bytes:,} bytes are below the floor: means{', predictions' * predicts} "
        f"and empty records of {sum(shape.tier_rows):,} tokens take {floor_bytes:,} bytes "
        f"({8 * floor_bytes / values:.3f} bits/value of the kept layers)",
        hint=f"give at least {floor_bytes:,} bytes{', or --predict 0' * predicts}",
    )


@dataclass(frozen=True)
class _Sized:
    """An allocation and what it takes, before any array is made."""

    allocation: Allocation
    tiers: tuple[Tier, ...]
    table_bytes: int

    @classmethod
    def of(cls, fits: Sequence[LayerFit], shape: Shape, record_bytes: int) -> _Sized:
        allocation = fill([fit.need for fit in fits], shape.tier_rows, record_bytes)
        decided = {
            layer: layer_codecs(fit, widths_TR, shape.hidden_size)
            for layer, fit, widths_TR in zip(shape.layers, fits, allocation.widths, strict=True)
        }
        tiers: list[Tier] = []
        first_slot = 0
        for index, rows in enumerate(shape.tier_rows):
            codecs = [(layer, decision.codecs[index]) for layer, decision in decided.items()]
            tiers.append(lay_out(codecs, rows, index=index, first_slot=first_slot))
            first_slot += rows
        shapes = {
            shared_name(layer, name): stored
            for layer, decision in decided.items()
            for name, stored in decision.shared_shapes().items()
        }
        size = table_bytes(tiers, shapes, mapped_vocab_size=shape.mapped_vocab_size)
        return cls(allocation, tuple(tiers), size)


def smallest_bytes(shape: Shape, predictor_bits: int) -> int:
    """Bytes under tables/ of the smallest bundle: means, predictions, records without codes."""
    width = shape.hidden_size
    codec = Bands(width, 0, (), (), (), 0)
    shapes = dict(codec.shared_shapes())
    if predictor_bits:
        shapes |= Predictor(width, predictor_bits).shared_shapes()
    tiers: list[Tier] = []
    first_slot = 0
    for index, rows in enumerate(shape.tier_rows):
        planes = [(layer, replace(codec, tier=index)) for layer in shape.layers]
        tiers.append(lay_out(planes, rows, index=index, first_slot=first_slot))
        first_slot += rows
    shared = {
        shared_name(layer, name): array for layer in shape.layers for name, array in shapes.items()
    }
    return table_bytes(tiers, shared, mapped_vocab_size=shape.mapped_vocab_size)


def size_at(fits: Sequence[LayerFit], shape: Shape, price: float) -> float:
    """Bytes under tables/ at a price, by whole widths without packing: good to a few per cent."""
    rows_T = np.array(shape.tier_rows, np.float64)
    total = 8.0 * float(rows_T.sum())  # CRC and half a step of padding
    if shape.mapped_vocab_size is not None:
        total += 4 * shape.mapped_vocab_size
    for fit in fits:
        widths_TR = widths_at(fit.need.worth_TR, price)
        used_R = widths_TR.max(axis=0) > 0
        total += float((widths_TR.sum(axis=1) * rows_T).sum()) / 8
        total += float((fit.basis_bits_R[used_R] * shape.hidden_size).sum()) / 8
        total += 2.0 * int((widths_TR > 0).sum()) + 2.0 * shape.hidden_size
        if fit.predictor is not None:
            weights = fit.predictor.codes_RD.numel()
            total += fit.predictor_bits * weights / 8 + 2.0 * shape.hidden_size
    return total * (1 + 32 / (1 << 20))


def _fitting_price(fits: Sequence[LayerFit], shape: Shape, budget_bytes: int) -> float:
    """Bisection over log(price); the needs stay as they are."""
    largest = max((float(fit.need.worth_TR.max(initial=0)) for fit in fits), default=0.0)
    if largest <= 0:
        return 1.0
    low, high = math.log(largest) - 60, math.log(largest)
    for _ in range(60):
        middle = (low + high) / 2
        if size_at(fits, shape, math.exp(middle)) > budget_bytes:
            low = middle
        else:
            high = middle
    return math.exp(high)
