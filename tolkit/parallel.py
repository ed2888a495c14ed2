"""Blocks of rows on several threads, with the same bits at any number of them.

Whatever decides bits runs on blocks of fixed size with one intra-op thread each; only which
thread takes which block depends on the machine, so every sum keeps its order.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

__all__ = [
    "BlockPool",
    "all_intra_op_threads",
    "block_pool",
    "one_intra_op_thread",
    "usable_cpus",
]

_M_MMAP_THRESHOLD = -3  # mallopt(3)
_SMALL_MAPPING_BYTES = 1 << 20
_LARGEST_MAPPING_BYTES = 32 << 20  # where glibc's own, growing threshold ends
_STRIP_ROWS = 128

_A = TypeVar("_A")
_R = TypeVar("_R")


def usable_cpus() -> int:
    """CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class BlockPool:
    """Worker threads of one torch intra-op thread each. Get one from `block_pool`."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.executor = ThreadPoolExecutor(
            threads,
            thread_name_prefix="tolkit",
            initializer=torch.set_num_threads,
            initargs=(1,),
        )

    def map(self, function: Callable[[_A], _R], items: Iterable[_A]) -> list[_R]:
        """`[function(item) for item in items]`, side by side; the first error is raised."""
        return list(self.executor.map(function, items))

    def product(self, left_MK: torch.Tensor, right_KN: torch.Tensor) -> torch.Tensor:
        """`left @ right` in strips of rows side by side; the same bits at any number of threads."""
        starts = range(0, len(left_MK), _STRIP_ROWS)
        strips = self.map(lambda m: left_MK[m : m + _STRIP_ROWS] @ right_KN, starts)
        return torch.cat(strips) if strips else left_MK @ right_KN


@contextmanager
def block_pool(threads: int | None = None) -> Iterator[BlockPool]:
    """A pool of `threads` (None: every usable CPU), torch at one intra-op thread meanwhile.

    Tensors of a megabyte and more go back to the system when freed meanwhile. The C library would
    otherwise keep those of several threads and layers (measured at the 1B shape with 24 layers:
    a peak of 465 instead of 376 MiB, in no less time).
    """
    pool = BlockPool(max(1, threads or usable_cpus()))
    _map_from(_SMALL_MAPPING_BYTES)
    try:
        with one_intra_op_thread():
            yield pool
    finally:
        pool.executor.shutdown(wait=True, cancel_futures=True)
        _map_from(_LARGEST_MAPPING_BYTES)


def _map_from(size_bytes: int) -> None:
    """Let malloc map blocks of this size and more one by one (glibc; elsewhere nothing happens)."""
    try:
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, size_bytes)
    except (AttributeError, OSError):
        return


@contextmanager
def one_intra_op_thread() -> Iterator[None]:
    """Run the calling thread's torch operations on one thread, then restore its number."""
    with _intra_op_threads(1):
        yield


@contextmanager
def all_intra_op_threads() -> Iterator[None]:
    """Run the calling thread's torch operations on every usable CPU, then restore its number.

    Only for what gives the same bits on any number of threads.
    """
    with _intra_op_threads(usable_cpus()):
        yield


@contextmanager
def _intra_op_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
