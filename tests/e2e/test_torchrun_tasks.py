"""Several processes share the evaluation tasks and find what one finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from _pico import pico_checkpoint
from _task_rows import ROWS, write_rows


def scored(work: Path, *launcher: str) -> dict[str, dict[str, float]]:
    """Metrics of one run of `tol eval --tasks`."""
    command = [*launcher, "-m", "tolkit_cli.main", "eval", "ckpt", "--tasks", ",".join(ROWS)]
    command += ["--task-data", "tasks", "--batch-tokens", "300", "--json"]
    paths = os.pathsep.join(map(os.path.abspath, sys.path))
    done = subprocess.run(
        command,
        cwd=work,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout)["metrics"]
    return {name: value for name, value in metrics.items() if "." in name}


def test_two_processes_score_what_one_does(tmp_path: Path) -> None:
    pico_checkpoint(tmp_path / "ckpt", max_position_embeddings=256)
    write_rows(tmp_path / "tasks")
    alone = scored(tmp_path, sys.executable)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--local-addr", "127.0.0.1"]  # a test machine's name may not resolve
    both = scored(tmp_path, *torchrun, "--nproc-per-node", "2")
    assert {name.partition(".")[0] for name in alone} == set(ROWS)
    assert both.keys() == alone.keys()
    for name, metric in alone.items():
        assert both[name] == pytest.approx(metric, rel=1e-12), name
