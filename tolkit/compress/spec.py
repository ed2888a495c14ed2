"""What a user can ask of compression, parsed and checked before anything is read.

V vocabulary, L layers, D hidden, R rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tolkit.errors import UsageError
from tolkit_formats.codecs import Codec, codec_from_json

__all__ = [
    "BITS_TO_CODEC",
    "CODEC_NAMES",
    "DEFAULT_GROUP_SIZE",
    "CompressSpec",
    "DropSpec",
    "middle_layers",
    "named_codec",
    "parse_layers",
    "parse_ranks",
]

DEFAULT_GROUP_SIZE = 64
CODEC_NAMES = ("int8", "int4", "nf4", "fp4")
BITS_TO_CODEC = {16: "f16", 8: "int8", 4: "nf4"}
_RAW_NAMES = ("f32", "f16", "bf16")
_RANGE = re.compile(r"(\d+)(?:-(\d*))?\Z")


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
    """

    rank: str | None = None
    codec: str | None = None
    drop: tuple[int, ...] = ()
    fold: bool = True
    feedback: bool = True
    weights: str = "auto"

    def __post_init__(self) -> None:
        if self.codec is not None and self.codec not in CODEC_NAMES + _RAW_NAMES:
            raise UsageError(
                f"--codec: {self.codec!r} is not offered, expected {', '.join(CODEC_NAMES)}"
            )
        if self.rank is None and self.codec is None and not self.drop:
            raise UsageError(
                "compress: nothing to do",
                hint="give --rank, --bits, --codec or --drop",
            )


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
