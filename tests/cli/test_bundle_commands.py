"""inspect, verify and diff on bundles whose every row is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from _cli import result_of
from _tiny_bundles import D, L, V, known_rows, write_bundle

from tolkit_cli.main import main
from tolkit_formats import open_bundle


def test_inspect_counts_every_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = write_bundle(tmp_path / "a.tol", kept=(0, 2))
    metrics = result_of(capsys, "inspect", bundle)["metrics"]
    on_disk = sum(file.stat().st_size for file in (bundle / "tables").iterdir())
    assert metrics["bytes"] == on_disk
    assert metrics["bits_per_value"] == 8 * on_disk / (V * L * D)
    assert [row["status"] for row in metrics["layers"]] == ["kept", "dropped", "kept"]
    assert metrics["layers"][0]["bits_per_value"] == 32


def test_verify_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = write_bundle(tmp_path / "a.tol")
    metrics = result_of(capsys, "verify", bundle)["metrics"]
    assert metrics["verdict"] == "ok"
    assert metrics["records"] == V
    assert any("CRC-32" in check for check in metrics["checks"])


def test_verify_finds_one_flipped_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = write_bundle(tmp_path / "a.tol")
    shard = next((bundle / "tables").glob("records-*"))
    data = bytearray(shard.read_bytes())
    data[-20] ^= 1
    shard.write_bytes(data)
    assert main(["verify", str(bundle)]) == 4
    captured = capsys.readouterr()
    assert captured.out == ""
    assert shard.name in captured.err


def test_diff_agrees_with_the_obvious_sum(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write_bundle(tmp_path / "a.tol", seed=0)
    b = write_bundle(tmp_path / "b.tol", seed=1, kept=(0, 2))
    metrics = result_of(capsys, "diff", a, b)["metrics"]
    first, second = known_rows(0).astype(float), known_rows(1).astype(float)
    second[:, 1] = 0
    assert not metrics["equal"]
    for row in metrics["layers"]:
        layer = row["layer"]
        gap = np.linalg.norm(second[:, layer] - first[:, layer])
        assert row["relative_error"] == pytest.approx(gap / np.linalg.norm(first[:, layer]))
        sums = [rows[:, : layer + 1].sum(1) for rows in (first, second)]
        running = np.linalg.norm(sums[1] - sums[0]) / np.linalg.norm(sums[0])
        assert row["running_sum_error"] == pytest.approx(running)
    assert [row["stored_b"] for row in metrics["layers"]] == ["f32", "dropped", "f32"]


def test_diff_of_a_bundle_with_itself_is_zero(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write_bundle(tmp_path / "a.tol")
    metrics = result_of(capsys, "diff", a, a, "--rows", 7)["metrics"]
    assert metrics["equal"]
    assert metrics["same_identity"]
    assert metrics["rows"] == 7
    assert all(row["running_sum_error"] == 0 for row in metrics["layers"])


def test_diff_refuses_other_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write_bundle(tmp_path / "a.tol"), write_bundle(tmp_path / "b.tol", vocab_size=20)
    assert main(["diff", str(a), str(b)]) == 5
    assert "b.tol: is [20, 3, 8]" in capsys.readouterr().err


def test_quiet_gives_a_script_its_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = write_bundle(tmp_path / "a.tol")
    assert main(["inspect", str(bundle), "-q"]) == 0
    captured = capsys.readouterr()
    assert int(captured.out) == open_bundle(bundle).table_bytes
    assert captured.err == ""
