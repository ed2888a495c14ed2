"""What a study takes over from an earlier run, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from _nano import fault_hook
from _study import RunStudy, study_inputs, study_runner

from tolkit.errors import DataError, MismatchError, OutputExistsError
from tolkit.evaluate import evaluate
from tolkit.study import study as study_module


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return study_inputs(tmp_path_factory.mktemp("work"))


@pytest.fixture
def study(work: Path, tmp_path: Path) -> RunStudy:
    return study_runner(work, tmp_path)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The labels of every call of `evaluate`."""
    calls: list[list[str]] = []

    def counting(candidates: Any, *rest: Any, **options: Any) -> Any:
        calls.append(list(options["labels"]))
        return evaluate(candidates, *rest, **options)

    monkeypatch.setattr(study_module, "evaluate", counting)
    return calls


def test_a_study_goes_on_where_it_was(
    study: RunStudy, passes: list[list[str]], monkeypatch: pytest.MonkeyPatch
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


def test_equal_runs_write_equal_files(study: RunStudy, tmp_path: Path) -> None:
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
    study: RunStudy, change: dict[str, Any], what: str
) -> None:
    report = study("alpha", values="0.5")
    before = {file: file.read_bytes() for file in report.files.values()}
    options = {"name": "alpha", "values": "0.5", **change}
    with pytest.raises(MismatchError, match=f"holds results of another .*{what}") as caught:
        study(**options)
    assert "--restart" in caught.value.hint
    assert {file: file.read_bytes() for file in report.files.values()} == before
    assert study(**options, restart=True).measured == len(study(**options).rows)


def test_a_folder_of_something_else_is_left_alone(study: RunStudy, tmp_path: Path) -> None:
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
    study: RunStudy, tmp_path: Path, content: bytes, said: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=said) as caught:
        study("alpha", values="0.5")
    assert "--restart" in caught.value.hint
    assert study("alpha", values="0.5", restart=True).measured == 1


def test_a_point_without_a_key(study: RunStudy, tmp_path: Path) -> None:
    results = study("alpha", values="0.5").files["results"]
    results.write_bytes(results.read_bytes() + b'{"alpha": 1}\n')
    with pytest.raises(DataError, match=r"results.jsonl:3: has no key"):
        study("alpha", values="0.5")


@pytest.mark.parametrize("name", ["alpha", "bits"])
def test_a_run_stopped_at_any_write_is_finished_by_the_next(
    study: RunStudy, tmp_path: Path, name: str
) -> None:
    """Some of the I/O calls are where a run ends; the files are those of a run that was not."""
    values = {"alpha": "1,0.5", "bits": "nf4"}[name]
    whole = study(name, values=values, out=tmp_path / "whole")
    operations = 0

    def count(operation: str, path: str) -> None:
        nonlocal operations
        operations += 1

    with fault_hook(count):
        study(name, values=values, out=tmp_path / "counted")
    step = max(7, operations // 7)
    for last in range(1, operations, step):
        out = tmp_path / f"stopped-{last}"
        seen = 0

        def stop(operation: str, path: str, last: int = last) -> None:
            nonlocal seen
            seen += 1
            if seen == last:
                raise KeyboardInterrupt

        with fault_hook(stop), pytest.raises(KeyboardInterrupt):
            study(name, values=values, out=out)
        again = study(name, values=values, out=out)
        for kind, file in whole.files.items():
            assert again.files[kind].read_bytes() == file.read_bytes(), (last, kind)
        assert sorted(f.name for f in out.iterdir()) == sorted(f.name for f in whole.files.values())
