"""What every call of the I/O layer runs in: fault points for tests, errors in the user's words."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tolkit_formats.errors import InputError, ResourceError, TolError

__all__ = ["fault", "fault_hook_set", "free_bytes", "operation", "set_fault_hook"]

FaultHook = Callable[[str, str], None]

_fault_hook: FaultHook | None = None

# What the environment, not the user's input, is to blame for.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def set_fault_hook(hook: FaultHook | None) -> None:
    """Call `hook(operation, path)` before and after every I/O call (tests only); None removes it.

    Operations: open, write, write-half (half of a buffer is out), fsync, replace, link, unlink,
    mkdir, fsync-dir, map, read; each again with the suffix ``-done`` afterwards.
    """
    global _fault_hook
    _fault_hook = hook


def fault_hook_set() -> bool:
    """Whether tests are watching, so that a write is worth doing in two halves."""
    return _fault_hook is not None


def fault(operation: str, path: str | Path) -> None:
    """A point at which tests may stop the process or fail the call."""
    if _fault_hook is not None:
        _fault_hook(operation, str(path))


def free_bytes(path: Path) -> int | None:
    """Room on the file system of a path that need not exist yet; None where it does not say."""
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


@contextmanager
def operation(name: str, path: Path, *, needed_bytes: int = 0) -> Iterator[None]:
    """Run one I/O call between its fault points, with errors in the user's words."""
    try:
        fault(name, path)
        yield
        fault(f"{name}-done", path)
    except OSError as error:
        raise _explain(error, name, path, needed_bytes) from error


def _explain(error: OSError, name: str, path: Path, needed_bytes: int) -> TolError:
    reason = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in _FULL:
        free = free_bytes(path)
        room = "" if free is None else f", {free:,} bytes free"
        need = f", {needed_bytes:,} bytes needed" if needed_bytes else ""
        return ResourceError(
            f"{path}: {reason.lower()} while writing{need}{room}",
            hint="free space or choose another output folder, then run the same command again",
        )
    if name in {"read", "map"} and error.errno in {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}:
        return InputError(f"{path}: {reason.lower()}")
    return ResourceError(f"{path}: {reason.lower()} ({name})")
