"""Partial tables: which tokens get a record, as asked for and as the manifest says it.

V vocabulary.
"""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt

from tolkit.errors import UsageError
from tolkit.sources import TableSource
from tolkit_formats.limits import NO_SLOT
from tolkit_formats.partial import Partial

__all__ = ["keep_rows", "parse_keep_rows", "partial_of", "stored_slots"]

_PERCENT = re.compile(r"(\d{1,3})(?:\.(\d{1,6}))?\s*%")
_ONE = 10**6


def parse_keep_rows(text: str, vocab_size: int) -> int:
    """``5000`` or ``25%`` -> rows; P % means floor(P x V / 100), at least 1.

    Raises:
        UsageError: not of that form, or not 1..V.
    """
    text = text.strip()
    percent = _PERCENT.fullmatch(text)
    if percent:
        # Through integers, so that a share never depends on binary fractions.
        share = int(percent[1]) * _ONE + int((percent[2] or "").ljust(6, "0"))
        if not 0 < share <= 100 * _ONE:
            raise UsageError(f"--keep-rows: {text}, expected above 0 to 100 %")
        return max(1, share * vocab_size // (100 * _ONE))
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise UsageError(f"--keep-rows: {text!r} is not a number of rows", hint="write 5000 or 25%")
    if not 1 <= int(text) <= vocab_size:
        raise UsageError(f"--keep-rows: {text}, expected 1 to {vocab_size:,} (the vocabulary)")
    return int(text)


def keep_rows(source: TableSource, text: str | None) -> None:
    """Let `source` write records of its most frequent tokens only (mutated); None changes nothing.

    Raises:
        UsageError: see `parse_keep_rows`; counts are not known; more rows than a partial bundle
            has, or fewer than all of a bundle without FFN weights.
    """
    if text is not None:
        source.keep_rows(parse_keep_rows(text, source.vocab_size))


def partial_of(source: TableSource) -> Partial | None:
    """What the manifest says of the tokens that get a record; None where all do."""
    if source.num_rows == source.vocab_size:
        return None
    counts_V, slots_V = source.token_counts_V, source.slot_of_token_V
    assert slots_V is not None, "only frequent tokens are kept, so there is an order"
    total = 0 if counts_V is None else int(counts_V.sum(dtype=np.uint64))
    if counts_V is None or not total:
        return Partial(source.num_rows, None)
    kept = int(counts_V[slots_V < source.num_rows].sum(dtype=np.uint64))
    return Partial(source.num_rows, kept / total)


def stored_slots(source: TableSource) -> npt.NDArray[np.uint32] | None:
    """Token -> slot for tables/slots, U32 [V]; None where slot = token id."""
    slots_V = source.slot_of_token_V
    if slots_V is None or source.num_rows == source.vocab_size:
        return slots_V
    return np.where(slots_V < source.num_rows, slots_V, np.uint32(NO_SLOT)).astype(np.uint32)
