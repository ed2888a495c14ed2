"""The pipelines of examples/ci: their own command lines, run on a tiny checkpoint."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _eval_fakes import text_of
from _pico import pico_checkpoint

from tolkit.evaluate import load_gates
from tolkit_cli.main import main

yaml = pytest.importorskip("yaml", reason="pyyaml is not installed")

ROOT = Path(__file__).parents[2]
KIT = ROOT / "examples" / "ci"


def github() -> dict[str, Any]:
    return dict(yaml.safe_load((KIT / "github.yml").read_text())["jobs"]["quality"])


def gitlab() -> dict[str, Any]:
    return dict(yaml.safe_load((KIT / "gitlab.yml").read_text())["table-quality"])


def commands(lines: list[str]) -> Iterator[list[str]]:
    """The words of each command, variables filled in; installing is left to the reader."""
    for line in lines:
        for command in line.replace("\\\n", " ").splitlines():
            if not command.startswith("pip "):
                yield shlex.split(os.path.expandvars(command))


def run(lines: list[str]) -> int:
    """Run commands in this process until one fails; its exit code."""
    for words in commands(lines):
        if words[0] == "cp":
            shutil.copy(*words[1:])
            continue
        assert words[0] == "tol", words
        code = main(words[1:])
        if code:
            return code
    return 0


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository after the steps of the README: checkpoint, text, gates, baseline."""
    folder = tmp_path_factory.mktemp("measured")
    pico_checkpoint(folder / "ckpt")
    (folder / "held-out.txt").write_text(text_of(6000))
    (folder / "ci").mkdir()
    shutil.copy(KIT / "gates.toml", folder / "ci")
    readme = (KIT / "README.md").read_text().splitlines()
    steps = [line.strip() for line in readme if line.startswith("    ")]
    assert [step.split()[0] for step in steps] == ["tol", "tol", "tol", "cp"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run(steps) == 0
    for name in ("full.tol", "small.tol"):
        shutil.rmtree(folder / name)
    return folder


@pytest.fixture
def repository(measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A fresh copy as the current folder, with the variables both jobs set."""
    folder = tmp_path / "repository"
    shutil.copytree(measured, folder)
    monkeypatch.chdir(folder)
    for job in (github()["env"], gitlab()["variables"]):
        for name, value in job.items():
            monkeypatch.setenv(name, value)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    yield folder


def github_runs() -> list[str]:
    return [step["run"] for step in github()["steps"] if "run" in step]


def failed_cases(report: Path) -> list[str]:
    cases = ET.parse(report).getroot().iter("testcase")
    return [case.get("name") for case in cases if case.find("failure") is not None]


def test_both_jobs_run_the_same_commands(repository: Path) -> None:
    assert list(commands(github_runs())) == list(commands(gitlab()["script"]))
    installs = [github_runs()[0], *gitlab()["before_script"]]
    assert installs == ['pip install "$TOLKIT"'] * 2
    assert {gate.partner for gate in load_gates(KIT / "gates.toml")} == {"baseline", None}


def test_the_jobs_keep_their_reports() -> None:
    upload = github()["steps"][-1]
    written = set(re.findall(r"report\.\w+", " ".join(github_runs())))
    assert upload["if"] == "always()"
    assert set(upload["with"]["path"].split()) == written == {
        "report.xml", "report.md", "report.json"
    }  # fmt: skip
    kept = gitlab()["artifacts"]
    assert kept["when"] == "always"
    assert {*kept["paths"], kept["reports"]["junit"]} == written


def test_the_github_job_in_a_shell(repository: Path) -> None:
    """As a runner does it: each step a script for bash -e, `tol` on the path."""
    bin_folder, summary = repository / "bin", repository / "summary.md"
    bin_folder.mkdir()
    tol = bin_folder / "tol"
    tol.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tolkit_cli.main "$@"\n')
    tol.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "cli", "formats")),
        "OMP_NUM_THREADS": "1",
        "GITHUB_STEP_SUMMARY": str(summary),
    }
    for step in github_runs()[1:]:
        done = subprocess.run(
            ["bash", "-e", "-c", step], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert failed_cases(repository / "report.xml") == []
    text = summary.read_text()
    assert text == (repository / "report.md").read_text() + "\n"
    assert text.startswith("## small.tol: 4 of 4 gates met")
    assert "| metric | value | s.e. | reference | baseline | n |" in text


def test_the_gitlab_job_is_green(repository: Path) -> None:
    assert run(gitlab()["script"]) == 0
    assert len(list(ET.parse(repository / "report.xml").getroot().iter("testcase"))) == 4


def test_a_worse_recipe_is_red(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = repository / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    worse = [line.replace("--rank 50%", "--rank 10%") for line in github_runs()]
    assert run(worse) == 3
    assert "top1_agreement>=baseline-0.5%" in failed_cases(repository / "report.xml")
    assert "bytes<=baseline+1%" not in failed_cases(repository / "report.xml")
    assert "**failed**" in summary.read_text()


def test_a_larger_table_is_red(repository: Path) -> None:
    larger = [line.replace("--bits 4", "--bits 8") for line in gitlab()["script"]]
    assert run(larger) == 3
    assert "bytes<=baseline+1%" in failed_cases(repository / "report.xml")


def test_a_missing_baseline_is_not_the_tables_fault(repository: Path) -> None:
    (repository / "ci" / "baseline.jsonl").unlink()
    assert run(gitlab()["script"]) == 4
    assert not (repository / "report.xml").exists()


def test_another_text_is_not_the_tables_fault(repository: Path) -> None:
    (repository / "held-out.txt").write_text(text_of(6000, seed=1))
    assert run(gitlab()["script"]) == 5
    assert not (repository / "report.xml").exists()
