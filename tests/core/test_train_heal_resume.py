"""Training around frozen tables, interrupted, damaged or in the way of something."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from _heal import heal_folder, heal_spec, tables
from _nano import fault_hook, tree_bytes
from _training import Interrupted, Interrupting, kill_at, quiet

from tolkit.errors import BundleError, MismatchError, NonFiniteError, OutputExistsError
from tolkit.train import TrainSpec, train
from tolkit_formats.verify import verify


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return heal_folder(tmp_path_factory.mktemp("heal"))


@pytest.fixture
def spec(work: Path, tmp_path: Path) -> TrainSpec:
    return heal_spec(work, tmp_path / "healed.tol")


@pytest.mark.parametrize("after", [1, 3, 6])
def test_an_interrupted_healing_continues_to_the_same_bits(
    spec: TrainSpec, work: Path, tmp_path: Path, after: int
) -> None:
    spec = replace(spec, distill=work / "memory")
    whole = replace(spec, out=tmp_path / "whole.tol")
    first = quiet(whole)
    with pytest.raises(Interrupted):
        train(spec, Interrupting(after))
    assert not spec.out.exists()
    report = quiet(spec)
    assert report.resumed_step == (after - 1) // 2 * 2
    assert report.before == first.before
    assert tree_bytes(spec.out) == tree_bytes(whole.out)


def test_a_kill_at_any_io_call_leaves_no_output_or_the_whole(
    spec: TrainSpec, tmp_path: Path
) -> None:
    spec = replace(spec, steps=1, save_every=1)
    calls: list[str] = []
    with fault_hook(lambda operation, path: calls.append(operation)):
        quiet(replace(spec, out=tmp_path / "whole.tol"))
    expected = tree_bytes(tmp_path / "whole.tol")
    assert "link" in calls
    for call in range(1, len(calls), len(calls) // 12):
        run = replace(spec, out=tmp_path / f"{call}.tol")
        try:
            with fault_hook(kill_at(call)):
                quiet(run)
        except Interrupted:
            if not run.out.exists():
                quiet(run)
        assert tree_bytes(run.out) == expected, call


def test_without_hard_links_tables_are_copied(
    spec: TrainSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    quiet(spec)
    assert spec.init is not None and tables(spec.out) == tables(spec.init)
    assert all(f.stat().st_nlink == 1 for f in (spec.out / "tables").iterdir())


def test_tables_damaged_on_the_way_are_not_published(spec: TrainSpec, tmp_path: Path) -> None:
    assert spec.init is not None
    source = tmp_path / "source.tol"
    shutil.copytree(spec.init, source)
    (shard,) = (source / "tables").glob("records-*")

    def damage(operation: str, path: str) -> None:
        if operation == "link" and Path(path).name == shard.name:
            data = bytearray(shard.read_bytes())
            data[-3] ^= 1
            shard.write_bytes(data)

    with fault_hook(damage), pytest.raises(BundleError, match=r"does not match its digest"):
        quiet(replace(spec, init=source))
    assert not spec.out.exists()
    with pytest.raises(BundleError, match=r"source\.tol/tables/"):
        quiet(replace(spec, init=source))
    assert not spec.out.exists()


def test_the_log_of_a_tuned_checkpoint_starts_with_what_it_was(
    spec: TrainSpec, work: Path, tmp_path: Path
) -> None:
    spec = replace(spec, init=work / "memory", out=tmp_path / "tuned")
    with pytest.raises(Interrupted):
        train(spec, Interrupting(1))
    report = quiet(spec)
    log = [json.loads(line) for line in (spec.out / "train_log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == list(range(7))
    assert report.before is not None and log[0]["valid_loss"] == report.before.loss


def test_an_existing_output_stays(spec: TrainSpec) -> None:
    quiet(spec)
    before = tree_bytes(spec.out)
    with pytest.raises(OutputExistsError):
        quiet(replace(spec, seed=3))
    assert tree_bytes(spec.out) == before
    quiet(replace(spec, seed=3, force=True))
    after = tree_bytes(spec.out)
    assert after["tol.json"] != before["tol.json"] and verify(spec.out)


def test_another_teacher_or_other_frozen_parts_are_another_run(spec: TrainSpec, work: Path) -> None:
    with pytest.raises(Interrupted):
        train(spec, Interrupting(3))
    with pytest.raises(MismatchError, match="with another distill"):
        quiet(replace(spec, distill=work / "memory"))
    with pytest.raises(MismatchError, match="with another freeze_embeddings"):
        quiet(replace(spec, freeze_embeddings=True))


def test_a_loss_that_diverges_publishes_nothing(spec: TrainSpec) -> None:
    with pytest.raises(NonFiniteError, match=r"in step \d of 6"):
        quiet(replace(spec, learning_rate=1e30, warmup_steps=0))
    assert not spec.out.exists()
