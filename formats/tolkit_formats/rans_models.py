"""The integer frequency tables of entropy-coded records (SPEC, section on the rANS coder).

K models, S symbols of the alphabet, T = 2^PROB_BITS slots a model shares out among its symbols.

PROB_BITS is 14. Over models of near-certain symbols (0.09 bits a symbol) rounding to 2^12, 2^14,
2^15 costs 0.58, 0.10, 0.04 %; over wider ones (1.6 bits) 0.07, 0.01, 0.004 %. A model's slots then
take 64 KiB, and frequency and offset share a 32-bit word.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import numpy.typing as npt

from tolkit_formats.errors import BundleError, UsageError

__all__ = ["MAX_MODELS", "MAX_SYMBOLS", "PROB_BITS", "Models", "normalised"]

PROB_BITS = 14
MAX_MODELS = 256
MAX_SYMBOLS = 256
_TOTAL = 1 << PROB_BITS


class Models:
    """K checked frequency tables over one alphabet of S symbols; immutable.

    Args:
        freqs_KS: uint16 [K, S], 1 <= K, S <= 256; every row sums to 2^PROB_BITS. A symbol of
            frequency 0 cannot be coded, one of frequency 2^PROB_BITS is certain and costs nothing.

    Raises:
        BundleError: another shape or type, or a row with another sum; the message names the row.
    """

    def __init__(self, freqs_KS: npt.NDArray[np.uint16]) -> None:
        if freqs_KS.dtype != np.uint16 or freqs_KS.ndim != 2:
            raise BundleError(
                "entropy models: expected a uint16 array [models, symbols], got "
                f"{freqs_KS.dtype} {list(freqs_KS.shape)}"
            )
        num_models, num_symbols = freqs_KS.shape
        if not (1 <= num_models <= MAX_MODELS and 1 <= num_symbols <= MAX_SYMBOLS):
            raise BundleError(
                f"entropy models: expected 1 to {MAX_MODELS} models of 1 to {MAX_SYMBOLS} "
                f"symbols, got {num_models} of {num_symbols}"
            )
        sums_K = freqs_KS.sum(axis=1, dtype=np.int64)
        wrong = np.flatnonzero(sums_K != _TOTAL)
        if wrong.size:
            raise BundleError(
                f"entropy models, model {wrong[0]}: expected frequencies that sum to {_TOTAL}, "
                f"got {sums_K[wrong[0]]}"
            )
        self.freqs_KS = freqs_KS.copy()
        self.freqs_KS.flags.writeable = False

    @property
    def num_models(self) -> int:
        """K."""
        return int(self.freqs_KS.shape[0])

    @property
    def num_symbols(self) -> int:
        """S."""
        return int(self.freqs_KS.shape[1])

    @cached_property
    def certain_K(self) -> npt.NDArray[np.int64]:
        """int64 [K]: the symbol that has the whole mass of a model, or -1."""
        return np.where(self.peak_K == _TOTAL, self.freqs_KS.argmax(axis=1), np.int64(-1))

    @cached_property
    def peak_K(self) -> npt.NDArray[np.uint16]:
        """uint16 [K]: the largest frequency of a model."""
        return np.asarray(self.freqs_KS.max(axis=1), np.uint16)

    @cached_property
    def starts_KS(self) -> npt.NDArray[np.uint32]:
        """uint32 [K, S]: a symbol's first slot; symbols stand in `_order_KS`."""
        freqs_KS = np.take_along_axis(self.freqs_KS, self._order_KS, axis=1).astype(np.uint32)
        sorted_KS = np.cumsum(freqs_KS, axis=1, dtype=np.uint32) - freqs_KS
        starts_KS = np.empty_like(sorted_KS)
        np.put_along_axis(starts_KS, self._order_KS, sorted_KS, axis=1)
        return starts_KS

    @cached_property
    def symbols_KT(self) -> npt.NDArray[np.uint8]:
        """uint8 [K * T]: the symbol that owns a slot."""
        freqs_KS = np.take_along_axis(self.freqs_KS, self._order_KS, axis=1)
        return np.repeat(self._order_KS.astype(np.uint8).ravel(), freqs_KS.ravel())

    @cached_property
    def steps_KT(self) -> npt.NDArray[np.uint32]:
        """uint32 [K * T]: frequency << PROB_BITS | slot - start, what a decoding step needs."""
        freqs_KS = self.freqs_KS.astype(np.uint32)
        # wraps below 0 and back above when the slot is added
        entries_KS = (freqs_KS << np.uint32(PROB_BITS)) - self.starts_KS
        owned_KS = np.take_along_axis(self.freqs_KS, self._order_KS, axis=1)
        entries_KS = np.take_along_axis(entries_KS, self._order_KS, axis=1)
        slots = np.tile(np.arange(_TOTAL, dtype=np.uint32), self.num_models)
        return np.asarray(np.repeat(entries_KS.ravel(), owned_KS.ravel()) + slots, np.uint32)

    @cached_property
    def _order_KS(self) -> npt.NDArray[np.int64]:
        """Symbols by falling frequency, ties by number: state 0 then stays 0 for free longest."""
        return np.argsort(-self.freqs_KS.astype(np.int64), axis=1, kind="stable")

    def cost_bits(
        self, symbols_NC: npt.NDArray[np.uint8], model_of_C: npt.NDArray[np.uint8]
    ) -> npt.NDArray[np.float64]:
        """float64 [N]: the ideal cost in bits of each row, -sum of log2(frequency / T)."""
        with np.errstate(divide="ignore"):
            bits_KS = PROB_BITS - np.log2(self.freqs_KS.astype(np.float64))
        cost_N = np.zeros(len(symbols_NC))
        for symbols_N, model in zip(symbols_NC.T, model_of_C, strict=True):
            cost_N += bits_KS[model].take(symbols_N)
        return cost_N


def normalised(counts_KS: npt.NDArray[np.integer | np.floating]) -> npt.NDArray[np.uint16]:
    """Frequency tables that code symbols of these counts at the least cost.

    Every symbol with a count above 0 gets at least 1, the others 0, rows sum to 2^PROB_BITS.
    Units are handed out where one more saves most bits until no exchange of two helps. Only
    additions, products and quotients decide, never a logarithm, so that equal counts give equal
    tables on every machine; ties go to the lower symbol.

    Args:
        counts_KS: numbers >= 0 [K, S], finite; weights need not be whole.

    Returns:
        uint16 [K, S], for `Models`.

    Raises:
        UsageError: a count is negative or not finite, or a row has none; the message names it.
    """
    counts = np.asarray(counts_KS, np.float64)
    if counts.ndim != 2 or not 1 <= counts.shape[1] <= MAX_SYMBOLS:
        raise UsageError(
            f"counts: expected an array [models, 1 to {MAX_SYMBOLS} symbols], "
            f"got {list(counts.shape)}"
        )
    wrong = np.argwhere(~np.isfinite(counts) | (counts < 0))
    if wrong.size:
        model, symbol = wrong[0].tolist()
        raise UsageError(
            f"counts of model {model}, symbol {symbol}: expected a finite number >= 0, "
            f"got {counts[model, symbol]}"
        )
    empty = np.flatnonzero(~(counts > 0).any(axis=1))
    if empty.size:
        raise UsageError(f"counts of model {empty[0]}: expected a symbol that occurs, got none")
    counts = counts / counts.max(axis=1, keepdims=True)
    occurs = np.asarray(counts_KS) > 0
    share = counts / np.cumsum(counts, axis=1)[:, -1:]  # unlike sum, one order of additions
    freqs = np.where(occurs, np.maximum(np.floor(share * _TOTAL), 1), 0)
    _settle(freqs, counts, occurs)
    return freqs.astype(np.uint16)


def _settle(
    freqs_KS: npt.NDArray[np.float64],
    counts_KS: npt.NDArray[np.float64],
    occurs_KS: npt.NDArray[np.bool_],
) -> None:
    """Move single units, in place, until rows sum to T and no exchange lowers the cost."""
    rows = np.arange(len(freqs_KS))
    while rows.size:
        freqs, counts, occurs = freqs_KS[rows], counts_KS[rows], occurs_KS[rows]
        missing = _TOTAL - freqs.sum(axis=1)
        gains = np.where(occurs, counts * _log_step(np.maximum(freqs, 1)), -1.0)
        losses = np.where(freqs > 1, counts * _log_step(np.maximum(freqs - 1, 1)), np.inf)
        to, source = gains.argmax(axis=1), losses.argmin(axis=1)
        at = np.arange(len(rows))
        swap = (missing == 0) & (gains[at, to] > losses[at, source])
        give, take = (missing > 0) | swap, (missing < 0) | swap
        freqs_KS[rows[give], to[give]] += 1
        freqs_KS[rows[take], source[take]] -= 1
        rows = rows[give | take]


def _log_step(freqs: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """log((f + 1) / f) to a part in a thousand at f = 1 and far better beyond (Pade)."""
    return np.asarray((6 * freqs + 3) / (6 * freqs * freqs + 6 * freqs + 1), np.float64)
