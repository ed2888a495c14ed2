"""Variants by adjusting rows, against models changed by hand and bundles written to disk."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from _eval_fakes import documents_of
from _pico import pico_checkpoint, pico_ids

from tolkit.bundling import Resources
from tolkit.compress import CompressSpec, compress
from tolkit.errors import UsageError
from tolkit.evaluate import EvalResult, evaluate, windows_of
from tolkit.evaluate.adjust import MemoRows, scaled, without_ffn, without_layers
from tolkit.model import FfnRows
from tolkit.progress import SilentProgress
from tolkit.tables import Runnable, load_runnable

SAME = ("ppl_token", "ppl_increase", "kl_mean_nats", "top1_agreement")


@pytest.fixture(scope="module", params=["memory", "flex"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runnable:
    path = tmp_path_factory.mktemp("model") / "ckpt"
    return load_runnable(pico_checkpoint(path, request.param, num_hidden_layers=4))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Runnable:
    return load_runnable(pico_checkpoint(tmp_path_factory.mktemp("dense") / "ckpt", "dense"))


def measured(candidates: list[Runnable], reference: Runnable) -> list[EvalResult]:
    windows = windows_of(documents_of(150, 90, 40), reference.tokenizer, 32)
    return evaluate(candidates, reference, windows, device="cpu", progress=SilentProgress())


def values(result: EvalResult) -> list[float]:
    return [result.metrics[name].value for name in SAME]


def test_alpha_one_is_the_model_exactly(model: Runnable) -> None:
    (result,) = measured([scaled(model, 1.0)], model)
    assert values(result)[1:] == [0.0, 0.0, 1.0]


def test_alpha_scales_the_down_projections(model: Runnable) -> None:
    half = load_runnable(model.path)
    with torch.no_grad():
        for layer in range(4):
            mlp = half.model.block(layer).memory_mlp
            assert mlp is not None
            mlp.down_proj.weight.mul_(0.5)
    ours, by_hand = measured([scaled(model, 0.5), half], model)
    assert values(ours) == pytest.approx(values(by_hand), rel=1e-5)
    assert ours.metrics["kl_mean_nats"].value > 0.01


@pytest.mark.parametrize("alpha", [-0.1, math.nan, math.inf])
def test_an_alpha_that_means_nothing(model: Runnable, alpha: float) -> None:
    with pytest.raises(UsageError, match="alpha: expected a finite number of at least 0"):
        scaled(model, alpha)


def test_adjustments_add_up(model: Runnable) -> None:
    twice, once = scaled(scaled(model, 0.5), 0.5), scaled(model, 0.25)
    a, b = measured([twice, once], model)
    assert values(a) == values(b)


@pytest.mark.parametrize(
    ("gone", "fold"),
    [((0,), True), ((1, 2), True), ((3,), True), ((2, 3), True), ((0,), False), ((1, 3), False)],
)
def test_left_out_layers_equal_the_bundle_without_them(
    model: Runnable, tmp_path: Path, gone: tuple[int, ...], fold: bool
) -> None:
    bundle = tmp_path / "b.tol"
    wish = CompressSpec(codec="f32", drop=gone, fold=fold, feedback=False)
    compress(model.path, bundle, wish, resources=Resources(1), progress=SilentProgress())
    kept = [layer for layer in range(4) if layer not in gone]
    into = {
        layer: next((k for k in kept if k > layer), kept[-1]) if fold else None for layer in gone
    }
    ours, stored = measured([without_layers(model, into), load_runnable(bundle)], model)
    assert values(ours) == pytest.approx(values(stored), rel=1e-4, abs=1e-6)
    assert ours.metrics["kl_mean_nats"].value > 1e-3


def test_without_any_table_nothing_is_added(model: Runnable) -> None:
    none = without_layers(model, dict.fromkeys(range(4)))
    zero = scaled(model, 0.0)
    a, b = measured([none, zero], model)
    assert values(a) == pytest.approx(values(b), rel=1e-6)


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ({4: None}, "layer: 4 has no table"),
        ({-1: None}, "layer: -1 has no table"),
        ({0: 4}, "layer: 0 is folded into 4"),
        ({0: 1, 1: None}, "layer: 0 is folded into 1"),
    ],
)
def test_layers_that_cannot_be_left_out(model: Runnable, gone: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        without_layers(model, gone)


def test_a_layer_that_is_gone_already(model: Runnable) -> None:
    once = without_layers(model, {1: 2})
    with pytest.raises(UsageError, match="layer: 1 has no table"):
        without_layers(once, {1: None})


def test_a_dense_models_ffn_is_left_out_without_touching_it(dense: Runnable) -> None:
    silent = load_runnable(dense.path)
    with torch.no_grad():
        silent.model.block(1).mlp.down_proj.weight.zero_()  # type: ignore[union-attr]
    before = {name: weight.clone() for name, weight in dense.model.state_dict().items()}
    variant = without_ffn(dense, 1)
    assert variant.model.embedding is dense.model.embedding
    ours, by_hand = measured([variant, silent], dense)
    assert values(ours) == pytest.approx(values(by_hand), rel=1e-6)
    assert dense.model.block(1).mlp is not None
    assert all(torch.equal(before[name], w) for name, w in dense.model.state_dict().items())


def test_tables_and_dense_ffns_are_not_mixed_up(model: Runnable, dense: Runnable) -> None:
    for call in (lambda: scaled(dense, 0.5), lambda: without_layers(dense, {0: None})):
        with pytest.raises(UsageError, match="is a dense model"):
            call()
    with pytest.raises(UsageError, match="its FFNs are tables"):
        without_ffn(model, 0)
    with pytest.raises(UsageError, match="layer: 2 is out of range, expected 0 to 1"):
        without_ffn(dense, 2)


def test_shared_rows_are_worked_out_once_a_batch(model: Runnable) -> None:
    calls: list[int] = []

    class Counting(FfnRows):
        def fetch(self, ids_n: torch.Tensor):
            calls.append(len(ids_n))
            return super().fetch(ids_n)

    memo = MemoRows(Counting(model.model))
    ids, others = pico_ids(seed=1), pico_ids(seed=2)
    shared = dataclasses.replace(model, rows=memo)
    with torch.inference_mode():
        for batch in (ids, ids.clone(), others, ids):
            assert torch.equal(model.model(batch, rows=memo), model.model(batch))
    assert len(calls) == 3
    plain = measured([scaled(model, 0.7), without_layers(model, {0: 1})], model)
    remembered = measured([scaled(shared, 0.7), without_layers(shared, {0: 1})], shared)
    assert [values(r) for r in plain] == [values(r) for r in remembered]
