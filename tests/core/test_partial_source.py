"""A partial bundle as what other commands read: compress, drop-layers, verify, train."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from _pico import PICO_VOCAB, pico_checkpoint
from _pico_partial import EVERY, QUIET, compressed, ids_by_count, planes_of

from tolkit.compress import DropSpec, drop_layers
from tolkit.counts import save_counts
from tolkit.errors import InputError, UsageError
from tolkit.model import FfnRows
from tolkit.sources import CheckpointSource, open_source
from tolkit.tables import load_runnable
from tolkit.train import TrainSpec, train
from tolkit.verify_tables import verify_tables
from tolkit_formats import open_bundle, verify


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico_checkpoint(tmp_path_factory.mktemp("m") / "ckpt", num_hidden_layers=3)


@pytest.fixture(scope="module")
def part(memory: Path) -> Path:
    compressed(memory, memory.with_name("part.tol"), "50", codec="f32")
    return memory.with_name("part.tol")


def test_every_slot_can_be_read(memory: Path, part: Path) -> None:
    source, want = open_source(part), CheckpointSource(memory)
    assert (source.num_rows, source.vocab_size) == (50, PICO_VOCAB)
    tokens = [source.token_at(slot) for slot in range(PICO_VOCAB)]
    assert tokens == ids_by_count()
    for layer in range(3):
        for span in ((0, 96), (40, 60), (49, 51), (50, 96), (0, 50)):
            assert torch.allclose(
                source.plane(layer)(*span), want.plane(layer)(*span), rtol=1e-5, atol=1e-6
            )


def test_compressing_again_keeps_the_coverage(part: Path, tmp_path: Path) -> None:
    compressed(part, tmp_path / "same.tol", None, codec="nf4")
    compressed(part, tmp_path / "fewer.tol", "20", codec="nf4")
    same, fewer = open_bundle(tmp_path / "same.tol"), open_bundle(tmp_path / "fewer.tol")
    assert (same.manifest.num_rows, fewer.manifest.num_rows) == (50, 20)
    assert fewer.has_record(ids_by_count()[:20]).all()
    assert np.array_equal(same.rows(ids_by_count()[:20]), fewer.rows(ids_by_count()[:20]))
    cold = torch.tensor(sorted(ids_by_count()[50:]))
    for a, b in zip(planes_of(part, cold), planes_of(tmp_path / "fewer.tol", cold), strict=True):
        assert a is not None and b is not None and torch.equal(a, b)
    with pytest.raises(UsageError, match=r"--keep-rows: 51 rows, .* records of 50 tokens"):
        compressed(part, tmp_path / "more.tol", "51", codec="nf4")


def test_other_counts_choose_among_the_stored(part: Path, tmp_path: Path) -> None:
    digest = open_bundle(part).manifest.sources.tokenizer
    assert digest is not None
    backwards = np.zeros(PICO_VOCAB, np.uint64)
    backwards[ids_by_count()] = np.arange(PICO_VOCAB)
    save_counts(tmp_path / "counts", backwards, digest)
    compressed(part, tmp_path / "b.tol", "10", codec="f32", weights=str(tmp_path / "counts"))
    bundle = open_bundle(tmp_path / "b.tol")
    kept = ids_by_count()[40:50]
    assert sorted(np.flatnonzero(bundle.has_record(EVERY.numpy())).tolist()) == sorted(kept)
    assert np.array_equal(bundle.rows(kept), open_bundle(part).rows(kept))


@pytest.mark.parametrize("fold", [True, False])
def test_layers_can_be_dropped_from_it(
    memory: Path, part: Path, tmp_path: Path, fold: bool
) -> None:
    """Cold rows follow: a folded layer's FFN is added to its receiver's, a dropped one's goes."""
    drop_layers(part, tmp_path / "one.tol", DropSpec((0,), fold=fold), progress=QUIET)
    drop_layers(tmp_path / "one.tol", tmp_path / "two.tol", DropSpec((1,)), progress=QUIET)
    bundle = open_bundle(tmp_path / "two.tol")
    assert verify(tmp_path / "two.tol").num_records == 50
    names = {name.split(".")[2] for name in bundle.ffn_file(1).names}
    assert names == ({"0", "1", "2"} if fold else {"1", "2"})
    with torch.no_grad():
        tables = list(FfnRows(load_runnable(memory).model).fetch(EVERY))
    want = tables[1] + tables[2]
    if fold:
        want = want + tables[0]
    got = planes_of(tmp_path / "two.tol", EVERY)
    assert got[0] is None and got[1] is None and got[2] is not None
    assert torch.allclose(got[2], want, rtol=1e-5, atol=1e-5)


def test_it_can_be_a_reference(memory: Path, part: Path, tmp_path: Path) -> None:
    compressed(memory, tmp_path / "nf4.tol", None, codec="nf4")
    by_part = verify_tables(tmp_path / "nf4.tol", part, progress=QUIET)
    by_checkpoint = verify_tables(tmp_path / "nf4.tol", memory, progress=QUIET)
    assert by_part.num_rows == by_checkpoint.num_rows == PICO_VOCAB
    for ours, theirs in zip(by_part.layers, by_checkpoint.layers, strict=True):
        assert ours.relative_error == pytest.approx(theirs.relative_error, rel=1e-4)
    assert verify_tables(part, memory, max_rows=17, progress=QUIET).num_rows < 17


def test_training_around_partial_tables_is_refused(part: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some text " * 50)
    spec = TrainSpec(
        out=tmp_path / "out.tol",
        text=(str(tmp_path / "text.txt"),),
        init=part,
        freeze_tables=True,
        steps=1,
    )
    with pytest.raises(InputError, match="only whole tables can be trained around"):
        train(spec, QUIET)


def test_partial_tables_can_teach(memory: Path, part: Path, tmp_path: Path) -> None:
    """A teacher's loss is that of the checkpoint it was made from."""
    (tmp_path / "text.txt").write_text("some text and a line more \n" * 80)
    found = []
    for i, teacher in enumerate((part, memory)):
        report = train(
            TrainSpec(
                out=tmp_path / f"out{i}",
                text=(str(tmp_path / "text.txt"),),
                init=memory,
                distill=teacher,
                distill_weight=0.5,
                steps=1,
                sequence=16,
                batch=2,
                micro_batch=2,
                dtype="float32",
            ),
            QUIET,
        )
        assert report.before is not None and report.before.kl is not None
        found.append(report.before.kl)
    assert found[0] == pytest.approx(found[1], abs=1e-5) and abs(found[0]) < 1e-4
