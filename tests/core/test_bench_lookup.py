"""Look-ups: what is measured, in which state, of how many bytes; how fast is not judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from _bands import write_bands
from _coded import write_coded
from _nano import NF4, RAW_F32, write_nano
from _pages import require_evictable

from tolkit.bench import LookupSpec, bench_lookup
from tolkit.bench.lookup import _gathered, _read
from tolkit.errors import ResourceError, UsageError
from tolkit_formats import open_bundle

BOTH = {(what, "warm") for what in ("memmap gather", "numpy reader", "disk")}
PLACES = {("host", ""), ("device", ""), ("disk", "cached")}


def test_every_way_in_every_state(tmp_path: Path) -> None:
    require_evictable(tmp_path)
    write_nano(tmp_path / "b.tol", [RAW_F32, NF4])
    bundle = open_bundle(tmp_path / "b.tol")
    (tier,) = bundle.manifest.tiers
    report = bench_lookup(LookupSpec(bundle.path, (1, 8), repeats=2, device="cpu"))
    cold = {(what, "cold") for what, _ in BOTH}
    for batch in (1, 8):
        found = [r for r in report.results if r.batch == batch]
        assert {(r.what, r.state) for r in found} == BOTH | cold | PLACES
        assert len(found) == len(BOTH | cold | PLACES)
    for result in report.results:
        assert result.rows_per_s is not None and result.rows_per_s > 0
        assert result.bytes_per_s == pytest.approx(result.rows_per_s * tier.stride)
        if result.what in {"memmap gather", "numpy reader"}:
            assert result.decoded_bytes_per_s is None
        else:
            row_bytes = 4 * len(bundle.layer_ids) * bundle.hidden_size
            assert result.decoded_bytes_per_s == pytest.approx(result.rows_per_s * row_bytes)
        expected = {"cold": 0, "warm": 1}.get(result.state)
        assert result.resident_before == expected
        assert result.ratio is not None and result.ratio > 0
        if result.what == "memmap gather":
            assert result.ratio == 1
    assert (report.record_bytes, report.table_bytes) == (tier.stride, bundle.table_bytes)


@pytest.mark.parametrize("write", [write_bands, write_coded])
def test_tiers_and_coded_records(write: Any, tmp_path: Path) -> None:
    write(tmp_path / "b.tol")
    bundle = open_bundle(tmp_path / "b.tol")
    spec = LookupSpec(bundle.path, states=("warm",), repeats=1, device="cpu")
    report = bench_lookup(spec)
    coded = bundle.manifest.coding is not None
    assert {r.what for r in report.results if r.batch == 1} == {
        "numpy reader",
        "disk",
        "host",
        "device",
        *(() if coded else ("memmap gather",)),
    }
    assert all((r.ratio is None) == coded for r in report.results)
    assert {r.batch for r in report.results} <= {1, 64}


def test_the_gather_takes_the_readers_bytes(tmp_path: Path) -> None:
    write_bands(tmp_path / "b.tol")
    bundle = open_bundle(tmp_path / "b.tol")
    slots_V = bundle.slot_of_token
    tokens = torch.arange(bundle.vocab_size).numpy()
    if slots_V is not None:
        tokens = tokens[slots_V < bundle.manifest.num_rows]
    gathered, read = _gathered(bundle)(tokens)(), _read(bundle, tokens)
    assert sum(len(part) for part in gathered) == len(tokens)
    assert [part.tobytes() for part in gathered] == [part.tobytes() for part in read]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batches": (1000,)}, "batch: expected at most the"),
        ({"batches": (0,)}, "batch: expected numbers of at least 1"),
        ({"tables": ("tape",)}, "tables: expected disk"),
        ({"states": ("hot",)}, "state: expected cold, warm"),
        ({"repeats": 0}, "repeats: expected at least 1"),
        ({"max_table_bytes": 10}, "10 bytes hold no record"),
    ],
)
def test_what_cannot_be_looked_up(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    write_nano(tmp_path / "b.tol", [NF4])
    with pytest.raises(UsageError, match=said):
        bench_lookup(LookupSpec(**{"bundle": tmp_path / "b.tol", "states": ("warm",), **options}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_no_gpu_is_said(tmp_path: Path) -> None:
    write_nano(tmp_path / "b.tol", [NF4])
    with pytest.raises(ResourceError, match="cuda"):
        bench_lookup(LookupSpec(tmp_path / "b.tol", device="cuda"))
