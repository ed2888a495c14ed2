"""`tol drop-layers --auto` and its kin through the command line, on the pico model."""

from __future__ import annotations

from pathlib import Path

import pytest
from _cli import result_of, run
from _nano import reseal
from _pico import pico_checkpoint

from tolkit_cli.main import main
from tolkit_formats import open_bundle

TEXT = "the quick brown fox jumps over the lazy dog; " * 12


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ckpt, other (another checkpoint), full.tol, text.txt and short.txt."""
    folder = tmp_path_factory.mktemp("work")
    pico_checkpoint(folder / "ckpt", num_hidden_layers=4)
    pico_checkpoint(folder / "other", num_hidden_layers=4, seed=1)
    (folder / "text.txt").write_text(TEXT)
    (folder / "short.txt").write_text("the fox")
    assert main(["build", str(folder / "ckpt"), "-o", str(folder / "full.tol"), "-q"]) == 0
    return folder


def test_what_was_measured_and_chosen_is_all_in_the_json(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.tol"
    asked = (work / "full.tol", "-o", out, "--auto", 2, "--data", work / "text.txt")
    found = result_of(capsys, "drop-layers", *asked)
    metrics = found["metrics"]
    assert len(metrics["alone"]) == 6
    assert {"layer", "into", "kl_mean_nats", "kl_mean_nats_se"} <= metrics["alone"][0].keys()
    assert metrics["alone"][0]["ppl_increase_se"] > 0
    chosen = metrics["cost"]
    assert metrics["chosen"] == chosen["layers"]
    taken = [step["taken"] for step in metrics["steps"] if step["taken"]]
    assert chosen in taken
    assert chosen["kl_mean_nats"] == min(s["kl_mean_nats"] for s in metrics["found"].values())
    low, high = chosen["kl_mean_nats_interval"]
    assert low < chosen["kl_mean_nats"] < high
    statuses = open_bundle(out).manifest.layers
    gone = {i: s.into for i, s in enumerate(statuses) if s.status == "folded"}
    assert gone == dict(zip(chosen["layers"], chosen["into"], strict=True))
    step = open_bundle(out).manifest.history[-1]
    assert step.options["layers"] == chosen["layers"]
    assert step.options["into"] == chosen["into"]
    assert (step.options["auto"], step.options["search"]) == (2, "auto")
    assert len(step.options["text"]) == 16
    assert not any(isinstance(value, float) for value in step.options.values())
    assert "reference" not in step.options


def test_people_read_costs_with_errors_and_what_they_compare_with(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = (work / "full.tol", "-o", tmp_path / "a.tol", "--auto", 1, "--data", work / "text.txt")
    text, _ = run(capsys, "drop-layers", *asked, "--format", "human", "--dry-run")
    assert list(tmp_path.iterdir()) == []
    assert "to measure            up to 8 sets of layers" in text
    assert "costs against         the bundle as it is" in text
    assert "95 % interval" in text
    assert "predicted" in text
    plain, _ = run(capsys, "drop-layers", *asked, "--dry-run", "--search", "forward")
    header = next(line for line in plain.splitlines() if line.startswith("layer\tinto"))
    assert "kl_mean_nats_se" in header
    quiet, errors = run(capsys, "drop-layers", *asked, "-q")
    assert (quiet, errors) == (f"{tmp_path / 'a.tol'}\n", "")


def test_a_reference_is_checked_and_named(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / "small.tol"
    assert main(["compress", str(work / "ckpt"), "-o", str(small), "--bits", "4", "-q"]) == 0
    asked = (small, "-o", tmp_path / "a.tol", "--auto", 1, "--data", work / "text.txt")
    found = result_of(capsys, "drop-layers", *asked, "--reference", work / "ckpt", "--dry-run")
    assert found["metrics"]["as_is"]["kl_mean_nats"] > 0
    assert len(found["metrics"]["reference"]) == 64
    assert any("encoded a second time" in warning for warning in found["warnings"])
    assert any("as they are now" in warning for warning in found["warnings"])
    _, errors = run(capsys, "drop-layers", *asked, "--reference", work / "other", code=5)
    assert "is not the checkpoint" in errors
    result_of(
        capsys,
        "drop-layers",
        *asked,
        "--reference",
        work / "other",
        "--other-reference",
        "--dry-run",
    )


def test_plain_is_measured_plain(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.tol"
    asked = (work / "full.tol", "-o", out, "--auto", 1, "--data", work / "text.txt")
    found = result_of(capsys, "drop-layers", *asked, "--plain")
    assert [row["into"] for row in found["metrics"]["alone"]] == [None] * 4
    assert "dropped" in [row.status for row in open_bundle(out).manifest.layers]
    assert "into" not in open_bundle(out).manifest.history[-1].options


def test_bounds_hold_or_fail_as_gates_do(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.tol"
    asked = (work / "full.tol", "-o", out, "--data", work / "text.txt")
    _, errors = run(capsys, "drop-layers", *asked, "--max-kl", "1e-9", code=3)
    assert errors.splitlines()[-2].startswith("error: --max-kl: no layer can go within KL 1e-09")
    assert "hint: the upper end of the 95 % interval must hold" in errors
    assert not out.exists()
    found = result_of(capsys, "drop-layers", *asked, "--max-kl", "0.5")
    assert found["metrics"]["cost"]["kl_mean_nats_interval"][1] <= 0.5
    options = open_bundle(out).manifest.history[-1].options
    assert options["max_kl"] == 0.5
    assert "auto" not in options
    gate = ("--reference", work / "full.tol", "--gate", "kl_mean<=0.5")
    assert main(["eval", *map(str, (out, "--data", work / "text.txt", *gate))]) == 0


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--auto", "1", "--layers", "0"], 2, "--layers: give exactly one of"),
        (["--auto", "1", "--max-kl", "1"], 2, "--layers: give exactly one of"),
        (["--auto", "1"], 2, "--data: costs are measured on text"),
        (["--auto", "4", "--data", "text.txt"], 2, "--auto: 4 of 4 layers"),
        (["--auto", "0", "--data", "text.txt"], 2, "--auto: expected at least 1"),
        (["--max-kl", "1%", "--data", "text.txt"], 2, "--max-kl: '1%' is not a bound"),
        (["--max-kl", "-1", "--data", "text.txt"], 2, "--max-kl: expected a finite bound"),
        (["--max-ppl-increase", "x", "--data", "text.txt"], 2, "--max-ppl-increase: 'x' is not"),
        (["--middle", "1", "--data", "text.txt"], 2, "--data: nothing is measured"),
        (["--middle", "1", "--search", "auto"], 2, "--search: nothing is measured"),
        (["--middle", "1", "--window", "9"], 2, "--window: nothing is measured"),
        (["--auto", "1", "--data", "text.txt", "--window", "999"], 2, "--window: 999 tokens"),
        (["--auto", "1", "--data", "short.txt"], 4, "text: one window"),
        (["--auto", "1", "--data", "none.txt"], 4, "none.txt"),
        (["--auto", "1", "--data", "text.txt", "--device", "cuda:99"], 6, "cuda:99 is not here"),
    ],
)
def test_refusals_name_the_option(
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(work)
    _, errors = run(
        capsys, "drop-layers", "full.tol", "-o", tmp_path / "a.tol", *options, code=code
    )
    assert "error: " in errors
    assert said in errors
    assert not (tmp_path / "a.tol").exists()


def test_an_existing_output_is_refused_before_minutes_of_measuring(
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def measured(*arguments: object, **options: object) -> None:
        raise AssertionError("measured first")

    monkeypatch.setattr("tolkit.compress.search.choose.choose_layers", measured)
    out = tmp_path / "a.tol"
    out.mkdir()
    asked = (work / "full.tol", "-o", out, "--auto", 1, "--data", work / "text.txt")
    _, errors = run(capsys, "drop-layers", *asked, code=2)
    assert "already exists" in errors


def test_rows_that_are_not_added_cannot_be_measured(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.tol"
    assert main(["build", str(work / "ckpt"), "-o", str(other), "-q"]) == 0
    reseal(other, lambda manifest: manifest.update(combine="other"))
    asked = ("-o", tmp_path / "a.tol", "--auto", 1, "--data", work / "text.txt")
    _, errors = run(capsys, "drop-layers", other, *asked, code=4)
    assert "combine is 'other'" in errors
