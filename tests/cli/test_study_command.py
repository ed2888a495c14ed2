"""`tol study` through the command line, on the pico model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from _cli import run
from _pico import pico_checkpoint

from tolkit.study import STUDIES

TEXT = "the quick brown fox jumps over the lazy dog; " * 40


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    pico_checkpoint(folder / "ckpt")
    pico_checkpoint(folder / "dense", "dense")
    (folder / "text.txt").write_text(TEXT)
    return folder


def test_every_study_is_named_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    text, _ = run(capsys, "study", "--help")
    for name in STUDIES:
        assert f"{name}:" in text.replace("\n", " ")


def test_json_plain_and_human_say_the_same(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["study", "alpha", work / "ckpt", "--data", work / "text.txt", "-o", tmp_path / "o"]
    text, _ = run(capsys, *command, "--values", "1,0.5", "--json")
    result: dict[str, Any] = json.loads(text)
    assert result["metrics"]["measured"] == 2
    rows = result["metrics"]["points"]
    assert [row["alpha"] for row in rows] == [1.0, 0.5]
    assert rows[0]["kl_mean_nats"] == 0
    assert rows[1]["ppl_increase_se"] > 0
    assert rows[1]["paper_ppl"] == 53.707
    assert Path(result["outputs"]["md"]).is_file()
    plain, _ = run(capsys, *command, "--values", "1,0.5")
    table = [line.split("\t") for line in plain.split("\n\n")[1].splitlines()]
    column = table[0].index("kl_mean_nats")
    assert [float(line[column]) for line in table[1:3]] == [row["kl_mean_nats"] for row in rows]
    human, _ = run(capsys, *command, "--values", "1,0.5", "--format", "human")
    assert "0 measured, 2 taken from an earlier run" in human
    assert "arXiv 2602.00398, Table 1, MemoryLLM-1B" in human
    assert "Another model and other text" in human
    quiet, errors = run(capsys, *command, "--values", "1,0.5", "-q")
    assert (quiet, errors) == (f"{tmp_path / 'o' / 'alpha.md'}\n", "")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["alpha", "ckpt"], 2, "--data: alpha measures on text"),
        (["beta", "ckpt", "--data", "text.txt"], 2, "STUDY: 'beta' is none"),
        (["alpha", "dense", "--data", "text.txt"], 2, "is a dense model"),
        (["alpha", "nothing", "--data", "text.txt"], 4, "nothing"),
        (["alpha", "ckpt", "--data", "text.txt", "--values", "x"], 2, "--values: expected numbers"),
        (["alpha", "ckpt", "--data", "text.txt", "--keep"], 2, "--keep: alpha has no use for it"),
        (["alpha", "ckpt", "--data", "text.txt", "--device", "cuda:99"], 6, "cuda:99 is not here"),
        (["pruning", "dense", "--data", "text.txt"], 2, "--against: names no checkpoint"),
    ],
)
def test_refusals_name_the_option(
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(work)
    _, errors = run(capsys, "study", *arguments, "-o", tmp_path / "o", code=code)
    assert errors.startswith("error: ")
    assert said in errors
    assert not (tmp_path / "o").exists()


def test_other_conditions_are_refused_with_what_to_do(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["study", "drop", work / "ckpt", "--data", work / "text.txt", "-o", tmp_path / "o"]
    run(capsys, *command)
    _, errors = run(capsys, *command, "--window", "16", code=5)
    assert "holds results of another window" in errors
    assert "hint: choose another folder with -o, or add --restart" in errors
    run(capsys, *command, "--window", "16", "--restart")


def test_what_was_left_out_is_said(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["study", "pareto", work / "ckpt", "--data", work / "text.txt", "-o", tmp_path / "o"]
    command += ["--values", "bnb-nf4", "--limit-tokens", "200"]
    text, _ = run(capsys, *command, "--json")
    result: dict[str, Any] = json.loads(text)
    assert result["metrics"]["notes"][0].startswith("Measured with bitsandbytes ")
    assert Path(result["outputs"]["bound"]).is_file()
    methods = [row["method"] for row in result["metrics"]["points"]]
    assert methods == ["bnb-nf4", *["Gaussian bound"] * 5]
    human, errors = run(capsys, *command, "--format", "human")
    assert f"\n{result['metrics']['notes'][0]}\n" in human
    assert all(len(line) <= 80 for line in human.splitlines() if line.startswith("bnb"))
    assert "Failed to load" not in errors
