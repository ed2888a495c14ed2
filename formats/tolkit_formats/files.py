"""The one I/O layer: every open, write, fsync, replace and unlink that publishing depends on.

Publish order (SPEC section 9): data files are written and fsynced in a sibling work folder, the
manifest last; one rename of the folder to its final name; fsync of the parent. Published files
are never opened for writing again.

`set_fault_hook` lets tests stop the process, or fail a call, at any of these calls (io_calls.py).
"""

from __future__ import annotations

import fcntl
import mmap
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from tolkit_formats.errors import InputError, OutputExistsError, ResourceError
from tolkit_formats.io_calls import fault, fault_hook_set, free_bytes, operation, set_fault_hook

__all__ = [
    "FileWriter",
    "aside_of",
    "bytes_view",
    "claim_dir",
    "fsync_dir",
    "link_or_copy",
    "list_dir",
    "lock",
    "make_dir",
    "map_bytes",
    "publish_dir",
    "read_bytes",
    "read_chunks",
    "remove_tree",
    "replace",
    "replacing",
    "require_free",
    "require_regular",
    "scratch_array",
    "set_fault_hook",
    "unlink",
    "write_atomic",
]

Buffer = bytes | bytearray | memoryview | npt.NDArray[Any]

_COPY_BYTES = 1 << 20


def bytes_view(buffer: Buffer) -> memoryview:
    """Any C-contiguous buffer as a flat view of its bytes."""
    data: Any = buffer
    view = memoryview(data)
    return view.cast("B") if view.nbytes else memoryview(b"")


class FileWriter:
    """A new file written front to back; `close` fsyncs. A context manager.

    Leaving the context with an error closes the file without fsync; the caller's work folder is
    what makes a half-written file harmless.
    """

    def __init__(self, path: Path, *, expected_bytes: int = 0) -> None:
        self.path = Path(path)
        self.written_bytes = 0
        self._expected_bytes = expected_bytes
        with operation("open", self.path, needed_bytes=expected_bytes):
            self._fd = os.open(
                self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666
            )

    def write(self, buffer: Buffer) -> None:
        """Append all of `buffer` (bytes-like or a C-contiguous array)."""
        view = bytes_view(buffer)
        with operation("write", self.path, needed_bytes=self._expected_bytes):
            if fault_hook_set() and len(view) > 1:
                half = len(view) // 2
                self._write_all(view[:half])
                fault("write-half", self.path)
                self._write_all(view[half:])
            else:
                self._write_all(view)
        self.written_bytes += len(view)

    def _write_all(self, view: memoryview) -> None:
        while len(view):
            view = view[os.write(self._fd, view) :]

    def close(self) -> None:
        """Fsync and close. Calling it again does nothing."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            try:
                with operation("fsync", self.path, needed_bytes=self._expected_bytes):
                    os.fsync(fd)
            finally:
                os.close(fd)

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        elif self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`: what was written there replaces `path`, or goes on errors."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def write_atomic(path: Path, data: Buffer) -> None:
    """Make `path` hold `data`, all or nothing (temporary file, fsync, replace, fsync folder)."""
    path = Path(path)
    view = bytes_view(data)
    with replacing(path) as temporary:
        with FileWriter(temporary, expected_bytes=len(view)) as writer:
            writer.write(view)


def replace(source: Path, destination: Path) -> None:
    """Rename `source` over `destination` (files, or a folder to a free name)."""
    with operation("replace", destination):
        os.replace(source, destination)


def unlink(path: Path) -> None:
    """Remove one file; a missing one is fine."""
    with operation("unlink", path):
        Path(path).unlink(missing_ok=True)


def link_or_copy(source: Path, destination: Path) -> None:
    """Give a published file, which nobody writes to again, a second name; or copy it.

    Where the file system has no hard links, or the two lie on different ones, the bytes are
    copied and fsynced.
    """
    with operation("link", destination):
        try:
            os.link(source, destination, follow_symlinks=False)
            return
        except FileNotFoundError:
            raise
        except OSError:
            pass
    with FileWriter(destination, expected_bytes=require_regular(source)) as writer:
        for chunk in read_chunks(source, _COPY_BYTES):
            writer.write(chunk)


def make_dir(path: Path) -> None:
    """Create a folder (parents too); an existing one is fine."""
    with operation("mkdir", path):
        Path(path).mkdir(parents=True, exist_ok=True)


def claim_dir(path: Path, marker: str) -> None:
    """Make a work folder, or take over an unfinished run's, known by a file named `marker`.

    Raises:
        OutputExistsError: something else has this name; it is left alone.
    """
    ours = path.is_dir() and not path.is_symlink()
    if ours and any(path.iterdir()) and not (path / marker).is_file():
        ours = False
    if not ours and (path.exists() or path.is_symlink()):
        raise OutputExistsError(
            f"{path}: is in the way and no work folder of an interrupted run, left alone",
            hint="move it away, or choose another output",
        )
    make_dir(path)


def remove_tree(path: Path) -> None:
    """Remove a work folder and all in it. Links are removed, never followed."""
    if not path.exists() and not path.is_symlink():
        return
    with operation("unlink", path):
        shutil.rmtree(path)


def fsync_dir(path: Path) -> None:
    """Make the names in a folder durable."""
    with operation("fsync-dir", path):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def aside_of(destination: Path) -> Path:
    """Where `publish_dir` puts what it replaces for a moment."""
    return destination.with_name(destination.name + ".replaced")


def publish_dir(work: Path, destination: Path, *, force: bool) -> None:
    """Give the finished folder `work` its final name.

    With `force` an existing destination is first renamed aside (``NAME.replaced``) and removed
    after the new one is in place: at any moment the old, the new or no folder has the name.
    """
    aside = aside_of(destination)
    if force and destination.exists():
        remove_tree(aside)
        replace(destination, aside)
    replace(work, destination)
    fsync_dir(destination.parent)
    if force:
        remove_tree(aside)


def require_regular(path: Path) -> int:
    """Size in bytes of a regular file. InputError for anything else, links included."""
    try:
        status = path.lstat()
    except OSError as error:
        raise InputError(f"{path}: {os.strerror(error.errno or 0).lower()}") from error
    if stat.S_ISLNK(status.st_mode):
        raise InputError(f"{path}: is a link, expected a regular file")
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path}: is not a regular file")
    return status.st_size


def read_bytes(path: Path, *, limit_bytes: int) -> bytes:
    """Whole content of a small file; InputError when it is larger than `limit_bytes`."""
    path = Path(path)
    with operation("read", path):
        with path.open("rb") as file:
            data = file.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise InputError(f"{path}: larger than the limit of {limit_bytes:,} bytes")
    return data


def read_chunks(path: Path, chunk_bytes: int) -> Iterator[bytes]:
    """A file front to back in pieces of at most `chunk_bytes`."""
    with operation("read", path):
        file = path.open("rb")
    with file:
        while True:
            with operation("read", path):
                chunk = file.read(chunk_bytes)
            if not chunk:
                return
            yield chunk


def list_dir(path: Path) -> list[Path]:
    """Entries of a folder, sorted."""
    with operation("read", path):
        return sorted(path.iterdir())


def map_bytes(path: Path, *, random_access: bool = False) -> npt.NDArray[np.uint8]:
    """The file as a read-only U8 array backed by the page cache, not by anonymous memory."""
    path = Path(path)
    with operation("map", path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            length = os.fstat(fd).st_size
            if length == 0:
                return np.empty(0, np.uint8)
            mapped = mmap.mmap(fd, length, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
    if random_access:
        mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, np.uint8)


def scratch_array(
    path: Path, dtype: npt.DTypeLike, shape: tuple[int, ...]
) -> np.memmap[Any, np.dtype[Any]]:
    """A writable array in a new file, for spilling; its disk space is reserved first.

    Without the reservation a full disk would end the process with SIGBUS instead of an error.
    """
    size_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    with operation("write", path, needed_bytes=size_bytes):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            os.posix_fallocate(fd, 0, max(1, size_bytes))
        finally:
            os.close(fd)
    return np.memmap(path, dtype, "r+", shape=shape)


def require_free(folder: Path, needed_bytes: int) -> None:
    """ResourceError when the file system of `folder` has less than 1.02 x `needed_bytes` left."""
    free = free_bytes(Path(folder).absolute())
    if free is not None and free < 1.02 * needed_bytes:
        raise ResourceError(
            f"{folder}: not enough disk space, {needed_bytes:,} bytes needed, {free:,} bytes free",
            hint="free space or choose another output folder",
        )


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock file; ResourceError when another process holds it.

    Only a courtesy: correctness rests on rename, because some network file systems grant the lock
    to everybody.
    """
    with operation("open", path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        busy = ResourceError(
            f"{path.parent}: another process is writing here (lock {path.name})",
            hint="wait for it to end, or choose another output",
        )
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.path.samestat(os.fstat(fd), os.stat(path))
        except OSError as error:
            raise busy from error
        if not held:  # its owner ended and removed the file after we had opened it
            raise busy
        yield
    finally:
        os.close(fd)
