"""Compression end to end on a pico checkpoint, against slow and obvious versions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from _pico import pico_checkpoint, pico_counts, pico_model

from tolkit.build import build
from tolkit.bundling import BundleReport, Resources
from tolkit.compress import CompressSpec, DropSpec, compress, drop_layers
from tolkit.compress.codecs import encoder_for
from tolkit.compress.spec import named_codec
from tolkit.counts import save_counts
from tolkit.errors import MismatchError, UsageError
from tolkit.model import save_checkpoint
from tolkit.progress import SilentProgress
from tolkit_formats import open_bundle, verify

LAYERS = 5
Rows = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pico") / "ckpt"
    return pico_checkpoint(path, num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def exact(checkpoint: Path) -> Path:
    path = checkpoint.with_name("exact.tol")
    build(checkpoint, path, dtype="f32", progress=SilentProgress())
    return path


def run(source: Path, out: Path, **options: object) -> BundleReport:
    return compress(source, out, CompressSpec(**options), progress=SilentProgress())


def rows_of(path: Path) -> Rows:
    verify(path)
    return open_bundle(path).rows(range(96))


def feedback_by_hand(tables: Rows, codec: str, *, feedback: bool) -> Rows:
    """LAB finding 1, a layer at a time over the whole table."""
    encoder = encoder_for(named_codec(codec, tables.shape[2]))
    carry = torch.zeros(tables.shape[0], tables.shape[2])
    decoded = []
    for layer in range(tables.shape[1]):
        own = torch.from_numpy(tables[:, layer].copy())
        target = own + carry if feedback else own
        decoded.append(encoder.encode(target, {})[1])
        carry = target - decoded[-1]
    return torch.stack(decoded, dim=1).numpy()


@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("codec", ["int8", "int4", "nf4", "fp4"])
def test_bits_equal_the_recursion_by_hand(
    checkpoint: Path, exact: Path, tmp_path: Path, codec: str, feedback: bool
) -> None:
    run(checkpoint, tmp_path / "a.tol", codec=codec, feedback=feedback)
    run(exact, tmp_path / "b.tol", codec=codec, feedback=feedback)
    want = feedback_by_hand(rows_of(exact), codec, feedback=feedback)
    assert np.array_equal(rows_of(tmp_path / "a.tol"), want)
    assert np.array_equal(rows_of(tmp_path / "b.tol"), want)


def test_feedback_keeps_the_running_sum(exact: Path, tmp_path: Path) -> None:
    plain = run(exact, tmp_path / "plain.tol", codec="int4", feedback=False)
    fed = run(exact, tmp_path / "fed.tol", codec="int4")
    want = rows_of(exact).sum(axis=1)

    def lost(name: str) -> float:
        return float(np.linalg.norm(rows_of(tmp_path / name).sum(axis=1) - want))

    assert lost("fed.tol") < 0.7 * lost("plain.tol")
    for report, name in ((plain, "plain.tol"), (fed, "fed.tol")):
        own = np.linalg.norm(want)
        last = report.layers[-1].running_sum_error
        assert last == pytest.approx(lost(name) / own, rel=1e-3)


@pytest.mark.parametrize("rank", [1, 7, 16, 32])
@pytest.mark.parametrize("weights", ["none", "auto"])
def test_rank_without_feedback_is_the_weighted_svd(
    checkpoint: Path, exact: Path, tmp_path: Path, rank: int, weights: str
) -> None:
    run(
        checkpoint, tmp_path / "r.tol", rank=str(rank), codec="f32", feedback=False, weights=weights
    )
    want, got = rows_of(exact).astype(np.float64), rows_of(tmp_path / "r.tol").astype(np.float64)
    scale = np.ones(96) if weights == "none" else (pico_counts().astype(np.float64) + 1) ** 0.25
    for layer in range(LAYERS):
        _, singular, _ = np.linalg.svd(want[:, layer] * scale[:, None], full_matrices=False)
        best = float(np.sqrt((singular[rank:] ** 2).sum()))
        lost = float(np.linalg.norm((got[:, layer] - want[:, layer]) * scale[:, None]))
        # The stored basis is rounded to f16.
        total = float(np.linalg.norm(singular))
        assert lost == pytest.approx(best, rel=2e-3, abs=1e-3 * total)


def test_rank_with_feedback_fits_table_plus_carry(
    checkpoint: Path, exact: Path, tmp_path: Path
) -> None:
    """Each stored basis spans the leading singular space of that layer's target."""
    run(checkpoint, tmp_path / "r.tol", rank="8", codec="f32", weights="none")
    bundle = open_bundle(tmp_path / "r.tol")
    got = torch.from_numpy(rows_of(tmp_path / "r.tol")).double()
    tables = torch.from_numpy(rows_of(exact)).double()
    carry = torch.zeros(96, 32, dtype=torch.float64)
    for layer in range(LAYERS):
        target = tables[:, layer] + carry
        best = torch.linalg.svdvals(target)[8:].norm()
        lost = (target - got[:, layer]).norm()
        # Targets are spilled as f16 while bases are fitted.
        assert float(lost) == pytest.approx(float(best), rel=5e-3)
        carry = target - got[:, layer]
        basis = torch.from_numpy(np.array(bundle.shared(layer)["basis"])).double()
        assert torch.allclose(basis @ basis.T, torch.eye(8, dtype=torch.float64), atol=3e-3)


def test_rank_and_bits_and_drop_together(checkpoint: Path, exact: Path, tmp_path: Path) -> None:
    report = run(checkpoint, tmp_path / "x.tol", rank="50%", codec="nf4", drop=(1, 4))
    bundle = open_bundle(tmp_path / "x.tol")
    assert bundle.layer_ids == (0, 2, 3)
    assert [s.into for s in bundle.manifest.layers] == [None, 2, None, None, 3]
    assert report.nominal_bits_per_value == pytest.approx(2 * 3 / 5)
    # Two steps give the same tables as one: drop from the raw tables, then compress.
    drop_layers(exact, tmp_path / "d.tol", DropSpec((1, 4)), progress=SilentProgress())
    run(tmp_path / "d.tol", tmp_path / "y.tol", rank="50%", codec="nf4")
    a, b = rows_of(tmp_path / "x.tol"), rows_of(tmp_path / "y.tol")
    assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(a)


def test_per_layer_ranks(checkpoint: Path, tmp_path: Path) -> None:
    run(checkpoint, tmp_path / "x.tol", rank="0:4,2-3:50%", codec="int8")
    bundle = open_bundle(tmp_path / "x.tol")
    names = [bundle.plane_codec(layer).to_json()["name"] for layer in range(LAYERS)]
    assert names == ["svd", "int8", "svd", "svd", "int8"]
    assert bundle.plane_codec(2).to_json()["rank"] == 16


def test_folding_raw_tables_adds_them(exact: Path, tmp_path: Path) -> None:
    drop_layers(exact, tmp_path / "f.tol", DropSpec((1, 2)), progress=SilentProgress())
    before, after = rows_of(exact), rows_of(tmp_path / "f.tol")
    assert np.array_equal(after[:, 0], before[:, 0])
    assert np.array_equal(after[:, 1], before[:, 1] + before[:, 2] + before[:, 3])
    assert np.array_equal(after[:, 2], before[:, 4])


def test_plain_drop_copies_what_stays(checkpoint: Path, tmp_path: Path) -> None:
    run(checkpoint, tmp_path / "n.tol", rank="50%", codec="nf4")
    spec = DropSpec((0, 3), fold=False)
    drop_layers(tmp_path / "n.tol", tmp_path / "p.tol", spec, progress=SilentProgress())
    before, after = rows_of(tmp_path / "n.tol"), rows_of(tmp_path / "p.tol")
    assert np.array_equal(after, before[:, [1, 2, 4]])


def test_folding_coded_tables_keeps_the_sum_and_warns(checkpoint: Path, tmp_path: Path) -> None:
    run(checkpoint, tmp_path / "n.tol", codec="nf4")
    progress = SilentProgress()
    report = drop_layers(tmp_path / "n.tol", tmp_path / "f.tol", DropSpec((2,)), progress=progress)
    before, after = rows_of(tmp_path / "n.tol"), rows_of(tmp_path / "f.tol")
    assert np.array_equal(after[:, :2], before[:, :2])  # copied byte for byte
    lost = np.linalg.norm(before.sum(axis=1) - after.sum(axis=1))
    assert lost < 0.15 * np.linalg.norm(before[:, -1])
    assert "encoded a second time" in progress.warnings[0]
    assert report.warnings == tuple(progress.warnings)
    verify(tmp_path / "f.tol")


def test_lossy_on_lossy_is_warned_with_the_lineage(checkpoint: Path, tmp_path: Path) -> None:
    run(checkpoint, tmp_path / "a.tol", codec="int8")
    report = run(tmp_path / "a.tol", tmp_path / "b.tol", codec="nf4")
    assert "already int8 (compress)" in report.warnings[0]
    history = open_bundle(tmp_path / "b.tol").manifest.history
    assert [step.command for step in history] == ["compress", "compress"]
    assert history[1].parent == open_bundle(tmp_path / "a.tol").identity


def test_rank_above_break_even_is_warned(checkpoint: Path, tmp_path: Path) -> None:
    report = run(checkpoint, tmp_path / "a.tol", rank="30")
    assert "above the break-even V*D/(V+D) = 24" in report.warnings[0]
    assert not run(checkpoint, tmp_path / "b.tol", rank="24").warnings


def test_counts_from_a_file(checkpoint: Path, tmp_path: Path) -> None:
    digest = open_bundle_digest(checkpoint, tmp_path)
    counts = np.zeros(96, np.uint64)
    counts[:10] = 1_000_000
    save_counts(tmp_path / "c.safetensors", counts, digest)
    run(checkpoint, tmp_path / "a.tol", rank="4", weights=str(tmp_path / "c.safetensors"))
    run(checkpoint, tmp_path / "b.tol", rank="4", weights="none")
    exact = rows_of(tmp_path / "exact.tol")[:10]
    weighted, equal = (rows_of(tmp_path / name)[:10] for name in ("a.tol", "b.tol"))
    lost = np.linalg.norm(weighted.sum(1) - exact.sum(1))
    assert lost < 0.5 * np.linalg.norm(equal.sum(1) - exact.sum(1))
    save_counts(tmp_path / "other.safetensors", counts, "0" * 64)
    with pytest.raises(MismatchError, match="another tokenizer"):
        run(checkpoint, tmp_path / "c.tol", rank="4", weights=str(tmp_path / "other.safetensors"))
    save_counts(tmp_path / "short.safetensors", counts[:50], digest)
    with pytest.raises(MismatchError, match=r"uint64 \[50\], expected uint64 \[96\]"):
        run(checkpoint, tmp_path / "c.tol", rank="4", weights=str(tmp_path / "short.safetensors"))


def open_bundle_digest(checkpoint: Path, folder: Path) -> str:
    build(checkpoint, folder / "exact.tol", dtype="f32", progress=SilentProgress())
    digest = open_bundle(folder / "exact.tol").manifest.sources.tokenizer
    assert digest is not None
    return digest


def test_identity_does_not_depend_on_the_name(checkpoint: Path, tmp_path: Path) -> None:
    reports = [run(checkpoint, tmp_path / name, codec="nf4") for name in ("a.tol", "other.tol")]
    assert reports[0].identity == reports[1].identity
    assert reports[0].identity != run(checkpoint, tmp_path / "c.tol", codec="fp4").identity


def test_nothing_left_behind_and_dry_run(checkpoint: Path, tmp_path: Path) -> None:
    spec = CompressSpec(rank="50%", codec="nf4")
    dry = compress(checkpoint, tmp_path / "a.tol", spec, dry=True, progress=SilentProgress())
    assert list(tmp_path.iterdir()) == []
    real = compress(checkpoint, tmp_path / "a.tol", spec, progress=SilentProgress())
    assert [p.name for p in tmp_path.iterdir()] == ["a.tol"]
    assert 0 <= real.table_bytes - dry.table_bytes < 3000
    with pytest.raises(UsageError, match="is a checkpoint, drop-layers takes a bundle"):
        drop_layers(checkpoint, tmp_path / "b.tol", DropSpec((1,)), progress=SilentProgress())


@pytest.mark.parametrize("options", [{"codec": "nf4"}, {"rank": "50%", "codec": "int8"}])
def test_same_bits_at_any_number_of_threads(tmp_path: Path, options: dict[str, str]) -> None:
    """Several blocks of rows, so that threads have something to share out."""
    save_checkpoint(pico_model(vocab_size=3500), tmp_path / "big")
    identities = set()
    for threads in (1, 2, 3):
        report = compress(
            tmp_path / "big",
            tmp_path / "x.tol",
            CompressSpec(**options),
            resources=Resources(threads=threads, force=True),
            progress=SilentProgress(),
        )
        identities.add(report.identity)
    assert len(identities) == 1
