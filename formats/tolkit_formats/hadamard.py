"""The Hadamard rotation of codec bands (SPEC section 6). N rows, D values a row."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["hadamard", "hadamard_size"]


def hadamard_size(width: int) -> int:
    """Values a block of the rotation mixes: the largest power of two that divides D."""
    return width & -width


def hadamard(rows_ND: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each block of each row times Sylvester's matrix of norm 1, which is its own inverse.

    By sums and differences of pairs 1, 2, 4.. apart: float32 [N, D], in this order exactly.
    """
    size = hadamard_size(rows_ND.shape[1])
    turned = rows_ND
    apart = 1
    while apart < size:
        pairs = turned.reshape(len(rows_ND), rows_ND.shape[1] // (2 * apart), 2, apart)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        turned = np.stack([first + second, first - second], axis=2)
        apart *= 2
    scaled: NDArray[np.float32] = turned.reshape(rows_ND.shape) * np.float32(size**-0.5)
    return scaled
