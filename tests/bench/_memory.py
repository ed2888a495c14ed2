"""Anonymous memory of this process, sampled while something runs. Linux only."""

from __future__ import annotations

import threading
from pathlib import Path

MIB = 1 << 20


def anonymous_bytes() -> int:
    """RssAnon: mapped and cached file pages are left out."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status; Linux only")


class PeakMemory:
    """Within a `with` block, the most seen: `peak_bytes`, and `baseline_bytes` at its start."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s

    def __enter__(self) -> PeakMemory:
        self.baseline_bytes = self.peak_bytes = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self._every_s):
            self.peak_bytes = max(self.peak_bytes, anonymous_bytes())

    @property
    def added_mib(self) -> float:
        """Peak above the baseline."""
        return (self.peak_bytes - self.baseline_bytes) / MIB
