"""Token ids of a text too long for memory: a nameless temporary file, mapped when it is full."""

from __future__ import annotations

import errno
import tempfile

import numpy as np
import numpy.typing as npt

from tolkit.errors import ResourceError

__all__ = ["SpilledIds"]


class SpilledIds:
    """int32 ids written one after the other; the file goes away with the last view of it.

    Raises:
        ResourceError: the folder of temporary files ($TMPDIR) is full or cannot be written.
    """

    def __init__(self) -> None:
        self.count = 0
        try:
            self._file = tempfile.TemporaryFile()
        except OSError as error:
            raise _cannot_spill(error) from error

    def append(self, ids_n: npt.NDArray[np.int32]) -> None:
        """Write `ids_n` behind what is there."""
        try:
            self._file.write(ids_n.astype("<i4", copy=False).tobytes())
        except OSError as error:
            raise _cannot_spill(error) from error
        self.count += len(ids_n)

    def mapped(self) -> npt.NDArray[np.int32]:
        """All ids written so far, [N], read-only; pages come from the file when touched."""
        if not self.count:
            return np.empty(0, np.int32)
        try:
            self._file.flush()
        except OSError as error:
            raise _cannot_spill(error) from error
        return np.memmap(self._file, "<i4", "r", shape=(self.count,))


def _cannot_spill(error: OSError) -> ResourceError:
    what = "is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "cannot be written"
    return ResourceError(
        f"{tempfile.gettempdir()}: {what}, the text's token ids need 4 bytes each ({error})",
        hint="set TMPDIR to a folder with room",
    )
