"""The Hadamard rotation of codec `bands`, in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from tolkit_formats.codecs.bands import hadamard_block, hadamard_size

__all__ = ["rotated"]


def rotated(rows_ND: Tensor) -> Tensor:
    """Rows through the rotation, which is its own inverse: float32 [N, D]."""
    size = hadamard_size(rows_ND.shape[1])
    block = torch.from_numpy(hadamard_block(size))
    return (rows_ND.reshape(len(rows_ND), -1, size) @ block).reshape(rows_ND.shape)
