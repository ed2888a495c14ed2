"""Which pages of files the system holds in memory, and putting them out of it.

"Cold" means nothing unless it is checked: a file just written, or read by another process, stays
in the page cache whatever a benchmark calls itself. Linux only; elsewhere a state is not known.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tolkit.errors import ResourceError
from tolkit_formats.io_calls import operation
from tolkit_formats.reader import Bundle

__all__ = [
    "COLD_SHARE",
    "WARM_SHARE",
    "evict",
    "make_cold",
    "make_warm",
    "record_paths",
    "resident_share",
]

COLD_SHARE = 0.01
"""The most that may be resident of what is called cold."""

WARM_SHARE = 0.99
"""The least that must be of what is called warm."""

_MAPS = Path("/proc/self/maps")
_ATTEMPTS = 6
_READINGS = 3
_PAUSE_S = 0.02
_READ_BYTES = 4 << 20
_PART_BYTES = 1 << 30


def record_paths(bundle: Bundle) -> list[Path]:
    """The files that hold a bundle's records."""
    tables = bundle.path / "tables"
    tiers = bundle.manifest.tiers
    return [tables / tier.shard_name(i) for tier in tiers for i in range(tier.num_shards)]


def resident_share(paths: Sequence[Path]) -> float | None:
    """The share of all pages of these files that lie in memory, by `mincore`.

    None where the system does not tell. Looking at it brings no page in.

    Raises:
        InputError, ResourceError: a file cannot be opened.
    """
    if not hasattr(os, "posix_fadvise"):
        return None
    resident = pages = 0
    for path in paths:
        with operation("open", path):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size_bytes = os.fstat(fd).st_size
            for start in range(0, size_bytes, _PART_BYTES):
                found_N = _resident_pages(fd, start, min(_PART_BYTES, size_bytes - start))
                if found_N is None:
                    return None
                resident += int(np.count_nonzero(found_N & 1))
                pages += len(found_N)
        finally:
            os.close(fd)
    return resident / pages if pages else 0.0


def evict(paths: Sequence[Path]) -> None:
    """Write these files' pages out and ask the system to forget them (a request, no promise).

    Pages that this process has mapped are let go first: the system keeps what somebody maps.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    _let_go_of_mapped(paths)
    for path in paths:
        with operation("open", path):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with operation("fsync", path):
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def make_cold(paths: Sequence[Path]) -> float:
    """Evict files and make sure of it; the share that stayed, at most `COLD_SHARE`.

    Raises:
        ResourceError: more stayed, or the system does not tell.
    """
    share = _evicted_share(paths)
    if share is None:
        raise ResourceError(
            "state: cold was asked for, this system does not say what is in memory",
            hint="measure warm: --state warm",
        )
    if share > COLD_SHARE:
        raise ResourceError(
            f"{paths[0].parent}: {100 * share:.1f} % of the records stay in memory after they were "
            f"put out, expected at most {100 * COLD_SHARE:.0f} %; a run would not be cold",
            hint="end what else reads the bundle, move it off a memory file system, or measure "
            "warm: --state warm",
        )
    return share


def make_warm(paths: Sequence[Path]) -> float | None:
    """Read files that are not in memory; the share then there, None where it is not known.

    Raises:
        ResourceError: less than `WARM_SHARE` stayed.
    """
    share = resident_share(paths)
    for _ in range(_READINGS):
        if share is not None and share >= WARM_SHARE:
            return share
        _read_through(paths)
        share = resident_share(paths)
        if share is None:
            return None
    if share is not None and share < WARM_SHARE:
        raise ResourceError(
            f"{paths[0].parent}: {100 * share:.1f} % of the records stay in memory after they were "
            f"read, expected at least {100 * WARM_SHARE:.0f} %; a run would not be warm",
            hint="free memory, or measure cold: --state cold",
        )
    return share


def _read_through(paths: Sequence[Path]) -> None:
    buffer = bytearray(_READ_BYTES)
    for path in paths:
        with operation("read", path), path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _evicted_share(paths: Sequence[Path]) -> float | None:
    """What stays after asking a few times: pages read ahead may still be on their way in."""
    share = None
    for attempt in range(_ATTEMPTS):
        time.sleep(attempt * _PAUSE_S)
        evict(paths)
        share = resident_share(paths)
        if share is None or share <= COLD_SHARE:
            break
    return share


def _let_go_of_mapped(paths: Sequence[Path]) -> None:
    """Forget this process's view of the files; what is read through it next is read anew."""
    wanted = {os.fsencode(path.resolve()) for path in paths}
    try:
        lines = _MAPS.read_bytes().splitlines()
    except OSError:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for line in lines:
        fields = line.split(maxsplit=5)
        # only what is never written through: a private copy of a page would be lost
        if len(fields) == 6 and fields[5] in wanted and b"w" not in fields[1]:
            start, stop = (int(bound, 16) for bound in fields[0].split(b"-"))
            libc.madvise(start, stop - start, mmap.MADV_DONTNEED)


def _resident_pages(fd: int, start: int, length: int) -> npt.NDArray[np.uint8] | None:
    """One byte a page of a part of a file, bit 0 set where it is in memory."""
    mapped = mmap.mmap(fd, length, prot=mmap.PROT_READ, offset=start)
    view = np.frombuffer(mapped, np.uint8)
    pages = -(-length // mmap.PAGESIZE)
    found_N = np.zeros(pages, np.uint8)
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    try:
        code = mincore(view.ctypes.data, length, found_N.ctypes.data)
    finally:
        del view
        mapped.close()
    return None if code else found_N
