"""A published file read at any place: through a descriptor, into the caller's memory.

Mapped files would be simpler, but a file cut while mapped ends the process with SIGBUS, and a
disk error does too; a read gives an error that can be named.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tolkit_formats.errors import BundleError
from tolkit_formats.files import bytes_view
from tolkit_formats.io_calls import operation

__all__ = ["RandomFile"]


class RandomFile:
    """An open file. What is put in its place later changes nothing.

    Args:
        path: the file.

    Raises:
        InputError, ResourceError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1
        with operation("open", path):
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)
        self._state = self._now()

    @property
    def size_bytes(self) -> int:
        """Size when it was opened."""
        return self._state[0]

    def read_into(self, buffer: npt.NDArray[np.uint8], offset: int) -> None:
        """Fill `buffer` (C-contiguous) with the bytes from `offset` on, in one call as a rule.

        Raises:
            BundleError: the file ends before.
            ResourceError: the disk failed.
        """
        view = bytes_view(buffer)
        while len(view):
            with operation("pread", self.path):
                count = os.preadv(self._fd, [view], offset)
            if count == 0:
                raise BundleError(
                    f"{self.path}: ends at byte {offset:,}, expected {len(view):,} more: "
                    "it was cut while the bundle was open"
                )
            view, offset = view[count:], offset + count

    def require_unchanged(self) -> None:
        """BundleError when the file was written to since it was opened."""
        if self._now() != self._state:
            raise BundleError(
                f"{self.path}: was changed while the bundle was open",
                hint="bundles are never written to in place; make or copy it again",
            )

    def close(self) -> None:
        """Give the descriptor back. Calling it again does nothing."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __del__(self) -> None:
        self.close()

    def _now(self) -> tuple[int, int]:
        with operation("read", self.path):
            status = os.fstat(self._fd)
        return status.st_size, status.st_mtime_ns
