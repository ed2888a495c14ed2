"""`tol calibrate` through the command line, on the pico model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from _cli import result_of
from _pico import pico_checkpoint

from tolkit_cli.main import main
from tolkit_formats.tensorfile import TensorFile

TEXT = "the quick brown fox jumps over the lazy dog; " * 12


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ckpt, dense, full.tol (float32) and text.txt."""
    folder = tmp_path_factory.mktemp("work")
    pico_checkpoint(folder / "ckpt")
    pico_checkpoint(folder / "dense", "dense")
    (folder / "text.txt").write_text(TEXT)
    build = ["build", str(folder / "ckpt"), "-o", str(folder / "full.tol"), "--dtype", "f32", "-q"]
    assert main(build) == 0
    return folder


def command(work: Path, out: Path, *more: object, model: str = "ckpt") -> list[str]:
    words = ["calibrate", work / model, "--data", work / "text.txt", "-o", out, *more]
    return [str(word) for word in words]


def test_it_reports_each_layer(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m.safetensors"
    result = result_of(capsys, *command(work, out, "--tokens", 200))
    assert result["outputs"]["metric"] == str(out)
    metrics = result["metrics"]
    assert (metrics["tokens"], metrics["windows"], metrics["window"]) == (192, 3, 64)
    assert metrics["elapsed_s"] > 0
    assert [row["layer"] for row in metrics["layers"]] == [0, 1]
    file = TensorFile(out)
    for row in metrics["layers"]:
        metric_DD = np.asarray(file.array(f"layer.{row['layer']}.metric"), np.float64)
        assert row["mean_diagonal"] == pytest.approx(np.trace(metric_DD) / 32, rel=1e-5)
        rank = np.trace(metric_DD) ** 2 / np.square(metric_DD).sum()
        assert row["effective_rank"] == pytest.approx(rank, rel=1e-5)
        assert 1 < rank < 32


def test_a_table_for_people_and_a_path_for_scripts(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m.safetensors"
    assert main([*command(work, out), "--format", "human"]) == 0
    text = capsys.readouterr().out
    assert "layer  mean diagonal  effective rank" in text
    assert f"tokens                {len(TEXT)} in 9 windows of 64" in text
    assert main([*command(work, out, "--force"), "-q"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (f"{out}\n", "")


def test_an_existing_file_is_kept_without_force(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m.safetensors"
    out.write_bytes(b"precious")
    failed = result_of(capsys, *command(work, out), code=2)
    assert failed["error"]["type"] == "OutputExistsError"
    assert out.read_bytes() == b"precious"
    assert result_of(capsys, *command(work, out, "--force"))["ok"]
    assert TensorFile(out).metadata["seed"] == "0"


def test_seeds_repeat(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / name for name in ("a", "b", "c")]
    for path, seed in zip(files, (1, 1, 2), strict=True):
        assert main(command(work, path, "--seed", seed, "--tokens", 100)) == 0
    one, again, other = (path.read_bytes() for path in files)
    assert one == again != other


def test_a_bundle_stands_for_its_checkpoint(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(work, tmp_path / "a", "-q")) == 0
    assert main(command(work, tmp_path / "b", "-q", model="full.tol")) == 0
    ours, theirs = TensorFile(tmp_path / "a"), TensorFile(tmp_path / "b")
    assert ours.metadata == theirs.metadata
    for name in ours.names:
        np.testing.assert_allclose(ours.array(name), theirs.array(name), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "options", "message", "code"),
    [
        ("dense", [], "{work}/dense: is a dense checkpoint", 4),
        ("nowhere", [], "{work}/nowhere: ", 4),
        ("ckpt", ["--window", "65"], "--window: 65 tokens", 2),
        ("ckpt", ["--tokens", "0"], "--tokens: ", 2),
        ("ckpt", ["--seed", "-1"], "--seed: ", 2),
        ("ckpt", ["--dtype", "float16"], "--dtype: ", 2),
        ("ckpt", ["--device", "tpu"], "--device: ", 2),
        ("ckpt", ["--data", "nowhere.txt"], "nowhere.txt: ", 4),
        ("ckpt", ["-o", "nowhere/m.safetensors"], "--out: nowhere/m.safetensors cannot be", 2),
        ("ckpt", ["-o", "{work}", "--force"], "--out: {work} cannot be a file", 2),
    ],
)
def test_mistakes_name_the_option_and_write_nothing(
    work: Path,
    tmp_path: Path,
    model: str,
    options: list[str],
    message: str,
    code: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = [option.format(work=work) for option in options]
    assert main(command(work, tmp_path / "m", *more, model=model)) == code
    assert capsys.readouterr().err.startswith(f"error: {message.format(work=work)}")
    assert list(tmp_path.iterdir()) == []


def test_a_part_of_the_model_without_effect_is_told(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from _pico import pico_model, pico_tokenizer_files

    from tolkit.model import save_checkpoint

    silent = pico_model()
    with torch.no_grad():
        silent.block(1).self_attn.o_proj.weight.zero_()
    save_checkpoint(silent, tmp_path / "silent", pico_tokenizer_files())
    out = tmp_path / "m"
    arguments = ["calibrate", str(tmp_path / "silent"), "--data", str(work / "text.txt")]
    result = result_of(capsys, *arguments, "-o", out)
    assert result["warnings"] == ["layer 0: no error of its table changes the model's answers"]
    assert result["metrics"]["layers"][0]["effective_rank"] == 0
