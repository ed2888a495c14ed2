"""`tol eval` beyond text: tasks, lm-eval tasks and alpha, in every report."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from _cli import result_of
from _pico import pico_checkpoint
from _task_rows import ROWS, write_rows

from tolkit_cli.main import main

TEXT = "the quick brown fox jumps over the lazy dog; " * 40
NAMES = ("piqa", "boolq", "lambada")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ckpt, small.tol, text.txt, and tasks/ with a few items each."""
    folder = tmp_path_factory.mktemp("work")
    pico_checkpoint(folder / "ckpt", max_position_embeddings=256)
    (folder / "text.txt").write_text(TEXT)
    write_rows(folder / "tasks", {name: ROWS[name] for name in NAMES})
    command = ["compress", str(folder / "ckpt"), "-o", str(folder / "small.tol"), "--bits", "4"]
    assert main([*command, "-q"]) == 0
    return folder


def records(bundle: Path) -> list[dict[str, Any]]:
    path = bundle / "quality.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_tasks_stand_beside_the_text_in_every_report(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = {kind: tmp_path / f"r.{kind}" for kind in ("json", "xml", "md")}
    found = result_of(
        capsys, "eval", work / "small.tol", "--reference", work / "ckpt",
        "--data", work / "text.txt",
        "--tasks", ",".join(NAMES), "--task-data", work / "tasks",
        "--gate", "piqa.acc>=0", "--gate", "lambada.acc_change>=-101%",
        "--json-out", reports["json"], "--junit", reports["xml"], "--markdown", reports["md"],
    )  # fmt: skip
    metrics = found["metrics"]
    assert metrics["ppl_increase"]["n"] > 100
    assert metrics["piqa.acc"]["n"] == len(ROWS["piqa"])
    assert {"boolq.acc", "boolq.choice_agreement", "lambada.perplexity"} <= metrics.keys()
    assert [gate["status"] for gate in found["thresholds"]] == ["passed", "passed"]
    report = json.loads(reports["json"].read_text())
    assert report["metrics"]["piqa.acc_norm"] == metrics["piqa.acc_norm"]
    assert report["reference_metrics"]["piqa.acc"]["n"] == len(ROWS["piqa"])
    cases = ET.fromstring(reports["xml"].read_text()).iter("testcase")
    assert [case.get("name") for case in cases] == ["piqa.acc>=0", "lambada.acc_change>=-101%"]
    assert "| piqa.acc |" in reports["md"].read_text()
    tasks = records(work / "small.tol")[-1]["tasks"]
    assert len(tasks["piqa"]["outcomes"]["acc"]) == len(ROWS["piqa"])


def test_tasks_alone_need_no_text_and_compare_with_their_own_record(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [work / "small.tol", "--tasks", "piqa", "--task-data", work / "tasks"]
    first = result_of(capsys, "eval", *asked)
    assert "ppl_token" not in first["metrics"]
    again = result_of(
        capsys, "eval", *asked, "--baseline", work / "small.tol", "--gate", "piqa.acc>=baseline"
    )
    assert again["thresholds"][0]["change"]["value"] == 0
    one = [*asked, "--task-limit", "1", "--baseline", work / "small.tol"]
    refused = result_of(capsys, "eval", *one, "--gate", "piqa.acc>=baseline", code=5)
    assert "other items of task piqa" in refused["error"]["message"]


def test_alpha_scales_the_rows_and_leaves_no_record(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [work / "small.tol", "--reference", work / "ckpt", "--data", work / "text.txt"]
    before = len(records(work / "small.tol"))
    half = result_of(capsys, "eval", *asked, "--alpha", "0.5")["metrics"]["kl_mean_nats"]["value"]
    assert len(records(work / "small.tol")) == before
    whole = result_of(capsys, "eval", *asked)["metrics"]["kl_mean_nats"]["value"]
    assert len(records(work / "small.tol")) == before + 1
    assert half > 10 * whole
    refused = result_of(capsys, "eval", *asked, "--alpha", "-1", code=2)
    assert refused["error"]["message"].startswith("--alpha: expected a finite number")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "nothing to measure"),
        (["--tasks", "piqa"], "--tasks: needs their files"),
        (["--lm-eval", "piqa", "--alpha", "0.5"], "--lm-eval: runs in one process"),
    ],
)
def test_options_that_make_no_sense(
    work: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    found = result_of(capsys, "eval", work / "small.tol", *options, code=2)
    assert said in found["error"]["message"]


def test_lm_eval_tasks_on_a_bundle(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("transformers", "lm_eval", "accelerate"):
        pytest.importorskip(name, reason="needs the extra lm-eval")
    folder = work / "own"
    folder.mkdir()
    rows = [{"q": "the cat", "options": ["sat", "ran"], "gold": i % 2} for i in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "own.yaml").write_text(
        "task: own_task\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {folder / 'rows.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\n"
        "doc_to_choice: options\ndoc_to_target: gold\nmetric_list:\n  - metric: acc\n"
    )
    found = result_of(
        capsys, "eval", work / "small.tol", "--reference", work / "ckpt",
        "--lm-eval", "own_task",
        "--task-data", folder, "--gate", "lm_eval_own_task.acc>=1%",
    )  # fmt: skip
    accuracy = found["metrics"]["lm_eval_own_task.acc"]
    assert (accuracy["value"], accuracy["n"]) == (0.5, 6)
    assert accuracy["se"] == pytest.approx(0.2236, abs=1e-3)
    assert found["outputs"]["lm_eval"]["tasks"]["own_task"]["metrics"]["acc"]["value"] == 0.5
    assert found["thresholds"][0]["status"] == "passed"
