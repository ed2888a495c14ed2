"""How much memory this process holds that is not a file's."""

from __future__ import annotations

from pathlib import Path

import torch

__all__ = ["MemoryWatch", "anonymous_bytes"]

_STATUS = Path("/proc/self/status")


def anonymous_bytes() -> int | None:
    """Anonymous memory of this process now; None where the system does not tell (not Linux)."""
    try:
        text = _STATUS.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    _, found, rest = text.partition("RssAnon:")
    return int(rest.split()[0]) * 1024 if found else None


class MemoryWatch:
    """The most seen at the moments `look` was called; a GPU's own count is exact."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.peak_anonymous_bytes: int | None = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.look()

    def look(self) -> None:
        """Note what is held now."""
        held = anonymous_bytes()
        if held is not None:
            self.peak_anonymous_bytes = max(held, self.peak_anonymous_bytes or 0)

    @property
    def peak_device_bytes(self) -> int | None:
        """Most memory torch held on the GPU; None without one."""
        if self._device.type != "cuda":
            return None
        return int(torch.cuda.max_memory_allocated(self._device))
