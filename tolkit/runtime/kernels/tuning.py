"""Block sizes of the kernels: timed once a device and shape, remembered in a small file.

The file ($XDG_CACHE_HOME or ~/.cache, tolkit/kernels.json) is never required: where it cannot be
read or written, sizes are timed again in every process. It may be removed at any time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from tolkit_formats import files
from tolkit_formats.errors import TolError

__all__ = ["Blocks", "Tuning", "cache_path"]

Blocks = Mapping[str, int]
"""Constants of a launch by name, such as BLOCK or num_warps."""

_ROUNDS = 5
_LIMIT_BYTES = 1 << 20


def cache_path() -> Path:
    """Where choices are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "tolkit" / "kernels.json"


class Tuning:
    """Chooses among block sizes for one device.

    Args:
        device_name: part of the key, as speed is the device's.
        path: the file; by default `cache_path()`.
        seconds: times a call; by default CUDA events around it.
    """

    def __init__(
        self,
        device_name: str,
        *,
        path: Path | None = None,
        seconds: Callable[[Callable[[], None]], float] | None = None,
    ) -> None:
        self._device_name = device_name
        self._path = cache_path() if path is None else path
        self._seconds = seconds or _cuda_seconds
        self._known: dict[str, int] = {}

    def choose(
        self, shape: str, candidates: Sequence[Blocks], launch: Callable[[Blocks], None]
    ) -> Blocks:
        """The fastest of `candidates`; launches each when the shape is new, so twice is harmless.

        A candidate the device refuses (too much shared memory) is passed over. The first one
        stands where none may be timed, while a graph is captured.
        """
        key = self._key(shape, candidates)
        if key not in self._known:
            found = self._stored().get(key)
            if found is not None and 0 <= found < len(candidates):
                self._known[key] = found
            elif torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                return candidates[0]
            else:
                self._known[key] = self._timed(candidates, launch)
                self._store()
        return candidates[self._known[key]]

    def _key(self, shape: str, candidates: Sequence[Blocks]) -> str:
        # The candidates are part of the key: another version of tolkit may have others.
        sizes = ";".join(",".join(f"{k}={v}" for k, v in sorted(c.items())) for c in candidates)
        return f"{self._device_name} | {shape} | {sizes}"

    def _timed(self, candidates: Sequence[Blocks], launch: Callable[[Blocks], None]) -> int:
        if len(candidates) == 1:
            return 0
        best, best_s = 0, float("inf")
        for i, blocks in enumerate(candidates):
            try:
                launch(blocks)
                call = partial(launch, blocks)
                elapsed_s = min(self._seconds(call) for _ in range(_ROUNDS))
            except Exception as error:
                if type(error).__name__ != "OutOfResources":
                    raise
                continue
            if elapsed_s < best_s:
                best, best_s = i, elapsed_s
        return best

    def _stored(self) -> dict[str, int]:
        try:
            stored = json.loads(files.read_bytes(self._path, limit_bytes=_LIMIT_BYTES))
        except (TolError, OSError, ValueError):
            return {}
        if not isinstance(stored, dict):
            return {}
        return {key: value for key, value in stored.items() if type(value) is int}

    def _store(self) -> None:
        merged = json.dumps({**self._stored(), **self._known}, indent=1, sort_keys=True)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            files.write_atomic(self._path, merged.encode())
        except (TolError, OSError):
            return  # another process or a read-only home; the choice holds for this process


def _cuda_seconds(call: Callable[[], None]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3
