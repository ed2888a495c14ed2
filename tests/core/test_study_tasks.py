"""Tasks scored beside perplexity in a study."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from _study import RunStudy, study_inputs, study_runner

from tolkit.errors import MismatchError
from tolkit.evaluate.adjust import scaled
from tolkit.evaluate.tasks import TASKS, evaluate_tasks, find_tasks
from tolkit.progress import SilentProgress
from tolkit.tables import load_runnable


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return study_inputs(tmp_path_factory.mktemp("work"))


@pytest.fixture
def study(work: Path, tmp_path: Path) -> RunStudy:
    return study_runner(work, tmp_path)


def task_folder(tmp_path: Path) -> Path:
    """lambada with five items, and arc_easy with three."""
    for name in ("lambada", "arc_easy"):
        (tmp_path / "tasks" / name).mkdir(parents=True)
    texts = [f"the cat sat on a mat {i} who are you" for i in range(5)]
    lines = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "tasks" / "lambada" / "test.jsonl").write_text("\n".join(lines) + "\n")
    choices = {"text": ["a cat", "a mat", "you"], "label": ["A", "B", "C"]}
    items = [{"question": f"Who sat {i}?", "choices": choices, "answerKey": "A"} for i in range(3)]
    lines = [json.dumps(item) for item in items]
    (tmp_path / "tasks" / "arc_easy" / "test.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "tasks"


def test_tasks_are_scored_beside(study: RunStudy, work: Path, tmp_path: Path) -> None:
    options = {"tasks": ("arc_easy", "lambada"), "task_data": task_folder(tmp_path)}
    report = study("alpha", values="1,0.3", **options)
    header = report.files["csv"].read_text().splitlines()[0].split(",")
    assert {"arc_easy_acc", "arc_easy_acc_se", "lambada_acc"} <= set(header)
    model = load_runnable(work / "memory")
    tasks = find_tasks(*options.values())
    (expected,) = evaluate_tasks(
        [scaled(model, 0.3)], model, tasks, device="cpu", progress=SilentProgress()
    )
    row = report.rows[1]
    for result in expected:
        assert row[f"{result.task}_items"] == result.n
        for name in TASKS[result.task].metrics:
            key = f"{result.task}_{name}"
            assert row[key] == pytest.approx(result.metrics[name].value)
            assert row[f"{key}_se"] == pytest.approx(result.metrics[name].se)
            assert row[f"{key}_reference"] == report.rows[0][key]
    shown = [field.key for field in report.fields]
    assert shown.index("arc_easy_acc") < shown.index("lambada_acc") < shown.index("paper_ppl")
    assert "arc_easy" in report.tasks and "(n 3)" in report.tasks
    assert report.tasks in report.files["md"].read_text()
    assert study("alpha", values="1,0.3", **options).measured == 0
    with pytest.raises(MismatchError, match="of another tasks"):
        study("alpha", values="1,0.3")
    with pytest.raises(MismatchError, match="of another tasks"):
        study("alpha", values="1,0.3", **options, task_limit=2)
