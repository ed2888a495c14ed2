"""Anonymous memory of serving a table of the 1B shape from disk.

    python tests/bench/served_memory.py [--folder DIR] [--codec f16|nf4] [--cache-mib 64]
        [--dtype bfloat16|float32]

Makes a bundle of V 128,256, L 24, D 2048 in sparse files (12.6 GB in f16, a few MB of disk) and
asks `open_table_rows(..., "disk")` for random tokens in batches of 1 to 2,048, each in a process
of its own, touching every layer's rows as a decoder does. RssAnon is sampled every millisecond:
mapped and cached file pages are left out. Baseline: after imports, before the bundle is opened.

Target: peak <= baseline + cache + 64 MiB.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from _memory import MIB, PeakMemory, anonymous_bytes

sys.path.insert(0, str(Path(__file__).parents[1]))

from _sparse import write_sparse

from tolkit.runtime import open_table_rows
from tolkit_formats import open_bundle

BATCHES = ((1, 1000), (64, 20), (512, 4), (2048, 2))
CODECS = {"f16": {"name": "raw", "dtype": "f16"}, "nf4": {"name": "nf4", "group_size": 64}}


def serve(path: Path, batch: int, rounds: int, cache_bytes: int, dtype: torch.dtype) -> str:
    """One line of the table, measured in this process."""
    torch.set_num_threads(1)
    torch.zeros(8).add_(1)  # the first operation of a process allocates what it keeps
    baseline = anonymous_bytes()
    bundle = open_bundle(path, check_crc=False)
    rows = open_table_rows(bundle, "disk", dtype=dtype, max_table_bytes=cache_bytes)
    generator = torch.Generator().manual_seed(0)
    started = time.perf_counter()
    with PeakMemory(0.001) as watch:
        for _ in range(rounds):
            ids_n = torch.randint(0, bundle.vocab_size, (batch,), generator=generator).unique()
            if batch > 1:
                rows.prefetch(ids_n)
            for plane_nD in rows.fetch(ids_n):
                assert plane_nD is not None and not plane_nD[-1].any()
    elapsed_s = time.perf_counter() - started
    seen = rows.statistics
    over_mib = (watch.peak_bytes - baseline - cache_bytes) / MIB
    return (
        f"| {batch} | {baseline / MIB:.1f} | {over_mib:.1f} | {1000 * elapsed_s / rounds:.1f} | "
        f"{seen.bytes_read / seen.rows_distinct:,.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--codec", choices=CODECS, default="f16")
    parser.add_argument("--cache-mib", type=int, default=64)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        path, batch, rounds = args.serve
        dtype = torch.bfloat16 if args.dtype == "bfloat16" else torch.float32
        print(serve(Path(path), int(batch), int(rounds), args.cache_mib * MIB, dtype))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "b.tol"
        write_sparse(path, CODECS[args.codec], vocab_size=128_256, num_layers=24, hidden_size=2048)
        table_bytes = open_bundle(path, check_crc=False).table_bytes
        print(f"{args.codec}: tables {table_bytes:,} bytes, cache {args.cache_mib} MiB")
        print("| batch | baseline, MiB | peak over baseline + cache, MiB | ms a batch |", end="")
        print(" bytes read a token |")
        print("|---|---|---|---|---|", flush=True)
        for batch, rounds in BATCHES:
            command = [sys.executable, __file__, "--cache-mib", str(args.cache_mib)]
            command += ["--dtype", args.dtype, "--serve", str(path), str(batch), str(rounds)]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
