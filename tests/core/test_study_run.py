"""Whole studies on the pico model: what they measure and write."""

from __future__ import annotations

import csv
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _study import RunStudy, study_inputs, study_runner

from tolkit.bundling import Resources
from tolkit.compress import CompressSpec, DropSpec, compress, drop_layers
from tolkit.data import read_documents
from tolkit.errors import UsageError
from tolkit.evaluate import evaluate, windows_of
from tolkit.progress import SilentProgress
from tolkit.study import STUDIES, StudyReport
from tolkit.study.spectrum import rank_for
from tolkit.tables import load_runnable
from tolkit_formats import open_bundle


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return study_inputs(tmp_path_factory.mktemp("work"))


@pytest.fixture
def study(work: Path, tmp_path: Path) -> RunStudy:
    return study_runner(work, tmp_path)


def rows_of(report: StudyReport) -> list[dict[str, str]]:
    with report.files["csv"].open() as file:
        return list(csv.DictReader(file))


def check_files(report: StudyReport, tmp_path: Path) -> None:
    """CSV and Markdown say the same as the rows; figures are what their names say."""
    lines = rows_of(report)
    assert [line["key"] for line in lines] == [row["key"] for row in report.rows]
    for line, row in zip(lines, report.rows, strict=True):
        for field in report.fields:
            if isinstance(row.get(field.key), float):
                assert float(line[field.key]) == row[field.key]
    page = report.files["md"].read_text()
    assert page.startswith(f"# {report.study.title}\n")
    table = [line for line in page.split("\n\n")[2].splitlines()]
    assert len(table) == 2 + len(report.rows)
    assert all(line.count("|") == len(report.fields) + 1 for line in table)
    assert "arXiv 2602.00398" in page
    png, svg = report.files["figure"].read_bytes(), report.files["svg"].read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", png[16:24]) == (1040, 624)
    assert svg.startswith(b"<?xml") and svg.rstrip().endswith(b"</svg>")
    assert not (tmp_path / "out" / "work").exists()


def test_alpha(study: RunStudy, work: Path, tmp_path: Path) -> None:
    report = study("alpha")
    check_files(report, tmp_path)
    assert [row["alpha"] for row in report.rows] == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
    first, last = report.rows[0], report.rows[-1]
    assert (first["ppl_increase"], first["kl_mean_nats"], first["top1_agreement"]) == (0, 0, 1)
    assert last["kl_mean_nats"] > report.rows[1]["kl_mean_nats"] > 0
    assert (first["paper_ppl"], first["paper_change"]) == (24.348, 0.0)
    assert last["paper_change"] == pytest.approx(53.707 / 24.348 - 1)
    model = load_runnable(work / "memory")
    windows = windows_of(read_documents([str(work / "text.txt")]), model.tokenizer, 32)
    (alone,) = evaluate([model], None, windows, device="cpu", progress=SilentProgress())
    assert first["ppl_token"] == pytest.approx(alone.metrics["ppl_token"].value, rel=1e-6)
    assert first["ppl_token_se"] == pytest.approx(alone.metrics["ppl_token"].se, rel=1e-6)
    assert (first["tokens"], first["windows"]) == (windows.n_tokens, len(windows))
    page = report.files["md"].read_text()
    assert f"{windows.n_tokens:,} tokens in {len(windows):,} windows of text.txt" in page
    assert "| 0.5 | 53.707 |" in page, "the paper's own table is on the page"


def test_bits(study: RunStudy, work: Path, tmp_path: Path) -> None:
    report = study("bits", keep=True)
    check_files(report, tmp_path)
    assert [row["codec"] for row in report.rows[::2]] == ["f16", "int8", "int4", "nf4", "fp4"]
    assert [row["mode"] for row in report.rows[:4]] == ["feedback", "plain"] * 2
    assert [row["bits"] for row in report.rows[::2]] == [16, 8, 4, 4, 4]
    by_key = {row["key"]: row for row in report.rows}
    bundle = open_bundle(tmp_path / "out" / "bundles" / "nf4-plain.tol")
    assert by_key["nf4 plain"]["bytes"] == bundle.table_bytes
    assert by_key["nf4 plain"]["bits_per_value"] == bundle.bits_per_value
    assert by_key["int8 plain"]["kl_mean_nats"] < by_key["nf4 plain"]["kl_mean_nats"]
    assert by_key["nf4 plain"]["paper_ppl"] == 24.439
    assert by_key["nf4 feedback"].get("paper_ppl") is None, "the paper has no feedback"
    fresh = tmp_path / "fresh.tol"
    wish = CompressSpec(codec="nf4", feedback=False, weights="none")
    compress(work / "memory", fresh, wish, resources=Resources(1), progress=SilentProgress())
    assert open_bundle(fresh).identity == bundle.identity


def test_rank(study: RunStudy, tmp_path: Path) -> None:
    report = study("rank", values="0,25,50")
    check_files(report, tmp_path)
    assert not (tmp_path / "out" / "bundles").exists()
    V, D, L = 96, 32, 4
    halved = report.rows[-1]
    assert (halved["cut_percent"], halved["rank"], halved["mode"]) == (50, 16, "plain")
    assert halved["tol_params"] == L * (V * 16 + 16 * D)
    assert halved["saved"] == pytest.approx(1 - (V * 16 + 16 * D) / (V * D))
    assert (report.rows[0]["rank"], report.rows[0]["saved"]) == (D, 0.0)
    assert report.rows[0]["kl_mean_nats"] < 1e-4 < report.rows[-1]["kl_mean_nats"]
    assert (halved["paper_ppl"], report.rows[3]["paper_ppl"]) == (19.586, None)


def test_the_papers_own_ranks_and_savings() -> None:
    """Table 8 from its own shape: what `rank` counts is what the paper counts."""
    from tolkit.compress.spec import parse_ranks
    from tolkit.study.paper import TABLE_8

    V, D, L = 128256, 2048, 24
    for cut, rank, params, _, saved, _ in TABLE_8.rows:
        found = parse_ranks(f"{100 - float(cut[:-2]):g}%", 1, D)[0]
        assert found == int(rank)
        values = V * D if found == D else V * found + found * D
        assert f"{L * values // 10**4 / 100:.2f}M" == params, (
            "the paper cuts off, it does not round"
        )
        assert float(saved[:-2]) == pytest.approx(100 * (1 - values / (V * D)), abs=0.005)


def test_drop_equals_drop_layers(study: RunStudy, work: Path, tmp_path: Path) -> None:
    report = study("drop")
    check_files(report, tmp_path)
    into = [row["into"] for row in report.rows]
    assert into == [None, 1, None, 2, None, 3, None, 2], "the last layer's goes to the one before"
    assert [row["layer"] for row in report.rows] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [row["mode"] for row in report.rows] == ["dropped", "folded"] * 4
    full = tmp_path / "full.tol"
    exact = CompressSpec(codec="f32", feedback=False)
    quiet = {"resources": Resources(1), "progress": SilentProgress()}
    compress(work / "memory", full, exact, **quiet)
    model = load_runnable(work / "memory")
    windows = windows_of(read_documents([str(work / "text.txt")]), model.tokenizer, 32)
    for row in report.rows:
        thin = tmp_path / f"{row['key'].replace(' ', '-')}.tol"
        drop_layers(full, thin, DropSpec((row["layer"],), fold=row["mode"] == "folded"), **quiet)
        (result,) = evaluate(
            [load_runnable(thin)], model, windows, device="cpu", progress=SilentProgress()
        )
        for name in ("ppl_token", "kl_mean_nats", "top1_agreement"):
            assert row[name] == pytest.approx(result.metrics[name].value, rel=1e-4), row["key"]


def test_studies_of_a_bundle_know_its_layers(study: RunStudy, work: Path, tmp_path: Path) -> None:
    wish = CompressSpec(codec="int8", drop=(1,))
    quiet = {"resources": Resources(1), "progress": SilentProgress()}
    compress(work / "memory", tmp_path / "thin.tol", wish, **quiet)
    layers = [row["layer"] for row in study("drop", "thin.tol").rows]
    assert layers == [0, 0, 2, 2, 3, 3]
    (row, _) = study("rank", "thin.tol", values="50", out=tmp_path / "rank").rows
    assert row["tol_params"] == 3 * (96 * 16 + 16 * 32)
    with pytest.raises(UsageError, match="layer 1 has no table any more"):
        study("drop", "thin.tol", values="1", out=tmp_path / "gone")


def test_drop_of_a_dense_model_is_plain_only(study: RunStudy, tmp_path: Path) -> None:
    report = study("drop", "dense", values="0-1,3")
    check_files(report, tmp_path)
    assert [row["key"] for row in report.rows] == [f"layer {i} dropped" for i in (0, 1, 3)]
    assert all(row["kl_mean_nats"] > 0.01 for row in report.rows)
    assert "into" not in [field.key for field in report.fields], "a column that says nothing"


@pytest.mark.parametrize("kind", ["memory", "flex", "bundle"])
def test_spectrum_equals_a_full_svd(study: RunStudy, work: Path, tmp_path: Path, kind: str) -> None:
    source = work / ("memory" if kind == "bundle" else kind)
    if kind == "bundle":
        wish = CompressSpec(codec="f32", feedback=False, drop=(1,), fold=False)
        quiet = {"resources": Resources(1), "progress": SilentProgress()}
        compress(source, tmp_path / "bundle", wish, **quiet)
    report = study("spectrum", kind)
    check_files(report, tmp_path)
    with report.files["values"].open() as file:
        values = list(csv.DictReader(file))
    assert len(values) == 32
    model = load_runnable(source).model
    layers = [0, 2, 3] if kind == "bundle" else [0, 1, 2, 3]
    assert [row["layer"] for row in report.rows] == layers
    for row in report.rows:
        with torch.no_grad():
            table_VD = model.ffn_plane(row["layer"], torch.arange(96)).double()
        expected = torch.linalg.svdvals(table_VD).numpy()
        np.testing.assert_allclose(row["singular_values"], expected, rtol=1e-5)
        assert [float(v[f"layer_{row['layer']}"]) for v in values] == row["singular_values"]
        shares = np.cumsum(expected**2) / (expected**2).sum()
        for percent in (90, 95, 99):
            assert row[f"rank_{percent}"] == 1 + int((shares < percent / 100).sum())
            assert row[f"share_{percent}"] == row[f"rank_{percent}"] / 32


def test_ranks_of_simple_spectra() -> None:
    assert rank_for(np.array([3.0, 1.0, 0.0]), 0.75) == 1
    assert rank_for(np.array([3.0, 1.0, 0.0]), 0.76) == 2
    assert rank_for(np.array([1.0, 1.0, 1.0, 1.0]), 0.5) == 2
    assert rank_for(np.zeros(4), 0.9) == 1


def test_pruning(study: RunStudy, work: Path, tmp_path: Path) -> None:
    options = {
        "against": (work / "memory", work / "flex"),
        "calibration": (str(work / "calibration.txt"),),
        "calibration_windows": 6,
    }
    report = study("pruning", "dense", **options)
    check_files(report, tmp_path)
    found = [(row["model"], row["method"]) for row in report.rows]
    pruned = [("dense", name) for name in ("magnitude", "wanda", "sparsegpt")]
    assert found == [("dense", "none"), ("memory", "none"), *pruned, ("flex", "none"), *pruned]
    assert report.rows[0]["kl_mean_nats"] == 0
    assert [row.get("target") for row in report.rows[4:7]] == ["memory", None, "flex"]
    for start in (1, 5):
        target, *rest = report.rows[start : start + 4]
        assert {row["active_params"] for row in rest} == {target["active_params"]}
        assert len({row["kl_mean_nats"] for row in rest}) == 3
    assert report.rows[2]["sparsity"] > report.rows[6]["sparsity"] > 0
    assert study("pruning", "dense", **options).measured == 0


def test_calibrating_on_the_measured_text_is_a_warning(study: RunStudy, work: Path) -> None:
    progress = SilentProgress()
    study(
        "pruning",
        "dense",
        against=(work / "memory",),
        values="wanda",
        calibration=(str(work / "text.txt"),),
        calibration_windows=1000,
        progress=progress,
    )
    assert any("is the text that is measured on" in line for line in progress.warnings)


def test_without_matplotlib_the_figure_is_left_out(
    study: RunStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tolkit.study import run

    monkeypatch.setattr(run, "plots_installed", lambda: False)
    progress = SilentProgress()
    report = study("alpha", values="1,0.5", progress=progress)
    assert {"figure", "svg"}.isdisjoint(report.files)
    assert any("matplotlib is not installed" in line for line in progress.warnings)
    assert "![" not in report.files["md"].read_text()


def test_every_study_is_complete() -> None:
    names = ["alpha", "bits", "rank", "drop", "spectrum", "pruning", "pareto", "decode"]
    assert list(STUDIES) == names
    for study in STUDIES.values():
        assert study.paper.place
        assert study.about.endswith(".")


def test_one_window_has_no_standard_error(study: RunStudy, tmp_path: Path) -> None:
    report = study("alpha", values="0.5", limit_tokens=20)
    (row,) = report.rows
    assert row["windows"] == 1
    assert row["ppl_token_se"] is None
    stored = json.loads(report.files["results"].read_text().splitlines()[1])
    assert stored["ppl_token_se"] is None
    assert report.files["figure"].stat().st_size > 1000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", list(STUDIES))
def test_a_cuda_device_gives_the_same_points(
    study: RunStudy, work: Path, tmp_path: Path, name: str
) -> None:
    options: dict[str, Any] = {}
    if name == "pruning":
        options["against"] = (work / "memory",)
        options["calibration"] = (str(work / "calibration.txt"),)
        options["calibration_windows"] = 6
    model = "dense" if name == "pruning" else "memory"
    here, there = (
        study(name, model, device=device, out=tmp_path / device, **options)
        for device in ("cpu", "cuda")
    )
    for ours, theirs in zip(here.rows, there.rows, strict=True):
        assert ours["key"] == theirs["key"]
        for key in ("ppl_token", "largest", "rank_95"):
            assert ours.get(key) == pytest.approx(theirs.get(key), rel=1e-3)
