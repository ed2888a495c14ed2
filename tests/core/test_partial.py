"""Partial tables: cold rows against the FFN path, and every command on them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from _partial import V as TINY_V
from _partial import cold_row, write_partial
from _pico import PICO_VOCAB, pico_checkpoint, pico_counts, pico_model

from tolkit.build import build
from tolkit.bundling import BundleReport, Resources
from tolkit.cold_rows import ColdPlanes
from tolkit.compress import CompressSpec, DropSpec, compress, drop_layers
from tolkit.compress.bands import BandsWish
from tolkit.compress.keep import parse_keep_rows
from tolkit.compress.outlook import outlook
from tolkit.counts import save_counts
from tolkit.errors import BundleError, CheckpointError, InputError, UsageError
from tolkit.model import FfnRows
from tolkit.progress import SilentProgress
from tolkit.runtime.decoded import DecodedRows
from tolkit.runtime.recompute import RecomputeRows
from tolkit.runtime.rows import TABLE_PLACES, open_table_rows
from tolkit.runtime.statistics import TableStatistics
from tolkit.sources import CheckpointSource, open_source
from tolkit.tables import load_runnable
from tolkit.verify_tables import verify_tables
from tolkit_formats import open_bundle, verify
from tolkit_formats.records import lay_out

QUIET = SilentProgress()
EVERY = torch.arange(PICO_VOCAB)


def small(source: Path, out: Path, keep: str | None, **options: object) -> BundleReport:
    spec = CompressSpec(keep_rows=keep, **options)  # type: ignore[arg-type]
    return compress(source, out, spec, resources=Resources(1), progress=QUIET)


def order() -> list[int]:
    """Token ids by falling count."""
    counts = pico_counts()
    return sorted(range(PICO_VOCAB), key=lambda i: (-int(counts[i]), i))


@pytest.fixture(scope="module", params=["memory", "flex"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(str(request.param))
    return pico_checkpoint(folder / "ckpt", str(request.param), num_hidden_layers=3)


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico_checkpoint(tmp_path_factory.mktemp("m") / "ckpt", num_hidden_layers=3)


def planes_of(path: Path, ids_n: torch.Tensor) -> list[torch.Tensor | None]:
    rows = load_runnable(path).rows
    assert rows is not None
    return list(rows.fetch(ids_n))


# Cold rows.


def test_cold_rows_are_the_ones_on_the_page(tmp_path: Path) -> None:
    tiny = write_partial(tmp_path / "b.tol")
    bundle = open_bundle(tiny.path)
    rows = RecomputeRows(DecodedRows(bundle), bundle)
    planes = rows.fetch(torch.arange(TINY_V))
    assert planes[1] is None and planes[3] is None
    stored = {int(token): row for token, row in zip(tiny.hot, tiny.rows_hKD, strict=True)}
    for token in range(TINY_V):
        got = np.array([planes[0][token].numpy(), planes[2][token].numpy()])
        if token in stored:
            assert np.array_equal(got, stored[token])
        else:
            want = cold_row(tiny, token)
            assert np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want)
    assert rows.cold_statistics.rows_asked == TINY_V
    assert rows.cold_statistics.rows_cold == TINY_V - 15
    assert rows.cold_statistics.cold_rate == (TINY_V - 15) / TINY_V


def test_cold_rows_have_the_bits_of_the_ffn_path(checkpoint: Path, tmp_path: Path) -> None:
    """Equal sets of ids, so that products have equal shapes."""
    small(checkpoint, tmp_path / "b.tol", "25%")
    bundle = open_bundle(tmp_path / "b.tol")
    cold = np.flatnonzero(~bundle.has_record(EVERY.numpy()))
    assert len(cold) == 72
    got = planes_of(tmp_path / "b.tol", torch.from_numpy(cold))
    model = load_runnable(checkpoint).model
    with torch.no_grad():
        want = FfnRows(model).fetch(torch.from_numpy(cold))
        for layer in range(3):
            assert got[layer] is not None and torch.equal(got[layer], want[layer])
    source = CheckpointSource(checkpoint)
    ids_of_slots = [source.token_at(slot) for slot in range(24, 96)]
    tables = ColdPlanes(bundle)
    for layer in range(3):
        ids = torch.tensor(ids_of_slots)
        assert torch.equal(tables.plane(layer)(ids), source.plane(layer)(24, 96))


@pytest.mark.parametrize("ids", [[], [5], [5, 7, 90]], ids=str)
def test_any_mix_of_hot_and_cold(memory: Path, tmp_path: Path, ids: list[int]) -> None:
    small(memory, tmp_path / "b.tol", "32", codec="f32")
    hot = order()[:32]
    model = load_runnable(memory).model
    for wanted in (ids, sorted({*ids, *hot[:3]}), sorted(hot[:3])):
        tensor = torch.tensor(wanted, dtype=torch.int64)
        got = planes_of(tmp_path / "b.tol", tensor)
        with torch.no_grad():
            want = FfnRows(model).fetch(tensor)
        for layer in range(3):
            plane = got[layer]
            assert plane is not None and plane.shape == (len(wanted), 32)
            assert torch.allclose(plane, want[layer], rtol=1e-5, atol=1e-6)


def test_logits_are_the_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    small(checkpoint, tmp_path / "b.tol", "10%", codec="f32")
    ours, theirs = load_runnable(tmp_path / "b.tol"), load_runnable(checkpoint)
    ids = torch.randint(0, PICO_VOCAB, (2, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        got, want = ours.model(ids, rows=ours.rows), theirs.model(ids)
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)
    assert torch.equal(got.argmax(-1), want.argmax(-1))


def test_weights_of_sixteen_bits_are_widened_and_kept_within_bounds(tmp_path: Path) -> None:
    path = pico_checkpoint(tmp_path / "ckpt", dtype=torch.bfloat16)
    small(path, tmp_path / "b.tol", "10", codec="f32")
    bundle = open_bundle(tmp_path / "b.tol")
    cold = torch.from_numpy(np.flatnonzero(~bundle.has_record(EVERY.numpy())))
    with torch.no_grad():
        want = FfnRows(pico_model(dtype=torch.bfloat16).float()).fetch(cold)
    layer_bytes = 4 * (3 * 48 * 32 + 32)
    for keep_bytes, kept in ((0, 0), (layer_bytes, 1), (1 << 20, 2)):
        planes = ColdPlanes(bundle, keep_bytes=keep_bytes)
        for layer in (0, 1, 0):
            assert torch.equal(planes.plane(layer)(cold), want[layer])
        assert len(planes._ffns) == kept
    short = ColdPlanes(bundle, dtype=torch.bfloat16, keep_bytes=0)
    with torch.no_grad():
        want = FfnRows(pico_model(dtype=torch.bfloat16)).fetch(cold)
    for layer in (0, 1):
        assert torch.equal(short.plane(layer)(cold), want[layer])
    assert len(short._ffns) == 2  # mapped, so they take nothing
    half = ColdPlanes(bundle, dtype=torch.float16).plane(0)(cold)
    assert half.dtype == torch.float16
    assert torch.equal(half, ColdPlanes(bundle).plane(0)(cold).half())
    rows = RecomputeRows(DecodedRows(bundle), bundle, dtype=torch.bfloat16).fetch(EVERY)
    assert rows[0] is not None and rows[0].dtype == torch.bfloat16


def test_reading_ahead_and_closing_reach_the_stored_rows(memory: Path, tmp_path: Path) -> None:
    small(memory, tmp_path / "b.tol", "3")
    bundle = open_bundle(tmp_path / "b.tol")
    inner = mock.Mock(statistics=TableStatistics(rows_asked=7))
    rows = RecomputeRows(inner, bundle)
    assert rows.statistics.rows_asked == 7
    rows.prefetch(EVERY)
    (ahead,) = inner.prefetch.call_args.args
    assert sorted(ahead.tolist()) == sorted(order()[:3])
    rows.close()
    inner.close.assert_called_once_with()


@pytest.mark.parametrize("options", [{"codec": "f32"}, {"codec": "nf4"}, {"bits_per_value": 6.0}])
@pytest.mark.parametrize("tables", TABLE_PLACES)
def test_wherever_the_stored_rows_are(
    memory: Path, tmp_path: Path, tables: str, options: dict[str, object]
) -> None:
    """Greedy tokens are those of the scoring path, and for raw tables those of the FFN path."""
    small(memory, tmp_path / "b.tol", "20%", **options)
    bundle = open_bundle(tmp_path / "b.tol")
    rows = open_table_rows(bundle, tables)
    rows.prefetch(EVERY)
    got, want = rows.fetch(EVERY), planes_of(tmp_path / "b.tol", EVERY)
    for a, b in zip(got, want, strict=True):
        assert a is not None and b is not None and a.shape == b.shape
        assert bool(((a - b).norm(dim=1) <= 1e-5 * b.norm(dim=1)).all())
    model = load_runnable(tmp_path / "b.tol").model
    reference = load_runnable(memory)
    ids = torch.tensor([[5, 9, 14, 40]])
    with torch.no_grad():
        for _ in range(8):
            logits = model(ids, rows=rows)[0, -1]
            assert torch.equal(
                logits.argmax(),
                model(ids, rows=load_runnable(tmp_path / "b.tol").rows)[0, -1].argmax(),
            )
            if options == {"codec": "f32"}:
                assert logits.argmax() == reference.model(ids)[0, -1].argmax()
            ids = torch.cat([ids, logits.argmax().reshape(1, 1)], dim=1)
    assert rows.statistics.rows_asked > 0
    rows.close()


def test_weights_of_another_model_shape_are_refused(memory: Path, tmp_path: Path) -> None:
    import json

    from _nano import refresh, reseal

    from tolkit_formats.digests import json_digest

    small(memory, tmp_path / "b.tol", "3")
    path = tmp_path / "b.tol" / "config.json"
    config = {**json.loads(path.read_bytes()), "memory_intermediate_size": 24}
    path.write_text(json.dumps(config))
    refresh(tmp_path / "b.tol")
    reseal(tmp_path / "b.tol", lambda m: m["sources"].update(config=json_digest(config)))
    with pytest.raises(BundleError, match=r"ffn\.safetensors: tensor .* expected \[32, 24\]"):
        ColdPlanes(open_bundle(tmp_path / "b.tol"))


# Which rows are kept.


def test_the_most_frequent_are_kept(memory: Path, tmp_path: Path) -> None:
    report = small(memory, tmp_path / "b.tol", "25%", codec="nf4")
    manifest = open_bundle(tmp_path / "b.tol").manifest
    has = open_bundle(tmp_path / "b.tol").has_record(EVERY.numpy())
    assert sorted(np.flatnonzero(has).tolist()) == sorted(order()[:24])
    counts = pico_counts()
    share = sum(int(counts[i]) for i in order()[:24]) / int(counts.sum())
    assert report.partial == manifest.partial is not None
    assert manifest.partial.covered == pytest.approx(share, rel=1e-12)
    assert manifest.history[-1].options["keep_rows"] == 24
    assert report.bits_per_value == 8 * report.table_bytes / (PICO_VOCAB * 3 * 32)
    assert verify(tmp_path / "b.tol").num_records == 24
    card = (tmp_path / "b.tol" / "README.md").read_text()
    assert f"tokens with a record: 24, {100 * share:.2f} %" in card


def test_all_rows_are_a_whole_bundle(memory: Path, tmp_path: Path) -> None:
    whole = small(memory, tmp_path / "whole.tol", None, codec="nf4")
    for keep in ("96", "100%"):
        report = small(memory, tmp_path / f"{keep}.tol", keep, codec="nf4")
        assert report.identity == whole.identity and report.partial is None


def test_hot_rows_are_those_of_the_whole_bundle(memory: Path, tmp_path: Path) -> None:
    """int8 with feedback is row by row, so a row does not depend on the others."""
    small(memory, tmp_path / "whole.tol", None, codec="int8")
    small(memory, tmp_path / "b.tol", "20", codec="int8")
    hot = order()[:20]
    whole, part = open_bundle(tmp_path / "whole.tol"), open_bundle(tmp_path / "b.tol")
    assert np.array_equal(whole.rows(hot), part.rows(hot))


def test_build_keeps_rows_too(memory: Path, tmp_path: Path) -> None:
    report = build(memory, tmp_path / "b.tol", dtype="f32", keep="25%", progress=QUIET)
    assert report.checks["rows"] == 24 and report.checks["max_abs_difference"] == 0
    built, other = open_bundle(tmp_path / "b.tol"), tmp_path / "c.tol"
    small(memory, other, "24", codec="f32")
    assert built.manifest.partial == open_bundle(other).manifest.partial
    assert built.manifest.history[-1].options == {"dtype": "f32", "keep_rows": 24}
    hot = order()[:24]
    assert np.array_equal(built.rows(hot), open_bundle(other).rows(hot))


def test_one_row_and_tokens_never_seen(memory: Path, tmp_path: Path) -> None:
    small(memory, tmp_path / "one.tol", "1")
    one = open_bundle(tmp_path / "one.tol")
    assert np.flatnonzero(one.has_record(EVERY.numpy())).tolist() == order()[:1]
    small(memory, tmp_path / "most.tol", "94")
    most = open_bundle(tmp_path / "most.tol")
    assert most.manifest.partial is not None and most.manifest.partial.covered == 1.0
    missing = np.flatnonzero(~most.has_record(EVERY.numpy()))
    assert (pico_counts()[missing] == 0).all() and len(missing) == 2


def test_counts_of_nothing_cover_nothing_known(memory: Path, tmp_path: Path) -> None:
    digest = CheckpointSource(memory).sources().tokenizer
    assert digest is not None
    save_counts(tmp_path / "zero", np.zeros(PICO_VOCAB, np.uint64), digest)
    small(memory, tmp_path / "b.tol", "5", weights=str(tmp_path / "zero"))
    bundle = open_bundle(tmp_path / "b.tol")
    assert bundle.manifest.partial is not None and bundle.manifest.partial.covered is None
    assert np.flatnonzero(bundle.has_record(EVERY.numpy())).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("text", "rows"),
    [("1", 1), ("8192", 8192), ("25%", 2048), ("0.01%", 1), ("100%", 8192), (" 33.3 % ", 2727)],
)
def test_rows_asked_for(text: str, rows: int) -> None:
    assert parse_keep_rows(text, 8192) == rows


@pytest.mark.parametrize("text", ["0", "8193", "0%", "100.1%", "-1", "1.5", "half", "", "%", "٣"])
def test_what_is_no_number_of_rows(text: str) -> None:
    with pytest.raises(UsageError, match="--keep-rows"):
        parse_keep_rows(text, 8192)


# Every way to encode.


@pytest.mark.parametrize(
    "options",
    [
        {"codec": "f16"},
        {"codec": "nf4"},
        {"codec": "nf4", "feedback": False},
        {"rank": "50%", "codec": "int8"},
        {"rank": "4", "weights": "none"},
        {"codec": "int8", "drop": (1,)},
        {"codec": "nf4", "drop": (2,), "fold": False},
        {"bits_per_value": 6.0, "bands": BandsWish(predictor_bits=3)},
        {"bits_per_value": 6.0, "bands": BandsWish("hadamard")},
        {"bits_per_value": 6.0, "coding": "entropy"},
    ],
    ids=str,
)
def test_every_encoding(memory: Path, tmp_path: Path, options: dict[str, object]) -> None:
    report = small(memory, tmp_path / "b.tol", "50%", **options)
    bundle = open_bundle(tmp_path / "b.tol")
    assert bundle.manifest.num_rows == 48 and verify(tmp_path / "b.tol").num_records == 48
    if "bits_per_value" in options:
        assert report.bits_per_value <= 6.0
    model = load_runnable(memory).model
    with torch.no_grad():
        tables = list(FfnRows(model).fetch(EVERY))
    got = planes_of(tmp_path / "b.tol", EVERY)
    has = torch.from_numpy(bundle.has_record(EVERY.numpy()))
    for layer, status in enumerate(bundle.manifest.layers):
        plane = got[layer]
        if status.status != "kept":
            assert plane is None
            continue
        want = tables[layer]
        assert want is not None and plane is not None
        if (layer, options.get("drop"), options.get("fold", True)) == (2, (1,), True):
            want = tables[1] + want
        assert torch.allclose(plane[~has], want[~has], rtol=1e-5, atol=1e-5)
        assert not torch.equal(plane[has], want[has])
    found = verify_tables(tmp_path / "b.tol", memory, progress=QUIET)
    assert found.num_rows == 48 and found.num_agreeing > 0


def test_tiers_are_those_of_the_kept_tokens(tmp_path: Path) -> None:
    path = pico_checkpoint(tmp_path / "ckpt", counts=False)
    digest = CheckpointSource(path).sources().tokenizer
    assert digest is not None
    counts = np.random.default_rng(0).permutation(np.repeat([1000, 1], [40, 56])).astype(np.uint64)
    save_counts(tmp_path / "counts", counts, digest)
    options = {"bits_per_value": 6.0, "weights": str(tmp_path / "counts")}
    small(path, tmp_path / "b.tol", "80", **options)
    tiers = open_bundle(tmp_path / "b.tol").manifest.tiers
    assert [tier.num_rows for tier in tiers] == [40, 40]


def test_plans_foretell_the_bytes(memory: Path, tmp_path: Path) -> None:
    for options in ({"codec": "nf4"}, {"rank": "50%"}):
        spec = CompressSpec(keep_rows="30", **options)  # type: ignore[arg-type]
        dry = compress(memory, tmp_path / "no.tol", spec, dry=True, progress=QUIET)
        wet = small(memory, tmp_path / f"{len(options)}{spec.codec}.tol", "30", **options)
        assert dry.table_bytes == wet.table_bytes and dry.partial == wet.partial
        assert dry.nominal_bits_per_value == pytest.approx(wet.nominal_bits_per_value)
    assert wet.nominal_bits_per_value == pytest.approx(16 * 0.5 * 30 / 96)
    plan = outlook(memory, CompressSpec(bits_per_value=6.0, keep_rows="30"), progress=QUIET)
    assert plan.exact and plan.fitted_rows == 30
    wet = small(memory, tmp_path / "bands.tol", "30", bits_per_value=6.0)
    assert plan.table_bytes == wet.table_bytes


# A partial bundle as a source.


@pytest.fixture(scope="module")
def part(memory: Path) -> Path:
    small(memory, memory.with_name("part.tol"), "50", codec="f32")
    return memory.with_name("part.tol")


def test_every_slot_can_be_read(memory: Path, part: Path) -> None:
    source, want = open_source(part), CheckpointSource(memory)
    assert (source.num_rows, source.vocab_size) == (50, PICO_VOCAB)
    tokens = [source.token_at(slot) for slot in range(PICO_VOCAB)]
    assert tokens == order()
    for layer in range(3):
        for span in ((0, 96), (40, 60), (49, 51), (50, 96), (0, 50)):
            assert torch.allclose(
                source.plane(layer)(*span), want.plane(layer)(*span), rtol=1e-5, atol=1e-6
            )


def test_compressing_again_keeps_the_coverage(part: Path, tmp_path: Path) -> None:
    small(part, tmp_path / "same.tol", None, codec="nf4")
    small(part, tmp_path / "fewer.tol", "20", codec="nf4")
    same, fewer = open_bundle(tmp_path / "same.tol"), open_bundle(tmp_path / "fewer.tol")
    assert (same.manifest.num_rows, fewer.manifest.num_rows) == (50, 20)
    assert fewer.has_record(order()[:20]).all()
    assert np.array_equal(same.rows(order()[:20]), fewer.rows(order()[:20]))
    cold = torch.tensor(sorted(order()[50:]))
    for a, b in zip(planes_of(part, cold), planes_of(tmp_path / "fewer.tol", cold), strict=True):
        assert a is not None and b is not None and torch.equal(a, b)
    with pytest.raises(UsageError, match=r"--keep-rows: 51 rows, .* records of 50 tokens"):
        small(part, tmp_path / "more.tol", "51", codec="nf4")


def test_other_counts_choose_among_the_stored(part: Path, tmp_path: Path) -> None:
    digest = open_bundle(part).manifest.sources.tokenizer
    assert digest is not None
    backwards = np.zeros(PICO_VOCAB, np.uint64)
    backwards[order()] = np.arange(PICO_VOCAB)
    save_counts(tmp_path / "counts", backwards, digest)
    small(part, tmp_path / "b.tol", "10", codec="f32", weights=str(tmp_path / "counts"))
    bundle = open_bundle(tmp_path / "b.tol")
    kept = order()[40:50]
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
    small(memory, tmp_path / "nf4.tol", None, codec="nf4")
    by_part = verify_tables(tmp_path / "nf4.tol", part, progress=QUIET)
    by_checkpoint = verify_tables(tmp_path / "nf4.tol", memory, progress=QUIET)
    assert by_part.num_rows == by_checkpoint.num_rows == PICO_VOCAB
    for ours, theirs in zip(by_part.layers, by_checkpoint.layers, strict=True):
        assert ours.relative_error == pytest.approx(theirs.relative_error, rel=1e-4)
    assert verify_tables(part, memory, max_rows=17, progress=QUIET).num_rows < 17


# What is refused, and what survives.


def test_counts_must_be_known(tmp_path: Path) -> None:
    path = pico_checkpoint(tmp_path / "ckpt", counts=False)
    with pytest.raises(UsageError, match="not known") as caught:
        small(path, tmp_path / "b.tol", "10")
    assert "tol count" in caught.value.hint and "--weights" in caught.value.hint
    small(path, tmp_path / "whole.tol", "100%")
    assert not (tmp_path / "b.tol").exists()


def test_whole_bundles_have_no_weights_for_the_others(memory: Path, tmp_path: Path) -> None:
    small(memory, tmp_path / "whole.tol", None, codec="nf4")
    with pytest.raises(UsageError, match="keeps no FFN weights") as caught:
        small(tmp_path / "whole.tol", tmp_path / "b.tol", "10", codec="nf4")
    assert "checkpoint" in caught.value.hint
    small(tmp_path / "whole.tol", tmp_path / "all.tol", "96", codec="nf4")


def test_dense_models_have_no_tables(tmp_path: Path) -> None:
    path = pico_checkpoint(tmp_path / "ckpt", "dense")
    with pytest.raises(CheckpointError, match="dense"):
        small(path, tmp_path / "b.tol", "10")


def test_training_around_partial_tables_is_refused(part: Path, tmp_path: Path) -> None:
    from tolkit.train import TrainSpec, train

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
    from tolkit.train import TrainSpec, train

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


@pytest.fixture
def small_shards() -> Iterator[None]:
    with mock.patch("tolkit.compress.plan.lay_out", partial(lay_out, max_shard_bytes=1)):
        yield


@pytest.mark.parametrize("options", [{"codec": "nf4"}, {"rank": "50%"}], ids=str)
def test_an_interrupted_run_goes_on(
    tmp_path: Path, small_shards: None, options: dict[str, object]
) -> None:
    vocab_size = 4000
    path = pico_checkpoint(tmp_path / "ckpt", counts=False, vocab_size=vocab_size)
    digest = CheckpointSource(path).sources().tokenizer
    assert digest is not None
    counts = np.random.default_rng(1).permutation(vocab_size).astype(np.uint64)
    save_counts(tmp_path / "counts", counts, digest)
    options = {**options, "weights": str(tmp_path / "counts")}
    want = small(path, tmp_path / "want.tol", "2500", **options)
    from tolkit_formats.writer import ShardWriter

    written = 0
    write = ShardWriter.write

    def stop_in_the_third(self: ShardWriter, records: np.ndarray) -> None:
        nonlocal written
        written += len(records)
        if written > 2100:
            raise KeyboardInterrupt
        write(self, records)

    with mock.patch.object(ShardWriter, "write", stop_in_the_third):
        with pytest.raises(KeyboardInterrupt):
            small(path, tmp_path / "b.tol", "2500", **options)
    report = small(path, tmp_path / "b.tol", "2500", **options)
    assert report.resumed and report.identity == want.identity
    other = small(path, tmp_path / "c.tol", "2400", **options)
    assert other.identity != want.identity and not other.resumed
