"""The lineage of a bundle joined with its ancestors' records."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from _eval_results import CONDITIONS, METRICS, made
from _nano import MIXED, reseal, write_nano

from tolkit.errors import BundleError, InputError, UsageError
from tolkit.evaluate import Metric, append_quality, quality_record
from tolkit.history import Lineage, history_of, options_text
from tolkit.progress import SilentProgress
from tolkit_formats import open_bundle

COMMANDS = (
    ("build", {"dtype": "f16"}),
    ("compress", {"codec": "nf4", "rank": "50%", "drop": [], "feedback": True, "fold": True}),
    ("drop-layers", {"layers": [0, 2], "fold": False}),
)
OTHER_TEXT = replace(CONDITIONS, text_digest="e" * 64)


@pytest.fixture
def chain(tmp_path: Path) -> list[Path]:
    """Three bundles, each made from the one before."""
    paths: list[Path] = []
    history: list[dict[str, Any]] = []
    for i, (command, options) in enumerate(COMMANDS):
        path = tmp_path / f"b{i}.tol"
        write_nano(path, MIXED, seed=i)
        parent = open_bundle(paths[-1]).identity if paths else None
        history.append({"command": command, "options": options, "parent": parent, "tool": "test 1"})
        reseal(path, lambda manifest: manifest.update(history=history))
        paths.append(path)
    return paths


def note(path: Path, ppl: float = 10.0, *, into: Path | None = None, **changes: Any) -> None:
    """Append a record of the bundle at `path`, to its own log or another's."""
    metrics = {**METRICS, "ppl_token": Metric(ppl, 0.1, 100)}
    result = made(**{"identity": open_bundle(path).identity, "metrics": metrics, **changes})
    assert append_quality(into or path, quality_record(result), SilentProgress())


def perplexities(lineage: Lineage) -> list[float | None]:
    return [
        None if step.record is None else step.record.metrics["ppl_token"].value
        for step in lineage.steps
    ]


def test_steps_come_with_their_bundles_and_records(chain: list[Path]) -> None:
    for i, path in enumerate(chain):
        note(path, 99.0)
        note(path, 10.0 + i)
    found = history_of(chain[2])
    assert [step.command for step in found.steps] == ["build", "compress", "drop-layers"]
    assert [step.path for step in found.steps] == chain
    assert perplexities(found) == [10.0, 11.0, 12.0], "the last record of each"
    for step, path in zip(found.steps, chain, strict=True):
        bundle = open_bundle(path)
        assert (step.identity, step.table_bytes) == (bundle.identity, bundle.table_bytes)
        assert step.bits_per_value == bundle.bits_per_value
    assert found.notes == ()
    assert [step.path for step in history_of(chain[1]).steps] == chain[:2]


def test_missing_ancestors_are_not_here_but_their_records_count(
    chain: list[Path], tmp_path: Path
) -> None:
    note(chain[0], 10.0, into=chain[2])  # a copied record
    shutil.rmtree(chain[0])
    shutil.rmtree(chain[1])
    found = history_of(chain[2])
    assert [step.path for step in found.steps] == [None, None, chain[2]]
    assert found.steps[0].table_bytes == 1_500_000_000, "as the record says"
    assert found.steps[1].table_bytes is None
    assert perplexities(found) == [10.0, None, None]


def test_ancestors_elsewhere_are_searched_for(chain: list[Path], tmp_path: Path) -> None:
    note(chain[0], 10.0)
    note(chain[2], 12.0)
    elsewhere = tmp_path / "archive"
    elsewhere.mkdir()
    for path in chain[:2]:
        path.rename(elsewhere / f"renamed-{path.name}")
    assert perplexities(history_of(chain[2])) == [None, None, 12.0]
    assert perplexities(history_of(chain[2], [elsewhere])) == [10.0, None, 12.0]
    itself = elsewhere / "renamed-b0.tol"
    assert perplexities(history_of(chain[2], [itself])) == [10.0, None, 12.0]
    with pytest.raises(InputError, match=r"search: .*: no such folder"):
        history_of(chain[2], [tmp_path / "none"])


def test_relatives_that_are_no_ancestors_are_left_out(chain: list[Path]) -> None:
    for path, ppl in zip(chain, (10.0, 11.0, 12.0), strict=True):
        note(path, ppl)
    assert perplexities(history_of(chain[0])) == [10.0]


def test_texts_are_never_mixed(chain: list[Path]) -> None:
    note(chain[0], 10.0)
    note(chain[1], 11.0)
    for _ in range(3):
        note(chain[2], 50.0, conditions=OTHER_TEXT)
    found = history_of(chain[2])
    assert perplexities(found) == [10.0, 11.0, None], "most steps, not most records"
    assert found.setting.text_digest == "a" * 64
    assert found.notes == ("left out: 3 record(s) on the text eeeeeeeeeeee",)
    other = history_of(chain[2], text="eee")
    assert perplexities(other) == [None, None, 50.0]
    assert other.notes == ("left out: 2 record(s) on the text aaaaaaaaaaaa",)
    with pytest.raises(UsageError, match=r"text: no record is of a text with digest ff\.\.") as err:
        history_of(chain[2], text="ff")
    assert err.value.hint == "there are records of aaaaaaaaaaaa, eeeeeeeeeeee"


def test_of_equally_measured_texts_the_newest_is_shown(chain: list[Path]) -> None:
    note(chain[2], 12.0)
    note(chain[2], 50.0, conditions=OTHER_TEXT)
    assert perplexities(history_of(chain[2])) == [None, None, 50.0]
    note(chain[2], 13.0)
    assert perplexities(history_of(chain[2])) == [None, None, 13.0]


def test_windows_and_references_are_not_mixed_either(chain: list[Path]) -> None:
    note(chain[0], 10.0)
    note(chain[1], 20.0, conditions=replace(CONDITIONS, window_length=64))
    note(chain[1], 30.0, reference_identity="f" * 64)
    note(chain[2], 12.0)
    found = history_of(chain[2])
    assert perplexities(found) == [10.0, None, 12.0]
    assert found.notes == ("left out: 2 record(s) with other windows, tokenizer or reference",)


def test_a_step_measured_without_the_reference_still_shows_its_perplexity(
    chain: list[Path],
) -> None:
    bare = {"reference_identity": None, "reference_metrics": {}}
    note(chain[0], 10.0, **bare)
    note(chain[1], 11.0)
    note(chain[2], 13.0, **bare)
    note(chain[2], 12.0)
    note(chain[2], 14.0, **bare)
    found = history_of(chain[2])
    assert found.setting.reference == "d" * 64
    assert perplexities(found) == [10.0, 11.0, 12.0]


def test_number_formats_that_differ_are_told(chain: list[Path]) -> None:
    note(chain[0])
    note(chain[1], conditions=replace(CONDITIONS, dtype="bfloat16"))
    assert history_of(chain[2]).notes == ("number formats differ: bfloat16, float32",)


def test_damage_beside_the_bundle_is_a_note(chain: list[Path], tmp_path: Path) -> None:
    note(chain[0], 10.0)
    note(chain[0], 99.0, problems=("NaN logits",))
    log = chain[0] / "quality.jsonl"
    newer = json.loads(log.read_text().splitlines()[0]) | {"schema": "tolkit.quality/9"}
    with log.open("ab") as file:
        file.write(b'{"torn\n' + json.dumps(newer).encode() + b"\n")
    (chain[1] / "tol.json").write_bytes(b"{}")
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial" / "tol.json").write_bytes(b"no manifest yet")
    found = history_of(chain[2])
    assert perplexities(found) == [10.0, None, None]
    assert found.steps[1].path is None
    assert len(found.notes) == 4
    for said in ("b1.tol/tol.json", "NaN logits", "not JSON", "schema is tolkit.quality/9"):
        assert sum(said in text for text in found.notes) == 1, said


def test_a_log_too_large_to_read_is_a_note(
    chain: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    note(chain[0], 10.0)
    monkeypatch.setattr("tolkit.quality_log._LIMIT_BYTES", 100)
    found = history_of(chain[2])
    assert perplexities(found) == [None, None, None]
    assert "larger than the limit" in found.notes[0]


def test_a_damaged_bundle_is_an_error(chain: list[Path], tmp_path: Path) -> None:
    (chain[2] / "tol.json").write_bytes(b"{}")
    with pytest.raises(BundleError):
        history_of(chain[2])
    with pytest.raises(InputError):
        history_of(tmp_path / "none.tol")


def test_nothing_is_written(chain: list[Path], tmp_path: Path) -> None:
    note(chain[0])
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    history_of(chain[2])
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_bundle_named_by_dots_finds_its_siblings(
    chain: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    note(chain[0], 10.0)
    for folder, name in ((chain[2], "."), (chain[2] / "tables", "..")):
        monkeypatch.chdir(folder)
        assert perplexities(history_of(name)) == [10.0, None, None]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (COMMANDS[0][1], "dtype f16"),
        (COMMANDS[1][1], "codec nf4, rank 50%"),
        (COMMANDS[2][1], "layers 0,2, no fold"),
        ({"steps": 5, "data": "0a" * 32, "recipe": {"batch": 8}}, "steps 5, data 0a0a0a0a0a0a"),
        ({}, ""),
    ],
)
def test_options_are_told_without_the_defaults(options: dict[str, Any], text: str) -> None:
    assert options_text(options) == text


def test_history_imports_no_torch() -> None:
    code = "import sys, tolkit.history, tolkit.history_plot; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_picture(chain: list[Path]) -> None:
    pytest.importorskip("matplotlib", reason="the plots extra is not installed")
    from tolkit.history_plot import draw_history

    empty = history_of(chain[2])
    note(chain[0], 10.0)
    note(chain[2], 12.0, metrics={**METRICS, "ppl_increase": Metric(0.5, float("nan"), 9)})
    shutil.rmtree(chain[1])
    found = history_of(chain[2])
    png = draw_history(found, "png")
    assert png.startswith(b"\x89PNG") and draw_history(found, "png") == png
    assert draw_history(empty, "png") != png
    svg = draw_history(found, "svg")
    assert ET.fromstring(svg).tag.endswith("svg") and draw_history(found, "svg") == svg
    bare = {"reference_identity": None, "reference_metrics": {}}
    note(chain[0], 10.0, metrics={"ppl_token": METRICS["ppl_token"]}, **bare)
    assert draw_history(history_of(chain[0]), "svg")
