"""What an encoder is, and the checks they share.

N rows in a batch, D values a row, B bytes of one plane in a record.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from tolkit.errors import NonFiniteError
from tolkit_formats.codecs import Codec

__all__ = ["Encoder", "empty_plane", "refuse_non_finite", "refuse_where", "row_steps"]

# Work is cut so that one step's float32 scratch stays in a core's own cache.
_STEP_VALUES = 1 << 16


class Encoder(Protocol):
    """The encoding half of a codec. Stateless, so one serves many threads."""

    @property
    def codec(self) -> Codec:
        """Layout and parameters."""

    def encode(self, target_ND: Tensor, shared: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Bytes of a batch of rows, and what a reader will make of them.

        Args:
            target_ND: float32 [N, D], C-contiguous, any device; not changed.
            shared: the arrays of `codec.shared_shapes()` on the same device.

        Returns:
            plane uint8 [N, sum(codec.segments())] and decoded float32 [N, D], freshly allocated.
            `decoded` equals `codec.decode(plane)` bit for bit, for svd within 1e-6 of a row's norm.

        Raises:
            NonFiniteError: NaN, infinity or a value the codec cannot hold; `row` and `column` of
                the error say where in the batch.
        """


def empty_plane(codec: Codec, target_ND: Tensor) -> Tensor:
    """Zeroed bytes uint8 [N, B] for rows float32 [N, D] of the codec's width."""
    assert target_ND.dtype == torch.float32 and target_ND.shape[1] == codec.width
    size_bytes = sum(codec.segments())
    return torch.zeros((len(target_ND), size_bytes), dtype=torch.uint8, device=target_ND.device)


def row_steps(target_ND: Tensor) -> Iterator[slice]:
    """Row ranges to work through one after the other: cache-sized on a CPU, else all at once."""
    num_rows, width = target_ND.shape
    step = max(1, _STEP_VALUES // width) if target_ND.device.type == "cpu" else max(1, num_rows)
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def refuse_non_finite(target_ND: Tensor, row_offset: int = 0) -> None:
    """NonFiniteError naming the first entry of float32 [N, D] that is NaN or infinite.

    `row_offset` is the batch index of row 0.
    """
    refuse_where(~torch.isfinite(target_ND), target_ND, row_offset, "expected a finite number")


def refuse_where(bad_ND: Tensor, target_ND: Tensor, row_offset: int, expected: str) -> None:
    """NonFiniteError naming the first true entry of bool [N, D] and the value there."""
    found = torch.nonzero(bad_ND)
    if len(found):
        row, column = (int(index) for index in found[0])
        value = float(target_ND[row, column])
        raise NonFiniteError(
            f"row {row + row_offset}, column {column}: {expected}, got {value:g}",
            row=row + row_offset,
            column=column,
        )
