"""Bundles of every format version, read for ever: same identity, same rows, bit for bit.

A failure here means that a reader of today no longer reads what was published. Mend the reader.
"""

from __future__ import annotations

import hashlib
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _coded import stranger_symbols

from tolkit.tables import load_runnable
from tolkit_formats import open_bundle, verify
from tolkit_formats.codecs import Bands
from tolkit_formats.tensorfile import TensorFile

HERE = Path(__file__).parent
VERSIONS = ("v1.0", "v1.1", "v1.2")


def _goldens() -> dict[str, tuple[Path, dict[str, Any]]]:
    found = {}
    for version in VERSIONS:
        provenance = tomllib.loads((HERE / version / "PROVENANCE.toml").read_text())
        for name, about in provenance["bundles"].items():
            found[f"{version}/{name}"] = (HERE / version / f"{name}.tol", about)
    return found


GOLDENS = _goldens()
each = pytest.mark.parametrize(("path", "about"), GOLDENS.values(), ids=GOLDENS.keys())


def rows_beside(path: Path) -> np.ndarray:
    file = TensorFile(path.with_suffix(".rows.safetensors"))
    return np.array(file.array("rows"))


def test_every_codec_is_there() -> None:
    stored = set()
    for path, _ in GOLDENS.values():
        for plane in open_bundle(path).manifest.tiers[0].planes:
            described = plane.codec.to_json()
            stored.add(str(described.get("dtype", described["name"])))
    assert stored == {"f32", "f16", "bf16", "int8", "int4", "nf4", "fp4", "svd", "bands", "steps"}
    assert len(GOLDENS) == 15


@each
def test_bytes_are_the_published_ones(path: Path, about: dict[str, Any]) -> None:
    report = verify(path)
    assert report.identity == about["identity"]
    for file, key in (
        (path / "tol.json", "manifest_sha256"),
        (path.with_suffix(".rows.safetensors"), "rows_sha256"),
    ):
        assert hashlib.sha256(file.read_bytes()).hexdigest() == about[key]


@each
def test_rows_are_the_published_ones(path: Path, about: dict[str, Any]) -> None:
    bundle = open_bundle(path)
    has_record = bundle.has_record(np.arange(bundle.vocab_size))
    want, got = rows_beside(path)[has_record], bundle.rows(np.flatnonzero(has_record))
    assert got.dtype == want.dtype and got.shape == want.shape
    if not path.name.startswith(("svd", "bands", "steps")):
        assert np.array_equal(got.view(np.uint32), want.view(np.uint32))
        return
    # A product of matrices may be summed in any order (SPEC section 6).
    norm = np.linalg.norm(want, axis=-1, keepdims=True)
    assert (np.abs(got - want) <= 1e-6 * norm).all()


def test_rows_that_the_partial_one_computes() -> None:
    path = HERE / "v1.2" / "partial-folded-dropped.tol"
    bundle, want = open_bundle(path), rows_beside(path)
    assert bundle.manifest.version == (1, 2) and bundle.layer_ids == (0, 2)
    cold = np.flatnonzero(~bundle.has_record(np.arange(bundle.vocab_size)))
    assert len(cold) == 28
    rows = load_runnable(path).rows
    assert rows is not None
    planes = rows.fetch(torch.from_numpy(cold))
    for place, layer in enumerate(bundle.layer_ids):
        plane = planes[layer]
        assert plane is not None
        off = np.linalg.norm(plane.numpy() - want[cold, place], axis=1)
        assert (off <= 1e-6 * np.linalg.norm(want[cold, place], axis=1)).all()


@each
def test_they_run(path: Path, about: dict[str, Any]) -> None:
    runnable = load_runnable(path)
    ids = torch.tensor([runnable.tokenizer.encode("golden rows 10")])
    logits = runnable.model(ids, rows=runnable.rows)
    assert logits.shape == (1, 14, open_bundle(path).vocab_size) and bool(
        torch.isfinite(logits).all()
    )


def test_layers_and_slots_of_the_mapped_one() -> None:
    bundle = open_bundle(HERE / "v1.0" / "mapped-folded-dropped.tol")
    assert bundle.layer_ids == (0, 2)
    assert [layer.status for layer in bundle.manifest.layers] == [
        "kept", "folded", "kept", "dropped"
    ]  # fmt: skip
    assert bundle.manifest.layers[1].into == 2
    counts, slots = bundle.token_counts(), bundle.slot_of_token
    assert counts is not None and slots is not None
    order = sorted(range(40), key=lambda i: (-int(counts[i]), i))
    assert slots.tolist() == np.argsort(order).tolist() != list(range(40))


@pytest.mark.parametrize("name", ["bands-klt", "bands-hadamard"])
def test_tiers_of_the_bands_ones(name: str) -> None:
    manifest = open_bundle(HERE / "v1.0" / f"{name}.tol").manifest
    assert [tier.num_rows for tier in manifest.tiers] == [36, 36]
    frequent, rare = (tier.stride for tier in manifest.tiers)
    assert frequent > rare
    assert sorted(manifest.predictors) == ([0, 1, 2] if name == "bands-klt" else [])
    widths = {
        int(width)
        for tier in manifest.tiers
        for plane in tier.planes
        if isinstance(plane.codec, Bands)
        for width in plane.codec.widths_R
    }
    assert len(widths) >= 4


@pytest.mark.parametrize("name", ["steps-klt", "steps-hadamard"])
def test_symbols_of_the_coded_ones(name: str) -> None:
    path = HERE / "v1.1" / f"{name}.tol"
    bundle = open_bundle(path)
    assert bundle.manifest.version == (1, 1)
    assert [tier.num_rows for tier in bundle.manifest.tiers] == [36, 36]
    for tier, symbols in zip(bundle.manifest.tiers, stranger_symbols(path), strict=True):
        got = bundle.shards.unchecked_run(tier, 0, tier.num_rows)
        assert got.tolist() == symbols and len(np.unique(got)) >= 4


def test_the_script_never_makes_them_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    make = __import__("make")
    try:
        for version in VERSIONS:
            with pytest.raises(FileExistsError):
                make.make(HERE / version, version)
        make.make(tmp_path / "new")
    finally:
        sys.modules.pop("make", None)
    fresh = tomllib.loads((tmp_path / "new" / "PROVENANCE.toml").read_text())
    assert list(fresh["bundles"]) == [golden.name for golden in make.GOLDENS]
    assert len(list((tmp_path / "new").glob("*.rows.safetensors"))) == len(make.GOLDENS)
