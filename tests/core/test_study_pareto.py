"""`pareto` on a pico model: sizes, errors, gaps and quality against the slow way."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from _pico import pico_checkpoint, pico_counts
from _study import RunStudy, study_inputs, study_runner
from torch import Tensor

from tolkit.bundling import Resources
from tolkit.compress import CompressSpec, compress
from tolkit.data import read_documents
from tolkit.errors import ResourceError, UsageError
from tolkit.evaluate import evaluate, windows_of
from tolkit.model import FfnRows
from tolkit.progress import SilentProgress
from tolkit.study import StudyReport
from tolkit.study import pareto as module
from tolkit.study.pareto_draw import frontier
from tolkit.study.pareto_methods import OWN, usable_peers
from tolkit.tables import load_runnable

V, L, D = 96, 4, 64
SOME = "nf4,svd-50,bitsandbytes,ffn-nf4"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study's texts, and memory models of D 64, whose rows are whole groups."""
    folder = study_inputs(tmp_path_factory.mktemp("work"))
    for name, counts in (("wide", True), ("uncounted", False)):
        pico_checkpoint(folder / name, counts=counts, num_hidden_layers=L, hidden_size=D)
    return folder


@pytest.fixture
def study(work: Path, tmp_path: Path) -> RunStudy:
    return study_runner(work, tmp_path)


@pytest.fixture(scope="module")
def some(work: Path, tmp_path_factory: pytest.TempPathFactory) -> StudyReport:
    """One report for all tests that only read it."""
    run = study_runner(work, tmp_path_factory.mktemp("some"))
    return run("pareto", "wide", values=SOME, keep=True)


def by_key(report: StudyReport) -> dict[str, Any]:
    return {row["key"]: row for row in report.rows}


def own_planes(path: Path) -> Tensor:
    """float32 [L, V, D]."""
    model = load_runnable(path).model
    with torch.no_grad():
        return torch.stack([model.ffn_plane(i, torch.arange(V)) for i in range(L)])


def weights(counted: bool) -> Tensor:
    if not counted:
        return torch.ones(V, dtype=torch.float64)
    roots_V = torch.from_numpy(np.sqrt(pico_counts().astype(np.float64) + 1))
    return roots_V / roots_V.mean()


def naive_errors(own_LVD: Tensor, found_LVD: Tensor, weights_V: Tensor) -> tuple[float, float]:
    """(table error, sum error), token by token."""
    variance = table = running = 0.0
    mean_LD = (own_LVD.double() * weights_V[:, None]).sum(1) / weights_V.sum()
    for v in range(V):
        lost_D = torch.zeros(D, dtype=torch.float64)
        for layer in range(L):
            own_D, weight = own_LVD[layer, v].double(), float(weights_V[v])
            error_D = found_LVD[layer, v].double() - own_D
            lost_D += error_D
            variance += weight * float((own_D - mean_LD[layer]).square().sum())
            table += weight * float(error_D.square().sum())
            running += weight * float(lost_D.square().sum())
    return table / variance, running / variance


def naive_bound(own_LVD: Tensor, weights_V: Tensor, error: float) -> float:
    """Bits a value at an error: eigenvalues by numpy, the water level by bisection."""
    products: list[np.ndarray[Any, Any]] = []
    for plane_VD in own_LVD.double().numpy():
        covariance_DD = np.cov(plane_VD.T, aweights=weights_V.numpy(), ddof=0)
        variances_D = np.linalg.eigvalsh(covariance_DD)
        products.append(np.multiply.outer(variances_D, weights_V.numpy()).ravel())
    all_S = np.concatenate(products)
    low, high = 0.0, float(all_S.max())
    for _ in range(100):
        theta = (low + high) / 2
        low, high = (
            (theta, high) if np.minimum(theta, all_S).sum() < error * all_S.sum() else (low, theta)
        )
    return float(np.maximum(0, np.log2(np.maximum(all_S, 1e-300) / high) / 2).mean())


def bnb_planes(own_LVD: Tensor, kind: str, double: bool) -> Tensor:
    return torch.stack(
        [
            bnb.dequantize_4bit(
                *bnb.quantize_4bit(
                    plane_VD.flatten(), blocksize=64, quant_type=kind, compress_statistics=double
                )
            ).view(V, D)
            for plane_VD in own_LVD
        ]
    )


@pytest.mark.parametrize("counted", [True, False])
def test_errors_and_gaps_are_the_slow_ones(
    study: RunStudy, work: Path, some: StudyReport, counted: bool
) -> None:
    name = "wide" if counted else "uncounted"
    report = some if counted else study("pareto", name, values="bnb-nf4,bnb-fp4-dq")
    own_LVD, weights_V = own_planes(work / name), weights(counted)
    for key, kind, double in (("bnb-nf4", "nf4", False), ("bnb-fp4-dq", "fp4", True)):
        row = by_key(report)[key]
        table, running = naive_errors(own_LVD, bnb_planes(own_LVD, kind, double), weights_V)
        assert row["table_error"] == pytest.approx(table, rel=1e-4)
        assert row["sum_error"] == pytest.approx(running, rel=1e-4)
        bits = naive_bound(own_LVD, weights_V, table)
        assert row["gap_bits"] == pytest.approx(row["bits_per_value"] - bits, abs=0.01)
    assert by_key(report)["bnb-nf4"]["bits_per_value"] == pytest.approx(4.5, abs=0.1)


def test_feedback_is_measured_by_its_running_sum(some: StudyReport, work: Path) -> None:
    own_LVD, weights_V = own_planes(work / "wide"), weights(True)
    for mode in ("feedback", "plain"):
        row = by_key(some)[f"nf4 {mode}"]
        rows = load_runnable(some.files["csv"].parent / "bundles" / f"nf4-{mode}.tol").rows
        assert rows is not None
        found_LVD = torch.stack([p for p in rows.fetch(torch.arange(V)) if p is not None])
        table, running = naive_errors(own_LVD, found_LVD, weights_V)
        assert row["table_error"] == pytest.approx(table, rel=1e-4)
        assert row["sum_error"] == pytest.approx(running, rel=1e-4)
        bits = naive_bound(own_LVD, weights_V, running if mode == "feedback" else table)
        assert row["gap_bits"] == pytest.approx(row["bits_per_value"] - bits, abs=0.01)
    rows_ = by_key(some)
    assert rows_["nf4 feedback"]["sum_error"] < rows_["nf4 plain"]["sum_error"] / 1.5
    assert rows_["nf4 feedback"]["table_error"] > rows_["nf4 plain"]["table_error"] * 1.3


def test_equal_formats_give_equal_points(some: StudyReport) -> None:
    """Our own nf4 and bitsandbytes' decode to the same bits where groups end with a row."""
    ours, theirs = by_key(some)["nf4 plain"], by_key(some)["bnb-nf4"]
    for key in ("kl_mean_nats", "ppl_token", "top1_agreement", "table_error", "sum_error"):
        assert ours[key] == theirs[key]
    assert ours["kl_mean_nats"] > 0
    assert ours["bits_per_value"] > theirs["bits_per_value"]  # checksums, slots and padding


class Planes:
    """A fixed table as a row source."""

    def __init__(self, planes: Sequence[Tensor]) -> None:
        self.planes = planes

    def fetch(self, ids_n: Tensor) -> list[Tensor | None]:
        return [plane_VD[ids_n] for plane_VD in self.planes]


def measured(path: Path, text: Path, planes_LVD: Tensor) -> float:
    """KL of a table against the model itself."""
    model = load_runnable(path)
    candidate = dataclasses.replace(model, rows=Planes(list(planes_LVD)))
    windows = windows_of(read_documents([str(text)]), model.tokenizer, 32, False)
    (result,) = evaluate([candidate], model, windows, device="cpu", progress=SilentProgress())
    value = result.metrics["kl_mean_nats"].value
    assert value is not None
    return value


def test_peers_tables_are_what_is_evaluated(some: StudyReport, work: Path) -> None:
    planes_LVD = bnb_planes(own_planes(work / "wide"), "fp4", True)
    expected = measured(work / "wide", work / "text.txt", planes_LVD)
    assert by_key(some)["bnb-fp4-dq"]["kl_mean_nats"] == pytest.approx(expected, rel=1e-6)


def test_ffn_weights_in_nf4(some: StudyReport, work: Path) -> None:
    model = load_runnable(work / "wide").model
    size_bytes = 0
    for layer in range(L):
        block = model.block(layer)
        assert block.memory_mlp is not None
        size_bytes += 4 * D
        for weight in block.memory_mlp.parameters():
            packed, state = bnb.quantize_4bit(
                weight.detach().flatten(), blocksize=64, quant_type="nf4", compress_statistics=True
            )
            weight.data = bnb.dequantize_4bit(packed, state).view(weight.shape)
            groups = math.ceil(weight.numel() / 64)
            size_bytes += packed.numel() + groups + 4 * math.ceil(groups / 256) + 4 * (16 + 256 + 1)
    row = by_key(some)["ffn-nf4"]
    assert row["bytes"] == size_bytes
    assert row["bits_per_value"] == 8 * size_bytes / (V * L * D)
    with torch.no_grad():
        planes_LVD = torch.stack(
            [p for p in FfnRows(model).fetch(torch.arange(V)) if p is not None]
        )
    table, _ = naive_errors(own_planes(work / "wide"), planes_LVD, weights(True))
    assert row["table_error"] == pytest.approx(table, rel=1e-3)
    expected = measured(work / "wide", work / "text.txt", planes_LVD)
    assert row["kl_mean_nats"] == pytest.approx(expected, rel=1e-4)
    assert torch.equal(load_runnable(work / "wide").model.embedding, model.embedding)


def test_the_page_has_everything(some: StudyReport) -> None:
    page = some.files["md"].read_text()
    for row in some.rows:
        assert f"| {row['method']} |" in page
    assert "- Measured with bitsandbytes " in page
    assert some.files["figure"].stat().st_size > 20_000
    lines = some.files["bound"].read_text().splitlines()
    curve = [tuple(map(float, line.split(","))) for line in lines[1:]]
    assert [bits for bits, _ in curve] == sorted(bits for bits, _ in curve)
    assert all(after < before for (_, before), (_, after) in itertools.pairwise(curve))
    assert dict(curve)[1.0] == by_key(some)["bound 1"]["table_error"]
    assert not (some.files["csv"].parent / "work").exists()


def test_all_that_is_installed_is_measured_and_later_added(study: RunStudy) -> None:
    first = study("pareto", "wide", values="svd-10,bnb-nf4", limit_tokens=64)
    assert [row["key"] for row in first.rows[:3]] == ["svd-10 feedback", "svd-10 plain", "bnb-nf4"]
    report = study("pareto", "wide", limit_tokens=64)
    keys = [row["key"] for row in report.rows]
    own = [f"{own.name} {mode}" for own in OWN for mode in own.modes]
    own = [key for key in own if key in keys]
    assert "bands-3 feedback" in own and "bands-0.5 feedback" not in own
    assert any("bands-0.5" in note and "shared arrays" in note for note in report.notes)
    assert keys[:-5] == [*own, *(peer.name for peer in usable_peers(D)), "ffn-nf4"]
    assert keys[-5:] == [f"bound {bits}" for bits in ("0.5", "1", "2", "4", "8")]
    assert report.reused == 8
    sizes = by_key(report)
    assert sizes["svd-75 plain"]["bytes"] > sizes["svd-25 plain"]["bytes"]
    for row in report.rows[:-5]:
        assert row["kl_mean_nats"] > 0
        assert row["gap_bits"] > 0 or row["key"] == "ffn-nf4"


def test_what_is_not_installed_is_said(study: RunStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    from tolkit.study import pareto_methods

    there = pareto_methods.installed_version
    for place in (pareto_methods, module):
        monkeypatch.setattr(
            place, "installed_version", lambda name: None if name == "hqq" else there(name) or "1"
        )
    report = study("pareto", "wide", values="bnb-nf4", limit_tokens=64)
    assert "Not installed: hqq (pip install 'tolkit[peers]')." in report.notes
    assert not any(peer.package == "hqq" for peer in usable_peers(D))
    for word in ("hqq", "hqq-4"):
        with pytest.raises(ResourceError, match=f"values: '{word}' needs hqq, which is not inst"):
            study("pareto", "wide", values=word)


def test_rows_that_do_not_fit_a_format(study: RunStudy) -> None:
    report = study("pareto", "memory", values="bnb-nf4", limit_tokens=64)
    if any("Not installed: hqq" in note for note in report.notes):
        pytest.skip("hqq is not installed")
    assert "Left out: hqq-4, rows of 32 values are no multiple of 64." in report.notes
    with pytest.raises(UsageError, match="values: 'hqq-4' does not fit, rows of 32 values"):
        study("pareto", "memory", values="hqq-4")


def test_a_bundle_stands_for_its_own_rows(study: RunStudy, work: Path, tmp_path: Path) -> None:
    """A dropped layer's values count as in the bundle's own bits; there are no FFNs to store."""
    wish = CompressSpec(codec="f32", feedback=False, drop=(1,), fold=False)
    quiet: Any = {"resources": Resources(1), "progress": SilentProgress()}
    compress(work / "wide", tmp_path / "b.tol", wish, **quiet)
    report = study("pareto", "b.tol", values="nf4,bnb-nf4,ffn-nf4", limit_tokens=64)
    row = by_key(report)["bnb-nf4"]
    assert row["bits_per_value"] == pytest.approx(4.5 * 3 / 4, abs=0.1)
    assert row["kl_mean_nats"] == by_key(report)["nf4 plain"]["kl_mean_nats"]
    assert "ffn-nf4" not in by_key(report)
    with pytest.raises(UsageError, match="values: 'ffn-nf4' needs FFN weights"):
        study("pareto", "b.tol", values="ffn-nf4")
    own_LVD = own_planes(work / "wide")[[0, 2, 3]]
    flat_LVD = bnb_planes(own_LVD, "nf4", False)
    assert row["table_error"] == pytest.approx(
        float(
            (weights(True)[:, None] * (flat_LVD - own_LVD).double().square()).sum()
            / (weights(True)[:, None] * (own_LVD - centre(own_LVD)).double().square()).sum()
        ),
        rel=1e-3,
    )


def centre(planes_LVD: Tensor) -> Tensor:
    """Weighted mean rows [L, 1, D]."""
    weights_V1 = weights(True)[:, None]
    return ((planes_LVD.double() * weights_V1).sum(1, keepdim=True) / weights_V1.sum()).float()


def test_the_frontier_leaves_out_what_is_beaten() -> None:
    points = [(4.0, 0.3), (1.0, 0.9), (2.0, 1.0), (3.0, 0.3), (8.0, 0.1)]
    rows = [{"bits_per_value": bits, "kl_mean_nats": kl} for bits, kl in points]
    found = [(row["bits_per_value"], row["kl_mean_nats"]) for row in frontier(rows)]
    assert found == [(1.0, 0.9), (3.0, 0.3), (8.0, 0.1)]
