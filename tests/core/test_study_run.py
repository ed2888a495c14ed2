"""Whole studies on the pico model: what they measure, write, take over and refuse."""

from __future__ import annotations

import csv
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _eval_fakes import text_of
from _pico import pico_checkpoint

from tolkit.bundling import Resources
from tolkit.compress import CompressSpec, DropSpec, compress, drop_layers
from tolkit.data import read_documents
from tolkit.errors import DataError, MismatchError, OutputExistsError, TolError, UsageError
from tolkit.evaluate import evaluate, windows_of
from tolkit.evaluate.adjust import scaled
from tolkit.evaluate.tasks import TASKS, evaluate_tasks, find_tasks
from tolkit.progress import SilentProgress
from tolkit.study import STUDIES, StudyReport, StudySpec, run_study
from tolkit.study import study as study_module
from tolkit.study.spectrum import rank_for
from tolkit.tables import load_runnable
from tolkit_formats import open_bundle


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """memory, flex and dense checkpoints of four layers, and three texts."""
    folder = tmp_path_factory.mktemp("work")
    for architecture in ("memory", "flex", "dense"):
        pico_checkpoint(folder / architecture, architecture, num_hidden_layers=4)
    for i, name in enumerate(("text", "other", "calibration")):
        (folder / f"{name}.txt").write_text(text_of(900, seed=i))
    return folder


@pytest.fixture
def study(work: Path, tmp_path: Path) -> Callable[..., StudyReport]:
    """`study(name, ...)` runs one into tmp_path/out, by default on the memory model."""

    def run(name: str, model: str = "memory", **options: Any) -> StudyReport:
        values: dict[str, Any] = {
            "out": tmp_path / "out",
            "device": "cpu",
            "threads": 1,
            "window": 32,
        }
        if name != "spectrum":
            values["data"] = (str(work / "text.txt"),)
        path = tmp_path / model if (tmp_path / model).exists() else work / model
        progress = options.pop("progress", SilentProgress())
        return run_study(StudySpec(name, path, **{**values, **options}), progress)

    return run


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The labels of every call of `evaluate`."""
    calls: list[list[str]] = []

    def counting(candidates: Any, *rest: Any, **options: Any) -> Any:
        calls.append(list(options["labels"]))
        return evaluate(candidates, *rest, **options)

    monkeypatch.setattr(study_module, "evaluate", counting)
    return calls


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


def test_alpha(study: Callable[..., StudyReport], work: Path, tmp_path: Path) -> None:
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


def test_bits(study: Callable[..., StudyReport], work: Path, tmp_path: Path) -> None:
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


def test_rank(study: Callable[..., StudyReport], tmp_path: Path) -> None:
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


def test_drop_equals_drop_layers(
    study: Callable[..., StudyReport], work: Path, tmp_path: Path
) -> None:
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


def test_drop_of_a_dense_model_is_plain_only(
    study: Callable[..., StudyReport], tmp_path: Path
) -> None:
    report = study("drop", "dense", values="0-1,3")
    check_files(report, tmp_path)
    assert [row["key"] for row in report.rows] == [f"layer {i} dropped" for i in (0, 1, 3)]
    assert all(row["kl_mean_nats"] > 0.01 for row in report.rows)
    assert "into" not in [field.key for field in report.fields], "a column that says nothing"


@pytest.mark.parametrize("kind", ["memory", "flex", "bundle"])
def test_spectrum_equals_a_full_svd(
    study: Callable[..., StudyReport], work: Path, tmp_path: Path, kind: str
) -> None:
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


def test_pruning(study: Callable[..., StudyReport], work: Path, tmp_path: Path) -> None:
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
    for start in (1, 5):
        target, *rest = report.rows[start : start + 4]
        assert {row["active_params"] for row in rest} == {target["active_params"]}
        assert len({row["kl_mean_nats"] for row in rest}) == 3
    assert report.rows[2]["sparsity"] > report.rows[6]["sparsity"] > 0
    assert study("pruning", "dense", **options).measured == 0


def test_a_study_goes_on_where_it_was(
    study: Callable[..., StudyReport], passes: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after the first two of three pairs, then continued, then extended."""
    options = {"values": "int8,nf4,fp4"}
    broken = study_module.evaluate

    def stopping(*arguments: Any, **settings: Any) -> Any:
        if len(passes) == 2:
            raise KeyboardInterrupt
        return broken(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(study_module, "evaluate", stopping)
        with pytest.raises(KeyboardInterrupt):
            study("bits", **options)
    assert len(passes) == 2
    report = study("bits", **options)
    assert passes[2:] == [["fp4 feedback", "fp4 plain"]]
    assert (report.measured, report.reused) == (2, 4)
    before = {name: file.read_bytes() for name, file in report.files.items()}
    again = study("bits", **options)
    assert len(passes) == 3
    assert (again.measured, again.reused) == (0, 6)
    assert {name: file.read_bytes() for name, file in again.files.items()} == before
    wider = study("bits", values="int8,int4,fp4")
    assert passes[3:] == [["int4 feedback", "int4 plain"]]
    assert [row["codec"] for row in wider.rows[::2]] == ["int8", "int4", "fp4"]
    study("bits", **options, restart=True)
    assert len(passes) == 4 + 3


def test_equal_runs_write_equal_files(study: Callable[..., StudyReport], tmp_path: Path) -> None:
    first = study("drop", values="1", out=tmp_path / "a")
    second = study("drop", values="1", out=tmp_path / "b")
    for name in ("csv", "md", "results", "figure", "svg"):
        assert first.files[name].read_bytes() == second.files[name].read_bytes(), name


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"model": "flex"}, "model"),
        ({"window": 16}, "window"),
        ({"limit_tokens": 300}, "text"),
        ({"packed": True}, "packed"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"name": "drop", "values": "0"}, "study"),
    ],
)
def test_a_folder_of_other_conditions_is_refused(
    study: Callable[..., StudyReport], change: dict[str, Any], what: str
) -> None:
    report = study("alpha", values="0.5")
    before = {file: file.read_bytes() for file in report.files.values()}
    options = {"name": "alpha", "values": "0.5", **change}
    with pytest.raises(MismatchError, match=f"holds results of another .*{what}") as caught:
        study(**options)
    assert "--restart" in caught.value.hint
    assert {file: file.read_bytes() for file in report.files.values()} == before
    assert study(**options, restart=True).measured == len(study(**options).rows)


def test_a_folder_of_something_else_is_left_alone(
    study: Callable[..., StudyReport], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("keep me")
    for restart in (False, True):
        with pytest.raises(OutputExistsError, match="left alone"):
            study("alpha", restart=restart)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", ":1: is not the head"),
        (b"[]\n", ":1: expected a JSON object"),
        (b"{\n", ":1: is not JSON"),
        (b'{"schema": "other/1", "fingerprint": {}}\n', ":1: is not the head"),
        (b'{"schema": "tolkit.study/1"}\n', ":1: is not the head"),
    ],
)
def test_results_that_cannot_be_read(
    study: Callable[..., StudyReport], tmp_path: Path, content: bytes, said: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=said) as caught:
        study("alpha", values="0.5")
    assert "--restart" in caught.value.hint
    assert study("alpha", values="0.5", restart=True).measured == 1


def test_a_point_without_a_key(study: Callable[..., StudyReport], tmp_path: Path) -> None:
    results = study("alpha", values="0.5").files["results"]
    results.write_bytes(results.read_bytes() + b'{"alpha": 1}\n')
    with pytest.raises(DataError, match=r"results.jsonl:3: has no key"):
        study("alpha", values="0.5")


@pytest.mark.parametrize(
    ("name", "model", "options", "said"),
    [
        ("other", "memory", {}, "study: 'other' is none, expected one of alpha, bits"),
        ("alpha", "memory", {"data": ()}, "data: alpha measures on text"),
        ("alpha", "dense", {}, "is a dense model"),
        (
            "alpha",
            "memory",
            {"values": "1,half"},
            "values: expected numbers from 0 to 10, got 'half'",
        ),
        ("alpha", "memory", {"values": "1,-1"}, "values: expected numbers .* got '-1'"),
        ("alpha", "memory", {"values": "1,nan"}, "values: expected numbers .* got 'nan'"),
        ("alpha", "memory", {"values": "1,,2"}, "values: .* has an empty entry"),
        ("alpha", "memory", {"values": "1,1.0"}, "values: .* names 1 twice"),
        ("alpha", "memory", {"keep": True}, "keep: alpha has no use for it"),
        ("alpha", "memory", {"against": (Path("x"),)}, "against: alpha has no use for it"),
        ("bits", "dense", {}, "is a dense model"),
        ("rank", "dense", {}, "is a dense model"),
        ("bits", "memory", {"values": "int3"}, "values: 'int3' is no codec, expected f16"),
        ("rank", "memory", {"values": "100"}, "values: expected numbers from 0 to 99.9"),
        ("drop", "memory", {"values": "4"}, "values: layer 4 is out of range"),
        ("spectrum", "dense", {}, "is a dense checkpoint"),
        ("spectrum", "memory", {"values": "1"}, "values: spectrum has no use for it"),
        ("pruning", "memory", {}, "has token tables, the model to prune is a dense one"),
        ("pruning", "dense", {}, "against: names no checkpoint"),
        ("pruning", "dense", {"values": "luck"}, "values: 'luck' is no method"),
    ],
)
def test_what_cannot_be_studied(
    study: Callable[..., StudyReport],
    tmp_path: Path,
    name: str,
    model: str,
    options: dict[str, Any],
    said: str,
) -> None:
    with pytest.raises(TolError, match=said) as caught:
        study(name, model, **options)
    assert caught.value.exit_code in (2, 4)
    assert not (tmp_path / "out").exists()


def test_pruning_needs_calibration_text_only_where_it_is_looked_at(
    study: Callable[..., StudyReport], work: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="calibration: wanda and sparsegpt look at text"):
        study("pruning", "dense", against=(work / "memory",))
    report = study("pruning", "dense", against=(work / "memory",), values="magnitude")
    assert [row["method"] for row in report.rows] == ["none", "none", "magnitude"]


def test_calibrating_on_the_measured_text_is_a_warning(
    study: Callable[..., StudyReport], work: Path
) -> None:
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
    study: Callable[..., StudyReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tolkit.study import run

    monkeypatch.setattr(run, "plots_installed", lambda: False)
    progress = SilentProgress()
    report = study("alpha", values="1,0.5", progress=progress)
    assert {"figure", "svg"}.isdisjoint(report.files)
    assert any("matplotlib is not installed" in line for line in progress.warnings)
    assert "![" not in report.files["md"].read_text()


def task_folder(tmp_path: Path) -> Path:
    """lambada with five items, and arc_easy with three."""
    for name in ("lambada", "arc_easy"):
        (tmp_path / "tasks" / name).mkdir(parents=True)
    texts = [f"the cat sat on a mat {i} who are you" for i in range(5)]
    lines = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "tasks" / "lambada" / "test.jsonl").write_text("\n".join(lines) + "\n")
    choices = {"text": ["a cat", "a mat", "you"], "label": ["A", "B", "C"]}
    items = [{"question": f"Who sat {i}?", "choices": choices, "answerKey": "A"} for i in range(3)]
    lines = [json.dumps(item) for item in items]
    (tmp_path / "tasks" / "arc_easy" / "test.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "tasks"


def test_tasks_are_scored_beside(
    study: Callable[..., StudyReport], work: Path, tmp_path: Path
) -> None:
    options = {"tasks": ("arc_easy", "lambada"), "task_data": task_folder(tmp_path)}
    report = study("alpha", values="1,0.3", **options)
    check_files(report, tmp_path)
    model = load_runnable(work / "memory")
    tasks = find_tasks(*options.values())
    (expected,) = evaluate_tasks(
        [scaled(model, 0.3)], model, tasks, device="cpu", progress=SilentProgress()
    )
    row = report.rows[1]
    for result in expected:
        assert row[f"{result.task}_items"] == result.n
        for name in TASKS[result.task].metrics:
            key = f"{result.task}_{name}"
            assert row[key] == pytest.approx(result.metrics[name].value)
            assert row[f"{key}_se"] == pytest.approx(result.metrics[name].se)
            assert row[f"{key}_reference"] == report.rows[0][key]
    shown = [field.key for field in report.fields]
    assert shown.index("arc_easy_acc") < shown.index("lambada_acc") < shown.index("paper_ppl")
    assert "arc_easy" in report.tasks and "(n 3)" in report.tasks
    assert report.tasks in report.files["md"].read_text()
    assert study("alpha", values="1,0.3", **options).measured == 0
    with pytest.raises(MismatchError, match="of another tasks"):
        study("alpha", values="1,0.3")
    with pytest.raises(MismatchError, match="of another tasks"):
        study("alpha", values="1,0.3", **options, task_limit=2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tasks": ("piqa",)}, "task_data: names no folder with the tasks"),
        ({"task_data": Path("x")}, "tasks: none are named"),
        ({"tasks": ("chess",), "task_data": Path("x")}, "expected one of lambada"),
        ({"name": "spectrum", "tasks": ("piqa",)}, "tasks: spectrum has no use for it"),
    ],
)
def test_tasks_that_cannot_be_scored(
    study: Callable[..., StudyReport], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        study(**{"name": "alpha", **options})


def test_every_study_is_complete() -> None:
    assert list(STUDIES) == ["alpha", "bits", "rank", "drop", "spectrum", "pruning"]
    for study in STUDIES.values():
        assert study.paper.place
        assert study.about.endswith(".")


def test_one_window_has_no_standard_error(
    study: Callable[..., StudyReport], tmp_path: Path
) -> None:
    report = study("alpha", values="0.5", limit_tokens=20)
    (row,) = report.rows
    assert row["windows"] == 1
    assert row["ppl_token_se"] is None
    stored = json.loads(report.files["results"].read_text().splitlines()[1])
    assert stored["ppl_token_se"] is None
    assert report.files["figure"].stat().st_size > 1000
