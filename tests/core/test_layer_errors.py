"""What a bundle records of its errors, against all rows decoded and added up in float64."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
from _nano import nano_checkpoint
from _pico import pico_checkpoint

from tolkit.build import build
from tolkit.bundling import BundleReport, Resources
from tolkit.compress import CompressSpec, DropSpec, compress, drop_layers
from tolkit.progress import SilentProgress
from tolkit.sources import CheckpointSource
from tolkit_formats import open_bundle
from tolkit_formats.diff import diff
from tolkit_formats.layer_errors import LayerErrors
from tolkit_formats.manifest import LayerStatus
from tolkit_formats.records import lay_out
from tolkit_formats.writer import BundleWriter

Tables = npt.NDArray[np.float64]  # [V, L, D], zeros where a layer has no plane
V, L = 96, 5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico_checkpoint(tmp_path_factory.mktemp("pico") / "ckpt", num_hidden_layers=L)


@pytest.fixture(scope="module")
def full(checkpoint: Path) -> Path:
    build(checkpoint, checkpoint.with_name("full.tol"), progress=SilentProgress())
    return checkpoint.with_name("full.tol")


@pytest.fixture(scope="module")
def coded(full: Path) -> Path:
    return squeeze(full, full.with_name("coded.tol"), codec="nf4")


def squeeze(source: Path, out: Path, **options: object) -> Path:
    compress(source, out, CompressSpec(**options), progress=SilentProgress())
    return out


def shorten(source: Path, out: Path, layers: Sequence[int], **options: object) -> Path:
    drop_layers(source, out, DropSpec(tuple(layers), **options), progress=SilentProgress())
    return out


def tables_of(path: Path) -> Tables:
    if (path / "tol.json").exists():
        bundle = open_bundle(path)
        rows = np.zeros((V, L, 32))
        rows[:, list(bundle.layer_ids)] = bundle.rows(range(V))
        return rows
    source = CheckpointSource(path)
    token_of_slot = [source.token_at(slot) for slot in range(V)]
    rows = np.zeros((V, L, 32))
    for layer in range(L):
        rows[token_of_slot, layer] = source.plane(layer)(0, V).numpy()
    return rows


def by_hand(right: Tables, path: Path, layer: int) -> tuple[float | None, float | None]:
    """Both errors of a layer, as the definition reads."""
    stored, layers = tables_of(path), open_bundle(path).manifest.layers
    own = right[:, layer].copy()
    for i, status in enumerate(layers):
        if status == LayerStatus("folded", layer):
            own += right[:, i]
    total = right[:, : layer + 1].sum(axis=1)
    off = stored[:, : layer + 1].sum(axis=1) - total
    has_error = layers[layer].status != "folded" and own.any()
    return (
        float(np.linalg.norm(stored[:, layer] - own) / np.linalg.norm(own)) if has_error else None,
        float(np.linalg.norm(off) / np.linalg.norm(total)) if total.any() else None,
    )


def assert_measured(path: Path, source: Path, layers: Sequence[int], sums: Sequence[int]) -> None:
    """Errors of `layers` and running sums at `sums` are recorded, relative to what the last step
    read, and are right."""
    right, recorded = tables_of(source), errors_of(path)
    step = len(open_bundle(path).manifest.history) - 1
    for layer in layers:
        assert recorded[layer].relative == close(by_hand(right, path, layer)[0])
        assert recorded[layer].relative_step == (None if recorded[layer].relative is None else step)
    for layer in sums:
        assert recorded[layer].running_sum == close(by_hand(right, path, layer)[1])
        assert recorded[layer].running_sum_step == step


def close(value: float | None) -> object:
    return None if value is None else pytest.approx(value, rel=2e-4, abs=2e-7)


def errors_of(path: Path) -> dict[int, LayerErrors]:
    return {errors.layer: errors for errors in open_bundle(path).manifest.encoding.errors}


ALL = range(L)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_build(checkpoint: Path, tmp_path: Path, dtype: str) -> None:
    build(checkpoint, tmp_path / "b.tol", dtype=dtype, progress=SilentProgress())
    assert_measured(tmp_path / "b.tol", checkpoint, ALL, ALL)
    if dtype == "f32":
        assert {e.relative for e in errors_of(tmp_path / "b.tol").values()} == {0}
        assert {e.running_sum for e in errors_of(tmp_path / "b.tol").values()} == {0}


@pytest.mark.parametrize(
    "options",
    [
        {"codec": "nf4"},
        {"codec": "int4", "feedback": False},
        {"codec": "int8", "rank": "25%"},
        {"bits_per_value": 6.0},
        {"codec": "nf4", "drop": (0, 2)},
        {"codec": "nf4", "drop": (3, 4)},
        {"codec": "nf4", "drop": (1, 3), "into": {1: 0, 3: 4}},
        {"codec": "nf4", "drop": (1, 4), "fold": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("start", ["checkpoint", "full", "coded"])
def test_compress(
    request: pytest.FixtureRequest, tmp_path: Path, start: str, options: dict[str, object]
) -> None:
    source: Path = request.getfixturevalue(start)
    path = squeeze(source, tmp_path / "c.tol", **options)
    assert_measured(path, source, ALL, ALL)


def test_a_folded_table_is_computed_once(checkpoint: Path, tmp_path: Path) -> None:
    """Though it counts at its own layer and at the one it is folded into."""
    read = []
    plane = CheckpointSource.plane

    def counting(source: CheckpointSource, layer: int) -> object:
        read.append(layer)
        return plane(source, layer)

    with mock.patch.object(CheckpointSource, "plane", counting):
        squeeze(checkpoint, tmp_path / "c.tol", codec="nf4", drop=(1, 4))
    assert sorted(read) == [0, 1, 2, 3, 4]


def test_a_fold_leaves_what_comes_before_it(full: Path, coded: Path, tmp_path: Path) -> None:
    path = shorten(coded, tmp_path / "d.tol", [2])
    before, after = errors_of(coded), errors_of(path)
    assert [after[i] for i in (0, 1)] == [before[i] for i in (0, 1)]
    assert before[1].running_sum_step == 1
    assert_measured(path, coded, [2, 3, 4], [2, 3, 4])
    # What was carried over is still true of the tables the earlier step read.
    assert after[1].running_sum == close(by_hand(tables_of(full), path, 1)[1])


def test_a_fold_of_raw_tables_copies_what_comes_after_it(full: Path, tmp_path: Path) -> None:
    path = shorten(full, tmp_path / "d.tol", [2])
    assert_measured(path, full, [2, 3], [2, 3, 4])
    assert errors_of(path)[4].relative == errors_of(full)[4].relative
    assert errors_of(path)[4].relative_step == 0
    again = shorten(path, tmp_path / "e.tol", [3])
    assert_measured(again, path, [3, 4], [3, 4])


@pytest.mark.parametrize("codec", ["nf4", "bands"])
def test_a_plain_drop_keeps_errors_and_counts_what_the_sum_lacks(
    full: Path, tmp_path: Path, codec: str
) -> None:
    wish = {"bits_per_value": 6.0} if codec == "bands" else {"codec": codec}
    coded = squeeze(full, tmp_path / "c.tol", **wish)
    path = shorten(coded, tmp_path / "d.tol", [1, 3], fold=False)
    before, after = errors_of(coded), errors_of(path)
    assert after[0] == before[0]
    assert_measured(path, coded, [1, 3], [1, 2, 3, 4])
    assert after[1].relative == 1
    for layer in (2, 4):
        assert (after[layer].relative, after[layer].relative_step) == (before[layer].relative, 1)
        assert after[layer].relative == close(by_hand(tables_of(full), path, layer)[0])
    assert after[4].running_sum > before[4].running_sum


def test_what_was_dropped_before_stays_as_it_was(full: Path, tmp_path: Path) -> None:
    once = shorten(full, tmp_path / "a.tol", [1], fold=False)
    twice = shorten(once, tmp_path / "b.tol", [3])
    assert errors_of(twice)[1] == errors_of(once)[1]
    assert_measured(twice, once, [3, 4], [3, 4])
    last = squeeze(twice, tmp_path / "c.tol", codec="nf4")
    assert errors_of(last)[1].relative_step == 1
    assert_measured(last, twice, [0, 2, 3, 4], ALL)


def test_a_source_that_says_nothing_leaves_gaps(full: Path, tmp_path: Path) -> None:
    with mock.patch("tolkit.bundling._layer_errors", return_value=()):
        old = squeeze(full, tmp_path / "old.tol", codec="nf4")
    assert "errors" not in open_bundle(old).manifest.encoding.to_json()
    path = shorten(old, tmp_path / "d.tol", [2], fold=False)
    assert sorted(errors_of(path)) == [2, 3, 4]
    assert errors_of(path)[4].relative is None
    assert_measured(path, old, [2], [2, 3, 4])


def test_report_manifest_and_diff_say_the_same(full: Path, tmp_path: Path) -> None:
    spec = CompressSpec(codec="nf4", drop=(1, 2))
    report = compress(full, tmp_path / "c.tol", spec, progress=SilentProgress())
    recorded = errors_of(tmp_path / "c.tol")
    found = diff(open_bundle(full), open_bundle(tmp_path / "c.tol")).layers
    for layer in ALL:
        said = (recorded[layer].relative, recorded[layer].running_sum)
        reported = report.layers[layer]
        assert said == (reported.relative_error, reported.running_sum_error)
        assert said[0] == close(found[layer].relative_error)
        assert said[1] == close(found[layer].running_sum_error)
        assert all(x is None or x == float(f"{x:.6g}") for x in said)


def test_a_zero_table_has_no_relative_error(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    checkpoint = pico_checkpoint(tmp_path / "ckpt", num_hidden_layers=3)
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.layers.0.memory_mlp.down_proj.weight"][:] = 0
    save_file(weights, checkpoint / "model.safetensors")
    squeeze(checkpoint, tmp_path / "c.tol", codec="nf4")
    assert sorted(errors_of(tmp_path / "c.tol")) == [1, 2]


class InterruptedRunError(Exception):
    """Stands for a crash."""


@pytest.mark.parametrize("finished", [1, 2])
def test_a_resumed_run_and_any_number_of_threads_say_the_same(
    tmp_path: Path, finished: int
) -> None:
    """Shards of 1,024 rows: 3 of them, the last short; figures are equal to the last bit."""
    source = nano_checkpoint(tmp_path / "ckpt", vocab_size=2500)
    opened = BundleWriter.open_shard

    def run(name: str, threads: int = 1) -> BundleReport:
        spec = CompressSpec(codec="nf4", drop=(1,))
        where = tmp_path / f"{name}.tol"
        resources = Resources(threads=threads)
        return compress(source, where, spec, resources=resources, progress=SilentProgress())

    def failing(writer: BundleWriter, tier: object, shard: int, coder: object) -> object:
        if shard == finished:
            raise InterruptedRunError
        return opened(writer, tier, shard, coder)  # type: ignore[arg-type]

    small = functools.partial(lay_out, max_shard_bytes=1)
    with (
        mock.patch("tolkit.compress.plan.lay_out", small),
        mock.patch("tolkit.bundling.rounded", lambda figure: figure),
    ):
        whole = run("whole")
        threaded = run("threaded", threads=3)
        with (
            mock.patch.object(BundleWriter, "open_shard", failing),
            pytest.raises(InterruptedRunError),
        ):
            run("resumed")
        resumed = run("resumed")
    assert resumed.resumed
    assert whole.layers == threaded.layers == resumed.layers
    assert whole.identity == threaded.identity == resumed.identity
    assert whole.layers[2].running_sum_error
