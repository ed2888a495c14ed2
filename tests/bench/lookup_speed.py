"""Rates of looking rows up, beside a bare gather from a mapped array.

    python tests/bench/lookup_speed.py [--folder DIR] [--rounds 7] [--only CODEC,..]

Bundles of V 4,096, L 8, D 1,024 with drawn codes (entropy-coded: L 4, D 512, compressed) are made
in the folder (some 250 MB) and read once, so everything is in the page cache. Batches are distinct
random tokens. Every figure is the median of rounds in which all cases take turns, in rows (tokens,
all layers) a second and as a share of the bare gather of the same round: of the record's bytes for
what gives bytes, of float32 rows for what gives rows. One thread.

Targets: record bytes and float32 rows >= 80 %, nf4 in torch >= 50 %.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from _pico import pico_checkpoint
from _sparse import write_drawn

from tolkit.compress import CompressSpec, compress
from tolkit.progress import SilentProgress
from tolkit.runtime import open_table_rows
from tolkit_formats import Bundle, open_bundle
from tolkit_formats.cached_rows import CachedRows

V, L, D = 4096, 8, 1024
BATCHES = (1, 64, 1024, 4096)
CODECS: Mapping[str, dict[str, Any]] = {
    "f32": {"name": "raw", "dtype": "f32"},
    "f16": {"name": "raw", "dtype": "f16"},
    "int8": {"name": "int8"},
    "int4": {"name": "int4", "group_size": 64},
    "nf4": {"name": "nf4", "group_size": 64},
    "svd": {"name": "svd", "rank": 256, "inner": {"name": "int8"}},
    "bands": {
        "name": "bands",
        "tier": 0,
        "runs": "64x5 192x3",
        "codebooks": [3, 5],
        "basis": "64x8 192x6",
        "exponent": 0,
    },
}
Case = Callable[[np.ndarray], object]


def make(name: str, path: Path) -> Bundle:
    """A bundle of drawn bytes; for entropy-coded rows a compressed checkpoint (half a minute)."""
    if name != "steps":
        write_drawn(path, CODECS[name], vocab_size=V, num_layers=L, hidden_size=D)
        return open_bundle(path)
    shape = {"vocab_size": V, "hidden_size": 512, "num_hidden_layers": 4}
    checkpoint = pico_checkpoint(
        path.with_suffix(".ckpt"), counts=False, memory_intermediate_size=64, **shape
    )
    spec = CompressSpec(bits_per_value=1.0, coding="entropy")
    compress(checkpoint, path, spec, progress=SilentProgress())
    return open_bundle(path)


def bare_gathers(bundle: Bundle, folder: Path) -> dict[str, Case]:
    """Gathers of float32 rows, and of records where they have one length, from mapped arrays."""
    tier = bundle.manifest.tiers[0]
    width = bundle.num_layers * bundle.hidden_size
    floats = folder / f"rows-{width}.f32"
    if not floats.exists():
        np.random.default_rng(0).standard_normal((V, width), np.float32).tofile(floats)
    rows_VW = np.memmap(floats, np.float32, "r", 0, (V, width))
    gathers: dict[str, Case] = {"rows": lambda ids: rows_VW.take(ids, axis=0)}
    if not tier.coded:
        (shard,) = (bundle.path / "tables").glob("records-*")
        start = shard.stat().st_size - V * tier.stride
        records_VS = np.memmap(shard, np.uint8, "r", start, (V, tier.stride))
        gathers["records"] = lambda ids: records_VS.take(ids, axis=0)
        gathers["Bundle.records"] = bundle.records
    return gathers


def cases_of(bundle: Bundle, folder: Path) -> dict[str, Case]:
    """What is timed on a bundle; the bare gathers under ``records`` and ``rows``."""
    cache_bytes = 2 * bundle.manifest.tiers[0].stride * V + (1 << 20)
    disk = CachedRows(bundle, cache_bytes=cache_bytes, seed=False)
    disk.load(np.arange(V))
    bundle.rows(np.arange(V))  # compared with their CRC-32 once
    host = open_table_rows(bundle, "host")
    return {
        **bare_gathers(bundle, folder),
        "CachedRows.records": disk.records,
        "Bundle.rows": bundle.rows,
        "CachedRows.rows": disk.rows,
        "torch": lambda ids: list(host.fetch(torch.from_numpy(ids))),
    }


def measure(cases: Mapping[str, Case], batch: int, rounds: int) -> dict[str, list[float]]:
    """Seconds a call of each case, rounds interleaved."""
    rng = np.random.default_rng(batch)
    repeats = max(1, 256 // batch)
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        draws = [rng.choice(V, batch, replace=False) for _ in range(repeats)]
        order = list(cases)  # each goes first, and after each other, in some round
        for name in order[number % len(order) :] + order[: number % len(order)]:
            case = cases[name]
            started = time.perf_counter()
            for ids in draws:
                case(ids)
            if number:  # the first round is not counted
                taken[name].append((time.perf_counter() - started) / repeats)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default=",".join((*CODECS, "steps")))
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| codec | batch | what | rows/s | share of a bare gather |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=args.folder) as work:
        for name in args.only.split(","):
            cases = cases_of(make(name, Path(work) / f"{name}.tol"), Path(work))
            for batch in BATCHES:
                taken = measure(cases, batch, args.rounds)
                for what, seconds in taken.items():
                    bare = taken["records" if "records" in what and "records" in taken else "rows"]
                    share = statistics.median(b / s for b, s in zip(bare, seconds, strict=True))
                    rate = batch / statistics.median(seconds)
                    print(f"| {name} | {batch} | {what} | {rate:,.0f} | {share:.2f} |", flush=True)


if __name__ == "__main__":
    main()
