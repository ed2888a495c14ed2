"""Plans of entropy-coded sizes against what compression then writes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _nano import tree_bytes
from _pico import pico_model, pico_tokenizer_files

from tolkit.bundling import BundleReport, Resources
from tolkit.compress import CompressSpec, compress, foresee
from tolkit.compress.encode import WORK_ROWS
from tolkit.compress.fill import bands as fit_bands
from tolkit.compress.fill import encode_steps
from tolkit.compress.fill import steps as fit_steps
from tolkit.compress.outlook import Outlook, outlook
from tolkit.compress.spec import BandsWish
from tolkit.errors import UsageError
from tolkit.model import save_checkpoint
from tolkit.progress import SilentProgress
from tolkit_formats import open_bundle

SILENT = SilentProgress()
V, L, D = 300, 3, 32
WIDE_V, WIDE_L, WIDE_D = 4_096, 3, 32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of three tiers: tokens often, sometimes and never seen."""
    path = tmp_path_factory.mktemp("plan") / "ckpt"
    counts_V = np.random.default_rng(0).permutation(np.repeat([10**6, 10**3, 0], V // 3))
    model = pico_model(num_hidden_layers=L, vocab_size=V)
    save_checkpoint(model, path, pico_tokenizer_files(), counts_V.astype(np.uint64))
    return path


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With counts of eight tiers."""
    path = tmp_path_factory.mktemp("wide") / "ckpt"
    model = pico_model(vocab_size=WIDE_V, hidden_size=WIDE_D, num_hidden_layers=WIDE_L)
    counts = (10**7 / np.arange(1, WIDE_V + 1) ** 1.1).astype(np.uint64)
    counts = np.random.default_rng(0).permutation(counts)
    save_checkpoint(model, path, pico_tokenizer_files(), counts)
    return path


def asked(options: dict[str, Any]) -> CompressSpec:
    return CompressSpec(**{"coding": "entropy", **options})


def planned(source: Path, **options: Any) -> Outlook:
    return outlook(source, asked(options), resources=Resources(1), progress=SILENT)


def written(source: Path, out: Path, **options: Any) -> BundleReport:
    return compress(source, out, asked(options), resources=Resources(1), progress=SILENT)


def bytes_under_tables(bundle: Path) -> int:
    return sum(file.stat().st_size for file in (bundle / "tables").iterdir())


@pytest.mark.parametrize(
    "options",
    [
        {"bits_per_value": 5.0},
        {"bits_per_value": 2.5},
        {"bits_per_value": 10.0, "weights": "none"},
        {"bits_per_value": 5.0, "drop": (1,)},
        {"bits_per_value": 5.0, "feedback": False},
        {"bits_per_value": 5.0, "bands": BandsWish("hadamard", 0)},
        {"bits_per_value": 4.0, "keep_rows": "50%"},
    ],
    ids=["counts", "small", "two-symbols", "folded", "no-feedback", "hadamard", "partial"],
)
def test_a_plan_is_what_compress_then_writes(
    checkpoint: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    before = tree_bytes(checkpoint)
    plan = planned(checkpoint, **options)
    assert list(tmp_path.iterdir()) == [] and tree_bytes(checkpoint) == before
    report = written(checkpoint, tmp_path / "a.tol", **options)
    assert plan.exact
    assert plan.table_bytes == report.table_bytes == bytes_under_tables(tmp_path / "a.tol")
    assert plan.bits_per_value == report.bits_per_value <= options["bits_per_value"]
    for ours, theirs in zip(plan.layers, report.layers, strict=True):
        assert (ours.status, ours.into) == (theirs.status, theirs.into)
        assert ours.shared_bytes == theirs.shared_bytes
        for name in ("relative_error", "running_sum_error"):
            want = getattr(theirs, name)
            assert getattr(ours, name) == (want if want is None else pytest.approx(want, rel=1e-5))
        assert ours.mean_bits == pytest.approx(8 * theirs.bytes_per_token / D)


def test_all_blocks_of_all_tiers_are_coded(wide: Path, tmp_path: Path) -> None:
    plan = planned(wide, bits_per_value=3.0)
    assert plan.encoded_rows == plan.fitted_rows == WIDE_V
    report = written(wide, tmp_path / "a.tol", bits_per_value=3.0)
    tiers = open_bundle(tmp_path / "a.tol").manifest.tiers
    assert max(tier.num_rows for tier in tiers) > 2 * WORK_ROWS
    assert plan.table_bytes == report.table_bytes <= plan.budget_bytes
    assert plan.layers[-1].running_sum_error == pytest.approx(
        report.layers[-1].running_sum_error, rel=1e-5
    )


def test_parts_are_the_files_and_add_up(checkpoint: Path, tmp_path: Path) -> None:
    plan = planned(checkpoint, bits_per_value=8.0, bands=BandsWish("klt", 3))
    assert sum(plan.parts.values()) == plan.table_bytes
    written(checkpoint, tmp_path / "a.tol", bits_per_value=8.0, bands=BandsWish("klt", 3))
    bundle = open_bundle(tmp_path / "a.tol")
    records = sorted((tmp_path / "a.tol" / "tables").glob("records-*"))
    headers = [8 + int.from_bytes(file.read_bytes()[:8], "little") for file in records]
    assert plan.parts["records"] == sum(file.stat().st_size for file in records) - sum(headers)
    assert plan.parts["slots"] == 4 * V
    stored = [bundle.shared(layer) for layer in bundle.layer_ids]
    for part, name in (("bases", "basis"), ("predictors", "predictor")):
        size = sum(a.nbytes for arrays in stored for n, a in arrays.items() if n == name)
        scales = [arrays[f"{name}_scales"].nbytes for arrays in stored]
        assert plan.parts[part] == size + sum(scales) > 0


def test_attempts_that_come_out_larger_are_planned_too(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit_steps, "_LANE_BYTES", -1.0)  # foretells too little
    tried = []
    real = foresee.encode_sample
    monkeypatch.setattr(
        foresee, "encode_sample", lambda *args, **more: tried.append(1) or real(*args, **more)
    )
    plan = planned(checkpoint, bits_per_value=5.0)
    assert len(tried) > 1 and plan.table_bytes <= plan.budget_bytes
    report = written(checkpoint, tmp_path / "a.tol", bits_per_value=5.0)
    assert plan.table_bytes == report.table_bytes


def test_a_size_that_no_attempt_meets_is_refused_by_both(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit_steps, "_LANE_BYTES", -1.0)
    monkeypatch.setattr(encode_steps, "_ATTEMPTS", 1)
    for run in (planned, lambda source, **options: written(source, tmp_path / "a.tol", **options)):
        for _ in range(2):  # what the first run left behind does not help the second
            with pytest.raises(UsageError, match="could not be met in 1 attempts"):
                run(checkpoint, bits_per_value=5.0)


def test_the_floor_is_the_smallest_that_can_be_written(checkpoint: Path, tmp_path: Path) -> None:
    floor = planned(checkpoint, bits_per_value=5.0).floor_bytes
    plan = planned(checkpoint, budget_bytes=floor)
    assert plan.table_bytes == floor
    assert [layer.rank for layer in plan.layers] == [0] * L
    report = written(checkpoint, tmp_path / "a.tol", budget_bytes=floor)
    assert report.table_bytes == floor
    for run in (planned, lambda source, **options: written(source, tmp_path / "b.tol", **options)):
        with pytest.raises(UsageError, match=f"take {floor:,} bytes"):
            run(checkpoint, budget_bytes=floor - 1)
    assert not (tmp_path / "b.tol").exists()


def test_a_floor_with_predictions_that_are_asked_for(checkpoint: Path) -> None:
    options = {"bands": BandsWish("klt", 3)}
    floor = planned(checkpoint, bits_per_value=8.0, **options).floor_bytes
    assert floor - planned(checkpoint, bits_per_value=8.0).floor_bytes > L * 3 * D * D / 8
    assert planned(checkpoint, budget_bytes=floor, **options).table_bytes == floor


def test_a_dry_run_is_the_same_plan(checkpoint: Path, tmp_path: Path) -> None:
    spec = asked({"bits_per_value": 3.0})
    out = tmp_path / "a.tol"
    dry = compress(checkpoint, out, spec, resources=Resources(1), dry=True, progress=SILENT)
    assert dry.table_bytes == planned(checkpoint, bits_per_value=3.0).table_bytes
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("coding", "within"), [("fixed", 0.005), ("entropy", 0.01)])
@pytest.mark.parametrize("bits_per_value", [2.0, 4.0])
def test_a_sample_tells_the_size_within_what_it_says(
    wide: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bits_per_value: float,
    coding: str,
    within: float,
) -> None:
    """Of eight rows a dimension, which is what 16,384 rows are of D 2,048."""
    monkeypatch.setattr(fit_bands, "_SAMPLED_ROWS", 8 * WIDE_D)
    options = {"bits_per_value": bits_per_value, "coding": coding}
    plan = planned(wide, **options)
    assert plan.within == within and plan.fitted_rows == 8 * WIDE_D
    report = written(wide, tmp_path / "a.tol", **options)
    assert plan.table_bytes == pytest.approx(report.table_bytes, rel=plan.within)
    assert max(plan.table_bytes, report.table_bytes) <= plan.budget_bytes
    assert sum(plan.parts.values()) == plan.table_bytes
    for ours, theirs in zip(plan.layers, report.layers, strict=True):
        assert ours.running_sum_error == pytest.approx(theirs.running_sum_error, rel=0.12)
        assert ours.relative_error == pytest.approx(theirs.relative_error, rel=0.12)


def test_time_is_scaled_from_the_rows_looked_at(
    wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that moves one second a look; fits and encodings take one each."""
    ticks = itertools.count()
    monkeypatch.setattr(foresee.time, "perf_counter", lambda: float(next(ticks)))
    monkeypatch.setattr(fit_bands, "_SAMPLED_ROWS", 1024)
    walks, attempts = [], []
    real_walk, real_fit = fit_steps.walk_layers, fit_steps.StepsFitter.fit
    monkeypatch.setattr(fit_steps, "walk_layers", lambda *args: walks.append(1) or real_walk(*args))

    def fit(self: fit_steps.StepsFitter, target: int, **more: Any) -> fit_steps.FilledSteps:
        walks.clear()
        filled = real_fit(self, target, **more)
        attempts.append(1 / len(walks))
        return filled

    monkeypatch.setattr(fit_steps.StepsFitter, "fit", fit)
    plan = planned(wide, bits_per_value=3.0)
    passes = sum(1 + share * WIDE_V / 1024 for share in attempts)
    encoding = len(attempts) * WIDE_V / plan.encoded_rows
    assert plan.time_s == pytest.approx(1 + passes + encoding)
    assert plan.memory_bytes > 48 << 20 and plan.scratch_bytes > 3 * 2 * WIDE_V * WIDE_D
