"""What cannot be studied is said before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from _study import RunStudy, study_inputs, study_runner

from tolkit.errors import TolError, UsageError


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return study_inputs(tmp_path_factory.mktemp("work"))


@pytest.fixture
def study(work: Path, tmp_path: Path) -> RunStudy:
    return study_runner(work, tmp_path)


@pytest.mark.parametrize(
    ("name", "model", "options", "said"),
    [
        ("other", "memory", {}, "study: 'other' is none, expected one of alpha, bits"),
        ("alpha", "memory", {"data": ()}, "data: alpha measures on text"),
        ("alpha", "dense", {}, "is a dense model"),
        (
            "alpha",
            "memory",
            {"values": "1,half"},
            "values: expected numbers from 0 to 10, got 'half'",
        ),
        ("alpha", "memory", {"values": "1,-1"}, "values: expected numbers .* got '-1'"),
        ("alpha", "memory", {"values": "1,nan"}, "values: expected numbers .* got 'nan'"),
        ("alpha", "memory", {"values": "1,,2"}, "values: .* has an empty entry"),
        ("alpha", "memory", {"values": "1,1.0"}, "values: .* names 1 twice"),
        ("alpha", "memory", {"keep": True}, "keep: alpha has no use for it"),
        ("alpha", "memory", {"against": (Path("x"),)}, "against: alpha has no use for it"),
        ("bits", "dense", {}, "is a dense model"),
        ("rank", "dense", {}, "is a dense model"),
        ("bits", "memory", {"values": "int3"}, "values: 'int3' is no codec, expected f16"),
        ("rank", "memory", {"values": "100"}, "values: expected numbers from 0 to 99.9"),
        ("drop", "memory", {"values": "4"}, "values: layer 4 is out of range"),
        ("spectrum", "dense", {}, "is a dense checkpoint"),
        ("spectrum", "memory", {"values": "1"}, "values: spectrum has no use for it"),
        ("pruning", "memory", {}, "has token tables, the model to prune is a dense one"),
        ("pruning", "dense", {}, "against: names no checkpoint"),
        ("pareto", "dense", {}, "is a dense checkpoint"),
        ("pareto", "memory", {"values": "q9"}, "values: 'q9' is no method, expected ours, bits"),
        ("pareto", "memory", {"against": (Path("x"),)}, "against: pareto has no use for it"),
        ("pruning", "dense", {"values": "luck"}, "values: 'luck' is no method"),
    ],
)
def test_what_cannot_be_studied(
    study: RunStudy,
    tmp_path: Path,
    name: str,
    model: str,
    options: dict[str, Any],
    said: str,
) -> None:
    with pytest.raises(TolError, match=said) as caught:
        study(name, model, **options)
    assert caught.value.exit_code in (2, 4)
    assert not (tmp_path / "out").exists()


def test_pruning_needs_calibration_text_only_where_it_is_looked_at(
    study: RunStudy, work: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="calibration: wanda and sparsegpt look at text"):
        study("pruning", "dense", against=(work / "memory",))
    report = study("pruning", "dense", against=(work / "memory",), values="magnitude")
    assert [row["method"] for row in report.rows] == ["none", "none", "magnitude"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tasks": ("piqa",)}, "task_data: names no folder with the tasks"),
        ({"task_data": Path("x")}, "tasks: none are named"),
        ({"tasks": ("chess",), "task_data": Path("x")}, "expected one of lambada"),
        ({"name": "spectrum", "tasks": ("piqa",)}, "tasks: spectrum has no use for it"),
    ],
)
def test_tasks_that_cannot_be_scored(study: RunStudy, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        study(**{"name": "alpha", **options})


def test_several_processes_are_not_for_studies(
    study: RunStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="study: runs in one process, torchrun started 2"):
        study("alpha")
