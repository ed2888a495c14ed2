"""Several processes on one job, as torchrun starts them: who am I, and adding up the findings."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from tolkit.errors import ResourceError

__all__ = ["add_up", "local_rank", "rank", "world_size"]


def world_size() -> int:
    """Processes that work together: torchrun's WORLD_SIZE, 1 without it."""
    return max(1, int(os.environ.get("WORLD_SIZE", "1")))


def rank() -> int:
    """This process, 0 .. world size - 1; rank 0 reports and writes."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process among those of its machine: which CUDA device it takes."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def add_up(arrays: Sequence[npt.NDArray[np.generic]]) -> None:
    """Replace each array by its sum over all processes (mutated); every process gets the sums.

    float64, int64 and int32 arrays, in the same order everywhere. NaN stays NaN. Through gloo,
    so on any machine. A single process has nothing to add.

    Raises:
        ResourceError: the processes do not find each other.
    """
    if world_size() == 1:
        return
    try:
        if not dist.is_initialized():
            _stay_on_this_machine()
            dist.init_process_group("gloo")
        for array in arrays:
            dist.all_reduce(torch.from_numpy(array))
    except (RuntimeError, ValueError) as error:  # what torch.distributed raises for the network
        raise ResourceError(
            f"process {rank()} of {world_size()}: the others cannot be reached ({error})",
            hint="start all of them with torchrun",
        ) from error


def _stay_on_this_machine() -> None:
    """Processes of one machine meet on its loopback: its own name may not resolve."""
    alone = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    if alone and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
