"""The unfinished run on disk: what a killed process continues from, bit for bit.

``OUT.partial`` holds plan.json (what the run is), the tokenizer, encoded text, log.jsonl and the
last two states. A state is a safetensors file (weights, both Adam moments) and a JSON file
written after it, which names its step, size and CRC-32; a state without its JSON, or one that
differs from it, does not count.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tolkit.errors import BundleError, InputError, MismatchError
from tolkit.progress import Progress
from tolkit_formats import files, strict_json
from tolkit_formats.tensorfile import TensorFile, write_tensors

__all__ = ["SavedState", "WorkFolder"]

_STATE = re.compile(r"state-(\d{9})\.json\Z")
_KEPT_STATES = 2
_PLAN_LIMIT_BYTES = 4 << 20
_CRC_BYTES = 8 << 20


@dataclass(frozen=True)
class SavedState:
    """Tensors after `step` finished steps, and plain numbers that belong to them."""

    step: int
    tensors: dict[str, Tensor]
    numbers: dict[str, float]


class WorkFolder:
    """``OUT.partial`` of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read_plan(self) -> dict[str, object] | None:
        """The plan of the run in this folder; None where there is none or it is unreadable."""
        try:
            data = files.read_bytes(self.path / "plan.json", limit_bytes=_PLAN_LIMIT_BYTES)
            plan = strict_json.parse(data, "plan.json")
        except InputError:
            return None
        return plan if isinstance(plan, dict) else None

    def write_plan(self, plan: Mapping[str, object]) -> None:
        """Record what the run is, atomically."""
        files.write_atomic(self.path / "plan.json", _json(plan))

    def require_same(self, held: Mapping[str, object], asked: Mapping[str, object]) -> None:
        """MismatchError naming the first setting in which the run asked for differs."""
        for name in sorted(set(held) | set(asked)):
            if held.get(name) != asked.get(name):
                raise MismatchError(
                    f"{self.path}: holds an unfinished run with another {name}, "
                    f"{held.get(name)!r} there, {asked.get(name)!r} asked for",
                    hint="give the same options to continue it, or --restart to discard it",
                )

    def save(self, step: int, tensors: Mapping[str, Tensor], numbers: Mapping[str, float]) -> None:
        """Publish the state after `step` finished steps; older ones but one are removed."""
        path = self.path / f"state-{step:09d}.safetensors"
        write_tensors(path, {name: ("F32", _array(tensor)) for name, tensor in tensors.items()})
        record = {"step": step, "bytes": path.stat().st_size, "crc32": _crc(path), **numbers}
        files.write_atomic(path.with_suffix(".json"), _json(record))
        for old in self._steps()[_KEPT_STATES:]:
            self._remove(old)

    def newest(self, progress: Progress) -> SavedState | None:
        """The latest state that is whole; damaged ones are passed over with a warning."""
        for step in self._steps():
            state = self._load(step)
            if state is not None:
                return state
            progress.warn(f"{self.path}: the state of step {step} is damaged, going further back")
        return None

    def forget(self) -> None:
        """Remove states and log: without a plan nobody knows what they belong to."""
        for step in self._steps():
            self._remove(step)
        files.unlink(self.path / "log.jsonl")

    def _remove(self, step: int) -> None:
        # The JSON first: tensors without it do not count.
        files.unlink(self.path / f"state-{step:09d}.json")
        files.unlink(self.path / f"state-{step:09d}.safetensors")

    def cut_log(self, step: int) -> None:
        """Drop log records after `step`, and a last line a kill left unfinished."""
        log = self.path / "log.jsonl"
        if not log.exists():
            return
        kept: list[bytes] = []
        for line in log.read_bytes().splitlines(keepends=True):
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and record.get("step", 0) <= step:
                kept.append(line)
        files.write_atomic(log, b"".join(kept))

    def log(self, record: Mapping[str, object]) -> None:
        """Append one line to log.jsonl."""
        with (self.path / "log.jsonl").open("ab") as file:
            file.write(json.dumps(record, allow_nan=False).encode() + b"\n")

    def _steps(self) -> list[int]:
        """Steps with a state, latest first."""
        found = (_STATE.match(entry.name) for entry in self.path.iterdir())
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def _load(self, step: int) -> SavedState | None:
        path = self.path / f"state-{step:09d}.safetensors"
        try:
            data = files.read_bytes(path.with_suffix(".json"), limit_bytes=_PLAN_LIMIT_BYTES)
            record = strict_json.parse(data, path.name)
            if path.stat().st_size != record.pop("bytes") or _crc(path) != record.pop("crc32"):
                return None
            stored = TensorFile(path)
        except (BundleError, InputError, OSError, KeyError, AttributeError):
            return None
        tensors = {name: torch.from_numpy(np.array(stored.array(name))) for name in stored.names}
        return SavedState(int(record.pop("step")), tensors, record)


def _array(tensor: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    array: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = (
        tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    )
    return array


def _crc(path: Path) -> int:
    mapped = files.map_bytes(path)
    crc = 0
    for start in range(0, len(mapped), _CRC_BYTES):
        crc = zlib.crc32(files.bytes_view(mapped[start : start + _CRC_BYTES]), crc)
    return crc


def _json(value: Mapping[str, object]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()
