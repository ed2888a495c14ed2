"""Codec bands where tables, counts or wishes are extreme."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from _fitted import lost, rows_of, run
from _nano import RAW_F32, write_nano
from _pico import pico_counts, pico_model, pico_tokenizer_files

from tolkit.build import build
from tolkit.compress import CompressSpec
from tolkit.compress.fill import bands as fit_bands
from tolkit.compress.spec import BandsWish
from tolkit.errors import NonFiniteError, UsageError
from tolkit.model import save_checkpoint
from tolkit.progress import SilentProgress
from tolkit_formats import open_bundle, verify


@pytest.mark.parametrize("factor", [1e-8, 3e4])
def test_spilled_walks_of_any_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    """Spilled in f16, whose numbers neither factor would leave alone."""
    source = change_weights(tmp_path / "ckpt", lambda state: scale_down(state, factor))
    build(source, tmp_path / "exact.tol", dtype="f32", progress=SilentProgress())
    want = rows_of(tmp_path / "exact.tol").astype(float)
    errors = []
    for rows in (100, 50):
        monkeypatch.setattr(fit_bands, "_SAMPLED_ROWS", rows)
        run(source, tmp_path / f"{rows}.tol", bits_per_value=20.0, bands=BandsWish("klt", 0))
        errors.append(lost(rows_of(tmp_path / f"{rows}.tol").astype(float), want))
    assert errors[1] <= 1.1 * errors[0] < 0.2


@pytest.mark.parametrize(
    ("overrides", "counts"),
    [
        ({"hidden_size": 40}, "zipf"),
        ({"num_hidden_layers": 1}, "zipf"),
        ({}, "none"),
        ({}, "zeros"),
        ({}, "equal"),
        ({}, "one token"),
    ],
    ids=["D of blocks of 8", "one layer", "no counts", "zeros", "equal", "one token"],
)
@pytest.mark.parametrize("transform", ["klt", "hadamard"])
def test_corners(tmp_path: Path, overrides: dict[str, int], counts: str, transform: str) -> None:
    config = {"hidden_size": 32, "num_hidden_layers": 2, **overrides}
    counts_V = {
        "none": None,
        "zipf": pico_counts(),
        "zeros": np.zeros(96, np.uint64),
        "equal": np.full(96, 9, np.uint64),
        "one token": (np.arange(96) == 5).astype(np.uint64) * np.uint64(10**12),
    }[counts]
    save_checkpoint(
        pico_model("memory", **config), tmp_path / "ckpt", pico_tokenizer_files(), counts_V
    )
    build(tmp_path / "ckpt", tmp_path / "exact.tol", dtype="f32", progress=SilentProgress())
    run(
        tmp_path / "ckpt", tmp_path / "b.tol", bits_per_value=20.0, bands=BandsWish(transform, None)
    )
    assert lost(rows_of(tmp_path / "b.tol"), rows_of(tmp_path / "exact.tol")) < 0.35


@pytest.mark.parametrize(("vocab_size", "width"), [(1, 7), (2, 1), (33, 12), (70, 7)])
@pytest.mark.parametrize("transform", ["klt", "hadamard"])
def test_bundles_of_any_width(tmp_path: Path, vocab_size: int, width: int, transform: str) -> None:
    codecs = [RAW_F32] * 3
    nano = write_nano(
        tmp_path / "n.tol", codecs, vocab_size=vocab_size, hidden_size=width, tokenizer=False
    )
    wish = BandsWish(transform, 0)
    run(nano.path, tmp_path / "b.tol", budget_bytes=20_000, bands=wish)
    bundle = open_bundle(tmp_path / "b.tol")
    verify(bundle.path)
    assert lost(bundle.rows(np.arange(vocab_size)), nano.rows_VKD) < 0.1


def change_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    model = pico_model("memory", num_hidden_layers=2)
    with torch.no_grad():
        change(model.state_dict())
    save_checkpoint(model, path, pico_tokenizer_files(), pico_counts())
    return path


DOWN = "model.layers.{}.memory_mlp.down_proj.weight"


def scale_down(state: dict[str, torch.Tensor], factor: float) -> None:
    for layer in range(2):
        state[DOWN.format(layer)].mul_(factor)


def all_zero(state: dict[str, torch.Tensor]) -> None:
    for layer in range(2):
        state[DOWN.format(layer)].zero_()


def first_zero(state: dict[str, torch.Tensor]) -> None:
    state[DOWN.format(0)].zero_()


def one_component(state: dict[str, torch.Tensor]) -> None:
    for layer in range(2):
        state[DOWN.format(layer)][1:] = 0


def tiny(state: dict[str, torch.Tensor]) -> None:
    scale_down(state, 1e-20)


def enormous(state: dict[str, torch.Tensor]) -> None:
    scale_down(state, 1e15)


@pytest.mark.parametrize("change", [all_zero, first_zero, one_component, tiny, enormous])
@pytest.mark.parametrize("transform", ["klt", "hadamard"])
def test_extreme_tables(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], transform: str
) -> None:
    source = change_weights(tmp_path / "ckpt", change)
    build(source, tmp_path / "exact.tol", dtype="f32", progress=SilentProgress())
    run(source, tmp_path / "b.tol", bits_per_value=20.0, bands=BandsWish(transform, 3))
    got, want = rows_of(tmp_path / "b.tol").astype(float), rows_of(tmp_path / "exact.tol")
    if change is all_zero:
        assert not got.any()
    else:
        assert lost(got, want.astype(float)) < 0.35
    if change is one_component:
        assert np.abs(got[:, :, 1:]).max() <= 1e-3 * np.abs(want).max()


@pytest.mark.parametrize(("factor", "words"), [(1e30, "covariance"), (1e38, "")])
def test_rows_too_large_for_sums_are_named(tmp_path: Path, factor: float, words: str) -> None:
    def overflow(state: dict[str, torch.Tensor]) -> None:
        state[DOWN.format(1)].mul_(factor)

    source = change_weights(tmp_path / "ckpt", overflow)
    with pytest.raises(NonFiniteError, match=f"ckpt: layer 1: .*{words}"):
        run(source, tmp_path / "b.tol", bits_per_value=20.0)
    assert not list(tmp_path.glob("b.tol*"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"codec": "bands"}, "exactly one of"),
        ({"bits_per_value": 1.0, "budget_bytes": 5}, "exactly one of"),
        ({"codec": "nf4", "bits_per_value": 1.0}, "fills no budget"),
        ({"bits_per_value": 1.0, "rank": "50%"}, "--rank"),
        ({"bits_per_value": 0.0}, "--bits-per-value"),
        ({"bits_per_value": float("nan")}, "--bits-per-value"),
        ({"bits_per_value": 33.0}, "--bits-per-value"),
        ({"budget_bytes": 0}, "--budget"),
        ({"codec": "nf4", "calibration": "m.safetensors"}, "--calibration"),
    ],
)
def test_wishes_that_contradict_themselves(options: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        CompressSpec(**options)
