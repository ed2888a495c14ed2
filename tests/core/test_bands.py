"""Codec bands end to end on small checkpoints: sizes, quality, company."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import torch
from _fitted import LAYERS, Rows, exact_rows, large_checkpoint, lost, rows_of, run, small_checkpoint
from _nano import reseal
from _pico import pico_model, pico_tokenizer_files

from tolkit.build import build
from tolkit.bundling import Resources
from tolkit.calibrate import CalibrationSpec, calibrate, save_metric
from tolkit.compress import CompressSpec, DropSpec, compress, drop_layers, encode
from tolkit.compress.spec import BandsWish
from tolkit.counts import save_counts
from tolkit.data import Document
from tolkit.errors import NonFiniteError, UsageError
from tolkit.model import save_checkpoint
from tolkit.progress import SilentProgress
from tolkit.sources import open_source
from tolkit.tables import load_runnable
from tolkit_formats import open_bundle
from tolkit_formats.codecs import Bands


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("pico") / "ckpt")


@pytest.fixture(scope="module")
def exact(checkpoint: Path) -> Rows:
    return exact_rows(checkpoint)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return large_checkpoint(tmp_path_factory.mktemp("nano") / "ckpt")


@pytest.fixture(scope="module")
def large_rows(large: Path) -> Rows:
    return exact_rows(large)


def objective(got: Rows, want: Rows, weights_V: npt.NDArray[np.float64]) -> float:
    """What widths are shared out for: weighted squared errors of the running sum after each
    layer, the last one three times, relative to the rows."""
    errors_VL = np.square((got - want).cumsum(axis=1)).sum(axis=2)
    layer_L = np.ones(want.shape[1])
    layer_L[-1] = 3.0
    return float(weights_V @ errors_VL @ layer_L / (weights_V @ np.square(want).sum(axis=(1, 2))))


# Sizes.


def test_bytes_come_close_below_the_budget(large: Path, large_rows: Rows, tmp_path: Path) -> None:
    before = 9.0
    counts = open_source(large).token_counts_V
    assert counts is not None
    for bits in (1.5, 2.5, 4.5):
        out = tmp_path / f"{bits}.tol"
        report = run(large, out, bits_per_value=bits)
        budget = int(bits * large_rows.size / 8)
        stored = sum(file.stat().st_size for file in (out / "tables").iterdir())
        assert stored == report.table_bytes == open_bundle(out).table_bytes
        assert 0.98 * budget <= stored <= budget, (bits, stored / budget)
        assert len(open_bundle(out).manifest.tiers) > 2
        error = objective(rows_of(out), large_rows, (counts + 1.0) ** 0.5)
        assert error < before, bits
        before = error
    assert before < 0.05


@pytest.mark.parametrize("transform", ["klt", "hadamard"])
def test_small_vocabularies_never_exceed_a_budget(
    checkpoint: Path, tmp_path: Path, transform: str
) -> None:
    """Steps are coarse here: 16 bytes a row and the rows of bases that come with them."""
    wish = BandsWish(transform, 0)
    sizes = []
    for bits in (6, 11, 24):
        out = tmp_path / f"{bits}.tol"
        report = run(checkpoint, out, bits_per_value=float(bits), bands=wish)
        assert report.table_bytes <= bits * 96 * 32 * LAYERS / 8
        sizes.append(report.table_bytes)
    assert sizes == sorted(sizes) and sizes[-1] > 2 * sizes[0]


def test_budget_in_bytes_is_the_same_as_bits(checkpoint: Path, tmp_path: Path) -> None:
    run(checkpoint, tmp_path / "a.tol", bits_per_value=12.0)
    run(checkpoint, tmp_path / "b.tol", budget_bytes=12 * 96 * 32 * LAYERS // 8)
    first, second = (rows_of(tmp_path / f"{name}.tol") for name in "ab")
    assert np.array_equal(first, second)


def test_a_budget_below_the_floor_names_the_floor(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="below the floor") as caught:
        run(checkpoint, tmp_path / "b.tol", budget_bytes=1000, bands=BandsWish("klt", 3))
    floor = int(str(caught.value.hint).split("at least ")[1].split(" bytes")[0].replace(",", ""))
    assert f"{floor:,} bytes" in caught.value.message
    assert "predictions" in caught.value.message and "--predict 0" in str(caught.value.hint)
    with pytest.raises(UsageError, match="floor: means and empty records") as caught:
        run(checkpoint, tmp_path / "b.tol", budget_bytes=1000)
    assert "--predict" not in str(caught.value.hint)
    assert not (tmp_path / "b.tol").exists()
    report = run(checkpoint, tmp_path / "b.tol", budget_bytes=floor, bands=BandsWish("klt", 3))
    assert report.table_bytes <= floor
    with pytest.raises(UsageError, match="below the floor"):
        run(checkpoint, tmp_path / "c.tol", budget_bytes=floor - 1, bands=BandsWish("klt", 3))


def test_a_dry_run_predicts_the_bytes(large: Path, tmp_path: Path) -> None:
    spec = CompressSpec(bits_per_value=2.0)
    resources = Resources(threads=1)
    quiet = SilentProgress()
    predicted = compress(large, tmp_path / "b.tol", spec, dry=True, resources=resources)
    assert not (tmp_path / "b.tol").exists()
    written = compress(large, tmp_path / "b.tol", spec, resources=resources, progress=quiet)
    assert predicted.table_bytes == written.table_bytes


# Quality, and what a reader makes of it.


def test_feedback_keeps_the_running_sum(large: Path, large_rows: Rows, tmp_path: Path) -> None:
    fed = run(large, tmp_path / "fed.tol", bits_per_value=2.0)
    plain = run(large, tmp_path / "plain.tol", bits_per_value=2.0, feedback=False)
    error = {name: lost(rows_of(tmp_path / f"{name}.tol"), large_rows) for name in ("fed", "plain")}
    assert error["fed"] < 0.85 * error["plain"]
    for name, report in (("fed", fed), ("plain", plain)):
        assert report.layers[-1].running_sum_error == pytest.approx(error[name], rel=1e-3)


@pytest.mark.parametrize("transform", ["klt", "hadamard"])
@pytest.mark.parametrize("predictor_bits", [0, 4])
def test_numpy_reads_what_the_encoder_decoded(
    checkpoint: Path, tmp_path: Path, transform: str, predictor_bits: int
) -> None:
    """So what later layers repaid is what the reader will miss."""
    decoded: dict[tuple[int, int], torch.Tensor] = {}
    whole = encode.encode_block

    def spy(source, plane, own_ND, carry_ND, shared, **rest):  # type: ignore[no-untyped-def]
        result = whole(source, plane, own_ND, carry_ND, shared, **rest)
        before = own_ND if carry_ND is None else own_ND + carry_ND
        decoded[plane.layer, rest["first_slot"]] = (before - result[1]).clone()
        return result

    wish = BandsWish(transform, predictor_bits)
    with mock.patch("tolkit.compress.encode.encode_block", spy):
        run(checkpoint, tmp_path / "b.tol", bits_per_value=14.0, bands=wish)
    bundle = open_bundle(tmp_path / "b.tol")
    assert bundle.slot_of_token is not None
    assert sorted(bundle.manifest.predictors) == (list(range(LAYERS)) if predictor_bits else [])
    rows = bundle.rows(np.argsort(bundle.slot_of_token))
    for (layer, first), want_ND in decoded.items():
        got_ND = rows[first : first + len(want_ND), layer]
        # The subtraction above rounds too.
        norm = np.linalg.norm(want_ND, axis=1, keepdims=True)
        assert (np.abs(got_ND - want_ND.numpy()) <= 2e-6 * norm + 2e-6).all()
    assert sum(len(v) for v in decoded.values()) == 96 * LAYERS


def test_planes_of_a_source_are_rows_of_the_reader(checkpoint: Path, tmp_path: Path) -> None:
    for transform, bits in (("klt", 3), ("hadamard", 0)):
        out = tmp_path / f"{transform}.tol"
        run(checkpoint, out, bits_per_value=14.0, bands=BandsWish(transform, bits))
        source = open_source(out)
        assert source.slot_of_token_V is not None and len(source.tier_ranges) > 1
        want = rows_of(out)[np.argsort(source.slot_of_token_V)]
        for layer in range(LAYERS):
            read = source.plane(layer)
            for first, stop in ((0, 96), (0, 1), (31, 33), (95, 96), (40, 41)):
                got = read(first, stop).numpy()
                norm = np.linalg.norm(want[first:stop, layer], axis=1, keepdims=True)
                assert (np.abs(got - want[first:stop, layer]) <= 1e-6 * norm).all()


def test_prediction_helps_where_rows_follow_embeddings(tmp_path: Path) -> None:
    """The gate is the same for all tokens, so rows are linear in the unit embedding."""
    config = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 1024}
    model = pico_model("memory", **config)
    with torch.no_grad():
        state = model.state_dict()
        embedding_VD = state["model.embed_tokens.weight"]
        embedding_VD[:, 0] = 30.0
        for layer in range(2):
            gate = state[f"model.layers.{layer}.memory_mlp.gate_proj.weight"]
            gate.zero_()
            gate[:, 0] = 1.0
    save_checkpoint(model, tmp_path / "ckpt", pico_tokenizer_files(), None)
    build(tmp_path / "ckpt", tmp_path / "exact.tol", dtype="f32", progress=SilentProgress())
    want = rows_of(tmp_path / "exact.tol")
    errors = []
    for bits in (0, 3):
        out = tmp_path / f"{bits}.tol"
        run(tmp_path / "ckpt", out, bits_per_value=3.0, bands=BandsWish("klt", bits))
        centred = want - want.mean(axis=0)
        errors.append(lost(rows_of(out) - want + centred, centred))
    assert errors[1] < 0.7 * errors[0]


def test_frequent_tokens_lose_less(large: Path, large_rows: Rows, tmp_path: Path) -> None:
    counts = open_source(large).token_counts_V
    assert counts is not None
    frequent = (counts >= np.sort(counts)[-100]).astype(float)
    errors = {}
    for weights in ("auto", "none"):
        run(large, tmp_path / f"{weights}.tol", bits_per_value=2.0, weights=weights)
        errors[weights] = lost(rows_of(tmp_path / f"{weights}.tol"), large_rows, frequent)
    assert errors["auto"] < 0.7 * errors["none"]
    sizes = [tier.num_rows for tier in open_bundle(tmp_path / "none.tol").manifest.tiers]
    assert sizes[:3] == [1024, 512, 256] and sum(sizes) == 2048


def test_a_metric_is_used_and_its_numbers_are_looked_at(checkpoint: Path, tmp_path: Path) -> None:
    spec = CalibrationSpec(seed=7, window=8, device="cpu")
    text = [Document("a", "the quick brown fox jumps over the lazy dog")]
    measured = calibrate(load_runnable(checkpoint), text, spec, SilentProgress())
    save_metric(tmp_path / "m.safetensors", measured)
    run(checkpoint, tmp_path / "plain.tol", bits_per_value=14.0)
    file = str(tmp_path / "m.safetensors")
    run(checkpoint, tmp_path / "metric.tol", bits_per_value=14.0, calibration=file)
    assert not np.array_equal(rows_of(tmp_path / "plain.tol"), rows_of(tmp_path / "metric.tol"))
    digest = json.loads((tmp_path / "metric.tol" / "tol.json").read_text())["history"][-1]
    assert len(digest["options"]["calibration"]) == 64
    data = bytearray((tmp_path / "m.safetensors").read_bytes())
    data[-4:] = np.float32(np.nan).tobytes()
    (tmp_path / "m.safetensors").write_bytes(data)
    with pytest.raises(NonFiniteError, match=r"m\.safetensors"):
        run(checkpoint, tmp_path / "broken.tol", bits_per_value=14.0, calibration=file)


# Together with the rest.


def test_folded_layers(checkpoint: Path, exact: Rows, tmp_path: Path) -> None:
    run(checkpoint, tmp_path / "f.tol", bits_per_value=16.0, drop=(1,))
    bundle = open_bundle(tmp_path / "f.tol")
    assert bundle.layer_ids == (0, 2) and bundle.manifest.layers[1].into == 2
    assert lost(rows_of(tmp_path / "f.tol"), exact) < 0.35
    run(checkpoint, tmp_path / "p.tol", bits_per_value=16.0, drop=(1,), fold=False)
    assert lost(rows_of(tmp_path / "p.tol"), exact) > 0.4


def test_bands_bundles_fold_no_more(checkpoint: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "b.tol"
    run(checkpoint, bundle, bits_per_value=16.0, bands=BandsWish("klt", 3))
    with pytest.raises(UsageError, match="stored as bands") as caught:
        drop_layers(bundle, tmp_path / "d.tol", DropSpec((1,)), progress=SilentProgress())
    assert "--plain" in str(caught.value.hint)
    plain = DropSpec((1,), fold=False)
    drop_layers(bundle, tmp_path / "d.tol", plain, progress=SilentProgress())
    left = open_bundle(tmp_path / "d.tol")
    assert sorted(left.manifest.predictors) == [0, 2] and left.layer_ids == (0, 2)
    assert np.array_equal(rows_of(tmp_path / "d.tol"), rows_of(bundle)[:, [0, 2]])


def test_from_bands_to_another_codec_and_back(
    checkpoint: Path, exact: Rows, tmp_path: Path
) -> None:
    run(checkpoint, tmp_path / "b.tol", bits_per_value=20.0, bands=BandsWish("klt", 3))
    run(tmp_path / "b.tol", tmp_path / "nf4.tol", codec="nf4")
    assert open_bundle(tmp_path / "nf4.tol").manifest.predictors == {}
    assert len(open_bundle(tmp_path / "nf4.tol").manifest.tiers) == 1
    run(tmp_path / "nf4.tol", tmp_path / "again.tol", bits_per_value=20.0)
    for name in ("b", "nf4", "again"):
        assert lost(rows_of(tmp_path / f"{name}.tol"), exact) < 0.35, name
    codecs = {type(p.codec) for p in open_bundle(tmp_path / "again.tol").manifest.tiers[0].planes}
    assert codecs == {Bands}


def test_other_counts_reorder_slots_and_nothing_else(checkpoint: Path, tmp_path: Path) -> None:
    run(checkpoint, tmp_path / "b.tol", bits_per_value=16.0, bands=BandsWish("klt", 3))
    source = open_source(tmp_path / "b.tol")
    counts = np.random.default_rng(5).integers(0, 50, 96).astype(np.uint64)
    tokenizer = source.sources().tokenizer
    assert tokenizer is not None
    save_counts(tmp_path / "counts.safetensors", counts, tokenizer)
    source.use_counts(counts)
    assert source.slot_of_token_V is not None
    tokens = np.argsort(source.slot_of_token_V)
    assert [source.token_at(slot) for slot in (0, 95)] == [tokens[0], tokens[95]]
    want = rows_of(tmp_path / "b.tol")[tokens]
    for layer in range(LAYERS):
        got = source.plane(layer)(10, 90).numpy()
        norm = np.linalg.norm(want[10:90, layer], axis=1, keepdims=True)
        assert (np.abs(got - want[10:90, layer]) <= 1e-6 * norm).all()
    options = {"codec": "f32", "weights": str(tmp_path / "counts.safetensors")}
    spec = CompressSpec(**{**options, "feedback": False})
    compress(tmp_path / "b.tol", tmp_path / "f.tol", spec, progress=SilentProgress())
    assert np.allclose(rows_of(tmp_path / "f.tol")[tokens], want, rtol=0, atol=1e-5)


def test_rows_that_are_not_summed_take_no_feedback(checkpoint: Path, tmp_path: Path) -> None:
    build(checkpoint, tmp_path / "o.tol", dtype="f32", progress=SilentProgress())
    reseal(tmp_path / "o.tol", lambda m: m.update(combine="other"))
    with pytest.raises(UsageError, match="error feedback") as caught:
        run(tmp_path / "o.tol", tmp_path / "b.tol", bits_per_value=16.0)
    assert "--no-feedback" in str(caught.value.hint)
    run(tmp_path / "o.tol", tmp_path / "b.tol", bits_per_value=16.0, feedback=False)
    assert not open_bundle(tmp_path / "b.tol").manifest.encoding.feedback
