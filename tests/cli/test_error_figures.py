"""Both errors on the command line: one wording in inspect, diff, compress and verify."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from _nano import nano_checkpoint, reseal
from _tiny_bundles import write_bundle

from tolkit_cli.main import main

KEYS = ("layer", "relative_error", "running_sum_error")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ckpt, full.tol, small.tol (nf4), short.tol (a layer dropped from it)."""
    work = tmp_path_factory.mktemp("errors")
    nano_checkpoint(work / "ckpt")
    for line in (
        "build {}/ckpt -o {}/full.tol -q",
        "compress {}/full.tol -o {}/small.tol --bits 4 -q",
        "drop-layers {}/small.tol -o {}/short.tol --layers 1 --plain -q",
    ):
        assert main(line.replace("{}", str(work)).split()) == 0
    return work


def metrics(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0
    value: dict[str, Any] = json.loads(capsys.readouterr().out)["metrics"]
    return value


def figures(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [tuple(row[key] for key in KEYS) for row in rows]


def test_all_commands_say_the_same(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = work / "small.tol"
    made = metrics(capsys, "compress", work / "full.tol", "-o", work / "x.tol", "--bits", 4)
    inspected = metrics(capsys, "inspect", small)
    want = figures(inspected["layers"])
    assert all(0 < error < 1 for row in want for error in row[1:])
    assert figures(made["layers"]) == want
    assert figures(metrics(capsys, "verify", small)["layers"]) == want
    compared = figures(metrics(capsys, "diff", work / "full.tol", small)["layers"])
    for row, other in zip(compared, want, strict=True):
        assert row == pytest.approx(other, rel=1e-5)
    assert {e["running_sum_step"] for e in inspected["errors"]} == {1}


def test_for_people(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(work / "short.tol"), "--format", "human"]) == 0
    shown = capsys.readouterr().out
    assert "running sum" in shown
    assert "step 2, compress, read: error of layers 0, 2, running sum of layer 0\n" in shown
    assert "step 3, drop-layers, read: error of layer 1, running sum of layers 1-2\n" in shown
    card = (work / "short.tol" / "README.md").read_text()
    assert "error of the running sum at layer 2: " in card and "what step 3 below read" in card
    assert main(["inspect", str(work / "full.tol"), "--format", "human"]) == 0
    assert "relative to the FFN outputs that step 1, build, read" in capsys.readouterr().out


def test_a_bundle_that_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = write_bundle(tmp_path / "a.tol")
    for command in ("inspect", "verify"):
        assert main([command, str(bundle), "--format", "human"]) == 0
        assert "errors: not recorded in this bundle" in capsys.readouterr().out
        rows = metrics(capsys, command, bundle)["layers"]
        assert [row[1:] for row in figures(rows)] == [(None, None)] * 3


def test_verify_with_the_checkpoint(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = metrics(capsys, "verify", work / "full.tol", "--reference", work / "ckpt")
    assert (found["agreeing"], found["reference_rows"]) == (6, 96)
    for row, want in zip(figures(found["reference_layers"]), figures(found["layers"]), strict=True):
        assert row == pytest.approx(want, rel=1e-3)
    part = metrics(capsys, "verify", work / "short.tol", "--reference", work / "ckpt", "--rows", 32)
    assert (part["agreeing"], part["reference_rows"]) == (0, 32)
    assert part["reference_layers"][1]["relative_error"] == 1


def test_exit_codes(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = nano_checkpoint(tmp_path / "other", seed=1)
    full = str(work / "full.tol")
    assert main(["verify", full, "--reference", str(other)]) == 5
    assert "other: is not what" in capsys.readouterr().err
    assert main(["verify", full, "--rows", "5"]) == 2
    assert main(["verify", full, "--reference", str(tmp_path / "none")]) == 4
    assert main(["build", str(work / "ckpt"), "-o", str(tmp_path / "a.tol"), "-q"]) == 0

    def lie(manifest: dict[str, Any]) -> None:
        manifest["encoding"]["errors"][2]["running_sum"] *= 2

    reseal(tmp_path / "a.tol", lie)
    assert main(["verify", str(tmp_path / "a.tol")]) == 0
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "a.tol"), "--reference", str(work / "ckpt")]) == 4
    captured = capsys.readouterr()
    assert captured.out == "" and "layer 2: error of the running sum is" in captured.err
