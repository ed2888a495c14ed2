"""What may go wrong around a gate: it never passes, and only quality is exit code 3."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from _eval_fakes import text_of
from _pico import pico_checkpoint, pico_model, pico_tokenizer_files

import tolkit.evaluate.forward
from tolkit.model import save_checkpoint
from tolkit_cli.main import main

ROOT = Path(__file__).parents[2]
EASY = ("--gate", "ppl_token<=1e300", "--gate", "bytes<=1TB", "--allow-undecided")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ckpt, full.tol and text.txt; base.jsonl is the record of full.tol against ckpt."""
    folder = tmp_path_factory.mktemp("faults")
    pico_checkpoint(folder / "ckpt")
    (folder / "text.txt").write_text(text_of(1500))
    assert main(["build", str(folder / "ckpt"), "-o", str(folder / "full.tol"), "-q"]) == 0
    assert evaluate(folder) == 0
    (folder / "full.tol" / "quality.jsonl").rename(folder / "base.jsonl")
    return folder


@pytest.fixture(autouse=True)
def no_record(work: Path) -> None:
    (work / "full.tol" / "quality.jsonl").unlink(missing_ok=True)


def evaluate(work: Path, *options: object, data: str = "text.txt", model: str = "full.tol") -> int:
    command = ["eval", work / model, "--reference", work / "ckpt", "--data", work / data]
    return main([*map(str, command), "-q", *map(str, options)])


def records(work: Path) -> list[dict[str, Any]]:
    log = work / "full.tol" / "quality.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def spoiled(path: Path, weight: float) -> Path:
    """A checkpoint whose embedding, which is its head too, is one value throughout."""
    model = pico_model(tie_word_embeddings=True)
    with torch.no_grad():
        model.embedding[:] = weight
    save_checkpoint(model, path, pico_tokenizer_files(), None)
    return path


def test_the_gates_of_these_tests_can_pass(work: Path) -> None:
    assert evaluate(work, *EASY) == 0
    assert evaluate(work, "--baseline", work / "base.jsonl", "--gate", "ppl_token<=baseline") == 0


@pytest.mark.parametrize("gates", [EASY, ()])
def test_nan_logits_are_4(
    work: Path, monkeypatch: pytest.MonkeyPatch, gates: tuple[str, ...]
) -> None:
    true_scores = tolkit.evaluate.forward.score_positions

    def with_nan(hidden: Any, *rest: Any, **options: Any) -> Any:
        hidden[-1][0, 0] = torch.nan
        return true_scores(hidden, *rest, **options)

    monkeypatch.setattr(tolkit.evaluate.forward, "score_positions", with_nan)
    assert evaluate(work, *gates) == 4
    assert evaluate(work, *gates, "--baseline", work / "base.jsonl") == 4
    assert all("NaN" in record["problems"][0] for record in records(work))
    assert not any(gate["ok"] for record in records(work) for gate in record["gates"])


@pytest.mark.parametrize("reference", [False, True])
def test_a_model_that_says_nothing_never_passes(
    work: Path, tmp_path: Path, reference: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """All logits equal: as candidate, and as a reference everything would agree with."""
    mute = spoiled(tmp_path / "mute", 0.25)
    gates = ["--gate", "ppl_token<=1e300", "--allow-undecided"]
    model, partner = (work / "ckpt", mute) if reference else (mute, work / "ckpt")
    command = ["eval", model, "--reference", partner, "--other-reference"]
    command += ["--data", work / "text.txt", *gates]
    assert main([str(word) for word in command]) == 4
    assert "all logits are equal" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] can't allocate memory: 9 bytes")]
)
def test_out_of_memory_is_6(work: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(tolkit.evaluate.forward, "score_positions", refuse)
    assert evaluate(work, *EASY) == 6
    assert records(work) == []


def test_a_missing_or_empty_baseline_is_4(work: Path, tmp_path: Path) -> None:
    gate = ("--gate", "ppl_token<=baseline+100%", "--allow-undecided")
    assert evaluate(work, *gate) == 2, "none was named"
    assert evaluate(work, *gate, "--baseline", tmp_path / "none.jsonl") == 4
    assert evaluate(work, *gate, "--baseline", tmp_path) == 4
    (tmp_path / "empty.jsonl").write_bytes(b"")
    assert evaluate(work, *gate, "--baseline", tmp_path / "empty.jsonl") == 4
    newer = (work / "base.jsonl").read_text().replace("tolkit.quality/1", "tolkit.quality/2")
    (tmp_path / "newer.jsonl").write_text(newer)
    assert evaluate(work, *gate, "--baseline", tmp_path / "newer.jsonl") == 4
    assert records(work) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text + "!",
        lambda text: text[:-200],
        lambda text: " ".join(sorted(text.split(" "))),
        lambda text: "\f".join([text[700:], text[:700]]),
    ],
    ids=["longer", "shorter", "words sorted", "parts swapped"],
)
def test_another_text_than_the_baselines_is_5(
    work: Path, change: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "other.txt").write_text(change((work / "text.txt").read_text()))
    options = ["--baseline", work / "base.jsonl", "--gate", "ppl_token<=baseline+999%"]
    assert evaluate(work, *options, data="other.txt") == 5
    there = json.loads((work / "base.jsonl").read_text())["text_digest"]
    error = capsys.readouterr().err
    assert error.startswith("error: --baseline: ")
    assert f"{there[:16]} there" in error
    assert records(work) == []


@pytest.mark.parametrize("options", [("--window", "32"), ("--packed",)])
def test_other_windows_than_the_baselines_are_5(work: Path, options: tuple[str, ...]) -> None:
    assert evaluate(work, *options, "--baseline", work / "base.jsonl") == 5


def test_no_reference_where_the_baseline_has_one_is_5(work: Path) -> None:
    command = ["eval", work / "full.tol", "--data", work / "text.txt"]
    command += ["--baseline", work / "base.jsonl"]
    assert main([str(word) for word in command]) == 5


@pytest.mark.parametrize(
    "gate", ["ppl_increase<=1", "kl_mean<=1", "top1_agreement>=0", "ppl_word<=reference+1%"]
)
def test_a_comparison_without_a_reference_is_2_before_the_work(work: Path, gate: str) -> None:
    command = ["eval", work / "full.tol", "--data", work / "text.txt", "--gate", gate]
    assert main([str(word) for word in command]) == 2
    assert records(work) == []


def test_nothing_to_score_is_4(work: Path) -> None:
    for data in (b"", b"\xff\xfe\xff"):
        (work / "other.txt").write_bytes(data)
        assert evaluate(work, *EASY, data="other.txt") == 4
    assert records(work) == []


def test_too_little_to_decide_is_3(work: Path) -> None:
    """One window has no error: undecided, which is a matter of quality not shown."""
    (work / "other.txt").write_text("a few words")
    assert evaluate(work, "--gate", "ppl_increase<=999%", data="other.txt") == 3


def test_a_repeated_run_is_equal_to_the_last_digit(work: Path) -> None:
    for _ in range(2):
        assert evaluate(work, "--gate", "kl_mean<=1") == 0
    first, second = (work / "full.tol" / "quality.jsonl").read_bytes().splitlines()
    assert first == second


KILLED = """
import os, signal, sys
import tolkit.evaluate.forward as forward, tolkit.evaluate.quality as quality
from tolkit_cli.main import main

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

class HalfWriting:
    def __getattr__(self, name):
        return getattr(os, name)
    def write(self, fd, line):
        os.write(fd, line[: len(line) // 2])
        die()

if sys.argv[1] == "while measuring":
    forward.score_positions = die
else:
    quality.os = HalfWriting()
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("moment", ["while measuring", "while writing"])
def test_a_killed_run_leaves_no_record_to_believe(work: Path, moment: str) -> None:
    command = ["eval", work / "full.tol", "--reference", work / "ckpt"]
    command += ["--data", work / "text.txt"]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, moment, *map(str, command)],
        env={"PYTHONPATH": ":".join(str(ROOT / part) for part in ("", "cli", "formats"))},
        capture_output=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    log = work / "full.tol" / "quality.jsonl"
    assert log.exists() == (moment == "while writing")
    against = ("--baseline", work / "full.tol", "--gate", "ppl_token<=baseline")
    assert evaluate(work, *against) == 4, "there is no whole record"
    assert evaluate(work) == 0
    assert evaluate(work, *against) == 0
    assert log.read_bytes().count(b"\n") == (3 if moment == "while writing" else 2)
