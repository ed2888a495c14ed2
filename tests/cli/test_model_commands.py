"""build, compress, drop-layers, count and eval through the command line, on the pico model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from _cli import result_of
from _pico import pico_checkpoint

from tolkit_cli.main import main

TEXT = "the quick brown fox jumps over the lazy dog; " * 40


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ckpt, other (same shape, other weights), full.tol and text.txt."""
    folder = tmp_path_factory.mktemp("work")
    pico_checkpoint(folder / "ckpt")
    pico_checkpoint(folder / "other", seed=1)
    (folder / "text.txt").write_text(TEXT)
    assert main(["build", str(folder / "ckpt"), "-o", str(folder / "full.tol"), "-q"]) == 0
    return folder


def test_build_reports_what_it_wrote(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "b.tol"
    result = result_of(capsys, "build", work / "ckpt", "-o", out, "--dtype", "f32")
    assert result["outputs"]["bundle"] == str(out)
    assert result["metrics"]["bytes"] == sum(f.stat().st_size for f in (out / "tables").iterdir())
    assert result["metrics"]["max_abs_difference"] == 0
    assert result["versions"]["torch"]


def test_a_dry_run_writes_nothing_and_predicts_the_bytes(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compress", work / "full.tol", "-o", tmp_path / "c.tol", "--bits", "4"]
    planned = result_of(capsys, *command, "--rank", "50%", "--dry-run")
    assert list(tmp_path.iterdir()) == []
    assert planned["outputs"]["bundle"] is None
    written = result_of(capsys, *command, "--rank", "50%")
    assert planned["metrics"]["bytes"] == pytest.approx(written["metrics"]["bytes"], abs=4096)
    assert [row["codec"] for row in written["metrics"]["layers"]] == ["rank 16 x nf4"] * 2


def test_quiet_gives_the_path(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "c.tol"
    capsys.readouterr()
    assert main(["compress", str(work / "full.tol"), "-o", str(out), "--bits", "8", "-q"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (f"{out}\n", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--layers: give exactly one of"),
        (["--layers", "0", "--middle", "1"], "--layers: give exactly one of"),
        (["--layers", "2"], "--layers: layer 2 is out of range"),
        (["--layers", "0-1"], "--layers: "),
        (["--middle", "2"], "--middle: 2 of 2 kept layers"),
        (["--keep", "0-1"], "--keep: names every layer"),
    ],
)
def test_drop_layers_takes_one_clear_choice(
    work: Path,
    tmp_path: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "d.tol"
    assert main(["drop-layers", str(work / "full.tol"), "-o", str(out), *options]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not out.exists()


def test_keep_is_layers_seen_from_the_other_side(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = []
    for option, value in (("--keep", "1"), ("--layers", "0"), ("--middle", "1")):
        out = tmp_path / f"{option[2:]}.tol"
        result = result_of(capsys, "drop-layers", work / "full.tol", "-o", out, option, value)
        layers.append([row["status"] for row in result["metrics"]["layers"]])
    assert layers == [["folded into 1", "kept"]] * 3


@pytest.mark.parametrize(
    "options", [["--bits", "4", "--codec", "nf4"], ["--bits", "5"], ["--rank", "33"], []]
)
def test_compress_refuses_what_it_cannot_do(
    work: Path, tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "c.tol"
    assert main(["compress", str(work / "full.tol"), "-o", str(out), *options]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not out.exists()


def test_an_existing_output_is_kept_without_force(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "c.tol"
    command = ["compress", str(work / "full.tol"), "-o", str(out), "--bits", "8"]
    assert main(command) == 0
    before = (out / "tol.json").read_bytes()
    assert main(command) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*command, "--no-feedback", "--force"]) == 0
    assert (out / "tol.json").read_bytes() != before


def test_eval_writes_reports_and_a_record_and_meets_its_gate(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name: tmp_path / name for name in ("r.json", "r.xml", "r.md")}
    command = [
        *("eval", work / "full.tol", "--reference", work / "ckpt", "--data", work / "text.txt"),
        *("--gate", "ppl_increase<=1%", "--gate", "bytes<=1GB", "--json-out", files["r.json"]),
        *("--junit", files["r.xml"], "--markdown", files["r.md"]),
    ]
    result = result_of(capsys, *command)
    assert [gate["status"] for gate in result["thresholds"]] == ["passed", "passed"]
    assert result["metrics"]["kl_mean_nats"]["value"] < 1e-4
    assert set(result["metrics"]["ppl_token"]) == {"value", "se", "n"}
    assert all(file.stat().st_size for file in files.values())
    record = json.loads((work / "full.tol" / "quality.jsonl").read_text().splitlines()[-1])
    assert record["metrics"]["kl_mean_nats"] == result["metrics"]["kl_mean_nats"]
    assert result_of(capsys, *command, code=2)["error"]["type"] == "OutputExistsError"
    assert result_of(capsys, *command, "--force")["ok"]


def test_a_failed_gate_is_3_and_the_numbers_are_still_there(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", work / "full.tol", "--data", work / "text.txt", "--gate", "bytes<=10"]
    result = result_of(capsys, *command, code=3)
    assert result["ok"] is False
    assert result["error"]["type"] == "GateError"
    assert result["thresholds"][0]["ok"] is False
    assert result["metrics"]["ppl_token"]["value"] > 1


def test_a_reference_of_other_weights_is_5_unless_asked_for(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", work / "full.tol", "--reference", work / "other"]
    command += ["--data", work / "text.txt"]
    failed = result_of(capsys, *command, code=5)
    assert "--other-reference" in failed["error"]["hint"]
    assert result_of(capsys, *command, "--other-reference")["metrics"]["kl_mean_nats"]["value"] > 0


@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        (["--window", "65"], "--window: 65 tokens", 2),
        (["--gate", "nonsense"], "--gate: cannot read 'nonsense'", 2),
        (["--device", "tpu"], "--device: ", 2),
        (["--reference", "nowhere"], "nowhere: ", 4),
        (["--junit", "nowhere/r.xml"], "--junit: nowhere: no such folder", 2),
    ],
)
def test_library_messages_name_the_option(
    work: Path, options: list[str], message: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", str(work / "full.tol"), "--data", str(work / "text.txt"), *options]
    assert main(command) == code
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_limit_tokens_reads_about_that_many(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", work / "full.tol", "--data", work / "text.txt"]
    assert result_of(capsys, *command)["metrics"]["tokens"] == len(TEXT)
    assert result_of(capsys, *command, "--limit-tokens", 100)["metrics"]["tokens"] == 100


def test_counts_of_other_text_weigh_the_basis(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = tmp_path / "counts.safetensors"
    command = ["count", work / "text.txt", "--tokenizer", work / "full.tol", "-o", counts]
    counted = result_of(capsys, *command)["metrics"]
    assert counted["distinct"] == len(set(TEXT)) + 1, "<eos> ends the document"
    assert counted["tokens"] == len(TEXT) + 1
    assert main([str(word) for word in command]) == 2, "an existing file is kept"
    errors = {}
    for weights in ("none", counts):
        out = tmp_path / f"{Path(weights).stem}.tol"
        options = ["--rank", "8", "--weights", weights]
        report = result_of(capsys, "compress", work / "full.tol", "-o", out, *options)
        errors[str(weights)] = report["metrics"]["layers"][0]["relative_error"]
    assert len(set(errors.values())) == 2


def test_train_reports_the_model_and_refuses_two_budgets(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--vocab-size", "300", "--layers", "2", "--hidden-size", "32", "--sequence", "16"]
    command = ["train", work / "text.txt", "-o", tmp_path / "m", "--batch", "2", *small]
    result = result_of(capsys, *command, "--steps", "2")
    assert result["metrics"]["steps"] == 2
    assert result["metrics"]["architecture"] == "memory"
    assert (tmp_path / "m" / "model.safetensors").is_file()
    failed = result_of(capsys, *command[:3], tmp_path / "n", "--steps", 2, "--tokens", 9, code=2)
    assert failed["error"]["message"].startswith("budget: ")


def test_train_heals_a_bundle_around_its_tables(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / "small.tol"
    result_of(capsys, "compress", work / "ckpt", "-o", small, "--rank", "8", "--bits", "4")
    healed = tmp_path / "healed.tol"
    command = ["train", work / "text.txt", "-o", healed, "--init", small, "--batch", "2"]
    command += ["--sequence", "16", "--steps", "3", "--distill", work / "ckpt"]
    failed = result_of(capsys, *command, code=2)
    assert failed["error"]["message"].startswith("--init: ")
    command.append("--freeze-tables")
    planned = result_of(capsys, *command, "--dry-run")
    assert planned["outputs"]["dry_run"] and planned["metrics"]["learning_rate"] == 3e-4
    assert not healed.exists()
    result = result_of(capsys, *command)
    assert result["outputs"]["bundle"] == str(healed)
    metrics = result["metrics"]
    assert metrics["held_out_kl_nats"] != metrics["before_held_out_kl_nats"]
    assert metrics["held_out_loss_nats"] != metrics["before_held_out_loss_nats"]
    assert result_of(capsys, "verify", healed)["metrics"]["verdict"] == "ok"
    assert result_of(capsys, *command, code=2)["error"]["type"] == "OutputExistsError"
    score = ["eval", healed, "--reference", work / "ckpt", "--data", work / "text.txt"]
    refused = result_of(capsys, *score, code=5)
    assert "was healed" in refused["error"]["message"]
    assert "--other-reference" in refused["error"]["hint"]
    assert result_of(capsys, *score, "--other-reference")["metrics"]["kl_mean_nats"]["value"] > 0


def test_train_tunes_what_a_bundle_s_rows_share(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / "small.tol"
    result_of(capsys, "compress", work / "ckpt", "-o", small, "--bits-per-value", "12")
    tuned = tmp_path / "tuned.tol"
    command = ["train", work / "text.txt", "-o", tuned, "--init", small, "--batch", "2"]
    command += ["--sequence", "16", "--steps", "3", "--distill", work / "ckpt", "--tune-tables"]
    failed = result_of(capsys, *command, "--freeze-tables", code=2)
    assert failed["error"]["message"].startswith("--tune-tables: ")
    planned = result_of(capsys, *command, "--dry-run")
    assert planned["outputs"]["dry_run"] and planned["metrics"]["learning_rate"] == 1e-2
    assert not tuned.exists()
    result = result_of(capsys, *command)
    metrics = result["metrics"]
    assert metrics["trained_parameters"] == planned["metrics"]["trained_parameters"] > 0
    assert metrics["held_out_kl_nats"] != metrics["before_held_out_kl_nats"]
    checked = result_of(capsys, "verify", tuned, "--reference", work / "ckpt")
    assert checked["metrics"]["verdict"] == "ok"
    score = ["eval", tuned, "--reference", work / "ckpt", "--data", work / "text.txt"]
    assert result_of(capsys, *score)["metrics"]["kl_mean_nats"]["value"] > 0


def test_train_refuses_a_teacher_with_other_tokens(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = pico_checkpoint(tmp_path / "teacher", vocab_size=97, counts=False)
    command = ["train", work / "text.txt", "-o", tmp_path / "h.tol", "--init", work / "full.tol"]
    options = ["--freeze-tables", "--distill", teacher, "--steps", "1"]
    failed = result_of(capsys, *command, *options, code=5)
    assert failed["error"]["message"].startswith("--distill: ")
    assert not (tmp_path / "h.tol").exists()
