"""Every command line printed in help and README runs, in one folder, in the order of the work."""

from __future__ import annotations

import json
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from tolkit.data import stdlib_corpus
from tolkit_cli.main import COMMANDS, main

ROOT = Path(__file__).parents[2]
ONE_IN = 12
# What a reader waits minutes for is shortened, nothing else is changed.
SHORTER = {
    "tol demo": ["--minutes", "0.01", "--tokens", "600"],
    "tol train": ["--steps", "2", "--batch", "2", "--sequence", "32"],
    "tol eval": ["--limit-tokens", "600"],
    "tol calibrate": ["--tokens", "600"],
    "tol study alpha": ["--limit-tokens", "600"],
    "tol compress ckpt -o good.tol": ["--limit-tokens", "300", "--max-kl", "50"],
    "tol drop-layers full.tol -o best.tol --auto": ["--limit-tokens", "300"],
    "tol bench decode --preset": ["--layers", "1", "--tokens", "2", "--rounds", "1"],
}


@pytest.fixture(autouse=True)
def less_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """One file in ONE_IN of the built-in corpus: reading all of it is most of the time."""
    everything = stdlib_corpus._source_files

    def some() -> dict[str, Path]:
        return dict(sorted(everything().items())[::ONE_IN])

    monkeypatch.setattr(stdlib_corpus, "_source_files", some)


def run(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a printed command line, shortened; returns its stdout."""
    words = shlex.split(line)
    for start, options in SHORTER.items():
        if line.startswith(start):
            replaced = {option for option in options if option.startswith("--")}
            if "--steps" in replaced and "--minutes" in words:
                at = words.index("--minutes")
                del words[at : at + 2]
            words += options
    code = main(words[1:])
    captured = capsys.readouterr()
    assert code == 0, f"{line}\n{captured.err}"
    return captured.out


@pytest.mark.slow
def test_every_help_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    for name in ("a", "b"):
        (tmp_path / "text" / f"{name}.txt").write_text(f"{name} fox jumps over a dog. " * 400)
    waiting = [example for registered in COMMANDS for example in registered.examples]
    while waiting:
        example = next(line for line in waiting if has_its_bundles(line))
        waiting.remove(example)
        out = run(example, capsys)
        assert out, example
        if "--json" in example:
            assert json.loads(out)["ok"]
    check_demo(tmp_path / "tol-demo")


def has_its_bundles(line: str) -> bool:
    """Whether the bundles a printed command line reads are there already."""
    words = shlex.split(line)
    read = [w for before, w in pairwise(words) if w.endswith(".tol") and before != "-o"]
    return all(Path(word).exists() for word in read)


@pytest.mark.slow
def test_the_readme_steps_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = (ROOT / "README.md").read_text().splitlines()
    steps = [line.strip() for line in lines if line.startswith("    tol ")]
    assert len(steps) >= 4
    for step in steps:
        assert run(step, capsys)


def check_demo(folder: Path) -> None:
    """The table of a finished demo, and what it refuses to overwrite."""
    rows = json.loads((folder / "demo.json").read_text())["rows"]
    by_name = {row["tables"]: row for row in rows}
    assert list(by_name) == [
        "f16",
        "int8",
        "nf4",
        "nf4, no feedback",
        "rank 50%",
        "rank 50% + nf4",
        "1 bit",
        "half a bit",
        "2 layers folded",
        "2 layers dropped",
    ]
    assert by_name["f16"]["kl_mean_nats"] < 1e-5
    assert by_name["nf4"]["bytes"] == by_name["nf4, no feedback"]["bytes"]
    assert by_name["rank 50% + nf4"]["bytes"] < by_name["nf4"]["bytes"]
    assert by_name["2 layers folded"]["kl_mean_nats"] < by_name["2 layers dropped"]["kl_mean_nats"]
    table = (folder / "results.md").read_text()
    assert all(f"| {name} |" in table for name in by_name)
    assert (folder / "quality.png").read_bytes().startswith(b"\x89PNG")
    assert main(["demo", "-o", str(folder)]) == 2, "a finished demo is not overwritten"


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("keep me")
    assert main(["demo", "-o", str(tmp_path), "--force"]) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
