"""Several processes share an evaluation: same figures, one voice, one record."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from _pico import pico_checkpoint

from tolkit_cli.main import main

TEXT = "\f\n".join("the quick brown fox jumps over the lazy dog; " * n + "\n" for n in (9, 30, 4))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    pico_checkpoint(folder / "ckpt")
    (folder / "text.txt").write_text(TEXT)
    command = ["compress", str(folder / "ckpt"), "-o", str(folder / "b.tol"), "--bits", "4", "-q"]
    assert main(command) == 0
    return folder


def evaluated(work: Path, *launcher: str, markdown: str) -> tuple[dict, str, str]:
    """The JSON object, stderr, and the Markdown report of one run."""
    command = [*launcher, "-m", "tolkit_cli.main", "eval", "b.tol", "--reference", "ckpt"]
    command += ["--data", "text.txt", "--batch-tokens", "128", "--window", "32", "--json"]
    done = subprocess.run(
        [*command, "--markdown", markdown],
        cwd=work,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr, (work / markdown).read_text()


def test_two_processes_report_what_one_does(work: Path) -> None:
    alone, _, _ = evaluated(work, sys.executable, markdown="alone.md")
    records = (work / "b.tol" / "quality.jsonl").read_text()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--local-addr", "127.0.0.1"]  # a test machine's name may not resolve
    both, errors, report = evaluated(work, *torchrun, "--nproc-per-node", "2", markdown="two.md")
    assert both["metrics"]["ppl_increase"]["n"] > 1000
    for name in ("ppl_token", "ppl_increase", "kl_mean_nats", "kl_p99_nats", "top1_agreement"):
        assert both["metrics"][name] == pytest.approx(alone["metrics"][name], rel=1e-12), name
    lines = (work / "b.tol" / "quality.jsonl").read_text()
    assert lines.startswith(records)
    assert len(lines.splitlines()) == 2  # one record a run, not one a process
    assert report.count("kl_mean_nats") == 1
    assert errors.count("evaluate: 100 %") <= 1
