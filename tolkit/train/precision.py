"""Which number format the matrix products of training use."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own habit

from tolkit.errors import ResourceError, UsageError

__all__ = ["choose_device", "choose_dtype"]

_NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_WORTH_IT = 1.5  # casts eat a part of what faster products gain


def choose_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is one, else the CPU.

    Raises:
        UsageError: an unknown name. ResourceError: CUDA asked for and absent.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device: expected auto, cpu or cuda, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ResourceError("device: no CUDA device here", hint="use --device cpu")
    return device


def choose_dtype(name: str, device: torch.device, hidden_size: int) -> torch.dtype:
    """Format of matrix products; weights, sums and the optimiser stay float32.

    "auto" on CUDA is bfloat16 where supported; on a CPU a probe of a few milliseconds decides:
    bfloat16 when a product of the model's width runs at least 1.5x faster, casts included.
    """
    if name != "auto":
        if name not in _NAMES:
            raise UsageError(f"dtype: expected auto, float32 or bfloat16, got {name!r}")
        return _NAMES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if device.type != "cpu":
        return torch.float32
    gain = _product_s(torch.float32, hidden_size) / _product_s(torch.bfloat16, hidden_size)
    return torch.bfloat16 if gain >= _WORTH_IT else torch.float32


def _product_s(dtype: torch.dtype, width: int) -> float:
    """Best of five timings of [1024, D] x [D, 3 D] from float32 and back, after one untimed."""
    states, weight = torch.ones(1024, width), torch.ones(3 * width, width)
    best = float("inf")
    with torch.no_grad():
        for repeat in range(6):
            start = time.perf_counter()
            F.linear(states.to(dtype), weight.to(dtype)).float()
            if repeat:
                best = min(best, time.perf_counter() - start)
    return best
