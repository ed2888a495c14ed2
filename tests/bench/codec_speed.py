"""How fast a codec encodes with feedback, against bitsandbytes' quantise + dequantise.

Both sides run in turn, several rounds, on the same 16384 x 2048 float32 values; the ratio of a
round compares neighbours in time, the median over rounds is reported. Ours: blocks of 1,024 rows
on Python threads with one torch thread each: target = table + carry, encode (codes and decoded
rows), carry = target - decoded. bitsandbytes: its own threads, the whole array at once, codes and
decoded rows, no carry. Rates are GB/s of float32 input.

    python tests/bench/codec_speed.py [--threads 2] [--rounds 7]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import bitsandbytes.functional as bnb
import torch

from tolkit.compress.codecs import encoder_for
from tolkit.parallel import BlockPool, block_pool
from tolkit_formats.codecs import codec_from_json

ROWS, WIDTH, BLOCK_ROWS = 16384, 2048, 1024
CODECS = {
    "int8": {"name": "int8"},
    "nf4": {"name": "nf4", "group_size": 64},
    "fp4": {"name": "fp4", "group_size": 64},
    "int4": {"name": "int4", "group_size": 64},
}
TARGET_RATIOS = {"int8": 0.7, "nf4": 0.85}


def ours(name: str, table_ND: torch.Tensor, carry_ND: torch.Tensor, pool: BlockPool) -> None:
    encoder = encoder_for(codec_from_json(CODECS[name], WIDTH))

    def block(start: int) -> None:
        rows = slice(start, start + BLOCK_ROWS)
        target_ND = table_ND[rows] + carry_ND[rows]
        _plane_NB, decoded_ND = encoder.encode(target_ND, {})
        torch.sub(target_ND, decoded_ND, out=carry_ND[rows])

    for _ in pool.map(block, range(0, ROWS, BLOCK_ROWS)):
        pass


def theirs(name: str, table_ND: torch.Tensor) -> None:
    if name == "int8":
        codes, state = bnb.quantize_blockwise(table_ND, blocksize=WIDTH)
        bnb.dequantize_blockwise(codes, state)
    else:
        kind = "nf4" if name == "int4" else name
        codes, state = bnb.quantize_4bit(table_ND.view(-1), blocksize=64, quant_type=kind)
        bnb.dequantize_4bit(codes, state)


def elapsed_s(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table_ND = torch.randn((ROWS, WIDTH), generator=torch.Generator().manual_seed(0))
    size_gb = table_ND.numel() * 4 / 1e9
    sys.stdout.write(f"{ROWS} x {WIDTH} float32, {options.threads} threads\n")
    with block_pool(options.threads) as pool:
        torch.set_num_threads(options.threads)  # the peer's own; workers keep one each
        for name in CODECS:
            carry_ND = torch.zeros_like(table_ND)
            ours(name, table_ND, carry_ND, pool)
            theirs(name, table_ND[:BLOCK_ROWS])
            pairs = [
                (
                    elapsed_s(lambda n=name, c=carry_ND: ours(n, table_ND, c, pool)),
                    elapsed_s(lambda n=name: theirs(n, table_ND)),
                )
                for _ in range(options.rounds)
            ]
            ratio = statistics.median(their_s / our_s for our_s, their_s in pairs)
            ours_gbs = size_gb / statistics.median(our_s for our_s, _ in pairs)
            theirs_gbs = size_gb / statistics.median(their_s for _, their_s in pairs)
            goal = f", target {TARGET_RATIOS[name]}" if name in TARGET_RATIOS else ""
            sys.stdout.write(
                f"{name:5s} ours {ours_gbs:.2f} GB/s, bitsandbytes"
                f"{' (nf4)' if name == 'int4' else ''} {theirs_gbs:.2f} GB/s,"
                f" ratio {ratio:.2f}{goal}\n"
            )


if __name__ == "__main__":
    main()
