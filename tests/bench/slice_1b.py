"""Memory and time of build and compress at the 1B shape, on a slice of two layers.

    python tests/bench/slice_1b.py [--folder DIR] [--layers 2] [--threads 2] [--rows 128256]
        [--only CASE,..]

Writes a random bf16 checkpoint (V 128,256, D 2048, K 5464; 0.8 GB) into the folder, then runs
each command in a process of its own and samples its anonymous memory (RssAnon, as DESIGN's
"baseline" counts it: mapped file pages left out). Needs about 4 GB of disk.

Prints: the baseline after imports with the checkpoint mapped, the peak above it, seconds, also for
each GB of the table at 16 bits, and beside them the bare torch matmul loop over the same blocks and
bitsandbytes quantising and dequantising the bundle's rows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _memory import MIB, PeakMemory

from tolkit.build import build
from tolkit.bundling import Resources
from tolkit.compress import CompressSpec, compress
from tolkit.model import ModelConfig, checkpoint_tensors, expected_shapes
from tolkit.progress import SilentProgress
from tolkit.sources import CheckpointSource, TableSource, open_source
from tolkit_formats.tensorfile import TensorStream


def config(layers: int, rows: int) -> ModelConfig:
    """The paper's 1B shape (MemoryLLM Table 5) with fewer layers."""
    return ModelConfig(
        architecture="memory",
        vocab_size=rows,
        hidden_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        intermediate_size=0,
        memory_intermediate_size=5464,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )


def write_checkpoint(folder: Path, layers: int, rows: int) -> None:
    """Random weights, written a tensor at a time."""
    folder.mkdir(parents=True)
    shape = config(layers, rows)
    (folder / "config.json").write_text(json.dumps(shape.to_json()))
    shapes = expected_shapes(shape)
    directory = [(name, "BF16", size) for name, size in shapes.items()]
    generator = torch.Generator().manual_seed(0)
    with TensorStream(folder / "model.safetensors", directory) as stream:
        for size in shapes.values():
            scale = 1.0 if len(size) == 1 else size[1] ** -0.5
            values = torch.randn(size, generator=generator).mul_(scale)
            if len(size) == 1:
                values = values.abs_().clamp_(0.5, 1.5)
            stream.write(values.to(torch.bfloat16).view(torch.uint16).numpy())


def measured(work: Callable[[], object]) -> dict[str, float]:
    """Run `work`; peak anonymous memory above the baseline, and seconds."""
    started = time.monotonic()
    with PeakMemory(0.005) as memory:
        work()
    return {
        "baseline_mib": memory.baseline_bytes / MIB,
        "peak_above_baseline_mib": memory.added_mib,
        "elapsed_s": time.monotonic() - started,
    }


def bare_matmuls(source: CheckpointSource, threads: int) -> float:
    """Seconds of the three products of every block and layer, and nothing else."""
    torch.set_num_threads(threads)
    files = checkpoint_tensors(source.path)
    embedding_VD = files.tensor("model.embed_tokens.weight")
    started = time.monotonic()
    for layer in range(source.num_layers):
        gate, up, down = (
            files.tensor(f"model.layers.{layer}.memory_mlp.{part}_proj.weight")
            .float()
            .T.contiguous()
            for part in ("gate", "up", "down")
        )
        for first in range(0, source.vocab_size, 1024):
            block = embedding_VD[first : first + 1024].float()
            _ = ((block @ gate) * (block @ up)) @ down
    return time.monotonic() - started


def bitsandbytes_nf4(source: TableSource) -> float:
    """Seconds of quantising and dequantising every block of a bundle, decoding it left out."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    elapsed_s = 0.0
    for layer in range(source.num_layers):
        read = source.plane(layer)
        for first in range(0, source.vocab_size, 1024):
            block = read(first, min(first + 1024, source.vocab_size)).flatten()
            started = time.monotonic()
            codes, state = quantize_4bit(block, blocksize=64, quant_type="nf4")
            dequantize_4bit(codes, state)
            elapsed_s += time.monotonic() - started
    return elapsed_s


def child(name: str, folder: Path, threads: int) -> dict[str, float]:
    """One command in this process."""
    checkpoint = folder / "ckpt"
    resources = Resources(threads=threads, force=True)
    progress = SilentProgress()
    source = CheckpointSource(checkpoint)  # mapped: part of the baseline
    if name == "matmul":
        return {"elapsed_s": bare_matmuls(source, threads)}
    if name == "bitsandbytes nf4 of the bundle":
        torch.set_num_threads(threads)
        return {"elapsed_s": bitsandbytes_nf4(open_source(folder / "b.tol"))}
    if name == "build":
        out = folder / "b.tol"
        return measured(lambda: build(checkpoint, out, resources=resources, progress=progress))
    spec = {
        "rank 50 % + nf4": CompressSpec(rank="50%", codec="nf4"),
        "nf4": CompressSpec(codec="nf4"),
        "int8": CompressSpec(codec="int8"),
        "bands 1.0": CompressSpec(bits_per_value=1.0),
        "entropy 1.0": CompressSpec(bits_per_value=1.0, coding="entropy"),
    }[name.removesuffix(" from bundle")]
    start = folder / "b.tol" if name.endswith("from bundle") else checkpoint
    out = folder / "c.tol"
    return measured(lambda: compress(start, out, spec, resources=resources, progress=progress))


CASES = (
    "matmul",
    "build",
    "matmul",
    "bitsandbytes nf4 of the bundle",
    "int8 from bundle",
    "nf4 from bundle",
    "rank 50 % + nf4 from bundle",
    "rank 50 % + nf4",
    "bands 1.0 from bundle",
    "bands 1.0",
    "entropy 1.0 from bundle",
)
# DESIGN: build and compress --rank; one layer's FFN in float32 is 128 MiB.
TARGETS_MIB = {"build": 128 + 256, "rank": 400}


def main() -> None:
    """Run all cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=128_256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="cases by name, comma-separated")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(arguments.child, arguments.folder, arguments.threads)))
        return
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="slice-1b-"))
    if not (folder / "ckpt").exists():
        write_checkpoint(folder / "ckpt", arguments.layers, arguments.rows)
    print(
        f"V {arguments.rows:,}, D 2048, K 5464, L {arguments.layers}, {arguments.threads} threads"
    )
    print("| command | seconds | seconds a GB | baseline MiB | peak above MiB | target MiB |")
    print("|---|---|---|---|---|---|")
    table_gb = 2 * arguments.rows * 2048 * arguments.layers / 1e9
    for case in CASES:
        if arguments.only and case not in arguments.only.split(","):
            continue
        command = [sys.executable, __file__, "--child", case, "--folder", str(folder)]
        command += ["--threads", str(arguments.threads)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        row = json.loads(output.splitlines()[-1])
        target = TARGETS_MIB.get(case.split()[0])
        print(
            f"| {case} | {row['elapsed_s']:.1f} | {row['elapsed_s'] / table_gb:.1f} | "
            f"{row.get('baseline_mib', 0):.0f} | "
            f"{row.get('peak_above_baseline_mib', 0):.0f} | {target or ''} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
