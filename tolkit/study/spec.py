"""What a user can ask of a study, checked before anything is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from tolkit.errors import UsageError

__all__ = ["StudySpec", "numbers", "words"]


@dataclass(frozen=True)
class StudySpec:
    """One study of one model.

    Attributes:
        study: a name of `tolkit.study.STUDIES`.
        model: checkpoint folder, or a bundle where the study can read one.
        out: folder for the tables, figures and results; made when missing, continued when it
            holds part of the same study.
        data: text to measure on; spectrum and decode need none.
        values: comma-separated points instead of the study's own: alphas, codecs, rank cuts in
            percent, layers, pruning methods, methods or libraries of pareto, or architectures.
        against: pruning only: checkpoints whose active parameters are the target.
        calibration, calibration_windows: pruning only: text Wanda and SparseGPT look at, and how
            many windows of it.
        window, packed, limit_tokens, device, dtype, batch_tokens: as in `evaluate`.
        tasks, task_data: tasks to score as well (`tolkit.evaluate.tasks`), and the folder with
            their files. task_limit: only the first so many items of each.
        threads: blocks worked on at once while compressing; None takes every usable CPU.
        keep: keep the bundles that bits, rank and pareto make.
        restart: discard what the folder holds.
    """

    study: str
    model: Path
    out: Path
    data: tuple[str, ...] = ()
    values: str | None = None
    against: tuple[Path, ...] = ()
    calibration: tuple[str, ...] = ()
    calibration_windows: int = 128
    window: int | None = None
    packed: bool = False
    limit_tokens: int | None = None
    device: str = "auto"
    dtype: str = "float32"
    batch_tokens: int | None = None
    tasks: tuple[str, ...] = ()
    task_data: Path | None = None
    task_limit: int | None = None
    threads: int | None = None
    keep: bool = False
    restart: bool = False

    def __post_init__(self) -> None:
        if self.calibration_windows < 1:
            raise UsageError(
                f"calibration_windows: expected at least 1, got {self.calibration_windows}"
            )


def words(text: str) -> list[str]:
    """``a,b`` -> ["a", "b"]; UsageError for an empty or repeated one."""
    found = [word.strip() for word in text.split(",")]
    if "" in found:
        raise UsageError(f"values: {text!r} has an empty entry", hint="separate values by commas")
    if len(set(found)) != len(found):
        raise UsageError(f"values: {text!r} names a value twice")
    return found


def numbers(text: str, *, low: float, high: float) -> list[float]:
    """``1,0.5`` -> [1.0, 0.5]; UsageError for what is no number in low..high, or twice there."""
    found: list[float] = []
    for word in words(text):
        try:
            value = float(word)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high):
            raise UsageError(f"values: expected numbers from {low:g} to {high:g}, got {word!r}")
        if value in found:
            raise UsageError(f"values: {text!r} names {value:g} twice")
        found.append(value)
    return found
