"""What a peer is: another library's way of storing a matrix, asked for codes and rows.

V rows, D values a row; a plane of a table or a weight matrix.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata, util
from typing import Protocol

import torch
from torch import Tensor

__all__ = [
    "BLOCK_ROWS",
    "Peer",
    "Stored",
    "in_blocks",
    "installed_version",
    "no_multiple",
    "quiet_import",
    "tensor_bytes",
]

BLOCK_ROWS = 8192


@dataclass(frozen=True)
class Stored:
    """A matrix after a peer stored it.

    Attributes:
        plane_VD: float32 [V, D] on the CPU, what the peer gives back.
        row_bytes: codes, scales, zero points: all that grows with the number of rows.
        shared_bytes: what one matrix needs once, such as a codebook.
    """

    plane_VD: Tensor
    row_bytes: int
    shared_bytes: int = 0

    @property
    def size_bytes(self) -> int:
        """Everything that is stored."""
        return self.row_bytes + self.shared_bytes


class Peer(Protocol):
    """One format of one library.

    name: as `--values` calls it.     package: the distribution it needs, also the import name.
    """

    @property
    def name(self) -> str: ...
    @property
    def package(self) -> str: ...

    def misfit(self, width: int) -> str | None:
        """Why rows of this width cannot be stored without crossing rows; None where they can."""

    def round_trip(self, plane_VD: Tensor) -> Stored:
        """Store float32 [V, D] (CPU, contiguous, not changed) with the library and read it back."""


def installed_version(package: str) -> str | None:
    """The version of a library that can be imported, else None."""
    if util.find_spec(package) is None:
        return None
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@contextmanager
def quiet_import() -> Iterator[None]:
    """Some libraries log what else they could use when imported; that is not the user's matter."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def no_multiple(width: int, group_size: int) -> str | None:
    """`Peer.misfit` of formats whose groups have a fixed size."""
    if width % group_size == 0:
        return None
    return f"rows of {width} values are no multiple of {group_size}"


def tensor_bytes(*tensors: Tensor | None) -> int:
    """Bytes of all values; None has none."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def in_blocks(plane_VD: Tensor, store: Callable[[Tensor], Stored]) -> Stored:
    """`store` on blocks of rows, so that a library's temporaries stay those of a block.

    For formats whose groups end with a row.
    """
    decoded_VD = torch.empty_like(plane_VD)
    row_bytes = shared_bytes = 0
    for start in range(0, len(plane_VD), BLOCK_ROWS):
        stored = store(plane_VD[start : start + BLOCK_ROWS])
        decoded_VD[start : start + BLOCK_ROWS] = stored.plane_VD
        row_bytes += stored.row_bytes
        shared_bytes = stored.shared_bytes
    return Stored(decoded_VD, row_bytes, shared_bytes)
