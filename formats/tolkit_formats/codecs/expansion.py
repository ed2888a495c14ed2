"""What codecs bands and steps share: rows from coefficients, and how a manifest writes them down.

N rows in a batch, D values a row, C coefficients stored.

    row = (mean + sum over c of value_c * basis_c) * 2^exponent
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tolkit_formats.bitpack import Run
from tolkit_formats.codecs.base import read_integer, shown
from tolkit_formats.errors import BundleError
from tolkit_formats.hadamard import hadamard

__all__ = [
    "MAX_EXPONENT",
    "MAX_WIDTH",
    "expanded_rows",
    "expansion_json",
    "mean_rows",
    "read_expansion",
    "read_runs",
    "runs_text",
]

MAX_WIDTH = 8
"""Bits of a code."""

MAX_EXPONENT = 120
_RUN = "[1-9][0-9]{0,4}x[0-9]"
_RUNS = re.compile(rf"(?:{_RUN}(?: {_RUN})*)?\Z")


def expanded_rows(
    values_NC: NDArray[np.float32],
    basis_CD: NDArray[np.float32] | None,
    places: slice | NDArray[np.int64],
    mean_D: NDArray[np.float32],
    exponent: int,
) -> NDArray[np.float32]:
    """Rows of coefficients: float32 [N, D].

    Args:
        values_NC: float32 [N, C].
        basis_CD: float32 [C, D]; None for the Hadamard rotation.
        places: which of the rotation's D coefficients the values are.
        mean_D: float32 [D].
        exponent: power of two that the sums are multiplied by.
    """
    if basis_CD is not None:
        rows_ND: NDArray[np.float32] = np.matmul(values_NC, basis_CD)
    else:
        full_ND = np.zeros((len(values_NC), len(mean_D)), np.float32)
        full_ND[:, places] = values_NC
        rows_ND = hadamard(full_ND)
    rows_ND += mean_D
    return _scaled(rows_ND, exponent)


def mean_rows(num_rows: int, mean_D: NDArray[Any], exponent: int) -> NDArray[np.float32]:
    """Rows that no coefficient is stored for: float32 [N, D]; a mean of -0 stays one."""
    return _scaled(np.tile(np.asarray(mean_D, np.float32), (num_rows, 1)), exponent)


def read_expansion(
    params: Mapping[str, object], codec_name: str, width: int
) -> tuple[tuple[Run, ...], int]:
    """Basis and exponent of a codec that expands coefficients; BundleError names the field."""
    basis = read_runs(params, "basis", codec_name, 2, width)
    return basis, read_integer(params, "exponent", codec_name, -MAX_EXPONENT, MAX_EXPONENT)


def expansion_json(basis: Sequence[Run], exponent: int) -> dict[str, object]:
    """What `read_expansion` reads."""
    return {"basis": runs_text(basis), "exponent": exponent}


def runs_text(runs: Sequence[Run]) -> str:
    """``12x5 3x0 40x2``: a list of lists would make most of a large tol.json."""
    return " ".join(f"{count}x{bits}" for count, bits in runs)


def read_runs(
    params: Mapping[str, object], field: str, codec_name: str, fewest_bits: int, width: int
) -> tuple[Run, ...]:
    """Runs written as `runs_text` does; BundleError otherwise."""
    text = params.get(field)
    if not isinstance(text, str) or not _RUNS.match(text):
        raise BundleError(
            f"codec {codec_name}, {field}: expected runs such as '12x5 3x0 40x2', got {shown(text)}"
        )
    runs = []
    left = width
    for word in text.split(" ") if text else []:
        count, bits = map(int, word.split("x"))
        left -= count
        if left < 0:
            raise BundleError(f"codec {codec_name}, {field}: counts sum to more than {width}")
        if not fewest_bits <= bits <= MAX_WIDTH:
            raise BundleError(
                f"codec {codec_name}, {field}: expected {fewest_bits}..{MAX_WIDTH} bits, got {word}"
            )
        runs.append((count, bits))
    return tuple(runs)


def _scaled(rows_ND: NDArray[np.float32], exponent: int) -> NDArray[np.float32]:
    """In place."""
    if exponent:
        rows_ND *= np.float32(2.0**exponent)
    return rows_ND
