"""tol compress --keep-rows, and what the other commands say of its bundles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from _cli import result_of
from _pico import PICO_VOCAB, pico_checkpoint, pico_counts

from tolkit_cli.main import main
from tolkit_formats import open_bundle

TEXT = "the quick brown fox jumps over the lazy dog; 0123456789 and a few words more. " * 6


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    pico_checkpoint(folder / "ckpt", num_hidden_layers=3)
    (folder / "t.txt").write_text(TEXT)
    arguments = ["--bits", "8", "--keep-rows", "25%", "--threads", "1"]
    assert main(["compress", str(folder / "ckpt"), "-o", str(folder / "p.tol"), *arguments]) == 0
    return folder


def metrics_of(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    metrics: dict[str, Any] = result_of(capsys, *words)["metrics"]
    return metrics


def covered() -> float:
    counts = sorted(map(int, pico_counts()), reverse=True)
    return sum(counts[:24]) / sum(counts)


def test_compress_and_inspect_say_what_is_covered(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (
        "compress",
        work / "ckpt",
        "-o",
        work / "dry.tol",
        "--keep-rows",
        "24",
        "--dry-run",
    )
    for metrics in (metrics_of(capsys, *arguments), metrics_of(capsys, "inspect", work / "p.tol")):
        assert metrics["rows"] == 24
        assert metrics["covered"] == pytest.approx(covered())
    metrics = metrics_of(capsys, "inspect", work / "p.tol")
    assert metrics["format_version"] == "1.2"
    assert metrics["layers"][0]["bits_per_value"] == 8 * (2 + 2 + 32) * 24 / (PICO_VOCAB * 32)
    assert main(["inspect", str(work / "p.tol"), "--format", "human"]) == 0
    assert f"24 tokens, {100 * covered():.2f} % of those counted" in capsys.readouterr().out


def test_verify_diff_and_history(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = metrics_of(capsys, "verify", work / "p.tol", "--reference", work / "ckpt")
    assert metrics["verdict"] == "ok" and metrics["reference_rows"] == 24
    assert metrics["agreeing"] == 6
    assert main(["build", str(work / "ckpt"), "-o", str(work / "full.tol"), "--force"]) == 0
    metrics = metrics_of(capsys, "diff", work / "full.tol", work / "p.tol")
    assert (metrics["rows"], metrics["records_a"], metrics["records_b"]) == (24, PICO_VOCAB, 24)
    (step,) = metrics_of(capsys, "history", work / "p.tol")["steps"]
    assert "keep_rows 24" in step["options"]


def test_eval_runs_the_cold_rows_too(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = work / "whole.tol"
    assert main(["compress", str(work / "ckpt"), "-o", str(whole), "--bits", "8"]) == 0
    text = ("--data", work / "t.txt", "--reference", work / "ckpt")
    part = metrics_of(capsys, "eval", work / "p.tol", *text)["kl_mean_nats"]
    all_stored = metrics_of(capsys, "eval", whole, *text)["kl_mean_nats"]
    assert 0 < part["value"] < all_stored["value"] < 0.01


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "p.tol", "--bits-per-value", "6"),
        ("measure", "p.tol", "--data", "t.txt", "--reference", "ckpt", "-o", "m.json"),
        ("calibrate", "p.tol", "--data", "t.txt", "-o", "c.tolmetric", "--tokens", "100"),
        ("drop-layers", "p.tol", "-o", "d.tol", "--layers", "1"),
        ("compress", "p.tol", "-o", "again.tol", "--bits", "4"),
        ("study", "spectrum", "p.tol", "-o", "study-s"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_other_commands_work_on_it(
    work: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
) -> None:
    monkeypatch.chdir(work)
    assert main(list(arguments)) == 0, capsys.readouterr().err
    for made in ("d.tol", "again.tol"):
        if made in arguments:
            assert open_bundle(made).manifest.num_rows == 24


def test_what_cannot_be_kept(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uncounted = pico_checkpoint(tmp_path / "uncounted", counts=False)
    out = ("-o", str(tmp_path / "b.tol"), "--keep-rows")
    for source, keep, words in (
        (work / "ckpt", "0", "--keep-rows: 0, expected 1 to 96"),
        (work / "ckpt", "97", "--keep-rows: 97"),
        (work / "ckpt", "some", "'some' is not a number of rows"),
        (uncounted, "10", "how often tokens stand in text is not known"),
        (work / "p.tol", "25", "has records of 24 tokens"),
    ):
        assert main(["compress", str(source), *out, keep]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "b.tol").exists()
