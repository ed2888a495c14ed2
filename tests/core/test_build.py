"""Tables are the FFN path: logits through them, rows in them, and what refuses to be built."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from _pico import pico_checkpoint, pico_ids

from tolkit.build import build
from tolkit.bundling import Resources
from tolkit.errors import CheckpointError, OutputExistsError, UsageError
from tolkit.model import LayerFfn, checkpoint_tensors, load_checkpoint
from tolkit.progress import SilentProgress
from tolkit.tables import load_runnable
from tolkit_formats import open_bundle, verify

SILENT = SilentProgress()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["memory", "flex"])
def test_logits_through_f32_tables(
    tmp_path: Path, architecture: str, tied: bool, kv_heads: int
) -> None:
    checkpoint = pico_checkpoint(
        tmp_path / "ckpt",
        architecture,
        tie_word_embeddings=tied,
        num_key_value_heads=kv_heads,
    )
    report = build(checkpoint, tmp_path / "b.tol", dtype="f32", progress=SILENT)
    assert report.checks["max_abs_difference"] == 0.0
    ids_BT = pico_ids()
    runnable = load_runnable(tmp_path / "b.tol")
    with torch.no_grad():
        want = load_checkpoint(checkpoint)(ids_BT)
        got = runnable.model(ids_BT, rows=runnable.rows)
    assert float((want - got).abs().max()) <= 4e-6 * float(want.abs().max())


def test_rows_equal_the_naive_ffn(tmp_path: Path) -> None:
    """Every row against one token at a time, through the plain formula in float64."""
    checkpoint = pico_checkpoint(tmp_path / "ckpt")
    build(checkpoint, tmp_path / "b.tol", dtype="f32", progress=SILENT)
    rows = open_bundle(tmp_path / "b.tol").rows(range(96))
    tensors = checkpoint_tensors(checkpoint)
    for layer in range(2):
        prefix = f"model.layers.{layer}.memory_"
        norm, gate, up, down = (
            tensors.tensor(prefix + name).double()
            for name in (
                "layernorm.weight",
                "mlp.gate_proj.weight",
                "mlp.up_proj.weight",
                "mlp.down_proj.weight",
            )
        )
        for token in (0, 1, 50, 95):
            x = tensors.tensor("model.embed_tokens.weight")[token].double()
            x = x / torch.sqrt((x * x).mean() + tensors.config.rms_norm_eps) * norm
            want = down @ ((gate @ x) * torch.sigmoid(gate @ x) * (up @ x))
            got = torch.from_numpy(rows[token, layer]).double()
            torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)


def test_same_partition_same_bits(tmp_path: Path) -> None:
    """V over several blocks: stored rows are the bits LayerFfn gives for the same block."""
    checkpoint = pico_checkpoint(tmp_path / "ckpt", counts=False)
    build(checkpoint, tmp_path / "b.tol", dtype="f32", progress=SILENT)
    rows = torch.from_numpy(open_bundle(tmp_path / "b.tol").rows(range(96)))
    for layer in range(2):
        want = LayerFfn(checkpoint_tensors(checkpoint), layer)(torch.arange(96))
        assert torch.equal(rows[:, layer], want)


@pytest.mark.parametrize(("dtype", "roundoff"), [("f16", 2.0**-11), ("bf16", 2.0**-8)])
def test_sixteen_bits(tmp_path: Path, dtype: str, roundoff: float) -> None:
    checkpoint = pico_checkpoint(tmp_path / "ckpt")
    build(checkpoint, tmp_path / "exact.tol", dtype="f32", progress=SILENT)
    report = build(checkpoint, tmp_path / "b.tol", dtype=dtype, progress=SILENT)
    want = open_bundle(tmp_path / "exact.tol").rows(range(96))
    got = open_bundle(tmp_path / "b.tol").rows(range(96))
    assert (abs(want - got) <= roundoff * abs(want) + 2.0**-25).all()
    assert 0 < report.checks["relative_error"] < roundoff
    assert report.nominal_bits_per_value == 16
    assert report.bits_per_value > 16


def test_slots_follow_counts(tmp_path: Path) -> None:
    checkpoint = pico_checkpoint(tmp_path / "ckpt")
    build(checkpoint, tmp_path / "b.tol", progress=SILENT)
    bundle = open_bundle(tmp_path / "b.tol")
    counts = bundle.token_counts()
    assert counts is not None and bundle.slot_of_token is not None
    order = sorted(range(96), key=lambda token: (-int(counts[token]), token))
    assert [int(bundle.slot_of_token[token]) for token in order] == list(range(96))
    assert verify(tmp_path / "b.tol").num_records == 96


def test_dry_run_predicts_and_writes_nothing(tmp_path: Path) -> None:
    checkpoint = pico_checkpoint(tmp_path / "ckpt")
    plan = build(checkpoint, tmp_path / "b.tol", dry=True, progress=SILENT)
    assert plan.path is None and not (tmp_path / "b.tol").exists()
    real = build(checkpoint, tmp_path / "b.tol", progress=SILENT)
    # Prediction leaves out headers of a few hundred bytes a file.
    assert 0 <= real.table_bytes - plan.table_bytes < 3000


def test_refusals(tmp_path: Path) -> None:
    dense = pico_checkpoint(tmp_path / "dense", "dense")
    with pytest.raises(CheckpointError, match="no token-wise tables"):
        build(dense, tmp_path / "b.tol", progress=SILENT)
    checkpoint = pico_checkpoint(tmp_path / "ckpt")
    with pytest.raises(UsageError, match="'f8' is not offered"):
        build(checkpoint, tmp_path / "b.tol", dtype="f8", progress=SILENT)
    build(checkpoint, tmp_path / "b.tol", progress=SILENT)
    with pytest.raises(OutputExistsError, match="already exists"):
        build(checkpoint, tmp_path / "b.tol", progress=SILENT)
    with pytest.raises(UsageError, match="is a bundle"):
        build(tmp_path / "b.tol", tmp_path / "c.tol", progress=SILENT)
    before = open_bundle(tmp_path / "b.tol").identity
    build(
        checkpoint,
        tmp_path / "b.tol",
        dtype="f32",
        resources=Resources(force=True),
        progress=SILENT,
    )
    assert open_bundle(tmp_path / "b.tol").identity != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.tol", "ckpt", "dense"]
