"""The Hadamard rotation of codec `bands`, in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from tolkit_formats.hadamard import hadamard_size

__all__ = ["rotated"]


def rotated(rows_ND: Tensor) -> Tensor:
    """Rows through the rotation, which is its own inverse: float32 [N, D].

    The same sums in the same order as `tolkit_formats.hadamard.hadamard`, so bit for bit.
    """
    size = hadamard_size(rows_ND.shape[1])
    turned = rows_ND
    apart = 1
    while apart < size:
        pairs = turned.reshape(len(rows_ND), rows_ND.shape[1] // (2 * apart), 2, apart)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        turned = torch.stack([first + second, first - second], dim=2)
        apart *= 2
    scaled: Tensor = turned.reshape(rows_ND.shape) * float(size**-0.5)
    return scaled
