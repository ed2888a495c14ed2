"""Rows without a record: computed again from the FFN weights a partial bundle keeps."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from _nano import refresh, reseal
from _partial import V as TINY_V
from _partial import cold_row, write_partial
from _pico import PICO_VOCAB, pico_checkpoint, pico_model
from _pico_partial import EVERY, compressed, ids_by_count, planes_of

from tolkit.cold_rows import ColdPlanes
from tolkit.errors import BundleError
from tolkit.model import FfnRows
from tolkit.runtime.decoded import DecodedRows
from tolkit.runtime.recompute import RecomputeRows
from tolkit.runtime.rows import TABLE_PLACES, open_table_rows
from tolkit.runtime.statistics import TableStatistics
from tolkit.sources import CheckpointSource
from tolkit.tables import load_runnable
from tolkit_formats import open_bundle
from tolkit_formats.digests import json_digest


@pytest.fixture(scope="module", params=["memory", "flex"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(str(request.param))
    return pico_checkpoint(folder / "ckpt", str(request.param), num_hidden_layers=3)


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico_checkpoint(tmp_path_factory.mktemp("m") / "ckpt", num_hidden_layers=3)


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
    compressed(checkpoint, tmp_path / "b.tol", "25%")
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
    compressed(memory, tmp_path / "b.tol", "32", codec="f32")
    hot = ids_by_count()[:32]
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
    compressed(checkpoint, tmp_path / "b.tol", "10%", codec="f32")
    ours, theirs = load_runnable(tmp_path / "b.tol"), load_runnable(checkpoint)
    ids = torch.randint(0, PICO_VOCAB, (2, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        got, want = ours.model(ids, rows=ours.rows), theirs.model(ids)
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)
    assert torch.equal(got.argmax(-1), want.argmax(-1))


def test_weights_of_sixteen_bits_are_widened_and_kept_within_bounds(tmp_path: Path) -> None:
    path = pico_checkpoint(tmp_path / "ckpt", dtype=torch.bfloat16)
    compressed(path, tmp_path / "b.tol", "10", codec="f32")
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
    compressed(memory, tmp_path / "b.tol", "3")
    bundle = open_bundle(tmp_path / "b.tol")
    inner = mock.Mock(statistics=TableStatistics(rows_asked=7))
    rows = RecomputeRows(inner, bundle)
    assert rows.statistics.rows_asked == 7
    rows.prefetch(EVERY)
    (ahead,) = inner.prefetch.call_args.args
    assert sorted(ahead.tolist()) == sorted(ids_by_count()[:3])
    rows.close()
    inner.close.assert_called_once_with()


@pytest.mark.parametrize("options", [{"codec": "f32"}, {"codec": "nf4"}, {"bits_per_value": 6.0}])
@pytest.mark.parametrize("tables", TABLE_PLACES)
def test_wherever_the_stored_rows_are(
    memory: Path, tmp_path: Path, tables: str, options: dict[str, object]
) -> None:
    """Greedy tokens are those of the scoring path, and for raw tables those of the FFN path."""
    compressed(memory, tmp_path / "b.tol", "20%", **options)
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
    compressed(memory, tmp_path / "b.tol", "3")
    path = tmp_path / "b.tol" / "config.json"
    config = {**json.loads(path.read_bytes()), "memory_intermediate_size": 24}
    path.write_text(json.dumps(config))
    refresh(tmp_path / "b.tol")
    reseal(tmp_path / "b.tol", lambda m: m["sources"].update(config=json_digest(config)))
    with pytest.raises(BundleError, match=r"ffn\.safetensors: tensor .* expected \[32, 24\]"):
        ColdPlanes(open_bundle(tmp_path / "b.tol"))
