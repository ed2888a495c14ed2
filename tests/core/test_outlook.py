"""Plans of codec bands against what compression then writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from _nano import tree_bytes
from _pico import pico_checkpoint, pico_model, pico_tokenizer_files

from tolkit.bundling import Resources
from tolkit.compress import CompressSpec, compress
from tolkit.compress.outlook import Outlook, outlook
from tolkit.errors import UsageError
from tolkit.model import save_checkpoint
from tolkit.progress import SilentProgress
from tolkit_formats import open_bundle

SILENT = SilentProgress()
WIDE_V = 4_096


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico_checkpoint(tmp_path_factory.mktemp("plan") / "ckpt", num_hidden_layers=3)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """V 4,096 with counts of eight tiers, D 48, 4 layers."""
    path = tmp_path_factory.mktemp("wide") / "ckpt"
    model = pico_model(vocab_size=WIDE_V, hidden_size=48, num_hidden_layers=4)
    counts = (10**7 / np.arange(1, WIDE_V + 1) ** 1.1).astype(np.uint64)
    counts = np.random.default_rng(0).permutation(counts)
    save_checkpoint(model, path, pico_tokenizer_files(), counts)
    return path


def planned(source: Path, **options: object) -> Outlook:
    return outlook(source, CompressSpec(**options), resources=Resources(1), progress=SILENT)


@pytest.mark.parametrize(
    "options",
    [
        {"budget_bytes": 6_000},
        {"bits_per_value": 8.0, "weights": "none"},
        {"budget_bytes": 7_000, "drop": (1,)},
        {"budget_bytes": 9_000, "feedback": False},
    ],
    ids=["counts", "one-tier", "folded", "no-feedback"],
)
def test_a_plan_is_what_compress_then_writes(
    checkpoint: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    before = tree_bytes(checkpoint)
    plan = planned(checkpoint, **options)
    assert list(tmp_path.iterdir()) == [] and tree_bytes(checkpoint) == before
    out = tmp_path / "a.tol"
    report = compress(
        checkpoint, out, CompressSpec(**options), resources=Resources(1), progress=SILENT
    )
    assert plan.exact
    assert plan.table_bytes == report.table_bytes == open_bundle(out).table_bytes
    assert plan.bits_per_value == report.bits_per_value
    assert plan.table_bytes <= plan.budget_bytes
    for ours, theirs in zip(plan.layers, report.layers, strict=True):
        assert (ours.status, ours.into) == (theirs.status, theirs.into)
        for name in ("relative_error", "running_sum_error"):
            want = getattr(theirs, name)
            assert getattr(ours, name) == (want if want is None else pytest.approx(want, rel=1e-4))
        assert ours.shared_bytes == theirs.shared_bytes
    bundle = open_bundle(out)
    tiers = bundle.manifest.tiers
    for layer in bundle.layer_ids:
        codecs = [next(p.codec for p in tier.planes if p.layer == layer) for tier in tiers]
        bits = sum(t.num_rows * c.widths_R.sum() for t, c in zip(tiers, codecs, strict=True))
        assert plan.layers[layer].mean_bits == pytest.approx(bits / 96 / 32)
        assert plan.layers[layer].rank == (codecs[0].rank if codecs[0].basis else 0)


def test_parts_are_the_files_and_add_up(checkpoint: Path, tmp_path: Path) -> None:
    plan = planned(checkpoint, budget_bytes=9_000)
    assert sum(plan.parts.values()) == plan.table_bytes
    out = tmp_path / "a.tol"
    spec = CompressSpec(budget_bytes=9_000)
    compress(checkpoint, out, spec, resources=Resources(1), progress=SILENT)
    bundle = open_bundle(out)
    assert plan.parts["records"] == sum(t.num_rows * t.stride for t in bundle.manifest.tiers)
    assert plan.parts["slots"] == 4 * 96
    stored = [bundle.shared(layer) for layer in bundle.layer_ids]
    for part, name in (("bases", "basis"), ("predictors", "predictor")):
        size = sum(a.nbytes for arrays in stored for n, a in arrays.items() if n.startswith(name))
        assert plan.parts[part] == size


@pytest.mark.parametrize("bits_per_value", [1.5, 2.0, 3.0])
def test_a_budget_is_met_within_a_hundredth_and_never_exceeded(
    wide: Path, tmp_path: Path, bits_per_value: float
) -> None:
    budget = int(bits_per_value * WIDE_V * 4 * 48 / 8)
    spec = CompressSpec(budget_bytes=budget)
    compress(wide, tmp_path / "a.tol", spec, resources=Resources(1), progress=SILENT)
    bundle = open_bundle(tmp_path / "a.tol")
    assert 0.99 * budget <= bundle.table_bytes <= budget
    assert bundle.table_bytes == sum(
        f.stat().st_size for f in (tmp_path / "a.tol" / "tables").iterdir()
    )
    assert planned(wide, budget_bytes=budget).table_bytes == bundle.table_bytes


def test_the_floor_is_the_smallest_that_can_be_written(checkpoint: Path, tmp_path: Path) -> None:
    floor = planned(checkpoint, budget_bytes=6_000).floor_bytes
    spec = CompressSpec(budget_bytes=floor)
    report = compress(checkpoint, tmp_path / "a.tol", spec, resources=Resources(1), progress=SILENT)
    assert report.table_bytes == floor
    with pytest.raises(UsageError, match=f"take {floor:,} bytes"):
        planned(checkpoint, budget_bytes=floor - 1)


def test_sampled_blocks_tell_the_errors_of_all_rows(wide: Path, tmp_path: Path) -> None:
    budget = 2 * WIDE_V * 4 * 48 // 8
    plan = planned(wide, budget_bytes=budget)
    spec = CompressSpec(budget_bytes=budget)
    report = compress(wide, tmp_path / "a.tol", spec, resources=Resources(1), progress=SILENT)
    assert plan.encoded_rows <= WIDE_V
    for ours, theirs in zip(plan.layers, report.layers, strict=True):
        assert ours.running_sum_error == pytest.approx(theirs.running_sum_error, rel=0.1)
    assert plan.time_s > 0 and plan.memory_bytes > 48 << 20 and plan.scratch_bytes > 0
