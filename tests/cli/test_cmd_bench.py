"""tol bench: tables of figures in three forms, mistakes named with their codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from _cli import run
from _hf import both_forms
from _pico import pico_checkpoint

from tolkit_cli.main import main

DECODE = ("decode", "--context", 8, "--tokens", 2, "--rounds", 1, "--device", "cpu")
SMALL = ("--preset", "tiny", "--layers", 2, "--vocab-size", 200)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    both_forms(folder)
    (folder / "t.txt").write_text("a table of words, and more of them; " * 8)
    (folder / "empty.txt").write_text("")
    return folder


def metrics_of(text: str, command: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(text)
    assert (result["schema"], result["command"]) == ("tolkit.result/1", command)
    assert result["ok"] and not result["warnings"]
    assert result["timings_s"]["bench"] > 0
    metrics: dict[str, Any] = result["metrics"]
    return metrics


def test_decode_says_the_same_in_every_form(
    work: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = (*DECODE, *SMALL, "--arch", "dense,memory", "--work", tmp_path)
    metrics = metrics_of(run(capsys, "bench", *command, "--json")[0], "bench decode")
    dense, memory = metrics["models"]
    assert (dense["name"], dense["ratio"], memory["tables"]) == ("dense", 1, "disk")
    assert memory["weights_bytes"] == 2 * (200 * 192 + 2 * (4 * 192 * 192 + 192) + 192)
    assert memory["ms_per_token"] > 0 and memory["bound"] < 1
    assert list(metrics["rounds_ms"]) == ["dense", "memory, disk"]
    assert ["ms/token", "21.50", "18.75", "20.28", "21.47", "14.42"] in metrics["paper"]["rows"]
    plain, _ = run(capsys, "bench", *command)
    head, *rows = (line.split("\t") for line in plain.split("\n\n")[1].splitlines())
    bytes_at = head.index("weights_bytes")
    assert [int(row[bytes_at]) for row in rows] == [dense["weights_bytes"], memory["weights_bytes"]]
    human, _ = run(capsys, "bench", *command, "--format", "human")
    assert "cpu, 2 layers, vocabulary 200, bfloat16" in human
    assert "arXiv 2602.00398, Table 6" in human
    assert float(run(capsys, "bench", *command, "-q")[0]) > 0
    assert [p.name for p in tmp_path.iterdir()] == ["tables-200x2x192-nf4.tol"]


def test_decode_runs_real_models(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = (*DECODE, work / "full.tol", work / "ckpt", "--tables", "disk,host", "--json")
    models = metrics_of(run(capsys, "bench", *command)[0], "bench decode")["models"]
    assert [(m["name"], m["tables"], m["generated"]) for m in models] == [
        ("full.tol", "disk", False),
        ("full.tol", "host", False),
        ("ckpt", "ffn", False),
    ]


def test_lookup(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("lookup", work / "full.tol", "--state", "warm", "--repeats", 1, "--device", "cpu")
    metrics = metrics_of(run(capsys, "bench", *command, "--json")[0], "bench lookup")
    ways = {(row["what"], row["state"]) for row in metrics["lookups"] if row["batch"] == 64}
    assert ways == {
        ("memmap gather", "warm"),
        ("numpy reader", "warm"),
        ("disk", "warm"),
        ("disk", "cached"),
        ("host", ""),
        ("device", ""),
    }
    human, _ = run(capsys, "bench", *command, "--batch", "1,3", "--format", "human")
    assert "memmap gather" in human and "of a gather" in human
    only, _ = run(capsys, "bench", *command, "--batch", 3, "--tables", "host", "--json")
    rows = metrics_of(only, "bench lookup")["lookups"]
    assert [row["what"] for row in rows] == ["memmap gather", "numpy reader", "host"]


def test_replay(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("replay", work / "full.tol", "--data", work / "t.txt", "--cache", "4kB,1MB")
    wish = ("--policy", "seeded,lru,lfu,static,optimal", "--read-us", 50, "--step-ms", 1)
    metrics = metrics_of(run(capsys, "bench", *command, *wish, "--json")[0], "bench replay")
    assert metrics["tokens"] == 36 * 8 + 1
    caches = metrics["caches"]
    assert [row["by"] for row in caches] == [*["runtime"] * 2, *["simulated"] * 3] * 2
    by_policy = {row["policy"]: row for row in caches[:5]}
    assert by_policy["optimal"]["hits"] >= max(by_policy[p]["hits"] for p in ("lru", "lfu"))
    all_in = {row["policy"]: row for row in caches[5:]}
    assert all_in["seeded"]["hit_rate"] == 1, "a megabyte holds all records from the start"
    assert all_in["lru"]["hits"] == metrics["tokens"] - metrics["distinct"]
    assert all_in["seeded"]["predicted_tokens_per_s"] == pytest.approx(1000)
    human, _ = run(capsys, "bench", *command, "--format", "human")
    assert "50 us" not in human and "100 us a read, 2.00 GB/s" in human


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ((*DECODE, "--preset", "2b"), 2, "--preset: expected one of tiny, 250m"),
        ((*DECODE, "--arch", "moe"), 2, "--arch: expected dense"),
        ((*DECODE, "--arch", "dense,"), 2, "--arch: 'dense,' has an empty entry"),
        ((*DECODE, "--codec", "mp3"), 2, "--codec: expected f16, int8, nf4"),
        ((*DECODE, "--tables", "tape"), 2, "--tables: expected disk, host, device"),
        (("decode", "--context", 8, "--tokens", 8), 2, "--context: 8 positions have no room"),
        (("decode", "nowhere"), 4, "nowhere"),
        (("lookup", "full.tol", "--batch", "many"), 2, "--batch: expected whole numbers"),
        (("lookup", "full.tol", "--batch", 97, "--state", "warm"), 2, "at most the 96 rows"),
        (("lookup", "nowhere.tol"), 4, "nowhere.tol"),
        (("replay", "full.tol", "--data", "t.txt", "--cache", "9"), 2, "9 bytes hold no record"),
        (("replay", "full.tol", "--data", "t.txt", "--cache", "big"), 2, "'big' is not a size"),
        (("replay", "full.tol", "--data", "t.txt", "--policy", "x"), 2, "--policy: expected"),
        (("replay", "full.tol", "--data", "empty.txt"), 4, "empty.txt"),
        (("replay", "full.tol", "--data", "gone.txt"), 4, "gone.txt"),
        (("replay", "full.tol"), 2, "--data"),
        (("hum",), 2, "hum"),
    ],
)
def test_mistakes_are_named(
    work: Path,
    command: tuple[object, ...],
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(work)
    out, err = run(capsys, "bench", *command, code=code)
    assert (out, message in err) == ("", True), err


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
@pytest.mark.parametrize("name", ["decode", "lookup"])
def test_no_gpu(work: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, err = run(capsys, "bench", name, work / "full.tol", "--device", "cuda", code=6)
    assert "cuda" in err


def test_a_state_that_cannot_be_had_is_an_error(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tolkit.bench import residency

    monkeypatch.setattr(residency, "resident_share", lambda paths: 0.5)
    monkeypatch.setattr(residency, "_PAUSE_S", 0)
    command = ("replay", work / "full.tol", "--data", work / "t.txt", "--state", "cold", "--json")
    out, _ = run(capsys, "bench", *command, code=6)
    error = json.loads(out)["error"]
    assert "would not be cold" in error["message"] and "--state warm" in error["hint"]


def test_study_decode(work: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pico_checkpoint(tmp_path / "flex", "flex")
    command = ["study", "decode", tmp_path / "flex", "-o", tmp_path / "out", "--window", 6]
    capsys.readouterr()
    wish = ["--device", "cpu", "--values", "memory,flex-2"]
    assert main([*map(str, [*command, *wish, "--json"])]) == 0
    result = json.loads(capsys.readouterr().out)
    points = result["metrics"]["points"]
    assert [point["model"] for point in points] == ["dense", "flex-2", "memory"]
    assert points[0]["time_ratio"] == 1 and points[2]["paper_time_ratio"] == 14.42 / 21.50
    assert points[2]["bound"] < points[1]["bound"] < 1
    page = (tmp_path / "out" / "decode.md").read_text()
    assert "Table 6" in page and "6 positions filled" in page
    assert (tmp_path / "out" / "decode.png").is_file()
    assert not (tmp_path / "out" / "work").exists()
    assert main([*map(str, [*command, "--device", "cpu", "--values", "moe"])]) == 2
    assert main([*map(str, [*command, *wish, "--keep"])]) == 2
