"""Studies on the pico model, for the tests of `tolkit.study`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from _eval_fakes import text_of
from _pico import pico_checkpoint

from tolkit.progress import SilentProgress
from tolkit.study import StudyReport, StudySpec, run_study

RunStudy = Callable[..., StudyReport]


def study_inputs(folder: Path) -> Path:
    """Writes memory, flex and dense checkpoints of four layers, and three texts."""
    for architecture in ("memory", "flex", "dense"):
        pico_checkpoint(folder / architecture, architecture, num_hidden_layers=4)
    for i, name in enumerate(("text", "other", "calibration")):
        (folder / f"{name}.txt").write_text(text_of(900, seed=i))
    return folder


def study_runner(work: Path, folder: Path) -> RunStudy:
    """`run(name, model="memory", **options)`: one study into folder/out.

    A model of that name in `folder` comes before one in `work`.
    """

    def run(name: str, model: str = "memory", **options: Any) -> StudyReport:
        values: dict[str, Any] = {"out": folder / "out", "device": "cpu", "window": 32}
        values["threads"] = 1
        if name != "spectrum":
            values["data"] = (str(work / "text.txt"),)
        path = folder / model if (folder / model).exists() else work / model
        progress = options.pop("progress", SilentProgress())
        return run_study(StudySpec(name, path, **{**values, **options}), progress)

    return run
