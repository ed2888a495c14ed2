"""What a codec is, and the byte helpers they share.

N rows in a batch, D values a row, B bytes of one plane in a record.
A plane of a record is ``[scales][codes]``; both segments are zero-padded to a multiple of four
bytes, all numbers little-endian. `Codec` describes the layout and decodes it; encoding lives one
storey up, where torch is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from tolkit_formats.errors import BundleError

__all__ = [
    "ALIGNMENT_BYTES",
    "Codec",
    "first_row",
    "padded_bytes",
    "read_choice",
    "read_integer",
    "refuse_unknown",
    "require_bounded",
    "require_scales",
    "require_zero_padding",
    "shown",
    "shown_name",
]

ALIGNMENT_BYTES = 4
_LARGEST_DECODED = 2.0**126
_T = TypeVar("_T", bound=str | int)


class Codec(Protocol):
    """How one plane of a record is stored: parameters, layout, decoding.

    Implementations are frozen dataclasses; `width` is the number of values a row holds.
    """

    @property
    def name(self) -> str:
        """The codec's name in the manifest."""

    @property
    def width(self) -> int:
        """Values per decoded row (D, or R for the codec inside svd)."""

    def to_json(self) -> dict[str, object]:
        """The manifest parameters; `codec_from_json` of it gives an equal codec."""

    def segments(self) -> tuple[int, int]:
        """Bytes of the scales and of the codes of one row, each with its padding."""

    def shared_shapes(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Arrays all rows of the plane share: name -> (safetensors dtype, shape)."""

    def decode(
        self, plane_NB: NDArray[np.uint8], shared: Mapping[str, NDArray[np.generic]]
    ) -> NDArray[np.float32]:
        """Rows back from their bytes.

        Args:
            plane_NB: uint8 [N, sum(segments())]; may be a column slice of whole records.
            shared: the arrays `shared_shapes` names.

        Returns:
            float32 [N, D], freshly allocated, C-contiguous.
        """

    def check(self, plane_NB: NDArray[np.uint8]) -> None:
        """Refuse bytes no encoder writes: BundleError names the first row of the batch."""


def padded_bytes(size_bytes: int) -> int:
    """`size_bytes` rounded up to the alignment of a segment."""
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def first_row(bad_NB: NDArray[np.bool_]) -> int | None:
    """Index of the first row of bool [N, B] with a true entry, None where there is none."""
    rows = np.flatnonzero(bad_NB.any(axis=1))
    return int(rows[0]) if len(rows) else None


def require_zero_padding(padding_NB: NDArray[np.uint8], what: str) -> None:
    """BundleError when a padding byte is not zero."""
    row = first_row(padding_NB != 0)
    if row is not None:
        raise BundleError(f"row {row}, {what}: padding is not zero")


def require_scales(scales: NDArray[np.generic], what: str) -> None:
    """BundleError when a scale all rows share is negative or not finite."""
    wrong = np.flatnonzero(~np.isfinite(scales) | np.signbit(scales))
    if len(wrong):
        raise BundleError(
            f"{what}: expected finite numbers >= 0, got {scales[wrong[0]]} at {int(wrong[0])}"
        )


def require_bounded(largest: float, what: str) -> None:
    """BundleError when decoded values could be as large as `largest`, too much for binary32."""
    if not largest <= _LARGEST_DECODED:
        raise BundleError(f"{what}: values up to {largest:.3g} do not fit binary32")


def shown(value: object) -> str:
    """A value from a manifest for a message: one line, not longer than a reader wants."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]} ..."


def shown_name(name: str) -> str:
    """A name from a manifest for a message: as it is when it looks like one."""
    return name if len(name) <= 40 and name.isidentifier() else shown(name)


def read_integer(
    params: Mapping[str, object], field: str, codec_name: str, low: int, high: int
) -> int:
    """The integer parameter `field` within low..high; BundleError otherwise."""
    value = params.get(field)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise BundleError(
            f"codec {codec_name}, {field}: expected an integer in {low}..{high}, got {shown(value)}"
        )
    return value


def read_choice(
    params: Mapping[str, object], field: str, codec_name: str, choices: tuple[_T, ...]
) -> _T:
    """The parameter `field`, one of `choices` (and of their type); BundleError otherwise."""
    value = params.get(field)
    for choice in choices:
        if type(value) is type(choice) and value == choice:
            return choice
    listed = ", ".join(str(choice) for choice in choices)
    raise BundleError(f"codec {codec_name}, {field}: expected one of {listed}, got {shown(value)}")


def refuse_unknown(params: Mapping[str, object], codec_name: str, known: frozenset[str]) -> None:
    """BundleError when `params` has a field this codec does not define."""
    unknown = sorted(set(params) - known)
    if unknown:
        raise BundleError(f"codec {codec_name}, {shown_name(unknown[0])}: unknown parameter")
