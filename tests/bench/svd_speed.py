"""Gram + eigh + projection against torch.linalg.svd, and whether they find the same.

Both sides produce the basis [R, D] and the coefficients of a 32768 x 1024 float32 table at half
rank, ours a block of rows at a time as an encoder takes them, torch's all at once. They run in
turn, several rounds; the ratio of a round compares neighbours in time and the median is reported.
Ours: tiles and row blocks on Python threads with one torch thread each, eigh on one thread. torch:
its own threads. Then truncation errors and singular values are compared on a mild and on a steep
spectrum. With one thread the processor time of both is compared as well: other processes on the
machine do not disturb it.

    python tests/bench/svd_speed.py [--threads 2] [--rounds 5]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from concurrent.futures import Executor

import torch

from tolkit.compress.gram import BLOCK_ROWS, Basis, GramAccumulator, top_basis
from tolkit.parallel import block_pool

ROWS, WIDTH, RANK = 32768, 1024, 512
TARGET_RATIO = 3.0


def table_of(decades: float) -> torch.Tensor:
    """float32 [N, D] whose singular values fall over `decades` powers of ten."""
    generator = torch.Generator().manual_seed(0)
    mixing_DD = torch.linalg.qr(torch.randn((WIDTH, WIDTH), generator=generator))[0]
    rows_ND = torch.randn((ROWS, WIDTH), generator=generator)
    return (rows_ND * torch.logspace(0, -decades, WIDTH)) @ mixing_DD


def ours(
    table_ND: torch.Tensor, pool: Executor, product_dtype: torch.dtype = torch.float32
) -> tuple[Basis, dict[str, float]]:
    marks = [time.perf_counter()]
    accumulator = GramAccumulator(WIDTH, pool=pool, product_dtype=product_dtype)
    accumulator.add(table_ND)
    marks.append(time.perf_counter())
    basis = top_basis(accumulator.gram_DD(), RANK)
    marks.append(time.perf_counter())
    basis_DR = basis.basis_RD.T.contiguous()

    def project(rows_ND: torch.Tensor) -> float:
        coeffs_NR = rows_ND @ basis_DR
        return float(coeffs_NR[0, 0])

    for _ in pool.map(project, table_ND.split(BLOCK_ROWS)):
        pass
    marks.append(time.perf_counter())
    names = ("gram", "eigh", "projection")
    return basis, {n: b - a for n, a, b in zip(names, marks, marks[1:], strict=False)}


def theirs(table_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    left_ND, singular_D, right_DD = torch.linalg.svd(table_ND, full_matrices=False)
    return right_DD[:RANK], left_ND[:, :RANK] * singular_D[:RANK], singular_D


def truncation_error(table_ND: torch.Tensor, basis_RD: torch.Tensor) -> float:
    """Frobenius norm of what the basis leaves, in float64."""
    basis_RD = basis_RD.double()
    total = 0.0
    for rows_ND in table_ND.split(4096):
        exact_ND = rows_ND.double()
        total += float((exact_ND - (exact_ND @ basis_RD.T) @ basis_RD).square().sum())
    return total**0.5


def compare_quality(decades: float, pool: Executor) -> None:
    table_ND = table_of(decades)
    svd_RD, _, singular_D = theirs(table_ND)
    reference = truncation_error(table_ND, svd_RD)
    share = reference / float(table_ND.norm())
    sys.stdout.write(
        f"spectrum over {decades:g} decades, rank {RANK}: truncated {share:.2e} of the norm\n"
    )
    for product_dtype in (torch.float32, torch.float64):
        basis, _ = ours(table_ND, pool, product_dtype)
        error = truncation_error(table_ND, basis.basis_RD)
        rounded = truncation_error(table_ND, basis.basis_RD.half())
        found_D = basis.energies_D.sqrt()
        kept = singular_D[:RANK].double()
        apart = float(((found_D[:RANK] - kept).abs() / kept).max())
        sys.stdout.write(
            f"  products in {str(product_dtype)[6:]}: error against torch's svd"
            f" {error / reference - 1:+.1e}, with the basis in f16 {rounded / reference - 1:+.1e};"
            f" kept singular values apart by at most {apart:.1e}\n"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table_ND = table_of(1)
    sys.stdout.write(f"{ROWS} x {WIDTH} float32, rank {RANK}, {options.threads} threads\n")
    ratios, our_s, their_s = [], [], []
    our_cpu_s, their_cpu_s = [], []
    with block_pool(options.threads) as blocks:
        torch.set_num_threads(options.threads)  # the peer's own; workers keep one each
        pool = blocks.executor
        ours(table_ND, pool)
        for _ in range(options.rounds):
            start, start_cpu = time.perf_counter(), time.process_time()
            _, parts = ours(table_ND, pool)
            middle, middle_cpu = time.perf_counter(), time.process_time()
            theirs(table_ND)
            our_s.append(middle - start)
            their_s.append(time.perf_counter() - middle)
            our_cpu_s.append(middle_cpu - start_cpu)
            their_cpu_s.append(time.process_time() - middle_cpu)
            ratios.append(their_s[-1] / our_s[-1])
            listed = ", ".join(f"{name} {part_s:.3f} s" for name, part_s in parts.items())
            sys.stdout.write(f"  {listed}; torch.linalg.svd {their_s[-1]:.3f} s\n")
        sys.stdout.write(
            f"ours {statistics.median(our_s):.3f} s, torch.linalg.svd"
            f" {statistics.median(their_s):.3f} s, ratio {statistics.median(ratios):.2f},"
            f" target {TARGET_RATIO}\n"
        )
        if options.threads == 1:
            cpu_ratio = statistics.median(their_cpu_s) / statistics.median(our_cpu_s)
            sys.stdout.write(f"processor time: ratio {cpu_ratio:.2f}\n")
        for decades in (1, 4):
            compare_quality(decades, pool)


if __name__ == "__main__":
    main()
