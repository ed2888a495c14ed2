"""Codec steps from checkpoint to rows: rounding by hand, budgets met, the same bits again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _coded import stranger_symbols
from _pico import pico_model, pico_tokenizer_files

from tolkit.bundling import BundleReport, Resources
from tolkit.compress import (
    CompressSpec,
    DropSpec,
    compress,
    drop_layers,
)
from tolkit.compress.codecs import encoder_for
from tolkit.compress.codecs.steps import StepTables, quantised_steps
from tolkit.compress.fill import bands as fit_bands
from tolkit.compress.fill import encode_steps
from tolkit.compress.fill import steps as fit_steps
from tolkit.compress.plan import plan_compress
from tolkit.errors import BundleError, UsageError
from tolkit.model import save_checkpoint
from tolkit.progress import SilentProgress
from tolkit.sources import open_source
from tolkit_formats import open_bundle, verify
from tolkit_formats.codecs import Steps
from tolkit_formats.codecs.steps import levels
from tolkit_formats.writer import CodedShardWriter

SILENT = SilentProgress()
V, L, D = 300, 3, 32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of three tiers: tokens often, sometimes and never seen."""
    path = tmp_path_factory.mktemp("steps") / "ckpt"
    counts_V = np.random.default_rng(0).permutation(np.repeat([10**6, 10**3, 0], V // 3))
    model = pico_model(num_hidden_layers=L, vocab_size=V)
    save_checkpoint(model, path, pico_tokenizer_files(), counts_V.astype(np.uint64))
    return path


@pytest.fixture(scope="module")
def coded(checkpoint: Path) -> Path:
    path = checkpoint.with_name("coded.tol")
    run(checkpoint, path)
    return path


def run(source: Path, out: Path, threads: int = 1, **options: Any) -> BundleReport:
    spec = {"bits_per_value": 5.0, "coding": "entropy", **options}
    resources = Resources(threads=threads)
    return compress(source, out, CompressSpec(**spec), resources=resources, progress=SILENT)


def rows_of(path: Path) -> np.ndarray:
    verify(path)
    return open_bundle(path).rows(np.arange(V))


TABLES = StepTables(
    torch.tensor([0.6, 0.75, 0.5]),
    torch.tensor([0.1, 0.2, 0.0]),
    torch.tensor([0.0, 2.0, 127.0]),
    torch.tensor([[0.0, 0.0, 0.0], [0.1, 0.05, 0.025], [-0.1, 0.25, 0.125]]),
)


NO_FINE = torch.zeros(3, dtype=torch.int64)


def quantised_by_hand(unit: float, group: int) -> tuple[int, float]:
    distance, largest = abs(unit), int(TABLES.largest_K[group])
    shift, zero = float(TABLES.shift_K[group]), float(TABLES.zero_K[group])
    if distance < zero or largest == 0:
        return 0, 0.0
    magnitude = min(max(math.floor(distance + 0.5 - shift), 1), largest)
    level = magnitude - float(TABLES.offsets_K3[group, min(magnitude, 3) - 1])
    return (2 * magnitude - 1, level) if unit > 0 else (2 * magnitude, -level)


def test_rounding_is_the_obvious_one_and_readers_see_its_levels() -> None:
    units = torch.cat([torch.linspace(-4, 4, 401), torch.tensor([0.0, 126.4, 200.0, -1e9])])
    units_NC = units[:, None].repeat(1, 3)
    symbols_NC, values_NC = quantised_steps(units_NC, torch.arange(3), NO_FINE, TABLES)
    for row, unit in enumerate(units.tolist()):
        for group in range(3):
            symbol, level = quantised_by_hand(unit, group)
            assert int(symbols_NC[row, group]) == symbol
            assert float(values_NC[row, group]) == pytest.approx(level, abs=1e-5)
    table_KS = levels(TABLES.offsets_K3.numpy(), 255)
    for group in range(3):
        read = table_KS[group, symbols_NC[:, group].numpy()]
        assert np.array_equal(read, values_NC[:, group].numpy())  # bit for bit


def test_a_wide_coefficient_is_a_multiple_and_the_rest() -> None:
    """Beyond the 127 magnitudes of one symbol, to the same half step; readers see the levels."""
    units = torch.cat([torch.linspace(-900, 900, 3601), torch.tensor([1e6, -1e6])])
    units_NC = torch.stack([units / 300, units], dim=1)
    classes_P, fine_C = torch.tensor([1, 2, 2]), torch.tensor([0, 3])
    symbols_NP, values_NC = quantised_steps(units_NC, classes_P, fine_C, TABLES)
    assert symbols_NP.shape == (len(units), 3)
    for row, unit in enumerate(units.tolist()[:-2]):
        whole = math.copysign(math.floor(abs(unit) / 8 + 0.5), unit)
        second, level = quantised_by_hand(unit - 8 * whole, 2)
        first = int(2 * abs(whole) - (whole > 0))
        assert symbols_NP[row, 1:].tolist() == [first, second]
        assert float(values_NC[row, 1]) == pytest.approx(8 * whole + level, abs=1e-4)
        assert abs(unit - float(values_NC[row, 1])) <= 0.5 + 0.25  # and the largest offset
    assert values_NC[-2:, 1].tolist() == [127 * 8 + 126.875, -127 * 8 - 126.875]
    codec = Steps(4, 0, 1, 2, ((4, 8),), fine=((1, 0), (1, 3)))
    assert codec.segments() == (0, 3)
    assert Steps.from_json(codec.to_json(), 4) == codec
    arrays = {
        "mean": np.zeros(4, np.float16),
        "steps": np.ones(1, np.float32),
        "classes.0": classes_P.numpy().astype(np.uint8),
        "symbols": np.array([1, 5, 255], np.uint8),
        "offsets": TABLES.offsets_K3.numpy(),
        "basis": np.zeros(16, np.uint8),
        "basis_scales": np.zeros(4, np.float16),
    }
    read_NC = codec.coefficients(symbols_NP.numpy(), codec.prepared(arrays))
    assert np.array_equal(read_NC, values_NC.numpy())


@pytest.mark.parametrize("fine", ["3x1", "1x8", "1x-1", "x"])
def test_fine_bits_no_encoder_writes_are_refused(fine: str) -> None:
    params = Steps(4, 0, 1, 2, ((4, 8),)).to_json() | {"fine": fine}
    with pytest.raises(BundleError, match="codec steps, fine"):
        Steps.from_json(params, 4)


def test_coefficients_of_any_width_are_coded_to_the_step(checkpoint: Path, tmp_path: Path) -> None:
    """At 10 bits a value the rarest tier's steps are fine too: nothing is cut off."""
    run(checkpoint, tmp_path / "b.tol", bits_per_value=10.0, weights="none")
    bundle = open_bundle(tmp_path / "b.tol")
    codec = bundle.plane_codec(0)
    assert isinstance(codec, Steps) and codec.num_symbols > codec.count
    source = open_source(checkpoint)
    order = np.argsort(source.slot_of_token_V)
    want = np.stack([source.plane(i)(0, V).numpy() for i in range(L)], axis=1).sum(axis=1)
    got = rows_of(tmp_path / "b.tol")[order].sum(axis=1)
    assert np.linalg.norm(got - want, axis=1).max() < 0.02 * np.linalg.norm(want, axis=1).mean()


@pytest.mark.parametrize("hadamard", [False, True])
def test_what_the_encoder_passes_on_is_what_a_reader_decodes(hadamard: bool) -> None:
    rng = np.random.default_rng(1)
    codec = Steps(D, 0, 1, 5, () if hadamard else ((6, 8),), 2)
    arrays: dict[str, np.ndarray] = {
        "mean": rng.standard_normal(D).astype(np.float16),
        "steps": np.array([0.4], np.float32),
        "classes.0": np.array([2, 1, 0, 2, 1], np.uint8),
        "symbols": np.array([1, 5, 255], np.uint8),
        "offsets": TABLES.offsets_K3.numpy().astype(np.float16),
    }
    tables = StepTables(
        TABLES.zero_K,
        TABLES.shift_K,
        TABLES.largest_K,
        torch.from_numpy(arrays["offsets"].astype(np.float32)),
    )
    shared = {
        "mean": torch.from_numpy(arrays["mean"].astype(np.float32)),
        "steps": torch.from_numpy(arrays["steps"]),
        "classes.0": torch.from_numpy(arrays["classes.0"].astype(np.int64)),
        **tables.to_shared(),
    }
    if not hadamard:
        arrays["basis"] = rng.integers(0, 255, 6 * D).astype(np.uint8)
        arrays["basis_scales"] = rng.uniform(0.01, 0.1, 6).astype(np.float16)
        shared["basis"] = torch.from_numpy(codec.basis_rows(arrays))
        shared["analysis"] = torch.linalg.pinv(shared["basis"])
    target_ND = 10 * torch.from_numpy(rng.standard_normal((50, D)).astype(np.float32))
    symbols_NC, decoded_ND = encoder_for(codec).encode(target_ND, shared)
    assert symbols_NC.dtype == torch.uint8 and symbols_NC.shape == (50, 5)
    assert not symbols_NC[:, 2].any() and symbols_NC[:, 0].any()
    got_ND = codec.decode(symbols_NC.numpy(), arrays)
    norms_N1 = decoded_ND.norm(dim=1, keepdim=True).numpy()
    assert (np.abs(got_ND - decoded_ND.numpy()) <= 1e-6 * norms_N1).all()
    assert np.array_equal(got_ND, codec.decode(symbols_NC.numpy(), codec.prepared(arrays)))


@pytest.mark.parametrize("bits_per_value", [2.5, 3.5, 5.0])
def test_the_budget_is_met_from_below(
    checkpoint: Path, tmp_path: Path, bits_per_value: float
) -> None:
    report = run(checkpoint, tmp_path / "b.tol", bits_per_value=bits_per_value)
    files = (tmp_path / "b.tol" / "tables").iterdir()
    assert report.table_bytes == sum(file.stat().st_size for file in files)
    # 64 bytes are what the headers of these few files round up to.
    budget = bits_per_value * V * L * D / 8
    assert 0.97 * budget - 64 <= report.table_bytes <= budget


def test_an_attempt_that_comes_out_larger_is_made_again(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit_steps, "_LANE_BYTES", -1.0)  # foretells too little
    encoded = []
    real = encode_steps.encode_rows
    monkeypatch.setattr(encode_steps, "encode_rows", lambda *args: encoded.append(1) or real(*args))
    report = run(checkpoint, tmp_path / "b.tol")
    assert len(encoded) > 1
    assert report.bits_per_value <= 5.0
    verify(tmp_path / "b.tol")


def test_an_attempt_that_leaves_too_much_is_made_once_more(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {}
    for name, overhead in (("as it is", fit_steps._LANE_BYTES), ("too much", 8.0)):
        monkeypatch.setattr(fit_steps, "_LANE_BYTES", overhead)  # foretells 8 bytes a record
        sizes[name] = run(checkpoint, tmp_path / f"{name}.tol", bits_per_value=8.0).table_bytes
    budget = 8.0 * V * L * D / 8
    assert sizes["too much"] <= budget
    # Without the second attempt 7 of 96 bytes a record were left over.
    assert sizes["too much"] > sizes["as it is"] - 0.03 * budget


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
def test_models_of_a_sample_are_fitted_again_to_all_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    """Through spills in f16, for tables of any magnitude."""
    model = pico_model(num_hidden_layers=L, vocab_size=V)
    with torch.no_grad():
        for block in model.model.layers:
            block.memory_mlp.down_proj.weight *= factor
    save_checkpoint(model, tmp_path / "ckpt", pico_tokenizer_files(), None)
    source = open_source(tmp_path / "ckpt")
    want = np.stack([source.plane(layer)(0, V).numpy() for layer in range(L)], axis=1).sum(axis=1)
    lost = {}
    for sampled in (V, 100):
        monkeypatch.setattr(fit_bands, "_SAMPLED_ROWS", sampled)
        run(tmp_path / "ckpt", tmp_path / f"{sampled}.tol")
        got = rows_of(tmp_path / f"{sampled}.tol").sum(axis=1)
        lost[sampled] = float(np.linalg.norm(got - want) / np.linalg.norm(want))
    assert lost[100] == pytest.approx(lost[V], rel=0.15) and lost[V] < 0.25


def test_below_the_floor_is_refused_with_the_floor(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"are below the floor.* take [0-9,]+ bytes") as caught:
        run(checkpoint, tmp_path / "b.tol", bits_per_value=0.5)
    floor = int(caught.value.hint.split()[3].replace(",", ""))
    report = run(checkpoint, tmp_path / "b.tol", bits_per_value=None, budget_bytes=floor)
    assert report.table_bytes <= floor


def test_records_are_what_a_stranger_decodes(coded: Path) -> None:
    bundle = open_bundle(coded)
    assert len(bundle.manifest.tiers) > 1
    for tier, symbols in zip(bundle.manifest.tiers, stranger_symbols(coded), strict=True):
        got = bundle.shards.unchecked_run(tier, 0, tier.num_rows)
        assert got.tolist() == symbols


def test_more_bits_lose_less_and_fixed_widths_lose_more(checkpoint: Path, tmp_path: Path) -> None:
    run(checkpoint, tmp_path / "three.tol", bits_per_value=3.0, weights="none")
    run(checkpoint, tmp_path / "five.tol", weights="none")
    run(checkpoint, tmp_path / "fixed.tol", coding="fixed", weights="none")
    source = open_source(checkpoint)
    planes = [source.plane(layer)(0, V).numpy() for layer in range(L)]
    order = np.argsort(source.slot_of_token_V)
    want = np.stack(planes, axis=1).sum(axis=1)
    lost = {}
    for name in ("three", "five", "fixed"):
        got = rows_of(tmp_path / f"{name}.tol")[order].sum(axis=1)
        lost[name] = float(np.linalg.norm(got - want))
    assert lost["five"] < 0.7 * lost["three"], lost
    assert lost["five"] < 0.8 * lost["fixed"], lost


@pytest.mark.parametrize(
    "options",
    [
        {"weights": "none"},
        {"feedback": False},
        {"drop": (1,)},
        {"hadamard": True},
    ],
    ids=["no counts, one tier", "no feedback", "a folded layer", "hadamard"],
)
def test_variants_are_whole_bundles(
    checkpoint: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    from tolkit.compress.spec import BandsWish

    options = dict(options)
    if options.pop("hadamard", False):
        options["bands"] = BandsWish("hadamard")
    report = run(checkpoint, tmp_path / "b.tol", **options)
    assert np.isfinite(rows_of(tmp_path / "b.tol")).all()
    assert report.layers[0].bytes_per_token > 1 and report.nominal_bits_per_value > 0.5


def test_a_layer_of_zeros_costs_nothing(tmp_path: Path) -> None:
    model = pico_model(num_hidden_layers=2, vocab_size=V)
    with torch.no_grad():
        model.model.layers[0].memory_mlp.down_proj.weight.zero_()
    save_checkpoint(model, tmp_path / "ckpt", pico_tokenizer_files(), None)
    run(tmp_path / "ckpt", tmp_path / "b.tol")
    assert not rows_of(tmp_path / "b.tol")[:, 0].any()
    assert open_bundle(tmp_path / "b.tol").plane_codec(0).segments() == (0, 0)


def test_same_bits_at_one_and_two_threads(checkpoint: Path, coded: Path, tmp_path: Path) -> None:
    report = run(checkpoint, tmp_path / "b.tol", threads=2)
    assert report.identity == open_bundle(coded).identity


def test_an_interrupted_run_is_continued(
    checkpoint: Path, coded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = CodedShardWriter.write
    written = []

    def write(self: CodedShardWriter, symbols_NC: np.ndarray) -> None:
        written.append(self._tier.index)
        if len(written) == 2:
            raise KeyboardInterrupt
        real(self, symbols_NC)

    monkeypatch.setattr(CodedShardWriter, "write", write)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, tmp_path / "b.tol")
    report = run(checkpoint, tmp_path / "b.tol")
    assert report.resumed and report.identity == open_bundle(coded).identity
    assert written[:3] == [0, 1, 1]  # the first shard was kept


def test_a_plane_read_alone_is_the_readers(coded: Path) -> None:
    source, rows = open_source(coded), rows_of(coded)
    order = np.argsort(source.slot_of_token_V)
    for layer in range(L):
        got = source.plane(layer)(7, 80).numpy()
        want = rows[order[7:80], layer]
        norms = np.linalg.norm(want, axis=1, keepdims=True)
        assert (np.abs(got - want) <= 2e-6 * norms).all()


def test_a_coded_bundle_can_be_compressed_again(coded: Path, tmp_path: Path) -> None:
    spec = CompressSpec(codec="f32")
    compress(coded, tmp_path / "b.tol", spec, progress=SILENT)
    got, want = rows_of(tmp_path / "b.tol"), rows_of(coded)
    assert np.abs(got - want).max() <= 2e-6 * np.abs(want).max()
    run(coded, tmp_path / "again.tol", bits_per_value=3.0)
    rows_of(tmp_path / "again.tol")


def test_plain_drop_codes_what_stays_again(coded: Path, tmp_path: Path) -> None:
    drop_layers(coded, tmp_path / "b.tol", DropSpec((1,), fold=False), progress=SILENT)
    assert np.array_equal(rows_of(tmp_path / "b.tol"), rows_of(coded)[:, [0, 2]])
    assert open_bundle(tmp_path / "b.tol").table_bytes < open_bundle(coded).table_bytes


def test_folding_into_a_coded_layer_is_refused(coded: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is stored as steps"):
        drop_layers(coded, tmp_path / "b.tol", DropSpec((1,)), progress=SILENT)


def test_a_dry_run_foretells_the_bytes(checkpoint: Path, coded: Path, tmp_path: Path) -> None:
    spec = CompressSpec(bits_per_value=5.0, coding="entropy")
    report = compress(checkpoint, tmp_path / "b.tol", spec, dry=True, progress=SILENT)
    assert not (tmp_path / "b.tol").exists()
    assert report.table_bytes == open_bundle(coded).table_bytes


def test_what_cannot_be_asked_for(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="--coding: 'zip', expected fixed or entropy"):
        CompressSpec(bits_per_value=1.0, coding="zip")
    with pytest.raises(UsageError, match="--coding: is for codec bands"):
        CompressSpec(codec="nf4", coding="entropy")
    plan = plan_compress(
        open_source(checkpoint), CompressSpec(bits_per_value=1.0, coding="entropy")
    )
    assert plan.entropy
