"""Fused look-ups on CUDA devices, in Triton. Import `launch` only where `why_not` gives None."""

from __future__ import annotations

import importlib.util
import os

import torch

__all__ = ["SWITCH", "interpreted", "why_not"]

SWITCH = "TOLKIT_KERNELS"
"""Environment variable: ``off`` keeps to the torch path."""


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on any device, slowly (for tests)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def why_not(device: torch.device) -> str | None:
    """The reason why kernels cannot run on a device, None where they can."""
    if os.environ.get(SWITCH, "").lower() == "off":
        return f"{SWITCH}=off"
    if device.type != "cuda" and not interpreted():
        return f"{device} is no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None
