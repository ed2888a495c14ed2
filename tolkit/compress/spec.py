"""What a user can ask of compression, parsed and checked before anything is read.

V vocabulary, L layers, D hidden, R rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

from tolkit.errors import UsageError
from tolkit_formats.codecs import Codec, codec_from_json
from tolkit_formats.codecs.expansion import MAX_WIDTH

__all__ = [
    "BandsWish",
    "BITS_TO_CODEC",
    "CODEC_NAMES",
    "DEFAULT_GROUP_SIZE",
    "CompressSpec",
    "DropSpec",
    "middle_layers",
    "named_codec",
    "parse_auto_drop",
    "parse_layers",
    "parse_predict",
    "parse_ranks",
    "parse_size",
]

_PREDICTOR_BITS = 3
_PREDICTOR_SHARE = 0.3

DEFAULT_GROUP_SIZE = 64
MAX_BITS_PER_VALUE = 32.0
CODEC_NAMES = ("int8", "int4", "nf4", "fp4")
CODINGS = ("fixed", "entropy")
BITS_TO_CODEC = {16: "f16", 8: "int8", 4: "nf4"}
_RAW_NAMES = ("f32", "f16", "bf16")
_RANGE = re.compile(r"(\d+)(?:-(\d*))?\Z")


@dataclass(frozen=True)
class BandsWish:
    """How `bands` shall look.

    Attributes:
        transform: ``klt`` (a stored basis) or ``hadamard`` (none).
        predictor_bits: of weights that predict rows from embeddings; 0 for none, None decides by
            the share of the budget they would take (`decided`).
        tiers: at most so many.
    """

    transform: str = "klt"
    predictor_bits: int | None = None
    tiers: int = 8

    def decided(self, vocab_size: int, hidden_size: int, bits_per_value: float) -> BandsWish:
        """The same with `predictor_bits` set: _PREDICTOR_BITS unless they take too much."""
        if self.predictor_bits is not None:
            return self
        share = _PREDICTOR_BITS * hidden_size / vocab_size / bits_per_value
        bits = _PREDICTOR_BITS if share <= _PREDICTOR_SHARE else 0
        return replace(self, predictor_bits=bits)


@dataclass(frozen=True)
class CompressSpec:
    """One compression, as asked for.

    Attributes:
        rank: ``50%``, ``1024`` or per layer ``0-3:1024,4-:256``; None keeps full rank.
        codec: of coefficients or rows: one of CODEC_NAMES, ``f16``, ``bf16``, ``f32``; None
            means f16.
        drop: original indices of layers to leave out.
        fold: add a dropped table to the next kept layer (False: the paper's plain drop).
        feedback: each layer pays back what earlier ones lost.
        weights: ``auto`` (counts where known), ``none``, or the path of a counts file.
        into: where to fold each layer of `drop`; None takes the next kept one.
        chosen_by: how `drop` was chosen, for the history.
        bits_per_value, budget_bytes: ceiling on true bytes under tables/, for codec ``bands``,
            which they imply.
        calibration: file of `tol calibrate`, for ``bands``.
        bands: its other parameters.
        coding: of ``bands``: ``fixed`` (records of one length, packed widths) or ``entropy``
            (codec ``steps``, format 1.1: records of variable length, smaller and slower).
        keep_rows: store only the most frequent tokens, ``5000`` or ``25%`` of V; rows of others
            are computed from FFN weights that the bundle keeps (format 1.2). None stores all.
    """

    rank: str | None = None
    codec: str | None = None
    drop: tuple[int, ...] = ()
    fold: bool = True
    feedback: bool = True
    weights: str = "auto"
    into: Mapping[int, int] | None = None
    chosen_by: Mapping[str, Any] = field(default_factory=dict)
    bits_per_value: float | None = None
    budget_bytes: int | None = None
    calibration: str | None = None
    bands: BandsWish | None = None
    coding: str = "fixed"
    keep_rows: str | None = None

    def __post_init__(self) -> None:
        if self.bits_per_value is not None or self.budget_bytes is not None:
            object.__setattr__(self, "codec", self.codec or "bands")
        if self.codec == "bands":
            object.__setattr__(self, "bands", self.bands or BandsWish())
            self._check_bands()
            return
        if self.bits_per_value is not None or self.budget_bytes is not None:
            raise UsageError(
                f"--codec: {self.codec} has a size of its own and fills no budget",
                hint="leave --codec out, a budget is filled by codec bands",
            )
        if self.coding != "fixed":
            raise UsageError("--coding: is for codec bands", hint="add --bits-per-value")
        if self.calibration is not None:
            raise UsageError("--calibration: is used by codec bands", hint="add --bits-per-value")
        if self.codec is not None and self.codec not in CODEC_NAMES + _RAW_NAMES:
            raise UsageError(
                f"--codec: {self.codec!r} is not offered, expected {', '.join(CODEC_NAMES)}"
            )
        if self.rank is None and self.codec is None and not self.drop and not self.keep_rows:
            raise UsageError(
                "compress: nothing to do",
                hint="give --rank, --bits, --codec, --drop or --keep-rows",
            )

    def _check_bands(self) -> None:
        if self.coding not in CODINGS:
            raise UsageError(f"--coding: {self.coding!r}, expected {' or '.join(CODINGS)}")
        if (self.bits_per_value is None) == (self.budget_bytes is None):
            raise UsageError(
                "--codec bands: needs exactly one of --bits-per-value and --budget",
                hint="for instance --bits-per-value 1.0",
            )
        if self.rank is not None:
            raise UsageError("--rank: codec bands finds its own rank", hint="leave --rank out")
        if self.bits_per_value is not None and not 0 < self.bits_per_value <= MAX_BITS_PER_VALUE:
            raise UsageError(
                f"--bits-per-value: expected a number above 0, up to {MAX_BITS_PER_VALUE:g}, "
                f"got {self.bits_per_value:g}"
            )
        if self.budget_bytes is not None and self.budget_bytes < 1:
            raise UsageError(f"--budget: expected bytes above 0, got {self.budget_bytes}")


@dataclass(frozen=True)
class DropSpec:
    """Which layers' tables to leave out, and whether to fold them into the next kept one.

    into: other kept layers to fold them into, one for each of `layers`.
    chosen_by: how they were chosen, for the history (`Choice.to_history`); plain JSON.
    """

    layers: tuple[int, ...]
    fold: bool = True
    into: Mapping[int, int] | None = field(default=None, hash=False)
    chosen_by: Mapping[str, Any] = field(default_factory=dict, hash=False)


def named_codec(name: str, width: int) -> Codec:
    """The codec a user means by a name: f32, f16, bf16, int8, int4, nf4 or fp4."""
    if name in _RAW_NAMES:
        return codec_from_json({"name": "raw", "dtype": name}, width)
    if name == "int8":
        return codec_from_json({"name": name}, width)
    return codec_from_json({"name": name, "group_size": DEFAULT_GROUP_SIZE}, width)


def parse_layers(text: str, num_layers: int, option: str) -> tuple[int, ...]:
    """``3-5,9`` -> (3, 4, 5, 9). ``4-`` runs to the last layer.

    Raises:
        UsageError: not of that form, out of 0..L-1, or an index twice.
    """
    chosen: list[int] = []
    for part in text.split(","):
        chosen += _range(part.strip(), num_layers, option)
    if len(set(chosen)) != len(chosen):
        raise UsageError(f"{option}: {text!r} names a layer twice")
    return tuple(sorted(chosen))


def parse_auto_drop(text: str) -> int | None:
    """``auto`` -> 0 (as many as pay), ``auto:3`` -> 3, a list of layers -> None.

    Raises:
        UsageError: auto with something else behind it.
    """
    name, colon, number = text.partition(":")
    if name.strip() != "auto":
        return None
    if not colon:
        return 0
    if not (number.isascii() and number.isdigit() and int(number)):
        raise UsageError(f"--drop: {text!r}, expected auto or auto:N with N of 1 and more")
    return int(number)


def _range(part: str, num_layers: int, option: str) -> range:
    match = _RANGE.match(part)
    if match is None:
        raise UsageError(
            f"{option}: {part!r} is not a layer or a range of layers", hint="write it like 3-5,9"
        )
    first = int(match[1])
    last = first if match[2] is None else int(match[2] or num_layers - 1)
    for layer in (first, last):
        if layer >= num_layers:
            raise UsageError(
                f"{option}: layer {layer} is out of range, the model has layers 0 to "
                f"{num_layers - 1}"
            )
    if last < first:
        raise UsageError(f"{option}: {part!r} runs backwards")
    return range(first, last + 1)


def parse_ranks(text: str, num_layers: int, hidden_size: int) -> dict[int, int]:
    """``50%``, ``1024`` or ``0-3:1024,4-:25%`` -> layer -> rank; layers not named keep full rank.

    P % means floor(P x D / 100).

    Raises:
        UsageError: not of that form, a rank below 1 or above D, a layer twice.
    """
    ranks: dict[int, int] = {}
    for part in text.split(","):
        layers_text, _, rank_text = part.strip().rpartition(":")
        if not layers_text:
            if "," in text:
                raise UsageError(
                    f"--rank: {part.strip()!r} names no layers", hint="write 0-3:1024,4-:256"
                )
            layers_text = "0-"
        rank = _rank(rank_text.strip(), hidden_size)
        for layer in _range(layers_text, num_layers, "--rank"):
            if layer in ranks:
                raise UsageError(f"--rank: {text!r} names layer {layer} twice")
            ranks[layer] = rank
    return ranks


def _rank(text: str, hidden_size: int) -> int:
    percent = re.fullmatch(r"(\d{1,3}(?:\.\d{1,6})?)\s*%", text)
    if percent:
        # Through integers, so that 50% of an odd D never depends on binary fractions.
        whole, _, fraction = percent[1].partition(".")
        scaled = int(whole + fraction.ljust(6, "0"))
        rank = scaled * hidden_size // (100 * 10**6)
        if scaled > 100 * 10**6:
            raise UsageError(f"--rank: {text} is more than 100 %")
    elif text.isascii() and text.isdigit():
        rank = int(text)
    else:
        raise UsageError(
            f"--rank: {text!r} is not a rank", hint="write 50%, 1024 or 0-3:1024,4-:256"
        )
    if not 1 <= rank <= hidden_size:
        raise UsageError(
            f"--rank: {text} gives rank {rank}, expected 1 to {hidden_size} (the hidden size)"
        )
    return rank


def parse_size(text: str, option: str) -> int:
    """``1.5GB``, ``800 MiB`` or ``123456`` -> bytes; GB is 10^9, GiB 2^30.

    Raises:
        UsageError: not of that form.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([kKMGT]?)(i?)B?", text.strip())
    if match is None or (match[3] and not match[2]):
        raise UsageError(f"{option}: {text!r} is not a size", hint="write 1.5GB, 800MiB or bytes")
    power = " KMGT".index(match[2].upper() or " ")
    return int(Decimal(match[1]) * (1024 if match[3] else 1000) ** power)


def parse_predict(text: str) -> int | None:
    """``auto`` -> None, else 0 or 2 to 8.

    Raises:
        UsageError: anything else.
    """
    if text == "auto":
        return None
    if text.isascii() and text.isdigit() and (text == "0" or 2 <= int(text) <= MAX_WIDTH):
        return int(text)
    raise UsageError(f"--predict: {text!r}, expected auto, 0 or 2 to {MAX_WIDTH} bits")


def middle_layers(kept: Sequence[int], count: int) -> tuple[int, ...]:
    """The `count` middle ones of the kept layers: original indices.

    Raises:
        UsageError: count below 1, or nothing would be left.
    """
    if not 1 <= count < len(kept):
        raise UsageError(
            f"--middle: {count} of {len(kept)} kept layers, expected 1 to {len(kept) - 1}"
        )
    start = (len(kept) - count) // 2
    return tuple(kept[start : start + count])
