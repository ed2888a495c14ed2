"""Table look-ups on a device: kernels against torch, and their speed against a plain copy.

The bytes a look-up must move are the records it reads and the rows it writes; a copy of a large
tensor moves its bytes twice. The share is the one rate over the other. Tables are drawn, calls are
timed as replays of a CUDA graph. Part of gpu.py; alone:

    python tests/bench/gpu_tables.py [--device cpu]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from _drawn_tables import DrawnBundle, shapes_of_codecs
from _kernels import WRITERS, require, run_case

from tolkit.runtime.device_tables import DeviceTables
from tolkit.runtime.kernels import why_not
from tolkit_formats.reader import Bundle

ROWS = (1, 64, 4096)
ROUNDS = 20
TARGET_SHARE = 0.6


def check_kernels(device: torch.device) -> None:
    """Every case of tests/_kernels.py on the device; AssertionError where one is off."""
    worst: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for i, name in enumerate(WRITERS):
            own = Path(folder) / str(i)
            own.mkdir()
            result = run_case(name, own, device)
            require(name, result, interpreted=False)
            for dtype, figures in result.items():
                worst[dtype] = max(worst.get(dtype, 0.0), figures["worst"])
    parts = ", ".join(f"{dtype[6:]} {error:.1e}" for dtype, error in worst.items())
    print(f"kernels against torch, {len(WRITERS)} bundles: largest error over the norm: {parts}")


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Median seconds of a call; on CUDA of a captured graph's replay, without Python's part."""
    if device.type != "cuda":
        call()
        elapsed_s = []
        for _ in range(3):
            started_s = time.perf_counter()
            call()
            elapsed_s.append(time.perf_counter() - started_s)
        return statistics.median(elapsed_s)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()
    graph.replay()
    elapsed_s = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        elapsed_s.append(begin.elapsed_time(end) / 1e3)
    del kept
    return statistics.median(elapsed_s)


def copy_rate(device: torch.device) -> float:
    """Bytes a second that a plain copy moves, read and written."""
    size_bytes = 1 << (30 if device.type == "cuda" else 24)
    source = torch.ones(size_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size_bytes / seconds_of(lambda: target.copy_(source), device)


def measure_look_ups(
    device: torch.device, *, vocab_size: int, num_layers: int, width: int, dtype: torch.dtype
) -> None:
    """One table: a line a codec and number of rows, both paths where there are two."""
    bare = copy_rate(device)
    fused = why_not(device) is None
    name = str(dtype)[6:]
    shape = f"V {vocab_size:,} x L {num_layers} x D {width}"
    print(f"\nlook-up, {shape}, rows in {name}; a copy moves {bare / 1e9:,.0f} GB/s")
    print("| codec | rows | kernels ms | GB/s | of a copy | torch ms | kernels' error |")
    print("|---|---|---|---|---|---|---|")
    for label, codec in shapes_of_codecs(width).items():
        drawn = DrawnBundle(codec, vocab_size=vocab_size, num_layers=num_layers)
        bundle = cast(Bundle, drawn)
        paths = {"torch": DeviceTables(bundle, device, dtype, kernels=False)}
        if fused:
            paths["kernels"] = DeviceTables(bundle, device, dtype, kernels=True)
        (tier,) = drawn.manifest.tiers
        for rows in ROWS:
            ids = torch.randint(0, vocab_size, (rows,), device=device)
            moved = rows * (tier.stride + num_layers * width * dtype.itemsize)
            took_s = {
                path: seconds_of(lambda t=tables, i=ids: t.rows(i), device)
                for path, tables in paths.items()
            }
            torch_ms = f"{took_s['torch'] * 1e3:.3f}"
            if "kernels" not in paths:
                print(f"| {label} | {rows:,} | not measured | | | {torch_ms} | |")
                continue
            rate = moved / took_s["kernels"]
            error = _error(paths["kernels"].rows(ids), paths["torch"].rows(ids))
            short = " (short)" if rows == max(ROWS) and rate < TARGET_SHARE * bare else ""
            print(
                f"| {label} | {rows:,} | {took_s['kernels'] * 1e3:.3f} | {rate / 1e9:,.0f} "
                f"| {rate / bare:.0%}{short} | {torch_ms} | {error:.1e} |"
            )


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    norm = want.float().norm(dim=-1, keepdim=True)
    return float(((got.float() - want.float()).abs() / norm).max())


def main(device: torch.device) -> None:
    """All of it; on a device without kernels a small run that says what it leaves out."""
    torch.backends.cuda.matmul.allow_tf32 = False
    obstacle = why_not(device)
    if obstacle is None:
        check_kernels(device)
        shape = {"vocab_size": 8192, "num_layers": 24, "width": 2048}
    else:
        print(f"kernels are not measured: {obstacle}; torch's path alone, at a toy size")
        shape = {"vocab_size": 512, "num_layers": 2, "width": 64}
    dtypes = (torch.bfloat16, torch.float32) if obstacle is None else (torch.bfloat16,)
    for dtype in dtypes:
        measure_look_ups(device, dtype=dtype, **shape)
    print(f"\ntarget: {TARGET_SHARE:.0%} of a copy at {max(ROWS):,} rows; (short) where missed")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    main(torch.device(parser.parse_args().device))
