"""`tol compress --max-kl`, `--drop auto`, `tol measure` and `tol plan` on the pico model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _cli import result_of, run
from _eval_fakes import text_of
from _pico import pico_checkpoint

from tolkit_cli.main import main
from tolkit_formats import open_bundle
from tolkit_formats.tensorfile import write_tensors

MEASURING = ("--window", "32", "--threads", "1")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ckpt, other (another checkpoint), text.txt, other.txt and small.tol of 6,000 bytes."""
    folder = tmp_path_factory.mktemp("work")
    pico_checkpoint(folder / "ckpt", num_hidden_layers=3, seed=4)
    pico_checkpoint(folder / "other", num_hidden_layers=3, seed=1)
    (folder / "text.txt").write_text(text_of(550))
    (folder / "other.txt").write_text(text_of(400, seed=9))
    small = ["compress", folder / "ckpt", "-o", folder / "small.tol", "--budget", 6_000, "-q"]
    assert main([str(word) for word in small]) == 0
    return folder


def searching(work: Path, out: Path, *more: object) -> tuple[object, ...]:
    data = ("--data", work / "text.txt", *MEASURING)
    return ("compress", work / "ckpt", "-o", out, *data, *more)


def test_every_size_is_in_the_json(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.tol"
    metrics = result_of(capsys, *searching(work, out, "--max-kl", "0.1"))["metrics"]
    assert metrics["bound"] == {"metric": "kl_mean_nats", "limit": 0.1}
    chosen = metrics["chosen"]["bytes"]
    (point,) = {p["bytes"]: p for p in metrics["tried"] if p["bytes"] == chosen}.values()
    assert point["holds"] and point["kl_mean_nats_high"] <= 0.1
    assert metrics["evaluations"] <= len(metrics["tried"])
    assert metrics["bytes"] == open_bundle(out).table_bytes == chosen
    text, _ = run(
        capsys,
        *searching(work, tmp_path / "b.tol", "--max-kl", "0.1", "--format", "human"),
    )
    assert "the checkpoint's own FFN path" in text
    assert "within KL 0.1 nats" in text


def test_a_bound_out_of_reach_ends_with_3(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = searching(work, tmp_path / "a.tol", "--max-ppl-increase", "0.0001%")
    _, errors = run(capsys, *asked, code=3)
    assert "--max-ppl-increase: no size up to 8 bits/value" in errors
    assert "measured.json" in errors
    assert not (tmp_path / "a.tol").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--max-kl", "0.1", "--budget", "9000"), "finds the size itself"),
        (("--max-kl", "0.1", "--bits", "4"), "sizes are found for codec bands"),
        (("--max-kl", "0.1", "--dry-run"), "tol plan"),
        (("--max-kl", "0.1", "--max-ppl-increase", "1%"), "exactly one"),
        (("--max-kl", "ten"), "is not a bound"),
        (("--bits", "4"), "nothing is measured"),
        (("--drop", "auto", "--bits", "4"), "bundles of one size"),
        (("--drop", "auto:0", "--bits", "4"), "expected auto or auto:N"),
        (("--drop", "auto:3", "--bits", "4"), "3 of 3 layers"),
    ],
)
def test_what_does_not_go_together_is_refused(
    work: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    said: str,
) -> None:
    _, errors = run(capsys, *searching(work, tmp_path / "a.tol", *more), code=2)
    assert said in errors
    assert list(tmp_path.iterdir()) == []


def test_without_text_nothing_can_be_searched(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.tol"
    _, errors = run(capsys, "compress", work / "ckpt", "-o", out, "--max-kl", "1", code=2)
    assert "--data" in errors
    asked = searching(work, out, "--max-kl", "1", "--reference", work / "other")
    _, errors = run(capsys, *asked, code=5)
    assert "is not the checkpoint" in errors


def test_measured_bundles_are_not_measured_again(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "m.json"
    asked = ("measure", work / "small.tol", "--reference", work / "ckpt", "--window", 32)
    found = result_of(capsys, *asked, "--data", work / "text.txt", "-o", file)
    (row,) = found["metrics"]["bundles"]
    assert row["bytes"] == open_bundle(work / "small.tol").table_bytes
    entry = json.loads(file.read_text())["bundles"][0]
    assert entry["budget_bytes"] == 6_000
    assert entry["quality"]["bundle"] == open_bundle(work / "small.tol").identity
    run(capsys, *asked, "--data", work / "other.txt", "-o", tmp_path / "o.json")
    reused = []
    for name in ("m.json", "o.json"):
        more = ("--max-kl", "0.3", "--measured", tmp_path / name)
        metrics = result_of(capsys, *searching(work, tmp_path / f"{name}.tol", *more))["metrics"]
        reused.append([p["budget_bytes"] if p["reused"] else 0 for p in metrics["tried"]])
    assert reused[0][0] == 6_000 and 6_000 not in reused[1]
    _, errors = run(capsys, *asked, "--data", work / "text.txt", "-o", file, code=2)
    assert "already exists" in errors


def test_layers_are_measured_once(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "layers.json"
    asked = ("measure", work / "ckpt", "--window", 32, "--data", work / "text.txt")
    found = result_of(capsys, *asked, "-o", file)
    assert [row["layer"] for row in found["metrics"]["alone"]] == [0, 1, 1, 2]
    counts = {}
    for name, more in (("without", ()), ("with", ("--measured", file))):
        out = tmp_path / f"{name}.tol"
        asked = searching(work, out, "--drop", "auto:1", "--bits", "8", *more)
        metrics = result_of(capsys, *asked)["metrics"]
        counts[name] = metrics["evaluations"]
        assert metrics["chosen"] == [min(metrics["alone"], key=kl_of)["layer"]]
    assert counts == {"without": 4, "with": 0}
    assert (
        open_bundle(tmp_path / "with.tol").identity
        == open_bundle(tmp_path / "without.tol").identity
    )


def kl_of(row: dict[str, Any]) -> float:
    return float(row["kl_mean_nats"])


def test_folding_stops_where_it_does_not_pay(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.tol"
    asked = searching(work, out, "--drop", "auto", "--budget", "9000")
    metrics = result_of(capsys, *asked)["metrics"]
    kls = [row["kl_mean_nats"] for row in metrics["tried"]]
    best = metrics["tried"][kls.index(min(kls))]
    gone = [i for i, s in enumerate(open_bundle(out).manifest.layers) if s.status == "folded"]
    assert gone == metrics["folded"] and len(gone) == best["folded"]


@pytest.mark.parametrize("text", ["", "{}", '{"schema": "tolkit.measure/9"}', '{"a": 1, "a": 2}'])
def test_a_file_that_holds_no_measurements_is_refused(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (tmp_path / "m.json").write_text(text)
    more = ("--max-kl", "0.3", "--measured", tmp_path / "m.json")
    _, errors = run(capsys, *searching(work, tmp_path / "a.tol", *more), code=4)
    assert "m.json" in errors
    assert [p.name for p in tmp_path.iterdir()] == ["m.json"]


def test_a_plan_for_people_and_scripts(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, errors = run(
        capsys, "plan", work / "ckpt", "--bits-per-value", "1,5,8", "--format", "human"
    )
    assert "below the floor" in errors
    assert "checksums, headers" in text and "running sum" in text
    metrics = result_of(capsys, "plan", work / "ckpt", "--budget", "6000")["metrics"]
    assert metrics["bytes"] == open_bundle(work / "small.tol").table_bytes
    assert metrics["exact"] is True
    (size,) = metrics["sizes"]
    parts = ("records", "bases", "predictors", "scales", "slots", "checksums")
    assert sum(size[f"{part}_bytes"] for part in parts) == metrics["bytes"]
    dry = ("compress", work / "ckpt", "-o", tmp_path / "a.tol", "--budget", "6000", "--dry-run")
    found = result_of(capsys, *dry)
    assert found["metrics"]["layers"] == metrics["layers"]
    assert found["outputs"] == {"bundle": None, "identity": None, "dry_run": True}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("coding", ["fixed", "entropy"])
def test_a_plan_and_a_dry_run_are_one(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], coding: str
) -> None:
    out = tmp_path / "a.tol"
    asked = ("--bits-per-value", "6", "--coding", coding)
    found = result_of(capsys, "plan", work / "ckpt", *asked)
    metrics = found["metrics"]
    assert metrics["exact"] is True and metrics["within"] == 0
    assert metrics["bits_per_value"] <= 6
    dry = result_of(capsys, "compress", work / "ckpt", "-o", out, *asked, "--dry-run")
    assert dry["outputs"] == found["outputs"]
    assert dry["metrics"]["layers"] == metrics["layers"]
    (size,) = metrics["sizes"]
    parts = ("records", "bases", "predictors", "scales", "slots", "checksums")
    assert sum(size[f"{part}_bytes"] for part in parts) == metrics["bytes"]
    assert list(tmp_path.iterdir()) == []
    wet = result_of(capsys, "compress", work / "ckpt", "-o", out, *asked)
    assert dry["metrics"]["bytes"] == metrics["bytes"] == wet["metrics"]["bytes"]
    for ours, theirs in zip(metrics["layers"], wet["metrics"]["layers"], strict=True):
        for name in ("relative_error", "running_sum_error"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)


def test_one_size_of_several_may_be_too_small(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("plan", work / "ckpt", "--coding", "entropy", "--bits-per-value")
    text, errors = run(capsys, *asked, "0.1,5,8", "--format", "human")
    assert "below the floor" in errors and "running sum" in text
    (first, second) = result_of(capsys, *asked, "0.1,5,8")["metrics"]["sizes"]
    assert 0.9 * 5 < first["bits_per_value"] <= 5 < second["bits_per_value"] <= 8


@pytest.mark.parametrize("coding", ["fixed", "entropy"])
def test_a_size_below_the_floor_names_it(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], coding: str
) -> None:
    as_coded = ("--coding", coding)
    planned = result_of(capsys, "plan", work / "ckpt", "--budget", "6000", *as_coded)
    floor = planned["metrics"]["floor_bytes"]
    for command in (
        ("compress", work / "ckpt", "-o", tmp_path / "a.tol", "--budget", floor - 1),
        ("compress", work / "ckpt", "-o", tmp_path / "a.tol", "--bits-per-value", "0.001"),
        ("compress", work / "ckpt", "-o", tmp_path / "a.tol", "--budget", floor - 1, "--dry-run"),
        ("plan", work / "ckpt", "--budget", floor - 1),
    ):
        _, errors = run(capsys, *command, *as_coded, code=2)
        assert f"{floor:,} bytes" in errors
    assert list(tmp_path.iterdir()) == []


def test_counts_of_another_tokenizer_do_not_fit(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = tmp_path / "counts.safetensors"
    write_tensors(counts, {"token_counts": ("U64", np.ones(95, np.uint64))})
    for command in (
        ("compress", work / "ckpt", "-o", tmp_path / "a.tol", "--budget", 6_000),
        ("plan", work / "ckpt", "--budget", 6_000),
    ):
        _, errors = run(capsys, *command, "--weights", counts, code=5)
        assert "95" in errors


def test_the_same_command_gives_the_same_bundle(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = set()
    for threads in (1, 1, 2):
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.tol"
        more = ("--budget", 6_000, "--threads", threads)
        found.add(
            result_of(capsys, "compress", work / "ckpt", "-o", out, *more)["outputs"]["identity"]
        )
    assert found == {open_bundle(work / "small.tol").identity}
